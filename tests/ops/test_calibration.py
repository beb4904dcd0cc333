"""Percentiles of pairwise distances and their intervals, against numpy."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_ext.ops.calibration import (
    BIN_WIDTH,
    ThresholdEstimate,
    nearest_neighbour_thresholds,
    pairwise_distance_percentiles,
)
from saelens_ext.ops.leader_clustering import LeaderClustering
from saelens_ext.ops.spherical import unit_directions
from tests.ops import oracles

PERCENTILES = (1, 2, 4.5, 10, 50, 99)


def documents(
    n_documents: int, rows: int, d: int = 8, seed: int = 0, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions whose documents differ, and the document of each; documents have ``rows`` to ``2 * rows`` rows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(rows, 2 * rows + 1, (n_documents,), generator=generator)
    ids = torch.arange(n_documents).repeat_interleave(sizes)
    x = spread * torch.randn(n_documents, d, generator=generator)[ids] + torch.randn(len(ids), d, generator=generator)
    return unit_directions(x, torch.zeros(d))[0], ids


def thresholds(estimates: list[ThresholdEstimate]) -> list[float]:
    return [estimate.threshold for estimate in estimates]


def test_across_documents_equals_numpy() -> None:
    units, ids = documents(9, 20)
    distances = oracles.pairwise_distances(units.numpy(), lambda i, j: ids[i] != ids[j])
    estimates = pairwise_distance_percentiles(units, ids, PERCENTILES)
    np.testing.assert_allclose(
        thresholds(estimates), np.percentile(distances, PERCENTILES), rtol=0, atol=0.51 * BIN_WIDTH
    )
    assert [estimate.n_pairs for estimate in estimates] == [len(distances)] * len(PERCENTILES)
    assert [estimate.percentile for estimate in estimates] == list(PERCENTILES)


def test_many_rows_and_documents_longer_than_a_tile() -> None:
    units, ids = documents(3, 700, d=3)
    mask = ids[:, None] < ids[None]
    cosine = units.double() @ units.double().T
    expected = np.percentile((1 - cosine[mask]).clamp(0, 2).numpy(), PERCENTILES)
    np.testing.assert_allclose(
        thresholds(pairwise_distance_percentiles(units, ids, PERCENTILES)), expected, rtol=0, atol=BIN_WIDTH
    )


def test_the_order_of_rows_and_the_names_of_documents_do_not_matter() -> None:
    units, ids = documents(9, 20)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    shuffled = pairwise_distance_percentiles(units[order], 1000 - 7 * ids[order], PERCENTILES)
    expected = thresholds(pairwise_distance_percentiles(units, ids, PERCENTILES))
    np.testing.assert_allclose(thresholds(shuffled), expected, rtol=0, atol=BIN_WIDTH)


def test_pairs_within_documents_are_left_out() -> None:
    # Two documents of copies of one row each, at right angles.
    units, ids = torch.eye(4)[[0] * 30 + [1] * 30], torch.arange(2).repeat_interleave(30)
    (across,) = pairwise_distance_percentiles(units, ids, [1])
    assert (across.threshold, across.n_pairs) == (1.0, 900)
    (within,) = pairwise_distance_percentiles(
        units, ids, [1], calibration="within_batch", batch_ids=torch.zeros(60, dtype=torch.long)
    )
    assert within.threshold == 0


@pytest.mark.parametrize("percentiles", [PERCENTILES, (10,)])
def test_within_batch_is_the_mean_of_the_batches_percentiles(percentiles: tuple[float, ...]) -> None:
    units, ids = documents(9, 20)
    batches = torch.tensor([0, 0, 0, 0, 5, 5, 5, 2, 2])[ids]
    by_batch = [units[batches == batch].numpy() for batch in (0, 2, 5)]
    distances = [oracles.pairwise_distances(rows, lambda i, j: True) for rows in by_batch]
    expected = np.mean([np.percentile(part, percentiles) for part in distances], axis=0)
    estimates = pairwise_distance_percentiles(units, ids, percentiles, calibration="within_batch", batch_ids=batches)
    np.testing.assert_allclose(thresholds(estimates), expected, rtol=0, atol=1e-6)
    assert estimates[0].n_pairs == sum(map(len, distances))
    # A batch of one row has no pair and does not count.
    lonely = torch.cat((batches[:-1], torch.tensor([9])))
    again = pairwise_distance_percentiles(units, ids, percentiles, calibration="within_batch", batch_ids=lonely)
    assert all(np.isfinite(thresholds(again)))


def test_within_batch_is_exact_for_batches_longer_than_a_tile() -> None:
    units, ids = documents(4, 500, d=3)
    i, j = torch.triu_indices(len(units), len(units), 1)
    expected = np.percentile(1 - (units.double() @ units.double().T)[i, j].numpy(), PERCENTILES)
    estimates = pairwise_distance_percentiles(
        units, ids, PERCENTILES, calibration="within_batch", batch_ids=torch.zeros_like(ids)
    )
    np.testing.assert_allclose(thresholds(estimates), expected, rtol=0, atol=1e-6)
    assert estimates[0].n_pairs == len(i)


def test_the_paper_mode_moves_with_the_batch_size_and_ours_does_not() -> None:
    units, ids = documents(40, 10, spread=3.0)
    small, large = (
        pairwise_distance_percentiles(units, ids, [2], calibration="within_batch", batch_ids=ids // size)[0].threshold
        for size in (2, 40)
    )
    assert small < 0.7 * large
    assert pairwise_distance_percentiles(units, ids, [2])[0].threshold > large


def test_interval_is_wide_for_few_documents_and_narrow_for_many() -> None:
    widths = []
    for n_documents in (4, 16, 64):
        estimate = pairwise_distance_percentiles(*documents(n_documents, 10), [10])[0]
        assert 0 <= estimate.low <= estimate.threshold <= estimate.high <= 2
        widths.append(estimate.high - estimate.low)
    assert widths[0] > 2 * widths[1] > 3 * widths[2] > 0


def test_interval_is_of_documents_not_of_pairs() -> None:
    """As many rows in fewer documents know less: resampling pairs would not see it."""
    few, many = (pairwise_distance_percentiles(*documents(n, 320 // n), [10])[0] for n in (8, 80))
    assert few.high - few.low > 2 * (many.high - many.low)


@pytest.mark.slow
def test_interval_covers_the_truth() -> None:
    truth = pairwise_distance_percentiles(*documents(800, 2, seed=1000), [10], n_bootstrap=1)[0].threshold
    for confidence, fewest, most in ((0.95, 34, 40), (0.5, 10, 30)):  # of 40, where 38 and 20 are expected
        estimates = [
            pairwise_distance_percentiles(*documents(15, 5, seed=seed), [10], confidence=confidence, n_bootstrap=100)[0]
            for seed in range(40)
        ]
        assert fewest <= sum(estimate.low <= truth <= estimate.high for estimate in estimates) <= most


def test_where_variation_cannot_be_seen_the_interval_is_everything() -> None:
    units, ids = documents(2, 20)
    (estimate,) = pairwise_distance_percentiles(units, ids, [10])
    assert (estimate.low, estimate.high) == (0.0, 2.0)
    (estimate,) = pairwise_distance_percentiles(
        units, ids, [10], calibration="within_batch", batch_ids=torch.zeros_like(ids)
    )
    assert (estimate.low, estimate.high) == (0.0, 2.0)
    (estimate,) = pairwise_distance_percentiles(
        units, ids, [10], calibration="within_batch", batch_ids=torch.arange(len(ids)) // 5
    )
    assert 0 < estimate.low < estimate.threshold < estimate.high < 2


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    units, ids = documents(12, 10)
    state = torch.get_rng_state()
    first, second, other = (pairwise_distance_percentiles(units, ids, [5], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second
    assert first[0].threshold == other[0].threshold
    assert first[0].low != other[0].low
    sampled = [pairwise_distance_percentiles(units, ids, [5], seed=seed, max_rows=60)[0] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0].n_pairs <= 60 * 59 // 2
    assert abs(sampled[0].threshold - first[0].threshold) < 0.1


def test_a_sampled_bootstrap_agrees_with_one_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    units, ids = documents(20, 12)
    (every,) = pairwise_distance_percentiles(units, ids, [10], n_bootstrap=500)
    monkeypatch.setattr("saelens_ext.ops.calibration._BOOTSTRAP_PAIRS", 20_000)
    (sampled,) = pairwise_distance_percentiles(units, ids, [10], n_bootstrap=500)
    assert sampled.threshold == every.threshold
    assert sampled.high - sampled.low == pytest.approx(every.high - every.low, rel=0.2)
    assert sampled.low == pytest.approx(every.low, abs=0.02)


def test_rows_without_a_direction_are_left_out() -> None:
    units, ids = documents(5, 10)
    padded = torch.cat((units, torch.zeros(7, 8)))
    padded_ids = torch.cat((ids, torch.arange(7)))
    assert pairwise_distance_percentiles(padded, padded_ids, [10]) == pairwise_distance_percentiles(units, ids, [10])


def test_identical_activations_have_threshold_zero_which_no_clustering_takes() -> None:
    ids = torch.arange(5).repeat_interleave(10)
    units = unit_directions(
        torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).repeat(50, 1), torch.zeros(8)
    )[0]
    for options in ({}, {"calibration": "within_batch", "batch_ids": ids // 2}):
        (estimate,) = pairwise_distance_percentiles(units, ids, [10], **options)
        assert (estimate.threshold, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
        with pytest.raises(ValueError, match="identical"):
            LeaderClustering(torch.zeros(8), estimate.threshold)


def test_estimates_are_plain_numbers_and_no_percentile_gives_none() -> None:
    units, ids = documents(4, 10)
    estimates = pairwise_distance_percentiles(units, ids, [1, 10])
    assert ThresholdEstimate(**json.loads(json.dumps(asdict(estimates[0]), allow_nan=False))) == estimates[0]
    assert pairwise_distance_percentiles(units, ids, []) == []
    assert pairwise_distance_percentiles(units, ids, [], calibration="within_batch", batch_ids=ids) == []
    given_one = ThresholdEstimate.given(0.4)
    assert (given_one.percentile, given_one.low, given_one.threshold, given_one.high, given_one.n_pairs) == (
        None,
        0.4,
        0.4,
        0.4,
        0,
    )


def test_errors() -> None:
    units, ids = documents(4, 10)
    with pytest.raises(ValueError, match="1 document.*at least two.*within_batch"):
        pairwise_distance_percentiles(units, torch.zeros_like(ids), [10])
    with pytest.raises(ValueError, match="0 document"):
        pairwise_distance_percentiles(torch.zeros(3, 8), torch.arange(3), [10])
    for percentile in (0, 100, -1, float("nan")):
        with pytest.raises(ValueError, match="percentile"):
            pairwise_distance_percentiles(units, ids, [10, percentile])
    with pytest.raises(ValueError, match="needs batch_ids"):
        pairwise_distance_percentiles(units, ids, [10], calibration="within_batch")
    with pytest.raises(ValueError, match="No batch holds two"):
        pairwise_distance_percentiles(units, ids, [10], calibration="within_batch", batch_ids=torch.arange(len(ids)))
    with pytest.raises(ValueError, match="one id per row"):
        pairwise_distance_percentiles(units, ids[:-1], [10])
    with pytest.raises(ValueError, match="units has 1 non-finite"):
        pairwise_distance_percentiles(torch.full((1, 1), float("nan")), torch.zeros(1, dtype=torch.long), [10])
    for options in ({"confidence": 1.0}, {"n_bootstrap": 0}, {"max_rows": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            pairwise_distance_percentiles(units, ids, [10], **options)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**31), st.lists(st.floats(0.1, 99.9), min_size=1, max_size=4)
)
def test_laws(n_documents: int, rows: int, seed: int, percentiles: list[float]) -> None:
    units, ids = documents(n_documents, rows, d=3, seed=seed)
    distances = oracles.pairwise_distances(units.numpy(), lambda i, j: ids[i] != ids[j])
    estimates = pairwise_distance_percentiles(units, ids, percentiles, n_bootstrap=20)
    np.testing.assert_allclose(thresholds(estimates), np.percentile(distances, percentiles), rtol=0, atol=BIN_WIDTH)
    for estimate in estimates:
        assert 0 <= estimate.low <= estimate.threshold <= estimate.high <= 2
    by_percentile = sorted(zip(percentiles, thresholds(estimates)))
    assert all(a[1] <= b[1] for a, b in zip(by_percentile, by_percentile[1:]))


@pytest.mark.parametrize(("n_documents", "rows", "d"), [(9, 20, 8), (3, 700, 3)])
def test_nearest_neighbours_are_those_of_a_loop_over_rows(n_documents: int, rows: int, d: int) -> None:
    units, ids = documents(n_documents, rows, d=d)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    units, ids = units[order], ids[order]
    nearest = [float((1 - units[ids != own].double() @ row.double()).min()) for row, own in zip(units, ids)]
    one, three = nearest_neighbour_thresholds(units, ids, (1, 3))
    assert one.threshold == pytest.approx(np.median(nearest), abs=1e-6)
    assert three.threshold == pytest.approx(3 * one.threshold) and three.high == pytest.approx(min(2, 3 * one.high))
    assert (one.percentile, one.factor, one.resolution, one.n_pairs) == (None, 1.0, 1.0, len(ids))
    assert one.low <= one.threshold <= one.high
    assert ThresholdEstimate(**json.loads(json.dumps(asdict(one)))) == one


def test_the_interval_covers_most_other_documents_of_the_same_kind() -> None:
    found = [nearest_neighbour_thresholds(*documents(30, 20, seed=seed), [1])[0] for seed in range(30)]
    truth = np.mean([one.threshold for one in found])
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.75
    assert np.mean([one.high - one.low for one in found]) < 0.2 * truth
    few = nearest_neighbour_thresholds(*documents(2, 20), [0.5])[0]
    assert (few.low, few.high) == (0, 2)


def test_neighbours_in_the_same_document_do_not_count() -> None:
    units, ids = torch.eye(4)[[0] * 30 + [1] * 30], torch.arange(2).repeat_interleave(30)
    assert nearest_neighbour_thresholds(units, ids, [1])[0].threshold == 1
    with pytest.raises(ValueError, match="neighbour_factor=3 times.*give at most 2"):
        nearest_neighbour_thresholds(units, ids, [1, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": [0]}, "neighbour_factor must lie in"),
        ({"factors": [float("nan")]}, "neighbour_factor must lie in"),
        ({"document_ids": torch.zeros(20, dtype=torch.long)}, "1 document"),
        ({"document_ids": torch.arange(3)}, "20 rows but 3 ids"),
        ({"confidence": 1.0}, "confidence"),
    ],
)
def test_bad_input_to_nearest_neighbours(change: dict, message: str) -> None:
    units = unit_directions(torch.randn(20, 4), torch.zeros(4))[0]
    with pytest.raises(ValueError, match=message):
        nearest_neighbour_thresholds(**{"units": units, "document_ids": torch.arange(20), "factors": [1]} | change)
