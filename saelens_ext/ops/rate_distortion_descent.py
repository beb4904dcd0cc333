"""Descent of the rate-distortion objective: reassignment, merges, splits and moves of single items.

Symbols
    L         objective, in nats; see ``rate_distortion``
    b_e, b_a  prices of the two views' distortions, in nats per unit
    K         clusters now

A round reassigns until assignments are stable, merges pairs, best first, until none gains, splits every cluster whose
best split gains (L is a sum over clusters, so splits do not meddle with each other), and only where none of these
gained moves single items. Every step is judged by the exact L of its outcome and taken only if it lowers L; the descent
ends when no step does.

What a split or a merge does to rate and distortions does not depend on the prices, so what was learnt at one pair of
prices is looked up at the next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from saelens_ext.ops.rate_distortion import Cluster, PairedViews, assignment_costs, partition_cost
from saelens_ext.ops.rate_distortion_proposals import Sketch, sketch_partition, split_proposals

# Splits in full width looked at per cluster, and rounds of two-means that refine each of them.
_SPLITS_JUDGED = 3
_SPLIT_ROUNDS = 4
# Pairs whose union is worked out per merge; all where views are small.
_PAIRS_JUDGED = 4
# Entries of the views that the search for single moves may touch per round; small problems are searched in full.
_MOVE_ENTRIES = 2**20
_TARGETS_PER_MOVE = 3
_SERVING = 32
# A step is worked out in full unless its estimated loss exceeds this share of the distortion it changes.
_ESTIMATE_MARGIN = 0.1
_SMALL = 2**14
_FEW_ITEMS = 32
_RANDOM_STARTS = 4


@dataclass(frozen=True)
class Descent:
    """Where a descent ended."""

    labels: Int[np.ndarray, " n"]
    """0 to K - 1, each in use."""
    clusters: list[Cluster]
    """In the order of the labels."""
    history: list[float]
    """L at the start and after every step taken, in nats."""
    n_iter: int
    """Rounds."""
    converged: bool
    """Whether it ended because no step lowers L."""

    @property
    def cost(self) -> float:
        """L, in nats."""
        return self.history[-1]


class Search:
    """Descents over one set of items, sharing all they learn.

    Args:
        views: the items.
        random_state: chooses seeds of splits and starts.
        max_iter: rounds of one descent.
        tol: a step must lower L by more than this share of the L of one cluster.
        sketch: of the same views; made where it is not given.
    """

    def __init__(
        self,
        views: PairedViews,
        random_state: np.random.RandomState,
        *,
        max_iter: int = 100,
        tol: float = 1e-9,
        sketch: Sketch | None = None,
    ):
        self.views = views
        self.max_iter = max_iter
        self.tol = tol
        self._random_state = random_state
        self._sketch = Sketch(views, random_state) if sketch is None else sketch
        self._splits: dict[bytes, list[tuple[Cluster, Cluster]]] = {}
        self._explored: set[tuple[bytes, float]] = set()
        self.coarse = views.coarse()
        apart = self.coarse is not views
        self._scout = Search(self.coarse, random_state, max_iter=max_iter, tol=tol, sketch=self._sketch) if apart else None
        self.one = views.cluster(np.arange(views.n))

    def starts(self, b_e: float, b_a: float) -> list[Int[np.ndarray, " n"]]:
        """Partitions worth descending from: one cluster, two found in the sketch; for few items single ones and random ones.

        One of those from the sketch is made for doubled prices. It has more clusters than will stay, and merging them
        finds partitions to which no gaining split of one cluster leads.
        """
        n = self.views.n
        found = [self.one_cluster]
        for factor, k in ((1, 16), (2, 32)):
            z = self._sketch.joint(factor * b_e, factor * b_a)
            found.append(sketch_partition(z, self.views.weights, min(k, n), self._random_state))
        if n <= _FEW_ITEMS:
            found.append(np.arange(n))
            found += [self._random_labels(2 + turn % (n - 1)) for turn in range(_RANDOM_STARTS)]
        return found

    def _random_labels(self, k: int) -> np.ndarray:
        return np.unique(self._random_state.randint(k, size=self.views.n), return_inverse=True)[1]

    @property
    def one_cluster(self) -> Int[np.ndarray, " n"]:
        """Labels of one cluster for all."""
        return np.zeros(self.views.n, dtype=np.intp)

    def best(self, starts: Sequence[Int[np.ndarray, " n"]], b_e: float, b_a: float) -> Descent:
        """The lowest end of descents from several starts; the first among equals.

        With many sources that are not sparse, descents run on the coarse views, and the best end of theirs is followed
        down in full, unless the first start or one cluster is lower in full.
        """
        distinct = {start.tobytes(): start for start in starts}
        if self._scout is None:
            return min((self.descend(start, b_e, b_a) for start in distinct.values()), key=lambda descent: descent.cost)
        candidates = [self._scout.best(starts, b_e, b_a).labels, starts[0], self.one_cluster]
        lowest = min(candidates, key=lambda labels: partition_cost(self.views.clusters(labels), b_e, b_a))
        return self.descend(lowest, b_e, b_a)

    def descend(self, labels: Int[np.ndarray, " n"], b_e: float, b_a: float) -> Descent:
        """Lower L from a partition until no step does.

        Args:
            labels: 0 to K - 1, each in use.
            b_e: price of V_e, >= 0.
            b_a: price of V_a, >= 0.
        """
        walk = _Walk(self, labels, b_e, b_a, self.tol * max(self.one.cost(b_e, b_a), 1e-300))
        rounds, converged = 0, False
        while rounds < self.max_iter and not converged:
            rounds += 1
            walk.settle()
            changed = walk.merge()
            changed |= walk.split(least_members=2)
            converged = not (changed or walk.evict() or walk.split(least_members=1) or walk.move())
        if not converged:
            walk.settle()
        return Descent(walk.labels, walk.clusters, walk.history, rounds, converged)

    def splits(self, cluster: Cluster, b_e: float, b_a: float) -> list[tuple[Cluster, Cluster]]:
        """Splits of a cluster known so far, as coarse clusters; new ones are looked for once per ratio of the prices."""
        known = self._splits.setdefault(cluster.key, [])
        asked = cluster.key, round(float(np.arctan2(b_a, b_e)), 9)
        if len(cluster.members) > 1 and asked not in self._explored:
            self._explored.add(asked)
            z = self._sketch.joint(b_e, b_a)[cluster.members]
            proposals = split_proposals(z, self.views.weights[cluster.members], self._random_state)
            for part in proposals[:_SPLITS_JUDGED]:
                known.append(self._refined(cluster, part, b_e, b_a))
        return known

    def _refined(self, cluster: Cluster, part: np.ndarray, b_e: float, b_a: float) -> tuple[Cluster, Cluster]:
        """Two-means on the coarse views, while it lowers the cost."""
        members, views = cluster.members, self.coarse
        pair = views.cluster(members[part]), views.cluster(members[~part])
        for _ in range(_SPLIT_ROUNDS):
            first, second = (self._costs(half, members, b_e, b_a) for half in pair)
            part = first < second
            if part.all() or not part.any():
                break
            new = views.cluster(members[part]), views.cluster(members[~part])
            if partition_cost(new, b_e, b_a) >= partition_cost(pair, b_e, b_a):
                break
            pair = new
        return pair

    def _costs(self, cluster: Cluster, members: np.ndarray, b_e: float, b_a: float) -> np.ndarray:
        views = self.coarse
        d_e, d_a = views.semantic_distances(cluster, members), views.attribution_distances(cluster, members)
        return b_e * d_e + b_a * d_a - np.log(cluster.mass)


class _Walk:
    """A partition on its way down."""

    def __init__(self, search: Search, labels: np.ndarray, b_e: float, b_a: float, least: float):
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
            labels = np.where(stay, self.labels, cheapest)
            if np.array_equal(labels, self.labels):
                return
            clusters = self.views.clusters(np.unique(labels, return_inverse=True)[1])
            if self.history[-1] - self._cost(clusters) <= self.least:
                return
            self._take(clusters)

    def merge(self) -> bool:
        """Merge pairs, best first, until none gains."""
        merged = False
        while len(self.clusters) > 1:
            gains = [(self._gain(pair, [union]), pair, union) for pair, union in self._unions()]
            gain, pair, union = max(gains, key=lambda entry: entry[0], default=(0.0, (), None))
            if union is None or gain <= self.least:
                break
            self._replace(pair, [union])
            merged = True
        return merged

    def _unions(self) -> Iterator[tuple[tuple[Cluster, Cluster], Cluster]]:
        """The pairs most likely to gain from a merge, and what they merge into: the surest alone where one is sure."""
        sure, hoped = self._merge_changes()
        first, second = np.triu_indices(len(self.clusters), 1)
        sure, hoped = sure[first, second], hoped[first, second]
        order = np.argsort(sure, kind="stable")
        if not self._small:
            order = order[:1] if sure[order[0]] < -self.least else order[:_PAIRS_JUDGED]
        for at in order[hoped[order] < 0]:
            pair = self.clusters[first[at]], self.clusters[second[at]]
            members = np.sort(np.concatenate([pair[0].members, pair[1].members]))
            if sure[at] < -self.least or self._promising(pair, [members]):
                yield pair, self.views.cluster(members)

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
        for view, price in enumerate((self.b_e, self.b_a)):
            rise = np.full_like(saved, np.inf)
            rise[serving] = served[:, view] - np.array(own[view])
            exact = means[view]
            rise = rise * masses[:, None] / total if exact else rise
            rise = np.minimum(rise, rise.T)
            sure, hoped = sure + price * rise, hoped + price * rise * (1 if exact else self._hope)
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

        Rows of heavy tails leave one by one otherwise, each at the price of a new median of the rest.
        """
        gains = np.concatenate([self._lonely_gains(cluster) for cluster in self.clusters])
        items = np.concatenate([cluster.members for cluster in self.clusters])
        leaving = items[np.argsort(-gains, kind="stable")][: np.count_nonzero(gains > self.least)]
        while len(leaving):
            labels = self.labels.copy()
            labels[leaving] = len(self.clusters) + np.arange(len(leaving))
            parts = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.unique(labels, return_counts=True)[1])[:-1])
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
        left = _MOVE_ENTRIES
        for item, k in self._promising_moves():
            home = self.clusters[self.labels[item]]
            if len(home.members) == 1:
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

    def _promising_moves(self) -> Iterator[tuple[int, int | None]]:
        """Items and other clusters, those first that cost least more than staying; then items on their own."""
        costs = assignment_costs(self.views, self.clusters, self.b_e, self.b_a, every=self._small)
        items = np.arange(self.views.n)
        extra = costs - costs[items, self.labels][:, None]
        extra[items, self.labels] = np.inf
        nearest = np.argsort(extra, axis=1)[:, : min(_TARGETS_PER_MOVE, len(self.clusters) - 1)]
        pairs = [(extra[i, k], i, k) for i in items for k in nearest[i] if extra[i, k] < np.inf]
        alone = -costs[items, self.labels] - np.log(self.views.weights)
        pairs += [(alone[i], i, None) for i in items]
        for _, item, k in sorted(pairs, key=lambda entry: entry[0]):
            yield int(item), None if k is None else int(k)
