"""The part of a report that puts a dictionary beside another of the same hook: which directions both have."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.match import DictionaryMatch, SideMatch
from saelens_ext.report.dictionary.summary import Fact
from saelens_ext.report.format import count, percentage, visible

MAX_PAIRS = 100
"""Pairs shown, the nearest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparedWith:
    """Another dictionary, and how its directions match."""

    name: str
    """What it is called on the page."""
    match: DictionaryMatch
    """Of the dictionary reported on, the first, with it."""
    labels: Labels | None = None
    """Of the other."""


def compared_part(other: ComparedWith, labels: Labels | None) -> dict[str, Any]:
    """What the template shows of a comparison; ``labels`` are those of the dictionary reported on."""
    match = other.match
    frame = match.pairs_dataframe()
    pairs = [
        SimpleNamespace(
            first=int(row.first),
            first_label=_label(labels, int(row.first)),
            second=int(row.second),
            second_label=_label(other.labels, int(row.second)),
            cosine=f"{row.cosine:.3f}",
            above=bool(row.above_both_cutoffs),
        )
        for row in cast(Any, frame.head(MAX_PAIRS).itertuples())
    ]
    above = count(int(frame["above_both_cutoffs"].sum()))
    chance = percentage(1 - match.settings["level"])
    return {
        "name": visible(other.name),
        "facts": [
            _side("first", "This dictionary", match.first, chance),
            _side("second", visible(other.name), match.second, chance),
            Fact("pairs", "Mutual pairs", count(len(frame)), f"{above} of them above both cutoffs"),
        ],
        "pairs": pairs,
        "cut": f"The {count(MAX_PAIRS)} nearest of {count(len(frame))} pairs." if len(frame) > MAX_PAIRS else "",
    }


def _side(key: str, name: str, side: SideMatch, chance: str) -> Fact:
    meaning = (
        f"of {count(len(side.nearest))} directions have one in the other dictionary nearer than the cutoff of "
        f"{side.cutoff:.3f}; made-up dictionaries give {chance}"
    )
    return Fact(key, name, percentage(side.share), meaning)


def _label(labels: Labels | None, latent: int) -> str:
    if labels is None or not labels.texts[latent]:
        return ""
    return visible(labels.texts[latent]) + ("" if labels[latent].distinguishes else " (may be chance)")
