"""Planted groups of neurons are found again, at least as well as by the published rule, from every start."""

import itertools

import pytest
import torch
from torch.nn.functional import normalize

from saelens_ext.ops.semi_nmf.coordinate import CoordinateFit
from saelens_ext.ops.semi_nmf.fit import INITS, semi_nmf
from saelens_ext.ops.semi_nmf.init import initialise
from saelens_ext.ops.semi_nmf.rows import Rows
from saelens_ext.ops.semi_nmf.updates import keep_largest, replacement_costs
from tests.ops.planted_groups import SHAPES, SMALL, recovered

CASES = [
    pytest.param(name, seed, marks=() if name in SMALL and seed == 0 else pytest.mark.slow)
    # The two largest take minutes each: tests/benchmarks/bench_semi_nmf_recovery.py prints them.
    for name, seed in itertools.product(list(SHAPES)[:8], range(3))
]


def fitted(x, shape, **options):
    return semi_nmf(x, shape.k, sparsity=shape.sparsity, generator=torch.Generator().manual_seed(5), **options)


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("name", "seed"), CASES)
def test_as_many_groups_as_the_published_rule_and_no_higher_error(name, seed, init):
    shape = SHAPES[name]
    x, features, codes = shape.make(seed)
    ours = fitted(x, shape, init=init)
    paper = fitted(x, shape, init=init, method="paper")
    assert recovered(features, ours.features) >= recovered(features, paper.features)
    assert ours.loss <= paper.loss * (1 + 1e-4)
    if init == "svd":
        # In one draw of groups of two neurons the least error is not at the planted groups: a fit that starts from them
        # ends higher. Then the search is not to blame.
        from_planted = fitted(x, shape, start=(codes, features))
        assert recovered(features, ours.features) >= 0.97 or ours.loss < from_planted.loss
        # What was planted is a member of the set: with noise, the least error is below its own.
        planted = float((x - codes @ features).square().sum() / x.square().sum())
        assert ours.loss <= planted * 1.02 + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed"), [("60 of 50 of 1000, unequal, correlated", 2), ("10 of 2 of 200", 2), ("60 of 10 of 1000", 1)]
)
def test_hard_draws_from_a_random_start(name, seed):
    """In which two features halved a common group, and a rare one, cheaper to leave to the others, had none."""
    shape = SHAPES[name]
    x, features, _ = shape.make(seed)
    assert recovered(features, fitted(x, shape, init="random").features) == 1.0


def test_what_a_merge_costs_is_the_error_of_the_best_rank_one_approximation():
    generator = torch.Generator().manual_seed(0)
    codes, features = torch.rand(50, 4, generator=generator).double(), torch.randn(4, 9, generator=generator).double()
    codes[::2, 0], codes[1::2, 1] = 0, 0  # these two halve a group
    features[1] = features[0] + 0.3 * features[1]
    features = normalize(features, dim=1)
    cost = replacement_costs(codes.T @ codes, features)
    pair = torch.linalg.svdvals(codes[:, :2] @ features[:2])
    smaller = int(codes[:, 1].norm() < codes[:, 0].norm())
    assert float(cost[smaller]) == pytest.approx(float(pair[1]) ** 2)
    # The others are left to features as they are, with codes of any sign.
    for i in (1 - smaller, 2, 3):
        rest = torch.cat((features[:i], features[i + 1 :]))
        left = features[i] - features[i] @ torch.linalg.pinv(rest) @ rest
        assert float(cost[i]) <= float(codes[:, i].square().sum() * left.square().sum()) * (1 + 1e-9)
    assert float(cost[smaller]) < float(cost[1 - smaller])
    assert bool((replacement_costs(codes.T @ codes, torch.eye(4, 9).double()) == codes.square().sum(dim=0)).all())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("k", [5, 10])
def test_the_search_lowers_the_objective_of_fewer_features_than_groups(k, init):
    """Where no feature can be a group."""
    x, _, _ = SHAPES["40 of 12 of 600"].make(0)
    rows = Rows.of(x, center=True, equal=True).values
    start = initialise(rows, k, init, torch.Generator().manual_seed(5))
    plain, searched = (CoordinateFit(rows, *start, 12, 0.1, search) for search in (0, 12))
    for _ in range(3):
        plain.step()
    assert searched.error < plain.error


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", range(2))
def test_groups_are_found_under_an_l1_penalty(name, seed):
    shape = SHAPES[name]
    x, features, _ = shape.make(seed)
    assert recovered(features, fitted(x, shape, l1=0.05).features) >= 0.97


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_groups_are_found_wherever_the_activations_lie(name, seed):
    """By the default of fits to activations, penalty and centre; about their mean, one or two groups were lost."""
    shape = SHAPES[name]
    x, features, _ = shape.make(seed)
    x += 3 * torch.randn(shape.d, generator=torch.Generator().manual_seed(9))
    assert recovered(features, fitted(x, shape, l1=0.1, center=True).features) == 1.0


def test_the_search_replaces_what_is_surplus():
    """From planted groups of which one is missing and one is there twice, in halves."""
    shape = SHAPES["10 of 20 of 200"]
    x, features, codes = shape.make(0)
    first = torch.arange(len(x)) % 2 == 0
    start = codes.clone()
    start[:, 0], start[:, 1] = codes[:, 1] * first, codes[:, 1] * ~first
    doubled = features.clone()
    doubled[0] = features[1]
    count = int((features != 0).sum(dim=1).max())
    fits = [CoordinateFit(x, start, doubled, count, search=search) for search in (0, 12)]
    for fit in fits:
        for _ in range(5):
            fit.step()
    assert recovered(features, fits[1].features) == 1.0
    assert recovered(features, doubled) < 1.0 and fits[1].error <= 1.001 * fits[0].error


def test_a_start_that_the_search_does_not_improve_is_kept():
    shape = SHAPES["10 of 20 of 200"]
    x, features, codes = shape.make(0)
    best = semi_nmf(x, shape.k, sparsity=shape.sparsity, start=(codes, features))
    again = semi_nmf(x, shape.k, sparsity=shape.sparsity, start=(best.codes, best.features))
    assert again.loss <= best.loss * (1 + 1e-6)


@pytest.mark.slow
def test_one_step_at_a_time_would_stick():
    """Why there is a search: from the same start, iterations that each lower the error lose a part of the groups."""
    shape = SHAPES["24 groups of 15 of 300"]
    x, features, _ = shape.make(1)
    codes, dense = initialise(x, shape.k, "random", torch.Generator().manual_seed(5))
    stuck = CoordinateFit(x, codes, dense, 15)
    for _ in range(60):
        stuck.step()
    assert recovered(features, stuck.features) < 0.9
    assert recovered(features, CoordinateFit(x, codes, dense, 15, search=12).features) == 1.0
    assert recovered(features, keep_largest(features, 15)) == 1.0
