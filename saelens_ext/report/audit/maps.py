"""Two flat pictures of the same continuations: by what they say, and by what in the prefix caused them.

Symbols
    n      continuations on the maps
    w      their weights, summing to 1
    D      ``(n, n)`` distance that the clustering minimises, in one view: squared Euclidean distance of embeddings;
           city-block (or squared Euclidean) distance of signatures
    G      Gram matrix -1/2 C D C' with C = I - 1 w', which has no negative eigenvalue for either D: squared Euclidean
           and city-block distances are both squares of Euclidean ones
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits

from saelens_ext._files import json_safe
from saelens_ext.continuations.prefix_audit import PrefixAudit

MAX_POINTS = 1200
"""Continuations drawn; of more, a random part. Beyond it marks cover each other, and distances take long."""


class FlatMap(NamedTuple):
    """Where continuations lie on one map."""

    points: Float[np.ndarray, "n 2"]
    """Coordinates whose squared distances approach D."""
    share: float
    """Weighted variance that they show, of all there is in D, in [0, 1]."""


def shown_rows(audit: PrefixAudit) -> np.ndarray:
    """Rows that are drawn: all, or of many a random part with every medoid in it; ascending."""
    n = len(audit.continuations)
    if n <= MAX_POINTS:
        return np.arange(n)
    drawn = np.random.default_rng(0).choice(n, MAX_POINTS, replace=False)
    return np.union1d(drawn, audit.clusterer.medoid_indices_)


def flat_map(costs: Float[np.ndarray, "n n"], weights: Float[np.ndarray, " n"]) -> FlatMap:
    """Classical multidimensional scaling: the weighted principal components behind a matrix of squared distances.

    D is symmetric and zero on the diagonal, the weights w are above 0.
    """
    w = weights / weights.sum()
    mean = costs @ w
    gram = -0.5 * (costs - mean[:, None] - mean[None, :] + w @ mean)
    root = np.sqrt(w)
    scaled = root[:, None] * gram * root[None, :]
    whole = float(np.trace(scaled))
    n = len(w)
    points = np.zeros((n, 2))
    if n < 2 or whole <= 0:
        return FlatMap(points, 1.0)
    kept = min(2, n - 1)
    # One thread: sums then have one order, and the same audit gives the same picture.
    with threadpool_limits(1):
        values, vectors = eigh(scaled, subset_by_index=[n - kept, n - 1])
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    points[:, :kept] = vectors * np.sqrt(values) / root[:, None]
    # An eigenvector's sign is arbitrary; a rule for it keeps the picture from flipping.
    points *= np.where((w[:, None] * points**3).sum(axis=0) < 0, -1, 1)
    return FlatMap(points, min(1.0, float(values.sum()) / whole))


def maps_data(audit: PrefixAudit) -> dict[str, Any]:
    """Both maps of a prefix, JSON-safe: ``rows`` drawn, and per map its points and the fraction of variance shown."""
    rows = shown_rows(audit)
    weights = audit.continuations.weights.double().numpy()[rows]
    views = dict(zip(("meaning", "mechanism"), audit.continuations.both_views()))
    metrics = {"meaning": "l2", "mechanism": audit.clusterer.attribution_metric}
    found: dict[str, Any] = {"rows": rows.tolist(), "size": json_safe(weights / weights.mean(), 3)}
    for name, view in views.items():
        values = view[rows]
        flat = flat_map(cdist(values, values, "cityblock" if metrics[name] == "l1" else "sqeuclidean"), weights)
        extent = float(np.abs(flat.points).max()) or 1.0
        places = flat.points / extent
        found[name] = {
            "x": json_safe(places[:, 0], 4),
            "y": json_safe(places[:, 1], 4),
            "share": flat.share,
            "metric": metrics[name],
        }
    return found
