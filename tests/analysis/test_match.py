"""Matching of dictionaries: planted matches, symmetry, chance, and a slow twin."""

import itertools
import json

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from saelens_ext import ExemplarPartition
from saelens_ext.analysis import match, match_null
from saelens_ext.analysis.match import match_dictionaries


def units(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def partition(
    rows: torch.Tensor, center: torch.Tensor | None = None, typical_norm: float | None = None
) -> ExemplarPartition:
    metadata = {} if typical_norm is None else {"typical_norm": typical_norm}
    return ExemplarPartition.from_regions(
        rows, rows, torch.zeros(rows.shape[1]) if center is None else center, 0.5, metadata=metadata
    )


def standard(rows: torch.Tensor) -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=rows.shape[1], d_sae=len(rows), apply_b_dec_to_input=True))
    sae.W_dec.data = rows * torch.arange(1, len(rows) + 1)[:, None]  # norms of decoder rows say nothing
    return sae


@pytest.fixture(scope="module")
def planted():
    """20 of 40 directions come back, disturbed and shuffled, among 60; the others are fresh."""
    first = units(40, 64, 0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    second = torch.cat([first[:20][order] + 0.05 * units(20, 64, 2), units(40, 64, 3)])
    return first, torch.nn.functional.normalize(second, dim=1), order


@pytest.mark.parametrize("null", ["directions", "rotation", "activations"])
def test_planted_matches_are_found_and_only_they_pass_the_cutoff(planted, null):
    first, second, order = planted
    null = torch.randn(500, 64, generator=torch.Generator().manual_seed(9)) if null == "activations" else null
    result = match_dictionaries(partition(first), standard(second), null=null, level=0.995)
    expected = order.argsort()
    assert torch.equal(result.first.nearest[:20], expected) and bool(result.first.mutual[:20].all())
    assert torch.equal(result.second.nearest[:20], order)
    assert result.first.above[:20].all() and result.first.above[20:].sum() <= 2
    assert result.second.above[:20].all() and result.second.above[20:].sum() <= 2
    assert 0.5 <= result.first.share <= 0.55 and 20 / 60 <= result.second.share <= 22 / 60
    planted_pairs = {(int(a), int(b)) for a, b in result.pairs[:20]}
    assert planted_pairs == {(a, int(b)) for a, b in enumerate(expected)}
    summary = result.summary()
    assert summary["one_to_one"]["n_pairs"] == 40 and summary["one_to_one"]["n_left_out_by_size"] == 20
    assert 20 <= summary["one_to_one"]["n_above_cutoff"] <= 22
    assert json.dumps(summary)


def slow_twin(a: np.ndarray, b: np.ndarray):
    """Nearest from either side, mutual pairs and the best total of any one-to-one assignment, by loops."""
    cosine = np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a])
    forward, backward = [max(range(len(b)), key=lambda j: cosine[i, j]) for i in range(len(a))], []
    for j in range(len(b)):
        backward.append(max(range(len(a)), key=lambda i: cosine[i, j]))
    mutual = [backward[j] == i for i, j in enumerate(forward)]
    best = max(
        sum(cosine[i, j] for i, j in enumerate(chosen)) for chosen in itertools.permutations(range(len(b)), len(a))
    )
    return cosine, forward, backward, mutual, best


@pytest.mark.parametrize("seed", range(5))
def test_against_a_slow_twin(seed):
    a, b = units(4, 5, seed) * 3, units(6, 5, seed + 50)
    result = match_dictionaries(a, b)
    cosine, forward, backward, mutual, best = slow_twin(a.double().numpy(), b.double().numpy())
    assert result.first.nearest.tolist() == forward and result.second.nearest.tolist() == backward
    assert result.first.mutual.tolist() == mutual
    np.testing.assert_allclose(result.first.cosine.numpy(), cosine.max(axis=1), atol=1e-6)
    assert result.first.fan_in.tolist() == [backward.count(i) for i in range(4)]
    assert result.pair_cosines.sum().item() == pytest.approx(best, abs=1e-5)
    np.testing.assert_allclose(result.pair_cosines.numpy(), [cosine[i, j] for i, j in result.pairs.tolist()], atol=1e-6)
    assert (result.pair_cosines.diff() <= 0).all()


def test_the_two_roles_are_alike(planted):
    first, second, _ = planted
    there, back = match_dictionaries(first, second, seed=3), match_dictionaries(second, first, seed=3)
    for one, other in ((there.first, back.second), (there.second, back.first)):
        assert (
            torch.equal(one.nearest, other.nearest)
            and torch.equal(one.mutual, other.mutual)
            and torch.equal(one.fan_in, other.fan_in)
        )
        torch.testing.assert_close(one.cosine, other.cosine)
        assert one.cutoff == pytest.approx(other.cutoff)
    assert {tuple(pair) for pair in there.pairs.tolist()} == {(b, a) for a, b in back.pairs.tolist()}


def test_order_of_latents_does_not_matter(planted):
    first, second, _ = planted
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    plain, shuffled = match_dictionaries(first, second), match_dictionaries(first, second[order])
    assert torch.equal(order[shuffled.first.nearest], plain.first.nearest)
    assert torch.equal(shuffled.second.nearest, plain.second.nearest[order])
    assert torch.equal(shuffled.second.mutual, plain.second.mutual[order])
    assert plain.pair_cosines.sum().item() == pytest.approx(shuffled.pair_cosines.sum().item())
    assert shuffled.first.cutoff == pytest.approx(plain.first.cutoff, abs=0.03)


@pytest.mark.parametrize("null", ["directions", "rotation"])
def test_chance_passes_the_cutoff_as_often_as_it_says(null):
    """Unrelated dictionaries of unequal size in an anisotropic space; the cutoffs differ with the size that is
    searched.
    """
    stretch = torch.ones(32) if null == "rotation" else torch.linspace(4, 0.2, 32)
    shares = []
    for seed in range(8):
        first, second = (
            torch.nn.functional.normalize(units(n, 32, s) * stretch, dim=1) for n, s in ((300, seed), (40, seed + 100))
        )
        result = match_dictionaries(first, second, null=null, level=0.9, one_to_one=False, seed=seed)
        shares += [result.first.share, result.second.share]
        assert result.second.cutoff > result.first.cutoff
    assert 0.05 < sum(shares) / len(shares) < 0.16


@pytest.mark.parametrize("shared", ["subspace", "mean"])
def test_a_rotation_null_is_fooled_by_what_all_directions_share_and_the_other_is_not(shared):
    stretch = torch.cat([torch.ones(4), torch.full((60,), 0.05)]) if shared == "subspace" else torch.ones(64)
    mean = torch.zeros(64) if shared == "subspace" else units(1, 64, 7)[0]
    first, second = (torch.nn.functional.normalize(mean + units(200, 64, s) * stretch, dim=1) for s in (0, 1))
    lenient, strict = (
        match_dictionaries(first, second, null=null, one_to_one=False) for null in ("rotation", "directions")
    )
    assert lenient.first.share > 0.9 and strict.first.share < 0.1


def test_activations_of_the_null_are_taken_about_the_origin_of_the_dictionary_that_they_replace(planted):
    first, second, _ = planted
    activations = torch.randn(500, 64, generator=torch.Generator().manual_seed(9))
    center = 40 * units(1, 64, 8)[0]
    plain = match_dictionaries(first, second, null=activations)
    moved = match_dictionaries(first, partition(second, center), null=activations + center)
    assert moved.first.cutoff == pytest.approx(plain.first.cutoff, abs=1e-4)
    assert moved.second.cutoff != pytest.approx(plain.second.cutoff, abs=1e-2)


def test_the_null_is_seeded_and_larger_dictionaries_are_sampled(planted, monkeypatch):
    first, second, _ = planted
    again = [match_dictionaries(first, second, seed=5).first.cutoff for _ in range(2)]
    assert again[0] == again[1] != match_dictionaries(first, second, seed=6).first.cutoff
    monkeypatch.setattr(match_null, "_NULL_ROWS", 10)
    monkeypatch.setattr(match_null, "_BLOCK", 7)
    assert match_dictionaries(first, second, seed=5).first.cutoff == pytest.approx(again[0], abs=0.06)


def test_a_shared_centre_brings_back_what_other_origins_hide():
    points = 10 * units(30, 16, 0)
    centers = [torch.zeros(16), 8 * units(1, 16, 1)[0]]
    sides = []
    for center in centers:
        offsets = points - center
        # All of one radius, as the method assumes: the directions alone are kept.
        sides.append((torch.nn.functional.normalize(offsets, dim=1), center, offsets.norm(dim=1).median().item()))
    own = match_dictionaries(*(partition(*side) for side in sides))
    shared = match_dictionaries(*(partition(*side) for side in sides), center="shared")
    assert shared.first.cosine.median() > own.first.cosine.median() + 0.1
    given = match_dictionaries(
        *(partition(*side[:2]) for side in sides), center=torch.zeros(16), radius=[side[2] for side in sides]
    )
    assert given.settings["center"] == "given" and (given.first.nearest == torch.arange(30)).double().mean() > 0.9
    with pytest.raises(ValueError, match="needs the radius of both"):
        match_dictionaries(*(partition(*side[:2]) for side in sides), center="shared")


def test_a_centre_that_is_shared_already_changes_nothing(planted):
    first, second, _ = planted
    center = units(1, 64, 8)[0]
    sides = [partition(rows, center, norm) for rows, norm in ((first, 3.0), (second, 7.0))]
    own, shared = match_dictionaries(*sides), match_dictionaries(*sides, center="shared")
    assert torch.equal(own.first.nearest, shared.first.nearest)
    torch.testing.assert_close(own.first.cosine, shared.first.cosine, atol=1e-5, rtol=0)


def test_dead_latents_match_nothing(planted):
    first, second, _ = planted
    first, second = first.clone(), second.clone()
    first[[0, 39]] = 0
    second[5] = 0
    result = match_dictionaries(first, second)
    assert result.first.nearest[[0, 39]].tolist() == [-1, -1] and result.first.cosine[0].isnan()
    assert not result.first.mutual[0] and not result.first.above[0] and result.second.nearest[5] == -1
    assert not (result.first.nearest == 5).any() and len(result.pairs) == 38
    assert result.summary()["first"]["n_without_direction"] == 2


def test_tables_hold_both_sides(planted):
    first, second, order = planted
    table = match_dictionaries(first, second).to_dataframe()
    assert (
        len(table) == 100 and table.loc[("second", 0), "nearest"] == order[0] == table.loc[("second", 0), "one_to_one"]
    )
    assert (table.loc["second", "one_to_one"] == -1).sum() == 20
    pairs = match_dictionaries(first, second, one_to_one=False).pairs_dataframe()
    assert pairs["cosine"].is_monotonic_decreasing and pairs["above_both_cutoffs"].head(20).all()


def test_a_large_assignment_is_left_out_or_refused(planted, monkeypatch):
    first, second, _ = planted
    monkeypatch.setattr(match, "ASSIGNMENT_BYTES", 8 * 40 * 60 - 1)
    result = match_dictionaries(first, second)
    assert result.pairs is None and "one_to_one" not in result.summary() and "one_to_one" not in result.to_dataframe()
    with pytest.raises(ValueError, match="Assigning 40 latents to 60 needs 19200 bytes"):
        match_dictionaries(first, second, one_to_one=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second": torch.zeros(3, 64)}, "second has no directions"),
        ({"second": torch.ones(3, 65)}, "first has directions of width 64 and second of 65"),
        ({"second": torch.full((3, 64), torch.nan)}, "non-finite"),
        ({"level": 1.0}, "level must lie in"),
        ({"null": torch.ones(30, 64)}, "null holds activations of shape"),
        ({"n_null": 1}, "take an n_null of at least"),
        ({"center": "shared", "radius": -1}, "radius must lie in"),
        ({"center": torch.ones(3), "radius": 1}, "center has shape"),
    ],
)
def test_bad_input_is_named(planted, options, message):
    first, second, _ = planted
    options = {"second": second} | options
    with pytest.raises(ValueError, match=message):
        match_dictionaries(first, **options)
