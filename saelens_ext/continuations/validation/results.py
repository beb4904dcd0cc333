"""What an intervention test of clusters found: its tables, its comparisons and its wording.

The symbols, and the statistics of a dose-response, are those of `statistics`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from saelens_ext import _checks, _files
from saelens_ext.continuations.validation.findings import (
    Finding,
    joint_words,
    outcome,
    smallest_p,
    steering_findings,
)
from saelens_ext.continuations.validation.methods import NOTHING, method_name
from saelens_ext.continuations.validation.statistics import (
    cluster_statistics,
    compare_generations,
    compare_methods,
    mean_effects,
    specificity_summary,
)

FORMAT_VERSION = 1

_TABLES = ("members", "cells", "directions", "generations")


@dataclass(frozen=True, kw_only=True, eq=False)
class Validation:
    """Effects of all methods, of one prefix or several, from ``validate_clusters`` and ``combine_validations``."""

    members: pd.DataFrame
    """One row per prefix, method, measured member (``row`` of the set), strength and measure: ``change``, NaN where a
    method has no direction for the member. ``cluster`` is that of the method, ``joint_cluster`` the one under test."""
    cells: pd.DataFrame
    """The specificity matrix in long form: mean ``change`` of the members of ``cluster`` along ``direction``."""
    directions: pd.DataFrame
    """One row per prefix, method and cluster: the member whose signature it is, and what fraction of it was scaled."""
    generations: pd.DataFrame
    """One row per prefix, method and cluster: the fraction of open-ended samples in the cluster, steered towards it
    (``share``) and ``unsteered``; no row where none were asked for."""
    settings: Mapping[str, Any]
    """How it was done; JSON-safe."""

    @property
    def prefixes(self) -> list[str]:
        """The prefixes tested."""
        return list(self.members["prefix"].unique())

    @property
    def unit(self) -> str:
        """What comparisons are made over: ``"member"`` with one prefix, ``"prefix"`` with several."""
        return "prefix" if len(self.prefixes) > 1 else "member"

    def to_dataframe(self) -> pd.DataFrame:
        """Mean effects: one row per prefix, method, cluster of that method, strength and measure.

        ``low`` and ``high`` bound a 95 % bootstrap interval over the cluster's measured members; ``n_members`` of them.
        """
        return mean_effects(self.members, self.settings["n_bootstrap"], self.settings["seed"])

    def dose_response(self) -> pd.DataFrame:
        """Statistics of each cluster's mean effects over strengths: one row per prefix, method, cluster and measure.

        The published figures are means of this ``pearson`` and ``spearman`` over clusters and prefixes; here those
        without meaning are NaN and not 0.
        """
        return cluster_statistics(self.members)

    def specificity(self, measure: str = "demeaned_logit", prefix: str | None = None) -> pd.DataFrame:
        """Mean effect of each cluster's direction (rows) on each cluster's members (columns), at the largest strength.

        Raises:
            ValueError: no such measure or prefix, or several prefixes and none named.
        """
        _checks.choice(measure, list(self.cells["measure"].unique()), "measure")
        if prefix is None and len(self.prefixes) > 1:
            raise ValueError(
                f"There are {len(self.prefixes)} prefixes, each with a matrix of its own; name one of {self.prefixes}."
            )
        prefix = _checks.choice(self.prefixes[0] if prefix is None else prefix, self.prefixes, "prefix")
        cells = self.cells[(self.cells["prefix"] == prefix) & (self.cells["measure"] == measure)]
        return cells.pivot(index="direction", columns="cluster", values="change")

    def specificity_summary(self) -> pd.DataFrame:
        """Effect on the own cluster and on others, and how often the own one is largest, by prefix and measure."""
        return specificity_summary(self.cells, sign=-1 if self.settings["specificity_strength"] < 0 else 1)

    @cached_property
    def _summary(self) -> pd.DataFrame:
        controls = [method for method in self.members["method"].unique() if method != "joint"]
        counts = {name: int(self.settings[name]) for name in ("n_bootstrap", "n_permutations", "seed")}
        found = compare_methods(self.members, "joint", [NOTHING, *controls], **counts)
        if self.generations.empty:
            return found
        shares = compare_generations(self.generations, "joint", [NOTHING, *controls], **counts)
        return pd.concat([found, shares], ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """The clusters under test minus each control: one row per measure, statistic and control.

        The control ``"nothing"`` does not steer: the difference from it is the effect itself.

        Columns as ``statistics.compare_methods`` gives them: ``difference`` with a 95 % interval, ``p`` and,
        corrected over the controls of the same measure and statistic, ``p_holm``. With one prefix all of these are over
        its members and say nothing about other prefixes; with several they are over prefixes.
        """
        return self._summary.copy()

    def findings(self) -> tuple[Finding, ...]:
        """Whether steering moves continuations, whether mode by mode, and whether that needs the joint clustering."""
        strength = float(self.settings["specificity_strength"])
        return steering_findings(self._summary, self.specificity_summary(), strength)

    def claim(self, measure: str = "demeaned_logit", statistic: str = "slope", *, level: float = 0.05) -> str:
        """What the table says about the joint objective, in words.

        Args:
            measure: one of the measures; ``"generation_share"``, where generations were asked for, with the statistic
                ``"change"``.
            statistic: of the dose-response: ``"slope"``, ``"pearson"``, ``"spearman"`` or ``"monotonicity"``.
            level: below which a corrected p-value counts, in (0, 1).
        """
        _checks.between(level, 0, 1, "level")
        table = self._summary
        table = table[table["measure"] == _checks.choice(measure, list(table["measure"].unique()), "measure")]
        table = table[table["statistic"] == _checks.choice(statistic, list(table["statistic"].unique()), "statistic")]
        verdicts = {row.control: outcome(row, level) for row in table.itertuples()}
        unit, least = table["unit"].iloc[0], smallest_p(table.itertuples())
        lines = [self._setting_line(measure, statistic, unit)]
        lines += [_line(row, verdicts[row.control]) for row in table.itertuples()]
        if least >= level:
            few = f"With {table['n_units'].max()} {unit} units no corrected p-value can fall below {least:.2g}"
            lines.append(f"{few}: too few to detect a difference.")
        return "\n".join([*lines, f"The joint clustering {joint_words(verdicts)[1]}."])

    def _setting_line(self, measure: str, statistic: str, unit: str) -> str:
        members = self.members[["prefix", "row"]].drop_duplicates()
        clusters = self.members[["prefix", "joint_cluster"]].drop_duplicates()
        scope = (
            f"over {len(self.prefixes)} prefixes"
            if self.unit == "prefix"
            else f"over {unit}s of one prefix, so for this prefix and these directions alone"
        )
        return (
            f"{statistic} of {measure} on {len(members)} held-out members of {len(clusters)} clusters; intervals (95 "
            f"%) and p-values (Holm) {scope}."
        )

    # --- out and in ---

    def save(self, path: str | Path) -> Path:
        """Write everything to one JSON file, all or nothing; gives its path."""
        tables = {name: _files.json_safe(getattr(self, name).to_dict(orient="list")) for name in _TABLES}
        return _files.write_json(path, {"format_version": FORMAT_VERSION, "settings": dict(self.settings), **tables})

    @classmethod
    def load(cls, path: str | Path) -> "Validation":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is truncated, not ours, or of a newer format.
        """
        content = _files.read_json(path, FORMAT_VERSION, ("settings", *_TABLES))
        return cls(settings=content["settings"], **{name: _from_lists(content[name]) for name in _TABLES})


def combine_validations(validations: Sequence[Validation]) -> Validation:
    """Put the tests of several prefixes together; comparisons are then over prefixes.

    Raises:
        ValueError: none given, a prefix twice, other settings (but for the seed), or other methods.
    """
    if not validations:
        raise ValueError("validations is empty; give at least one.")
    first = validations[0]
    if len(validations) == 1:
        return first  # with its comparisons, where they were made before
    prefixes = [prefix for one in validations for prefix in one.prefixes]
    twice = {prefix for prefix in prefixes if prefixes.count(prefix) > 1}
    if twice:
        raise ValueError(f"The prefix {sorted(twice)[0]!r} is there twice; prefixes are the units of the tests.")
    for one in validations[1:]:
        for name, value in first.settings.items():
            other = one.settings.get(name)
            if name != "seed" and other != value:
                raise ValueError(f"Tests with other settings cannot be combined: {name} is {value!r} and {other!r}.")
        if set(one.members["method"]) != set(first.members["method"]):
            raise ValueError("Tests with other methods cannot be combined; name the same partitions for each prefix.")
    if len({one.generations.empty for one in validations}) > 1:
        raise ValueError("Tests with and without open-ended samples cannot be combined; give all the same generate.")
    tables = {name: pd.concat([getattr(one, name) for one in validations], ignore_index=True) for name in _TABLES}
    return Validation(settings=first.settings, **tables)


# --- words ---


def _line(row: Any, verdict: str) -> str:
    if verdict == "untested":
        return f"- {method_name(row.control)}: not tested, since no {row.unit} has a value for both."
    unit = row.unit if row.n_units == 1 else {"prefix": "prefixes"}.get(row.unit, f"{row.unit}s")
    figures = f"{row.difference:+.3g} [{row.low:.3g}, {row.high:.3g}], p = {row.p_holm:.2g}, {row.n_units} {unit}"
    words = {"above": "joint exceeds", "below": "joint falls short of", "same": "joint is not distinguishable from"}
    values = f"{row.reference:.3g} against {row.control_value:.3g}"
    return f"- {words[verdict]} {method_name(row.control)}: {values} ({figures})."


def _from_lists(columns: Mapping[str, list[Any]]) -> pd.DataFrame:
    table = pd.DataFrame(columns)
    # A column of nothing but None would stay one of objects.
    return table.apply(lambda column: column.astype(float) if column.isna().all() else column)
