"""Dose-responses against scipy, and comparisons of methods on tables made by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from saelens_ext.continuations.validation.statistics import (
    cluster_statistics,
    compare_methods,
    dose_response,
    mean_effects,
    member_statistics,
    specificity_summary,
)

STRENGTHS = np.array([0.5, -1.0, 0.0, 1.0, -0.5])
COUNTS = {"n_bootstrap": 500, "n_permutations": 2000, "seed": 0}


def table(effects, *, prefix="p", joint=None):
    """A table of members from effects by method, each ``(S, n)`` over `STRENGTHS`; even and odd members are
    clusters.
    """
    found = []
    for method, values in effects.items():
        for row in range(values.shape[1]):
            cluster = row % 2 if joint is None else joint[row]
            for strength, change in zip(STRENGTHS, values[:, row]):
                found.append((prefix, method, row, cluster, cluster, strength, "demeaned_logit", change))
    names = ["prefix", "method", "row", "cluster", "joint_cluster", "strength", "measure", "change"]
    return pd.DataFrame(found, columns=names)


def test_dose_responses_are_those_of_scipy():
    effects = np.random.default_rng(0).normal(size=(5, 40)).round(1)
    found = dose_response(STRENGTHS, effects)
    order = np.argsort(STRENGTHS)
    assert any(len(np.unique(column)) < 5 for column in effects.T), "ties must occur"
    for i, f in enumerate(effects.T):
        assert found["pearson"][i] == pytest.approx(stats.pearsonr(STRENGTHS, f).statistic)
        assert found["spearman"][i] == pytest.approx(stats.spearmanr(STRENGTHS, f).statistic)
        assert found["slope"][i] == pytest.approx(stats.linregress(STRENGTHS, f).slope)
        steps = np.diff(f[order])
        assert found["monotonicity"][i] == pytest.approx(steps.sum() / np.abs(steps).sum())


def test_what_has_no_meaning_is_nan_and_not_zero():
    effects = np.stack([np.zeros(5), np.full(5, 2.0), 1e-6 * STRENGTHS, STRENGTHS, [np.nan, 1, 2, 3, 4]], axis=1)
    found = dose_response(STRENGTHS, effects)
    for name in ("pearson", "spearman", "monotonicity"):
        np.testing.assert_allclose(found[name], [np.nan, np.nan, np.nan, 1, np.nan], atol=1e-12)
    np.testing.assert_allclose(found["slope"], [0, 0, 1e-6, 1, np.nan], atol=1e-12)
    assert all(np.isnan(values).all() for values in dose_response([1.0], effects[:1]).values())


def test_statistics_by_member_and_by_cluster():
    effects = np.random.default_rng(1).normal(size=(5, 6))
    effects[:, 4] = np.nan
    members = table({"joint": effects})
    by_member = member_statistics(members).set_index("row")
    for row in range(6):
        expected = dose_response(STRENGTHS, effects[:, [row]])
        assert by_member.loc[row, "spearman"] == pytest.approx(expected["spearman"][0], nan_ok=True)
    by_cluster = cluster_statistics(members).set_index("cluster")
    expected = dose_response(
        STRENGTHS, np.stack([effects[:, [0, 2]].mean(axis=1), effects[:, 1::2].mean(axis=1)], axis=1)
    )
    np.testing.assert_allclose(by_cluster["pearson"], expected["pearson"])
    assert by_cluster["n_members"].tolist() == [2, 3]


def test_mean_effects_and_their_intervals():
    effects = np.random.default_rng(2).normal(size=(5, 6))
    effects[:, 5] = np.nan
    found = mean_effects(table({"joint": effects}), 500, 0)
    assert len(found) == 2 * 5
    one = found[(found["cluster"] == 1) & (found["strength"] == -1.0)].iloc[0]
    assert one["change"] == pytest.approx(effects[1, [1, 3]].mean()) and one["n_members"] == 2
    assert one["low"] == pytest.approx(effects[1, [1, 3]].min()) and one["high"] == pytest.approx(
        effects[1, [1, 3]].max()
    )


def test_one_prefix_is_compared_member_by_member():
    noise = np.random.default_rng(3).normal(size=(2, 12))
    # Members differ widely, the methods by 0.2 within each member: only a paired comparison sees it.
    slopes = 5 * noise[0]
    effects = {"joint": np.outer(STRENGTHS, slopes + 0.2), "other": np.outer(STRENGTHS, slopes)}
    effects["same"] = np.outer(STRENGTHS, slopes + 0.2 + 0.1 * (noise[1] - noise[1].mean()))
    effects["missing"] = np.where(np.arange(12) < 3, np.nan, effects["other"])
    found = compare_methods(table(effects), "joint", ["other", "same", "missing", "nothing"], **COUNTS)
    slope = found[found["statistic"] == "slope"].set_index("control")
    assert (slope["unit"] == "member").all()
    assert slope.loc["other", "difference"] == pytest.approx(0.2) and slope.loc["other", "low"] == pytest.approx(0.2)
    assert slope.loc["other", "p"] == pytest.approx(2 / 2**11, rel=1.1)
    assert slope.loc["same", "p"] > 0.05 and slope.loc["same", "low"] < 0 < slope.loc["same", "high"]
    assert slope.loc["missing", ["n_units", "n_undefined"]].tolist() == [9, 3]
    assert slope.loc["nothing", "difference"] == pytest.approx((slopes + 0.2).mean())
    assert (slope["p_holm"] >= slope["p"]).all() and slope.loc["other", "p_holm"] == pytest.approx(
        4 * slope.loc["other", "p"]
    )


def test_several_prefixes_are_compared_prefix_by_prefix():
    generator = np.random.default_rng(4)
    parts, differences = [], []
    for i in range(5):
        slopes = generator.normal(size=(2, 7))
        parts.append(table({m: np.outer(STRENGTHS, s) for m, s in zip(("joint", "other"), slopes)}, prefix=f"p{i}"))
        differences.append((slopes[0] - slopes[1]).mean())
    found = compare_methods(pd.concat(parts), "joint", ["other"], **COUNTS)
    slope = found[found["statistic"] == "slope"].iloc[0]
    assert slope["unit"] == "prefix" and slope["n_units"] == 5
    assert slope["difference"] == pytest.approx(np.mean(differences))
    flips = stats.permutation_test(
        (np.array(differences), np.zeros(5)),
        lambda x, y: np.mean(x - y),
        permutation_type="samples",
        n_resamples=np.inf,
    )
    assert slope["p"] == pytest.approx(flips.pvalue)
    assert slope["low"] < np.mean(differences) < slope["high"]


def test_undefined_statistics_are_counted():
    effects = {"joint": np.outer(STRENGTHS, np.ones(6)), "other": np.outer(STRENGTHS, [0, 0, 1, 1, 1, 1])}
    found = compare_methods(table(effects), "joint", ["other"], **COUNTS).set_index("statistic")
    assert found.loc["pearson", ["n_units", "n_undefined"]].tolist() == [4, 2]
    assert found.loc["pearson", "control_value"] == pytest.approx(1.0), "undefined ones count as neither 0 nor 1"
    assert found.loc["slope", ["n_units", "n_undefined"]].tolist() == [6, 0]


def test_specificity_of_a_matrix_made_by_hand():
    matrix = [[3.0, 1.0, 0.0], [1.0, 2.0, 4.0], [0.0, 0.0, 1.0]]
    cells = [("p", "m", i, j, matrix[i][j], 5) for i in range(3) for j in range(3)]
    frame = pd.DataFrame(cells, columns=["prefix", "measure", "direction", "cluster", "change", "n_members"])
    found = specificity_summary(frame).iloc[0]
    assert found["own"] == 2.0 and found["others"] == 1.0
    assert found["own_is_largest_of_cluster"] == pytest.approx(2 / 3)
    assert found["own_is_largest_of_direction"] == pytest.approx(2 / 3)
    alone = specificity_summary(frame[(frame["direction"] == 0) & (frame["cluster"] == 0)]).iloc[0]
    assert specificity_summary(frame.assign(change=-frame["change"]), sign=-1).iloc[0][
        "own_is_largest_of_cluster"
    ] == pytest.approx(2 / 3)
    # Directions that do the same are specific to nothing.
    same = specificity_summary(frame.assign(change=frame["cluster"] + 0.5)).iloc[0]
    assert same["own_is_largest_of_cluster"] == 0 and same["own_is_largest_of_direction"] == pytest.approx(1 / 3)
    assert alone["own"] == 3.0 and np.isnan(alone["others"]) and np.isnan(alone["own_is_largest_of_cluster"])
