"""A claim is made where there is a difference, and not where there is none."""

from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

from saelens_ext.evals.evidence import Evidence, Failure
from saelens_ext.ops.resampling import paired_units
from saelens_ext.ops.statistics import holm

KINDS = {"ours": "unsupervised", "theirs": "unsupervised", "coreset": "control", "probe": "supervised"}


class Found(Evidence):
    kind: ClassVar[str] = "found"
    question: ClassVar[str] = "Which finds more?"
    unit: ClassVar[str] = "concept"
    groups: ClassVar[tuple[str, ...]] = ("rule",)
    metrics: ClassVar[dict[str, str]] = {"score": "mean score", "extra": "another metric"}
    chance: ClassVar[float | None] = 0.5
    bounds: ClassVar[tuple[float, float]] = (0, 1)


class Ungrouped(Evidence):
    kind: ClassVar[str] = "ungrouped"


def cells(n_units, effects, *, seed=0, rules=("a",), spread=0.05, methods=KINDS):
    generator = np.random.default_rng(seed)
    rows = []
    for rule in rules:
        for number in range(n_units):
            shared = generator.normal(0.5, 0.1)
            for method in methods:
                for split in range(2):
                    value = shared + effects.get(method, 0) + generator.normal(0, spread)
                    rows.append((f"concept {number}", rule, method, "score", value, split))
    return pd.DataFrame(rows, columns=["concept", "rule", "method", "metric", "value", "split"])


def found(n_units=24, effects=None, **options):
    return Found(cells=cells(n_units, effects or {}, **options), kinds=dict(KINDS))


def test_a_unit_is_the_mean_of_its_finer_rows():
    evidence = found(8, rules=("a", "b"))
    table = evidence.per_unit()
    assert list(table.columns) == list(KINDS) and len(table) == 16
    own = evidence.cells.query("rule == 'b' and concept == 'concept 3' and method == 'ours'")["value"]
    assert len(own) == 2 and table.loc[("b", "concept 3"), "ours"] == pytest.approx(own.mean())
    summary = evidence.summary().set_index(["rule", "method"])
    assert summary.loc[("a", "ours"), "estimate"] == pytest.approx(table.loc["a"]["ours"].mean())
    assert (summary["n_units"] == 8).all() and (summary["low"] < summary["estimate"]).all()


def test_intervals_stay_within_what_a_metric_can_be():
    class Rates(Evidence):
        kind, unit, metrics = "rates", "concept", {"rate": "rate", "share": "share", "nats": "nats"}
        bounds, other_bounds = (0.0, 1.0), {"share": (0.0, 1.0)}

    values = [0.0, 0.0, 0.0, 1.0]
    rows = [(f"c{i}", "ours", name, value) for name in Rates.metrics for i, value in enumerate(values)]
    cells = pd.DataFrame(rows, columns=["concept", "method", "metric", "value"])
    low = (
        Rates(
            cells=cells,
            kinds={"ours": "unsupervised"},
        )
        .summary()
        .set_index("metric")["low"]
    )
    assert low["rate"] == low["share"] == 0 > low["nats"]


def test_comparisons_are_paired_and_corrected_over_all_rows():
    evidence = found(12, {"ours": 0.02}, rules=("a", "b"))
    table = evidence.comparisons()
    # Two subjects: each with the three others, the pair of them once; in both groups.
    assert len(table) == 2 * 5 and not {("theirs", "ours")} & set(zip(table["method"], table["other"]))
    np.testing.assert_allclose(table["p_holm"], holm(table["p"].to_numpy()))
    wide = evidence.per_unit().loc["b"]
    expected = paired_units(wide["ours"].to_numpy(), wide["probe"].to_numpy(), **evidence._resampling())
    row = table.query("rule == 'b' and method == 'ours' and other == 'probe'").iloc[0]
    assert tuple(row[list(expected._fields)]) == expected
    assert set(evidence.comparisons("coreset")["other"]) == {"ours", "theirs", "probe"}


def test_the_order_of_methods_changes_no_number():
    one, other = found(14, {"ours": 0.03}), found(14, {"ours": 0.03})
    other.kinds = dict(reversed(KINDS.items()))
    other.cells = other.cells.sample(frac=1, random_state=0)
    keys = ["rule", "metric", "method"]
    pd.testing.assert_frame_equal(*(e.summary().sort_values(keys, ignore_index=True) for e in (one, other)))
    ours, theirs = (e.comparisons("ours").sort_values("other", ignore_index=True) for e in (one, other))
    pd.testing.assert_frame_equal(ours, theirs)


def test_a_claim_can_go_either_way():
    claim = found(24, {"ours": 0.2, "probe": 0.4}).claim("ours")
    assert "Over 24 concepts (rule: a), ours (mean score 0." in claim and "95% interval 0." in claim
    assert "is above theirs (+0.2" in claim and "and coreset (+0.2" in claim
    assert "is below probe (-0." in claim and "cannot be told" not in claim
    nothing = found(24).claim("ours")
    assert "cannot be told from theirs" in nothing and "above" not in nothing and "below" not in nothing


def test_of_many_that_nothing_follows_for_the_verdict_gives_the_range_only():
    others = {f"control {i}": "control" for i in range(5)}
    table = cells(24, {"probe": 0.4}, rules=("a", "b"), methods={"ours": "", "probe": "", **others})
    evidence = Found(cells=table, kinds={"ours": "unsupervised", "probe": "supervised", **others})
    lines = evidence.verdict().splitlines()
    assert [line.split(", ours")[0] for line in lines] == ["Over 24 concepts (rule: a)", "Over 24 concepts (rule: b)"]
    rows = evidence.comparisons().query("rule == 'a' and other != 'probe'")["difference"]
    names = "control 0, control 1, control 2, control 3 and control 4"
    assert f"cannot be told from {names} (differences {rows.min():+.3f} to {rows.max():+.3f})." in lines[0]
    assert "is below probe (-0." in lines[0] and "p = " in lines[0]


@pytest.mark.slow
def test_claims_without_a_difference_are_as_rare_as_promised():
    false = 0
    for seed in range(120):
        evidence = found(10, seed=seed)
        evidence.settings["n_bootstrap"] = 2
        false += bool((evidence.comparisons("ours")["p_holm"] < 0.05).any())
    assert false / 120 < 0.09  # two standard errors above .05


def test_too_few_units_are_said_outright():
    with pytest.raises(ValueError, match=r"at least 6 concepts, got 5.*Evaluate more concepts"):
        found(5, {"ours": 0.5}).claim()
    assert "Too few concepts" in found(5, {"ours": 0.5}, spread=0).verdict()
    # Seven units could carry one comparison, and not twenty.
    assert "is above" in found(7, {"ours": 0.5}).verdict("ours")
    many = found(7, {"ours": 0.5}, rules=tuple("abcd")).claim()
    assert "Too few concepts for any claim: with 7 of them and 20 comparisons" in many and "0.31" in many


def test_missing_values_are_counted():
    evidence = found(12, {"ours": 0.2})
    evidence.cells.loc[evidence.cells.query("concept == 'concept 2' and method == 'probe'").index, "value"] = np.nan
    table = evidence.comparisons("ours").set_index("other")
    assert tuple(table.loc["probe", ["n_units", "n_undefined"]]) == (11, 1)
    assert tuple(table.loc["coreset", ["n_units", "n_undefined"]]) == (12, 0)


def test_one_method_alone_is_no_comparison():
    alone = Ungrouped(
        cells=pd.DataFrame({"unit": list("abcdef"), "method": "ours", "metric": "value", "value": np.arange(6.0)}),
        kinds={"ours": "unsupervised"},
    )
    assert "nothing can be compared" in alone.claim() and alone.comparisons().empty
    assert alone.summary()[["estimate", "n_units"]].to_numpy().tolist() == [[2.5, 6]]


def test_evidence_is_saved_whole(tmp_path):
    evidence = found(6, rules=("a", "b"))
    evidence.cells["chosen"] = [None, "region 3"] * (len(evidence.cells) // 2)
    evidence.cells["is_first"] = evidence.cells["split"] == 0
    evidence.cells.loc[3, "value"] = np.nan
    evidence.settings |= {"seed": 3, "ks": [1, 2]}
    evidence.descriptions = {"coreset": "as many activations"}
    evidence.failures = (Failure("theirs", "concept 9", "ValueError: no"),)
    evidence.save(tmp_path / "one")
    for kind in (Found, Evidence):
        loaded = kind.load(tmp_path / "one")
        assert type(loaded) is Found and loaded.failures == evidence.failures
        pd.testing.assert_frame_equal(loaded.cells, evidence.cells, check_dtype=True)
        assert (loaded.kinds, loaded.settings, loaded.descriptions) == (
            evidence.kinds,
            evidence.settings,
            evidence.descriptions,
        )
        assert loaded.verdict() == evidence.verdict()
    with pytest.raises(ValueError, match="not a ungrouped evidence"):
        Ungrouped.load(tmp_path / "one")


def test_a_section_shows_it():
    evidence = found(12, {"ours": 0.2}, rules=("a", "b"))
    evidence.failures = (Failure("", "concept 9", "no sentence"), Failure("theirs", "concept 9", "no sentence"))
    section = evidence.section()
    assert section.verdict == evidence.verdict() and section.question == "Which finds more?"
    assert [(row.group, row.label, row.kind) for row in section.forest.rows[:2]] == [
        ("rule: a", "ours", "unsupervised"),
        ("rule: a", "theirs", "unsupervised"),
    ]
    assert len(section.forest.rows) == 8 and section.forest.chance == 0.5
    assert all(len(row) == len(table.columns) for table in section.tables for row in table.rows)
    assert section.tables[0].columns == ("rule", "method", "score")
    summary = evidence.summary(metric="score")
    assert [list(row) for row in section.tables[0].rows] == summary[["rule", "method", "estimate"]].values.tolist()
    assert section.tables[0].note == "Means over concepts. score: mean score."
    assert section.failures == ("concept 9: no sentence", "theirs on concept 9: no sentence")


def test_what_is_refused():
    with pytest.raises(ValueError, match="cells lacks the columns rule"):
        Found(cells=cells(3, {}).drop(columns="rule"), kinds=KINDS)
    with pytest.raises(ValueError, match="kinds must give one of"):
        Found(cells=cells(3, {}), kinds={"ours": "unsupervised"})
    with pytest.raises(ValueError, match="reference must be one of.*'our'.*Did you mean 'ours'"):
        found(6).claim("our")
    with pytest.raises(ValueError, match="metric must be one of 'score', 'extra', got 'scores'"):
        found(6).comparisons(metric="scores")
