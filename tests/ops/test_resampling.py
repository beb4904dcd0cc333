"""Intervals over units cover as often as they say, and tests equal counting by hand."""

import numpy as np
import pytest
from scipy import stats

from saelens_ext.ops.resampling import (
    Interval,
    monte_carlo_p,
    paired_units,
    smallest_p,
    tpr_at_fpr,
    unit_bootstrap,
    wilson_interval,
)
from saelens_ext.ops.statistics import bootstrap_interval, sign_flip_p_value


def rng(seed=0):
    return np.random.default_rng(seed)


def correlated_units(n_units, n_rows, generator):
    """Rows of variance 1 and mean 0 whose correlation within a unit is 1/2."""
    shared = generator.normal(size=(n_units, 1))
    return (shared + generator.normal(size=(n_units, n_rows))) / np.sqrt(2)


@pytest.mark.slow
@pytest.mark.parametrize("n_units", [10, 30, 100])
def test_an_interval_over_units_covers_and_one_over_rows_does_not(n_units):
    generator, by_unit, by_row, runs = rng(n_units), 0, 0, 800
    for _ in range(runs):
        rows = correlated_units(n_units, 8, generator)
        # The mean of rows of equally large units is the mean of the units' means.
        interval = unit_bootstrap(np.mean, rows.mean(axis=1), n_bootstrap=400, generator=generator)
        by_unit += interval.low <= 0 <= interval.high
        low, high = bootstrap_interval(rows.reshape(-1), 400, generator)
        by_row += low <= 0 <= high
    assert 0.92 < by_unit / runs < 0.98
    assert by_row / runs < 0.85


def test_rows_of_a_unit_stay_together():
    rows = list(correlated_units(40, 5, rng(1)))
    whole = unit_bootstrap(np.mean, rows, n_bootstrap=4000, generator=rng())
    means = unit_bootstrap(np.mean, np.array([row.mean() for row in rows]), n_bootstrap=4000, generator=rng())
    assert whole.n_units == 40 and whole.estimate == pytest.approx(np.mean(rows))
    assert (whole.low, whole.high) == pytest.approx((means.low, means.high), abs=0.03)

    def area(rows):  # rows of score and label
        up, down = rows[rows[:, 1] == 1, 0], rows[rows[:, 1] == 0, 0]
        return (up[:, None] > down).mean()

    units = [
        np.array([[score, label], [score + 0.1, label]]) for score, label in zip(rng(2).normal(size=40), [0, 1] * 20)
    ]
    found = unit_bootstrap(area, units, n_bootstrap=200, generator=rng(), strata=[0, 1] * 20, bounds=(0, 1))
    assert 0 <= found.low < found.estimate < found.high <= 1


def test_small_samples_are_stretched_to_students_interval():
    values = rng(5).normal(size=12)
    found = unit_bootstrap(np.mean, values, n_bootstrap=40_000, generator=rng())
    expected = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.06)
    narrow = bootstrap_interval(values, 40_000, rng())
    assert found.high - found.low > 1.1 * (narrow[1] - narrow[0])
    many = rng(6).normal(size=30)
    assert unit_bootstrap(np.mean, many, generator=rng())[1:3] == pytest.approx(bootstrap_interval(many, 2000, rng()))


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_units_have_no_interval(n):
    found = unit_bootstrap(np.mean, np.ones(n), generator=rng())
    assert found.estimate == 1 and np.isnan([found.low, found.high]).all() and found.n_units == n
    paired = paired_units(np.ones(n), np.zeros(n), generator=rng())
    assert paired.difference == 1 and np.isnan([paired.low, paired.high]).all()


def test_strata_keep_their_sizes():
    values, strata = np.array([0.0] * 20 + [9.0] * 20), ["a"] * 20 + ["b"] * 20
    assert unit_bootstrap(np.mean, values, generator=rng(), strata=strata) == Interval(4.5, 4.5, 4.5, 40)
    assert unit_bootstrap(np.max, values, generator=rng(), strata=strata) == Interval(9, 9, 9, 40)


def test_pairs_with_a_missing_value_are_counted_and_left_out():
    first, second = rng(7).normal(0.5, 1, size=15), rng(8).normal(size=15)
    first[3], second[4] = np.nan, np.nan
    kept = [unit for unit in range(15) if unit not in (3, 4)]
    found = paired_units(first, second, generator=rng())
    assert (found.n_units, found.n_undefined) == (13, 2)
    assert found.difference == pytest.approx((first - second)[kept].mean())
    assert found.p == pytest.approx(sign_flip_p_value((first - second)[kept], 10_000, rng()))
    nothing = paired_units(np.full(4, np.nan), np.zeros(4), generator=rng())
    assert np.isnan(nothing.p) and np.isnan(nothing.difference) and nothing.n_undefined == 4


@pytest.mark.parametrize("n", [2, 5, 6, 13, 20])
def test_the_smallest_p_is_that_of_equal_differences(n):
    assert smallest_p(n, 10_000) == pytest.approx(sign_flip_p_value(np.ones(n), 10_000, rng()), rel=0.35)
    assert smallest_p(n, 10_000, family=10) == min(1.0, 10 * smallest_p(n, 10_000))
    assert (smallest_p(n, 10_000) < 0.05) == (n >= 6)


@pytest.mark.parametrize(("k", "n"), [(0, 9), (3, 9), (9, 9), (17, 400)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_is_scipys_and_its_formula(k, n, confidence):
    found = wilson_interval(k, n, confidence=confidence)
    expected = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert found == pytest.approx((k / n, expected.low, expected.high, n))
    z = stats.norm.ppf((1 + confidence) / 2)
    centre, arm = (k / n + z**2 / (2 * n)), z * np.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    assert found[1:3] == pytest.approx(((centre - arm) / (1 + z**2 / n), (centre + arm) / (1 + z**2 / n)), abs=1e-12)


def test_wilson_without_trials():
    assert np.isnan(wilson_interval(0, 0)[:3]).all()


def test_monte_carlo_p_counts_itself():
    null = np.array([-2.0, -1, 0, 1, 2, 3, 4, 5, 6])
    assert monte_carlo_p(7, null, side="greater") == 1 / 10
    assert monte_carlo_p(5, null, side="greater") == 3 / 10  # a tie is as extreme
    assert monte_carlo_p(5, null, side="less") == 9 / 10
    assert monte_carlo_p(5, null) == 6 / 10 and monte_carlo_p(2, null) == 1.0


def test_monte_carlo_p_is_uniform_under_the_null():
    generator = rng(9)
    p = np.array([monte_carlo_p(generator.normal(), generator.normal(size=99)) for _ in range(2000)])
    assert 0.035 < (p <= 0.05).mean() < 0.065 and 0.45 < (p <= 0.5).mean() < 0.55


def test_tpr_at_fpr_equals_brute_force_with_ties():
    generator = rng(10)
    for _ in range(200):
        inside, outside = generator.integers(0, 8, size=40) / 2, generator.integers(2, 11, size=30) / 2
        rate = generator.choice([0.025, 0.05, 0.1, 0.31, 0.5])
        found = tpr_at_fpr(outside, inside, rate)
        allowed = [t for t in np.unique(inside) if (inside > t).mean() <= rate + 1e-12]
        assert found.tpr == max((outside > t).mean() for t in allowed)
        assert found.fpr == (inside > found.threshold).mean() <= rate + 1e-12
        assert found.threshold == min(allowed)


def test_tpr_at_fpr_without_ties_reaches_its_rate():
    inside = np.arange(100.0)
    assert tpr_at_fpr(np.array([98.5, 3.0]), inside, 0.01) == (0.5, 0.01, 98.0)
    assert tpr_at_fpr(np.array([98.5]), inside, 0.29).fpr == 0.29  # 0.29 * 100 rounds below 29


BAD = {
    "unequal": (lambda: paired_units(np.zeros(3), np.zeros(4), generator=rng()), r"\(3,\) and \(4,\).*same order"),
    "infinite": (lambda: paired_units(np.full(3, np.inf), np.zeros(3), generator=rng()), "infinite.*finite"),
    "nan_unit": (lambda: unit_bootstrap(np.mean, np.array([1, np.nan, 2]), generator=rng()), "1 values.*place 1"),
    "no_unit": (lambda: unit_bootstrap(np.mean, [], generator=rng()), "units is empty"),
    "strata": (lambda: unit_bootstrap(np.mean, np.ones(3), generator=rng(), strata=[0]), "3 units and 1 strata"),
    "rate": (lambda: tpr_at_fpr(np.ones(5), np.ones(5), 0.1), "0.1 cannot.*5 inside.*at least 0.2.*more inside"),
    "rate_high": (lambda: tpr_at_fpr(np.ones(5), np.ones(5), 1.0), "below 1"),
    "nan_score": (lambda: tpr_at_fpr(np.array([np.nan]), np.ones(5), 0.5), "outside has 1 values"),
    "nothing_inside": (lambda: tpr_at_fpr(np.ones(5), np.ones(0), 0.5), "got 5 and 0"),
    "more_than_n": (lambda: wilson_interval(4, 3), "k=4 of n=3"),
    "no_null": (lambda: monte_carlo_p(1.0, np.ones(0)), "null is empty"),
    "nan_null": (lambda: monte_carlo_p(1.0, np.array([np.nan])), "null has 1"),
    "side": (lambda: monte_carlo_p(1.0, np.ones(3), side="left"), "side must be one of.*'left'"),
    "confidence": (lambda: unit_bootstrap(np.mean, np.ones(3), generator=rng(), confidence=95), "confidence.*95"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
