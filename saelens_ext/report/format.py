"""How figures are written for a reader; the page's script formats alike (``text.js``)."""

import math
from typing import NamedTuple

from saelens_ext.host.tokens import visible as visible


class Fact(NamedTuple):
    """One figure of a summary."""

    key: str
    name: str
    value: str
    meaning: str


class Line(NamedTuple):
    """One line of a table, by the names of its columns; a cell is a text, or a text and a note."""

    cells: dict[str, str | tuple[str, str]]
    chosen: bool = False


def count(n: int) -> str:
    """A whole number with its thousands separated: 12,345."""
    return f"{n:,}"


def percentage(x: float | int) -> str:
    """A fraction in [0, 1] as a percentage with two or three significant digits: 12.3%, 1.23%, 0.12%."""
    percent = 100 * x
    if percent == 0:
        return "0%"
    return f"{percent:.1f}%" if percent >= 10 else f"{percent:.2f}%" if percent >= 1 else f"{percent:.2g}%"


def distance(x: float | int) -> str:
    """A cosine distance to three decimals."""
    return f"{x:.3f}"


def angle(cosine_distance: float | int) -> str:
    """The angle, in degrees, between two directions at a cosine distance in [0, 2]."""
    return f"{math.degrees(math.acos(max(-1.0, min(1.0, 1 - cosine_distance)))):.1f}°"


def significant(x: float | int) -> str:
    """A figure of unknown scale: whole numbers as counts, others to four significant digits."""
    if isinstance(x, int) or (float(x).is_integer() and 1000 <= abs(x) < 1e15):
        return count(int(x))
    if x != 0 and not 1e-4 <= abs(x) < 1e6:
        return f"{x:.3e}"
    return f"{x:,.0f}" if abs(x) >= 10_000 else f"{x:.4g}"
