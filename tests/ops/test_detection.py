"""Laws of the statistics of concept detection, against slow or outside oracles."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from saelens_ext.ops import detection
from saelens_ext.ops.detection import LOG_RATIO_LIMIT, auroc, auroc_interval, log_ratio, standardised_difference


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Every combination of magnitudes and signs, zero included.
LEVELS = tensor(-40, -3, -1, -0.99, -0.02, -1e-4, 0, 1e-4, 0.02, 0.99, 1, 3, 40)
A, B = (grid.flatten() for grid in torch.meshgrid(LEVELS, LEVELS, indexing="ij"))


# --- the log ratio ---


def test_it_is_the_published_score_where_both_means_are_positive():
    a, b = normal(50).abs() + 0.01, normal(50, seed=1).abs() + 0.01
    assert torch.allclose(log_ratio(a, b), torch.log(a / b).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), rtol=1e-12)


def test_swapping_the_sets_changes_the_sign_only():
    assert torch.equal(log_ratio(A, B), -log_ratio(B, A))


def test_its_sign_says_which_mean_is_larger():
    assert torch.equal(torch.sign(log_ratio(A, B)), torch.sign(A - B))


def test_the_unit_of_the_score_does_not_matter():
    assert torch.allclose(log_ratio(A, B), log_ratio(7.3e-5 * A, 7.3e-5 * B), rtol=1e-9, atol=1e-9)


def test_it_rises_with_the_activating_and_falls_with_the_neutral_mean():
    table = log_ratio(A, B).reshape(len(LEVELS), len(LEVELS))
    assert (table.diff(dim=0) >= 0).all() and (table.diff(dim=1) <= 0).all()


def test_it_is_continuous_all_the_way_round_the_origin():
    angle = torch.linspace(0, 2 * math.pi, 200_001, dtype=torch.float64)
    steps = log_ratio(angle.cos(), angle.sin()).diff().abs()
    # A ratio within a thousand turns by at most a thousand times the angle.
    assert steps.max() <= 1000 * float(angle[1]) * 1.1


def test_no_mean_at_all_is_no_evidence_and_the_limit_is_the_limit():
    a, b = tensor(0, 1, 0, 1, -1, 5e9), tensor(0, 0, 1, -1, 1, 1)
    assert log_ratio(a, b, limit=2).tolist() == [0, 2, -2, 2, -2, 2]


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"limit": math.inf}])
def test_an_impossible_limit_is_refused(arguments):
    with pytest.raises(ValueError, match="limit"):
        log_ratio(tensor(1), tensor(2), **arguments)


def test_means_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="mean_neutral.*non-finite"):
        log_ratio(tensor(1), tensor(math.nan))


# --- separation ---


@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_the_area_is_sklearns_with_and_without_ties(monkeypatch, block):
    monkeypatch.setattr(detection, "_ENTRIES_PER_BLOCK", block)
    a, b = normal(9, 6) + 0.5, normal(14, 6, seed=1)
    a[:, 3:], b[:, 3:] = a[:, 3:].round(), b[:, 3:].relu()
    labels = np.r_[np.ones(9), np.zeros(14)]
    expected = [roc_auc_score(labels, column) for column in torch.cat([a, b]).numpy().T]
    assert np.allclose(auroc(a, b), expected, atol=1e-12)
    assert torch.allclose(auroc(b, a), 1 - auroc(a, b), atol=1e-12)


def test_constant_scores_separate_nothing():
    assert auroc(torch.zeros(3, 2), torch.zeros(5, 2)).tolist() == [0.5, 0.5]


def test_d_prime_by_hand_and_where_it_is_not_a_number():
    a, b = normal(8, 3), normal(5, 3, seed=1)
    by_hand = [
        (x.mean() - y.mean()) / math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2) for x, y in zip(a.numpy().T, b.numpy().T)
    ]
    assert np.allclose(standardised_difference(a, b), by_hand)
    assert torch.allclose(standardised_difference(b, a), -standardised_difference(a, b))
    assert standardised_difference(torch.ones(3, 1), torch.zeros(3, 1)).tolist() == [math.inf]
    assert standardised_difference(torch.ones(3, 1), torch.ones(4, 1)).tolist() == [0]
    assert standardised_difference(torch.ones(1, 2), torch.zeros(9, 2)).isnan().all()


@pytest.mark.parametrize("sizes", [(5, 5), (3, 40)])
def test_the_interval_ends_where_the_estimate_is_z_errors_off(sizes):
    p, q = sizes
    estimates = tensor(0.02, 0.3, 0.5, 0.81, 0.99)
    low, high = auroc_interval(estimates, p, q, confidence=0.9)

    def excess(u: float, estimate: float) -> float:
        n = (p + q) / 2
        variance = u * (1 - u) * (1 + (n - 1) * ((1 - u) / (2 - u) + u / (1 + u))) / (p * q)
        return abs(estimate - u) - norm.ppf(0.95) * math.sqrt(variance)

    for u, lower, upper in zip(estimates.tolist(), low.tolist(), high.tolist()):
        assert lower == pytest.approx(brentq(excess, 1e-12, u, args=(u,), xtol=1e-14), abs=1e-9)
        assert upper == pytest.approx(brentq(excess, u, 1 - 1e-12, args=(u,), xtol=1e-14), abs=1e-9)


def test_perfect_separation_of_few_sentences_leaves_room_for_doubt():
    low, high = auroc_interval(tensor(1, 0), 5, 5)
    assert 0.4 < low[0] < 0.7 and high[0] == 1
    assert low[1] == 0 and high[1] == pytest.approx(1 - float(low[0]))
    assert auroc_interval(tensor(1), 50, 50)[0] > 0.9


def test_the_interval_covers_as_often_as_it_says():
    # Normal scores whose means are 2.5 apart: the hard case, where many samples separate perfectly.
    a, b = normal(5, 4000) + 2.5, normal(5, 4000, seed=1)
    low, high = auroc_interval(auroc(a, b), 5, 5)
    truth = norm.cdf(2.5 / math.sqrt(2))
    assert 0.93 < ((low <= truth) & (truth <= high)).double().mean() < 0.98


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="0 activating and 2 neutral"):
        auroc(torch.zeros(0, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="non-finite"):
        auroc(torch.full((2, 1), math.nan), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="confidence"):
        auroc_interval(tensor(0.5), 3, 3, confidence=1.0)
