"""Testing clusters by intervention: does a cluster's direction move its members, and does that need the clustering?

A direction is chosen from one part of a cluster's members and tried on the rest, beside controls that differ from it
in one thing each (``methods``). What the tables say can be for or against the clusters; `Validation.claim`
words it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from sae_lens import SAE
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.embed import embed_visible
from saelens_ext.continuations.steering.generate import GenerationPlan
from saelens_ext.continuations.steering.latents import LatentScaler, Setting
from saelens_ext.continuations.steering.passes import MEASURES, SteeredPasses
from saelens_ext.continuations.steering.steer import sources_of_set
from saelens_ext.continuations.validation.controls import NothingToTest, Plan, make_plan, split_members
from saelens_ext.continuations.validation.generations import COLUMNS, Embed, generation_shares
from saelens_ext.continuations.validation.methods import EXTRA, METHODS
from saelens_ext.continuations.validation.options import ValidationOptions
from saelens_ext.continuations.validation.results import Validation
from saelens_ext.host.flat_sae import dictionaries_of
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes


@standard_modes()
def validate_clusters(
    model: HostModel,
    dictionaries: SAE[Any] | Sequence[SAE[Any]],
    continuations: ContinuationSet,
    clusters: Any,
    options: ValidationOptions = ValidationOptions(),
    *,
    partitions: Mapping[str, Sequence[int] | np.ndarray] | None = None,
    generate: int = 0,
    embed: Embed = embed_visible,
    batch_size: int = 32,
    progress: bool = False,
) -> Validation:
    """Steer held-out members of every cluster along its direction, and along those of the controls.

    Every cluster is split; directions are chosen from one side and effects measured on the other. Each measured member
    is steered by the direction that each method has for it, so methods are compared member by member. Which cluster a
    held-out member belongs to is taken from ``clusters`` as given, for the controls likewise.

    Args:
        model: any TransformerLens model, no SAE attached.
        dictionaries: those that the continuations were attributed with, in the same order.
        continuations: with embeddings, signatures and sources.
        clusters: a fitted ``JointClusterer`` (or another clusterer with ``labels_``), or labels ``(n,)``. Medoids use
            the weights and metrics of the clusterer; for others those of a default ``JointClusterer``.
        options: which directions to steer along, how far, and how to compare effects.
        partitions: labels ``(n,)`` of further partitions to compare with, by name; for example of a clusterer with
            gamma = 1. A row whose label is negative is in no cluster, and has no direction.
        generate: open-ended samples to draw under every direction of every method, at the largest strength, and without
            steering; none by default, since they take longer than all else.
        embed: what embeds generations; it must be what the continuations' own embeddings were made with.
        batch_size: rows per forward pass.
        progress: show a bar.

    Returns:
        The effects of all methods, with their tables.

    Raises:
        ValueError: a set without embeddings, signatures or sources; labels of another length; no cluster of two
            members; no latent to scale; an option out of range; or dictionaries other than those of the attribution.

    Source: arXiv 2606.08236, steering, with members held out, one source representation, and the controls its
    reviewers asked for.
    """
    saes = dictionaries_of(dictionaries)
    sources = sources_of_set(continuations)
    continuations.both_views()
    _checks.positive(batch_size, "batch_size")
    clusterer, labels = _clusterer_and_labels(clusters, len(continuations))
    others = _checked_partitions(partitions or {}, len(continuations))
    scaler = LatentScaler(model, saes, sources)
    generator = np.random.default_rng(options.seed)
    split = split_members(labels, options.held_out, options.max_rows, generator)
    plan = make_plan(continuations, clusterer, labels, split, others, options, generator)
    if not plan.of("joint"):
        remedy = "" if options.sign == "all" else ", or use sign='all'"
        raise NothingToTest(
            f"No cluster's direction has a latent to scale with sign={options.sign!r} among its {len(sources)} "
            f"sources. Attribute with dictionaries, and 'latent' among the kinds{remedy}."
        )
    passes = SteeredPasses(model, scaler, continuations, batch_size)
    effects = _Effects(passes, plan, {0.0, *map(float, options.strengths)}, progress)
    prefix = continuations.prefix
    generations = pd.DataFrame(columns=list(COLUMNS))
    if generate:
        drawn_like = GenerationPlan.like(continuations, generate)
        more = {"batch_size": batch_size, "progress": progress}
        generations = generation_shares(
            model, scaler, continuations, plan, effects.strongest, drawn_like, embed, **more
        )
    return Validation(
        generations=generations,
        members=effects.members(prefix),
        cells=effects.cells(prefix),
        directions=_directions(plan, prefix),
        settings=asdict(options)
        | {
            "strengths": list(effects.strengths),
            "specificity_strength": effects.strongest,
            "controls": list(options.controls),
        },
    )


class _Effects:
    """Measures what a plan asks for, each direction, strength and member once."""

    def __init__(self, passes: SteeredPasses, plan: Plan, strengths: Collection[float], progress: bool):
        self.strengths = tuple(sorted(strengths))
        self.strongest = self.strengths[-1] if self.strengths[-1] > 0 else self.strengths[0]
        self._plan, self._rows = plan, plan.split.measured.tolist()
        keys = [planned.direction.key for planned in plan.directions]
        # Directions that scale the same latents in the same ways are measured once.
        self._same = [keys.index(key) for key in keys]
        self._known = self._measure(passes, progress)

    def _measure(self, passes: SteeredPasses, progress: bool) -> dict[tuple[int, float, int], Tensor]:
        keys = {(0, 0.0, row) for row in self._rows}
        for method in self._plan.labels:
            keys |= {(self._of(method, row), s, row) for row in self._rows for s in self.strengths if s != 0}
        for i, planned in enumerate(self._plan.directions):
            if planned.method == "joint":
                keys |= {(self._same[i], self.strongest, row) for row in self._rows}
        ordered = sorted(key for key in keys if key[0] >= 0)
        pairs = list(dict.fromkeys(key[:2] for key in ordered))
        settings = [Setting(self._plan.directions[i].direction, s) for i, s in pairs]
        place = {pair: number for number, pair in enumerate(pairs)}
        values = passes.measure(settings, [(place[i, s], row) for i, s, row in ordered], progress=progress)
        return dict(zip(ordered, values))

    def _of(self, method: str, row: int) -> int:
        index = self._plan.index(method, int(self._plan.labels[method][row]))
        return self._same[index] if index >= 0 else -1

    def _change(self, direction: int, strength: float, row: int) -> list[float]:
        """Of each of `MEASURES`; NaN where there is no direction."""
        if direction < 0:
            return [float("nan")] * len(MEASURES)
        if strength == 0:
            return [0.0] * len(MEASURES)
        return (self._known[direction, strength, row] - self._known[0, 0.0, row]).tolist()

    def members(self, prefix: str) -> pd.DataFrame:
        """One row per method, measured member, strength and measure."""
        joint = self._plan.labels["joint"]
        found = [
            (prefix, method, row, int(labels[row]), int(joint[row]), strength, measure, change)
            for method, labels in self._plan.labels.items()
            for row in self._rows
            for strength in self.strengths
            for measure, change in zip(MEASURES, self._change(self._of(method, row), strength, row))
        ]
        names = ["prefix", "method", "row", "cluster", "joint_cluster", "strength", "measure", "change"]
        return pd.DataFrame(found, columns=names)

    def cells(self, prefix: str) -> pd.DataFrame:
        """The specificity matrix: one row per joint direction, joint cluster of the members, and measure."""
        joint, found = self._plan.labels["joint"], []
        for i, planned in enumerate(self._plan.directions):
            if planned.method != "joint":
                continue
            for name in dict.fromkeys(joint[self._rows].tolist()):
                rows = [row for row in self._rows if joint[row] == name]
                changes = np.array([self._change(self._same[i], self.strongest, row) for row in rows]).mean(axis=0)
                means = zip(MEASURES, changes.tolist())
                found += [(prefix, measure, planned.cluster, name, change, len(rows)) for measure, change in means]
        return pd.DataFrame(found, columns=["prefix", "measure", "direction", "cluster", "change", "n_members"])


def _directions(plan: Plan, prefix: str) -> pd.DataFrame:
    """One row per method and cluster: whose signature, from how many members, and what fraction of it was scaled."""
    found = [
        {
            "prefix": prefix,
            "method": planned.method,
            "cluster": planned.cluster,
            "row": planned.row,
            "n_choosing": planned.n_choosing,
            "n_latents": len(planned.direction),
            "steered_share": planned.direction.steered_share,
            "steerable_share": planned.direction.steerable_share,
            "columns": list(planned.direction.columns),
            "signs": list(planned.direction.signs),
        }
        for planned in plan.directions
    ]
    return pd.DataFrame(found)


# --- checks ---


def _clusterer_and_labels(clusters: Any, n: int) -> tuple[JointClusterer, np.ndarray]:
    is_estimator = hasattr(clusters, "fit")
    if is_estimator and not hasattr(clusters, "labels_"):
        raise ValueError(f"This {type(clusters).__name__} is not fitted; fit it to the continuations, or pass labels.")
    labels = _checked_labels(clusters.labels_ if is_estimator else clusters, n, "clusters")
    return (clusters if isinstance(clusters, JointClusterer) else JointClusterer()), labels


def _checked_labels(labels: Any, n: int, name: str) -> np.ndarray:
    entries = np.asarray(labels)
    if entries.shape != (n,) or not np.issubdtype(entries.dtype, np.integer):
        kind = f"{entries.dtype} of shape {entries.shape}"
        raise ValueError(f"{name} must give one whole number per continuation, shape ({n},), got {kind}.")
    return entries.astype(np.int64)


def _checked_partitions(partitions: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
    names = (*METHODS, *EXTRA)
    taken = [name for name in partitions if name in names]
    if taken:
        raise ValueError(f"partitions cannot be called {taken[0]!r}; the names {', '.join(names)} are taken.")
    return {name: _checked_labels(labels, n, f"partitions[{name!r}]") for name, labels in partitions.items()}
