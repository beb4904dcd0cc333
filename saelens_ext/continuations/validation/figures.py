"""How figures with intervals are written for a reader.

A figure with an interval gets two digits of the interval's width and no more; what is not a number is an en dash.
"""

import math
from collections.abc import Iterable

MINUS, NOTHING = "\u2212", "–"


def fixed(x: float | int | None, decimals: int, *, plus: bool = False) -> str:
    """A number to some decimals, with a real minus sign, and a plus sign if wanted; never "minus nothing"."""
    if x is None or not math.isfinite(x):
        return NOTHING
    text = f"{x:+.{decimals}f}" if plus else f"{x:.{decimals}f}"
    if not text.strip("+-0."):
        text = text.strip("+-")
    return text.replace("-", MINUS)


def decimals_of(*values: float | int | None, digits: int = 3) -> int:
    """Decimals at which the largest of some figures has that many significant digits; at most 6."""
    largest = max((abs(x) for x in values if x is not None and math.isfinite(x)), default=0.0)
    return 0 if largest == 0 else min(6, max(0, digits - 1 - math.floor(math.log10(largest))))


def interval_decimals(low: float | int, high: float | int, *others: float | int) -> int:
    """Decimals that show two digits of an interval's width; those of the figures themselves where it has none."""
    width = high - low
    return decimals_of(width, digits=2) if math.isfinite(width) and width > 0 else decimals_of(low, high, *others)


def p_value(p: float | int | None) -> str:
    """A p-value to two significant digits."""
    if p is None or not math.isfinite(p):
        return NOTHING
    return "1" if p > 0.995 else f"{p:#.2g}" if p >= 1e-4 else f"{p:.0e}"


def listed(texts: Iterable[str], word: str = "and") -> str:
    """Texts in a row, with a word before the last."""
    *first, last = texts
    return f"{', '.join(first)} {word} {last}" if first else last


def counted(n: int, one: str, many: str = "") -> str:
    """A number of things: ``1 mode``, ``1,200 modes``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
