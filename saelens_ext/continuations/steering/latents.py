"""Which latents of a prefix to scale up or down, and the hooks that do it in a forward pass.

Symbols
    w_j    weight of source j in a direction: its entry of a signature, or of a centre of signatures
    B      number of latents scaled
    eps    strength: latent j is scaled by 1 + eps sign(w_j), so that eps > 0 goes along the direction; at -1 a latent
           of positive weight is removed and one of negative weight doubled
    h_j    activation of latent j on the stream as it is, other changes before it included
    D_j    its decoder direction
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.continuations.attribution.sites import dictionary_sites
from saelens_ext.continuations.source_table import SourceTable
from saelens_ext.host.flat_sae import encode_flat, flat_activations
from saelens_ext.host.hook_edits import HookFunction, edit_point, flat_rows
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes

SIGNS = ("all", "positive", "negative")

_CODES_BYTES = 2**26
"""Memory for the codes of the tokens encoded at a time."""


@dataclass(frozen=True)
class SteeringDirection:
    """The B latents of the prefix that a direction scales, by descending magnitude of weight."""

    columns: tuple[int, ...]
    """Which sources of the table they are."""
    weights: tuple[float, ...]
    """w_j, in the units of the direction given (logits, for a signature)."""
    sources: SourceTable
    """What they are, one row per latent."""
    steered_share: float
    """Fraction of the direction's absolute weight, summed over all of its sources, that is on these latents."""
    steerable_share: float
    """Fraction on all latents; the rest is on error nodes, biases, MLPs and embeddings, which cannot be scaled."""

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def signs(self) -> tuple[int, ...]:
        """sign(w_j), each 1 or -1."""
        return tuple(1 if weight > 0 else -1 for weight in self.weights)

    @property
    def key(self) -> tuple[tuple[int, int], ...]:
        """Equal for directions that change a model in the same way."""
        return tuple(sorted(zip(self.columns, self.signs)))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per latent: what it is, and its weight."""
        return self.sources.to_dataframe().assign(column=list(self.columns), weight=list(self.weights))


def choose_latents(
    sources: SourceTable,
    weights: Sequence[float | int] | np.ndarray | Tensor,
    *,
    top: int = 10,
    sign: str = "all",
) -> SteeringDirection:
    """Take the latents with the largest weights of a direction.

    Args:
        sources: what the entries of the direction are.
        weights: w, ``(m,)``, one per source.
        top: B at most, at least 1; latents of weight 0 are never taken.
        sign: ``"all"``, or only latents of ``"positive"`` or of ``"negative"`` weight.

    Raises:
        ValueError: an unknown sign, weights of another length or not finite, or no latent with such a weight.

    Source: arXiv 2606.08236, steering.
    """
    _checks.positive(top, "top")
    _checks.choice(sign, SIGNS, "sign")
    entries = torch.as_tensor(np.asarray(weights, dtype=np.float64)).flatten()
    if len(entries) != len(sources):
        raise ValueError(
            f"The direction has {len(entries)} weights and the continuations {len(sources)} sources; give one weight "
            "per source, for example a row of continuations.signatures."
        )
    _checks.finite(entries, "The direction")
    columns = largest_latents(sources, entries, top, sign)
    if not columns:
        raise ValueError(_no_latent(sources, entries, sign))
    return direction_of(sources, entries, columns)


def largest_latents(sources: SourceTable, weights: Tensor, top: int, sign: str) -> list[int]:
    """The latents of largest weight, by descending magnitude; none where no latent has such a weight."""
    wanted = {"all": weights != 0, "positive": weights > 0, "negative": weights < 0}[sign]
    candidates = (_latents(sources) & wanted).nonzero().flatten()
    order = weights[candidates].abs().argsort(descending=True, stable=True)[:top]
    return candidates[order].tolist()


def _latents(sources: SourceTable) -> Tensor:
    return torch.tensor([kind == "latent" for kind in sources.kinds], dtype=torch.bool)


def direction_of(sources: SourceTable, weights: Tensor, columns: Sequence[int]) -> SteeringDirection:
    """The direction that scales the latents of some columns of ``weights``, ``(m,)``."""
    total = float(weights.abs().sum())
    return SteeringDirection(
        columns=tuple(columns),
        weights=tuple(weights[list(columns)].tolist()),
        sources=sources.select(columns),
        steered_share=float(weights[list(columns)].abs().sum()) / total if total else 0.0,
        steerable_share=float(weights[_latents(sources)].abs().sum()) / total if total else 0.0,
    )


def _no_latent(sources: SourceTable, weights: Tensor, sign: str) -> str:
    is_latent = _latents(sources)
    counts = {kind: sources.kinds.count(kind) for kind in dict.fromkeys(sources.kinds)}
    described = f"Its sources are {', '.join(f'{n} of kind {kind!r}' for kind, n in counts.items())}"
    if not bool(is_latent.any()):
        return (
            f"The direction has no source that can be scaled. {described}; only latents can. "
            "Attribute with a dictionary and with 'latent' among its kinds."
        )
    kind = "" if sign == "all" else f"{sign} "
    return (
        f"No latent has a {kind}weight in this direction. {described}, and {int((weights[is_latent] != 0).sum())} "
        "latents have a weight other than 0. Give another direction or sign='all'."
    )


@dataclass(frozen=True)
class Setting:
    """A direction and how far to go along it."""

    direction: SteeringDirection
    strength: float


class LatentScaler:
    """Scales latents in forward passes; each row of a batch has its own latents and strength.

    The dictionaries are those that the continuations were attributed with, in the same order; ``sources`` is the table
    that directions point into. The model has no SAE attached.

    Raises:
        ValueError: dictionaries that are not those of the table, or a place that cannot be edited.
    """

    def __init__(self, model: HostModel, dictionaries: Sequence[SAE[Any]], sources: SourceTable):
        self._dictionaries = list(dictionaries)
        self._sites = dictionary_sites(model, self._dictionaries)
        for column, index in enumerate(sources.dictionaries):
            self._check_source(sources, column, index)
        for index in sorted({i for i, kind in zip(sources.dictionaries, sources.kinds) if kind == "latent"}):
            edit_point(model, self._sites[index].hook)

    def _check_source(self, sources: SourceTable, column: int, index: int) -> None:
        if sources.kinds[column] != "latent":
            return
        if not 0 <= index < len(self._sites):
            raise ValueError(
                f"The sources come from a dictionary number {index}, and {len(self._sites)} dictionaries were given. "
                "Give those that the continuations were attributed with, in the same order."
            )
        site, d_sae = self._sites[index], int(self._dictionaries[index].cfg.d_sae)
        if site.hook != sources.hooks[column] or not 0 <= sources.latents[column] < d_sae:
            raise ValueError(
                f"Source {column} is latent {sources.latents[column]} at {sources.hooks[column]}, but dictionary "
                f"{index} has {d_sae} latents and writes at {site.hook}. Give the dictionaries in the order of the "
                "attribution."
            )

    def hooks(self, settings: Sequence[Setting]) -> list[tuple[str, HookFunction]]:
        """Hooks for passes over the prefix (and more tokens behind it), one setting per row of the batch.

        A later pass over one token each, a step of generation from a KV cache, is left alone. Rows of strength 0 are
        left exactly as they are.
        """
        hooks: list[tuple[str, HookFunction]] = []
        for index, site in enumerate(self._sites):
            scaled = _Scaled.of(index, settings)
            if scaled is None:
                continue
            edit = _Edit(self._dictionaries[index], scaled, site.hook)
            if site.read != site.hook:
                hooks.append((site.read, edit.read))
            hooks.append((site.hook, edit.write))
        return hooks


@dataclass(frozen=True)
class _Scaled:
    """The latents of one dictionary scaled in a batch: at P pairs of a row and a position, N latents in all."""

    rows: Tensor
    """``(P,)``."""
    positions: Tensor
    """``(P,)``."""
    pairs: Tensor
    """To which pair each latent belongs, ``(N,)``."""
    latents: Tensor
    """``(N,)``."""
    factors: Tensor
    """1 + eps sign(w), ``(N,)``."""

    @classmethod
    def of(cls, dictionary: int, settings: Sequence[Setting]) -> "_Scaled | None":
        pairs: dict[tuple[int, int], int] = {}
        entries: list[tuple[int, int, float]] = []
        for row, setting in enumerate(settings):
            table = setting.direction.sources
            for j, sign in enumerate(setting.direction.signs if setting.strength != 0 else ()):
                if table.dictionaries[j] == dictionary:
                    pair = pairs.setdefault((row, table.positions[j]), len(pairs))
                    entries.append((pair, table.latents[j], 1.0 + setting.strength * sign))
        if not entries:
            return None
        rows, positions = torch.tensor(list(pairs)).T
        owners, latents, factors = (torch.tensor(column) for column in zip(*entries))
        return cls(rows, positions, owners, latents, factors.float())


class _Edit:
    """Adds decode(z') - decode(z) where latents are scaled; z are the codes of the activations as they are."""

    def __init__(self, sae: SAE[Any], scaled: _Scaled, hook: str):
        self._sae, self._scaled, self._hook = sae, scaled, hook
        self._input: Tensor | None = None
        self._prefix_seen = False

    @standard_modes()
    def read(self, x: Tensor, hook: Any = None) -> None:
        """Keep the input of a transcoder."""
        self._input = x

    @standard_modes()
    def write(self, x: Tensor, hook: Any = None) -> Tensor | None:
        read, self._input = (x if self._input is None else self._input), None
        step = x.shape[1] == 1 and self._prefix_seen
        self._prefix_seen = True
        if step:
            return None
        t = self._scaled
        flat = flat_rows(x, self._sae.W_dec.shape[1], self._hook)
        inputs = flat_rows(read, int(self._sae.cfg.d_in), self._hook)[t.rows, t.positions]
        before = flat[t.rows, t.positions]
        wide = torch.promote_types(x.dtype, torch.float32)
        after = before.to(wide) + self._change(inputs.to(wide)).to(before.device, wide)
        edited = flat.clone()
        edited[t.rows, t.positions] = after.to(x.dtype)
        return edited.reshape(x.shape)

    def _change(self, inputs: Tensor) -> Tensor:
        """What to add at each pair, ``(P, d)``, a bounded number of pairs at a time."""
        size = max(1, _CODES_BYTES // (16 * int(self._sae.cfg.d_sae)))
        return torch.cat([self._part(part, number * size) for number, part in enumerate(inputs.split(size))])

    def _part(self, inputs: Tensor, first: int) -> Tensor:
        t = self._scaled
        codes = encode_flat(self._sae, inputs.to(self._sae.W_dec.device))
        mine = (t.pairs >= first) & (t.pairs < first + len(inputs))
        places = (t.pairs[mine] - first).to(codes.device), t.latents[mine].to(codes.device)
        changed = codes.clone()
        changed[places] = codes[places] * t.factors[mine].to(codes)
        # One call for both: a SAE that normalises its input forgets the scale after one decode.
        with flat_activations(self._sae):
            after, before = self._sae.decode(torch.stack([changed, codes]))
        # Equal rows of one product can differ in their last bit, so where no code changes nothing is added.
        touched = (changed != codes).any(dim=-1, keepdim=True)
        return torch.where(touched, after.float() - before.float(), 0)
