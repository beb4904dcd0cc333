"""The tests by steering as the page shows them: the verdict in words, effects by strength, the matrix and the
comparisons.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd

from saelens_ext._files import json_safe
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.continuations.validation.methods import NOTHING, method_meaning
from saelens_ext.continuations.validation.results import OBJECTIVE_CONTROLS, Validation, combine_validations, outcome
from saelens_ext.continuations.validation.statistics import mean_effects
from saelens_ext.report.audit import wording as words
from saelens_ext.report.format import count, percentage

LEVEL = 0.05
"""Corrected p-values below it count."""
MEASURE, STATISTIC = "demeaned_logit", "slope"
"""What the verdict goes by."""
SPECIFIC = ("random_features", "wrong_cluster")
"""Directions that have nothing to do with a mode; its own must move its members more than these."""
ALL_MODES = -1


@dataclass(frozen=True)
class Verdict:
    """What the tests say, in words."""

    state: str
    """"supported", "partly" (it works, but so do directions that should not), "not_supported", "against" or
    "untested".
    """
    sentence: str
    """Was steering supported?"""
    objective: str = ""
    """Is the joint objective what makes it work? Empty where that was not tested."""
    claim: list[str] = field(default_factory=list)
    """Every line of ``Validation.claim``."""


class Comparison(NamedTuple):
    """One line of the table of paired tests, formatted."""

    control: str
    meaning: str
    reference: str
    value: str
    difference: str
    interval: str
    p: str
    p_holm: str
    n: str
    outcome: str


class Cell(NamedTuple):
    """One cell of the specificity matrix."""

    value: str
    shade: str
    """Class of its colour: "heat-" with p or n for the sign and 1 to 5 for the size; empty for nothing."""
    is_own: bool


def verdict_of(audit: PrefixAudit) -> Verdict:
    """What the tests of one prefix say."""
    if audit.validation is None:
        return Verdict(
            "untested", f"Steering was not tested. {words.quoted(audit.not_validated) or 'No reason was recorded.'}"
        )
    return verdict(audit.validation)


def verdict(validation: Validation) -> Verdict:
    """What some tests say: whether steering moves held-out members, whether by its own direction alone, and whether
    the objective is why.
    """
    table = validation.summary()
    rows = table[(table["measure"] == MEASURE) & (table["statistic"] == STATISTIC)].set_index("control")
    claim = validation.claim(MEASURE, STATISTIC, level=LEVEL).splitlines()
    outcomes = {control: outcome(row, LEVEL) for control, row in rows.iterrows()}
    objective = _objective(outcomes)
    moved = outcomes[NOTHING]
    if moved == "untested":
        return Verdict(
            "untested", "Steering could not be judged: no held-out continuation has a direction.", objective, claim
        )
    change, figures, units = _figures(rows.loc[NOTHING])
    if moved == "same":
        sentence = (
            f"Not supported: steered along their own mode’s direction, {units} changed by {change} "
            "logits per unit of strength"
        )
        return Verdict(
            "not_supported", f"{sentence}, which is indistinguishable from none ({figures}).", objective, claim
        )
    verb = "rose" if moved == "above" else "fell"
    sentence = (
        f"steered along their own mode’s direction, {units} {verb} by "
        f"{change.lstrip('+' + words.MINUS)} logits per unit of strength ({figures})"
    )
    if moved == "below":
        return Verdict("against", f"No, it went the wrong way: {sentence}.", objective, claim)
    weak = {
        kind: [words.method_name(c) for c in SPECIFIC if outcomes.get(c, "untested") == kind]
        for kind in ("below", "same", "untested")
    }
    if not any(weak.values()):
        return Verdict(
            "supported",
            f"Supported: {sentence}, and more than along {_either(map(words.method_name, SPECIFIC))}.",
            objective,
            claim,
        )
    return Verdict("partly", f"Supported in part: {sentence}. But {_reservations(weak)}.", objective, claim)


def _figures(row: Any) -> tuple[str, str, str]:
    """The change, its interval and p-value, and what it is over."""
    decimals = words.interval_decimals(row["low"], row["high"], row["difference"])
    low, high = (words.fixed(row[name], decimals, plus=True) for name in ("low", "high"))
    figures = f"95% interval {low} to {high}, corrected p = {words.p_value(row['p_holm'])}"
    return words.fixed(row["difference"], decimals, plus=True), figures, _units(row["unit"], int(row["n_units"]))


def _reservations(weak: Mapping[str, list[str]]) -> str:
    """Which directions that should not work were not beaten."""
    parts = []
    if weak["below"]:
        parts.append(f"it was less than along {_either(weak['below'])}")
    if weak["same"]:
        parts.append(f"{'this is' if not parts else 'is'} indistinguishable from what {_either(weak['same'])} did")
    if weak["untested"]:
        parts.append(f"{'it was' if not parts else 'was'} not compared with {_either(weak['untested'])}")
    return ", and ".join(parts)


def _objective(outcomes: Mapping[str, str]) -> str:
    """Whether the joint objective is what makes directions work; agrees with ``Validation.claim``."""
    needed = {control: outcomes.get(control, "untested") for control in (NOTHING, *OBJECTIVE_CONTROLS)}
    failed = {
        kind: [words.method_name(c) for c, v in needed.items() if v == kind] for kind in ("same", "below", "untested")
    }
    if not any(failed.values()):
        return (
            "Clustering meaning and mechanism together is what makes the directions work, as far as "
            "these controls can say: they exceed every one of them."
        )
    names = {"same": "are indistinguishable from", "below": "fall short of", "untested": "were not compared with"}
    reasons = "; ".join(f"{names[kind]} {_either(which)}" for kind, which in failed.items() if which)
    return (
        "That clustering meaning and mechanism together is what makes the directions work is not "
        f"shown: their effects {reasons}."
    )


def _either(names: Iterable[str]) -> str:
    """Names in a row, with "or" before the last."""
    given = list(names)
    return given[0] if len(given) == 1 else f"{', '.join(given[:-1])} or {given[-1]}"


def joint_verdict(prefixes: Sequence[PrefixAudit]) -> Verdict | None:
    """What the tests of several prefixes say together; None where fewer than two have any."""
    found = [prefix.validation for prefix in prefixes if prefix.validation is not None]
    if len(found) < 2:
        return None
    try:
        return verdict(combine_validations(found))
    except ValueError as error:
        return Verdict("untested", f"The prefixes cannot be judged together: {words.quoted(str(error))}")


def _units(unit: str, n: int) -> str:
    names = {
        "member": ("one held-out continuation", "{} held-out continuations"),
        "prefix": ("the continuations of one prefix", "the continuations of {} prefixes"),
    }
    one, many = names.get(unit, (f"one {unit}", f"{{}} {unit}s"))
    return one if n == 1 else many.format(count(n))


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
    cells = {
        (row["measure"], int(row["cluster"]), row["method"], float(row["strength"])): [
            row[name] for name in ("change", "low", "high")
        ]
        for row in table.to_dict("records")
    }
    n = {(int(row["cluster"]), row["method"]): int(row["n_members"]) for row in table.to_dict("records")}
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
    largest, decimals = (float(finite.max()) if finite.size else 0.0) or 1.0, words.decimals_of(*finite.tolist())
    columns = [int(name) for name in matrix.columns]
    rows = [
        (
            int(name),
            [
                Cell(words.fixed(x, decimals, plus=True), _shade(x, largest), int(name) == column)
                for x, column in zip(row, columns)
            ],
        )
        for name, row in zip(matrix.index, values, strict=True)
    ]
    return columns, rows


def _shade(x: float, largest: float) -> str:
    if not math.isfinite(x) or abs(x) < largest / 50:
        return ""
    return f"heat-{'p' if x > 0 else 'n'}{min(5, 1 + int(5 * abs(x) / largest - 1e-9))}"


def specificity_sentence(validation: Validation) -> str:
    """How far the directions keep to their own modes."""
    table = validation.specificity_summary()
    row = table[table["measure"] == MEASURE].iloc[0]
    if not math.isfinite(row["others"]):
        return "Held-out members of one mode only were measured, so nothing can be said of other modes."
    own, others = (
        words.fixed(row[name], words.decimals_of(row["own"], row["others"]), plus=True) for name in ("own", "others")
    )
    return (
        f"On average a direction changed its own mode by {own} logits and another by {others}; "
        f"{_of(row, 'own_is_largest_of_cluster')} modes are moved most by their own direction, and "
        f"{_of(row, 'own_is_largest_of_direction')} directions move their own mode most."
    )


def _of(row: Any, name: str) -> str:
    n = int(row["n_clusters"])
    return f"{count(round(float(row[name]) * n))} of {count(n)}"


# --- the comparisons ---


def comparisons(validation: Validation) -> list[tuple[str, str, list[Comparison]]]:
    """For each measure and statistic a heading, its key and its lines; the one that the verdict goes by comes first."""
    found = []
    for (measure, statistic), rows in _groups(validation.summary()):
        named = words.measure_name(measure)
        heading = f"{words.STATISTICS.get(statistic, statistic)} of {named.name}".capitalize()
        unit = _unit_of(statistic, named.unit)
        found.append(
            (
                f"{heading}{f', {unit}' if unit else ''}",
                f"{measure}/{statistic}",
                [_comparison(row) for row in rows.itertuples()],
            )
        )
    return sorted(found, key=lambda group: group[1] != f"{MEASURE}/{STATISTIC}")


def _groups(table: pd.DataFrame) -> Iterable[tuple[tuple[str, str], pd.DataFrame]]:
    return cast(Any, table.groupby(["measure", "statistic"], sort=False))


def _unit_of(statistic: str, unit: str) -> str:
    if statistic == "slope":
        return f"{unit} per unit of strength"
    return unit if statistic == "change" else ""


_OUTCOMES = {
    "untested": "not tested",
    "same": "no difference detected",
    "above": "own mode exceeds it",
    "below": "own mode falls short",
}


def _comparison(row: Any) -> Comparison:
    shown = _OUTCOMES[outcome(row, LEVEL)]
    decimals = words.interval_decimals(row.low, row.high, row.reference, row.control_value)
    low, high, difference = (words.fixed(x, decimals, plus=True) for x in (row.low, row.high, row.difference))
    if row.n_units and row.low == row.high == row.difference == 0:
        low = high = difference = "0"
        shown = "no difference at all"
    return Comparison(
        control=words.method_name(row.control),
        meaning=method_meaning(row.control),
        reference=words.fixed(row.reference, decimals, plus=True),
        value=words.fixed(row.control_value, decimals, plus=True),
        difference=difference,
        interval=f"{low} to {high}" if row.n_units else words.NOTHING,
        p=words.p_value(row.p),
        p_holm=words.p_value(row.p_holm),
        n=count(int(row.n_units)),
        outcome=shown,
    )


class Generated(NamedTuple):
    """Open-ended samples under one direction."""

    method: str
    mode: str
    share: str
    unsteered: str
    n: str


def generated_rows(validation: Validation) -> list[Generated]:
    """Fractions of open-ended samples in a mode, steered along its own direction and not steered."""
    own = validation.generations
    own = own[own["method"] == "joint"] if len(own) else own
    return [
        Generated(
            words.method_name(row["method"]),
            str(int(row["cluster"])),
            percentage(row["share"]),
            percentage(row["unsteered"]),
            count(int(row["n"])),
        )
        for row in own.to_dict("records")
    ]
