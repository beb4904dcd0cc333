"""Which direction each method gives each member: the clusters' own, and those of the controls (``methods``)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from saelens_ext.continuations.clustering.baselines import single_view_kmeans
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.source_table import SourceTable
from saelens_ext.continuations.steering.latents import SteeringDirection, direction_of, largest_latents
from saelens_ext.continuations.steering.steer import sources_of_set
from saelens_ext.continuations.validation.further import LEFT_OUT, further_partitions
from saelens_ext.continuations.validation.methods import SUBSTITUTES
from saelens_ext.continuations.validation.options import ValidationOptions
from saelens_ext.ops.weighted_median import weighted_median

MOST_ACTIVE = "top_activation"

_ALIKE = 5
"""How many latents of nearest activation a random one is drawn from."""


class NothingToTest(ValueError):
    """Clusters that cannot be tested by steering: too few members, or directions without a latent."""


@dataclass(frozen=True)
class Split:
    """Members that choose directions, and members on whom effects are measured; no row is in both."""

    choosing: np.ndarray
    measured: np.ndarray


def split_members(labels: np.ndarray, held_out: float | int, max_rows: int, generator: np.random.Generator) -> Split:
    """Split every cluster, so that of two members or more at least one is on either side.

    Args:
        labels: clusters, ``(n,)``.
        held_out: fraction of a cluster to measure on, in (0, 1).
        max_rows: measured members at most, one from each cluster in rotation.

    Raises:
        ValueError: no cluster has two members.
    """
    choosing, waiting = [], []
    for name in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == name))
        n_out = min(max(round(len(rows) * held_out), 1), len(rows) - 1)
        waiting.append(rows[:n_out].tolist())
        choosing += rows[n_out:].tolist()
    if not any(waiting):
        raise NothingToTest(
            f"None of the {len(waiting)} clusters has two members, one to choose a direction and one to measure on. "
            "Use fewer clusters (a lower beta) or more continuations."
        )
    rotation = [row for i in range(max(map(len, waiting))) for rows in waiting for row in rows[i : i + 1]]
    return Split(np.array(sorted(choosing)), np.array(sorted(rotation[:max_rows])))


class Representatives:
    """The direction that stands for some members: one rule for all methods, read off choosing members alone.

    Distances are those of ``clusterer``, at the scales of the choosing members (``choosing``: rows, ascending).
    ``"medoid"`` takes the signature of the member with the least weighted mean distance to the others, ``"center"`` the
    weighted median of signatures per source, ``"contrast"`` the medoid's signature minus the median over all choosing.
    """

    def __init__(self, continuations: ContinuationSet, clusterer: JointClusterer, choosing: np.ndarray, kind: str):
        semantic, self._signatures = continuations.both_views()
        self._weights, self._choosing, self._kind = continuations.weights.numpy(), choosing, kind
        self._problem = None
        if kind != "center" and len(choosing) > 1:
            views = semantic[choosing], self._signatures[choosing]
            self._problem = clusterer.problem(*views, sample_weight=self._weights[choosing], reset=False)
            self._view_weights = self._problem.weights_of_views(clusterer.beta, clusterer.gamma)
        self._origin = self._center(choosing) if kind == "contrast" else np.zeros(self._signatures.shape[1])

    def signature(self, row: int) -> np.ndarray:
        """The direction of one member, ``(m,)``."""
        return self._signatures[row] - self._origin

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """The direction of some members ``(m,)``, and the row that it is the signature of (-1: of none)."""
        if self._kind == "center":
            return self._center(rows), -1
        row = int(rows[0])
        if self._problem is not None:
            cluster = self._problem.views.cluster(np.searchsorted(self._choosing, rows))
            row = int(self._choosing[self._problem.medoid(cluster, *self._view_weights)])
        return self.signature(row), row

    def _center(self, rows: np.ndarray) -> np.ndarray:
        return weighted_median(self._signatures[rows].T, self._weights[rows])


@dataclass(frozen=True)
class PlannedDirection:
    """A direction, and where it comes from."""

    method: str
    cluster: int
    """Of that method's partition; for the substitutes, the joint cluster whose members it is tried on."""
    row: int
    """Whose signature it is; -1 for none."""
    n_choosing: int
    """Members that it was chosen from."""
    direction: SteeringDirection


@dataclass
class Plan:
    """What is to be measured."""

    split: Split
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """For each method the cluster of every row, ``(n,)``."""
    directions: list[PlannedDirection] = field(default_factory=list)

    def index(self, method: str, cluster: int) -> int:
        """Which direction a method has for a cluster; -1 if none."""
        keys = [(planned.method, planned.cluster) for planned in self.directions]
        return keys.index((method, cluster)) if (method, cluster) in keys else -1

    def of(self, method: str) -> list[PlannedDirection]:
        """The directions of a method."""
        return [planned for planned in self.directions if planned.method == method]


def make_plan(
    continuations: ContinuationSet,
    clusterer: JointClusterer,
    labels: np.ndarray,
    split: Split,
    partitions: Mapping[str, Sequence[int] | np.ndarray],
    options: ValidationOptions,
    generator: np.random.Generator,
) -> Plan:
    """Directions of all methods: of the clusters under test ``labels`` ``(n,)``, and of further partitions by name.

    A cluster none of whose choosing members has a latent to scale, or that has no choosing member, gets no direction.
    """
    plan = Plan(split)
    plan.labels = {"joint": labels} | control_partitions(continuations, labels, generator)
    plan.labels |= further_partitions(continuations, labels, options.controls, options.seed)
    plan.labels |= {name: np.asarray(given) for name, given in partitions.items()}
    chooser = _Chooser(sources_of_set(continuations), options.top, options.sign)
    representatives = Representatives(continuations, clusterer, split.choosing, options.direction)
    for method, partition in plan.labels.items():
        for name in np.unique(partition):
            if name <= LEFT_OUT and method != "joint":
                continue
            rows = split.choosing[partition[split.choosing] == name]
            if len(rows):
                weights, row = representatives.of(rows)
                plan.directions += chooser.planned(method, int(name), row, len(rows), weights)
    plan.labels |= dict.fromkeys(SUBSTITUTES, labels)
    _add_substitutes(plan, representatives, chooser, generator)
    if MOST_ACTIVE in options.controls:
        plan.labels[MOST_ACTIVE] = labels
        for planned in plan.of("joint"):
            weights, _ = representatives.of(split.choosing[labels[split.choosing] == planned.cluster])
            plan.directions += chooser.most_active(planned, weights)
    return plan


def control_partitions(
    continuations: ContinuationSet, labels: np.ndarray, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """The partitions that the clusters are compared with, of as many clusters."""
    k, weights = len(np.unique(labels)), continuations.weights.numpy()
    partitions = {}
    for name, view in zip(("semantic", "attribution"), continuations.both_views()):
        seed = int(generator.integers(2**31))
        partitions[name] = single_view_kmeans(view, n_clusters=k, sample_weight=weights, random_state=seed).labels
    return partitions | {"random_partition": generator.permutation(labels), "global": np.zeros_like(labels)}


def _add_substitutes(
    plan: Plan, representatives: Representatives, chooser: "_Chooser", generator: np.random.Generator
) -> None:
    own = plan.of("joint")
    order = generator.permutation(len(own))
    for i, planned in enumerate(own):
        rows = plan.split.choosing[plan.labels["joint"][plan.split.choosing] == planned.cluster]
        others = rows[rows != planned.row] if len(rows) > 1 else rows
        row = int(generator.choice(others))
        plan.directions += chooser.planned("single_member", planned.cluster, row, 1, representatives.signature(row))
        if len(own) > 1:
            # One step along a random circle of all clusters, so that none gets its own and each is used once.
            wrong = own[order[(int(np.flatnonzero(order == i)[0]) + 1) % len(own)]]
            plan.directions.append(replace(wrong, method="wrong_cluster", cluster=planned.cluster))
        random = chooser.alike(planned.direction, generator)
        if random is not None:
            plan.directions.append(PlannedDirection("random_features", planned.cluster, -1, 0, random))


class _Chooser:
    """From a direction's weights to the latents that are scaled."""

    def __init__(self, sources: SourceTable, top: int, sign: str):
        self._sources, self._top, self._sign = sources, top, sign
        self._hooks, self._positions = np.array(sources.hooks), np.array(sources.positions)
        self._activations = np.abs(np.array(sources.activations))
        # Of given sources some may be inactive here: to scale them does nothing.
        self._is_active_latent = np.array([kind == "latent" for kind in sources.kinds]) & (self._activations > 0)

    def planned(
        self, method: str, cluster: int, row: int, n_choosing: int, weights: np.ndarray
    ) -> list[PlannedDirection]:
        """The direction, if there is a latent to scale."""
        entries = torch.as_tensor(weights, dtype=torch.float64)
        columns = largest_latents(self._sources, entries, self._top, self._sign)
        if not columns:
            return []
        return [PlannedDirection(method, cluster, row, n_choosing, direction_of(self._sources, entries, columns))]

    def most_active(self, own: PlannedDirection, weights: np.ndarray) -> list[PlannedDirection]:
        """The most active latents in a cluster's direction, in place of those of largest weight."""
        active = torch.as_tensor(self._activations * np.sign(weights), dtype=torch.float64)
        columns = largest_latents(self._sources, active, self._top, self._sign)
        if not columns:
            return []
        entries = torch.as_tensor(weights, dtype=torch.float64)
        return [replace(own, method=MOST_ACTIVE, direction=direction_of(self._sources, entries, columns))]

    def alike(self, direction: SteeringDirection, generator: np.random.Generator) -> SteeringDirection | None:
        """Random latents in the places of a direction's, with its weights; None where there are not enough others."""
        taken, columns = set(direction.columns), []
        for column in direction.columns:
            free = self._is_active_latent & ~np.isin(np.arange(len(self._activations)), list(taken))
            same_hook = free & (self._hooks == self._hooks[column])
            same_place = same_hook & (self._positions == self._positions[column])
            pool = next((np.flatnonzero(p) for p in (same_place, same_hook, free) if p.any()), None)
            if pool is None:
                return None
            distance = np.abs(np.log(self._activations[pool] / self._activations[column]))
            columns.append(int(generator.choice(pool[np.argsort(distance, kind="stable")[:_ALIKE]])))
            taken.add(columns[-1])
        weights = torch.zeros(len(self._sources), dtype=torch.float64)
        weights[columns] = torch.tensor(direction.weights, dtype=torch.float64)
        # The weights are those of other latents, so a fraction of them has no meaning.
        return replace(direction_of(self._sources, weights, columns), steered_share=math.nan, steerable_share=math.nan)
