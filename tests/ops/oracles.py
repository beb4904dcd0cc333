"""Slow and obvious twins of the kernels in ``saelens_ext.ops``: plain loops over activations, in exact arithmetic."""

import math

import numpy as np

GRID = 2**30


def exact_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two float32 unit rows: integers on the grid of multiples of 2**-30, one rounding per operation
    after.
    """
    a, b = ([round(float(v) * GRID) for v in row] for row in (a, b))
    dot, aa, bb = (sum(p * q for p, q in zip(x, y)) for x, y in ((a, b), (a, a), (b, b)))
    return _quotient(dot, aa, bb)


def exact_cosines(a: np.ndarray, others: np.ndarray) -> list[float]:
    """``exact_cosine`` of one row with each of many (int64 dot products hold the same integers, and are faster)."""
    x, rows = (np.round(part.astype(np.float64) * GRID).astype(np.int64) for part in (a, others))
    return [_quotient(int(dot), int(x @ x), int(bb)) for dot, bb in zip(rows @ x, (rows * rows).sum(axis=1))]


def _quotient(dot: int, aa: int, bb: int) -> float:
    if dot * dot == aa * bb:
        return float(np.sign(dot))
    return float(dot) * (1 / math.sqrt(float(aa) * float(bb)))


def float64_cosines(a: np.ndarray, others: np.ndarray) -> list[float]:
    """Cosines in float64, as anyone would write them."""
    return [float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)) for b in others]


def leader_clustering(rows: np.ndarray, threshold: float, cosines=exact_cosines) -> tuple[list[int], list[int]]:
    """Labels and founders' indices, one activation at a time; a row of zeros has no direction and gets -1."""
    labels: list[int] = []
    founders: list[int] = []
    for i, row in enumerate(rows):
        if not row.any():
            labels.append(-1)
            continue
        nearest, label = math.inf, len(founders)
        for region, cosine in enumerate(cosines(row, rows[founders])):
            distance = min(2.0, max(0.0, 1.0 - cosine))
            if distance <= threshold and distance < nearest:
                nearest, label = distance, region
        if label == len(founders):
            founders.append(i)
        labels.append(label)
    return labels, founders


def spherical_center(x: np.ndarray) -> np.ndarray:
    """c = <mean(a), u> u with u = mean(a / |a|) normalised, in float64."""
    x = np.asarray(x, dtype=np.float64)
    mean = sum(x) / len(x)
    direction = sum(row / np.linalg.norm(row) for row in x if row.any())
    direction = direction / np.linalg.norm(direction)
    return (mean @ direction) * direction


def pairwise_distances(units: np.ndarray, keep) -> np.ndarray:
    """Cosine distances of the pairs i < j with ``keep(i, j)``."""
    units = np.asarray(units, dtype=np.float64)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    return np.array(
        [1 - units[i] @ units[j] for i in range(len(units)) for j in range(i + 1, len(units)) if keep(i, j)]
    )


def shortest_half_means(x: np.ndarray) -> np.ndarray:
    """Of each column the mean of the n // 2 + 1 values that lie closest together, the lowest such."""
    half, means = len(x) // 2 + 1, []
    for column in x.astype(np.float64).T:
        values = sorted(column)
        windows = [values[first : first + half] for first in range(len(values) - half + 1)]
        means.append(np.mean(min(windows, key=lambda window: window[-1] - window[0])))
    return np.array(means)
