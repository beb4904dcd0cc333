"""What an audit found, in words that follow from all of its evidence.

Five questions, in order: does steering move continuations; does each mode's own direction move it most; does that need
the joint clustering; are the modes stable; are they larger than the smallest size allowed. Each has an answer with its
figures, and the whole is worth no more than the weakest of them.

Corrected p-values below `LEVEL` count. They are those of one measure and one statistic, the slope of the mean demeaned
logit over the strength, which is the published score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from saelens_ext.continuations.validation.figures import counted, fixed, interval_decimals, listed, p_value
from saelens_ext.continuations.validation.methods import NOTHING, method_name

MEASURE, STATISTIC, LEVEL = "demeaned_logit", "slope", 0.05
OBJECTIVE_CONTROLS = ("semantic", "attribution", "random_partition", "global", "single_member")
"""What the modes' directions must exceed, if the joint clustering is needed."""
ANSWERS = {"yes": "Yes", "partly": "In part", "untested": "Open", "no": "No", "against": "The wrong way"}
"""The strongest first, with what each is called; "against": steering moves continuations the wrong way."""
STABLE, PARTLY_STABLE = 0.8, 0.65
"""Adjusted Rand indices that count as good and as moderate recovery (Steinley 2004, Psychological Methods 9)."""

_QUESTIONS = {
    "moves": "Does steering move the continuations?",
    "by_mode": "Is each mode moved most by its own direction?",
    "joint": "Is the joint clustering needed?",
    "stability": "Are the modes stable?",
    "sizes": "Are the modes larger than the smallest size allowed?",
}


@dataclass(frozen=True)
class Finding:
    """The answer to one of the questions."""

    key: str
    """"moves", "by_mode", "joint", "stability" or "sizes"."""
    answer: str
    """One of `ANSWERS`."""
    words: str
    """The answer as a part of the headline."""
    evidence: str
    """The figures behind it, in whole sentences."""

    @property
    def question(self) -> str:
        """What it answers."""
        return _QUESTIONS[self.key]

    @property
    def said(self) -> str:
        """The answer as a reader sees it."""
        return ANSWERS[self.answer]


@dataclass(frozen=True)
class Verdict:
    """All findings of an audit."""

    findings: tuple[Finding, ...]
    """In the order of the questions."""

    def __getitem__(self, key: str) -> Finding:
        return next(finding for finding in self.findings if finding.key == key)

    @property
    def answer(self) -> str:
        """The weakest of the answers, one of `ANSWERS`: "yes" only where all of them are."""
        return max((finding.answer for finding in self.findings), key=list(ANSWERS).index)

    @property
    def headline(self) -> str:
        """What was found, from all findings, in three sentences at most."""
        moves, by_mode, joint, stability, sizes = (self[key].words for key in _QUESTIONS)
        modes = f"The modes {stability}, and {sizes}."
        if self["moves"].answer == "untested":
            return f"{moves}. {modes}"
        if self["moves"].answer == "partly":
            start = f"{moves}. {by_mode[0].upper()}{by_mode[1:]}"
        else:
            but = self["moves"].answer == "yes" and self["by_mode"].answer in ("no", "untested")
            start = f"{moves}, {'but ' if but else ''}{by_mode}"
        return f"{start}. The joint clustering {joint}. {modes}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        names = ("key", "question", "answer", "evidence")
        findings = [{name: getattr(finding, name) for name in names} for finding in self.findings]
        return {"answer": self.answer, "headline": self.headline, "findings": findings}

    def __str__(self) -> str:
        lines = (f"- {one.question} {one.said}. {one.evidence}" for one in self.findings)
        return "\n".join([self.headline, *lines])


def outcome(row: Any, level: float = LEVEL) -> str:
    """Of one row of ``Validation.summary``: "above" or "below" the control, "same", or "untested"."""
    if not row.n_units:
        return "untested"
    if not row.p_holm < level:
        return "same"
    return "above" if row.difference > 0 else "below"


def untested(reason: str, words: str = "Steering was not tested") -> tuple[Finding, ...]:
    """The first three findings where steering was not tested, or on too few continuations."""
    return (
        Finding("moves", "untested", words, reason),
        Finding("by_mode", "untested", "", f"{words}."),
        Finding("joint", "untested", "was not tested", f"{words}."),
    )


def steering_findings(summary: pd.DataFrame, specificity: pd.DataFrame, strength: float) -> tuple[Finding, ...]:
    """The first three findings, from ``Validation.summary`` and ``specificity_summary`` at a strength."""
    of_slope = (summary["measure"] == MEASURE) & (summary["statistic"] == STATISTIC)
    rows = {str(row.control): row for row in summary[of_slope].itertuples()}
    outcomes = {control: outcome(row) for control, row in rows.items()}
    moves = _moves(rows, outcomes)
    if moves.answer == "untested":
        return untested(moves.evidence, moves.words)
    table = specificity[specificity["measure"] == MEASURE].dropna(subset=["others"])
    return moves, _by_mode(table, strength, rows, outcomes), _joint(rows, outcomes)


# --- does steering move continuations? ---


def _moves(rows: Mapping[str, Any], outcomes: Mapping[str, str]) -> Finding:
    row, moved = rows[NOTHING], outcomes[NOTHING]
    if moved == "untested":
        return Finding("moves", "untested", "Steering could not be tested", "No held-out continuation has a direction.")
    too_few = smallest_p(rows.values())
    if moved == "same" and too_few >= LEVEL:
        evidence = f"With {_units(row)} no corrected p-value can fall below {too_few:.2g}: too few to detect a change."
        return Finding("moves", "untested", "Steering was tested on too few continuations to tell", evidence)
    change, figures = _change(row)
    steered = f"Steered along their own mode’s direction, {_units(row)}"
    if moved == "same":
        evidence = f"{steered} changed by {change} logits per unit of strength, not distinguishable from 0 ({figures})."
        return Finding("moves", "no", "Steering is not shown to move the continuations", evidence)
    verb = "rose" if moved == "above" else "fell"
    evidence = f"{steered} {verb} by {change.lstrip('+−')} logits per unit of strength ({figures})"
    if moved == "below":
        return Finding("moves", "against", "Steering moves the continuations the wrong way", f"{evidence}.")
    random = outcomes.get("random_features", "untested")
    if random == "above":
        evidence = f"{evidence}, more than along random features ({_value(rows['random_features'])})."
        return Finding("moves", "yes", "Steering moves the continuations", evidence)
    but = {
        "same": "but not detectably more than random features do",
        "below": "but less than random features do",
        "untested": "and was not compared with random features",
    }[random]
    control = "" if random == "untested" else f" ({_value(rows['random_features'])})"
    return Finding("moves", "partly", f"Steering moves the continuations, {but}", f"{evidence}, {but}{control}.")


def smallest_p(rows: Any) -> float:
    """The smallest corrected p-value that flipping the signs of so few differences can give."""
    units = [int(row.n_units) for row in rows]
    return min(1.0, 2.0 ** (1 - max(units)) * sum(n > 0 for n in units))


def _change(row: Any) -> tuple[str, str]:
    decimals = interval_decimals(row.low, row.high, row.difference)
    low, high = (fixed(limit, decimals, plus=True) for limit in (row.low, row.high))
    figures = f"95% interval {low} to {high}, corrected p = {p_value(row.p_holm)}"
    return fixed(row.difference, decimals, plus=True), figures


def _units(row: Any) -> str:
    n = int(row.n_units)
    if row.unit == "prefix":
        return f"the continuations of {counted(n, 'prefix', 'prefixes')}, each prefix counting once,"
    return counted(n, "held-out continuation")


def _value(row: Any) -> str:
    """The control's own figure, as precise as the difference is known."""
    return fixed(row.control_value, interval_decimals(row.low, row.high, row.control_value), plus=True)


# --- is each mode moved most by its own direction? ---


def _by_mode(table: pd.DataFrame, strength: float, rows: Mapping[str, Any], outcomes: Mapping[str, str]) -> Finding:
    n = int(table["n_clusters"].sum())
    if not n:
        evidence = "Held-out members of one mode only were measured."
        return Finding("by_mode", "untested", "whether mode by mode could not be tested", evidence)
    sides = ("own_is_largest_of_cluster", "own_is_largest_of_direction")
    of_modes, of_directions = (round((table[side] * table["n_clusters"]).sum()) for side in sides)
    own, others = (np.average(table[name], weights=table["n_clusters"]) for name in ("own", "others"))
    decimals = interval_decimals(np.nan, np.nan, own, others)
    most = "is moved most by its own direction" if of_modes == 1 else "are moved most by their own direction"
    evidence = (
        f"{of_modes} of {counted(n, 'mode')} {most} (by chance {len(table)}), and {of_directions} of {n} directions "
        f"move their own mode most. At strength {strength:g}, each mode counting once, a direction changes its own "
        f"mode by {fixed(own, decimals, plus=True)} logits and another by {fixed(others, decimals, plus=True)}. "
        f"{_against_another(rows, outcomes)}"
    )
    count = f"all {counted(n, 'mode')} {most}" if of_modes == n else f"{of_modes} of {counted(n, 'mode')} {most}"
    wrong = outcomes.get("wrong_cluster", "untested")
    if outcomes[NOTHING] != "above":
        return Finding("by_mode", "no", "and so not mode by mode", evidence)
    if wrong == "below":
        return Finding("by_mode", "no", "not mode by mode: another mode’s direction moves them more", evidence)
    if 2 * of_modes <= n:
        return Finding("by_mode", "no", f"not mode by mode: {count}", evidence)
    if of_modes == n and wrong == "above":
        return Finding("by_mode", "yes", f"mode by mode: {count}", evidence)
    doubt = "" if wrong == "above" else ", and another mode’s direction is not shown to move them less"
    return Finding("by_mode", "partly", f"mode by mode in part: {count}{doubt}", evidence)


def _against_another(rows: Mapping[str, Any], outcomes: Mapping[str, str]) -> str:
    wrong = outcomes.get("wrong_cluster", "untested")
    if wrong == "untested":
        return "Own directions were not compared, continuation by continuation, with those of another mode."
    said = {"above": "less", "below": "more", "same": "not distinguishably less"}[wrong]
    row = rows["wrong_cluster"]
    return (
        f"Continuation by continuation, another mode’s direction changes them {said} ({_value(row)} per unit of "
        f"strength, corrected p = {p_value(row.p_holm)})."
    )


# --- is the joint clustering needed? ---


def joint_words(outcomes: Mapping[str, str], controls: Sequence[str] = OBJECTIVE_CONTROLS) -> tuple[str, str]:
    """Whether the joint clustering is needed, as an answer and as a predicate of "The joint clustering"."""
    if outcomes.get(NOTHING, "untested") in ("same", "below"):
        return "no", "is not shown to be needed: its directions are not shown to move continuations"
    kinds = {"same": "not detectably better than", "below": "worse than", "untested": "not compared with", "above": ""}
    by_outcome: dict[str, list[str]] = {kind: [] for kind in kinds}
    for control in controls:
        by_outcome[outcomes.get(control, "untested")].append(control)
    above = set(by_outcome.pop("above"))
    reasons = [f"{kinds[kind]} {listed(map(method_name, names))}" for kind, names in by_outcome.items() if names]
    because = ", ".join(reasons)
    if not reasons:
        return "yes", "is needed: every simpler way to choose directions moves them less"
    if "random_partition" in above and above & {"semantic", "attribution"}:
        return "partly", f"is needed in part: {because}"
    if not by_outcome["same"] + by_outcome["below"]:
        return "untested", f"was not tested in full: {because}"
    return "no", f"is not shown to be needed: {because}"


def _joint(rows: Mapping[str, Any], outcomes: Mapping[str, str]) -> Finding:
    answer, words = joint_words(outcomes)
    compared = [control for control in OBJECTIVE_CONTROLS if outcomes.get(control, "untested") != "untested"]
    if not compared:
        return Finding("joint", answer, words, "No control was compared.")
    said = {"above": "less", "below": "more", "same": "no difference shown"}
    tests = {c: f"{said[outcomes[c]]}, p = {p_value(rows[c].p_holm)}" for c in compared}
    parts = (f"{method_name(control)} {_value(rows[control])} ({test})" for control, test in tests.items())
    own = rows[NOTHING]
    value = fixed(own.reference, interval_decimals(own.low, own.high, own.reference), plus=True)
    evidence = f"Logits per unit of strength along own modes’ directions: {value}; along those of {'; '.join(parts)}."
    return Finding("joint", answer, words, evidence)


# --- the modes themselves ---


def stability_finding(stabilities: Sequence[tuple[float, float]]) -> Finding:
    """Whether the modes of resamples are the same: mean adjusted Rand index and error per prefix, or NaN."""
    known = [(mean, error) for mean, error in stabilities if np.isfinite(mean)]
    if not known:
        return Finding("stability", "untested", "were not tested for stability", "No bootstrap resample was clustered.")
    weakest = min(mean for mean, _ in known)
    answer = "yes" if weakest >= STABLE else "partly" if weakest >= PARTLY_STABLE else "no"
    if len(known) < len(stabilities) and answer == "yes":
        answer = "partly"
    figures = " to ".join(dict.fromkeys(f"{limit:.2f}" for limit in (weakest, max(mean for mean, _ in known))))
    word = {"yes": "stable", "partly": "moderately stable", "no": "unstable"}[answer]
    error = f" (standard error {known[0][1]:.2f})" if len(known) == 1 and np.isfinite(known[0][1]) else ""
    measured = f", for {len(known)} of {len(stabilities)} prefixes" if len(known) < len(stabilities) else ""
    evidence = (
        f"Adjusted Rand index with the modes of bootstrap resamples: {figures}{error}{measured}; 1 is the same modes "
        f"every time, 0 chance. From {STABLE:g} on it counts as stable, from {PARTLY_STABLE:g} on as moderately so."
    )
    return Finding("stability", answer, f"are {word} (adjusted Rand index {figures})", evidence)


def sizes_finding(at_floor: Sequence[bool] | np.ndarray, smallest: Sequence[int]) -> Finding:
    """Whether the modes' sizes are their own, or the least that the clustering may give them.

    ``at_floor`` says for each mode of every prefix whether it is no larger than ``smallest``, one number per prefix.
    """
    n, k = len(at_floor), int(np.sum(at_floor))
    if n == len(smallest):
        words = "there is one mode only" if n == 1 else "every prefix has one mode only"
        return Finding("sizes", "untested", words, f"{words[0].upper()}{words[1:]}, of all continuations.")
    floors = listed([str(size) for size in sorted(set(smallest))], "or")
    answer = "yes" if k == 0 else "partly" if 2 * k < n else "no"
    count = "none is" if k == 0 else f"{k} of {n} {'is' if k == 1 else 'are'}"
    fewest = f"{floors} continuation{'' if floors == '1' else 's'}, the fewest that a mode may have (min_cluster_size)"
    evidence = f"Every mode has more than {fewest}."
    if k:
        evidence = f"{k} of {counted(n, 'mode')} {'has' if k == 1 else 'have'} {fewest}."
        evidence += " Their size is that of the setting: without it, the clustering might not have such a mode."
    return Finding("sizes", answer, f"{count} as small as a mode may be", evidence)
