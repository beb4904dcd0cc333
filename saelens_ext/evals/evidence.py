"""What every evaluation gives: raw values per unit, intervals and tests over units, a claim that can go either way.

A subclass says what its units, its metrics and its question are, and fills ``cells``; summaries, comparisons, the
claim, saving and the section of the page follow from these, and each can be replaced.

Symbols
    unit     what was drawn independently: a concept, a document
    group    values of ``groups`` columns: parts of the evidence that are reported apart, such as rules of choosing
    family   all comparisons of one metric, over which Holm's correction is made
"""

import importlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import numpy as np
import pandas as pd

from saelens_ext import _checks, _files
from saelens_ext.evals import verdicts
from saelens_ext.ops.resampling import Interval, Paired, paired_units, unit_bootstrap
from saelens_ext.ops.statistics import holm
from saelens_ext.report.evidence_section import EvidenceSection, EvidenceTable, ForestPlot, ForestRow

E = TypeVar("E", bound="Evidence")

KINDS = ("unsupervised", "supervised", "control")
MIN_CLAIM_UNITS = 6
"""With fewer units, flipping signs gives no p-value below .05."""

_STEM, _VERSION = "evidence", 2
_SETTINGS: dict[str, Any] = {"confidence": 0.95, "n_bootstrap": 2000, "n_permutations": 10_000, "seed": 0}


Pair = tuple[dict[str, Any], str, str, pd.DataFrame]
"""Group, method, other method and a table that has both, one row for each unit."""


class Failure(NamedTuple):
    """What could not be computed."""

    method: str
    """Empty where it is the unit that failed for every method."""
    unit: str
    """Empty where it is the method that failed for every unit."""
    error: str

    def __str__(self) -> str:
        where = " on ".join(part for part in (self.method, self.unit) if part)
        return f"{where}: {self.error}"


@dataclass(kw_only=True, eq=False)
class Evidence:
    """Methods tried on the same units."""

    kind: ClassVar[str] = "evidence"
    """Short name, in files and anchors."""
    title: ClassVar[str] = "Evidence"
    question: ClassVar[str] = ""
    """What is asked, as one question."""
    unit: ClassVar[str] = "unit"
    """What was drawn independently; the column of ``cells`` that names it."""
    unit_text: ClassVar[str] = ""
    """What the units are, in a sentence or two."""
    groups: ClassVar[tuple[str, ...]] = ()
    """Columns of ``cells`` whose values are reported apart."""
    metrics: ClassVar[Mapping[str, str]] = {"value": "value"}
    """Name of each metric in words, the headline first."""
    chance: ClassVar[float | None] = None
    """What the headline metric is without any knowledge."""
    bounds: ClassVar[tuple[float, float]] = (-np.inf, np.inf)
    """Of the headline metric; its intervals are kept within."""
    other_bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Of other metrics, by name; those without are not bounded."""

    cells: pd.DataFrame
    """Raw values in tidy form: the columns ``unit``, ``groups``, "method", "metric", "value", and any finer ones, such
    as the split. The value of a method on a unit is the mean over finer rows.
    """
    kinds: dict[str, str]
    """Kind of every method by name: "unsupervised", whose merit is asked, "supervised" (a reference that used labels)
    or "control".
    """
    descriptions: dict[str, str] = field(default_factory=dict)
    """What a method or control is, by its name, in a sentence."""
    settings: dict[str, Any] = field(default_factory=dict)
    """JSON-safe; "confidence", "n_bootstrap", "n_permutations" and "seed" are used here."""
    failures: tuple[Failure, ...] = ()
    """What could not be computed; the rest is complete."""

    def __post_init__(self) -> None:
        needed = (self.unit, *self.groups, "method", "metric", "value")
        missing = [name for name in needed if name not in self.cells.columns]
        if missing:
            raise ValueError(f"cells lacks the columns {', '.join(missing)}; it has {', '.join(self.cells.columns)}.")
        unknown = sorted(set(self.cells["method"]) - set(self.kinds))
        if unknown or not set(self.kinds.values()) <= set(KINDS):
            raise ValueError(f"kinds must give one of {KINDS} for every method of cells, got {self.kinds!r}.")
        self.settings = _SETTINGS | self.settings

    @property
    def headline(self) -> str:
        """The metric that the claim is about."""
        return next(iter(self.metrics))

    def per_unit(self, metric: str | None = None) -> pd.DataFrame:
        """One row per group and unit, one column per method, in the order of ``kinds``; NaN where nothing is known."""
        name = _checks.choice(metric or self.headline, tuple(self.metrics), "metric")
        own = self.cells[self.cells["metric"] == name]
        means = own.groupby([*self.groups, self.unit, "method"], sort=False)["value"].mean()
        table = means.unstack("method").reindex(columns=[name for name in self.kinds if name in set(own["method"])])
        # Draws of units are by their place, so that must not depend on the order in which they were evaluated.
        return table.sort_index(level=self.unit, sort_remaining=False, kind="stable")

    def summary(self, *, metric: str | None = None) -> pd.DataFrame:
        """One row per group, metric and method: estimate (mean over units), low, high and n_units.

        Args:
            metric: one of them alone; by default all.
        """
        rows = []
        for name in self.metrics if metric is None else [metric]:
            for group, table in self._parts(name):
                for method in table.columns:
                    values = table[method].dropna().to_numpy(dtype=np.float64)
                    if len(values):
                        found = self._estimate(name, group, method, values)
                        rows.append({**group, "metric": name, "method": method, **found._asdict()})
        return pd.DataFrame(rows, columns=[*self.groups, "metric", "method", "estimate", "low", "high", "n_units"])

    def comparisons(self, reference: str | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """Differences between methods on the same units, with Holm's correction over all rows.

        Args:
            reference: the method that all others are compared with; by default every unsupervised method is compared
                with every other method.
            metric: by default the headline.

        Returns:
            One row per group and pair: method, other, difference (mean of method - other), low, high, p, n_units,
            n_undefined, p_holm.

        Raises:
            ValueError: no such method or metric.
        """
        rows = []
        for group, method, other, table in self._both(reference, metric or self.headline):
            found = self._paired(*(table[name].to_numpy(dtype=np.float64) for name in (method, other)))
            rows.append({**group, "method": method, "other": other, **found._asdict()})
        columns = ["method", "other", "difference", "low", "high", "p", "n_units", "n_undefined"]
        return corrected(pd.DataFrame(rows, columns=[*self.groups, *columns]))

    def verdict(self, reference: str | None = None) -> str:
        """What the evidence says in words, a line for each method and group.

        "Above" and "below" need a corrected p-value below .05; that there are too few units for any is said outright.

        Args:
            reference: as for :meth:`comparisons`.
        """
        return verdicts.verdict(
            self.comparisons(reference),
            self.summary(metric=self.headline),
            subjects=self._subjects(reference),
            groups=self.groups,
            unit=self.unit,
            metric=self.metrics[self.headline],
            settings=self.settings,
        )

    def claim(self, reference: str | None = None) -> str:
        """The verdict, where there are enough units for one.

        Args:
            reference: as for :meth:`comparisons`.

        Raises:
            ValueError: no such method, or fewer than `MIN_CLAIM_UNITS` units.
        """
        n_units = self.per_unit().index.get_level_values(self.unit).nunique()
        units = verdicts.plural(self.unit)
        if n_units < MIN_CLAIM_UNITS:
            raise ValueError(
                f"A claim needs at least {MIN_CLAIM_UNITS} {units}, got {n_units}: with fewer no p-value can fall "
                f"below 0.05. Evaluate more {units}; summary() shows what was measured."
            )
        return self.verdict(reference)

    def figures(self) -> dict[str, float]:
        """The estimates by name, ``evidence/<kind>/<group>/<method>/<metric>``, as trackers and cards take them."""
        found = {}
        for row in self.summary().to_dict("records"):
            parts = [self.kind, *(str(row[name]) for name in self.groups), row["method"], row["metric"]]
            found["/".join(["evidence", *(part.replace("/", "-").replace(" ", "_") for part in parts)])] = row[
                "estimate"
            ]
        return {name: float(value) for name, value in found.items() if np.isfinite(value)}

    def section(self) -> EvidenceSection:
        """What a page shows of this evidence."""
        summary = self.summary()
        rows = [
            ForestRow(
                label=row["method"],
                **{name: row[name] for name in ("estimate", "low", "high", "n_units")},
                group=verdicts.group_text({name: row[name] for name in self.groups}),
                kind=self.kinds[row["method"]],
            )
            for row in summary[summary["metric"] == self.headline].to_dict("records")
        ]
        words, note = dict(self.metrics), "Paired differences; p_holm is corrected over this table."
        standard = self._estimates(summary), evidence_table("Comparisons", self.comparisons(), note)
        return EvidenceSection(
            kind=self.kind,
            title=self.title,
            question=self.question,
            verdict=self.verdict(),
            forest=ForestPlot(axis=words[self.headline], rows=tuple(rows), chance=self.chance),
            tables=self._tables(*standard),
            units=self.unit_text,
            controls=self.descriptions,
            failures=tuple(map(str, self.failures)),
            settings=_files.json_safe(self.settings),
        )

    def _tables(self, *standard: EvidenceTable) -> tuple[EvidenceTable, ...]:
        """What a page shows as tables: those of all evidence, and what a kind has beside them."""
        return standard

    def _estimates(self, summary: pd.DataFrame) -> EvidenceTable:
        """Methods by metrics."""
        index = [*self.groups, "method"]
        table = summary.pivot(index=index, columns="metric", values="estimate")
        order = summary[index].drop_duplicates()
        table = table.reindex(columns=[name for name in self.metrics if name in table.columns])
        table = order.merge(table.reset_index(), on=index, how="left")
        explained = "; ".join(f"{name.replace('_', ' ')}: {self.metrics[name]}" for name in table.columns[len(index) :])
        return evidence_table("Estimates", table, f"Means over {verdicts.plural(self.unit)}. {explained}.")

    def save(self, directory: str | Path) -> Path:
        """Write ``evidence.json`` and ``evidence.safetensors`` into a directory, one evidence to each; gives it."""
        return self._format().save(self, Path(directory))

    @classmethod
    def load(cls: type[E], directory: str | Path) -> E:
        """Read what :meth:`save` wrote; on `Evidence` itself, evidence of any kind.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign, newer or of another kind.
        """
        own: Any = cls
        if cls is Evidence:
            package = importlib.import_module("saelens_ext.evals")
            for name in package.__all__:  # a kind is known once its module is imported
                getattr(package, name)
            kind = _files.read_json(Path(directory) / f"{_STEM}.json").get("kind")
            known = {each._format().kind: each for each in _all_subclasses(cls)}
            own = known.get(str(kind), cls)
        return own._format().load(own, Path(directory))

    # --- for subclasses ---

    @classmethod
    def _format(cls) -> _files.Format:
        return _files.Format(stem=_STEM, kind=f"{cls.kind} evidence", version=_VERSION, oldest=_VERSION, nullable=True)

    def _parts(self, metric: str) -> list[tuple[dict[str, Any], pd.DataFrame]]:
        """The table of :meth:`per_unit` by group."""
        table = self.per_unit(metric)
        if not self.groups:
            return [({}, table)] if len(table) else []
        parts = table.groupby(level=list(self.groups), sort=False)
        return [(dict(zip(self.groups, cast(tuple, key))), part) for key, part in parts]

    def _estimate(self, metric: str, group: Mapping[str, Any], method: str, values: np.ndarray) -> Interval:
        """What a method has on the units of a group, with its interval."""
        bounds = self.bounds if metric == self.headline else self.other_bounds.get(metric, (-np.inf, np.inf))
        return unit_bootstrap(np.mean, values, **self._resampling(), bounds=bounds)

    def _both(self, reference: str | None, metric: str) -> Iterator[Pair]:
        """By group and pair of methods, the table of units that they are compared on."""
        for group, table in self._parts(metric):
            for method, other in self._pairs(reference, list(table.columns)):
                yield group, method, other, table

    def _subjects(self, reference: str | None) -> list[str]:
        """The methods whose merit is asked."""
        if reference is not None:
            return [_checks.choice(reference, tuple(self.kinds), "reference")]
        return [name for name, kind in self.kinds.items() if kind == "unsupervised"]

    def _pairs(self, reference: str | None, methods: Sequence[str]) -> list[tuple[str, str]]:
        subjects, seen = self._subjects(reference), list[tuple[str, str]]()
        for subject in subjects:
            if subject in methods:
                seen += [(subject, o) for o in methods if o != subject and (o, subject) not in seen]
        return seen

    def _resampling(self) -> dict[str, Any]:
        # A generator of its own for each number, so that none depends on the order of methods.
        generator = np.random.default_rng([self.settings["seed"], zlib.crc32(self.kind.encode())])
        return {name: self.settings[name] for name in ("n_bootstrap", "confidence")} | {"generator": generator}

    def _paired(self, first: np.ndarray, second: np.ndarray) -> Paired:
        return paired_units(first, second, **self._resampling(), n_permutations=self.settings["n_permutations"])


class OverConcepts:
    """What evaluations have in common whose units are concepts and whose headline is 0.5 without knowledge."""

    unit: ClassVar[str] = "concept"
    chance: ClassVar[float | None] = 0.5
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)


def corrected(table: pd.DataFrame, families: pd.Series | None = None) -> pd.DataFrame:
    """Comparisons with ``p_holm``: Holm's correction of ``p`` over all rows, or over those of each family."""
    correct = lambda p: holm(p.to_numpy(dtype=np.float64))  # noqa: E731
    if families is None:
        return table.assign(p_holm=correct(table["p"]))
    return table.assign(p_holm=table.groupby(families, sort=False)["p"].transform(correct).astype(float))


def evidence_table(title: str, table: pd.DataFrame, note: str) -> EvidenceTable:
    """A table as a page shows it, with a note on what its columns mean."""
    rows = tuple(tuple(row) for row in table.astype(object).itertuples(index=False))
    return EvidenceTable(title=title, columns=tuple(map(str, table.columns)), rows=rows, note=note)


def _all_subclasses(kind: type) -> list[Any]:
    return [each for own in kind.__subclasses__() for each in (own, *_all_subclasses(own))]
