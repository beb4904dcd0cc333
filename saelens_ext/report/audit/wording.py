"""What an audit's page calls things, and how it shows texts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from saelens_ext.continuations.validation import methods
from saelens_ext.report.format import visible


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


def quoted(text: str) -> str:
    """A text on one line, with signs for line breaks and tabs; every other invisible character is spelt out."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "↵").replace("\t", "⇥")


def shortened(text: str, longest: int) -> str:
    """A text that is cut where it is longer."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


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
