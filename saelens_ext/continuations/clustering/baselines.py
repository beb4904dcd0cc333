"""k-means of one view alone, matched to a joint clustering on the number of clusters or on the rate.

Symbols
    K  clusters
    R  rate: entropy of the cluster weights, in nats
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy.stats import entropy
from sklearn.cluster import KMeans

from saelens_ext import _checks
from saelens_ext.continuations.clustering.problem import checked_view, checked_weights


@dataclass(frozen=True)
class BaselinePartition:
    """A partition made from one view."""

    labels: Int[np.ndarray, " n"]
    """0 to K - 1, each in use."""
    rate: float
    """R, in nats."""

    @property
    def n_clusters(self) -> int:
        """K; below what was asked for where the view has fewer distinct rows."""
        return int(self.labels.max()) + 1


def single_view_kmeans(
    view,
    *,
    n_clusters: int | None = None,
    rate: float | int | None = None,
    sample_weight=None,
    n_init: int = 10,
    random_state=None,
) -> BaselinePartition:
    """k-means on one view ``(n, d)``, matched on K or on R.

    Args:
        n_clusters: K to match, 1 to n.
        rate: R to match instead, in nats, >= 0: the K is taken whose rate comes nearest. K is bracketed by doubling and
            halved in; the rate of k-means need not rise with K everywhere, so what is found is the nearest of those
            tried.
        sample_weight: ``(n,)``, above 0.
        n_init: starts of k-means for each K.

    Raises:
        ValueError: not exactly one of ``n_clusters`` and ``rate``, either out of range, or a view or weights that are
            not finite.
    """
    found = SingleView(view, sample_weight=sample_weight, n_init=n_init, random_state=random_state)
    if n_clusters is not None and rate is None:
        return found.with_clusters(n_clusters)
    if rate is None or n_clusters is not None:
        raise ValueError(f"Give one of n_clusters and rate, got n_clusters={n_clusters!r} and rate={rate!r}.")
    return found.with_rate(rate)


class SingleView:
    """One view ``(n, d)`` and its k-means clusterings, each made once; arguments as for :func:`single_view_kmeans`."""

    def __init__(self, view, *, sample_weight=None, n_init: int = 10, random_state=None):
        self._rows = checked_view(view, "view")
        self._weights = checked_weights(sample_weight, len(self._rows))
        self._n_init, self._random_state = n_init, random_state
        self._most = len(np.unique(self._rows, axis=0))
        self._made: dict[int, BaselinePartition] = {}

    def with_clusters(self, n_clusters: int) -> BaselinePartition:
        """K clusters; ValueError unless K lies in 1 to n."""
        if not 1 <= _checks.positive(n_clusters, "n_clusters") <= len(self._rows):
            raise ValueError(
                f"n_clusters must lie between 1 and the number of rows, {len(self._rows)}, got {n_clusters!r}."
            )
        k = min(n_clusters, self._most)
        if k not in self._made:
            self._made[k] = self._partition(k)
        return self._made[k]

    def with_rate(self, rate: float | int) -> BaselinePartition:
        """The clustering whose rate comes nearest; ValueError unless the rate is finite and at least 0."""
        if not 0 <= rate < np.inf:
            raise ValueError(f"rate must be finite and at least 0, in nats, got {rate!r}.")
        tried = {1: self.with_clusters(1)}
        high = 1
        while tried[high].rate < rate and high < self._most:
            high = min(2 * high, self._most)
            tried[high] = self.with_clusters(high)
        low = max((k for k in tried if tried[k].rate < rate), default=high)
        while high - low > 1:
            middle = (low + high) // 2
            tried[middle] = self.with_clusters(middle)
            low, high = (middle, high) if tried[middle].rate < rate else (low, middle)
        return min((tried[k] for k in sorted(tried)), key=lambda found: abs(found.rate - rate))

    def _partition(self, k: int) -> BaselinePartition:
        means = KMeans(k, n_init=self._n_init, random_state=self._random_state)  # pyright: ignore[reportArgumentType]
        labels = means.fit_predict(self._rows, sample_weight=self._weights)
        labels = np.unique(labels, return_inverse=True)[1]
        return BaselinePartition(labels, max(0.0, float(entropy(np.bincount(labels, self._weights)))))
