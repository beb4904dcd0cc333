"""What scores an activation: directions such as a difference of means, or the latents of any SAELens SAE.

Symbols
    x  an activation, ``(d,)``
    w  a direction, ``(d,)``
    c  the origin that activations are measured from, ``(d,)``
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypedDict

import torch
from sae_lens import SAE, Transcoder
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.host.flat_sae import encode_flat, latent_indices, latent_rows, refuse_sequence_codes
from saelens_ext.ops.modes import standard_modes

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True, eq=False)
class Detector:
    """k scores of an activation, one per direction or latent."""

    hook_name: str
    """Where activations are read, in any spelling; the directions, if any, act there too."""
    names: tuple[str, ...]
    """What each score is of; k of them."""
    score: Callable[[Tensor], Tensor]
    """Maps activations ``(n, d)`` to scores ``(n, k)``, each row by itself."""
    row_cost: int
    """Numbers that ``score`` holds per activation, which bounds how many it is given at once."""
    prepend_bos: bool | None = None
    """Whether what scores was built on texts that start with BOS; None where that is not known."""
    directions: Tensor | None = None
    """Unit rows w, float32 or wider ``(k, d)``, that the scores compare with and that the model can be steered along; a
    dead latent's is 0. None where the scores are codes."""
    origin: Tensor | None = None
    """c, ``(d,)`` in units of the activation; None: 0, or unknown (a dictionary that normalises its input)."""
    latents: tuple[int, ...] = ()
    """The dictionary's latent behind each score; empty where no dictionary scores."""

    @classmethod
    def from_directions(
        cls,
        directions: Tensor,
        hook_name: str,
        *,
        similarity: Literal["cosine", "dot"] = "cosine",
        center: Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> "Detector":
        """Score by directions.

        Args:
            directions: ``(k, d)``, or ``(d,)`` for one.
            hook_name: where the activations are read.
            similarity: "cosine", in [-1, 1], or "dot", the projection on the unit direction, in the activation's units.
            center: c, ``(d,)``; 0 by default, as in the paper.
            names: k names; by default "direction 0" and so on.

        Raises:
            ValueError: a direction that is zero or not finite, or shapes or a number of names that do not fit.
        """
        rows = directions[None] if directions.ndim == 1 else directions
        if rows.ndim != 2 or rows.numel() == 0:
            raise ValueError(f"directions must have shape (k, d) or (d,), none of it 0, got {tuple(directions.shape)}.")
        zero = (_checks.finite(rows, "directions") == 0).all(dim=1)
        if bool(zero.any()):
            raise ValueError(f"Direction {int(zero.nonzero()[0])} is zero: it points nowhere. Leave it out.")
        if center is not None and center.shape != rows.shape[1:]:
            raise ValueError(f"center must have shape {tuple(rows.shape[1:])}, got {tuple(center.shape)}.")
        labels = tuple(names) if names is not None else tuple(f"direction {row}" for row in range(len(rows)))
        if len(labels) != len(rows):
            raise ValueError(f"There are {len(rows)} directions and {len(labels)} names; give one name each.")
        _checks.choice(similarity, ("cosine", "dot"), "similarity")
        return cls(hook_name=hook_name, names=labels, row_cost=len(rows), **_comparison(rows, center, similarity))

    @classmethod
    def from_dictionary(
        cls,
        sae: SAE[Any],
        *,
        similarity: Literal["cosine", "dot", "code"] = "cosine",
        latents: Sequence[int] | None = None,
        center: bool = True,
        basis: Literal["exemplar", "mean"] | None = None,
        hook_name: str | None = None,
    ) -> "Detector":
        """Score by the latents of a dictionary: any SAELens SAE or transcoder, those of this package among them.

        Args:
            sae: the dictionary; left as it is. What it normalises at run time is normalised here.
            similarity: "cosine" and "dot" compare activations with the rows of ``W_dec``, for a transcoder at the hook
                it writes to; "code" is what ``encode`` gives at the hook it reads from.
            latents: which latents, in [0, d_sae); by default all.
            center: measure activations from ``b_dec``, where the dictionary's own reconstruction starts (the centre
                of an exemplar partition), rather than from 0 as in the paper. No effect on codes.
            basis: "exemplar" or "mean", of a dictionary that has both; by default its rows of ``W_dec``. No effect on
                codes.
            hook_name: where activations are read; by default what the dictionary records.

        Returns:
            The detector. A latent whose row of ``W_dec`` is zero has cosine 0 with everything.

        Raises:
            ValueError: no hook known, no such latent, a dictionary that codes whole sequences, or a transcoder with
                run-time normalisation, whose rows are not in the units of the hook it writes to.
        """
        _checks.choice(similarity, ("cosine", "dot", "code"), "similarity")
        chosen = latent_indices(sae, latents)
        kind = "region" if hasattr(sae, "assign") else "latent"
        writes = similarity != "code" and isinstance(sae, Transcoder)
        hook = hook_name or (sae.cfg.metadata.hook_name_out if writes else sae.cfg.metadata.hook_name)
        if hook is None:
            raise ValueError("The dictionary records no hook. Pass hook_name=, where its activations are to be read.")
        scoring = (
            _codes(sae, None if latents is None else chosen)
            if similarity == "code"
            else _row_comparison(sae, latent_rows(sae, chosen, basis), similarity, center)
        )
        return cls(
            hook_name=hook,
            names=tuple(f"{kind} {index}" for index in chosen),
            row_cost=sae.cfg.d_sae if similarity == "code" else len(chosen),
            prepend_bos=sae.cfg.metadata.get("prepend_bos"),
            latents=tuple(chosen),
            **scoring,
        )


# Scores are made of functions of this module, so that detectors can be sent to other processes.
class _Scoring(TypedDict):
    score: Callable[[Tensor], Tensor]
    directions: Tensor | None
    origin: Tensor | None


@standard_modes()
def _comparison(rows: Tensor, center: Tensor | None, similarity: str) -> _Scoring:
    """Cosine with, or projection on, the rows ``(k, d)``; a zero row or activation gives 0."""
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    # Divided in two steps, since a row's norm may be so small that its square is not a number of this type.
    rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(_TINY)
    units = rows / rows.norm(dim=1, keepdim=True).clamp_min(_TINY)
    origin = None if center is None else center.detach().to(units)
    return {"score": partial(_compared, units, origin, similarity), "directions": units, "origin": origin}


@standard_modes()
def _compared(units: Tensor, origin: Tensor | None, similarity: str, x: Tensor) -> Tensor:
    x = _checks.width(x, units.shape[1], "The activation").to(units)
    x = x if origin is None else x - origin
    if similarity == "cosine":
        x = x / x.norm(dim=1, keepdim=True).clamp_min(_TINY)
    return x @ units.T


def _row_comparison(sae: SAE[Any], rows: Tensor, similarity: str, center: bool) -> _Scoring:
    normalises = sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")
    if normalises and isinstance(sae, Transcoder):
        raise ValueError(
            f"This transcoder normalises its input ({sae.cfg.normalize_activations!r}), so its rows are not in the "
            "units of the hook it writes to. Use similarity='code'."
        )
    compared = _comparison(rows, sae.b_dec if center else None, similarity)
    if not normalises:
        return compared
    return {"score": partial(_normalised, sae, compared["score"]), "directions": compared["directions"], "origin": None}


def _normalised(sae: SAE[Any], score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return score(sae.run_time_activation_norm_fn_in(x.to(sae.W_dec.device)))


def _codes(sae: SAE[Any], latents: list[int] | None) -> _Scoring:
    refuse_sequence_codes(sae)
    return {"score": partial(_coded, sae, latents), "directions": None, "origin": None}


def _coded(sae: SAE[Any], latents: list[int] | None, x: Tensor) -> Tensor:
    codes = encode_flat(sae, x.to(sae.W_dec.device))
    return codes if latents is None else codes[:, latents]
