"""Do the directions of joint clusters move continuations more than whatever could be mistaken for them: many prefixes.

The symbols are those of `cluster_cells`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd

from saelens_ext import _checks, _files
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.audit_stages.kept import Stages, own_folder
from saelens_ext.continuations.audit_stages.questions import Question, questions
from saelens_ext.continuations.clustering.problem import check_beta_and_gamma
from saelens_ext.continuations.steering.latents import SIGNS
from saelens_ext.continuations.subject import Dictionaries, Inputs, Model, Sampling, Subject, describe_embedder
from saelens_ext.continuations.validation.findings import OBJECTIVE_CONTROLS, joint_words, outcome
from saelens_ext.continuations.validation.methods import EXTRA, METHODS, NOTHING, method_meaning
from saelens_ext.continuations.validation.options import REPRESENTATIVES, checked_controls
from saelens_ext.evals import verdicts
from saelens_ext.evals.continuations.cluster_cells import SECOND, ClusterPlan, measure_prefix
from saelens_ext.evals.continuations.clusterings import (
    FEWEST_ROWS,
    JOINT,
    check_halves,
    check_prefixes,
    noted,
    one_cluster_words,
    win_shares,
)
from saelens_ext.evals.evidence import Evidence, Failure, Pair, corrected, evidence_table
from saelens_ext.evals.over_units import OverUnits
from saelens_ext.evals.sweep_store import SweepStore
from saelens_ext.host.chat_template import Prompt
from saelens_ext.host.sentence_model import load_sentence_model
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.resampling import smallest_p
from saelens_ext.report.evidence_section import EvidenceTable

_GROUPS = ("direction", "sign")
_KINDS = {JOINT: "unsupervised"}
_SECOND = "directions of joint clusters that were made with the embeddings of another sentence model"


@dataclass(kw_only=True, eq=False)
class ClusterEvidence(Evidence):
    """Effects of steering along clusters of many prefixes' continuations; a unit is a prefix.

    ``cells`` has a row for each cell (``beta``, ``gamma``), way to choose latents (``direction``, ``sign``), held-out
    continuation (``row``; -1 for values of the whole prefix), method and metric.
    """

    kind: ClassVar[str] = "clusters"
    title: ClassVar[str] = "Steering along joint clusters"
    question: ClassVar[str] = (
        "Do the directions of joint clusters move held-out continuations more than directions that could be mistaken "
        "for them?"
    )
    unit: ClassVar[str] = "prefix"
    unit_text: ClassVar[str] = (
        "A unit is a prefix: the mean over its held-out continuations, on which no direction was chosen, and over the "
        "cells of beta and gamma. Two methods are compared on the continuations for which both have a direction."
    )
    groups: ClassVar[tuple[str, ...]] = _GROUPS
    metrics: ClassVar[dict[str, str]] = {
        "slope": "change of the mean demeaned logit per unit of strength, in logits",
        "matched_slope": "change of the mean demeaned logit on continuations matched by length, in logits",
        "log_prob_slope": "change of the log-probability per token and unit of strength, in nats",
        "generation_change": "change of the fraction of open-ended samples nearest to the cluster steered along",
        "own_is_largest": "fraction of clusters that their own direction moves most",
        "n_clusters": "clusters, or groups of a control",
        "embedder_ari": "adjusted Rand index with the clusters under the second embedder",
        "fresh_ari": "adjusted Rand index, on fresh draws, with the clusters that these make by themselves",
    }
    chance: ClassVar[float | None] = 0.0
    other_bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "own_is_largest": (0.0, 1.0), "generation_change": (-1.0, 1.0), "embedder_ari": (-1.0, 1.0),
        "fresh_ari": (-1.0, 1.0),
    }  # fmt: skip

    def comparisons(self, reference: str | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """Differences over prefixes, each from the continuations that both methods have a direction for; ``note`` says
        where the groups of a control are one group; see :meth:`Evidence.comparisons`.
        """
        return noted(super().comparisons(reference, metric=metric), self.cells)

    def _both(self, reference: str | None, metric: str) -> Iterator[Pair]:
        """By group and pair of methods, the means over prefixes of what both have."""
        name = _checks.choice(metric, tuple(self.metrics), "metric")
        own = self.cells[self.cells["metric"] == name]
        for key, part in own.groupby(list(_GROUPS), sort=False):
            places = ["prefix", "beta", "gamma", "row"]
            wide = part.pivot_table(index=places, columns="method", values="value", sort=True)
            for method, other in self._pairs(reference, [one for one in self.kinds if one in wide.columns]):
                yield dict(zip(_GROUPS, key)), method, other, wide[[method, other]].dropna().groupby("prefix").mean()

    def wins(self, *, metric: str | None = None) -> pd.DataFrame:
        """By control, the share of prefixes that the joint clusters' own directions move more, with Wilson's interval;
        a tie is no win.
        """
        rows = [
            {**group, **win_shares(other, both[JOINT] - both[other], self.settings["confidence"])}
            for group, _, other, both in self._both(JOINT, metric or self.headline)
        ]
        found = pd.DataFrame(rows, columns=[*_GROUPS, "other", "estimate", "low", "high", "n_units", "n_ties"])
        return noted(found, self.cells)

    def by_cell(self) -> pd.DataFrame:
        """One row per cell, direction, sign and method: means of every metric over prefixes, each counting once."""
        keys = [*_GROUPS, "gamma", "beta", "method"]
        means = self.cells.groupby([*keys, "prefix", "metric"], sort=False)["value"].mean()
        table = means.groupby([*keys, "metric"], sort=False).mean().unstack("metric")
        return table[[name for name in self.metrics if name in table.columns]].reset_index()

    def verdict(self, reference: str | None = None) -> str:
        """The comparisons, whether the joint clustering is needed, and whether clusters and effects survive matched
        lengths, another embedder and fresh draws.
        """
        said = [super().verdict(reference)]
        compared = self.comparisons(JOINT)
        n_units = int(compared["n_units"].max())
        told = smallest_p(n_units, self.settings["n_permutations"], len(compared)) < verdicts.LEVEL
        several = compared[list(_GROUPS)].nunique().max() > 1
        for key, part in compared.groupby(list(_GROUPS), sort=False) if told else ():
            outcomes = {row.other: outcome(row, verdicts.LEVEL) for row in cast(Any, part.itertuples())}
            needed = [*OBJECTIVE_CONTROLS, *(one for one in self.settings["controls"] if one in outcomes)]
            where = f" ({verdicts.group_text(dict(zip(_GROUPS, key)))})" if several else ""
            said.append(f"The joint clustering{where} {joint_words(outcomes, needed)[1]}.")
        if alone := one_cluster_words(self.cells):
            said.append(f"Where a control is one group ({alone}), its direction is that of all continuations.")
        said.append(self._matched())
        for name in ("embedder_ari", "fresh_ari"):
            for row in self.summary(metric=name)[:1].to_dict("records"):
                said.append(
                    f"The {self.metrics[name]}: {row['estimate']:.2f} ({self.settings['confidence']:.0%} interval "
                    f"{row['low']:.2f} to {row['high']:.2f} over {row['n_units']} prefixes); 1 is the same clusters, 0 "
                    "chance."
                )
        return "\n".join(filter(None, said))

    def _matched(self) -> str:
        """The comparisons with what lengths could explain, on continuations matched by length."""
        name = "matched_slope"
        table = self.comparisons(JOINT, metric=name)
        table = table[table["other"].isin((NOTHING, "wrong_cluster", "length"))]
        if table.empty:
            return "No two continuations of different clusters have as many tokens, so lengths could not be matched."
        options = {"subjects": [JOINT], "groups": self.groups, "unit": self.unit, "metric": self.metrics[name]}
        return verdicts.verdict(corrected(table), self.summary(metric=name), settings=self.settings, **options)

    def _tables(self, *standard: EvidenceTable) -> tuple[EvidenceTable, ...]:
        """With the share of wins, the comparisons at matched lengths, and every cell."""
        wins = "Share of prefixes whose continuations the joint clusters' own directions move more; ties are no wins."
        matched = "Each continuation has a partner in another cluster with as many tokens."
        return (
            *standard,
            evidence_table("Wins", self.wins(), wins),
            evidence_table("Comparisons at matched lengths", self.comparisons(metric="matched_slope"), matched),
            evidence_table("Every cell", self.by_cell(), "Means over prefixes. No cell was chosen."),
        )


@standard_modes()
def evaluate_clusters(
    model: Model,
    prefixes: Sequence[Prompt],
    dictionaries: Dictionaries,
    *,
    embedder: Any = None,
    cells: Sequence[Sequence[float | int]] = ((2.0, 0.5),),
    directions: Sequence[str] = ("medoid",),
    signs: Sequence[str] = ("all",),
    generate: int = 0,
    controls: Sequence[str] = EXTRA,
    second_embedder: Any = None,
    fresh_draws: int = 0,
    audit: AuditConfig = AuditConfig(),
    sampler: Sampling = None,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    folder: str | Path | None = None,
    n_workers: int = 1,
    workers: str = "joblib",
    actor_options: dict[str, Any] | None = None,
    progress: bool = False,
) -> ClusterEvidence:
    """Cluster the continuations of many prefixes by both views, and steer along the clusters beside all controls.

    Each prefix is sampled, embedded and attributed once; each cell is clustered once. Directions are chosen from a part
    of each cluster's members and tried on the rest, every method on the same continuations.

    Args:
        model: as for ``audit_continuations``.
        prefixes: at least 6, all different: texts or conversations. Beside all controls a claim needs 10.
        dictionaries: as for ``audit_continuations``.
        embedder: likewise.
        cells: pairs of beta and gamma; none is chosen, and the verdict is on their mean. A cell that puts all
            continuations of a prefix into one cluster is left out there, as betas below 4/3 often do.
        directions: what stands for a cluster, each reported apart: "medoid", "center", "contrast".
        signs: which latents are scaled, each reported apart: "all", "positive", "negative".
        generate: open-ended samples under every direction of every method, at the largest strength; the dearest part.
        controls: beside those that every test has: tight groups of one view with the clusters' sizes, groups by
            length, the most active latents.
        second_embedder: another sentence-transformers model, its name or folder: the clusters made with it are
            compared with the first ones, and steered along as a further control.
        fresh_draws: further continuations to sample of each prefix, attributed to the same sources: do those clusters
            that they fall in agree with the ones that they make themselves? 0 draws none, or at least 8.
        audit: how to sample, embed, attribute and steer. What it says of the choice of beta and gamma, of direction,
            sign, open-ended samples and further controls is not used.
        sampler: as for ``audit_continuations``.
        n_bootstrap: resamples of prefixes, for intervals.
        n_permutations: signs drawn for p-values.
        confidence: of the intervals, in (0, 1).
        folder: where every prefix is kept when it is done, and its continuations; what is there is not computed again,
            also where prefixes were added.
        n_workers: prefixes at a time, each by a worker with a model of its own: ``model`` must then be a function, and
            ``folder``, if any, be on storage that all share. It is called here too, to tell what is measured, and that
            model is let go. With the same number of threads the results are the same to the bit.
        workers: "joblib", processes or what ``joblib.parallel_config`` names; or "ray", actors on the cluster that
            ``ray.init`` was called for, or on this machine.
        actor_options: Ray's resources of an actor, such as ``{"num_gpus": 1}``; one CPU by default.
        progress: show a progress bar.

    Raises:
        ValueError: fewer than 6 prefixes, one twice, fewer than 4 continuations on either side, an option out of
            range, no prefix that could be measured, a folder of other settings, or several workers and a model that is
            no function.
        RuntimeError: a worker died; with a folder the same call goes on from what was finished.

    Source: arXiv 2606.08236, steering, with the controls that its reviewers asked for.
    """
    given = questions(prefixes, None)
    check_prefixes([one.words for one in given], "prefixes")
    plan = ClusterPlan(
        cells=_checked_cells(cells),
        directions=tuple(_checks.choice(one, REPRESENTATIVES, "directions") for one in directions),
        signs=tuple(_checks.choice(one, SIGNS, "signs") for one in signs),
        generate=_count(generate, "generate", 1),
        controls=checked_controls(controls, "controls"),
        second_embedder=None if second_embedder is None else load_sentence_model(second_embedder),
        fresh_draws=_count(fresh_draws, "fresh_draws", 2 * FEWEST_ROWS),
        audit=audit,
    )
    if not plan.directions or not plan.signs:
        raise ValueError(f"directions and signs must not be empty, got {directions!r} and {signs!r}.")
    check_halves(audit.n, audit.held_out, f"n={audit.n}")
    each = OverUnits(
        inputs=Inputs(model=model, dictionaries=dictionaries, embedder=embedder, sampler=sampler),
        keys=[question.prompt for question in given],
        kind="prefix",
        n_workers=n_workers,
        workers=workers,
        actor_options=actor_options,
    )
    about = each.opened(lambda subject: subject.about)
    settings = asdict(replace(plan, second_embedder=None)) | {
        "second_embedder": describe_embedder(plan.second_embedder),
        "audit": audit.identity,
    }
    settings = _files.json_safe({**settings, **about})
    store = SweepStore.at(folder, settings)
    parts, failures = [], []
    kept = None if folder is None else Path(folder)
    every = each.measured(partial(partial, _prefix, given, plan, kept), store, progress)
    for question, found in zip(given, every, strict=True):
        parts.append(pd.DataFrame(found["cells"]))
        failures += [Failure(method, question.words, reason) for method, reason in found["failures"]]
    measured = pd.concat(parts, ignore_index=True)
    if measured.empty:
        raise ValueError(f"No prefix could be measured; the first failed so: {failures[0]}")
    present, described = set(measured["method"]), {SECOND: _SECOND, JOINT: method_meaning(JOINT)}
    names = [name for name in (*METHODS, *EXTRA, SECOND, NOTHING) if name in present]
    resampled = {"n_bootstrap": n_bootstrap, "n_permutations": n_permutations, "confidence": confidence}
    return ClusterEvidence(
        cells=measured,
        kinds={name: _KINDS.get(name, "control") for name in names},
        descriptions={name: f"{described.get(name) or method_meaning(name)}.".capitalize() for name in names},
        settings=settings | resampled | {"n_prefixes": len(given), "seed": audit.seed},
        failures=tuple(failures),
    )


def _prefix(
    given: Sequence[Question], plan: ClusterPlan, folder: Path | None, subject: Subject, number: int
) -> dict[str, Any]:
    return measure_prefix(subject, given[number], plan, Stages(own_folder(folder, given[number])))


def _checked_cells(cells: Sequence[Sequence[float | int]]) -> tuple[tuple[float, float], ...]:
    found = []
    for cell in _checks.listed(cells, "cells", "pair of beta and gamma"):
        if np.shape(cell) != (2,):
            raise ValueError(f"cells must be pairs of beta and gamma, such as ((1.0, 0.5),), got {cell!r}.")
        check_beta_and_gamma(*cell)
        found.append((float(cell[0]), float(cell[1])))
    if len(set(found)) < len(found):
        raise ValueError(f"cells must be different, got {list(cells)}.")
    return tuple(found)


def _count(value: int, name: str, least: int) -> int:
    """0, or a whole number of at least so many."""
    if value and _checks.positive(value, name) < least:
        raise ValueError(f"{name} must be 0, or at least {least}, got {value!r}.")
    return int(value)
