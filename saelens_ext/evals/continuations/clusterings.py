"""Does the joint objective find what single views do not: clusterings of one half, judged on the other.

Symbols
    beta, gamma  a cell: weight of distortion, and the semantic view's fraction of it
    L            objective of held-out rows in nats: mean of -log p of the cluster that a row is assigned to, plus
                 beta (gamma D_e / s_e + (1 - gamma) D_a / s_a)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import joblib
import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from saelens_ext import _checks
from saelens_ext.continuations.clustering.baselines import SingleView
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer
from saelens_ext.continuations.clustering.path import BETAS, GAMMAS
from saelens_ext.continuations.clustering.problem import Problem
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.evals.evidence import MIN_CLAIM_UNITS, Evidence, evidence_table
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.rate_distortion.objective import CDIST_METRICS
from saelens_ext.ops.resampling import wilson_interval
from saelens_ext.report.evidence_section import EvidenceSection, HeatMap

JOINT = "joint"
_METHODS = {
    JOINT: "Rate-distortion clustering of both views.",
    "semantic": "k-means of the embeddings alone, with the number of clusters whose rate comes nearest.",
    "attribution": "k-means of the signatures alone, matched in the same way.",
    "random": "The joint clusters' sizes with members drawn at random.",
    "length": "k-means of the number of tokens alone, matched in the same way as far as lengths differ.",
}
_TIE = 1e-9
FEWEST_ROWS = 4
"""Continuations on either side, at least: those that choose and those that judge."""


@dataclass(kw_only=True, eq=False)
class ClusteringEvidence(Evidence):
    """Clusterings of many prefixes' continuations; a unit is a prefix. ``cells`` has a row for each cell too."""

    kind: ClassVar[str] = "clusterings"
    title: ClassVar[str] = "Joint clustering"
    question: ClassVar[str] = (
        "Does clustering by meaning and mechanism together describe held-out continuations better than clusterings of "
        "one view with the same rate?"
    )
    unit: ClassVar[str] = "prefix"
    unit_text: ClassVar[str] = (
        "A unit is a prefix, whose figures are means over the cells of the grid. Centres, cluster weights and scales "
        "are those of one part of its continuations, figures are of the others, which all methods assign by the same "
        "rule: to the cluster that adds least to the objective."
    )
    metrics: ClassVar[Mapping[str, str]] = {
        "objective": "held-out objective in nats, lower is better",
        "rate": "held-out code length of the cluster in nats",
        "semantic_distortion": "held-out semantic distortion, scaled",
        "attribution_distortion": "held-out attribution distortion, scaled",
        "fitted_objective": "objective in nats of the rows that were clustered",
        "fitted_rate": "rate in nats of the rows that were clustered",
        "n_clusters": "clusters",
    }

    def comparisons(self, reference: str | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """Paired differences; ``note`` says where a method is one cluster for all, so that nothing is clustered; see
        :meth:`Evidence.comparisons`.
        """
        return noted(super().comparisons(reference, metric=metric), self.cells)

    def verdict(self, reference: str | None = None) -> str:
        """The comparisons, and which of them are with no clustering at all."""
        said, alone = super().verdict(reference), one_cluster_words(self.cells)
        what = "nothing is clustered: the difference says what clusters cost or gain, not which clustering is better"
        return f"{said}\nWhere a control is one cluster for all ({alone}), {what}." if alone else said

    def wins(self) -> pd.DataFrame:
        """By other method, the share of prefixes whose mean held-out L the joint clustering has lower, with Wilson's
        interval; a tie is no win. ``note`` as in :meth:`comparisons`.
        """
        table, rows = self.per_unit(), []
        for other in (name for name in table.columns if name != JOINT):
            both = table[[JOINT, other]].dropna()
            rows.append(win_shares(other, both[other] - both[JOINT], self.settings["confidence"]))
        found = pd.DataFrame(rows, columns=["other", "estimate", "low", "high", "n_units", "n_ties"])
        return noted(found, self.cells)

    def by_cell(self) -> pd.DataFrame:
        """One row per cell and method: means over prefixes of every metric."""
        table = self.cells.pivot_table(index=["gamma", "beta", "method"], columns="metric", values="value", sort=False)
        return table[[name for name in self.metrics if name in table.columns]].reset_index()

    def section(self) -> EvidenceSection:
        """As for all evidence, with the share of wins, the table over cells and a map of the margin."""
        found = super().section()
        by_cell, note = self.by_cell(), "Means over prefixes; lower is better for all but the rate and the clusters."
        wins = "Share of prefixes in which the joint clustering has the lower held-out objective; ties are no wins."
        more = evidence_table("Wins", self.wins(), wins), evidence_table("Every cell", by_cell, note)
        maps = {"tables": (*found.tables, *more), "heat_maps": (self._margins(by_cell),)}
        return EvidenceSection(**vars(found) | maps)

    def _margins(self, by_cell: pd.DataFrame) -> HeatMap:
        table = by_cell.pivot(index=["gamma", "beta"], columns="method", values="objective")
        margin = (table[["semantic", "attribution"]].min(axis=1) - table[JOINT]).unstack("beta")
        largest = float(np.nanmax(np.abs(margin.to_numpy()))) or 1.0
        return HeatMap(
            title="Held-out objective of the better single view less that of the joint clustering",
            row_label="gamma",
            column_label="beta",
            rows=tuple(f"{gamma:g}" for gamma in margin.index),
            columns=tuple(f"{beta:g}" for beta in margin.columns),
            values=tuple(map(tuple, margin.to_numpy().tolist())),
            low=-largest,
            high=largest,
            note="In nats, means over prefixes; above 0 the joint clustering describes held-out continuations better.",
        )


def one_cluster(cells: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """By control, in how many prefixes it is one cluster for all in a cell where the joint clustering has several, and
    of how many; those that are in any.
    """
    counts = cells[cells["metric"] == "n_clusters"]
    wide = counts.pivot_table(index=["prefix", "beta", "gamma"], columns="method", values="value")
    if JOINT not in wide.columns:
        return {}
    wide = wide[wide[JOINT] > 1]
    alone = (wide == 1).groupby("prefix").any()
    known = wide.notna().groupby("prefix").any().sum()
    return {str(name): (int(n), int(of)) for name, n, of in zip(alone, alone.sum(), known) if n}


def one_cluster_words(cells: pd.DataFrame) -> str:
    """The same in words: "length in 9 of 10 prefixes"; empty for none."""
    return ", ".join(f"{name} in {n} of {of} prefixes" for name, (n, of) in one_cluster(cells).items())


def noted(table: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Comparisons with a ``note`` on each that has a control which is one cluster for all in some prefixes."""
    alone = one_cluster(cells)
    sides = [name for name in ("method", "other") if name in table]
    notes = [
        "; ".join(
            f"{row[side]} is one cluster in {alone[row[side]][0]} of {alone[row[side]][1]} prefixes"
            for side in sides
            if row[side] in alone
        )
        for row in table.to_dict("records")
    ]
    return table.assign(note=notes) if alone else table


def win_shares(other: str, gains: pd.Series, confidence: float) -> dict[str, Any]:
    """In which share of prefixes the joint clusters gain on another method, with Wilson's interval; a tie is no win."""
    tied = gains.abs() <= _TIE
    found = wilson_interval(int(((gains > 0) & ~tied).sum()), len(gains), confidence=confidence)
    return {"other": other, **found._asdict(), "n_ties": int(tied.sum())}


@standard_modes()
def compare_clusterings(
    sets: Sequence[ContinuationSet],
    *,
    betas: Sequence[float | int] = BETAS,
    gammas: Sequence[float | int] = GAMMAS,
    scaling: str = "balanced",
    min_cluster_size: int = 1,
    held_out: float | int = 0.5,
    n_jobs: int | None = None,
    n_permutations: int = 10_000,
    confidence: float | int = 0.95,
    seed: int = 0,
) -> ClusteringEvidence:
    """Cluster a part of each prefix's continuations jointly and by each view alone, and judge on the rest.

    For every cell, k-means of each view and of the lengths are given the joint clustering's rate; random groups have
    its numbers of members, and its rate where continuations weigh the same. All partitions get centres, weights and
    scales from the rows that were clustered, and the held-out rows are assigned by one rule: to the cluster that adds
    least to the objective.

    Args:
        sets: with embeddings and signatures, of different prefixes, at least 6.
        betas: weights of distortion, above 0.
        gammas: fractions that the semantic view gets, in [0, 1].
        scaling: as for ``JointClusterer``.
        min_cluster_size: of the joint clustering alone, as for ``JointClusterer``; the baselines have no least size.
        held_out: fraction of a prefix's continuations to judge on, in (0, 1).
        n_jobs: prefixes at a time, as joblib counts.
        n_permutations: assignments of signs in the tests.
        confidence: of the intervals, in (0, 1).
        seed: of the halves, the starts, the baselines and the resampling.

    Raises:
        ValueError: fewer than 6 prefixes, one twice, fewer than 4 continuations on either side, a set without a view,
            or an option out of range.

    Source: arXiv 2606.08236, table 1, held out, with one scale and one assignment rule for all methods.
    """
    _checks.between(held_out, 0, 1, "held_out")
    check_prefixes([one.prefix for one in sets], "sets")
    for one in sets:
        one.both_views()
    halves = [_halves(one, float(held_out), np.random.default_rng([seed, number])) for number, one in enumerate(sets)]
    options = {"scaling": scaling, "min_cluster_size": min_cluster_size, "random_state": seed}
    jobs = [
        joblib.delayed(_judged)(one, *half, tuple(betas), tuple(gammas), options)
        for one, half in zip(sets, halves, strict=True)
    ]
    rows: Any = joblib.Parallel(n_jobs=n_jobs)(jobs)
    return ClusteringEvidence(
        cells=pd.DataFrame([row for part in rows for row in part]),
        kinds={name: "unsupervised" if name == JOINT else "control" for name in _METHODS},
        descriptions=dict(_METHODS),
        settings={
            "betas": list(betas), "gammas": list(gammas), "held_out": held_out, "n_prefixes": len(sets),
            "n_permutations": n_permutations, "confidence": confidence, "seed": seed,
            "scaling": scaling, "min_cluster_size": min_cluster_size,
        },
    )  # fmt: skip


def check_prefixes(prefixes: Sequence[str], name: str) -> None:
    """Raise ValueError for fewer prefixes than a claim needs, or one that is there twice."""
    if len(prefixes) < MIN_CLAIM_UNITS:
        raise ValueError(
            f"{name} must be of at least {MIN_CLAIM_UNITS} prefixes, got {len(prefixes)}: the unit is the prefix, and "
            "with fewer no p-value can fall below 0.05."
        )
    seen: set[str] = set()
    for prefix in prefixes:
        if prefix.strip().lower() in seen:
            raise ValueError(f"The prefix {prefix!r} is given twice; units must be different. Give each once.")
        seen.add(prefix.strip().lower())


def check_halves(n: int, held_out: float | int, what: str) -> int:
    """How many of n continuations are held out; ValueError where either side has fewer than `FEWEST_ROWS`."""
    n_out = round(n * held_out)
    if min(n_out, n - n_out) < FEWEST_ROWS:
        raise ValueError(
            f"{what} has {n} continuations: {n - n_out} to cluster and {n_out} to judge on, and either part needs "
            f"{FEWEST_ROWS}. Sample more, or choose held_out nearer to 0.5."
        )
    return n_out


def _halves(one: ContinuationSet, held_out: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    n_out = check_halves(len(one), held_out, repr(one.prompt))
    order = generator.permutation(len(one))
    return np.sort(order[n_out:]), np.sort(order[:n_out])


def _judged(
    one: ContinuationSet,
    chosen: np.ndarray,
    judged: np.ndarray,
    betas: Sequence[float],
    gammas: Sequence[float],
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """The rows of one prefix."""
    semantic, attribution = one.both_views()
    weights, lengths = one.weights.double().numpy(), one.lengths.double().numpy()[:, None]
    path = JointClusterer(**options).rate_distortion_path(
        semantic[chosen], attribution[chosen], betas, gammas, sample_weight=weights[chosen]
    )
    how: dict[str, Any] = {"sample_weight": weights[chosen], "random_state": options["random_state"]}
    views = {"semantic": semantic, "attribution": attribution, "length": lengths}
    single = {name: SingleView(view[chosen], **how) for name, view in views.items()}
    generator = np.random.default_rng(options["random_state"])
    held = semantic[judged], attribution[judged], weights[judged] / weights[judged].sum()
    rows = []
    for point in path.points:
        labels = {JOINT: point.labels, "random": generator.permutation(point.labels)}
        labels |= {name: view.with_rate(point.rate).labels for name, view in single.items()}
        for method in _METHODS:
            figures = _figures(path.problem, labels[method], point.beta, point.gamma, held)
            where = {"prefix": one.prefix, "method": method, "beta": point.beta, "gamma": point.gamma}
            rows += [{**where, "metric": metric, "value": value} for metric, value in figures.items()]
    return rows


def _figures(
    problem: Problem,
    labels: np.ndarray,
    beta: float,
    gamma: float,
    held: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> dict[str, float]:
    """What a partition of the rows that were clustered gives on those that were not."""
    semantic, attribution, weights = held
    views, clusters = problem.views, problem.views.clusters(labels)
    fitted = problem.place(clusters, beta, gamma)
    centers = [
        np.stack([center(cluster) for cluster in clusters])
        for center in (views.semantic_mean, views.attribution_center)
    ]
    d_e = cdist(semantic, centers[0], "sqeuclidean") / problem.semantic_scale
    d_a = cdist(attribution, centers[1], CDIST_METRICS[views.metric]) / problem.attribution_scale
    lengths = -np.log([cluster.mass for cluster in clusters])
    costs = lengths + beta * (gamma * d_e + (1 - gamma) * d_a)
    rows, nearest = np.arange(len(costs)), np.argmin(costs, axis=1)
    return {
        "objective": float(weights @ costs[rows, nearest]),
        "rate": float(weights @ lengths[nearest]),
        "semantic_distortion": float(weights @ d_e[rows, nearest]),
        "attribution_distortion": float(weights @ d_a[rows, nearest]),
        "fitted_objective": fitted.objective,
        "fitted_rate": fitted.rate,
        "n_clusters": float(len(clusters)),
    }
