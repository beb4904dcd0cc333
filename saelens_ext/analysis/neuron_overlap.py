"""Which features share neurons, and more of them than chance would make them share.

Symbols
    k     features over d neurons, ``(k, d)``; the support of a feature are its non-zero neurons
    n_i   size of the support of feature i
    o_ij  overlap: neurons in the supports of both i and j
    M     population: neurons that a support could have been drawn from
    null  supports of sizes n_i and n_j are drawn from the M neurons independently, all neurons alike; then o_ij is
          hypergeometric with mean n_i n_j / M
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import false_discovery_control, hypergeom
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.ops.modes import standard_modes


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronOverlap:
    """How the supports of k features overlap; tensors on the CPU, symmetric ``(k, k)`` unless said otherwise."""

    sizes: Tensor
    """n_i: int64 ``(k,)``."""
    population: int
    """M."""
    overlap: Tensor
    """o_ij: int64; n_i on the diagonal."""
    expected: Tensor
    """Mean of o_ij under the null: float64."""
    jaccard: Tensor
    """o_ij / (n_i + n_j - o_ij), in [0, 1]: float64; 0 for two empty supports."""
    same_sign: Tensor
    """Shared neurons that have the same sign in both features, of o_ij: int64."""
    p_value: Tensor
    """Probability under the null of an overlap of o_ij or more: float64, NaN on the diagonal, which is no test."""
    p_adjusted: Tensor
    """The p-values corrected for the number of pairs: the smallest false discovery rate that still finds a pair."""

    def __str__(self) -> str:
        table = self.to_dataframe()
        heading = (
            f"{len(self.sizes)} features over {self.population} neurons, the most surprising of {len(table)} pairs"
        )
        return f"{heading}\n{table.head(10).to_string(index=False)}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair i < j, the most surprising first."""
        i, j = torch.triu_indices(len(self.sizes), len(self.sizes), offset=1)
        columns = ("overlap", "expected", "jaccard", "same_sign", "p_value", "p_adjusted")
        sizes = {"size_i": self.sizes[i].numpy(), "size_j": self.sizes[j].numpy()}
        table = pd.DataFrame(
            {"i": i.numpy(), "j": j.numpy()} | sizes | {name: getattr(self, name)[i, j].numpy() for name in columns}
        )
        return table.sort_values(["p_value", "overlap"], ascending=[True, False], kind="stable", ignore_index=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Neurons:
    """Some neurons and how strongly each counts."""

    indices: Tensor
    """Ascending, int64 ``(m,)``."""
    weights: Tensor
    """Weight of each, of the features' dtype, ``(m,)``."""

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronGroups:
    """The neurons that a group of features shares, and those that belong to one of them alone."""

    core: Neurons
    """In the supports of at least ``shared_by`` features; weighted by the mean over the group of the unit features."""
    exclusive: dict[int, Neurons]
    """For each feature the neurons in no other support of the group, with their weights in its unit vector."""
    shared_by: int
    """Features that a core neuron belongs to, at least."""


@standard_modes()
def neuron_overlap(
    features: Float[Tensor, "k d"],
    *,
    population: Literal["used", "all"] | int = "used",
    correction: Literal["bh", "by"] = "bh",
) -> NeuronOverlap:
    """Compare the supports of every two features with each other and with chance.

    The null makes all neurons alike. Neurons that take part in many features for reasons of their own, a large
    variance for instance, therefore count as evidence for every pair that shares them.

    Args:
        features: signed weights, finite, at least two rows; a dictionary's ``W_dec``. Zero means not in the support.
        population: M. "used" counts the neurons of at least one support, and is the stricter: neurons that no feature
            could use, dead ones among them, would make every overlap look rare. With so few features that all supports
            together are hardly larger than one of them, it finds nothing, and "all" d neurons are the better choice.
            A number states it directly, for example of neurons that are ever active.
        correction: for the k (k - 1) / 2 pairs: "bh" (Benjamini and Hochberg), or "by" (Benjamini and Yekutieli), which
            holds however the pairs depend on each other and is stricter.

    Raises:
        ValueError: fewer than two features, weights that are not finite, or a population smaller than what is used or
            larger than d.

    Source: the overlap matrix is arXiv 2506.10920's, section on compositionality; it has no null there.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must have shape (k, d) with k of at least 2, got {tuple(features.shape)}.")
    _checks.choice(correction, ("bh", "by"), "correction")
    # Counts stay whole numbers in float32 up to 2**24 neurons.
    signs = _checks.finite(features, "features").detach().sign().float()
    support = signs.abs()
    size = _population(population, int(support.any(dim=0).sum()), features.shape[1])
    overlap, agreement = (support @ support.T).long().cpu(), (signs @ signs.T).long().cpu()
    sizes = overlap.diagonal().clone()
    union = sizes[:, None] + sizes[None, :] - overlap
    p_value, p_adjusted = _tests(overlap, sizes, size, correction)
    return NeuronOverlap(
        sizes=sizes,
        population=size,
        overlap=overlap,
        expected=sizes[:, None].double() * sizes[None, :] / max(1, size),
        jaccard=overlap.double() / union.clamp_min(1),
        same_sign=(overlap + agreement) // 2,
        p_value=p_value,
        p_adjusted=p_adjusted,
    )


@standard_modes()
def core_and_exclusive_neurons(
    features: Float[Tensor, "k d"], group: Sequence[int], *, shared_by: int | None = None
) -> NeuronGroups:
    """Split the neurons of a group of features into a common core and what each has for itself.

    Neurons of some but fewer than ``shared_by`` features are in neither. Features are brought to unit norm first,
    since a factorisation fixes each only up to scale. Where the features disagree on a core neuron's sign, their
    weights cancel, and it keeps its place in the core.

    Args:
        features: signed weights, finite.
        group: at least two different rows.
        shared_by: features of the group that a core neuron must belong to, from 2; by default all of them.

    Raises:
        ValueError: a group or a number out of range, or weights that are not finite.

    Source: arXiv 2506.10920, the weekday experiment.
    """
    rows = [int(index) for index in group]
    wrong = [index for index in rows if not 0 <= index < len(features)]
    if wrong or len(rows) < 2 or len(set(rows)) < len(rows):
        allowed = f"at least two different features of 0 to {len(features) - 1}"
        raise ValueError(f"group must be {allowed}, got {list(group)}.")
    needed = len(rows) if shared_by is None else shared_by
    if not 2 <= needed <= len(rows):
        raise ValueError(f"shared_by must lie from 2 to {len(rows)}, the size of the group, got {shared_by}.")
    chosen = _checks.finite(features, "features").detach()[rows]
    units = chosen / chosen.norm(dim=1, keepdim=True).clamp_min(torch.finfo(chosen.dtype).tiny)
    support = chosen != 0
    members = support.sum(dim=0)
    core = _neurons(members >= needed, units.mean(dim=0))
    exclusive = {row: _neurons(support[at] & (members == 1), units[at]) for at, row in enumerate(rows)}
    return NeuronGroups(core=core, exclusive=exclusive, shared_by=needed)


def _neurons(mask: Tensor, weights: Tensor) -> Neurons:
    indices = mask.nonzero().flatten()
    return Neurons(indices=indices.cpu(), weights=weights[indices].cpu())


def _population(population: str | int, used: int, d: int) -> int:
    if isinstance(population, str):
        return {"used": used, "all": d}[_checks.choice(population, ("used", "all"), "population")]
    if not used <= population <= d:
        raise ValueError(f"population must lie from {used}, the neurons used, to {d}, all of them; got {population}.")
    return population


def _tests(overlap: Tensor, sizes: Tensor, population: int, correction: str) -> tuple[Tensor, Tensor]:
    """P-values and corrected ones, ``(k, k)``."""
    k = len(sizes)
    i, j = torch.triu_indices(k, k, offset=1)
    pairs = torch.stack([overlap[i, j], torch.minimum(sizes[i], sizes[j]), torch.maximum(sizes[i], sizes[j])], dim=1)
    # Supports have few different sizes, so thousands of pairs ask the same few questions.
    distinct, answer = np.unique(pairs.numpy(), axis=0, return_inverse=True)
    p = hypergeom.sf(distinct[:, 0] - 1, population, distinct[:, 1], distinct[:, 2])
    # Sums of many probabilities can come out above 1 by rounding.
    raw = np.clip(p, 0, 1)[answer.reshape(-1)]
    tables = torch.full((2, k, k), torch.nan, dtype=torch.float64)
    values = torch.from_numpy(np.stack([raw, false_discovery_control(raw, method=correction)]))
    tables[:, i, j] = tables[:, j, i] = values
    return tables[0], tables[1]
