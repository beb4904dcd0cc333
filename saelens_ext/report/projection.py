"""A flat picture of directions: where to draw each region on the map."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

TSNE_SIZES = range(50, 3001)
"""Numbers of regions drawn by t-SNE. With fewer its neighbourhoods are too small to mean anything; with more it takes
longer than writing a report should (about ten seconds at the upper end, on two cores)."""


class Projection(NamedTuple):
    """Where each direction lies on the map, and how it got there."""

    points: Float[np.ndarray, "k 2"]
    """Coordinates without a unit, in [-1, 1], equal scale on both axes."""
    name: str
    """What kind of projection it is."""
    caution: str
    """What may be read off it and what may not."""


# One thread: sums then have one order on every machine, and on a busy one threads waiting for each other are several
# times slower.
@threadpool_limits.wrap(limits=1)
def project(directions: Float[np.ndarray, "k d"], what: str = "exemplars") -> Projection:
    """Lay unit directions out in the plane; the same directions always give the same picture.

    t-SNE under the cosine distance for 50 to 3,000 directions, else the first two principal components.
    """
    if len(directions) in TSNE_SIZES:
        perplexity = min(30.0, (len(directions) - 1) / 3)
        points = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=0).fit_transform(directions)
        name = f"t-SNE of the cosine distances between {what}"
        caution = (
            "t-SNE keeps near neighbours together and little else: the size of a gap, the size of a cluster and the "
            "axes mean nothing."
        )
    else:
        points, explained = _principal_components(directions)
        name = f"first two principal components of the {what}"
        caution = (
            f"They hold {explained:.1%} of the variance between {what}; what differs in the rest can overlap here."
        )
    points = _lengthwise(points.astype(np.float64))
    points -= (points.max(axis=0) + points.min(axis=0)) / 2
    points /= max(float(np.abs(points).max()), np.finfo(np.float32).tiny)
    return Projection(points, name, caution)


def _lengthwise(points: Float[np.ndarray, "k 2"]) -> Float[np.ndarray, "k 2"]:
    """Turn the picture so that it is widest from left to right, as the page is; which way is up means nothing."""
    centred = points - points.mean(axis=0)
    turned = centred @ np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
    # An eigenvector's sign is arbitrary; a rule for it keeps the picture from flipping between machines.
    return turned * np.where((turned**3).sum(axis=0) < 0, -1, 1)


def _principal_components(directions: Float[np.ndarray, "k d"]) -> tuple[Float[np.ndarray, "k 2"], float]:
    """Scores on the first two components, zero where there are fewer; the fraction of variance they hold, in [0, 1]."""
    points = np.zeros((len(directions), 2))
    n = min(2, len(directions) - 1, directions.shape[1])
    if n < 1:
        return points, 1.0
    pca = PCA(
        n_components=n, svd_solver="covariance_eigh" if directions.shape[1] <= 4096 else "randomized", random_state=0
    )
    points[:, :n] = pca.fit_transform(directions)
    return points, float(pca.explained_variance_ratio_.sum())
