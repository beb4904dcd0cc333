"""The sources of a prefix: one vector per latent that is active, per error node, per MLP output and per embedding.

The model is causal, so what stands at the prefix is the same for every continuation: it is read once, and a
signature is the product of these vectors with the gradients of the continuations' targets.

Symbols
    M        tokens of the prefix
    m, d     sources at a site; its width
    a_j, D_j activation and decoder direction of latent j
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from saelens_ext.continuations.attribution.sites import Site
from saelens_ext.continuations.source_table import NO_LATENT, SourceTable
from saelens_ext.host.flat_sae import encode_flat, flat_activations
from saelens_ext.host.hook_edits import HookFunction, hooked
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import logits_of
from saelens_ext.ops.largest_entries import largest_entries
from saelens_ext.ops.modes import evaluating

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrefixPass:
    """What one pass over the prefix showed."""

    activations: dict[str, Tensor]
    """At each hook asked for, ``(M, d)``, heads joined, float32."""
    order: list[str]
    """The hooks in the order in which they fired."""


def read_prefix(model: HostModel, ids: Tensor, names: Sequence[str]) -> PrefixPass:
    """Run the model over a prefix ``(M,)`` and keep the activations at some hooks.

    Raises:
        ValueError: a hook that did not fire, or activations that are not one per token or not finite.
    """
    activations: dict[str, Tensor] = {}

    def keep(name: str) -> HookFunction:
        def run(x: Tensor, hook: Any = None) -> None:
            if x.shape[:2] != (1, len(ids)):
                raise ValueError(
                    f"The hook {name!r} gives a tensor of shape {tuple(x.shape)} for a prefix of {len(ids)} tokens: it "
                    "does not hold one activation per token, so nothing can be attributed to it."
                )
            activations[name] = x[0].flatten(1).float()

        return run

    hooks = [(name, keep(name)) for name in dict.fromkeys(names)]
    with evaluating(model), hooked(model, hooks):
        logits_of(model, ids[None])
    silent = [name for name in names if name not in activations]
    if silent:
        raise ValueError(f"The model ran without its hook {silent[0]!r} firing, so nothing can be attributed to it.")
    for name, activation in activations.items():
        if not bool(torch.isfinite(activation).all()):
            raise ValueError(f"The activation at {name} is not finite here; run the model in bfloat16 or float32.")
    return PrefixPass(activations, list(activations))


@dataclass(frozen=True)
class SiteSources:
    """The sources of one site, ordered by position."""

    site: Site
    whole: Tensor
    """The site's activation at the prefix, ``(M, d)``."""
    vectors: Tensor
    """``(m, d)``."""
    positions: Tensor
    """``(m,)`` int64."""
    kinds: list[str]
    latents: list[int]
    activations: list[float]

    def effects(self, gradient: Tensor) -> Tensor:
        """Vector times gradient ``(b, M, d)`` at the vector's position: ``(b, m)``."""
        counts = torch.bincount(self.positions, minlength=gradient.shape[1]).tolist()
        return torch.cat([gradient[:, p] @ part.T for p, part in enumerate(self.vectors.split(counts))], dim=1)

    def table(self, tokens: Sequence[str]) -> SourceTable:
        n = len(self.kinds)
        positions: tuple[int, ...] = tuple(self.positions.tolist())
        return SourceTable(
            kinds=tuple(self.kinds),
            hooks=(self.site.hook,) * n,
            positions=positions,
            latents=tuple(self.latents),
            activations=tuple(self.activations),
            tokens=tuple(tokens[p] for p in positions),
            dictionaries=(self.site.dictionary,) * n,
        )


def sources_of(
    site: Site,
    sae: SAE[Any] | None,
    prefix: PrefixPass,
    kinds: Sequence[str],
    positions: Sequence[int],
    limit: int,
    kept: Sequence[tuple[int, int]] = (),
) -> SiteSources:
    """Take the activation of a site apart, with its dictionary if it has one.

    Args:
        kinds: the kinds of sources wanted, at the columns ``positions`` of the prefix, ascending.
        limit: latents to keep at most, those with the largest ``|a_j| ||D_j||``.
        kept: positions and latents that stay wherever they are active, whatever the limit.

    Raises:
        ValueError: an activation of another width than the dictionary's.
    """
    if sae is None:
        whole = prefix.activations[site.hook]
        parts = [_Part(site.kind, p, NO_LATENT, float(whole[p].norm()), whole[p]) for p in positions]
        return _gathered(site, whole, parts if site.kind in kinds else [])
    x = _of_width(prefix.activations[site.read], sae.cfg.d_in, site.read, "reads")
    whole = _of_width(prefix.activations[site.hook], sae.W_dec.shape[1], site.hook, "writes")
    with torch.no_grad():
        skip: Tensor | None = getattr(sae, "W_skip", None)
        if skip is not None:
            whole = whole - x @ skip.T.to(x)
        parts = _dictionary_parts(sae, x, whole, positions, limit, kept)
    return _gathered(site, whole, [part for part in parts if part.kind in kinds])


@dataclass(frozen=True)
class _Part:
    kind: str
    position: int
    latent: int
    activation: float
    vector: Tensor


def _gathered(site: Site, whole: Tensor, parts: list[_Part]) -> SiteSources:
    parts = sorted(parts, key=lambda part: part.position)
    return SiteSources(
        site=site,
        whole=whole,
        vectors=torch.stack([part.vector for part in parts]) if parts else whole[:0],
        positions=torch.tensor([part.position for part in parts], dtype=torch.int64),
        kinds=[part.kind for part in parts],
        latents=[part.latent for part in parts],
        activations=[part.activation for part in parts],
    )


def _of_width(x: Tensor, d: int, hook: str, does: str) -> Tensor:
    if x.shape[-1] != d:
        raise ValueError(
            f"A dictionary {does} activations of width {d}, but those at {hook} are {x.shape[-1]} wide. "
            "Was it built for another hook or another model?"
        )
    return x


def _dictionary_parts(
    sae: SAE[Any],
    x: Tensor,
    whole: Tensor,
    positions: Sequence[int],
    limit: int,
    kept: Sequence[tuple[int, int]],
) -> list[_Part]:
    device = sae.W_dec.device
    codes = encode_flat(sae, x.to(device))
    with flat_activations(sae):
        decoded = sae.decode(codes).to(whole)
    directions, origin = sae.W_dec.detach(), sae.b_dec.detach()
    plain = (codes.to(directions) @ directions + origin).to(whole)
    if torch.allclose(plain, decoded, rtol=1e-4, atol=1e-4 * float(decoded.abs().max() + 1e-30)):
        decode = lambda p, active: (codes[p, active, None] * directions[active], origin)  # noqa: E731
    else:
        # A SAE that normalises its input decodes in units of that input, so its own decoder is asked at each position.
        decode = lambda p, active: _decoded_singly(sae, x[p].to(device), codes[p], active)  # noqa: E731
    strongest = _strongest(codes, directions.norm(dim=1), positions, limit)
    for p, j in kept:
        strongest[p, j] = codes[p, j] != 0
    parts = []
    for p in positions:
        active = strongest[p].nonzero().flatten()
        vectors, constant = (part.to(whole) for part in decode(p, active))
        values = codes[p, active].tolist()
        parts += [_Part("latent", p, j, a, v) for j, a, v in zip(active.tolist(), values, vectors, strict=True)]
        error = whole[p] - decoded[p]
        parts.append(_Part("error", p, NO_LATENT, float(error.norm()), error))
        parts.append(_Part("bias", p, NO_LATENT, float(constant.norm()), constant))
    return parts


def _strongest(codes: Tensor, norms: Tensor, positions: Sequence[int], limit: int) -> Tensor:
    """Which latents to keep at which position, bool ``(M, d_sae)``."""
    at_positions = torch.zeros(len(codes), 1, dtype=torch.bool, device=codes.device)
    at_positions[list(positions)] = True
    strength = (codes.abs() * norms.to(codes)) * at_positions
    active = strength > 0
    n = int(active.sum())
    if n <= limit:
        return active
    said = "%d active latents exceed max_bytes; the %d weakest (by activation times decoder norm) are left out."
    logger.warning(said, n, n - limit)
    # Norms of unit rows are 1 up to rounding, which must not choose among one-hot codes.
    chosen = largest_entries(strength.flatten(), limit, strength.flatten() * 2.0**-20)
    return torch.zeros_like(active).flatten().index_fill_(0, chosen, True).view_as(active)


def _decoded_singly(sae: SAE[Any], x: Tensor, codes: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    single = torch.zeros(len(active) + 1, len(codes), dtype=codes.dtype, device=codes.device)
    single[torch.arange(len(active)), active] = codes[active]
    with flat_activations(sae):
        # Encoding leaves the scale of this position behind for the one decode that follows.
        encode_flat(sae, x[None])
        decoded = sae.decode(single)
    return decoded[:-1] - decoded[-1:], decoded[-1]
