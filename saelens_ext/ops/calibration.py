"""Thresholds for clustering directions: percentiles of their pairwise cosine distances, or multiples of the median
distance to the nearest neighbour, with intervals.

Symbols:
    u: directions, ``(n, d)`` unit rows; rows of zeros have no direction and are left out.
    p: percentile in (0, 100). theta_p: the distance that p percent of the pairs stay within.
    D: number of documents (or batches) that the pairs come from.
    w: how often each document was drawn in a bootstrap replicate, ``(D,)``, sum D.

Two ways of choosing the pairs:
    "across_documents": all pairs of activations from different documents. Activations of one document resemble each
        other, so pairs within documents fill the lowest percentiles in a share that depends on how documents were
        batched.
    "within_batch", the paper's: all pairs within each batch; theta_p is the unweighted mean over batches. It moves with
        the batch size.

Source: Rumbelow, Exemplar Partitioning (arXiv 2605.14347), section on the threshold; the pairs across documents and the
interval are ours, and so is the rule of nearest neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import ndtri, stdtrit
from torch import Tensor

from saelens_ext._checks import between, choice, finite, positive

BIN_WIDTH = 2.0**-16
"""Resolution of the distances of "across_documents": each is rounded to a multiple of this, 1.5e-5."""

_BINS = 2**17 + 1
_TILE_ROWS, _TILE_COLUMNS = 1024, 2048
_BOOTSTRAP_PAIRS = 2**18
_REPLICATES_AT_ONCE = 4


@dataclass(frozen=True)
class ThresholdEstimate:
    """A clustering threshold and how well the data determine it."""

    percentile: float | None
    """Of the pairwise distances, in (0, 100); None under another rule, or when the threshold was given."""
    threshold: float
    """Cosine distance in [0, 2]. 0 when that many pairs are identical: no clustering can be built with it."""
    low: float
    """Lower end of the confidence interval, a cosine distance."""
    high: float
    """Upper end."""
    n_pairs: int
    """Pairs of activations it is estimated from: all of them, or each activation with its nearest neighbour."""
    factor: float | None = None
    """Of the median distance to the nearest neighbour; None under another rule, or when the threshold was given."""

    @property
    def resolution(self) -> float | None:
        """The percentile or the factor, whichever rule it was."""
        return self.percentile if self.factor is None else self.factor

    @classmethod
    def given(cls, threshold: float | int) -> "ThresholdEstimate":
        """A threshold that was chosen, not estimated."""
        return cls(percentile=None, threshold=float(threshold), low=float(threshold), high=float(threshold), n_pairs=0)


@torch.no_grad()
def pairwise_distance_percentiles(
    units: Float[Tensor, "n d"],
    document_ids: Int[Tensor, " n_documents"],
    percentiles: Sequence[float | int],
    *,
    calibration: Literal["across_documents", "within_batch"] = "across_documents",
    batch_ids: Int[Tensor, " n_batches"] | None = None,
    n_bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    max_rows: int = 20_000,
) -> list[ThresholdEstimate]:
    """Percentiles of the cosine distances between directions.

    The interval comes from resampling documents (in "within_batch", batches). Resampling pairs would treat n(n-1)/2
    pairs as independent observations where there are D documents, and be far too narrow. It is widened for small D by
    Student's t, and is all of [0, 2] where the documents are too few to show how they vary (two; in "within_batch", one
    batch). Simulated streams put the coverage of a 95% interval at 0.96 and more for the 10th percentile from 5
    documents on; for the 1st it was 0.91 with 30 documents and 0.75 with 8, since so few pairs of documents decide it.

    Args:
        units: ``(n, d)`` unit rows about the centre, as ``unit_directions`` gives them; zero rows are left out.
        percentiles: each in (0, 100).
        calibration: Which pairs, see the module's docstring.
        batch_ids: ``(n,)``, which batch each row is from; needed in "within_batch" only.
        n_bootstrap: Bootstrap replicates, of which the interval has ``confidence`` in (0, 1).
        max_rows: "across_documents" takes a random sample of this many rows where there are more.

    Returns:
        One estimate per percentile, in the order given; linear between order statistics. "across_documents" is
        independent of row batching and within 2**-17 of the exact percentile; "within_batch" is exact to float32,
        except that distances below 2**-17 count as 0.

    Raises:
        ValueError: Fewer than two documents ("across_documents"), no batch with two directions ("within_batch"),
            lengths that differ, or an argument out of range.

    Source: arXiv 2605.14347, section on the threshold.
    """
    choice(calibration, ("across_documents", "within_batch"), "calibration")
    between(confidence, 0, 1, "confidence")
    positive(n_bootstrap, "n_bootstrap")
    positive(max_rows, "max_rows")
    for percentile in percentiles:
        between(percentile, 0, 100, "percentile")
    groups = document_ids
    if calibration == "within_batch":
        if batch_ids is None:
            raise ValueError("calibration='within_batch' needs batch_ids, the batch of each row.")
        groups = batch_ids
    units, groups = _directed(units, groups)
    generator = torch.Generator().manual_seed(seed)
    if calibration == "within_batch":
        return _within_groups(units, groups, percentiles, n_bootstrap, confidence, generator)
    return _across_groups(units, groups, percentiles, n_bootstrap, confidence, generator, max_rows)


@torch.no_grad()
def nearest_neighbour_thresholds(
    units: Float[Tensor, "n d"],
    document_ids: Int[Tensor, " n_documents"],
    factors: Sequence[float | int],
    *,
    n_bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    max_rows: int = 20_000,
) -> list[ThresholdEstimate]:
    """Multiples of the median cosine distance from a direction to its nearest neighbour in another document.

    A rule that can be stated before the data are seen: with a factor of 1, half of the directions have another within
    the threshold. The more rows, the nearer are neighbours, so the number of rows is part of the rule.

    The interval comes from resampling the documents of the rows, and is widened as that of
    :func:`pairwise_distance_percentiles`. The neighbours stay as they are, so it leaves out how these depend on the
    documents: on simulated streams a 95% interval covered 0.87 with 30 documents and 0.77 with 12.

    Args:
        units: ``(n, d)`` unit rows about the centre; zero rows are left out.
        factors: each above 0.
        n_bootstrap: Bootstrap replicates, of which the interval has ``confidence`` in (0, 1).
        max_rows: A random sample of this many rows is taken where there are more.

    Returns:
        One estimate per factor, in the order given.

    Raises:
        ValueError: Fewer than two documents, lengths that differ, an argument out of range, or a threshold above 2,
            the largest cosine distance.
    """
    between(confidence, 0, 1, "confidence")
    positive(n_bootstrap, "n_bootstrap")
    positive(max_rows, "max_rows")
    for factor in factors:
        between(factor, 0, float("inf"), "neighbour_factor")
    units, groups = _directed(units, document_ids)
    generator = torch.Generator().manual_seed(seed)
    units, codes, sizes = _by_document(units, groups, generator, max_rows)
    distances, order = _nearest_across(units, sizes.cumsum(0)[codes]).cpu().sort()
    drawn = torch.cat((torch.ones(1, len(sizes)), _draw(n_bootstrap, len(sizes), generator)))
    cumulated = drawn[:, codes.cpu()[order]].cumsum(dim=1, dtype=torch.float64)
    medians = distances[torch.searchsorted(cumulated, cumulated[:, -1:] / 2)].double().squeeze(1)
    median = float(np.median(distances.numpy()))
    interval = _interval(median, float(medians[0]), medians[1:], len(sizes), confidence, fewest=3)
    if factors and median * max(factors) > 2:
        raise ValueError(
            f"neighbour_factor={max(factors):g} times the median distance to the nearest neighbour, {median:.3g}, is "
            f"above 2, the largest cosine distance; give at most {2 / median:.3g}."
        )
    estimates = []
    for factor in factors:
        low, high = interval if interval == (0.0, 2.0) else (factor * interval[0], min(2.0, factor * interval[1]))
        estimates.append(ThresholdEstimate(None, factor * median, low, high, len(distances), float(factor)))
    return estimates


def _directed(units: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that have a direction, as float32, and their groups."""
    if len(groups) != len(units):
        raise ValueError(f"units has {len(units)} rows but {len(groups)} ids were given; one id per row is needed.")
    directed = finite(units, "units").any(dim=1)
    return units[directed].float(), groups.to(units.device)[directed]


def _within_groups(
    units: Tensor,
    groups: Tensor,
    percentiles: Sequence[float | int],
    n_bootstrap: int,
    confidence: float,
    generator: torch.Generator,
) -> list[ThresholdEstimate]:
    n_pairs, values = 0, []
    for group in groups.unique():
        distances = _all_pairs(units[groups == group])
        n_pairs += len(distances)
        if len(distances):
            values.append(np.percentile(distances, percentiles, overwrite_input=True))
    if not values:
        raise ValueError("No batch holds two directions; use larger ones, or calibration='across_documents'.")
    per_group = torch.tensor(np.stack(values), dtype=torch.float64).reshape(len(values), len(percentiles))
    drawn = _draw(n_bootstrap, len(values), generator).double()
    estimates, replicates = per_group.mean(dim=0), drawn @ per_group / len(values)
    intervals = [
        _interval(float(estimate), float(estimate), replicate, len(values), confidence, fewest=2)
        for estimate, replicate in zip(estimates, replicates.T)
    ]
    return [
        ThresholdEstimate(float(p), float(estimate), low, high, n_pairs)
        for p, estimate, (low, high) in zip(percentiles, estimates, intervals)
    ]


def _all_pairs(units: Tensor) -> np.ndarray:
    """Distances of all pairs of rows, each once, float32."""
    parts = [torch.empty(0)]
    for start in range(0, len(units), _TILE_ROWS):
        products = units[start : start + _TILE_ROWS] @ units[start:].T
        later = torch.ones_like(products, dtype=torch.bool).triu_(1)
        parts.append(_distances(products[later]).cpu())
    return torch.cat(parts).numpy()


def _distances(products: Tensor) -> Tensor:
    """Distances from float32 products; those that could be rounding of 0 are 0, so that identical rows give 0."""
    distances = (1 - products).clamp_(0, 2)
    return distances.masked_fill_(distances < BIN_WIDTH / 2, 0.0)


def _across_groups(
    units: Tensor,
    groups: Tensor,
    percentiles: Sequence[float | int],
    n_bootstrap: int,
    confidence: float,
    generator: torch.Generator,
    max_rows: int,
) -> list[ThresholdEstimate]:
    units, codes, sizes = _by_document(units, groups, generator, max_rows)
    histogram = _histogram(units, sizes.cumsum(0)[codes])
    replicates, center = _replicates(units, codes, percentiles, n_bootstrap, generator)
    estimates = []
    for column, percentile in enumerate(percentiles):
        threshold = _histogram_percentile(histogram, percentile)
        interval = _interval(threshold, float(center[column]), replicates[:, column], len(sizes), confidence, fewest=3)
        estimates.append(ThresholdEstimate(float(percentile), threshold, *interval, int(histogram.sum())))
    return estimates


def _by_document(
    units: Tensor, groups: Tensor, generator: torch.Generator, max_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """At most so many rows, sorted by document; the number of each one's document, and the sizes of documents."""
    if len(units) > max_rows:
        chosen = torch.randperm(len(units), generator=generator)[:max_rows].sort().values.to(units.device)
        units, groups = units[chosen], groups[chosen]
    groups, order = groups.sort(stable=True)
    _, codes, sizes = groups.unique_consecutive(return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ValueError(
            f"The activations come from {len(sizes)} document(s); distances across documents need at least two. Give "
            "the stream more documents, or pass calibration='within_batch' to take percentiles within batches."
        )
    return units[order], codes, sizes


def _nearest_across(units: Tensor, ends: Tensor) -> Tensor:
    """Distance from each row to the nearest of another document, float32; as :func:`_histogram` for ``ends``."""
    best = torch.full((len(units),), -2.0, device=units.device)
    for rows, columns in _tiles(len(units), ends):
        products = units[rows] @ units[columns].T
        if columns.start < int(ends[rows.stop - 1]):
            same = torch.arange(columns.start, columns.stop, device=units.device) < ends[rows, None]
            products.masked_fill_(same, -2.0)
        for part, axis in ((rows, 1), (columns, 0)):
            torch.maximum(best[part], products.amax(dim=axis), out=best[part])
    return _distances(best)


def _histogram(units: Tensor, ends: Tensor) -> Tensor:
    """Counts of the distances between rows of different documents, each pair once, in bins centred on multiples of
    BIN_WIDTH; ``ends`` is where the document of each row ends, rows being sorted by document."""
    counts = torch.zeros(_BINS, dtype=torch.int64, device=units.device)
    for rows, columns in _tiles(len(units), ends):
        distances = (1 - units[rows] @ units[columns].T).clamp_(0, 2)
        bins = distances.div_(BIN_WIDTH).round_().int()
        if columns.start < int(ends[rows.stop - 1]):
            bins = bins[torch.arange(columns.start, columns.stop, device=units.device) >= ends[rows, None]]
        counts += torch.bincount(bins.view(-1), minlength=_BINS)
    return counts


def _tiles(n: int, ends: Tensor) -> Iterator[tuple[slice, slice]]:
    for start in range(0, n, _TILE_ROWS):
        stop = min(start + _TILE_ROWS, n)
        for column in range(int(ends[start]), n, _TILE_COLUMNS):
            yield slice(start, stop), slice(column, min(column + _TILE_COLUMNS, n))


def _histogram_percentile(histogram: Tensor, percentile: float | int) -> float:
    """Percentile of the binned distances, linear between order statistics."""
    cumulated = histogram.cumsum(0)
    rank = (int(cumulated[-1]) - 1) * percentile / 100
    low, high = torch.searchsorted(
        cumulated, torch.tensor([int(rank), int(np.ceil(rank))], device=histogram.device), right=True
    ).tolist()
    return (low + (rank - int(rank)) * (high - low)) * BIN_WIDTH


def _replicates(
    units: Tensor, codes: Tensor, percentiles: Sequence[float | int], n_bootstrap: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Percentiles ``(R, P)`` under resampled documents and ``(P,)`` under the documents as they are, from sampled
    pairs.

    A pair of documents a, b weighs w_a w_b; replicates that drew one document only have no pair and are dropped.
    """
    i, j = _sampled_pairs(codes.cpu(), generator)
    if len(i) == 0:
        return torch.empty(0, len(percentiles)), torch.zeros(len(percentiles))
    distances = torch.cat(
        [
            _distances((units[i[part].to(units.device)] * units[j[part].to(units.device)]).sum(dim=1)).cpu()
            for part in torch.arange(len(i)).split(2**14)
        ]
    )
    distances, order = distances.sort()
    a, b = codes.cpu()[i[order]], codes.cpu()[j[order]]
    share = torch.tensor([p / 100 for p in percentiles], dtype=torch.float64)
    drawn = torch.cat((torch.ones(1, int(codes.max()) + 1), _draw(n_bootstrap, int(codes.max()) + 1, generator)))
    rows = []
    for weights in drawn.split(_REPLICATES_AT_ONCE):
        cumulated = (weights[:, a] * weights[:, b]).cumsum(dim=1, dtype=torch.float64)
        cumulated = cumulated[cumulated[:, -1] > 0]
        targets = cumulated[:, -1:] * share
        rows.append(distances[torch.searchsorted(cumulated, targets).clamp_(max=len(distances) - 1)])
    values = torch.cat(rows).double()
    return values[1:], values[0]


def _sampled_pairs(codes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of rows of different documents: all of them if they are few, else a random sample."""
    n = len(codes)
    if n * (n - 1) // 2 <= _BOOTSTRAP_PAIRS:
        i, j = torch.triu_indices(n, n, 1)
    else:
        i, j = torch.randint(n, (2, _BOOTSTRAP_PAIRS), generator=generator)
    apart = codes[i] != codes[j]
    return i[apart], j[apart]


def _draw(n_replicates: int, n_documents: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(n_documents, (n_replicates, n_documents), generator=generator)
    return torch.zeros(n_replicates, n_documents).scatter_add_(1, drawn, torch.ones(drawn.shape))


def _interval(
    estimate: float, center: float, replicates: Tensor, n_documents: int, confidence: float, fewest: int
) -> tuple[float, float]:
    """Percentile bootstrap interval, its arms lengthened as Student's t with D - 1 degrees of freedom is."""
    if n_documents < fewest or len(replicates) == 0:
        return 0.0, 2.0
    tail = (1 + confidence) / 2
    stretch = float(stdtrit(n_documents - 1, tail) / ndtri(tail)) * (n_documents / (n_documents - 1)) ** 0.5
    lower, upper = (float(q) for q in torch.quantile(replicates, torch.tensor([1 - tail, tail], dtype=torch.float64)))
    low, high = estimate - stretch * max(0.0, center - lower), estimate + stretch * max(0.0, upper - center)
    return max(0.0, low), min(2.0, high)
