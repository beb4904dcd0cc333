"""The rate-distortion objective of clusters that live in two views, and the centres that minimise it.

Symbols
    n         items; d_e, d_a  widths of the semantic and the attribution view
    e_i, a_i  row i of the two views
    w_i       weight of item i; weights sum to 1
    S, p      members of a cluster and its mass, the sum of their weights
    mu, h     centres of a cluster in the two views
    V_e, V_a  its distortions: sum over members of w_i |e_i - mu|^2, and of w_i |a_i - h|_1 (or squared, metric "l2")
    b_e, b_a  weight of each view's distortion, in nats per unit

A partition costs L = sum over clusters of (-p log p + b_e V_e + b_a V_a), in nats. The cost is a sum over clusters, and
p, V_e and V_a of a set do not depend on these weights: they are worked out once for a set of members and serve
all.

A coordinate-wise weighted median is zero wherever non-zero members hold less than half of the mass. Where most entries
are zero only the other columns are sorted, and distances are corrected only where a centre is not zero. No array of
items x clusters x sources is ever made.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist

from saelens_ext.ops.weighted_median import Sorted, weighted_median

Metric = Literal["l1", "l2"]
CenterKind = Literal["mean", "unit"]
CdistMetric = Literal["cityblock", "sqeuclidean"]
CDIST_METRICS: dict[str, CdistMetric] = {"l1": "cityblock", "l2": "sqeuclidean"}
"""What scipy calls the distances of the attribution view."""

# Entries of a block of differences: 256 KB in float64, which stays in a core's cache.
_BLOCK = 2**15
# Fraction of non-zero entries below which storing where they are saves time.
_SPARSE = 0.5
# Sources in a coarse view.
_SAMPLED = 256
# Fraction of all items from which on working with all of them beats picking the members.
_MANY = 1 / 6
# Room for remembered clusters.
_MEMORY_BYTES = 2**28


class Cluster:
    """A set of items with its mass, distortions and centres; made by :meth:`PairedViews.cluster` and never changed."""

    __slots__ = (
        "_distances",
        "_own_e",
        "center",
        "key",
        "mass",
        "members",
        "own_a",
        "rate",
        "semantic_sum",
        "v_a",
        "v_e",
    )

    def __init__(self, members: np.ndarray, key: bytes, mass: float):
        self.members = members
        self.key = key
        self.mass = mass
        self.rate = -mass * np.log(mass)
        self._distances: tuple[np.ndarray, np.ndarray] | None = None
        self._own_e: np.ndarray | None = None

    def cost(self, b_e: float, b_a: float) -> float:
        """Its term of L, in nats."""
        return self.rate + b_e * self.v_e + b_a * self.v_a


class PairedViews:
    """Items in two views, with every cluster of them that has been looked at.

    Args:
        semantic: e, ``(n, d_e)``.
        attribution: a, ``(n, d_a)``; width 0 where there is no such view.
        weights: w, ``(n,)``, positive; they are divided by their sum.
        metric: of the attribution view. ``"l1"``: sum of absolute differences, centre the weighted median; ``"l2"``:
            squared Euclidean, centre the weighted mean.
        semantic_center: ``"mean"``: the weighted mean; ``"unit"``: the mean renormalised, which is the exact minimiser
            among unit vectors.
    """

    def __init__(
        self,
        semantic: Float[np.ndarray, "n d_e"],
        attribution: Float[np.ndarray, "n d_a"],
        weights: Float[np.ndarray, " n"],
        metric: Metric = "l1",
        semantic_center: CenterKind = "mean",
    ):
        self.metric: Metric = metric
        self.semantic_center: CenterKind = semantic_center
        self.weights = weights.astype(np.float64) / np.sum(weights, dtype=np.float64)
        # Distances between means do not depend on the origin, and rounding is least around the common mean. A
        # renormalised mean does depend on it.
        origin = self.weights @ semantic if semantic_center == "mean" else np.zeros(semantic.shape[1])
        self._semantic_origin = origin
        self.semantic = semantic.astype(np.float64) - origin
        self._semantic_squares = np.einsum("ij,ij->i", self.semantic, self.semantic)
        # Distances read an item's entries side by side, medians a source's.
        self._rows = np.ascontiguousarray(attribution, dtype=np.float64)
        self.sources = np.ascontiguousarray(self._rows.T)
        self._source_origin = self.sources @ self.weights if metric == "l2" else np.zeros(len(self.sources))
        if metric == "l2":
            self.sources -= self._source_origin[:, None]
            self._row_totals = np.einsum("ji,ji->i", self.sources, self.sources)
        else:
            self._row_totals = self._city_block(np.zeros(len(self.sources)), slice(None))
        sparse = metric == "l1" and np.count_nonzero(self.sources) < _SPARSE * max(self.sources.size, 1)
        self._filled = csr_array(self.sources) if sparse else None
        self._nonzero = csr_array((self.sources != 0).T) if sparse else None
        self._sorted: Sorted | None = None
        self._known: dict[bytes, Cluster] = {}
        # Made once, so that searches at other weights share the clusters that were looked at.
        self._coarse: PairedViews | Literal[False] | None = None
        self._limit = max(1024, _MEMORY_BYTES // (16 * self.n + 16 * len(self.sources) + 8 * semantic.shape[1] + 512))

    @property
    def n(self) -> int:
        """Items."""
        return len(self.weights)

    def coarse(self) -> "PairedViews":
        """The same items on a sample of the sources, to estimate by; itself where sources are few or mostly zero.

        Sources are taken at even steps, since their order means layers and positions, and are scaled so that one
        cluster for all has the distortion that it has. Of sparse sources a sample would see too little, and they cost
        little.
        """
        if self._coarse is None:
            self._coarse = self._sampled()
        return self if self._coarse is False else self._coarse

    def _sampled(self) -> "PairedViews | Literal[False]":
        if self._nonzero is not None or len(self.sources) < 2 * _SAMPLED:
            return False
        rows = self.sources[np.linspace(0, len(self.sources) - 1, _SAMPLED).astype(int)].T
        everything = np.arange(self.n)
        sampled = (
            PairedViews(self.semantic, rows, self.weights, self.metric, self.semantic_center).cluster(everything).v_a
        )
        if not sampled > 0:
            return False
        ratio = self.cluster(everything).v_a / sampled
        rows *= ratio if self.metric == "l1" else np.sqrt(ratio)
        return PairedViews(self.semantic, rows, self.weights, self.metric, self.semantic_center)

    # --- clusters ---

    def cluster(self, members: Int[np.ndarray, " m"]) -> Cluster:
        """The cluster of these items, ascending indices; remembered."""
        mask = np.zeros(self.n, dtype=bool)
        mask[members] = True
        key = np.packbits(mask).tobytes()
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= self._limit:
                # Forget the older half: dictionaries keep the order of arrival.
                self._known = dict(list(self._known.items())[self._limit // 2 :])
            found = self._known[key] = self._made(members, key)
        return found

    def clusters(self, labels: Int[np.ndarray, " n"]) -> list[Cluster]:
        """One cluster per label; labels are 0 to K - 1, each in use."""
        return [self.cluster(part) for part in members_by_label(labels)]

    def _made(self, members: np.ndarray, key: bytes) -> Cluster:
        weights = self.weights[members]
        made = Cluster(members, key, float(weights.sum()))
        made.semantic_sum = weights @ self.semantic[members]
        squares = float(weights @ self._semantic_squares[members])
        squared_sum = float(made.semantic_sum @ made.semantic_sum)
        if self.semantic_center == "mean":
            made.v_e = max(0.0, squares - squared_sum / made.mass) if len(members) > 1 else 0.0
        else:
            made.v_e = max(0.0, squares + made.mass - 2 * np.sqrt(squared_sum))
        made.center, made.own_a = (self._median if self.metric == "l1" else self._mean)(members, weights)
        made.v_a = float(weights @ made.own_a) if len(members) > 1 else 0.0
        return made

    def own_costs(self, cluster: Cluster, b_e: float, b_a: float) -> Float64[np.ndarray, " m"]:
        """What its members cost where they are: -log p + b_e |e - mu|^2 + b_a |a - h|_1."""
        if cluster._own_e is None:
            cluster._own_e = self.semantic_distances(cluster, cluster.members)
        return b_e * cluster._own_e + b_a * cluster.own_a - np.log(cluster.mass)

    def semantic_mean(self, cluster: Cluster) -> Float64[np.ndarray, " d_e"]:
        """mu, in the coordinates given."""
        if self.semantic_center == "mean":
            return cluster.semantic_sum / cluster.mass + self._semantic_origin
        return _unit(cluster.semantic_sum)

    def attribution_center(self, cluster: Cluster) -> Float64[np.ndarray, " d_a"]:
        """h, in the coordinates given."""
        if self.metric == "l2":
            return cluster.center[1] + self._source_origin
        columns, values = cluster.center
        center = np.zeros(len(self.sources))
        center[columns] = values
        return center

    def _mean(self, members: np.ndarray, weights: np.ndarray) -> tuple[tuple, np.ndarray]:
        values = np.take(self.sources, members, axis=1)
        center = values @ (weights / weights.sum())
        return (None, center), np.maximum(self._row_totals[members] - 2 * (center @ values) + center @ center, 0)

    def _median(self, members: np.ndarray, weights: np.ndarray) -> tuple[tuple, np.ndarray]:
        """Where the median is not zero, the values there, and the distances of the members."""
        if len(members) == 1 or not len(self.sources):
            only = self.sources[:, members[0]]
            support = np.flatnonzero(only)
            return (support, only[support]), np.zeros(len(members))
        if self._nonzero is not None:
            return self._sparse_median(members, weights)
        medians = self._dense_median(members, weights)
        support = np.flatnonzero(medians)
        return (support, medians[support]), self._city_block(medians, members)

    def _dense_median(self, members: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if len(members) > _MANY * self.n:
            if self._sorted is None:
                self._sorted = Sorted(self.sources)
            spread = np.zeros(self.n)
            spread[members] = weights
            return self._sorted.medians(spread)
        step = max(1, 4 * _BLOCK // len(members))
        parts = (self.sources[begin : begin + step] for begin in range(0, len(self.sources), step))
        return np.concatenate([weighted_median(np.take(part, members, axis=1), weights) for part in parts])

    def _sparse_median(self, members: np.ndarray, weights: np.ndarray) -> tuple[tuple, np.ndarray]:
        assert self._nonzero is not None
        rows = self._nonzero[members]
        held = np.bincount(rows.indices, np.repeat(weights, np.diff(rows.indptr)), minlength=len(self.sources))
        # A margin for rounding: a column too many is harmless, since its median is worked out.
        columns = np.flatnonzero(held >= 0.499 * weights.sum())
        medians, own = np.empty(len(columns)), self._row_totals[members]
        step = max(1, 4 * _BLOCK // len(members))
        for begin in range(0, len(columns), step):
            part = slice(begin, begin + step)
            values = np.take(self.sources[columns[part]], members, axis=1)
            medians[part] = weighted_median(values, weights)
            own = own - np.abs(values).sum(axis=0)
            own += np.abs(np.subtract(values, medians[part, None], out=values), out=values).sum(axis=0)
        support = np.flatnonzero(medians)
        return (columns[support], medians[support]), np.maximum(own, 0)

    # --- distances ---

    def distances(self, cluster: Cluster) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """Distances of all items from its two centres, as the two distortions count them; remembered."""
        if cluster._distances is None:
            everything = slice(None)
            cluster._distances = (
                self.semantic_distances(cluster, everything),
                self.attribution_distances(cluster, everything),
            )
        return cluster._distances

    def semantic_distances(self, cluster: Cluster, rows: np.ndarray | slice) -> Float64[np.ndarray, " m"]:
        """|e_i - mu|^2 of some items."""
        center = cluster.semantic_sum / cluster.mass if self.semantic_center == "mean" else _unit(cluster.semantic_sum)
        # To copy many rows takes longer than their product with a vector.
        whole = isinstance(rows, slice) or len(rows) > _MANY * self.n
        products = (self.semantic @ center)[rows] if whole else self.semantic[rows] @ center
        return np.maximum(self._semantic_squares[rows] - 2 * products + center @ center, 0)

    def attribution_distances(self, cluster: Cluster, rows: np.ndarray | slice) -> Float64[np.ndarray, " m"]:
        """|a_i - h|_1 of some items, or its square for metric "l2"."""
        columns, values = cluster.center
        totals = self._row_totals[rows]
        if self.metric == "l2":
            return np.maximum(totals - 2 * (values @ self.sources[:, rows]) + values @ values, 0)
        if self._filled is not None and 2 * len(columns) <= len(self.sources):
            corrections = _sparse_corrections(self._filled[columns], values, self.n)
            return np.maximum(self._row_totals + corrections, 0)[rows]
        return self._city_block(self.attribution_center(cluster), rows)

    def center_distances(self, center: Float[np.ndarray, " d_a"]) -> Float64[np.ndarray, " n"]:
        """Distances of all items from any attribution centre, as the metric counts them."""
        if self.metric == "l1":
            return self._city_block(center, slice(None))
        center = center - self._source_origin
        return np.maximum(self._row_totals - 2 * (center @ self.sources) + center @ center, 0)

    def _city_block(self, center: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
        """|a - h|_1 of some items, block by block where they must be copied."""
        if isinstance(rows, slice):
            return cdist(self._rows[rows], center[None], "cityblock")[:, 0]
        n_parts = 1 + len(rows) * len(center) // (8 * _BLOCK)
        parts = np.array_split(rows, n_parts) if n_parts > 1 else [rows]  # which takes longer than few distances
        return np.concatenate([cdist(self._rows[part], center[None], "cityblock")[:, 0] for part in parts])


def members_by_label(labels: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " m"]]:
    """The items of each label in use, ascending."""
    order, ends = np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels)).tolist()
    return [order[first:end] for first, end in zip([0, *ends], ends) if first < end]


def partition_cost(clusters: Sequence[Cluster], b_e: float, b_a: float) -> float:
    """L of a partition, in nats.

    Source: arXiv 2606.08236, the rate-distortion objective with b_e = beta gamma and b_a = beta (1 - gamma).
    """
    return float(sum(cluster.cost(b_e, b_a) for cluster in clusters))


def assignment_costs(
    views: PairedViews, clusters: Sequence[Cluster], b_e: float, b_a: float, *, every: bool = False
) -> Float64[np.ndarray, "n k"]:
    """What each item costs in each cluster at the centres and masses of now: -log p_k + b_e |e - mu_k|^2 + b_a |a -
    h_k|_1.

    Moving every item to its cheapest cluster never raises L: codes made for the old masses cost at least the entropy of
    the new ones, and new centres are at least as good as the old. Clusters that no item would move to are left at
    infinity for all but their members, unless ``every`` is set.
    """
    costs = np.full((views.n, len(clusters)), np.inf)
    for k, cluster in enumerate(clusters):
        costs[cluster.members, k] = views.own_costs(cluster, b_e, b_a)
    dearest = costs.min(axis=1).max()
    for k, cluster in enumerate(clusters):
        # -log p of a rare cluster can exceed the cost of any item where it is.
        if every or -np.log(cluster.mass) < dearest:
            d_e, d_a = views.distances(cluster)
            costs[:, k] = b_e * d_e + b_a * d_a - np.log(cluster.mass)
    return costs


def _sparse_corrections(sources: csr_array, center: np.ndarray, n_items: int) -> np.ndarray:
    """Sum over sources of |a - h| - |a| for every item, ``(n,)``; a term is |h| where a is zero."""
    h = np.repeat(center, np.diff(sources.indptr))
    terms = np.abs(sources.data - h) - np.abs(sources.data) - np.abs(h)
    return np.bincount(sources.indices, terms, minlength=n_items) + np.abs(center).sum()


def _unit(vector: np.ndarray) -> np.ndarray:
    norm = np.sqrt(vector @ vector)
    # Where the members cancel, every unit vector is as good as any other.
    return vector / norm if norm > 0 else np.eye(1, len(vector))[0]
