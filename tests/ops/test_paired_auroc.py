"""AUROCs over documents against double loops, and the exchange test against exchanging for real."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from saelens_ext.ops.paired_auroc import (
    ScoredDocuments,
    bootstrap_weights,
    document_wins,
    exchange_contributions,
    resampled_auroc,
    resampled_fraction_above,
    resampled_thresholds,
    sign_flip_p_values,
)
from saelens_ext.ops.statistics import sign_flip_p_value


def scored(sizes, generator, shift=0.0, step=0.5):
    """Scores with many ties."""
    sizes = np.asarray(sizes)
    return ScoredDocuments(np.round((generator.normal(size=sizes.sum()) + shift) / step) * step, sizes)


def parts(documents):
    return np.split(documents.scores, documents.starts[1:])


def auroc(outside, inside):
    truth = np.r_[np.ones(len(outside.scores)), np.zeros(len(inside.scores))]
    return roc_auc_score(truth, np.r_[outside.scores, inside.scores])


@pytest.fixture
def sets():
    generator = np.random.default_rng(0)
    return scored([3, 1, 7, 2], generator, shift=0.6), scored([2, 5, 1], generator)


@pytest.mark.parametrize("block", [1, 30, 2**21])
def test_wins_are_those_of_a_double_loop(sets, block, monkeypatch):
    monkeypatch.setattr("saelens_ext.ops.paired_auroc._ENTRIES_PER_BLOCK", block)
    outside, inside = sets
    expected = [
        [sum((a > b) + (a == b) / 2 for a, b in itertools.product(first, second)) for second in parts(inside)]
        for first in parts(outside)
    ]
    assert np.array_equal(document_wins(outside, inside), expected)


def test_each_document_once_gives_the_auroc_and_a_resample_that_of_its_documents(sets):
    outside, inside = sets
    wins, sizes = document_wins(outside, inside), (outside.sizes, inside.sizes)
    w, v = np.array([[1.0, 1, 1, 1], [2, 0, 1, 1]]), np.array([[1.0, 1, 1], [0, 3, 0]])
    found = resampled_auroc(wins, sizes, (w, v))
    assert found[0] == pytest.approx(auroc(outside, inside), abs=1e-12)
    drawn = [np.concatenate([parts(outside)[i] for i in (0, 0, 2, 3)]), np.tile(parts(inside)[1], 3)]
    again = [ScoredDocuments(scores, np.array([len(scores)])) for scores in drawn]
    assert found[1] == pytest.approx(auroc(*again), abs=1e-12)


def test_contributions_change_sign_when_a_documents_scores_are_exchanged():
    generator = np.random.default_rng(1)
    sizes = [3, 1, 4], [2, 5]
    first, second = (tuple(scored(each, generator, shift=s) for each in sizes) for s in (0.3, 0.0))
    contributions = exchange_contributions(first, second)
    assert contributions.sum() == pytest.approx(auroc(*first) - auroc(*second), abs=1e-12)
    ranks = [[ScoredDocuments(r, d.sizes) for r, d in zip(_ranks(pair), pair)] for pair in (first, second)]
    for signs in itertools.product((1, -1), repeat=5):
        exchanged = [
            [
                np.concatenate([parts(ranks[which if sign > 0 else 1 - which][side])[i] for i, sign in enumerate(own)])
                for side, own in enumerate((signs[:3], signs[3:]))
            ]
            for which in (0, 1)
        ]
        areas = [auroc(*(ScoredDocuments(x, np.asarray(n)) for x, n in zip(pair, sizes))) for pair in exchanged]
        assert np.dot(signs, contributions) == pytest.approx(areas[0] - areas[1], abs=1e-12)


def _ranks(pair):
    from scipy.stats import rankdata

    ranks = rankdata(np.r_[pair[0].scores, pair[1].scores])
    return ranks[: len(pair[0].scores)], ranks[len(pair[0].scores) :]


def test_a_score_differs_from_itself_by_exactly_nothing(sets):
    assert not exchange_contributions(sets, sets).any()
    with pytest.raises(ValueError, match="same documents; got 4 and 3"):
        exchange_contributions(sets, sets[::-1])


@pytest.mark.parametrize("block", [1, 2**21])
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_thresholds_and_what_exceeds_them_are_those_of_the_resampled_scores(sets, rate, block, monkeypatch):
    monkeypatch.setattr("saelens_ext.ops.paired_auroc._ENTRIES_PER_BLOCK", block)
    outside, inside = sets
    generator = np.random.default_rng(2)
    w, v = (bootstrap_weights(len(d.sizes), 40, generator) for d in sets)
    assert (w.sum(axis=1) == 4).all() and (v.sum(axis=1) == 3).all()
    thresholds = resampled_thresholds(inside, rate, v)
    found = resampled_fraction_above(outside, thresholds, w)
    for row in range(40):
        low = np.concatenate([np.tile(part, int(n)) for part, n in zip(parts(inside), v[row])])
        high = np.concatenate([np.tile(part, int(n)) for part, n in zip(parts(outside), w[row])])
        allowed = [t for t in inside.scores if (low > t).mean() <= rate]
        assert thresholds[row] == min(allowed)
        assert (low > thresholds[row]).mean() <= rate
        assert found[row] == pytest.approx((high > thresholds[row]).mean(), abs=1e-12)


@pytest.mark.slow
def test_thresholds_of_many_scores_are_looked_for_among_the_highest_first():
    generator = np.random.default_rng(3)
    inside = scored([500] * 20, generator, step=1e-3)
    weights = bootstrap_weights(20, 30, generator)
    # One document holds all of the highest scores; where it is drawn often, the threshold lies far down.
    inside.scores[:500] += 10
    weights[0] = np.eye(20)[0] * 20
    found = resampled_thresholds(inside, 0.01, weights)
    for row, threshold in zip(weights, found):
        drawn = np.concatenate([np.tile(part, int(n)) for part, n in zip(parts(inside), row)])
        allowed = [t for t in np.unique(inside.scores) if (drawn > t).mean() <= 0.01]
        assert threshold == min(allowed)


def test_flipped_signs_are_those_of_the_test_for_one_difference():
    generator = np.random.default_rng(4)
    contributions = generator.normal(size=(3, 12)) + np.array([[0.0], [0.6], [2.0]])
    found = sign_flip_p_values(contributions, 40_000, generator)
    exact = [sign_flip_p_value(row, 2**12, generator) for row in contributions]
    assert np.allclose(found, exact, atol=0.01) and found[2] < 0.01 < found[0]
    assert sign_flip_p_values(np.zeros((1, 5)), 100, generator)[0] == 1


def test_means_and_what_is_refused():
    documents = ScoredDocuments(np.array([1.0, 3.0, 5.0]), np.array([2, 1]))
    assert documents.means().scores.tolist() == [2.0, 5.0] and documents.means().sizes.tolist() == [1, 1]
    with pytest.raises(ValueError, match="add up to the 3 scores"):
        ScoredDocuments(np.zeros(3), np.array([2, 2]))
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        ScoredDocuments(np.array([0.0, np.nan]), np.array([2]))
