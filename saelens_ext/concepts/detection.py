"""Concept detection: which directions or latents tell sentences about a concept from neutral ones.

One interface for whatever scores an activation: the features of a factorisation, the latents of any SAELens SAE, the
regions of an exemplar partition, and single directions such as a difference of means.

Symbols
    x       an activation, ``(d,)``, at a token that is no special token
    w       a direction, ``(d,)``; c the origin that activations are measured from
    score   of a token: cosine of x - c and w, projection <x - c, w / |w|>, or code; of a sentence: the largest over its
    tokens A, B    mean score of the activating and of the neutral sentences
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from sae_lens import SAE, Transcoder
from torch import Tensor

from saelens_ext import _checks
from saelens_ext._modes import standard_modes
from saelens_ext.concepts.token_activations import token_activations
from saelens_ext.host.bos import text_start, warn_of_other_bos
from saelens_ext.host.flat_sae import encode_flat, refuse_sequence_codes
from saelens_ext.host.models import HostModel
from saelens_ext.ops.detection import LOG_RATIO_LIMIT, auroc, auroc_interval, log_ratio, standardised_difference

if TYPE_CHECKING:
    import pandas

# Scores held at once: 16 MB in float32, whatever the number of latents.
_SCORES_PER_BLOCK = 2**22


@dataclass(frozen=True, kw_only=True, eq=False)
class Detector:
    """k scores of an activation, one per direction or latent."""

    hook_name: str
    """Where activations are read, in any spelling."""
    names: tuple[str, ...]
    """What each score is of; k of them."""
    score: Callable[[Tensor], Tensor]
    """Maps activations ``(n, d)`` to scores ``(n, k)``, each row by itself."""
    row_cost: int
    """Numbers that ``score`` holds per activation, which bounds how many it is given at once."""
    prepend_bos: bool | None = None
    """Whether what scores was built on texts that start with BOS; None where that is not known."""

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
        given = tuple(names) if names is not None else tuple(f"direction {row}" for row in range(len(rows)))
        if len(given) != len(rows):
            raise ValueError(f"There are {len(rows)} directions and {len(given)} names; give one name each.")
        score = _similarity(rows, center, _checks.choice(similarity, ("cosine", "dot"), "similarity"))
        return cls(hook_name=hook_name, names=given, score=score, row_cost=len(rows))

    @classmethod
    def from_dictionary(
        cls,
        sae: SAE[Any],
        *,
        similarity: Literal["cosine", "dot", "code"] = "cosine",
        latents: Sequence[int] | None = None,
        center: bool = True,
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
            hook_name: where activations are read; by default what the dictionary records.

        Returns:
            The detector. A latent whose row of ``W_dec`` is zero has cosine 0 with everything.

        Raises:
            ValueError: no hook known, no such latent, a dictionary that codes whole sequences, or a transcoder with
                run-time normalisation, whose rows are not in the units of the hook it writes to.
        """
        _checks.choice(similarity, ("cosine", "dot", "code"), "similarity")
        chosen = _chosen_latents(sae, latents)
        kind = "region" if hasattr(sae, "assign") else "latent"
        names = tuple(f"{kind} {index}" for index in chosen.tolist())
        writes = similarity != "code" and isinstance(sae, Transcoder)
        hook = hook_name or (sae.cfg.metadata.hook_name_out if writes else sae.cfg.metadata.hook_name)
        if hook is None:
            raise ValueError(
                "The dictionary does not record its hook. Pass hook_name=, where its activations are to be read."
            )
        if similarity == "code":
            score, cost = _codes(sae, chosen, latents is None), sae.cfg.d_sae
        else:
            score, cost = _row_similarity(sae, chosen, similarity, center), len(names)
        return cls(
            hook_name=hook,
            names=names,
            score=score,
            row_cost=cost,
            prepend_bos=sae.cfg.metadata.get("prepend_bos"),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptScores:
    """How well each of k scores detects a concept; tensors on the CPU, one entry per score, float64 unless said
    otherwise.
    """

    names: tuple[str, ...]
    """What each score is of."""
    activating: Tensor
    """Score of every activating sentence, float32 ``(p, k)``."""
    neutral: Tensor
    """Score of every neutral sentence, float32 ``(q, k)``."""
    mean_activating: Tensor
    """A, in units of the score."""
    mean_neutral: Tensor
    """B, in units of the score."""
    log_ratio: Tensor
    """S = log(A / B) in nats, continued to other means as :func:`saelens_ext.ops.detection.log_ratio` says."""
    has_positive_means: Tensor
    """Whether A and B are positive, so that S is the published score; bool."""
    d_prime: Tensor
    """A - B in standard deviations over sentences."""
    auroc: Tensor
    """Probability that an activating sentence scores above a neutral one, ties counting half; in [0, 1]."""
    auroc_low: Tensor
    """Lower confidence limit of it, for each score by itself: the best of many scores is better than it will be
    again.
    """
    auroc_high: Tensor
    """Upper confidence limit of it."""
    confidence: float
    """Of the limits, in (0, 1)."""

    @property
    def difference(self) -> Tensor:
        """A - B, in units of the score."""
        return self.mean_activating - self.mean_neutral

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per score."""
        import pandas

        columns = (
            "mean_activating",
            "mean_neutral",
            "log_ratio",
            "has_positive_means",
            "difference",
            "d_prime",
            "auroc",
            "auroc_low",
            "auroc_high",
        )
        return pandas.DataFrame({"name": list(self.names)} | {name: getattr(self, name).numpy() for name in columns})


@standard_modes()
def concept_scores(
    model: HostModel,
    detector: Detector,
    activating: Sequence[str],
    neutral: Sequence[str],
    *,
    limit: float | int = LOG_RATIO_LIMIT,
    confidence: float = 0.95,
    context_size: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> ConceptScores:
    """Score sentences that should and that should not activate a concept, by all latents of a detector at once.

    Choosing the best latent and trusting its score takes other sentences for the second than for the first, see
    :func:`saelens_ext.concepts.diff_means.split_sentences`.

    Args:
        model: any TransformerLens model.
        detector: what scores.
        activating: p sentences, at least 1, of which each is one document however long.
        neutral: q sentences.
        limit: largest size of the log ratio, in nats.
        confidence: of the limits of the AUROC, in (0, 1).
        context_size: tokens in a window, BOS included; a longer sentence is cut into windows. By default 128, or the
            model's own limit if that is less.
        batch_size: windows in a forward pass.
        progress: show progress bars.

    Raises:
        ValueError: no sentence, one without tokens to score, or as :class:`ActivationStream`.

    Source: arXiv 2506.10920, concept detection. Special tokens are left out for every method alike.
    """
    options = {"context_size": context_size, "batch_size": batch_size, "progress": progress}
    tables = [sentence_scores(model, detector, sentences, **options) for sentences in (activating, neutral)]
    return compare_sentences(*tables, names=detector.names, limit=limit, confidence=confidence)


@torch.no_grad()
def sentence_scores(
    model: HostModel,
    detector: Detector,
    sentences: Sequence[str],
    *,
    context_size: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """The largest score over the tokens of each sentence, special tokens excluded.

    Memory: the result, and a block of scores of tens of megabytes.

    Args:
        model: any TransformerLens model.
        detector: what scores.
        sentences: as for :func:`concept_scores`, whose other arguments these are too.
        context_size: tokens in a window.
        batch_size: windows in a forward pass.
        progress: show a progress bar.

    Returns:
        ``(len(sentences), k)``, float32 on the CPU.

    Raises:
        ValueError: as :func:`concept_scores`.
    """
    warn_of_other_bos(detector.prepend_bos, text_start(model).prepends_bos, "this model's sentences")
    sentences = _checks.texts(sentences, "sentences")
    table = torch.full((len(sentences), len(detector.names)), -torch.inf)
    rows = max(1, _SCORES_PER_BLOCK // detector.row_cost)
    options = {"context_size": context_size, "batch_size": batch_size, "progress": progress}
    for x, documents in token_activations(model, detector.hook_name, sentences, **options):
        for part, of in zip(x.split(rows), documents.split(rows), strict=True):
            first, last = int(of[0]), int(of[-1]) + 1
            scores = _checks.finite(detector.score(part), "A score").to(torch.float32)
            # A stream goes through its documents in order, so the sentences of a block lie side by side.
            best = scores.new_full((last - first, scores.shape[1]), -torch.inf)
            best.scatter_reduce_(0, (of - first).to(scores.device)[:, None].expand_as(scores), scores, "amax")
            table[first:last] = torch.maximum(table[first:last], best.cpu())
    return table


def compare_sentences(
    activating: Tensor,
    neutral: Tensor,
    *,
    names: Sequence[str],
    limit: float | int = LOG_RATIO_LIMIT,
    confidence: float = 0.95,
) -> ConceptScores:
    """Compare two tables of :func:`sentence_scores`, of one detector.

    Args:
        activating: ``(p, k)``.
        neutral: ``(q, k)``.
        names: k names.
        limit: largest size of the log ratio, in nats.
        confidence: of the limits of the AUROC, in (0, 1).

    Raises:
        ValueError: tables of other shapes, without rows, or not finite.
    """
    if activating.ndim != 2 or neutral.ndim != 2 or not activating.shape[1] == neutral.shape[1] == len(names):
        raise ValueError(
            f"The tables must have shapes (p, {len(names)}) and (q, {len(names)}), one column per name, got "
            f"{tuple(activating.shape)} and {tuple(neutral.shape)}."
        )
    area = auroc(activating, neutral)
    low, high = auroc_interval(area, len(activating), len(neutral), confidence=confidence)
    a, b = activating.double().mean(0), neutral.double().mean(0)
    return ConceptScores(
        names=tuple(names),
        activating=activating,
        neutral=neutral,
        mean_activating=a,
        mean_neutral=b,
        log_ratio=log_ratio(a, b, limit=limit),
        has_positive_means=(a > 0) & (b > 0),
        d_prime=standardised_difference(activating, neutral),
        auroc=area,
        auroc_low=low,
        auroc_high=high,
        confidence=confidence,
    )


# --- what scores ---


@standard_modes()
def _similarity(rows: Tensor, center: Tensor | None, similarity: str) -> Callable[[Tensor], Tensor]:
    """Cosine with, or projection on, the rows ``(k, d)``; a zero row or activation gives 0."""
    tiny = torch.finfo(torch.float32).tiny
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    # Divided in two steps, since a row's norm may be so small that its square is not a number of this type.
    rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(tiny)
    units = rows / rows.norm(dim=1, keepdim=True).clamp_min(tiny)
    origin = None if center is None else center.detach().to(units)

    @standard_modes()
    def score(x: Tensor) -> Tensor:
        x = _checks.width(x, units.shape[1], "The activation").to(units)
        x = x if origin is None else x - origin
        if similarity == "cosine":
            x = x / x.norm(dim=1, keepdim=True).clamp_min(tiny)
        return x @ units.T

    return score


def _row_similarity(sae: SAE[Any], chosen: Tensor, similarity: str, center: bool) -> Callable[[Tensor], Tensor]:
    normalises = sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")
    if normalises and isinstance(sae, Transcoder):
        raise ValueError(
            f"This transcoder normalises its input ({sae.cfg.normalize_activations!r}), so its rows are not in the "
            "units of the hook it writes to. Use similarity='code'."
        )
    score = _similarity(sae.W_dec[chosen.to(sae.W_dec.device)], sae.b_dec if center else None, similarity)
    if not normalises:
        return score
    return lambda x: score(sae.run_time_activation_norm_fn_in(x.to(sae.W_dec.device)))


def _codes(sae: SAE[Any], chosen: Tensor, everything: bool) -> Callable[[Tensor], Tensor]:
    refuse_sequence_codes(sae)

    def score(x: Tensor) -> Tensor:
        codes = encode_flat(sae, x.to(sae.W_dec.device))
        return codes if everything else codes[:, chosen.to(codes.device)]

    return score


def _chosen_latents(sae: SAE[Any], latents: Sequence[int] | None) -> Tensor:
    indices = list(range(sae.cfg.d_sae) if latents is None else latents)
    wrong = [index for index in indices if not 0 <= index < sae.cfg.d_sae]
    if wrong or not indices:
        raise ValueError(f"latents must be one or several of 0 to {sae.cfg.d_sae - 1}, got {wrong[:5] or indices}.")
    return torch.tensor(indices)
