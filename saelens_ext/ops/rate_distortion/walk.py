"""Steps that lower the rate-distortion objective of a partition: reassignment, merges, splits, moves and swaps of
items.

Symbols
    L         objective, in nats; see ``rate_distortion``
    b_e, b_a  weights of the two views' distortions, in nats per unit

Every step is judged by the exact L of its outcome and taken only if it lowers L.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from saelens_ext.ops.rate_distortion.objective import (
    Cluster,
    PairedViews,
    assignment_costs,
    members_by_label,
    partition_cost,
)

# Pairs whose union is worked out per merge; all where views are small.
_PAIRS_JUDGED = 4
# Entries of the views that the search for single moves may touch per round; small problems are searched in full.
_MOVE_ENTRIES = 2**20
_TARGETS_PER_MOVE = 3
_SERVING = 32
# Clusters that join a heavier one at once have no more than this fraction of its mass: they hardly move its centres.
_LIGHT = 0.25
# A step is worked out in full unless its estimated loss exceeds this fraction of the distortion it changes.
_ESTIMATE_MARGIN = 0.1
_SMALL = 2**14


@runtime_checkable
class Guide(Protocol):
    """What a walk needs from the search that it belongs to."""

    views: PairedViews
    coarse: PairedViews
    min_members: int

    def splits(self, cluster: Cluster, b_e: float, b_a: float) -> list[tuple[Cluster, Cluster]]:
        """Splits of a cluster worth judging."""
        ...

    def allowed(self, labels: np.ndarray, b_e: float, b_a: float) -> np.ndarray:
        """A partition, mended where clusters have too few members."""
        ...


class Walk:
    """A partition on its way down."""

    def __init__(self, search: Guide, labels: np.ndarray, b_e: float, b_a: float, least: float):
        self.search = search
        self.views = search.views
        self.b_e, self.b_a = b_e, b_a
        self.least = least
        self.labels = labels
        self._width = len(self.views.sources) + self.views.semantic.shape[1]
        self._small = self.views.n * self._width <= _SMALL
        self._hope = 0.5 if self._small else 0.8
        self.clusters = self.views.clusters(labels)
        self.history = [partition_cost(self.clusters, b_e, b_a)]

    @property
    def key(self) -> frozenset[bytes]:
        """What tells the partition from others, whatever the order of its clusters."""
        return frozenset(cluster.key for cluster in self.clusters)

    def _cost(self, clusters: Sequence[Cluster]) -> float:
        return partition_cost(clusters, self.b_e, self.b_a)

    def _gain(self, old: Sequence[Cluster], new: Sequence[Cluster]) -> float:
        return self._cost(old) - self._cost(new)

    def _promising(self, old: Sequence[Cluster], new: Sequence[np.ndarray]) -> bool:
        """Whether replacing clusters by those of these members may gain, as far as the coarse views can tell."""
        coarse = self.search.coarse
        if coarse is self.views:
            return True
        before, after = [coarse.cluster(part.members) for part in old], [coarse.cluster(members) for members in new]
        gain = self._gain(before, after)
        distortion = gain + sum(part.rate for part in after) - sum(part.rate for part in before)
        return bool(gain > -_ESTIMATE_MARGIN * abs(distortion))

    def _replace(self, old: Sequence[Cluster], new: Sequence[Cluster]) -> None:
        gone = {cluster.key for cluster in old}
        self.clusters = [cluster for cluster in self.clusters if cluster.key not in gone] + list(new)
        self._take(self.clusters)

    def _take(self, clusters: list[Cluster]) -> None:
        self.clusters = clusters
        self.labels = np.empty(self.views.n, dtype=np.intp)
        for k, cluster in enumerate(clusters):
            self.labels[cluster.members] = k
        self.history.append(self._cost(clusters))

    def settle(self) -> None:
        """Reassign all items and move the centres, until assignments are stable."""
        items = np.arange(self.views.n)
        while len(self.clusters) > 1:
            costs = assignment_costs(self.views, self.clusters, self.b_e, self.b_a)
            cheapest = np.argmin(costs, axis=1)
            # Equal costs but for rounding do not move an item.
            stay = costs[items, self.labels] <= costs[items, cheapest] + 1e-12 * np.abs(costs[items, cheapest])
            labels = np.unique(np.where(stay, self.labels, cheapest), return_inverse=True)[1]
            labels = self.search.allowed(labels, self.b_e, self.b_a)
            if np.array_equal(labels, self.labels):
                return
            clusters = self.views.clusters(labels)
            if self.history[-1] - self._cost(clusters) <= self.least:
                return
            self._take(clusters)

    def merge(self) -> bool:
        """Merge clusters, best pairs first, until none gains."""
        merged = False
        while len(self.clusters) > 1:
            gains = [(self._gain(parts, [union]), parts, union) for parts, union in self._unions()]
            gain, parts, union = max(gains, key=lambda entry: entry[0], default=(0.0, (), None))
            if union is None or gain <= self.least:
                break
            self._replace(parts, [union])
            merged = True
        return merged

    def _unions(self) -> Iterator[tuple[list[Cluster], Cluster]]:
        """The clusters most likely to gain from a merge, and what they merge into: the surest alone where one is
        sure.
        """
        sure, hoped = self._merge_changes()
        first, second = np.triu_indices(len(self.clusters), 1)
        pairs = np.stack([first, second], axis=1)[np.argsort(sure[first, second], kind="stable")]
        best = sure[tuple(pairs[0])]
        if not self._small and best < -self.least:
            parts, union = self._united(self._joining(sure, pairs[0]))
            yield parts, union
            if self._gain(parts, [union]) < -best:
                yield self._united(pairs[0])
            return
        for pair in pairs if self._small else pairs[:_PAIRS_JUDGED]:
            if hoped[tuple(pair)] < 0:
                parts = [self.clusters[k] for k in pair]
                if sure[tuple(pair)] < -self.least or self._promising(parts, [_members(parts)]):
                    yield self._united(pair)

    def _joining(self, sure: np.ndarray, pair: np.ndarray) -> np.ndarray:
        """Two clusters, and light ones that would rather join the heavier of the two than any other."""
        masses = [cluster.mass for cluster in self.clusters]
        heavy, light = sorted(pair, key=lambda k: -masses[k])
        chosen, room = [heavy, light], _LIGHT * masses[heavy] - masses[light]
        for k in np.argsort(sure[heavy], kind="stable"):
            if sure[heavy, k] >= -self.least:
                break
            if k not in chosen and masses[k] <= room and np.argmin(sure[k]) == heavy:
                chosen.append(k)
                room -= masses[k]
        return np.array(chosen)

    def _united(self, chosen: np.ndarray) -> tuple[list[Cluster], Cluster]:
        parts = [self.clusters[k] for k in chosen]
        return parts, self.views.cluster(_members(parts))

    def _merge_changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Bound from above of the change of L by merging each pair, and what it might be at best.

        Serving both by the better of the two centres bounds it. The centre of the union can do better, for quadratic
        costs at most by half.
        """
        masses = np.array([cluster.mass for cluster in self.clusters])
        members = np.concatenate([cluster.members for cluster in self.clusters])
        begins = np.cumsum([0, *(len(cluster.members) for cluster in self.clusters[:-1])])
        total = masses[:, None] + masses
        saved = total * np.log(total) - masses[:, None] * np.log(masses)[:, None] - masses * np.log(masses)
        sure, hoped = -saved, -saved
        # The heaviest clusters serve the others; the lightest of very many are never asked to.
        serving = np.argsort(-masses, kind="stable")[:_SERVING]
        distances = np.array([self.views.distances(self.clusters[k]) for k in serving])[..., members]
        served = np.add.reduceat(distances * self.views.weights[members], begins, axis=2)
        own = [[cluster.v_e for cluster in self.clusters], [cluster.v_a for cluster in self.clusters]]
        means = self.views.semantic_center == "mean", self.views.metric == "l2"
        for view, weight in enumerate((self.b_e, self.b_a)):
            rise = np.full_like(saved, np.inf)
            rise[serving] = served[:, view] - np.array(own[view])
            exact = means[view]
            rise = rise * masses[:, None] / total if exact else rise
            rise = np.minimum(rise, rise.T)
            sure, hoped = sure + weight * rise, hoped + weight * rise * (1 if exact else self._hope)
        np.fill_diagonal(sure, np.inf)
        return sure, hoped

    def split(self, least_members: int) -> bool:
        """Split every cluster whose best known split into parts of a least size gains."""
        old, new = [], []
        for cluster in self.clusters:
            # A split costs rate and gains at most the distortion that is there.
            if self.b_e * cluster.v_e + self.b_a * cluster.v_a <= self.least:
                continue
            known = self.search.splits(cluster, self.b_e, self.b_a)
            large = [pair for pair in known if min(len(part.members) for part in pair) >= least_members]
            pair = min(large, key=self._cost, default=None)
            if pair is None or not self._promising([cluster], [part.members for part in pair]):
                continue
            parts = [self.views.cluster(part.members) for part in pair]
            if self._gain([cluster], parts) > self.least:
                old.append(cluster)
                new += parts
        if old:
            self._replace(old, new)
        return bool(old)

    def evict(self) -> bool:
        """Give clusters of their own to the items that cost more where they are, as many at once as gains.

        Rows of heavy tails leave one by one otherwise, each with a new median of the rest to compute.
        """
        gains = np.concatenate([self._lonely_gains(cluster) for cluster in self.clusters])
        items = np.concatenate([cluster.members for cluster in self.clusters])
        leaving = items[np.argsort(-gains, kind="stable")][: np.count_nonzero(gains > self.least)]
        while len(leaving):
            labels = self.labels.copy()
            labels[leaving] = len(self.clusters) + np.arange(len(leaving))
            parts = members_by_label(labels)
            if not self._promising(self.clusters, parts):
                leaving = leaving[: len(leaving) // 2]
                continue
            clusters = [self.views.cluster(part) for part in parts]
            if self.history[-1] - self._cost(clusters) > self.least:
                self._take(clusters)
                return True
            leaving = leaving[: len(leaving) // 2]
        return False

    def _lonely_gains(self, cluster: Cluster) -> np.ndarray:
        if len(cluster.members) == 1:
            return np.zeros(1)
        return self.views.own_costs(cluster, self.b_e, self.b_a) + np.log(self.views.weights[cluster.members])

    def move(self) -> bool:
        """Move the first single item found to gain, to another cluster or to one of its own.

        Reassignment keeps the centres, so it misses moves that gain only because both centres follow.
        """
        left, least = _MOVE_ENTRIES, self.search.min_members
        for item, k in self._promising_moves():
            home = self.clusters[self.labels[item]]
            if len(home.members) == max(1, least) or (k is None and least > 1):
                continue
            target = None if k is None else self.clusters[k]
            left -= self._width * (len(home.members) + (1 if target is None else len(target.members)))
            if left < 0:
                break
            joined = [item] if target is None else np.sort(np.append(target.members, item))
            new = [self.views.cluster(home.members[home.members != item]), self.views.cluster(np.asarray(joined))]
            old = [home] if target is None else [home, target]
            if self._gain(old, new) > self.least:
                self._replace(old, new)
                return True
        return False

    def swap(self) -> bool:
        """Swap the first two items found to gain by it.

        Between clusters that have no member to spare a single item cannot move, and reassignment stands still.
        """
        costs = assignment_costs(self.views, self.clusters, self.b_e, self.b_a, every=True)
        extra = costs - costs[np.arange(self.views.n), self.labels][:, None]
        left = _MOVE_ENTRIES
        for item, other in self._promising_swaps(extra):
            old = [self.clusters[self.labels[item]], self.clusters[self.labels[other]]]
            left -= self._width * sum(len(cluster.members) for cluster in old)
            if left < 0:
                break
            new = [
                self.views.cluster(np.sort(np.append(cluster.members[cluster.members != leaving], coming)))
                for cluster, leaving, coming in zip(old, (item, other), (other, item), strict=True)
            ]
            if self._gain(old, new) > self.least:
                self._replace(old, new)
                return True
        return False

    def _promising_swaps(self, extra: np.ndarray) -> Iterator[tuple[int, int]]:
        """Pairs of items of different clusters, those first that together cost least more in each other's place."""
        pairs = []
        for item in range(self.views.n):
            there = self.labels != self.labels[item]
            change = np.where(there, extra[item, self.labels] + extra[:, self.labels[item]], np.inf)
            nearest = np.argsort(change, kind="stable")[:_TARGETS_PER_MOVE]
            pairs += [(change[other], item, int(other)) for other in nearest if there[other]]
        for _, item, other in sorted(pairs):
            yield item, other

    def _promising_moves(self) -> Iterator[tuple[int, int | None]]:
        """Items and other clusters, those first that cost least more than staying; then items on their own."""
        costs = assignment_costs(self.views, self.clusters, self.b_e, self.b_a, every=self._small)
        items = np.arange(self.views.n)
        extra = costs - costs[items, self.labels][:, None]
        extra[items, self.labels] = np.inf
        nearest = np.argsort(extra, axis=1)[:, : min(_TARGETS_PER_MOVE, len(self.clusters) - 1)]
        alone = -costs[items, self.labels] - np.log(self.views.weights)
        rise = np.concatenate([np.take_along_axis(extra, nearest, axis=1).ravel(), alone])
        for place in np.argsort(rise, kind="stable"):
            if place >= nearest.size:
                yield int(place) - nearest.size, None
            elif rise[place] < np.inf:
                yield int(place) // nearest.shape[1], int(nearest.flat[place])


def _members(clusters: Iterable[Cluster]) -> np.ndarray:
    """Of all of them, ascending."""
    return np.sort(np.concatenate([cluster.members for cluster in clusters]))
