"""The page of evidence: for each evaluation the question, what follows, estimates with intervals, and their units.

It knows evaluations by their :class:`~saelens_ext.report.evidence_section.EvidenceSection` only.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saelens_ext import _checks
from saelens_ext.continuations.validation.figures import MINUS, NOTHING, p_value
from saelens_ext.report.audit.wording import plain
from saelens_ext.report.evidence_section import EvidenceSection, EvidenceTable, ForestPlot, HeatMap, LineFigure
from saelens_ext.report.format import count, visible
from saelens_ext.report.page import embed_json, write_page

STYLES = ("dictionary.css", "audit.css", "evidence.css")
SCRIPTS = ("text.js", "line_chart.js", "evidence_figures.js")

_KINDS = {
    "unsupervised": "judged here",
    "supervised": "reference that was told the labels",
    "control": "control or baseline",
}
_ROWS_SHOWN = 12
"""A table of more rows is shown on request."""


class ForestLine(NamedTuple):
    """One row of the forest plot: places are percentages of its width."""

    label: str
    kind: str
    figures: str
    n: str
    estimate: float
    low: float | None
    high: float | None


class Tick(NamedTuple):
    """A figure on the axis of a forest plot."""

    at: float
    text: str
    anchor: str


def write_evidence_report(
    path: str | Path,
    sections: Sequence[EvidenceSection],
    *,
    about: Mapping[str, Any] | None = None,
    title: str = "Evidence",
) -> Path:
    """Write evidence as one self-contained HTML file: a section per evaluation, with the question, the verdict, a
    forest plot, tables, figures, what the units are, the controls, failures and settings.

    All texts are shown as text only: the page carries a content security policy under which nothing but its own script
    runs and nothing is fetched. The same arguments give the same file.

    Args:
        path: the file to write, replaced in one step; missing directories are made.
        sections: what :meth:`~saelens_ext.evals.Evidence.section` gives, at least one.
        about: what was evaluated (model, dictionaries, data), by name.
        title: heading of the page.

    Returns:
        The path written.

    Raises:
        ValueError: no section, a row of a table or a line of a figure of another length than its columns or x values,
            or an estimate that is not finite.
    """
    given = list(sections)
    if not given:
        raise ValueError("sections is empty; give what section() of at least one evidence gives.")
    for section in given:
        _check(section)
    return write_page(
        path,
        "evidence.html",
        styles=STYLES,
        scripts=SCRIPTS,
        title=title,
        sections=[_section(f"evidence-{number}", section) for number, section in enumerate(given)],
        about=_settings(about or {}),
    )


def _check(section: EvidenceSection) -> None:
    for table in section.tables:
        for row in table.rows:
            if len(row) != len(table.columns):
                raise ValueError(
                    f"The table {table.title!r} of {section.title!r} has {len(table.columns)} columns and a row of "
                    f"{len(row)} values; give one value per column."
                )
    for figure in section.figures:
        for line in figure.lines:
            if len(line.x) != len(line.y) or not all(map(math.isfinite, [*line.x, *line.y])):
                raise ValueError(
                    f"The line {line.label!r} of {figure.title!r} has {len(line.x)} x and {len(line.y)} y values; "
                    "give as many of both, all finite."
                )
    for heat_map in section.heat_maps:
        rows, columns = len(heat_map.rows), len(heat_map.columns)
        for name in ("values", "texts"):
            given = getattr(heat_map, name)
            if (given or name == "values") and [len(row) for row in given] != [columns] * rows:
                raise ValueError(
                    f"The {name} of the heat map {heat_map.title!r} have rows of {[len(row) for row in given]}; give "
                    f"{rows} rows of {columns}."
                )
        if heat_map.low == heat_map.high:
            raise ValueError(f"The heat map {heat_map.title!r} has low and high {heat_map.low}; give two values.")
    for row in section.forest.rows:
        _checks.choice(row.kind, tuple(_KINDS), "kind of a forest row")
        if not math.isfinite(row.estimate):
            raise ValueError(f"The estimate of {row.label!r} is {row.estimate}; leave out what has no estimate.")


def _section(key: str, section: EvidenceSection) -> dict[str, Any]:
    """What the template shows of one evaluation."""
    return {
        "key": key,
        "title": visible(section.title),
        "question": visible(section.question),
        "verdict": visible(section.verdict),
        "forest": _forest(section.forest),
        "tables": [_table(table) for table in section.tables],
        "figures": [{"title": visible(one.title), "note": visible(one.note)} for one in section.figures],
        "heat_maps": [_heat_map(one) for one in section.heat_maps],
        "answers": [
            (visible(one.prompt), [(visible(name), visible(text)) for name, text in one.answers.items()])
            for one in section.answers
        ],
        "units": visible(section.units),
        "controls": [(visible(name), visible(text)) for name, text in section.controls.items()],
        "failures": [visible(text) for text in section.failures],
        "settings": _settings(section.settings),
        "data": embed_json([_figure(figure) for figure in section.figures]),
    }


def _settings(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(visible(str(name).replace("_", " ")), visible(plain(value))) for name, value in values.items()]


# --- the forest plot ---


def _forest(plot: ForestPlot) -> dict[str, Any]:
    """Rows gathered under their groups, and the axis."""
    low, high, ticks = _axis(plot)

    def at(value: float | int) -> float:
        return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)

    groups: dict[str, list[ForestLine]] = {}
    for row in plot.rows:
        limits = [at(limit) if math.isfinite(limit) else None for limit in (row.low, row.high)]
        line = ForestLine(
            label=visible(row.label),
            kind=row.kind,
            figures=_with_interval(row.estimate, row.low, row.high),
            n=count(row.n_units),
            estimate=at(row.estimate),
            low=limits[0],
            high=limits[1],
        )
        groups.setdefault(visible(row.group), []).append(line)
    kinds = [row.kind for row in plot.rows]
    return {
        "axis": visible(plot.axis),
        "groups": groups,
        "ticks": [Tick(at(value), _number(value, digits), _anchor(at(value))) for value, digits in ticks],
        "chance": None if plot.chance is None else at(plot.chance),
        "chance_text": "" if plot.chance is None else _number(plot.chance, 2).rstrip("0").rstrip("."),
        "kinds": [(kind, words) for kind, words in _KINDS.items() if kind in kinds],
    }


def _axis(plot: ForestPlot) -> tuple[float, float, list[tuple[float, int]]]:
    """Round numbers from below all that is shown to above it: the first, the last, and each with its decimals."""
    values = [row.estimate for row in plot.rows]
    values += [limit for row in plot.rows for limit in (row.low, row.high) if math.isfinite(limit)]
    values += [] if plot.chance is None else [plot.chance]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = high - low or max(abs(high), 1.0)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / 4.001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    digits = next(n for n in range(12) if abs(round(step, n) - step) < 1e-9 * step)
    return first * step, last * step, [(i * step, digits) for i in range(first, last + 1)]


def _anchor(at: float) -> str:
    return "start" if at < 4 else "end" if at > 96 else "middle"


def _with_interval(estimate: float, low: float, high: float) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return _number(estimate, 3)
    return f"{_number(estimate, 3)} ({_number(low, 3)} to {_number(high, 3)})"


def _number(value: float | int, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return (text if text.strip("-0.") else text.strip("-")).replace("-", MINUS)


# --- tables and figures ---


def _table(table: EvidenceTable) -> dict[str, Any]:
    numbers = [all(not isinstance(row[i], str) for row in table.rows) for i in range(len(table.columns))]
    return {
        "title": visible(table.title),
        "note": visible(table.note),
        "columns": [visible(name.replace("_", " ")) for name in table.columns],
        "numbers": numbers,
        "rows": [[_cell(value, name) for value, name in zip(row, table.columns)] for row in table.rows],
        "open": len(table.rows) <= _ROWS_SHOWN,
        "n": count(len(table.rows)),
    }


def _cell(value: str | float | int | None, column: str) -> str:
    """A value to three decimals, more where it is small; a p-value to two digits."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, bool):
        return plain(value)
    if isinstance(value, int):
        return count(value).replace("-", MINUS)
    if column == "p" or column.startswith("p_"):
        return p_value(value)
    return _number(value, 3) if abs(value) >= 0.001 or value == 0 else f"{value:.1e}".replace("-", MINUS)


def _heat_map(given: HeatMap) -> dict[str, Any]:
    """Rows of cells: a figure, a text and a strength in 0 to 10."""
    rows = []
    for i, name in enumerate(given.rows):
        cells = []
        for j, value in enumerate(given.values[i]):
            known = value is not None and math.isfinite(value)
            strength = (float(value) - given.low) / (given.high - given.low) if known else 0.0  # pyright: ignore
            figure = _number(value, 2) if known else NOTHING  # pyright: ignore[reportArgumentType]  # known
            text = visible(given.texts[i][j]) if given.texts else ""
            cells.append((figure, text, round(10 * min(1.0, max(0.0, strength)))))
        rows.append((visible(name), cells))
    words = {name: visible(getattr(given, name)) for name in ("title", "note", "row_label", "column_label")}
    return words | {"columns": [visible(name) for name in given.columns], "rows": rows}


def _figure(figure: LineFigure) -> dict[str, Any]:
    return {
        "title": figure.title,
        "x": figure.x_label,
        "y": figure.y_label,
        "lines": [
            {"label": line.label, "kind": line.kind, "x": _rounded(line.x), "y": _rounded(line.y)}
            for line in figure.lines
        ],
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
