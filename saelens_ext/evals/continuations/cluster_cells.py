"""What steering along the clusters of one prefix does, cell by cell, beside all controls.

Symbols
    beta, gamma  a cell: weight of distortion, and the semantic view's fraction of it
    slope        of a held-out continuation: of the change of a measure over the strength, along the direction that a
                 method has for it
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.base import clone
from sklearn.metrics import adjusted_rand_score

from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.audit_stages.kept import Stages
from saelens_ext.continuations.audit_stages.questions import Question
from saelens_ext.continuations.audit_stages.stages import attributed, sampled
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.embed import embed_continuations, embed_visible, visible_rows
from saelens_ext.continuations.subject import Subject
from saelens_ext.continuations.validation.findings import MEASURE, STATISTIC
from saelens_ext.continuations.validation.further import LEFT_OUT
from saelens_ext.continuations.validation.methods import EXTRA, NOTHING, PARTITIONS
from saelens_ext.continuations.validation.results import Validation
from saelens_ext.continuations.validation.statistics import member_statistics
from saelens_ext.continuations.validation.validate import validate_clusters
from saelens_ext.evals.continuations.clusterings import FEWEST_ROWS, JOINT, check_halves

SECOND = "second_embedder"
# Controls that are groups of the continuations.
_GROUPINGS = (*PARTITIONS[1:-1], *EXTRA[:-1], SECOND)
NO_ROW = -1
"""In the place of a row: a value of the whole prefix."""
_MEASURES = {MEASURE: "slope", "mean_log_prob": "log_prob_slope"}


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """What is measured on every prefix."""

    cells: tuple[tuple[float, float], ...]
    directions: tuple[str, ...]
    signs: tuple[str, ...]
    generate: int
    controls: tuple[str, ...]
    second_embedder: Any
    fresh_draws: int
    audit: AuditConfig


def measure_prefix(subject: Subject, question: Question, plan: ClusterPlan, stages: Stages) -> dict[str, Any]:
    """Values of one prefix, as columns, and what failed on it, as pairs of a method and a reason; JSON-safe."""
    cells: list[dict[str, Any]] = []
    failures: list[tuple[str, str]] = []
    try:
        rows = attributed(subject, question, plan.audit, stages)
        check_halves(len(rows), plan.audit.held_out, f"{question.words!r}")
    except ValueError as error:
        return {"cells": {}, "failures": [("", str(error))]}
    second = fresh = None
    if plan.second_embedder is not None:
        second = _or_failed(SECOND, failures, _second, rows, plan)
    if plan.fresh_draws:
        fresh = _or_failed(JOINT, failures, _fresh, subject, question, rows, plan)
    for beta, gamma in plan.cells:
        try:
            found = _cell(subject, rows, second, fresh, beta, gamma, plan)
        except ValueError as error:
            failures.append(("", f"beta {beta:g}, gamma {gamma:g}: {error}"))
            continue
        cells += [{"beta": float(beta), "gamma": float(gamma), **one} for one in found]
    table = pd.DataFrame([{"prefix": rows.prefix, **one} for one in cells])
    return {"cells": table.to_dict("list"), "failures": failures}


def _or_failed(method: str, failures: list[tuple[str, str]], make: Any, *given: Any, **options: Any) -> Any:
    try:
        return make(*given, **options)
    except ValueError as error:
        failures.append((method, str(error)))
        return None


def _second(rows: ContinuationSet, plan: ClusterPlan) -> tuple[ContinuationSet, np.ndarray]:
    """The rows in which the second embedder sees text, with its embeddings, and which they are, bool ``(n,)``."""
    seen = visible_rows(rows, plan.second_embedder)
    check_halves(int(seen.sum()), plan.audit.held_out, f"What the second embedder sees of {rows.prompt!r}")
    how: dict[str, Any] = {"mode": plan.audit.embedding, **plan.audit.per_pass}
    embedded = embed_continuations(rows.select(seen), plan.second_embedder, **how)
    return embedded, seen.numpy()


def _fresh(subject: Subject, question: Question, rows: ContinuationSet, plan: ClusterPlan) -> ContinuationSet:
    """Other draws of the prefix, none of which is among the first, attributed to the sources of these."""
    config = plan.audit
    # The next seed is that of open-ended samples.
    drawn = sampled(subject, question, config, n=plan.fresh_draws, seed=config.seed + 2)
    known = {tuple(rows.ids_of(row)) for row in range(len(rows))}
    new = [row for row in range(len(drawn)) if tuple(drawn.ids_of(row)) not in known]
    how: dict[str, Any] = {"mode": config.embedding, **config.per_pass}
    embedded = embed_visible(drawn.select(new), subject.embedder, **how) if new else None
    if embedded is not None:
        found = attribute_continuations(
            subject.model, subject.saes, embedded, backend=config.backend, sources=rows.sources, **config.per_pass
        )
        usable = torch.as_tensor(found.both_views()[1].any(axis=1))
        if int(usable.sum()) >= 2 * FEWEST_ROWS:
            return found.select(usable)
    raise ValueError(
        f"of {len(drawn)} fresh draws fewer than {2 * FEWEST_ROWS} are new and have an effect of the first ones' "
        "sources; raise fresh_draws or the temperature"
    )


def _cell(
    subject: Subject,
    rows: ContinuationSet,
    second: tuple[ContinuationSet, np.ndarray] | None,
    fresh: ContinuationSet | None,
    beta: float,
    gamma: float,
    plan: ClusterPlan,
) -> list[dict[str, Any]]:
    """Values of one cell."""
    config = plan.audit
    fewest = config.smallest_mode(len(rows))
    clusterer = fit(JointClusterer(beta, gamma, min_cluster_size=fewest, random_state=config.seed), rows)
    if clusterer.n_clusters_ < 2:
        raise ValueError("all continuations are in one cluster; raise beta, or lower min_cluster_size")
    partitions: dict[str, np.ndarray] = {}
    whole = {"n_clusters": float(clusterer.n_clusters_)}
    if second is not None:
        embedded, seen = second
        partitions[SECOND] = np.full(len(rows), LEFT_OUT)
        partitions[SECOND][seen] = own = refit(clusterer, embedded).labels_
        whole["embedder_ari"] = float(adjusted_rand_score(clusterer.labels_[seen], own))
    if fresh is not None:
        whole["fresh_ari"] = agreement(clusterer, fresh)
    found = []
    for direction in plan.directions:
        for sign in plan.signs:
            how = {"direction": direction, "sign": sign}
            tested = validate_clusters(
                subject.model,
                subject.saes,
                rows,
                clusterer,
                config.validation_options(controls=plan.controls, **how),
                partitions=partitions,
                generate=plan.generate,
                embed=partial(embed_visible, embedder=subject.embedder, mode=config.embedding, **config.per_pass),
                **config.per_pass,
            )
            values = [*_of_members(tested, rows, config.seed), *_of_prefix(tested, whole)]
            found += [{**how, **one} for one in values if np.isfinite(one["value"])]
    return found


def fit(clusterer: JointClusterer, rows: ContinuationSet) -> JointClusterer:
    """A clusterer fitted to both views of a set."""
    return clusterer.fit(*rows.both_views(), sample_weight=rows.weights.double().numpy())


def refit(clusterer: JointClusterer, rows: ContinuationSet) -> JointClusterer:
    """A clusterer of the same parameters, fitted to another set."""
    other: Any = clone(clusterer)
    return fit(other, rows)


def agreement(clusterer: JointClusterer, fresh: ContinuationSet) -> float:
    """Adjusted Rand index of the clusters that other continuations fall in, and of the clusters that they make."""
    own = refit(clusterer, fresh).labels_
    return float(adjusted_rand_score(clusterer.predict(*fresh.both_views()), own))


def _of_members(tested: Validation, rows: ContinuationSet, seed: int) -> list[dict[str, Any]]:
    """Slopes of held-out continuations, all of them and those that are matched by length."""
    table = member_statistics(tested.members[tested.members["measure"].isin(list(_MEASURES))])
    own = table[table["method"] == JOINT].drop_duplicates("row")
    order = own["row"].to_numpy(dtype=np.int64)
    matched = matched_by_length(own["joint_cluster"].to_numpy(), rows.lengths.numpy()[order], seed)
    paired, found = set(order[matched].tolist()), []
    for line in table.to_dict("records"):
        row, metric = int(line["row"]), _MEASURES[line["measure"]]
        for method, value in [(line["method"], float(line[STATISTIC]))] + [(NOTHING, 0.0)] * (line["method"] == JOINT):
            found.append({"row": row, "method": method, "metric": metric, "value": value})
            if metric == "slope" and row in paired:
                found.append({"row": row, "method": method, "metric": "matched_slope", "value": value})
    return found


def matched_by_length(labels: np.ndarray, lengths: np.ndarray, seed: int = 0) -> np.ndarray:
    """Which rows can be paired one to one with a row of another cluster and of the same length: bool ``(n,)``.

    As many as can be: of the rows of one length, the two clusters that have most left give one each, until one cluster
    alone has any. Which rows of a cluster those are is drawn.
    """
    generator = np.random.default_rng(seed)
    found = np.zeros(len(labels), dtype=bool)
    for length in np.unique(lengths):
        alike = generator.permutation(np.flatnonzero(lengths == length))
        waiting = [alike[labels[alike] == name].tolist() for name in np.unique(labels[alike])]
        while len(waiting := sorted(filter(None, waiting), key=len)) > 1:
            found[[waiting[-1].pop(), waiting[-2].pop()]] = True
    return found


def _of_prefix(tested: Validation, whole: Mapping[str, float]) -> list[dict[str, Any]]:
    """Values that single continuations do not have."""
    specific: Any = tested.specificity_summary().set_index("measure").loc[MEASURE]
    groups = tested.directions.groupby("method")["cluster"].nunique()
    values = {(name, "n_clusters"): float(groups[name]) for name in _GROUPINGS if name in groups}
    values |= {(JOINT, name): value for name, value in whole.items()}
    values[JOINT, "own_is_largest"] = float(specific["own_is_largest_of_cluster"])
    if not tested.generations.empty:
        shares = tested.generations
        change = (shares["share"] - shares["unsteered"]).groupby(shares["method"]).mean()
        values |= {(str(method), "generation_change"): float(value) for method, value in change.items()}
        values[NOTHING, "generation_change"] = 0.0
    return [{"row": NO_ROW, "method": m, "metric": name, "value": value} for (m, name), value in values.items()]
