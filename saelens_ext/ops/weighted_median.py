"""Weighted medians of many rows at once."""

import numpy as np
from jaxtyping import Float

# Weights in a run that the search for a median skips.
# Entries of a block of values: 256 KB in float64, which stays in a core's cache.
_BLOCK = 2**15
_RUN = 16


def weighted_median(values: Float[np.ndarray, "d m"], weights: Float[np.ndarray, " m"]) -> Float[np.ndarray, " d"]:
    """The lower weighted median of every row: the smallest value at or below which lies half of the (positive) weight.

    It minimises the weighted sum of absolute differences.
    """
    order = np.argsort(values, axis=1)
    rows = np.arange(len(values))
    return values[rows, order[rows, first_half(weights[order], weights.sum())]]


class Ranks:
    """For every source, the items in the order of their values.

    Attributes:
        order: item of each rank, ``(d_a, n)``.
        rank: rank of each item; ties take any order.
        weight: weight of the item of each rank.
    """

    def __init__(self, sources: np.ndarray, weights: np.ndarray):
        kind = np.int16 if sources.shape[1] < 2**15 else np.int32
        self.order = np.empty(sources.shape, dtype=kind)
        self.rank = np.empty(sources.shape, dtype=kind)
        numbers = np.arange(sources.shape[1], dtype=kind)
        step = max(1, 4 * _BLOCK // sources.shape[1])
        for begin in range(0, len(sources), step):
            order = np.argsort(sources[begin : begin + step], axis=1)
            self.order[begin : begin + step] = order
            self.rank[begin + np.arange(len(order))[:, None], order] = numbers
        self.weight = weights[self.order]


def first_half(ordered: np.ndarray, total: float) -> np.ndarray:
    """Where running sums of every row first reach half of the total; whole runs are skipped at a time."""
    # Sums of one order of the weights can miss half by rounding where another meets it.
    half = 0.5 * total * (1 - 1e-12)
    m = ordered.shape[1]
    if m < 4 * _RUN:
        return np.argmax(np.cumsum(ordered, axis=1) >= half, axis=1)
    n_runs = m // _RUN
    runs = np.cumsum(ordered[:, : n_runs * _RUN].reshape(len(ordered), n_runs, _RUN).sum(axis=2), axis=1)
    skipped = np.minimum((runs < half).sum(axis=1), (m - 1) // _RUN)
    rows = np.arange(len(ordered))
    before = np.where(skipped > 0, runs[rows, np.maximum(skipped, 1) - 1], 0.0)
    places = skipped[:, None] * _RUN + np.arange(_RUN)
    inside = np.where(places < m, ordered[rows[:, None], np.minimum(places, m - 1)], 0.0)
    reached = before[:, None] + np.cumsum(inside, axis=1) >= half
    # Where rounding keeps the last sum of a run from what the sum of the run has reached.
    reached[:, -1] = True
    return np.minimum(places[rows, np.argmax(reached, axis=1)], m - 1)
