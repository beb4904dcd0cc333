"""Weighted medians of many rows at once."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

# Entries of a block of values: 256 KB in float64, which stays in a core's cache.
_BLOCK = 2**15
# Weights in a run that the search for a median skips.
_RUN = 16


def weighted_median(values: Float[np.ndarray, "d m"], weights: Float[np.ndarray, " m"]) -> Float[np.ndarray, " d"]:
    """The lower weighted median of every row: the smallest value at or below which lies half of the (positive) weight.

    It minimises the weighted sum of absolute differences.
    """
    order = np.argsort(values, axis=1)
    rows = np.arange(len(values))
    return values[rows, order[rows, first_half(weights[order], weights.sum())]]


class Sorted:
    """Rows with their entries in order: medians of many of them, at any weights, without sorting again."""

    def __init__(self, values: Float[np.ndarray, "d n"]):
        self._values = values
        self._order = np.empty(values.shape, dtype=np.int16 if values.shape[1] < 2**15 else np.int32)
        for rows in self._blocks():
            self._order[rows] = np.argsort(values[rows], axis=1)

    def medians(self, weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " d"]:
        """What ``weighted_median`` gives; weights may be zero, but not all."""
        found, total = np.empty(len(self._values)), weights.sum()
        for rows in self._blocks():
            order = self._order[rows]
            numbers = np.arange(len(order))
            found[rows] = self._values[rows][numbers, order[numbers, first_half(np.take(weights, order), total)]]
        return found

    def _blocks(self) -> Iterator[slice]:
        step = max(1, 2 * _BLOCK // self._values.shape[1])
        return (slice(begin, begin + step) for begin in range(0, len(self._values), step))


def first_half(ordered: np.ndarray, total: float) -> np.ndarray:
    """Where running sums of every row first reach half of the total; whole runs are skipped at a time."""
    # Sums of one order of the weights can miss half by rounding where another meets it.
    half = 0.5 * total * (1 - 1e-12)
    m = ordered.shape[1]
    if m < 4 * _RUN:
        return np.argmax(np.cumsum(ordered, axis=1) >= half, axis=1)
    n_runs = m // _RUN
    # A product with ones takes a sixth of the time of a sum over so short an axis.
    runs = np.cumsum(ordered[:, : n_runs * _RUN].reshape(len(ordered), n_runs, _RUN) @ np.ones(_RUN), axis=1)
    skipped = np.minimum((runs < half).sum(axis=1), (m - 1) // _RUN)
    rows = np.arange(len(ordered))
    before = np.where(skipped > 0, runs[rows, np.maximum(skipped, 1) - 1], 0.0)
    places = skipped[:, None] * _RUN + np.arange(_RUN)
    inside = np.where(places < m, ordered[rows[:, None], np.minimum(places, m - 1)], 0.0)
    reached = before[:, None] + np.cumsum(inside, axis=1) >= half
    # Where rounding keeps the last sum of a run from what the sum of the run has reached.
    reached[:, -1] = True
    return np.minimum(places[rows, np.argmax(reached, axis=1)], m - 1)
