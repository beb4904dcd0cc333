"""Descent of the rate-distortion objective: reassignment, merges, splits and moves of single items.

Symbols
    L         objective, in nats; see ``rate_distortion``
    b_e, b_a  weights of the two views' distortions, in nats per unit
    K         clusters now

A round reassigns until assignments are stable, merges pairs, best first, until none gains, splits every cluster whose
best split gains (L is a sum over clusters, so splits are independent of each other), and only where none of these
gained moves single items. Every step is judged by the exact L of its outcome and taken only if it lowers L; the descent
ends when no step does.

Where clusters must have a least number of members, steps that would leave fewer are not taken, and L is descended among
the partitions that are left.

What a split or a merge does to rate and distortions does not depend on these weights, so what was found for one pair
of weights is looked up for the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

from saelens_ext.ops.rate_distortion.objective import Cluster, PairedViews, assignment_costs, partition_cost
from saelens_ext.ops.rate_distortion.proposals import Sketch, sketch_partition, split_proposals
from saelens_ext.ops.rate_distortion.walk import Walk

# Splits in full width looked at per cluster, and rounds of two-means that refine each of them.
_SPLITS_JUDGED = 3
_SPLIT_ROUNDS = 4
_FEW_ITEMS = 32
_RANDOM_STARTS = 4
_EVEN_STARTS = 12


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
    """Descents over one set of items, sharing the clusters and splits that they find.

    Args:
        tol: a step must lower L by more than this fraction of the L of one cluster.
        min_members: fewest members of a cluster, where there is more than one.
        sketch: of the same views; made where it is not given.
    """

    def __init__(
        self,
        views: PairedViews,
        random_state: np.random.RandomState,
        *,
        max_iter: int = 100,
        tol: float = 1e-9,
        min_members: int = 1,
        sketch: Sketch | None = None,
    ):
        self.views = views
        self.max_iter = max_iter
        self.tol = tol
        self.min_members = min_members
        self._random_state = random_state
        self._sketch = Sketch(views, random_state) if sketch is None else sketch
        self.coarse = views.coarse()
        apart = self.coarse is not views
        settings = {"max_iter": max_iter, "tol": tol, "min_members": min_members}
        self._scout = Search(self.coarse, random_state, sketch=self._sketch, **settings) if apart else None
        # Splits are coarse clusters: those that the scout found serve in full as well.
        self._splits: dict[bytes, list[tuple[Cluster, Cluster]]] = self._scout._splits if self._scout else {}
        self._explored: set[tuple[bytes, float]] = self._scout._explored if self._scout else set()
        self.one = views.cluster(np.arange(views.n))
        # Partitions from which no step lowers L, with the weights of the views.
        self._ends: set[tuple[frozenset[bytes], float, float]] = set()

    def starts(self, b_e: float, b_a: float) -> list[Int[np.ndarray, " n"]]:
        """Partitions worth descending from: one cluster, two found in the sketch; for few items single ones and random
        ones.

        One of those from the sketch is made for doubled weights. It has more clusters than will stay, and merging them
        finds partitions to which no gaining split of one cluster leads.
        """
        n = self.views.n
        found = [self.one_cluster]
        for factor, k in ((1, 16), (2, 32)):
            z = self._sketch.joint(factor * b_e, factor * b_a)
            found.append(sketch_partition(z, self.views.weights, min(k, n), self._random_state))
        if 1 < n <= _FEW_ITEMS:
            found.append(np.arange(n))
            found += [self._random_labels(2 + turn % (n - 1)) for turn in range(_RANDOM_STARTS)]
            if self.min_members > 1:
                found += [
                    self._even_labels(2 + turn % max(1, n // self.min_members - 1)) for turn in range(_EVEN_STARTS)
                ]
        return found

    def allowed(self, labels: Int[np.ndarray, " n"], b_e: float, b_a: float) -> Int[np.ndarray, " n"]:
        """The partition itself, but that members of too small clusters go to their cheapest large one."""
        large = np.flatnonzero(np.bincount(labels) >= self.min_members)
        if len(large) == labels.max() + 1:
            return labels
        if not len(large):
            return self.one_cluster
        clusters = self.views.clusters(labels)
        costs = assignment_costs(self.views, [clusters[k] for k in large], b_e, b_a, every=True)
        moved = np.where(np.isin(labels, large), labels, large[np.argmin(costs, axis=1)])
        return np.unique(moved, return_inverse=True)[1]

    def _random_labels(self, k: int) -> np.ndarray:
        return np.unique(self._random_state.randint(k, size=self.views.n), return_inverse=True)[1]

    def _even_labels(self, k: int) -> np.ndarray:
        """At random, but with clusters of equal size: most others have some that are too small."""
        return self._random_state.permutation(np.arange(self.views.n) % k)

    @property
    def one_cluster(self) -> Int[np.ndarray, " n"]:
        """Labels of one cluster for all."""
        return np.zeros(self.views.n, dtype=np.intp)

    def best(self, starts: Sequence[Int[np.ndarray, " n"]], b_e: float, b_a: float) -> Descent:
        """The lowest end of descents from several starts; the first among equals.

        With many sources that are not sparse, descents run on the coarse views, and the best end of theirs is followed
        down in full, unless the first start or one cluster is lower in full.
        """
        starts = [self.allowed(start, b_e, b_a) for start in starts]
        distinct = {start.tobytes(): start for start in starts}
        if self._scout is None:
            return min((self.descend(start, b_e, b_a) for start in distinct.values()), key=lambda descent: descent.cost)
        candidates = [self._scout.best(starts, b_e, b_a).labels, starts[0], self.one_cluster]
        lowest = min(candidates, key=lambda labels: partition_cost(self.views.clusters(labels), b_e, b_a))
        return self.descend(lowest, b_e, b_a)

    def descend(self, labels: Int[np.ndarray, " n"], b_e: float, b_a: float) -> Descent:
        """Lower L from a partition (labels 0 to K - 1, each in use) until no step does; b_e, b_a >= 0."""
        walk = Walk(self, self.allowed(labels, b_e, b_a), b_e, b_a, self.tol * max(self.one.cost(b_e, b_a), 1e-300))
        rounds, converged = 0, False
        while rounds < self.max_iter and not converged:
            if converged := (walk.key, b_e, b_a) in self._ends:
                break
            rounds += 1
            walk.settle()
            changed = walk.merge()
            changed |= walk.split(least_members=max(2, self.min_members))
            if self.min_members == 1:
                changed = changed or walk.evict() or walk.split(least_members=1)
            converged = not (changed or walk.move() or (self.min_members > 1 and walk.swap()))
        if converged:
            self._ends.add((walk.key, b_e, b_a))
        else:
            walk.settle()
        return Descent(walk.labels, walk.clusters, walk.history, rounds, converged)

    def splits(self, cluster: Cluster, b_e: float, b_a: float) -> list[tuple[Cluster, Cluster]]:
        """Splits of a cluster known so far, as coarse clusters, looked for once per ratio of the weights."""
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
            there = self._costs(pair[0], members, part, b_e, b_a)
            before, part = part, there < self._costs(pair[1], members, ~part, b_e, b_a)
            if np.array_equal(part, before) or part.all() or not part.any():
                break
            new = views.cluster(members[part]), views.cluster(members[~part])
            if partition_cost(new, b_e, b_a) >= partition_cost(pair, b_e, b_a):
                break
            pair = new
        return pair

    def _costs(
        self, half: Cluster, members: np.ndarray, inside: np.ndarray, b_e: float, b_a: float
    ) -> Float64[np.ndarray, " m"]:
        """What members of a cluster cost in a part of it, of which some of them are."""
        views, others = self.coarse, members[~inside]
        costs = np.empty(len(members))
        costs[inside] = views.own_costs(half, b_e, b_a)
        d_e, d_a = views.semantic_distances(half, others), views.attribution_distances(half, others)
        costs[~inside] = b_e * d_e + b_a * d_a - np.log(half.mass)
        return costs
