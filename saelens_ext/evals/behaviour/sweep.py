"""Localisation and ablation over resolutions and orders of the stream: every cell is shown, and none is picked.

Symbols
    cell  a percentile and a seed, which orders the prompts that the partition is built from
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import joblib
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saelens_ext import _checks, _files
from saelens_ext.activations.matrix_stream import MatrixStream
from saelens_ext.concepts.token_activations import read_texts
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partitions
from saelens_ext.evals.behaviour.ablation import exact_p_values, unit_name
from saelens_ext.evals.behaviour.behaviour import PARTS, OpeningOdds, PromptSplit
from saelens_ext.evals.behaviour.conditions import BASES, NOTHING, directions_of, matched_region
from saelens_ext.evals.behaviour.localisation import check_both_shown, localise_read
from saelens_ext.evals.behaviour.passes import Asking, Condition, Verdict, given_verdicts
from saelens_ext.evals.evidence import Evidence, corrected, evidence_table
from saelens_ext.evals.sweep_store import SweepStore
from saelens_ext.evals.verdicts import LEVEL
from saelens_ext.host.models import HostModel, resolve_hook
from saelens_ext.host.weights_fingerprint import identify_model
from saelens_ext.ops.leader_clustering import LeaderClustering
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.resampling import Interval, wilson_interval
from saelens_ext.report.evidence_section import EvidenceSection, HeatMap
from saelens_ext.steering.behaviour import Behaviour
from saelens_ext.workers.spread import IN_FOLDER, WORKERS, Job, spread

COLLAPSE = -0.5
"""A cell counts as collapsed where the rate changes by this or less."""
_GROUP = 5
"""Cells that are asked together before they are written."""
_GRID = ["percentile", "seed", "n_regions", "region", "members", "rate", "p", "p_holm", "matched_region"]


@dataclass(kw_only=True, eq=False)
class SweepEvidence(Evidence):
    """What ablating the best candidate does, for every percentile and seed; a unit is a prompt.

    ``cells`` has the verdict on every test prompt without ablation, under each cell's best candidate, and under the
    region that is matched to it.
    """

    kind: ClassVar[str] = "behaviour_sweep"
    title: ClassVar[str] = "A behaviour over resolutions and orders"
    question: ClassVar[str] = (
        "Does the behaviour gather in one region whatever the resolution of the partition and the order of its stream?"
    )
    unit: ClassVar[str] = "prompt"
    unit_text: ClassVar[str] = (
        "Prompts that took no part in building or choosing. All cells share prompts and activations, and differ in the "
        "percentile and the order of the stream; each p-value flips the signs of single prompts, and Holm's correction "
        "is over all cells. The interval of the fraction of cells is Wilson's, as if they were independent."
    )
    metrics: ClassVar[dict[str, str]] = {"shown": "rate of the behaviour on test prompts"}
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    grid: list[dict[str, Any]] = field(default_factory=list)
    """Each cell's percentile, seed, n_regions, and of its best candidate region, members, rate, p, p_holm,
    matched_region; None without a candidate."""

    def table(self) -> pd.DataFrame:
        """Every cell: what was localised, and change, low, high, p, p_holm and matched_change of the rate."""
        found = self.comparisons()
        against = found[found["other"] == NOTHING].set_index("method")
        rows = []
        for cell in self.grid:
            name = cell_name(cell["percentile"], cell["seed"])
            row = {"change": np.nan, "low": np.nan, "high": np.nan, "ablation_p": np.nan, "ablation_p_holm": np.nan}
            if name in against.index:
                values: Any = against.loc[name]
                row = dict(zip(row, (values[each] for each in ("difference", "low", "high", "p", "p_holm"))))
            other = against["difference"].get(matched_name(name), np.nan)
            rows.append({**{key: cell[key] for key in _GRID}, **row, "matched_change": other})
        return pd.DataFrame(rows)

    def collapsed(self) -> Interval:
        """The fraction of cells whose rate changes by -.5 or less; one without a candidate is not among them."""
        changes = self.table()["change"]
        return wilson_interval(int((changes <= COLLAPSE).sum()), len(changes), confidence=self.settings["confidence"])

    def comparisons(self, reference: str | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """Each cell, and each matched region, against no ablation; see :meth:`Evidence.comparisons`."""
        found = super().comparisons(NOTHING if reference is None else reference, metric=metric)
        if reference is None:  # a fall is negative, as elsewhere
            sides = {"method": "other", "other": "method", "low": "high", "high": "low"}
            found = found.rename(columns=sides)
            found[["difference", "low", "high"]] = 0.0 - found[["difference", "low", "high"]]
            found = found[["method", "other", "difference", "low", "high", "p", "n_units", "n_undefined"]]
        exact = found.assign(p=exact_p_values(found, self.per_unit(metric)))
        return corrected(exact, exact["method"].map(self.kinds))  # the cells, and the controls apart

    def verdict(self, reference: str | None = None) -> str:
        """What the cells say together; no single one is picked."""
        table, share = self.table(), self.collapsed()
        known = table["change"].dropna()
        base = self.per_unit()[NOTHING].mean()
        start = f"Without ablation {base:.0%} of {len(self.per_unit())} test prompts show the behaviour."
        fraction = (
            f"In {round(share.estimate * share.n_units)} of {share.n_units} cells ablating the best candidate changes "
            f"the rate by {COLLAPSE:g} or less ({share.estimate:.0%}, {self.settings['confidence']:.0%} interval "
            f"{share.low:.0%} to {share.high:.0%})"
        )
        claims = int(((table["ablation_p_holm"] < LEVEL) & (table["change"] < 0)).sum())
        parts = [start, fraction + f"; in {claims} it falls with a corrected p-value below {LEVEL:g}."]
        if len(known):
            parts.append(f"Changes range from {known.min():+.2f} to {known.max():+.2f}, median {known.median():+.2f}.")
        if len(known) < len(table):
            parts.append(f"{len(table) - len(known)} cells have no candidate.")
        matched = table["matched_change"].dropna()
        if len(matched):
            parts.append(
                f"Matched regions without the behaviour change it by {matched.min():+.2f} to {matched.max():+.2f}."
            )
        return " ".join(parts)

    def section(self) -> EvidenceSection:
        """What a page shows of this evidence."""
        made = super().section()
        rows = tuple(row for row in made.forest.rows if row.label == NOTHING or row.kind == "unsupervised")
        note = "p and p_holm are of the localisation, ablation_p and ablation_p_holm of the change of the rate."
        return replace(
            made,
            forest=replace(made.forest, rows=rows),
            tables=(evidence_table("Cells", self.table(), note), *made.tables),
            heat_maps=(self._heat_map(),),
        )

    def _heat_map(self) -> HeatMap:
        table = self.table()
        percentiles, seeds = (list(dict.fromkeys(table[name])) for name in ("percentile", "seed"))
        at = {(row["percentile"], row["seed"]): row for row in table.to_dict("records")}
        text = lambda row: f"{row['n_regions']} regions" if row["change"] == row["change"] else "no candidate"  # noqa: E731
        return HeatMap(
            title="Change of the rate when the best candidate is ablated",
            row_label="percentile",
            column_label="seed of the order",
            rows=tuple(f"{percentile:g}" for percentile in percentiles),
            columns=tuple(map(str, seeds)),
            values=tuple(tuple(float(at[p, s]["change"]) for s in seeds) for p in percentiles),
            texts=tuple(tuple(text(at[p, s]) for s in seeds) for p in percentiles),
            low=0.0,
            high=-1.0,
            note="Strong colour: the behaviour is gone. Every cell is shown; none was picked.",
        )


def cell_name(percentile: float | int, seed: int) -> str:
    """The name of a cell's method."""
    return f"p{percentile:g}, seed {seed}"


def matched_name(cell: str) -> str:
    """The name of the region that is matched to a cell's candidate."""
    return f"matched region of {cell}"


@standard_modes(gradients=False)
def localisation_sweep(
    model: HostModel,
    hook_name: str,
    split: PromptSplit,
    behaviour: Behaviour | OpeningOdds,
    *,
    percentiles: Sequence[float | int] = (4, 8, 12, 16, 20),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    basis: str = "exemplar",
    matched: bool = True,
    chat_template: bool = True,
    chat_template_options: Mapping[str, Any] | None = None,
    max_new_tokens: int = 60,
    min_members: int = 5,
    min_rate: float | int = 0.3,
    asked: pd.DataFrame | None = None,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    batch_size: int = 64,
    n_jobs: int = 1,
    workers: str = "joblib",
    actor_options: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> SweepEvidence:
    """Build partitions of ``split.build`` at several percentiles and in several orders, and ablate each best candidate.

    The model reads the build prompts once and answers the choose prompts once, for all cells. Centre and threshold of a
    percentile are calibrated once; seeds change the order of prompts only.

    Args:
        model: any TransformerLens model.
        hook_name: any alias of the hook.
        split: see :func:`~saelens_ext.evals.behaviour.localisation.localise_behaviour`.
        behaviour: likewise.
        percentiles: of the partitions, each in (0, 100).
        seeds: of the orders.
        basis: "exemplar" or "mean", of what is ablated.
        matched: also ablate the region that is matched to each candidate, twice the answers.
        chat_template: as for :func:`~saelens_ext.evals.behaviour.localisation.localise_behaviour`, and likewise
            ``chat_template_options``, ``max_new_tokens``, ``min_members`` and ``min_rate``.
        asked: verdicts on ``split.choose`` that are there already, such as ``found.prompts`` of a localisation;
            likewise.
        n_bootstrap: resamples of prompts, for intervals.
        n_permutations: signs drawn for p-values.
        confidence: of the intervals, in (0, 1).
        batch_size: answers in a forward pass.
        n_jobs: partitions at a time, as joblib counts; a backend set by ``joblib.parallel_config`` spreads them over a
            cluster. The answers of all cells share the model's batches here.
        workers: "joblib", or "ray": actors on the cluster that ``ray.init`` was called for, or on this machine.
        actor_options: Ray's resources of an actor; one CPU by default.
        folder: where every cell is written when it is done; what is there already is not computed again.
        progress: show a progress bar.

    Raises:
        ValueError: no percentile or seed, one given twice, a folder of another sweep, or as
            :func:`~saelens_ext.evals.behaviour.localisation.localise_behaviour`.
        RuntimeError: a worker died.
    """
    _checks.choice(basis, BASES, "basis")
    _checks.choice(workers, WORKERS, "workers")
    for values, name in ((percentiles, "percentiles"), (seeds, "seeds")):
        if len(_checks.listed(values, name, "number")) > len(set(values)):
            raise ValueError(f"{name} must all be different, got {tuple(values)}.")
    template: dict[str, Any] = {"chat_template": chat_template, "chat_template_options": chat_template_options}
    asking = Asking(
        model=model, behaviour=behaviour, max_new_tokens=max_new_tokens, batch_size=batch_size, **template
    )  # fmt: skip
    given = None if asked is None else given_verdicts(asked, split.choose, "split.choose")
    limits = {"min_members": min_members, "min_rate": float(min_rate), "n_candidates": 1}
    settings = limits | template | {"basis": basis, "matched": matched}
    settings |= {"max_new_tokens": max_new_tokens, "behaviour": repr(behaviour), "model": identify_model(model)}
    settings |= {"hook_name": hook_name, "n_prompts": split.sizes()}
    prompts = {part: list(getattr(split, part)) for part in PARTS}
    store = SweepStore.at(folder, settings | prompts | {"asked": given and [list(verdict) for verdict in given]})
    chosen = _verdicts(store, "choose", lambda: given or asking.ask(split.choose, progress=progress)[0])
    check_both_shown(chosen)
    plain = _verdicts(store, "test", lambda: asking.ask(split.test, progress=progress)[0])
    wanted = [(float(percentile), int(seed)) for percentile in percentiles for seed in seeds]
    missing = [cell for cell in wanted if store.cell(*cell) is None]
    if missing:
        cells = _located(model, hook_name, split, chosen, missing, limits, basis, template)
        cells = _spread(cells, n_jobs, workers, actor_options, "" if store.folder is None else IN_FOLDER)
        _ask_cells(asking, split, cells, missing, resolve_hook(model, hook_name), store, matched, progress)
    settings |= {"percentiles": [p for p, _ in wanted], "n_bootstrap": n_bootstrap, "confidence": confidence}
    found = [cast("dict[str, Any]", store.cell(*cell)) for cell in wanted]
    return _evidence(found, plain, split, settings | {"n_permutations": n_permutations})


def _verdicts(store: SweepStore, name: str, make: Callable[[], Sequence[Verdict]]) -> list[Verdict]:
    """Verdicts that are there, or made now."""
    found = store.named(name, lambda: {"verdicts": [list(one) for one in make()]})["verdicts"]
    number = lambda value: np.nan if value is None else float(value)  # noqa: E731
    return [Verdict(number(shown), number(odds), text) for shown, odds, text in found]


# --- the cells ---


def _located(
    model: HostModel, hook_name: str, split: PromptSplit, verdicts: Sequence[Verdict],
    cells: Sequence[tuple[float, int]], limits: dict[str, Any], basis: str, template: dict[str, Any],
) -> "list[partial[dict[str, Any]]]":  # fmt: skip
    """A call that localises, for each cell, from one pass over the build prompts and one over the choose prompts."""
    built = read_texts(model, hook_name, split.build, **template)
    last = read_texts(model, hook_name, split.choose, positions="last", **template)
    (x,), (y,) = built.activations.values(), last.activations.values()
    stream = MatrixStream(x, hook_name, document_ids=built.document_ids, batch_size=4096)
    fits = fit_exemplar_partitions(stream, sorted({percentile for percentile, _ in cells}))
    calibrated = {
        percentile: (fit.dictionary.center.detach(), fit.threshold.threshold) for (_, percentile), fit in fits.items()
    }
    return [
        partial(_locate, x, built.document_ids, y, verdicts, *calibrated[p], p, seed, limits, basis, hook_name)
        for p, seed in cells
    ]


def _spread(
    jobs: "Sequence[partial[dict[str, Any]]]", n_jobs: int, workers: str, actor_options: dict[str, Any] | None,
    after_a_death: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """The results of some calls, by several workers."""
    n_workers = joblib.effective_n_jobs(n_jobs) if workers == "joblib" else n_jobs
    if n_workers == 1:
        return [job() for job in jobs]
    load = partial(_by_number, list(jobs))
    found = spread(load, range(len(jobs)), workers, n_workers, actor_options, False, after_a_death or "Call it again.")
    return [found[number] for number in range(len(jobs))]


def _by_number(jobs: "Sequence[partial[dict[str, Any]]]") -> Job:
    return lambda number: jobs[number]()


def _locate(
    x: Tensor, documents: Tensor, last: Tensor, verdicts: Sequence[Verdict], center: Tensor, threshold: float,
    percentile: float, seed: int, limits: dict[str, Any], basis: str, hook_name: str,
) -> dict[str, Any]:  # fmt: skip
    """One cell: its partition, its best candidate and the region that is matched to it."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(int(documents.max()) + 1))
    rows = torch.argsort(torch.argsort(order)[documents.cpu()], stable=True).to(x.device)
    clustering = LeaderClustering(center, threshold)
    clustering.partial_fit(x[rows])
    partition = ExemplarPartition.from_regions(
        clustering.exemplars, clustering.member_means, center, threshold, percentile=percentile,
        metadata={"hook_name": hook_name},
    )  # fmt: skip
    found = localise_read(partition, x, last, last, verdicts, **limits)
    cell: dict[str, Any] = dict.fromkeys(_GRID) | {"percentile": percentile, "seed": seed}
    cell |= {"n_regions": len(clustering.exemplars), "direction": None, "matched_direction": None}
    if found.candidates:
        cell |= found.candidates[0]._asdict()
        cell["direction"] = directions_of(found, [found.candidates[0].region], basis)
        cell["matched_region"] = region = matched_region(found)
        cell["matched_direction"] = None if region is None else directions_of(found, [region], basis)
    return cell | {"center": center}


def _ask_cells(
    asking: Asking, split: PromptSplit, cells: Sequence[dict[str, Any]], places: Sequence[tuple[float, int]],
    hook: str, store: SweepStore, matched: bool, progress: bool,
) -> None:  # fmt: skip
    """Ask the test prompts under the ablations of cells, some at a time, and write each cell."""
    step = _GROUP if store.folder is not None else len(cells)
    for first in range(0, len(cells), step):
        group = cells[first : first + step]
        sides = ("direction", "matched_direction") if matched else ("direction",)
        conditions = [
            Condition(name=f"{number} {side}", directions=cell[side])
            for number, cell in enumerate(group)
            for side in sides
            if cell[side] is not None
        ]
        asked = replace(asking, centers={hook: group[0]["center"]})
        answers = asked.ask(split.test, conditions, progress=progress) if conditions else []
        values = {one.name: [v.shown for v in verdicts] for one, verdicts in zip(conditions, answers, strict=True)}
        for number, (cell, place) in enumerate(zip(group, places[first : first + step], strict=True)):
            kept = {name: cell[name] for name in _GRID} | {
                "values": values.get(f"{number} direction"),
                "matched_values": values.get(f"{number} matched_direction"),
            }
            store.put(*place, kept)


def _evidence(
    found: Sequence[dict[str, Any]], plain: Sequence[Verdict], split: PromptSplit, settings: dict[str, Any]
) -> SweepEvidence:
    methods: dict[str, tuple[str, Any]] = {NOTHING: ("control", [verdict.shown for verdict in plain])}
    for cell in found:
        name = cell_name(cell["percentile"], cell["seed"])
        if cell["values"] is not None:
            methods[name] = ("unsupervised", cell["values"])
        if cell["matched_values"] is not None:
            methods[matched_name(name)] = ("control", cell["matched_values"])
    rows = [
        {"prompt": unit_name("test", number), "method": name, "metric": "shown"}
        | {"value": np.nan if value is None else float(value)}
        for name, (_, values) in methods.items()
        for number, value in enumerate(values)
    ]
    return SweepEvidence(
        cells=pd.DataFrame(rows),
        kinds={name: kind for name, (kind, _) in methods.items()},
        descriptions={NOTHING: "The model as it is."},
        settings=_files.json_safe(settings),
        grid=[{name: cell[name] for name in _GRID} for cell in found],
    )
