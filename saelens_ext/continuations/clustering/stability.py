"""How far a clustering survives resampling, and a choice of beta and gamma by it.

Symbols
    B    bootstrap resamples
    R_b  adjusted Rand index, over all rows, between the clustering of all and the one made from resample b, in [-1, 1];
         0 is what chance gives, 1 agreement
    E_e, E_a  fraction of a view's one-cluster distortion that a partition explains, 1 - D / D_0
"""

from collections.abc import Sequence
from dataclasses import dataclass

import joblib
import numpy as np
from jaxtyping import Float64, Int
from sklearn.metrics import adjusted_rand_score
from sklearn.utils import check_random_state

from saelens_ext import _checks
from saelens_ext.continuations.clustering.path import PathPoint, RateDistortionPath
from saelens_ext.continuations.clustering.problem import Problem, checked_labels
from saelens_ext.ops.rate_distortion.descent import Search
from saelens_ext.ops.rate_distortion.objective import Cluster, PairedViews


class NoEligiblePoint(ValueError):
    """No cell of a path has the number of clusters asked for."""


@dataclass(frozen=True)
class Stability:
    """Agreement of clusterings of bootstrap resamples with the clustering of all rows."""

    scores: Float64[np.ndarray, " b"]
    """R_b."""

    @property
    def mean(self) -> float:
        """Mean of R_b."""
        return float(self.scores.mean())

    @property
    def standard_error(self) -> float:
        """Standard deviation of R_b over the square root of their number: what more resamples would narrow."""
        return float(self.scores.std(ddof=1) / np.sqrt(len(self.scores)))


@dataclass(frozen=True)
class Choice:
    """A cell chosen from a path."""

    point: PathPoint
    """The cell."""
    stability: Stability
    """Of the cell."""
    table: tuple[tuple[PathPoint, Stability], ...]
    """Every cell that was eligible."""


def stability_score(
    problem: Problem,
    labels: Int[np.ndarray, " n"],
    beta: float | int,
    gamma: float | int,
    *,
    n_resamples: int = 20,
    max_iter: int = 100,
    random_state=None,
    n_jobs: int | None = None,
) -> Stability:
    """Cluster bootstrap resamples of the rows, extend each clustering to all rows, and compare.

    A row drawn c times counts c times its weight. The weights of the views stay those of the full set, so that a
    resample's fewer distinct rows do not change the objective. One cluster for all is perfectly stable and says
    nothing.

    Args:
        problem: ``JointClusterer.problem(X, y)`` or ``RateDistortionPath.problem``.
        labels: the clustering of all rows, ``JointClusterer.labels_`` or ``PathPoint.labels``, made at beta and gamma.
        n_resamples: B, at least 2.
        max_iter: rounds of one descent.
        n_jobs: resamples at a time, as joblib counts. The result does not depend on it beyond rounding.

    Raises:
        ValueError: fewer than two resamples, or labels of another length.
    """
    if _checks.positive(n_resamples, "n_resamples") < 2:
        raise ValueError(f"n_resamples must be at least 2, got {n_resamples!r}; 20 is usual.")
    labels = checked_labels(labels, problem.views.n)
    seeds = check_random_state(random_state).randint(2**31 - 1, size=n_resamples)
    weights = problem.weights_of_views(beta, gamma)
    jobs = (joblib.delayed(_agreement)(problem, labels, weights, int(seed), max_iter) for seed in seeds)
    return Stability(np.array(joblib.Parallel(n_jobs=n_jobs)(jobs)))


def _agreement(problem: Problem, labels: np.ndarray, weights: tuple[float, float], seed: int, max_iter: int) -> float:
    views = problem.views
    random_state = np.random.RandomState(seed)
    counts = np.bincount(random_state.randint(views.n, size=views.n), minlength=views.n)
    drawn = np.flatnonzero(counts)
    weights_drawn = views.weights[drawn] * counts[drawn]
    rows = views.semantic[drawn], views.sources[:, drawn].T
    part = PairedViews(*rows, weights_drawn, views.metric, views.semantic_center)
    # A resample leaves out some members of every cluster, so fewer are asked of its clusters.
    fewest = max(1, round(len(drawn) / views.n * problem.min_cluster_size))
    search = Search(part, random_state, max_iter=max_iter, min_members=fewest)
    found = search.best(search.starts(*weights), *weights)
    costs = np.stack([_costs(views, part, cluster, *weights) for cluster in found.clusters], axis=1)
    return float(adjusted_rand_score(labels, np.argmin(costs, axis=1)))


def _costs(views: PairedViews, part: PairedViews, cluster: Cluster, b_e: float, b_a: float) -> np.ndarray:
    """What each row of the whole set would add to the objective in a cluster of a resample, ``(n,)``."""
    d_e = ((views.semantic - part.semantic_mean(cluster)) ** 2).sum(axis=1)
    d_a = views.center_distances(part.attribution_center(cluster))
    return b_e * d_e + b_a * d_a - np.log(cluster.mass)


def choose_point(
    path: RateDistortionPath,
    *,
    clusters: Sequence[int] = (2, 10),
    n_resamples: int = 20,
    random_state=None,
    n_jobs: int | None = None,
) -> Choice:
    """The cell of a path to look at first.

    Eligible are cells with a number of clusters within ``clusters``, fewest and most: one cluster is stable and empty,
    and very many leave none enough members to test. (One cluster and its outliers is hardly more than one: make the
    path with a ``min_cluster_size``.) Among them the most stable wins over ``n_resamples`` bootstrap resamples, the
    same for every cell, and among those within one standard error of the most stable the one whose less explained view
    is explained most, so that a partition of one view alone does not win a tie.

    Raises:
        NoEligiblePoint: no cell is eligible; it is a ValueError.
    """
    fewest, most = clusters
    eligible = [point for point in path.points if fewest <= point.n_clusters <= most]
    if not eligible:
        sizes = ", ".join(map(str, sorted({point.n_clusters for point in path.points})))
        said = f"No cell has {fewest} to {most} clusters; the path has {sizes}. Widen betas or clusters."
        raise NoEligiblePoint(said)
    seed = int(check_random_state(random_state).randint(2**31 - 1))
    how = {"n_resamples": n_resamples, "random_state": seed, "n_jobs": n_jobs}
    table = [(p, stability_score(path.problem, p.labels, p.beta, p.gamma, **how)) for p in eligible]
    best = max((stability for _, stability in table), key=lambda stability: stability.mean)
    level = best.mean - best.standard_error
    stable = [entry for entry in table if entry[1].mean >= level]
    point, stability = max(stable, key=lambda entry: explained(path.problem, entry[0]))
    return Choice(point, stability, tuple(table))


def explained(problem: Problem, point: PathPoint) -> float:
    """The smaller of E_e and E_a; of the semantic view alone where it is the only one."""
    whole = problem.place([problem.views.cluster(np.arange(problem.views.n))], point.beta, point.gamma)
    pairs = [
        (point.semantic_distortion, whole.semantic_distortion),
        (point.attribution_distortion, whole.attribution_distortion),
    ]
    return min(1 - part / one for part, one in pairs if one > 0)
