"""Intervals and tests, against scipy's and against counting by hand."""

import numpy as np
import pytest
from scipy import stats

from saelens_ext.ops.statistics import (
    bootstrap_interval,
    holm,
    one_size_sign_flip_p_value,
    rank_correlation,
    sign_flip_p_value,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_holm_against_its_definition():
    generator = rng()
    for _ in range(50):
        p = np.round(generator.uniform(size=generator.integers(1, 9)) ** 2, 2)
        order = sorted(range(len(p)), key=lambda i: p[i])
        expected, worst = [0.0] * len(p), 0.0
        for step, i in enumerate(order):
            worst = max(worst, (len(p) - step) * p[i])
            expected[i] = min(1.0, worst)
        np.testing.assert_allclose(holm(p), expected)
        # A step-down method rejects no less than Bonferroni's, and no more than a control of the false discovery rate.
        assert (holm(p) <= np.minimum(1, len(p) * p) + 1e-12).all()
        assert (holm(p) >= stats.false_discovery_control(p) - 1e-12).all()


def test_holm_leaves_out_tests_that_were_not_made():
    np.testing.assert_allclose(holm(np.array([0.04, np.nan, 0.01])), [0.04, np.nan, 0.02])
    assert np.isnan(holm(np.array([np.nan]))).all() and len(holm(np.array([]))) == 0


@pytest.mark.parametrize("n", [2, 5, 9])
def test_exact_sign_flips_are_those_of_scipy(n):
    for seed in range(5):
        differences = rng(seed).normal(0.5, 1, size=n)
        options = {"permutation_type": "samples", "n_resamples": np.inf, "alternative": "two-sided"}
        # scipy doubles the smaller tail, which for a mean of symmetric flips is the same.
        expected = stats.permutation_test((differences, np.zeros(n)), lambda x, y: np.mean(x - y), **options).pvalue
        assert sign_flip_p_value(differences, 1000, rng()) == pytest.approx(expected)


def test_drawn_sign_flips_approach_the_exact_ones_and_are_never_zero():
    differences = rng(3).normal(0.4, 1, size=12)
    exact = sign_flip_p_value(differences, 2**12, rng())
    assert sign_flip_p_value(differences, 2**12 - 1, rng()) == pytest.approx(exact, abs=0.02)
    assert sign_flip_p_value(np.ones(40), 999, rng()) == 1 / 1000
    assert sign_flip_p_value(np.zeros(40), 999, rng()) == 1.0
    assert np.isnan(sign_flip_p_value(np.zeros(0), 999, rng()))
    assert [sign_flip_p_value(np.array([x]), 999, rng()) for x in (-0.3, 0.0, 2.0)] == [1.0, 1.0, 1.0]


def test_sign_flips_reject_at_their_level_without_a_difference():
    generator = rng(1)
    p = [sign_flip_p_value(generator.standard_t(2, size=20), 500, generator) for _ in range(400)]
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.08


def test_bootstrap_intervals_are_those_of_scipy():
    values = rng(4).lognormal(size=60)
    low, high = bootstrap_interval(values, 20000, rng(), confidence=0.9)
    options = {"confidence_level": 0.9, "method": "percentile", "n_resamples": 20000, "rng": rng(1)}
    expected = stats.bootstrap((values,), np.mean, **options).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=0.02)


def test_strata_are_resampled_within_themselves():
    values, strata = np.array([0.0] * 10 + [9.0] * 10), np.repeat([0, 1], 10)
    assert bootstrap_interval(values, 500, rng(), strata=strata) == (4.5, 4.5)
    low, high = bootstrap_interval(values, 500, rng())
    assert low < 4 and high > 5
    assert np.isnan(bootstrap_interval(values[:1], 500, rng())).all()


@pytest.mark.parametrize("values", [[1, 1, -1, 0, 1, 1, 1, 0], [-0.5] * 9, [0, 0, 2], [1, -1]])
def test_sign_flips_of_one_size_are_exact(values):
    differences = np.array(values, dtype=np.float64)
    expected = sign_flip_p_value(differences, 2**10, rng())
    assert one_size_sign_flip_p_value(differences) == pytest.approx(expected)


def test_sign_flips_of_one_size_have_no_floor_and_no_answer_for_other_sizes():
    assert one_size_sign_flip_p_value(np.ones(60)) == pytest.approx(2.0**-59)
    assert one_size_sign_flip_p_value(np.zeros(3)) == 1.0
    assert np.isnan(one_size_sign_flip_p_value(np.array([1.0, 0.5])))
    assert np.isnan(one_size_sign_flip_p_value(np.zeros(0)))


def test_rank_correlation_equals_scipy():
    generator = np.random.default_rng(0)
    for n in (2, 5, 40):
        first, second = generator.integers(0, 6, (2, n)).astype(np.float64) + np.arange(n) * 0.5
        assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second)[0])
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0))) and np.isnan(rank_correlation(np.ones(1), np.ones(1)))
