"""The verdict and the tests by steering as the page shows them: effects by strength, the matrix, the comparisons."""

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd

from saelens_ext._files import json_safe
from saelens_ext.continuations.validation.figures import NOTHING, decimals_of, fixed, interval_decimals, p_value
from saelens_ext.continuations.validation.findings import MEASURE, STATISTIC, Verdict, outcome
from saelens_ext.continuations.validation.methods import method_meaning
from saelens_ext.continuations.validation.results import Validation
from saelens_ext.continuations.validation.statistics import mean_effects
from saelens_ext.report.audit import wording as words
from saelens_ext.report.format import Line, count, percentage

ALL_MODES = -1


class Cell(NamedTuple):
    """One cell of the specificity matrix."""

    value: str
    shade: str
    """Class of its colour: "heat-" with p or n for the sign and 1 to 5 for the size; empty for nothing."""
    is_own: bool


def shown_verdict(verdict: Verdict) -> Verdict:
    """A verdict with the invisible characters of its texts spelt out; reasons can quote the prompt."""
    return replace(verdict, findings=tuple(replace(f, evidence=words.quoted(f.evidence)) for f in verdict.findings))


# --- effects by strength ---


def dose_data(validation: Validation) -> dict[str, Any]:
    """Mean changes with intervals for the page's script, JSON-safe.

    ``values[measure][mode][method]`` lists [change, low, high] by strength; mode 0 of these is all modes together.
    Every method is measured on the same members: those of a mode under test, whichever cluster a control has them in.
    """
    members = validation.members
    modes = sorted(int(mode) for mode in members["joint_cluster"].unique())
    together = pd.concat(
        [members.assign(cluster=ALL_MODES), members.assign(cluster=members["joint_cluster"])], ignore_index=True
    )
    table = mean_effects(
        together.assign(prefix=""), int(validation.settings["n_bootstrap"]), int(validation.settings["seed"])
    )
    methods, measures = list(members["method"].unique()), list(members["measure"].unique())
    strengths = sorted(float(strength) for strength in members["strength"].unique())
    cells, n = {}, {}
    for row in cast(Any, table.itertuples()):
        cells[row.measure, int(row.cluster), row.method, float(row.strength)] = [row.change, row.low, row.high]
        n[int(row.cluster), row.method] = int(row.n_members)
    groups = [ALL_MODES, *modes]
    return {
        "strengths": strengths,
        "modes": groups,
        "methods": [{"key": key, "name": words.method_name(key), "meaning": method_meaning(key)} for key in methods],
        "measures": [{"key": key, **words.measure_name(key)._asdict()} for key in measures],
        "values": json_safe(
            [[[[cells[m, g, k, s] for s in strengths] for k in methods] for g in groups] for m in measures], 6
        ),
        "n": [[n[g, k] for k in methods] for g in groups],
    }


# --- the matrix ---


def specificity_cells(validation: Validation) -> tuple[list[int], list[tuple[int, list[Cell]]]]:
    """Modes of the columns, and for each direction its mode and cells."""
    matrix = validation.specificity(MEASURE)
    values = matrix.to_numpy(dtype=np.float64)
    finite = np.abs(values[np.isfinite(values)])
    largest, decimals = (float(finite.max()) if finite.size else 0.0) or 1.0, decimals_of(*finite.tolist())
    columns = [int(name) for name in matrix.columns]

    def cell(x: float, is_own: bool) -> Cell:
        return Cell(fixed(x, decimals, plus=True), _shade(x, largest), is_own)

    names = [int(name) for name in matrix.index]
    return columns, [(i, [cell(x, i == j) for x, j in zip(row, columns)]) for i, row in zip(names, values, strict=True)]


def _shade(x: float, largest: float) -> str:
    if not math.isfinite(x) or abs(x) < largest / 50:
        return ""
    return f"heat-{'p' if x > 0 else 'n'}{min(5, 1 + int(5 * abs(x) / largest - 1e-9))}"


# --- the comparisons ---


def comparisons(validation: Validation) -> list[tuple[str, str, list[Line]]]:
    """For each measure and statistic a heading, its key and its lines; the one that the verdict goes by comes first."""
    groups = []
    for (measure, statistic), rows in cast(Any, validation.summary().groupby(["measure", "statistic"], sort=False)):
        named = words.measure_name(measure)
        heading = f"{words.STATISTICS.get(statistic, statistic)} of {named.name}".capitalize()
        unit = {"slope": f"{named.unit} per unit of strength", "change": named.unit}.get(statistic, "")
        is_main = (measure, statistic) == (MEASURE, STATISTIC)
        lines = [_comparison(row, explained=is_main) for row in rows.itertuples()]
        groups.append((f"{heading}{f', {unit}' if unit else ''}", f"{measure}/{statistic}", lines))
    return sorted(groups, key=lambda group: group[1] != f"{MEASURE}/{STATISTIC}")


_OUTCOMES = {
    "untested": "not tested",
    "same": "no difference detected",
    "above": "own mode exceeds it",
    "below": "own mode falls short",
}


def _comparison(row: Any, *, explained: bool) -> Line:
    shown = _OUTCOMES[outcome(row)]
    decimals = interval_decimals(row.low, row.high, row.reference, row.control_value)
    low, high, difference = (fixed(x, decimals, plus=True) for x in (row.low, row.high, row.difference))
    if row.n_units and row.low == row.high == row.difference == 0:
        low = high = difference = "0"
        shown = "no difference at all"
    return Line(
        {
            "Control": (words.method_name(row.control), method_meaning(row.control) if explained else ""),
            "Own mode": fixed(row.reference, decimals, plus=True),
            "Control’s": fixed(row.control_value, decimals, plus=True),
            "Difference": difference,
            "95% interval": f"{low} to {high}" if row.n_units else NOTHING,
            "p": p_value(row.p),
            "p, corrected": p_value(row.p_holm),
            "Pairs": count(int(row.n_units)),
            "Outcome": shown,
        }
    )


def generated_rows(validation: Validation) -> list[Line]:
    """Fractions of open-ended samples in a mode, steered along its own direction and not steered."""
    rows = validation.generations
    return [
        Line(
            {
                "Mode": f"mode {int(row['cluster'])}",
                "Steered": percentage(row["share"]),
                "Not steered": percentage(row["unsteered"]),
                "Samples each": count(int(row["n"])),
            }
        )
        for row in rows[rows["method"] == "joint"].to_dict("records")
    ]
