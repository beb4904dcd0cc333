"""What is to be clustered, checked, with the weights of its two distortions.

Symbols
    beta, gamma   weight of distortion against rate, and the fraction of it that the semantic view gets
    b_e, b_a      weight of each view's unscaled distortion: beta gamma / s_e and beta (1 - gamma) / s_a
    D_e, D_a      distortions of a partition, weighted means over rows in the coordinates given
    D_e0, D_a0    those of one cluster for all
    s_e, s_a      scales: what beta and gamma weight is D_e / s_e and D_a / s_a
    H_w           entropy of the row weights, in nats: the rate of one cluster for each row; log n for equal weights
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Int
from scipy.sparse import issparse
from scipy.spatial.distance import cdist
from sklearn.utils import check_array

from saelens_ext import _checks
from saelens_ext.ops.rate_distortion.objective import CDIST_METRICS, CenterKind, Cluster, Metric, PairedViews

SCALINGS = ("balanced", "paper")
METRICS: tuple[Metric, ...] = get_args(Metric)
CENTERS: tuple[CenterKind, ...] = get_args(CenterKind)

ONE_CLUSTER_FRACTION = 0.75
"""Scaled distortion of one cluster for all under balanced scaling, as a fraction of H_w."""

_MEDOID_CANDIDATES = 64


@dataclass(frozen=True)
class RateDistortion:
    """A partition's place on the rate-distortion plane."""

    objective: float
    """rate + beta (gamma semantic_distortion + (1 - gamma) attribution_distortion), in nats."""
    rate: float
    """H(C), entropy of the cluster weights, in nats."""
    semantic_distortion: float
    """D_e / s_e."""
    attribution_distortion: float
    """D_a / s_a; 0 without an attribution view."""


@dataclass(frozen=True)
class Problem:
    """Two views and their scales."""

    views: PairedViews
    semantic_scale: float
    attribution_scale: float
    min_cluster_size: int = 1
    """Fewest rows of a cluster, where there is more than one."""

    def weights_of_views(self, beta: float | int, gamma: float | int) -> tuple[float, float]:
        """b_e and b_a; without an attribution view gamma counts as 1."""
        gamma = gamma if len(self.views.sources) else 1.0
        return beta * gamma / self.semantic_scale, beta * (1 - gamma) / self.attribution_scale

    def place(self, clusters: Sequence[Cluster], beta: float | int, gamma: float | int) -> RateDistortion:
        """Rate, scaled distortions and objective of a partition."""
        rate = float(sum(cluster.rate for cluster in clusters))
        semantic = float(sum(cluster.v_e for cluster in clusters)) / self.semantic_scale
        attribution = float(sum(cluster.v_a for cluster in clusters)) / self.attribution_scale
        gamma = gamma if len(self.views.sources) else 1.0
        return RateDistortion(rate + beta * (gamma * semantic + (1 - gamma) * attribution), rate, semantic, attribution)

    def medoid(self, cluster: Cluster, b_e: float, b_a: float) -> int:
        """The row with the least weighted mean distance to the members, among the 64 members nearest the centre."""
        views, members = self.views, cluster.members
        order = np.argsort(views.own_costs(cluster, b_e, b_a), kind="stable")
        candidates, weights = members[order[:_MEDOID_CANDIDATES]], views.weights[members]
        totals = b_e * cdist(views.semantic[candidates], views.semantic[members], "sqeuclidean") @ weights
        if b_a > 0:
            rows, others = views.sources[:, candidates].T, views.sources[:, members].T
            totals += b_a * cdist(rows, others, CDIST_METRICS[views.metric]) @ weights
        return int(candidates[np.argmin(totals)])


def by_mass(clusters: Sequence[Cluster]) -> list[int]:
    """The order of clusters by descending weight; of equal ones, the one with the first member."""
    return sorted(range(len(clusters)), key=lambda k: (-clusters[k].mass, clusters[k].members[0]))


def make_problem(
    semantic: np.ndarray,
    attribution: np.ndarray | None,
    weights: np.ndarray,
    *,
    metric: str,
    scaling: str,
    semantic_center: str,
    min_cluster_size: int,
) -> Problem:
    """Views and their scales, from checked arrays.

    Balanced scaling: s_e = D_e0 / (0.75 H_w), s_a likewise. One cluster for all then has both scaled distortions equal
    to 0.75 H_w, whatever the units, so gamma alone decides the balance, and the objective of one cluster for all equals
    that of one cluster for each row at beta = 4/3.

    Paper scaling: s_e = 1; attributions are divided by the root mean square norm, over rows, of their differences from
    the centre of all (squared for metric "l2"). Subtracting that centre changes no distance, so it is left out.

    Raises:
        ValueError: an unknown option, or rows that are all identical.
    """
    metric = _checks.choice(metric, METRICS, "attribution_metric")
    center = _checks.choice(semantic_center, CENTERS, "semantic_center")
    _checks.choice(scaling, SCALINGS, "scaling")
    _checks.positive(min_cluster_size, "min_cluster_size")
    rows = np.zeros((len(semantic), 0)) if attribution is None else attribution
    if (semantic == semantic[0]).all() and (rows == rows[0]).all():
        raise ValueError(f"All {len(semantic)} rows are identical in every view; pass two different continuations.")
    views = PairedViews(semantic, rows, weights, metric, center)
    whole = views.cluster(np.arange(views.n))
    if scaling == "paper":
        return Problem(views, 1.0, _paper_scale(views, whole), min_cluster_size)
    scaled = -ONE_CLUSTER_FRACTION * float(views.weights @ np.log(views.weights))
    scales = _balanced_scale(semantic, whole.v_e / scaled), _balanced_scale(rows, whole.v_a / scaled)
    return Problem(views, *scales, min_cluster_size)


def _balanced_scale(rows: np.ndarray, scale: float) -> float:
    # Where all rows are equal, the distortion of one cluster is zero or rounding, which no scale may blow up.
    return 1.0 if (rows == rows[0]).all() or scale <= 0 else scale


def _paper_scale(views: PairedViews, whole: Cluster) -> float:
    if not len(views.sources):
        return 1.0
    origin = views.attribution_center(whole) if views.metric == "l1" else np.zeros(len(views.sources))
    squares = sum(float(((row - center) ** 2).sum()) for row, center in zip(views.sources, origin, strict=True))
    square = squares / views.n
    return (square if views.metric == "l2" else np.sqrt(square)) or 1.0


# --- checks ---


def check_beta_and_gamma(beta: float | int, gamma: float | int) -> None:
    """Raise ValueError unless beta is positive and finite and gamma lies in [0, 1]."""
    _checks.between(beta, 0, np.inf, "beta")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}; it weights the semantic view against the other.")


def checked_view(rows, name: str) -> np.ndarray:
    """A view as a finite float64 matrix of at least two rows; ValueError otherwise."""
    dtype: Any = np.float64  # scikit-learn's annotation is inferred from its default
    return check_array(rows, dtype=dtype, ensure_min_samples=2, input_name=name)


def checked_weights(sample_weight, n: int) -> np.ndarray:
    """Row weights as float64, ones by default; ValueError unless ``(n,)``, finite and above 0."""
    if sample_weight is None:
        return np.ones(n)
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n,):
        raise ValueError(f"sample_weight must have shape ({n},), one weight per row, got {weights.shape}.")
    bad = ~(np.isfinite(weights) & (weights > 0))
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"sample_weight must be finite and above 0 everywhere; row {first} has {weights[first]:g} "
            f"({int(bad.sum())} such rows). Leave rows of zero weight out of both views."
        )
    return weights


def checked_attribution(y, n: int) -> np.ndarray | None:
    """The attribution view as a float64 matrix; None where there is none.

    One-dimensional targets, which scikit-learn passes to every estimator, are labels and not a view: they are ignored.

    Raises:
        ValueError: another number of rows, entries that are not finite, or rows that are zero throughout.
    """
    if y is None:
        return None
    if not issparse(y) and np.asarray(y).ndim == 1:
        warnings.warn(
            "y has one dimension and is taken for labels, which clustering does not use; the attribution view must "
            "have shape (n, sources).",
            UserWarning,
            stacklevel=3,
        )
        return None
    dtype: Any = np.float64
    y = check_array(y, accept_sparse=True, dtype=dtype, input_name="y")
    rows = y.toarray() if issparse(y) else y
    if len(rows) != n:
        raise ValueError(f"X has {n} rows and y has {len(rows)}; row i of both must belong to the same continuation.")
    zero = np.flatnonzero(~rows.any(axis=1))
    if len(zero):
        raise ValueError(
            f"{len(zero)} attribution signatures are zero throughout, the first in row {zero[0]}: nothing in the "
            "prefix is said to have caused these continuations. Attribute them again or leave their rows out of both "
            "views."
        )
    return rows


def checked_labels(labels, n: int) -> Int[np.ndarray, " n"]:
    """Labels renumbered 0 to K - 1; ValueError for another shape than ``(n,)``."""
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), one label per row, got {labels.shape}.")
    return np.unique(labels, return_inverse=True)[1]
