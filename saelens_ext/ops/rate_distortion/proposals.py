"""Where to look for clusters: a small Euclidean sketch of two views, starts and splits found in it.

Symbols
    w    weights of items, which sum to 1
    z    sketch of an item, ``(r,)``: a squared distance between sketches stands for the weighted distance, in nats,
         between the items
    p    mass of a part
    G    what a partition saves in the sketch: scatter between its parts less the entropy it costs, in nats

Everything here only proposes. What is proposed is judged by the objective itself, in full width.

A city-block distance becomes a squared Euclidean one by taking signed square roots: (sqrt a - sqrt b)^2 <= |a - b|, and
equal where one of the two is zero, which sparse rows mostly meet. Roots also tame heavy tails, which a principal
direction would otherwise follow. Each view is reduced to its leading weighted principal components once; the
two halves are then scaled by the square roots of the weights of the views, which multiply SQUARED distances.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int
from sklearn.utils.extmath import randomized_svd

from saelens_ext.ops.rate_distortion.objective import PairedViews

_COMPONENTS = 32
_TWO_MEANS_ROUNDS = 8
_LLOYD_ROUNDS = 10


class Sketch:
    """Principal components of the two views, computed once; exact up to 32 items or columns, else randomised."""

    def __init__(self, views: PairedViews, random_state: np.random.RandomState):
        self.weights = views.weights
        whole = views.cluster(np.arange(views.n))
        self._semantic, _ = _principal_scores(views.semantic, self.weights, random_state)
        if not len(views.sources):
            self._attribution = np.zeros((views.n, 0))
        elif views.metric == "l2":
            self._attribution, _ = _principal_scores(views.sources.T, self.weights, random_state)
        else:
            rows = views.sources.T - views.attribution_center(whole)
            roots = np.sign(rows) * np.sqrt(np.abs(rows))
            scores, scatter = _principal_scores(roots, self.weights, random_state)
            # One cluster costs as much in the sketch as it does.
            self._attribution = scores * np.sqrt(whole.v_a / scatter) if scatter > 0 else scores

    def joint(self, b_e: float, b_a: float) -> Float64[np.ndarray, "n r"]:
        """z for these weights of the views."""
        return np.hstack([np.sqrt(b_e) * self._semantic, np.sqrt(b_a) * self._attribution])


def _principal_scores(
    rows: np.ndarray, weights: np.ndarray, random_state: np.random.RandomState
) -> tuple[np.ndarray, float]:
    """Coordinates in the leading weighted principal components, and the scatter of the full width."""
    centered = rows - weights @ rows
    weighted = np.sqrt(weights)[:, None] * centered
    if min(rows.shape) <= _COMPONENTS:
        basis = np.linalg.svd(weighted, full_matrices=False)[2]
    else:
        rounds: Any = 2  # scikit-learn's annotation is inferred from its default
        basis = randomized_svd(weighted, _COMPONENTS, n_oversamples=8, n_iter=rounds, random_state=random_state)[2]
    return centered @ basis.T, float(np.einsum("ij,ij->", weighted, weighted))


# --- splits ---


def split_proposals(
    z: Float64[np.ndarray, "m r"],
    weights: Float64[np.ndarray, " m"],
    random_state: np.random.RandomState,
    n_seeds: int = 4,
) -> list[Bool[np.ndarray, " m"]]:
    """Ways to cut a cluster in two, the most promising first, as membership of one part. All differ, none is empty.

    Two kinds. Bisections start from the exact weighted principal direction of the sketch, cut at the weighted median
    and at the best place. Peels start from single items far from the centre, against the rest: with sparse rows the
    median of a mixture of many modes is nearly zero, so that halves of it gain nothing where one mode taken off gains.
    The weights need not sum to 1; ``n_seeds`` items are peeled from.
    """
    centered = z - weights @ z / weights.sum()
    starts = [*_principal_cuts(centered, weights), *_peels(centered, weights, random_state, n_seeds)]
    found: dict[bytes, tuple[float, np.ndarray]] = {}
    for start in starts:
        for part in (start, _two_means(centered, weights, start)):
            if 0 < np.count_nonzero(part) < len(part):
                part = part if part[0] else ~part
                found[part.tobytes()] = (_gain(centered, weights, part), part)
    return [part for _, part in sorted(found.values(), key=lambda pair: -pair[0])]


def _principal_cuts(centered: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    direction = np.linalg.eigh((centered * weights[:, None]).T @ centered)[1][:, -1]
    along = centered @ direction
    order = np.argsort(along, kind="stable")
    mass = np.cumsum(weights[order])[:-1]
    moment = np.cumsum((weights * along)[order])[:-1]
    total = weights.sum()
    rest = np.maximum(total - mass, 1e-300)
    between = moment**2 / mass + moment**2 / rest
    best = np.argmax(between - _entropy(mass, rest))
    half = np.argmax(mass >= total / 2) if mass[-1] >= total / 2 else len(mass) - 1
    cuts = []
    for last in dict.fromkeys((int(best), int(half))):
        part = np.zeros(len(weights), dtype=bool)
        part[order[: last + 1]] = True
        cuts.append(part)
    return cuts


def _peels(
    centered: np.ndarray, weights: np.ndarray, random_state: np.random.RandomState, n_seeds: int
) -> list[np.ndarray]:
    squares = np.einsum("ij,ij->i", centered, centered)
    chances = weights * squares
    if not chances.sum() > 0:
        return []
    n_drawn = min(n_seeds - 1, np.count_nonzero(chances))
    drawn = random_state.choice(len(weights), size=n_drawn, replace=False, p=chances / chances.sum())
    seeds = dict.fromkeys([int(np.argmax(squares)), *map(int, drawn)])
    return [((centered - centered[seed]) ** 2).sum(axis=1) < squares for seed in seeds]


def _two_means(centered: np.ndarray, weights: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Assign to the nearer of two means, the entropy of the assignment included, until nothing changes."""
    for _ in range(_TWO_MEANS_ROUNDS):
        inside, outside = weights[part].sum(), weights[~part].sum()
        if not (inside > 0 and outside > 0):
            break
        first, second = weights[part] @ centered[part] / inside, weights[~part] @ centered[~part] / outside
        gap = first - second
        new = centered @ gap - (first + second) @ gap / 2 > np.log(outside / inside) / 2
        if np.array_equal(new, part) or new.all() or not new.any():
            break
        part = new
    return part


def _gain(centered: np.ndarray, weights: np.ndarray, part: np.ndarray) -> float:
    inside, outside = weights[part].sum(), weights[~part].sum()
    moment = weights[part] @ centered[part]
    return float(moment @ moment * (1 / inside + 1 / outside) - _entropy(inside, outside))


def _entropy(inside, outside):
    """Rate, in nats, that a split into two parts adds."""
    total = inside + outside
    return -(inside * np.log(inside / total) + outside * np.log(outside / total))


# --- starts ---


def sketch_partition(
    z: Float64[np.ndarray, "n r"], weights: Float64[np.ndarray, " n"], k: int, random_state: np.random.RandomState
) -> Int[np.ndarray, " n"]:
    """A partition that suits the sketch: entropy-constrained k-means from k spread seeds, then merges, best first.

    The weights sum to 1. Labels are 0 to K - 1, each in use, K <= k.
    """
    centers = z[_spread_seeds(z, weights, k, random_state)]
    masses = np.full(len(centers), 1 / len(centers))
    labels = np.full(len(z), -1)
    for _ in range(_LLOYD_ROUNDS):
        costs = (centers**2).sum(axis=1) - 2 * z @ centers.T - np.log(masses)
        if np.array_equal(labels, labels := np.unique(np.argmin(costs, axis=1), return_inverse=True)[1]):
            break
        masses, centers = _means(z, weights, labels)
    return _merged(labels, masses, centers)


def _spread_seeds(z: np.ndarray, weights: np.ndarray, k: int, random_state: np.random.RandomState) -> list[int]:
    """Items drawn one after the other, by their squared distance from the nearest drawn so far."""
    seeds = [int(random_state.choice(len(z), p=weights))]
    nearest = ((z - z[seeds[0]]) ** 2).sum(axis=1)
    while len(seeds) < k and (chances := weights * nearest).sum() > 0:
        seeds.append(int(random_state.choice(len(z), p=chances / chances.sum())))
        nearest = np.minimum(nearest, ((z - z[seeds[-1]]) ** 2).sum(axis=1))
    return seeds


def _means(z: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    masses = np.bincount(labels, weights)
    indicator = np.zeros((len(masses), len(z)))
    indicator[labels, np.arange(len(z))] = weights
    return masses, indicator @ z / masses[:, None]


def _merged(labels: np.ndarray, masses: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Merge the pair that saves most until none saves."""
    masses, centers = masses.copy(), centers.copy()
    while len(masses) > 1:
        total = masses[:, None] + masses
        squares = (centers**2).sum(axis=1)
        apart = np.maximum(squares[:, None] + squares - 2 * centers @ centers.T, 0)
        change = masses[:, None] * masses / total * apart - _entropy(masses[:, None], masses)
        np.fill_diagonal(change, np.inf)
        keep, gone = sorted(np.unravel_index(np.argmin(change), change.shape))
        if change[keep, gone] >= 0:
            break
        centers[keep] = (masses[keep] * centers[keep] + masses[gone] * centers[gone]) / total[keep, gone]
        masses[keep] += masses[gone]
        masses, centers = np.delete(masses, gone), np.delete(centers, gone, axis=0)
        labels = np.where(labels == gone, keep, labels)
        labels = labels - (labels > gone)
    return labels
