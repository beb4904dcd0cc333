"""Interventions on a running model: add a direction, ablate directions, scale or set the codes of latents.

Each is a context manager: inside it every forward pass and every generated token is changed, with or without a KV
cache; afterwards, and after an exception, the model is as before. They nest, the outer one acting first, and they
leave the user's own hooks alone. A hook of the user's that was there before sees the unchanged activation.

A context can be entered again, and inside itself, where it then acts twice. Arguments are checked when it is made;
hooks are looked up each time it is entered, so that it acts on the model as it is then.

In the middle of a block (``hook_resid_mid``) a bridge shows the residual stream behind the point where the skip
connection branches off; what is changed there is changed at the block's output as well, so that an intervention acts
on the whole stream as it does on a `HookedTransformer`. A hook at which a change has no effect, or a partial one, is an
error.

Where a SAE is attached (``model.add_sae``), two activations go by the hook's name, and it is an error until one of
them is named: ``….hook_sae_output`` is what flows on. A SAE that is attached or detached at the hook inside the
context takes the intervention away, since the host then replaces the hook point; that is a warning on leaving.

Symbols
    x     an activation at the hook, ``(d,)``
    u     a unit direction; a its coefficient, in units of the activation
    c     a centre; Q orthonormal columns that span the directions to ablate
    z, z' a code, and the code after the change
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, SupportsIndex

import torch
from sae_lens import SAE
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.host.bos import text_start, warn_of_other_bos
from saelens_ext.host.flat_sae import (
    encode_flat,
    flat_activations,
    hooks_of,
    is_one_latent,
    latent_indices,
    latent_rows,
    refuse_sequence_codes,
)
from saelens_ext.host.hook_edits import HookFunction, edit_hook, edit_point, flat_rows, hooked
from saelens_ext.host.models import HostModel, resolve_hook
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import wide

Hooks = list[tuple[str, HookFunction]]


class Intervention(AbstractContextManager[HostModel]):
    """A change of the model's activations inside a context, which gives the model.

    ``hooks`` gives names that fire on the model as it is, and functions; called now, to check them, and on each entry.
    """

    def __init__(self, model: HostModel, hooks: Callable[[], Hooks]):
        self._model, self._hooks = model, hooks
        self._entered: list[AbstractContextManager[HostModel]] = []
        hooks()

    def __enter__(self) -> HostModel:
        context = hooked(self._model, self._hooks())
        context.__enter__()
        self._entered.append(context)
        return self._model

    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)


@standard_modes()
def add_direction(
    model: HostModel,
    hook_name: str,
    direction: Tensor,
    coefficient: float | int,
    *,
    positions: Sequence[int] | None = None,
) -> Intervention:
    """Add a multiple of a unit direction to an activation: x <- x + a u.

    Args:
        model: any TransformerLens model.
        hook_name: any alias of the hook.
        direction: ``(d,)``; only its direction counts. :func:`latent_directions` gives those of a dictionary,
            ``Detector.directions`` those that detect a concept.
        coefficient: a, any sign, in units of the activation, whose typical norm is the natural scale; 0 leaves the
            model exactly as it is. :func:`~saelens_ext.steering.strength.match_strength` finds it for a given effect.
        positions: columns of the prompt's tokens, counted from 0 with BOS and any left padding, to act on; by default
            all, generated tokens included. With it, generated tokens are left alone: inside the context, a forward
            pass over a single token after any other counts as a step of generation.

    Returns:
        A context manager that gives the model.

    Raises:
        ValueError: unknown hook, a direction that is zero or not finite, a coefficient that is not finite, or positions
            that are negative or beyond the prompt; in the forward pass, a direction of another width than the hook.

    Examples:
        >>> before = model("The assert statement")
        >>> with sx.add_direction(model, "blocks.1.hook_out", partition.exemplars[0], 2.0):
        ...     after = model("The assert statement")
        >>> bool(torch.allclose(before, after)), bool(torch.equal(before, model("The assert statement")))
        (False, True)
    """
    if direction.ndim != 1:
        raise ValueError(f"direction must have shape (d,), got {tuple(direction.shape)}; pass one row of a dictionary.")
    if not math.isfinite(coefficient):
        raise ValueError(f"coefficient must be finite, got {coefficient!r}.")
    vector = unit_rows(direction[None])[0] * coefficient

    def hooks() -> Hooks:
        hook = edit_hook(lambda x: x + vector.to(x), len(vector), hook_name, positions)
        point = edit_point(model, hook_name)
        # Some hook points of a bridge compute differently as soon as a hook returns anything.
        return [(point, hook)] if coefficient != 0 else []

    return Intervention(model, hooks)


class LatentDirections(NamedTuple):
    """Directions of a dictionary's latents, and where they act on a model."""

    hook_name: str
    """Where the dictionary writes."""
    directions: Tensor
    """``(d,)`` for one latent, ``(m, d)`` for several; of any length, 0 for a dead latent."""
    typical_norm: float | None
    """Median norm of the centred activations there, the natural scale of coefficients; None where the dictionary does
    not record it, as for a transcoder, which reads elsewhere."""


@standard_modes()
def latent_directions(
    model: HostModel,
    sae: SAE[Any],
    latents: SupportsIndex | Sequence[SupportsIndex] | None = None,
    *,
    basis: str | None = None,
) -> LatentDirections:
    """The directions of latents as interventions take them: the hook, the rows, and the scale of coefficients.

    Args:
        model: the one that is to be steered. A dictionary that was built on texts that start otherwise is a warning.
        sae: any SAELens SAE or transcoder.
        latents: one or several, in [0, d_sae); by default all.
        basis: "exemplar" or "mean", of a dictionary that has both; by default its rows of ``W_dec``.

    Raises:
        ValueError: no such latent or basis, or a dictionary that does not say where it writes.

    Examples:
        >>> hook, direction, norm = sx.latent_directions(model, partition, 0)
        >>> with sx.add_direction(model, hook, direction, 0.5 * norm):
        ...     logits = model("The assert statement")
    """
    read, write = hooks_of(sae)
    rows = latent_rows(sae, latent_indices(sae, latents), basis)
    warn_of_other_bos(sae.cfg.metadata.get("prepend_bos"), text_start(model).prepends_bos, "this model's prompts")
    norm = sae.cfg.metadata.typical_norm if read == write else None
    return LatentDirections(write, rows[0] if is_one_latent(latents) else rows, norm)


@standard_modes()
def ablate_directions(
    model: HostModel, hook_name: str, directions: Tensor, *, center: Tensor | None = None
) -> Intervention:
    """Project directions out of an activation, about a centre: x <- x - Q Q^T (x - c).

    What is orthogonal to the directions stays; along them x takes the value of the centre.

    Args:
        model: any TransformerLens model.
        hook_name: any alias of the hook.
        directions: ``(m, d)`` or ``(d,)``; they may depend on one another.
        center: c, ``(d,)``; 0 by default.

    Returns:
        A context manager that gives the model.

    Raises:
        ValueError: unknown hook, a direction that is zero or not finite, a centre of another width; in the forward
            pass, directions of another width than the hook.

    Examples:
        >>> with sx.ablate_directions(model, "blocks.1.hook_out", partition.exemplars[:1], center=partition.center):
        ...     _, cache = model.run_with_cache("The assert statement", names_filter=["blocks.2.hook_in"])
        >>> left = (cache["blocks.2.hook_in"] - partition.center) @ partition.exemplars[0]
        >>> bool((left.abs() < 1e-3).all())
        True

    Source: arXiv 2605.14347, refusal ablation.
    """
    rows = unit_rows(directions[None] if directions.ndim == 1 else directions).detach()
    basis = orthonormal_basis(rows)
    origin = _origin(center, rows[0])

    def edit(x: Tensor) -> Tensor:
        q = basis.to(x)
        return x - ((x - origin.to(x)) @ q) @ q.T

    return Intervention(model, lambda: [(edit_point(model, hook_name), edit_hook(edit, rows.shape[1], hook_name))])


@standard_modes()
def replace_direction(
    model: HostModel,
    hook_name: str,
    direction: Tensor,
    *,
    positions: Sequence[int] | None = None,
    center: Tensor | None = None,
) -> Intervention:
    """Turn activations into a direction, keeping their distance from a centre: x <- c + |x - c| u.

    With an exemplar as direction and the partition's centre this patches in the exemplar: everything that the token's
    activation says apart from its size is replaced by what the exemplar says.

    Args:
        model: any TransformerLens model.
        hook_name: any alias of the hook.
        direction: ``(d,)``; only its direction counts.
        positions: as for :func:`add_direction`.
        center: c, ``(d,)``; 0 by default.

    Returns:
        A context manager that gives the model.

    Raises:
        ValueError: as :func:`add_direction`, or a centre of another width or not finite.

    Examples:
        >>> with sx.replace_direction(
        ...     model, "blocks.1.hook_out", partition.exemplars[0], positions=[2], center=partition.center
        ... ):
        ...     logits = model("The assert statement")
    """
    if direction.ndim != 1:
        raise ValueError(f"direction must have shape (d,), got {tuple(direction.shape)}; pass one row of a dictionary.")
    unit = unit_rows(direction[None])[0].detach()
    origin = _origin(center, unit)

    def edit(x: Tensor) -> Tensor:
        c = origin.to(x)
        return c + (x - c).norm(dim=-1, keepdim=True) * unit.to(x)

    return Intervention(
        model, lambda: [(edit_point(model, hook_name), edit_hook(edit, len(unit), hook_name, positions))]
    )


@standard_modes()
def scale_latent(
    model: HostModel, sae: SAE[Any], latent: SupportsIndex | Sequence[SupportsIndex], factor: float | int
) -> Intervention:
    """Multiply the code of one or several latents: x <- x + decode(z') - decode(z), with z'_j = factor * z_j.

    What the dictionary does not reconstruct is kept; a token whose code does not change is left exactly as it is.

    Args:
        model: any TransformerLens model.
        sae: any SAELens SAE at its own hook; a transcoder reads at its input hook and acts at its output hook.
        latent: index or indices j, each in [0, d_sae).
        factor: finite; 0 removes the latent, 1 changes nothing.

    Returns:
        A context manager that gives the model.

    Raises:
        ValueError: no such latent, a factor that is not finite, a dictionary without a hook name or whose hook the
            model does not have, a SAE attached at that hook, or a SAE that codes whole sequences.

    Examples:
        >>> with sx.scale_latent(model, partition, 0, factor=0.0):  # switch the latent off, keep the error term
        ...     logits = model("The assert statement")
    """
    if not math.isfinite(factor):
        raise ValueError(f"factor must be finite, got {factor!r}.")
    chosen = _latent_mask(sae, latent)
    return _latents_edited(model, sae, lambda z: torch.where(chosen.to(z.device), z * factor, z))


@standard_modes()
def clamp_latent(
    model: HostModel, sae: SAE[Any], latent: SupportsIndex | Sequence[SupportsIndex], value: float | int
) -> Intervention:
    """Set the code of one or several latents at every token: x <- x + decode(z') - decode(z), with z'_j = value.

    Args:
        model: any TransformerLens model.
        sae: as for :func:`scale_latent`.
        latent: index or indices j, each in [0, d_sae).
        value: finite, in units of the code.

    Returns:
        A context manager that gives the model.

    Raises:
        ValueError: as for :func:`scale_latent`.
    """
    if not math.isfinite(value):
        raise ValueError(f"value must be finite, got {value!r}.")
    chosen = _latent_mask(sae, latent)
    return _latents_edited(model, sae, lambda z: torch.where(chosen.to(z.device), value, z))


# --- from the arguments to numbers ---


def unit_rows(directions: Tensor) -> Tensor:
    """Check directions ``(m, d)`` and scale them to unit norm, in float32 or wider."""
    if directions.ndim != 2 or directions.numel() == 0:
        raise ValueError(f"directions must have shape (m, d) or (d,), none of them 0, got {tuple(directions.shape)}.")
    rows = _checks.finite(directions, "direction").to(torch.promote_types(directions.dtype, torch.float32))
    norms = rows.norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        raise ValueError(f"Direction {int((norms == 0).flatten().nonzero()[0])} is zero: it points nowhere.")
    return rows / norms


def _origin(center: Tensor | None, direction: Tensor) -> Tensor:
    """The centre of an edit, ``(d,)``; 0 where none is given."""
    origin = torch.zeros_like(direction) if center is None else center.detach()
    if origin.shape != direction.shape:
        raise ValueError(f"center must have shape {tuple(direction.shape)}, got {tuple(origin.shape)}.")
    return _checks.finite(origin, "center")


def orthonormal_basis(rows: Tensor) -> Tensor:
    """Orthonormal columns ``(d, rank)`` that span unit rows ``(m, d)``, dependent ones counted once."""
    _, values, vectors = torch.linalg.svd(wide(rows.cpu()), full_matrices=False)
    # The rows carry float32 rounding at best, so a smaller singular value is that of no direction.
    tolerance = max(rows.shape) * torch.finfo(torch.float32).eps * values[0]
    return vectors[values > tolerance].T.to(rows.dtype).to(rows.device)


def _latent_mask(sae: SAE[Any], latents: SupportsIndex | Sequence[SupportsIndex]) -> Tensor:
    """True at the chosen latents, ``(d_sae,)``."""
    chosen = latent_indices(sae, latents)
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    mask[chosen] = True
    return mask


def _latents_edited(model: HostModel, sae: SAE[Any], change: Callable[[Tensor], Tensor]) -> Intervention:
    """Change codes where the dictionary writes, from what it reads, and keep its error."""
    refuse_sequence_codes(sae)

    def hooks() -> Hooks:
        read, write = resolve_hook(model, hooks_of(sae)[0]), edit_point(model, hooks_of(sae)[1])
        if read == write:
            return [(write, lambda x, hook=None: _with_codes(x, x, sae, change, write))]
        inputs: list[Tensor] = []
        # The first hook runs behind all that are there, so the transcoder reads what flows on from its input.
        return [
            (read, lambda x, hook=None: inputs.append(x)),
            (write, lambda x, hook=None: _with_codes(x, inputs.pop(), sae, change, write)),
        ]

    return Intervention(model, hooks)


@standard_modes()
def _with_codes(x: Tensor, source: Tensor, sae: SAE[Any], change: Callable[[Tensor], Tensor], hook_name: str) -> Tensor:
    """Give x + decode(z') - decode(z) for the codes z of ``source``."""
    device = sae.W_dec.device
    codes = encode_flat(sae, flat_rows(source, sae.cfg.d_in, hook_name).to(device))
    changed = change(codes)
    # One call for both: a SAE that normalises its input forgets the scale after one decode.
    with flat_activations(sae):
        after, before = sae.decode(torch.stack([changed, codes])).to(x.device)
    flat = flat_rows(x, sae.W_dec.shape[1], hook_name)
    wide = torch.promote_types(x.dtype, torch.float32)
    edited = (flat.to(wide) + (after.to(wide) - before.to(wide))).to(x.dtype)
    # Equal rows of one product can differ in their last bit, so where no code changes the difference is not added.
    touched = (changed != codes).any(dim=-1, keepdim=True).to(x.device)
    return torch.where(touched, edited, flat).reshape(x.shape)
