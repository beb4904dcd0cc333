"""Sentences about comparisons, which say no more than a corrected p-value below .05 allows."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from saelens_ext.continuations.validation.figures import listed
from saelens_ext.ops.resampling import smallest_p

LEVEL = 0.05
"""A corrected p-value below this is a claim."""
UNDECIDED = "cannot be told from"
_NUMBERED = 3
"""Of more undecided comparisons than these, the table has the numbers."""


def verdict(
    comparisons: pd.DataFrame,
    summary: pd.DataFrame,
    *,
    subjects: Sequence[str],
    groups: Sequence[str],
    unit: str,
    metric: str,
    settings: Mapping[str, Any],
) -> str:
    """What comparisons say of each subject, group by group.

    Args:
        comparisons: one family, as :meth:`~saelens_ext.evals.evidence.Evidence.comparisons` gives it; a column "note"
            says what else must be known of a row.
        summary: estimates of the same metric.
        subjects: methods whose merit is asked.
        groups: columns that tell the groups apart.
        unit: what was drawn independently, in the singular.
        metric: in words.
        settings: with "confidence" and "n_permutations".
    """
    made = comparisons[comparisons["p"].notna()]
    if made.empty:
        return "There are no two methods with values on the same units, so nothing can be compared."
    n_units, family = int(made["n_units"].max()), len(made)
    least = smallest_p(n_units, settings["n_permutations"], family)
    if least >= LEVEL:
        return (
            f"Too few {plural(unit)} for any claim: with {n_units} of them and {family} comparisons the smallest "
            f"corrected p-value possible is {least:.2g}, and a claim needs one below {LEVEL:g}."
        )
    sentences = []
    for group, part in _by_group(made, groups):
        own = summary[(summary[list(groups)] == pd.Series(group)).all(axis=1)] if groups else summary
        estimates = own.set_index("method")
        for subject in subjects:
            phrases = _phrases(part, subject)
            if phrases:
                row: Any = estimates.loc[subject]
                where = f" ({group_text(group)})" if group else ""
                sentences.append(
                    f"Over {int(row['n_units'])} {plural(unit)}{where}, {subject} ({metric} {row['estimate']:.3f}, "
                    f"{settings['confidence']:.0%} interval {row['low']:.3f} to {row['high']:.3f}) "
                    f"{'; it '.join(phrases)}."
                )
    return "\n".join(sentences)


def plural(unit: str) -> str:
    """Several of a unit: concepts, prefixes."""
    return f"{unit}es" if unit.endswith(("s", "x")) else f"{unit}s"


def group_text(group: Mapping[str, Any]) -> str:
    """A group in words: ``rule: auroc``."""
    return ", ".join(f"{name}: {value}" for name, value in group.items())


def _by_group(table: pd.DataFrame, groups: Sequence[str]) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    if not groups:
        return [({}, table)]
    return [
        ({name: part[name].iloc[0] for name in groups}, part) for _, part in table.groupby(list(groups), sort=False)
    ]


def _phrases(table: pd.DataFrame, subject: str) -> list[str]:
    """ "is above A and B; is below C; cannot be told from D", of one subject."""
    found: dict[str, list[tuple[str, float, float, str]]] = {"is above": [], "is below": [], UNDECIDED: []}
    for row in table.to_dict("records"):
        if subject not in (row["method"], row["other"]):
            continue
        is_first = row["method"] == subject
        difference = row["difference"] if is_first else -row["difference"]
        verb = UNDECIDED if not row["p_holm"] < LEVEL else "is above" if difference > 0 else "is below"
        other = row["other"] if is_first else row["method"]
        found[verb].append((other, difference, row["p_holm"], row.get("note", "")))
    return [f"{verb} {_described(others, verb)}" for verb, others in found.items() if others]


def _described(others: Sequence[tuple[str, float, float, str]], verb: str) -> str:
    """Names with differences and p-values; of many that nothing follows for, the names and the range."""
    if verb == UNDECIDED and len(others) > _NUMBERED:
        differences = [difference for _, difference, *_ in others]
        return (
            f"{listed([name for name, *_ in others])} (differences {min(differences):+.3f} to {max(differences):+.3f})"
        )
    texts = [
        f"{name} ({difference:+.3f}, p = {_p_text(p)}{f'; {note}' if note else ''})"
        for name, difference, p, note in others
    ]
    return listed(texts)


def _p_text(p: float) -> str:
    return f"{p:.2f}" if p >= 0.1 else f"{p:.2g}"
