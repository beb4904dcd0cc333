"""How an audit's figures and texts are written for a reader.

A figure with an interval gets two digits of the interval's width and no more; what is not a number is an en dash.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from saelens_ext.continuations.validation import methods
from saelens_ext.report.format import visible

MINUS, NOTHING = "\u2212", "–"


class MeasureName(NamedTuple):
    """What steering changes, as the page calls it."""

    name: str
    unit: str
    meaning: str


MEASURES: Mapping[str, MeasureName] = {
    "demeaned_logit": MeasureName(
        "mean demeaned logit",
        "logits",
        "the logit of each token of the continuation minus the mean logit over the vocabulary, averaged over its "
        "tokens",
    ),
    "mean_log_prob": MeasureName(
        "log-probability per token", "nats per token", "mean log-probability of the continuation's tokens"
    ),
    "log_prob": MeasureName("log-probability", "nats", "log-probability of the whole continuation"),
    "generation_share": MeasureName(
        "fraction of open-ended samples",
        "fraction",
        "how much larger the fraction of fresh samples nearest, by meaning, to the mode became",
    ),
}

STATISTICS: Mapping[str, str] = {
    "slope": "slope over the strength",
    "pearson": "Pearson correlation with the strength",
    "spearman": "Spearman correlation with the strength",
    "monotonicity": "monotonicity over the strength",
    "change": "change at the largest strength",
}


def method_name(key: str) -> str:
    """What the page calls a method."""
    return visible(methods.method_name(key))


def measure_name(key: str) -> MeasureName:
    """What the page calls a measure."""
    return MEASURES.get(key, MeasureName(visible(key.replace("_", " ")), "", ""))


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


def quoted(text: str) -> str:
    """A text on one line, with signs for line breaks and tabs; every other invisible character is spelt out."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "↵").replace("\t", "⇥")


def plain(value: Any) -> str:
    """A setting as a reader would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "" or value == [] or value == ():
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else quoted(str(value))
