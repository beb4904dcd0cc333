"""What a page of evidence shows of one evaluation: plain values, so that the page knows no evaluation.

:meth:`saelens_ext.evals.evidence.Evidence.section` fills one in, and the evidence page draws any number of them, in the
order of the fields below. All texts are plain (the page escapes them); a number that is not known is NaN or None.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BESIDE_FILENAME = "evidence_results.json"
"""Beside a dictionary: by kind of evaluation, its "title", the "verdict" and the "figures" by name."""


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    """One line of the forest plot: an estimate with its interval."""

    label: str
    """The method."""
    estimate: float
    low: float
    """NaN where there are too few units for an interval; then only the estimate is drawn."""
    high: float
    n_units: int
    group: str = ""
    """Heading that rows are gathered under, such as ``"rule: auroc"``; rows of one group stand together."""
    kind: str = "unsupervised"
    """``"unsupervised"``, ``"supervised"`` or ``"control"``, which decides the colour and is named in the legend."""


@dataclass(frozen=True, kw_only=True)
class ForestPlot:
    """Estimates of the headline metric."""

    axis: str
    """What the axis measures, with its unit."""
    rows: tuple[ForestRow, ...]
    chance: float | None = None
    """Where a vertical line shows what chance gives; None for no line."""


@dataclass(frozen=True, kw_only=True)
class EvidenceTable:
    """A table of texts and numbers, which the page rounds to three digits."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
    """One value per column."""
    note: str = ""
    """What the columns mean."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a figure."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    """As long as ``x``."""
    kind: str = "unsupervised"
    """As in :class:`ForestRow`."""


@dataclass(frozen=True, kw_only=True)
class LineFigure:
    """Lines over two axes: an ROC, a histogram as steps, a curve over percentiles."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    note: str = ""
    """What is seen, in a sentence or two."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Values over two settings, each cell coloured by its value and with it in figures."""

    title: str
    row_label: str
    column_label: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    """One tuple per row; None or NaN where there is no value."""
    low: float | int
    """The value of the palest colour."""
    high: float | int
    """The value of the strongest; may be below ``low``."""
    texts: tuple[tuple[str, ...], ...] = ()
    """What stands under the figure in each cell; by default nothing."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class AnswerSet:
    """What a model says to one prompt under several conditions, side by side."""

    prompt: str
    answers: Mapping[str, str]
    """By condition."""


@dataclass(frozen=True, kw_only=True)
class EvidenceSection:
    """One evaluation, as the page shows it from top to bottom."""

    kind: str
    """Short name, for anchors and files: ``"detection"``."""
    title: str
    question: str
    """What was asked, as one question."""
    verdict: str
    """The claim in words, which may be that methods cannot be told apart or that there are too few units."""
    forest: ForestPlot
    tables: tuple[EvidenceTable, ...] = ()
    figures: tuple[LineFigure, ...] = ()
    heat_maps: tuple[HeatMap, ...] = ()
    answers: tuple[AnswerSet, ...] = ()
    units: str = ""
    """What was drawn independently, that intervals and tests are over."""
    controls: Mapping[str, str] = field(default_factory=dict)
    """What each method or control is, by its name."""
    failures: tuple[str, ...] = ()
    """What could not be computed, and why."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """JSON-safe."""
