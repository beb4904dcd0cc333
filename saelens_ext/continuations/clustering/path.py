"""Clusterings over a grid of weights: the rate-distortion curve of a set of continuations.

Symbols
    beta, gamma  weight of distortion, and the semantic view's fraction of it; a cell is a pair of them
    L            objective of a cell, in nats

For each gamma, beta descends: at high beta there are many clusters, and merging them finds partitions of several
modes to which no gaining split of one cluster leads, while the other way round nothing is lost, since one cluster is a
start of every cell. The first cell of a gamma begins from starts of its own, each other from the end of the one before
it (and where clusters must have a least size from starts of its own too). In the end every
cell is offered the partitions of all others: rate and distortions of a partition are the same in every cell, so this
costs a sum, and a cell descends again from a partition that suits it better than its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import joblib
import numpy as np
import pandas as pd
from jaxtyping import Int
from sklearn.utils import check_random_state

from saelens_ext.continuations.clustering.problem import Problem, RateDistortion, by_mass, check_beta_and_gamma
from saelens_ext.ops.rate_distortion.descent import Search
from saelens_ext.ops.rate_distortion.objective import partition_cost
from saelens_ext.ops.rate_distortion.proposals import Sketch

BETAS = (0.5, 0.75, 1.0, 1.25)
"""Values of beta published in arXiv 2606.08236."""
GAMMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Values of gamma published there."""

_EXCHANGES = 3


@dataclass(frozen=True)
class PathPoint(RateDistortion):
    """The clustering of one cell."""

    beta: float
    gamma: float
    labels: Int[np.ndarray, " n"]
    """By descending cluster weight."""

    @property
    def n_clusters(self) -> int:
        """K."""
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class RateDistortionPath:
    """Clusterings over a grid."""

    points: tuple[PathPoint, ...]
    """One per cell, by gamma and then beta, in the order asked for."""
    problem: Problem
    """What was clustered, with its scales."""

    def at(self, beta: float | int, gamma: float | int) -> PathPoint:
        """The point of a cell; ValueError for one that is not in the grid."""
        for point in self.points:
            if point.beta == beta and point.gamma == gamma:
                return point
        cells = ", ".join(f"({point.beta:g}, {point.gamma:g})" for point in self.points)
        raise ValueError(f"No cell has beta {beta!r} and gamma {gamma!r}; there are {cells}.")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell, labels left out."""
        columns = ("gamma", "beta", "n_clusters", "objective", "rate", "semantic_distortion", "attribution_distortion")
        return pd.DataFrame([{name: getattr(point, name) for name in columns} for point in self.points])


def sweep(
    problem: Problem,
    betas: Sequence[float | int],
    gammas: Sequence[float | int],
    *,
    max_iter: int,
    tol: float,
    random_state,
    n_jobs: int | None,
) -> RateDistortionPath:
    """Cluster a checked problem at every pair of beta and gamma; see ``rate_distortion_path``."""
    if not len(betas) or not len(gammas):
        raise ValueError(f"betas and gammas must not be empty, got {list(betas)} and {list(gammas)}.")
    for beta in betas:
        for gamma in gammas:
            check_beta_and_gamma(beta, gamma)
    seed = check_random_state(random_state).randint(2**31 - 1)
    settings = {"max_iter": max_iter, "tol": tol, "min_members": problem.min_cluster_size}
    sketch = Sketch(problem.views, np.random.RandomState(seed))
    falling = sorted(set(betas), reverse=True)
    columns = [[problem.weights_of_views(beta, gamma) for beta in falling] for gamma in dict.fromkeys(gammas)]
    jobs = (joblib.delayed(_descending)(problem, sketch, column, seed, settings) for column in columns)
    found = cast("list[dict[tuple[float, float], np.ndarray]]", joblib.Parallel(n_jobs=n_jobs)(jobs))
    ends = {weights: labels for part in found for weights, labels in part.items()}
    ends = _exchange(Search(problem.views, np.random.RandomState(seed), sketch=sketch, **settings), ends)
    cells = [(float(beta), float(gamma)) for gamma in gammas for beta in betas]
    points = [_point(problem, ends[problem.weights_of_views(*cell)], *cell) for cell in cells]
    return RateDistortionPath(tuple(points), problem)


def _descending(
    problem: Problem, sketch: Sketch, column: list[tuple[float, float]], seed: int, settings: dict
) -> dict[tuple[float, float], np.ndarray]:
    """Labels of the cells of one gamma, beta descending, by the weights of the views."""
    search = Search(problem.views, np.random.RandomState(seed), sketch=sketch, **settings)
    ends: dict[tuple[float, float], np.ndarray] = {}
    before: np.ndarray | None = None
    for weights in column:
        starts = search.starts(*weights) if before is None else [before, search.one_cluster]
        found = [search.best(starts, *weights)]
        if search.min_members > 1:
            # Descents end early where small clusters are forbidden, so more of them are worth their time.
            starts += search.starts(*weights) if before is not None else []
            found += [search.descend(start, *weights) for start in starts]
        ends[weights] = before = min(found, key=lambda descent: descent.cost).labels
    return ends


def _exchange(search: Search, ends: dict[tuple[float, float], np.ndarray]) -> dict[tuple[float, float], np.ndarray]:
    """Let every cell descend from the best partition of any cell, until each prefers its own."""
    for _ in range(_EXCHANGES):
        partitions = [(labels, search.views.clusters(labels)) for labels in ends.values()]
        better: dict[tuple[float, float], np.ndarray] = {}
        for weights, labels in ends.items():
            best, clusters = min(partitions, key=lambda pair: partition_cost(pair[1], *weights))
            gain = partition_cost(search.views.clusters(labels), *weights) - partition_cost(clusters, *weights)
            if gain > search.tol * search.one.cost(*weights):
                better[weights] = search.descend(best, *weights).labels
        if not better:
            break
        ends = {**ends, **better}
    return ends


def _point(problem: Problem, labels: np.ndarray, beta: float, gamma: float) -> PathPoint:
    clusters = problem.views.clusters(labels)
    place = problem.place(clusters, beta, gamma)
    return PathPoint(**vars(place), beta=beta, gamma=gamma, labels=np.argsort(by_mass(clusters))[labels])
