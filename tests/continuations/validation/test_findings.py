"""The verdict of an audit follows from all of its evidence, either way, and is no stronger than the weakest of it."""

import json

import numpy as np
import pandas as pd
import pytest

from saelens_ext.continuations.validation.findings import (
    ANSWERS,
    MEASURE,
    OBJECTIVE_CONTROLS,
    STATISTIC,
    Verdict,
    joint_words,
    sizes_finding,
    stability_finding,
    steering_findings,
    untested,
)
from saelens_ext.continuations.validation.methods import METHODS, NOTHING

CONTROLS = (NOTHING, *(method for method in METHODS if method != "joint"))
OWN = 0.1


def summary(values: dict[str, float] | None = None, *, own: float = OWN, n: int = 24, unit: str = "member"):
    """Own modes' directions at ``own`` against controls, at 0 unless named; differences above 0.01 are detected."""
    rows = []
    for control in CONTROLS:
        value = (values or {}).get(control, 0.0)
        missing = value is None
        difference = np.nan if missing else own - value
        rows.append(
            {
                "measure": MEASURE,
                "statistic": STATISTIC,
                "control": control,
                "unit": unit,
                "reference": own,
                "control_value": np.nan if missing else value,
                "difference": difference,
                "low": difference - 0.01,
                "high": difference + 0.01,
                "p": 0.001,
                "p_holm": 0.004 if abs(difference) > 0.01 else 0.9,
                "n_units": 0 if missing else n,
            }
        )
    return pd.DataFrame(rows)


def specificity(own_of_mode: int, n: int, prefixes: int = 1):
    row = {"prefix": "p", "measure": MEASURE, "n_clusters": n, "own": 0.1, "others": 0.09 if n > 1 else np.nan}
    row |= {"own_is_largest_of_cluster": own_of_mode / n, "own_is_largest_of_direction": own_of_mode / n}
    return pd.DataFrame([row] * prefixes)


def verdict(table=None, matrix=None, stability=0.9, at_floor=(False, False, False)):
    table, matrix = summary() if table is None else table, specificity(3, 3) if matrix is None else matrix
    found = steering_findings(table, matrix, 1.0)
    return Verdict((*found, stability_finding([(stability, 0.03)]), sizes_finding(at_floor, [6])))


def answers(found: Verdict) -> list[str]:
    return [finding.answer for finding in found.findings]


def test_the_case_that_was_called_supported():
    """1 of 7 modes moved most by its own direction, shuffled members as good, unstable, six modes at the floor."""
    table = summary({"random_partition": 0.101}, own=0.098)
    found = verdict(table, specificity(1, 7), 0.28, [False] + [True] * 6)
    assert answers(found) == ["yes", "no", "no", "no", "no"] and found.answer == "no"
    assert found.headline == (
        "Steering moves the continuations, but not mode by mode: 1 of 7 modes is moved most by its own direction. "
        "The joint clustering is not shown to be needed: not detectably better than shuffled members. "
        "The modes are unstable (adjusted Rand index 0.28), and 6 of 7 are as small as a mode may be."
    )
    assert "shuffled members +0.101 (no difference shown" in found["joint"].evidence
    assert "6 of 7 modes have 6 continuations, the fewest" in found["sizes"].evidence
    assert str(found).splitlines()[0] == found.headline and len(str(found).splitlines()) == 6


def test_only_evidence_without_a_gap_is_a_yes():
    found = verdict()
    assert answers(found) == ["yes"] * 5 and found.answer == "yes"
    assert "mode by mode: all 3 modes are moved most by their own direction" in found.headline
    assert "is needed: every simpler way to choose directions moves them less" in found.headline


WEAKER = [
    (
        "moves",
        {"table": summary({"random_features": OWN})},
        "partly",
        "but not detectably more than random features do",
    ),
    ("moves", {"table": summary({"random_features": 0.3})}, "partly", "but less than random features do"),
    ("moves", {"table": summary({"random_features": None})}, "partly", "was not compared with random features"),
    ("moves", {"table": summary(own=0.001)}, "no", "is not shown to move the continuations, and so not mode by mode"),
    ("moves", {"table": summary(own=-0.1)}, "against", "the wrong way"),
    ("by_mode", {"matrix": specificity(2, 3)}, "partly", "mode by mode in part: 2 of 3 modes are moved most"),
    ("by_mode", {"matrix": specificity(1, 2)}, "no", "not mode by mode: 1 of 2 modes is moved most"),
    ("by_mode", {"matrix": specificity(0, 3)}, "no", "not mode by mode: 0 of 3 modes are"),
    ("by_mode", {"table": summary({"wrong_cluster": OWN})}, "partly", "another mode’s direction is not shown to move"),
    ("by_mode", {"table": summary({"wrong_cluster": 0.2})}, "no", "another mode’s direction moves them more"),
    ("by_mode", {"matrix": specificity(1, 1)}, "untested", "whether mode by mode could not be tested"),
    (
        "joint",
        {"table": summary({"semantic": OWN})},
        "partly",
        "needed in part: not detectably better than modes by meaning alone",
    ),
    ("joint", {"table": summary({"attribution": 0.2})}, "partly", "worse than modes by mechanism alone"),
    ("joint", {"table": summary({"semantic": OWN, "attribution": OWN})}, "no", "is not shown to be needed"),
    ("joint", {"table": summary({"random_partition": OWN})}, "no", "not detectably better than shuffled members"),
    ("joint", {"table": summary(dict.fromkeys(OBJECTIVE_CONTROLS))}, "untested", "not compared with"),
    ("stability", {"stability": 0.7}, "partly", "are moderately stable"),
    ("stability", {"stability": 0.5}, "no", "are unstable"),
    ("stability", {"stability": float("nan")}, "untested", "were not tested for stability"),
    ("sizes", {"at_floor": [True, False, False]}, "partly", "1 of 3 is as small as a mode may be"),
    ("sizes", {"at_floor": [True, True, False]}, "no", "2 of 3 are as small"),
]


@pytest.mark.parametrize(("key", "change", "answer", "says"), WEAKER)
def test_one_weaker_finding_weakens_the_whole(key, change, answer, says):
    found = verdict(**change)
    assert found[key].answer == answer and says in found.headline
    assert list(ANSWERS).index(found.answer) >= list(ANSWERS).index(answer) > 0


@pytest.mark.parametrize("own", [0.001, -0.1])
def test_nothing_follows_from_modes_that_steering_does_not_move(own):
    found = verdict(summary(own=own))
    assert found["by_mode"].answer == found["joint"].answer == "no"
    assert "is needed" not in found.headline and "mode by mode: all" not in found.headline


def test_too_few_units_are_no_evidence_of_nothing():
    found = verdict(summary(own=0.001, n=5))
    assert found["moves"].answer == "untested" and "too few to detect" in found["moves"].evidence
    assert verdict(summary(own=0.001, n=12))["moves"].answer == "no"
    assert verdict(summary({control: None for control in CONTROLS}))["moves"].answer == "untested"


def test_prefixes_count_once_and_their_modes_are_summed():
    found = steering_findings(summary(unit="prefix"), specificity(2, 3, prefixes=4), 1.0)
    assert "24 prefixes, each prefix counting once" in found[0].evidence
    assert "8 of 12 modes are moved most by their own direction (by chance 4)" in found[1].evidence
    both = stability_finding([(0.9, 0.01), (0.4, 0.02)])
    assert both.answer == "no" and "0.40 to 0.90" in both.evidence
    assert stability_finding([(0.9, 0.01), (np.nan, np.nan)]).answer == "partly"


def test_a_verdict_is_json_and_agrees_with_its_parts():
    found = verdict()
    saved = json.loads(json.dumps(found.to_dict()))
    assert saved["answer"] == "yes" and [one["key"] for one in saved["findings"]] == [f.key for f in found.findings]
    assert joint_words({NOTHING: "above"} | dict.fromkeys(OBJECTIVE_CONTROLS, "above"))[0] == "yes"
    without = Verdict((*untested("Not asked for."), stability_finding([]), sizes_finding([False], [2])))
    assert without.headline.endswith("and there is one mode only.") and without["sizes"].answer == "untested"
    assert "every prefix has one mode only" in sizes_finding([False] * 3, [2, 2, 2]).words
    assert without.answer == "untested" and without.headline.startswith("Steering was not tested. ")
