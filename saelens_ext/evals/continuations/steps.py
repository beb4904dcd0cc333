"""Which earlier step of a chain of reasoning moves the candidates of a later one.

Candidates of step j are attributed to the whole prefix once; for every source step i those columns are kept that are
at its tokens, modes are made from them, and latents at these tokens are steered. A slope is the mean, over held-out
candidates, of the change of their mean demeaned logit per unit of strength along their own mode's direction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
from sae_lens import SAE

from saelens_ext import _checks, _files
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.step_tree import StepTree as StepTree
from saelens_ext.continuations.steps import sample_steps as sample_steps
from saelens_ext.continuations.subject import Dictionaries, Inputs, Model, Subject
from saelens_ext.evals.continuations import step_pairs as pairs
from saelens_ext.evals.evidence import Evidence, Failure, Pair, corrected, evidence_table
from saelens_ext.evals.over_units import OverUnits
from saelens_ext.evals.sweep_store import SweepStore
from saelens_ext.evals.verdicts import LEVEL
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.resampling import smallest_p
from saelens_ext.report.evidence_section import EvidenceSection, EvidenceTable, HeatMap

SOURCES = ("each_step", "prompt", "all")
MIN_PROBLEMS = 10
"""Pairs of steps with fewer problems are shown, and not tested."""
_PAIR = ["source", "target"]
_BY_PAIR = (pairs.ELSEWHERE, pairs.PLACE)


@dataclass(kw_only=True, eq=False)
class StepAudit(Evidence):
    """What steering at the tokens of earlier steps does to the candidates of later ones; a unit is a problem.

    ``cells`` has, for each problem and pair of source (0: the prompt) and target step, the slope along the directions
    from the source's tokens and from every control, the fraction of the attribution at these tokens, and the modes.
    """

    kind: ClassVar[str] = "steps"
    title: ClassVar[str] = "Steps of reasoning"
    question: ClassVar[str] = "Do the features at an earlier step move what the model says at a later one?"
    unit: ClassVar[str] = "problem"
    unit_text: ClassVar[str] = (
        "Problems. In a comparison each problem counts once, with the mean over the pairs of steps for which both "
        "methods have a value; held-out candidates are measured, on which no direction was chosen. A pair of steps is "
        f"tested where {MIN_PROBLEMS} problems have it."
    )
    metrics: ClassVar[dict[str, str]] = {
        "slope": "change of the mean demeaned logit per unit of strength, in logits",
        "attribution_share": "fraction of the absolute effect at these tokens",
        "n_modes": "modes",
        "stability": "adjusted Rand index of the modes of resamples",
    }
    chance: ClassVar[float | None] = 0.0
    other_bounds: ClassVar[dict[str, tuple[float, float]]] = {"attribution_share": (0.0, 1.0), "stability": (-1.0, 1.0)}

    candidates: list[dict[str, Any]] = field(default_factory=list)
    """Of every problem: number of steps, how it ended, and for each candidate its step, text, mean log-probability and
    whether it was committed."""

    def comparisons(self, reference: str | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """Differences between methods over problems, each from the pairs of steps that have a value of both; see
        :meth:`Evidence.comparisons`.

        What stands elsewhere or at a step's place belongs to other steps, so that over all steps it does as well as
        they do by construction: these controls are compared pair by pair, by :meth:`by_pair`.
        """
        return super().comparisons(reference, metric=metric)

    def _both(self, reference: str | None, metric: str) -> Iterator[Pair]:
        name = _checks.choice(metric, tuple(self.metrics), "metric")
        own = self.cells[self.cells["metric"] == name]
        wide = own.pivot_table(index=["problem", *_PAIR], columns="method", values="value", sort=True)
        methods = [one for one in self.kinds if one in wide.columns and one not in _BY_PAIR]
        for method, other in self._pairs(reference, methods):
            yield {}, method, other, wide[[method, other]].dropna().groupby(level="problem").mean()

    def by_pair(self, control: str | None = None) -> pd.DataFrame:
        """For each source and target: mean slope over problems, low, high, p, p_holm, n_problems, attribution_share.

        Holm's correction is over the pairs with at least 10 problems; others have no p-value.

        Args:
            control: a method whose slope is subtracted, problem by problem, such as "as many tokens elsewhere".

        Raises:
            ValueError: no such method.
        """
        return self._by(_PAIR, control)

    def by_source(self) -> pd.DataFrame:
        """The same by source alone: each problem counts once, with the mean over its targets."""
        return self._by(["source"])

    def by_distance(self) -> pd.DataFrame:
        """The same by the number of steps from source to target."""
        return self._by(["distance"])

    def _by(self, keys: list[str], control: str | None = None) -> pd.DataFrame:
        slopes = self.cells[self.cells["metric"] == "slope"]
        places = ["problem", *_PAIR, "distance"]
        wide = slopes.pivot_table(index=places, columns="method", values="value", sort=True)
        shares = self.cells[self.cells["metric"] == "attribution_share"]
        own = wide[pairs.OWN]
        if control is not None:
            own = own - wide[_checks.choice(control, tuple(map(str, wide.columns)), "control")]
        rows = []
        for key, part in cast(Any, own.dropna().rename("value").reset_index().groupby(keys)):
            values = part.groupby("problem")["value"].mean().to_numpy(dtype=np.float64)
            found = self._paired(values, np.zeros_like(values))
            share = shares[(shares[keys] == list(key)).all(axis=1)]["value"].mean()
            p = found.p if len(values) >= MIN_PROBLEMS else np.nan
            row = {"slope": found.difference, "low": found.low, "high": found.high, "p": p, "n_problems": len(values)}
            rows.append({**dict(zip(keys, key)), **row, "attribution_share": share})
        columns = [*keys, "slope", "low", "high", "p", "n_problems", "attribution_share"]
        table = corrected(pd.DataFrame(rows, columns=columns))
        if control is None:
            return table
        return table.rename(columns={"slope": "difference"}).drop(columns="attribution_share")

    def verdict(self, reference: str | None = None) -> str:
        """What the comparisons say, and of which pairs of steps a slope, or one beyond that of as many tokens
        elsewhere or at the same place, is shown.
        """
        said = [
            super().verdict(reference),
            self._pairs_shown(self.by_pair(), "slope", "a slope that can be told from 0"),
        ]
        for control in _BY_PAIR:
            if control in set(self.cells["method"]):
                words = f"a slope that can be told from that of {control}"
                said.append(self._pairs_shown(self.by_pair(control), "difference", words))
        return "\n".join(said)

    def _pairs_shown(self, table: pd.DataFrame, value: str, words: str) -> str:
        tested = table[table["p"].notna()]
        if tested.empty:
            most = int(table["n_problems"].max()) if len(table) else 0
            return f"No pair of steps has {MIN_PROBLEMS} problems for {words} (at most {most}), so none is tested."
        least = smallest_p(int(tested["n_problems"].max()), self.settings["n_permutations"], len(tested))
        if least >= LEVEL:
            return f"With so few problems none of {len(tested)} pairs of steps could be shown to have {words}."
        name = lambda source: f"step {source:g}" if source else "the prompt"  # noqa: E731
        shown = [
            f"{name(row['source'])} to step {row['target']:g} ({row[value]:+.3f})"
            for row in tested[tested["p_holm"] < LEVEL].to_dict("records")
        ]
        start = f"Of {len(tested)} pairs of steps tested one by one, {len(shown)} have {words}"
        return f"{start}{': ' if shown else ''}{', '.join(shown)}."

    def section(self) -> EvidenceSection:
        """What a page shows of this evidence."""
        made, note = super().section(), "slope: mean over problems; p_holm is corrected over the rows with a p-value."
        by_pair = self.by_pair()
        tables = [evidence_table("Pairs of steps", by_pair, f"Source 0 is the prompt. {note}")]
        for control in (name for name in _BY_PAIR if name in self.kinds):
            subtracted = f"Slope of the step's own tokens less that of {control}, problem by problem."
            tables.append(evidence_table(f"Pairs of steps, beside {control}", self.by_pair(control), subtracted))
        tables.append(evidence_table("By source", self.by_source(), note))
        tables.append(evidence_table("By distance", self.by_distance(), note))
        titles = {
            "slope": "Slope by source and target",
            "attribution_share": "Fraction of the attribution at the source's tokens",
        }
        maps = tuple(self._heat_map(by_pair, *one) for one in titles.items())
        forest = replace(made.forest, rows=tuple(row for row in made.forest.rows if row.label not in _BY_PAIR))
        return replace(made, forest=forest, tables=(*tables, *made.tables, *self._candidates()), heat_maps=maps)

    def _heat_map(self, table: pd.DataFrame, name: str, title: str) -> HeatMap:
        sources, targets = (sorted(set(map(int, table[one]))) for one in _PAIR)
        at = {(int(row["source"]), int(row["target"])): row for row in table.to_dict("records")}
        highest = float(np.nanmax(np.abs(table[name].to_numpy(dtype=np.float64)))) if len(table) else 0.0
        cell = lambda s, t: at.get((s, t), {})  # noqa: E731
        counted = lambda row: f"n = {row['n_problems']}" if row else ""  # noqa: E731
        return HeatMap(
            title=title,
            row_label="target step",
            column_label="source step",
            rows=tuple(map(str, targets)),
            columns=tuple("prompt" if s == 0 else str(s) for s in sources),
            values=tuple(tuple(cell(s, t).get(name) for s in sources) for t in targets),
            texts=tuple(tuple(counted(cell(s, t)) for s in sources) for t in targets),
            low=0.0,
            high=highest or 1.0,
            note=f"Each target with the steps before it, {self.metrics[name]}; n is the number of problems.",
        )

    def _candidates(self) -> list[EvidenceTable]:
        """A table of candidates for each problem, the committed ones marked."""
        tables = []
        for number, problem in enumerate(self.candidates):
            rows = pd.DataFrame(problem["candidates"])
            rows["committed"] = np.where(rows["committed"], "committed", "")
            note = f"{problem['n_steps']} steps, ended by {problem['ended_by']}. Problem: {problem['prompt'][:300]}"
            tables.append(evidence_table(f"Candidates of problem {number}", rows, note))
        return tables


@standard_modes()
def audit_steps(
    model: Model,
    trees: StepTree | Sequence[StepTree],
    dictionaries: Dictionaries,
    *,
    sources: str = "each_step",
    embedder: Any = None,
    audit: AuditConfig = AuditConfig(),
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    folder: str | Path | None = None,
    n_workers: int = 1,
    workers: str = "joblib",
    actor_options: dict[str, Any] | None = None,
    progress: bool = False,
) -> StepAudit:
    """Ask which earlier step moves the candidates of each later one.

    Embeddings are of the candidates, and so the same for every source; only the attribution and what is steered differ.
    A small model cannot reason: on one, this shows the structure of the method, and nothing about reasoning.

    Args:
        model: the model of the trees, or a function without arguments that loads it.
        trees: from ``sample_steps``, one for each problem, of two steps or more.
        dictionaries: SAEs or transcoders, as for ``audit_continuations``.
        sources: "each_step", every step before the target; "prompt", the prompt alone; "all", both.
        embedder: as for ``audit_continuations``.
        audit: how to embed, attribute, cluster and steer; what it says of sampling is not used.
        n_bootstrap: resamples of problems, for intervals.
        n_permutations: signs drawn for p-values.
        confidence: of the intervals, in (0, 1).
        folder: where every target step is kept when it is done; what is there already is not computed again, also where
            problems were added.
        n_workers: target steps at a time, each by a worker with a model of its own: ``model`` must then be a function,
            and ``folder``, if any, be on storage that all share. It is called here too, to tell what is measured, and
            that model is let go. With the same number of threads the results are the same to the bit.
        workers: "joblib", processes or what ``joblib.parallel_config`` names; or "ray", actors on the cluster that
            ``ray.init`` was called for, or on this machine.
        actor_options: Ray's resources of an actor, such as ``{"num_gpus": 1}``; one CPU by default.
        progress: show a progress bar.

    Raises:
        ValueError: no tree, or one of a single step; a problem twice; no pair of steps that could be measured; several
            workers and a model that is no function; or a folder of another audit.
        RuntimeError: a worker died; with a folder the same call goes on from what was finished.

    Source: arXiv 2606.08236, reasoning experiment, with controls of place, order and length.
    """
    given = [trees] if isinstance(trees, StepTree) else list(trees)
    _check_trees(given)
    _checks.choice(sources, SOURCES, "sources")
    places = [(number, j) for number, tree in enumerate(given) for j in range(2, len(tree) + 1)]
    each = OverUnits(
        inputs=Inputs(model=model, dictionaries=dictionaries, embedder=embedder),
        keys=[[f"step {j}", _asked(given[number], j)] for number, j in places],
        kind="step",
        n_workers=n_workers,
        workers=workers,
        actor_options=actor_options,
    )
    about = each.opened(lambda subject: subject.about)
    settings: dict[str, Any] = {"sources": sources, "audit": audit.identity, **about}
    store = SweepStore.at(folder, settings)
    cells: list[dict[str, Any]] = []
    failures: list[Failure] = []
    every = each.measured(partial(partial, _step, given, places, sources, audit), store, progress)
    for (number, j), found in zip(places, every, strict=True):
        cells += [{"problem": f"problem {number:03d}", "target": j, **cell} for cell in found["cells"]]
        failures += [Failure(method, f"problem {number}, {where}", why) for method, where, why in found["failures"]]
    own = [cell for cell in cells if cell["method"] == pairs.OWN and cell["metric"] == "slope"]
    if not own:
        raise ValueError(f"No pair of steps could be measured; the first failed so: {failures[0]}")
    present = {cell["method"] for cell in cells}
    kinds = {name: "unsupervised" if name == pairs.OWN else "control" for name in pairs.DESCRIPTIONS if name in present}
    settings |= {"n_bootstrap": n_bootstrap, "n_permutations": n_permutations, "confidence": confidence}
    return StepAudit(
        cells=pd.DataFrame(cells),
        kinds=kinds,
        descriptions={name: pairs.DESCRIPTIONS[name] for name in kinds},
        settings=_files.json_safe(settings | {"seed": audit.seed}),
        failures=tuple(failures),
        candidates=[_candidates(tree) for tree in given],
    )


def _check_trees(trees: Sequence[StepTree]) -> None:
    if not trees:
        raise ValueError("trees is empty; give at least one, from sample_steps.")
    for number, tree in enumerate(trees):
        if len(tree) < 2:
            raise ValueError(
                f"The chain of problem {number} has one step only ({tree.texts[0][:200]!r}), which no step precedes. "
                "Sample with a delimiter that the model writes more often, or leave it out."
            )
    if len({tuple(tree.prompt_ids) for tree in trees}) < len(trees):
        raise ValueError("Two trees have the same prompt; problems are the units of the tests, and must be different.")


def _asked(tree: StepTree, j: int) -> list[Any]:
    """What tells a target step from others: the prompt and the steps before it, and its candidates."""
    rows = tree.steps[j - 1]
    return [list(rows.prefix_ids), tree.spans[:j], [rows.ids_of(row) for row in range(len(rows))]]


def _step(
    given: Sequence[StepTree],
    places: Sequence[tuple[int, int]],
    sources: str,
    config: AuditConfig,
    subject: Subject,
    place: int,
) -> dict[str, Any]:
    number, j = places[place]
    return _target(subject.model, subject.saes, given[number], j, sources, subject.embedder, config)


def _target(
    model: HostModel, saes: list[SAE[Any]], tree: StepTree, j: int, sources: str, embedder: Any, config: AuditConfig
) -> dict[str, Any]:
    """Cells and failures of one target step, JSON-safe."""
    steps = {"each_step": range(1, j), "prompt": range(1), "all": range(j)}[sources]
    cells: list[dict[str, Any]] = []
    failures: list[tuple[str, str, str]] = []
    try:
        target = pairs.read_target(model, saes, tree, j, embedder, config)
    except ValueError as error:
        return {"cells": [], "failures": [("", f"step {j}", str(error))]}
    whole = None
    try:
        every = list(range(len(target.rows.sources or ())))
        whole = pairs.measure_columns(model, saes, target.rows, every, config)[pairs.OWN]
    except ValueError as error:
        failures.append((pairs.ALL, f"step {j}", str(error)))
    for i in steps:
        values, failed = pairs.measure_pair(model, saes, target, i, config)
        if whole is not None and np.isfinite(whole):
            values[pairs.ALL, "slope"] = whole
        where = {"source": i, "distance": j - i}
        cells += [{**where, "method": m, "metric": name, "value": value} for (m, name), value in values.items()]
        failures += [(method, f"step {i} to {j}", why) for method, why in failed.items()]
    return {"cells": cells, "failures": failures}


def _candidates(tree: StepTree) -> dict[str, Any]:
    table = tree.to_dataframe()[["step", "committed", "text", "mean_log_prob"]]
    about = {"prompt": tree.prompt, "n_steps": len(tree), "ended_by": tree.ended_by}
    return about | {"candidates": table.to_dict("records")}
