"""Rate-distortion clustering of continuations by what they say and what in the prefix caused them.

Symbols
    e_i, a_i         semantic and attribution view of continuation i
    w_i              its weight; weights are divided by their sum
    C, H(C)          a partition, and the entropy of its cluster weights in nats: the rate
    mu_k, h_k        centres of cluster k: the weighted mean, and the weighted coordinate-wise median
    D_e, D_a         distortions: sum of w_i |e_i - mu|^2, and of w_i |a_i - h|_1
    s_e, s_a         scales of the two views
    beta, gamma      weight of distortion, and the semantic view's fraction of it

The objective, in nats: L = H(C) + beta gamma D_e / s_e + beta (1 - gamma) D_a / s_a.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from saelens_ext import _checks
from saelens_ext.continuations.clustering.path import BETAS, GAMMAS, RateDistortionPath, sweep
from saelens_ext.continuations.clustering.problem import (
    Problem,
    RateDistortion,
    by_mass,
    check_beta_and_gamma,
    checked_attribution,
    checked_labels,
    checked_view,
    checked_weights,
    make_problem,
)
from saelens_ext.ops.rate_distortion.descent import Descent, Search
from saelens_ext.ops.rate_distortion.objective import CDIST_METRICS


class JointClusterer(ClusterMixin, BaseEstimator):
    """Hard clustering of rows that live in two views, which finds the number of clusters itself.

    Args:
        beta: weight of distortion against rate, above 0; a higher one gives more clusters. The published grid,
            0.5 to 1.25, suits both scalings.
        gamma: fraction of beta that weights the semantic view, in [0, 1]. Under balanced scaling 0.5 is balance; under
            paper scaling the views keep their own magnitudes.
        attribution_metric: ``"l1"``: city-block distance, median centres; ``"l2"``: squared Euclidean, mean centres.
        scaling: ``"balanced"``: s_e = D_e0 / (0.75 H_w) with D_e0 the distortion of one cluster for all and H_w the
            entropy of the weights (log n where they are equal), s_a likewise. Then gamma means balance whatever the
            units, and beta needs none: at 4/3, one cluster for all costs as much as one for each row. ``"paper"``: s_e
            = 1 and s_a the root mean square norm of the centred signatures, as published.
        semantic_center: ``"mean"``: the weighted mean, the exact minimiser. ``"unit"``: the mean renormalised, as
            published, the exact minimiser among unit vectors. L never rises with either.
        min_cluster_size: fewest rows of a cluster, where there is more than one; at least 1. A singleton cluster has
            zero distortion, so with 1, as published, L is often lowest with mostly singletons. With more, L is lowered
            among partitions whose clusters have at least so many rows.
        init: labels ``(n,)`` to start from instead of the starts that are tried by default, a point of a path for
            example.
        max_iter: rounds of one descent, at least 1.
        tol: a step must lower L by more than this fraction of the L of one cluster; at least 0.
        random_state: seed of starts and split proposals.

    Attributes:
        labels_: ``(n,)``, by descending cluster weight.
        n_clusters_: K.
        medoid_indices_: ``(K,)``, the member with the least weighted mean distance to the members, in the
            weighted distance that the clusters were made with; among the 64 members nearest the centre.
        semantic_centers_, attribution_centers_: ``(K, d_e)`` and ``(K, d_a)``, in the coordinates of X and y.
        cluster_weights_: ``(K,)``, sum to 1.
        objective_: L, nats; it equals ``rate_ + beta * (gamma * semantic_distortion_ + (1 - gamma) *
            attribution_distortion_)``, with gamma = 1 where no y was given.
        rate_: H(C), nats.
        semantic_distortion_, attribution_distortion_: D_e / s_e and D_a / s_a.
        semantic_scale_, attribution_scale_: s_e and s_a.
        history_: L at the start that won and after every step from there; it never rises.
        n_iter_: rounds of that descent.
        n_features_in_, n_sources_in_: d_e, d_a (0 without y).

    Examples:
        >>> meaning = np.array([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4) + 0.01 * np.arange(16).reshape(8, 2)
        >>> mechanism = np.array([[3.0, 0.0, 0.0]] * 4 + [[0.0, 2.0, 1.0]] * 4)
        >>> sx.JointClusterer(beta=4.0, min_cluster_size=2).fit(meaning, mechanism).labels_.tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]

    Source: arXiv 2606.08236. Departures: the number of rounds is not what stops the descent, but that no reassignment,
    merge, split or single move lowers L; merges are taken best first; several starts are tried; the default scaling.
    """

    # Without types: scikit-learn has parameters checked by fit, not when they are set.
    def __init__(
        self,
        beta=1.0,
        gamma=0.5,
        attribution_metric="l1",
        scaling="balanced",
        semantic_center="mean",
        min_cluster_size=1,
        init=None,
        max_iter=100,
        tol=1e-9,
        random_state=None,
    ):
        self.beta = beta
        self.gamma = gamma
        self.attribution_metric = attribution_metric
        self.scaling = scaling
        self.semantic_center = semantic_center
        self.min_cluster_size = min_cluster_size
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X, y=None, *, sample_weight=None) -> "JointClusterer":
        """Cluster the rows.

        Args:
            X: semantic view, ``(n, d_e)``, n >= 2, finite.
            y: attribution view, ``(n, d_a)``, dense or scipy sparse; without it, X alone is clustered, as with gamma
                = 1. One-dimensional y, as pipelines pass labels, is ignored with a warning.
            sample_weight: ``(n,)``, above 0; equal by default.

        Raises:
            ValueError: a parameter out of range, fewer than two rows, all rows identical, views of different length,
                entries that are not finite, a signature that is zero throughout, or a weight that is not above 0.
        """
        problem = self.problem(X, y, sample_weight=sample_weight)
        search = Search(
            problem.views,
            check_random_state(self.random_state),
            max_iter=self.max_iter,
            tol=float(self.tol),
            min_members=self.min_cluster_size,
        )
        weights = problem.weights_of_views(self.beta, self.gamma)
        starts = search.starts(*weights) if self.init is None else [checked_labels(self.init, problem.views.n)]
        found = search.best(starts, *weights)
        if not found.converged:
            warnings.warn(
                f"No stable partition after {self.max_iter} rounds; raise max_iter.", ConvergenceWarning, stacklevel=2
            )
        self._record(problem, found)
        return self

    def fit_predict(self, X, y=None, *, sample_weight=None) -> np.ndarray:
        """``fit(X, y).labels_``."""
        return self.fit(X, y, sample_weight=sample_weight).labels_

    def predict(self, X, y=None) -> np.ndarray:
        """The cluster that adds least to the objective: -log weight + weighted distances from the centres.

        Args:
            X: ``(n, d_e)``.
            y: ``(n, d_a)``; needed if and only if the fit had it.

        Raises:
            ValueError: other widths than those of the fit, or a view that is missing.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        rows = checked_attribution(y, len(X))
        gamma = self.gamma if self.n_sources_in_ else 1.0
        costs = self.beta * gamma / self.semantic_scale_ * cdist(X, self.semantic_centers_, "sqeuclidean")
        if self.n_sources_in_:
            if rows is None or rows.shape[1] != self.n_sources_in_:
                width = "is missing" if rows is None else f"has {rows.shape[1]} sources"
                raise ValueError(f"y {width}; the fit had {self.n_sources_in_} sources: pass y with the same sources.")
            metric = CDIST_METRICS[self.attribution_metric]
            costs += self.beta * (1 - gamma) / self.attribution_scale_ * cdist(rows, self.attribution_centers_, metric)
        return np.argmin(costs - np.log(self.cluster_weights_), axis=1)

    def partition_objective(self, X, y, labels, *, sample_weight=None) -> RateDistortion:
        """L, rate and scaled distortions of any partition of these rows, at this estimator's parameters.

        Nothing need be fitted; scales are those of the rows given.

        Raises:
            ValueError: as ``fit``, or labels of another length.
        """
        problem = self.problem(X, y, sample_weight=sample_weight, reset=False)
        clusters = problem.views.clusters(checked_labels(labels, problem.views.n))
        return problem.place(clusters, self.beta, self.gamma)

    def rate_distortion_path(
        self,
        X,
        y=None,
        betas: Sequence[float | int] = BETAS,
        gammas: Sequence[float | int] = GAMMAS,
        *,
        sample_weight=None,
        n_jobs: int | None = None,
    ) -> RateDistortionPath:
        """Clusterings over a grid of beta and gamma, with this estimator's other parameters."""
        return sweep(
            self.problem(X, y, sample_weight=sample_weight, reset=False),
            betas,
            gammas,
            max_iter=self.max_iter,
            tol=float(self.tol),
            random_state=self.random_state,
            n_jobs=n_jobs,
        )

    def problem(self, X, y=None, *, sample_weight=None, reset: bool = True) -> Problem:
        """The checked views with their scales, as ``fit`` clusters them.

        Raises:
            ValueError: as ``fit``.
        """
        check_beta_and_gamma(self.beta, self.gamma)
        _checks.positive(self.max_iter, "max_iter")
        if not 0 <= self.tol < 1:
            raise ValueError(f"tol must lie in [0, 1), got {self.tol!r}.")
        rows = validate_data(self, X, dtype=np.float64, ensure_min_samples=2) if reset else checked_view(X, "X")
        return make_problem(
            np.asarray(rows),
            checked_attribution(y, len(rows)),
            checked_weights(sample_weight, len(rows)),
            metric=self.attribution_metric,
            scaling=self.scaling,
            semantic_center=self.semantic_center,
            min_cluster_size=self.min_cluster_size,
        )

    def _record(self, problem: Problem, found: Descent) -> None:
        views = problem.views
        order = by_mass(found.clusters)
        clusters = [found.clusters[k] for k in order]
        place = problem.place(clusters, self.beta, self.gamma)
        self.labels_ = np.argsort(order)[found.labels]
        self.n_clusters_ = len(clusters)
        self.cluster_weights_ = np.array([cluster.mass for cluster in clusters])
        self.semantic_centers_ = np.stack([views.semantic_mean(cluster) for cluster in clusters])
        self.attribution_centers_ = np.stack([views.attribution_center(cluster) for cluster in clusters])
        weights = problem.weights_of_views(self.beta, self.gamma)
        self.medoid_indices_ = np.array([problem.medoid(cluster, *weights) for cluster in clusters])
        self.objective_, self.rate_ = place.objective, place.rate
        self.semantic_distortion_ = place.semantic_distortion
        self.attribution_distortion_ = place.attribution_distortion
        self.semantic_scale_, self.attribution_scale_ = problem.semantic_scale, problem.attribution_scale
        self.n_sources_in_ = len(views.sources)
        self.history_ = np.array(found.history)
        self.n_iter_ = found.n_iter


def rate_distortion_path(
    X,
    y=None,
    betas: Sequence[float | int] = BETAS,
    gammas: Sequence[float | int] = GAMMAS,
    *,
    sample_weight=None,
    attribution_metric: str = "l1",
    scaling: str = "balanced",
    semantic_center: str = "mean",
    min_cluster_size: int = 1,
    max_iter: int = 100,
    tol: float | int = 1e-9,
    random_state=None,
    n_jobs: int | None = None,
) -> RateDistortionPath:
    """Cluster at every pair of beta and gamma.

    Args:
        X: semantic view, ``(n, d_e)``.
        y: attribution view, ``(n, d_a)``.
        betas: weights of distortion, above 0, in any order.
        gammas: fractions that the semantic view gets, in [0, 1].
        sample_weight: ``(n,)``, above 0.
        attribution_metric: this and the next six as for ``JointClusterer``.
        scaling: see there.
        semantic_center: see there.
        min_cluster_size: see there.
        max_iter: see there.
        tol: see there.
        random_state: see there.
        n_jobs: gammas at a time, as joblib counts; a joblib backend set by ``joblib.parallel_config`` spreads them over
            a cluster. The result does not depend on it beyond rounding, which differs where workers run on other
            processors or with another number of threads.

    Returns:
        A point per cell. ``JointClusterer(beta, gamma, init=point.labels).fit(X, y)`` makes an estimator of one.

    Raises:
        ValueError: as ``JointClusterer.fit``, or an empty grid.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> meaning, mechanism = rng.normal(size=(12, 3)), rng.normal(size=(12, 5))
        >>> path = sx.rate_distortion_path(meaning, mechanism, betas=(1, 4), gammas=(0.5,))
        >>> [point.beta for point in path.points]
        [1.0, 4.0]
    """
    clusterer = JointClusterer(
        attribution_metric=attribution_metric,
        scaling=scaling,
        semantic_center=semantic_center,
        min_cluster_size=min_cluster_size,
        max_iter=max_iter,
        tol=tol,
        random_state=random_state,
    )
    return clusterer.rate_distortion_path(X, y, betas, gammas, sample_weight=sample_weight, n_jobs=n_jobs)
