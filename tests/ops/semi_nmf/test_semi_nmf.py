"""Semi-nonnegative matrix factorisation: its laws on small planted problems, in memory and streamed."""

import itertools
import math

import numpy as np
import pytest
import torch

from saelens_ext.ops.nnls.solve import nnls
from saelens_ext.ops.semi_nmf import rows as semi_nmf_rows
from saelens_ext.ops.semi_nmf.fit import semi_nmf
from saelens_ext.ops.semi_nmf.init import initialise
from saelens_ext.ops.semi_nmf.streaming import semi_nmf_streaming
from saelens_ext.ops.semi_nmf.updates import CodeStatistics, refit_together, replacement_costs, update_features
from tests.ops.oracles import shortest_half_means

INITS = ("svd", "kmeans", "random")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(n=300, d=40, k=6, s=4, noise=0.05, seed=0):
    """Sparse non-negative codes on features of s neurons."""
    g = generator(seed)
    features = torch.zeros(k, d)
    for row in features:
        row[torch.randperm(d, generator=g)[:s]] = torch.randn(s, generator=g)
    codes = torch.rand(n, k, generator=g) * (torch.rand(n, k, generator=g) < 0.5)
    return codes @ features + noise * torch.randn(n, d, generator=g), features


def origin(x):
    return torch.from_numpy(shortest_half_means(x.numpy())).to(x)


def true_loss(x, result):
    x, codes, features = x.double(), result.codes.double(), result.features.double()
    return float((x - codes @ features).square().sum() / x.square().sum())


def never_rises(history):
    return all(after <= before for before, after in itertools.pairwise(history))


@pytest.mark.parametrize("method", ["coordinate", "paper"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("sparsity", [0.03, 0.1, 1.0])
def test_laws(init, method, sparsity):
    x, _ = planted()
    result = semi_nmf(x, 6, sparsity=sparsity, init=init, method=method, max_iter=40)
    assert result.codes.shape == (300, 6) and result.features.shape == (6, 40)
    assert bool((result.codes >= 0).all()) and bool(result.codes.isfinite().all())
    assert int((result.features != 0).sum(1).max()) <= math.ceil(sparsity * 40)
    assert never_rises(result.history) and result.loss <= result.history[-1] and len(result.history) == result.n_iter
    assert result.loss == pytest.approx(result.history[-1], rel=0.02)
    assert result.loss == pytest.approx(true_loss(x, result), abs=1e-6)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("sparsity", [0.1, 1.0])
def test_l1_objective(init, sparsity):
    """The objective is what it says, and its codes are those of the convex problem for the features."""
    x, _ = planted(n=200)
    x = x.double() + 3.0
    seen = []
    result = semi_nmf(
        x, 6, sparsity=sparsity, init=init, l1=0.1, center=True, tol=1e-9, max_iter=60, on_metrics=seen.append
    )
    assert never_rises(result.history) and seen[-1]["objective"] == result.history[-1]
    torch.testing.assert_close(result.center, origin(x))
    total = float(x.square().sum())
    x = x - result.center
    torch.testing.assert_close(result.features.norm(dim=1), torch.ones(6).double())
    codes = nnls(x, result.features, l1=0.1)
    torch.testing.assert_close(result.codes, codes, atol=1e-3, rtol=1e-3)
    error = (x - codes @ result.features).square().sum(1)
    sizes = x.norm(dim=1)
    assert result.loss == pytest.approx(float(error.sum()) / total, abs=1e-6)
    assert result.history[-1] == pytest.approx(
        float((error / sizes.square() + 0.2 * codes.sum(1) / sizes).mean()), rel=1e-3
    )
    assert seen[-1]["loss"] == pytest.approx(float((error / sizes.square()).mean()), rel=1e-2)


def test_l1_makes_codes_zero_that_the_least_loss_makes_cancel():
    """Fewer components than the planted: the least loss shifts all codes up along features that cancel."""
    x, _ = planted(n=600, d=60, k=20, s=20, noise=0.1)
    plain, sparse = (semi_nmf(x, 10, sparsity=1.0, l1=l1) for l1 in (0, 0.1))
    active = [float((result.codes > 0).double().mean()) for result in (plain, sparse)]
    assert active[1] < 0.6 * active[0] and sparse.loss < 2 * plain.loss


@pytest.mark.slow
def test_features_under_an_l1_penalty_are_the_best_over_all_supports():
    """One feature, by brute force: every support, and on it the least of a convex function."""
    g = generator()
    x, codes = torch.randn(20, 6, generator=g).double(), torch.rand(1, 20, generator=g).double()
    statistics = CodeStatistics.of(x, codes, l1=0.05)
    updated = update_features(statistics, torch.zeros(1, 6).double(), 2)
    best = math.inf
    for support in itertools.combinations(range(6), 2):
        h = torch.zeros(1, 6).double()
        h[0, support] = statistics.product[0, support] / statistics.gram[0, 0]
        for scale in torch.linspace(0, 1, 2001).double():
            best = min(best, statistics.error(scale * h))
    assert statistics.error(updated) == pytest.approx(best, rel=1e-5) and statistics.error(updated) <= best
    sizes = x.norm(dim=1)
    direct = (x - codes.T @ updated).square().sum() + 0.1 * (sizes @ codes[0]) * updated.norm()
    assert statistics.error(updated) == pytest.approx(float(direct))
    assert not update_features(CodeStatistics.of(x, codes, l1=0.99), updated, 2).any()


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
def test_no_activation_is_large_enough_to_decide_the_features(init):
    """Fifteen of 1e4 times the size of the others, in a direction of their own, and one of 1e12 times."""
    x, _ = planted(n=300)
    others = torch.arange(300) % 20 != 0
    x[~others] = torch.nn.functional.normalize(torch.ones(1, 40) + 0.1 * torch.randn(15, 40, generator=generator()))
    large = x * torch.where(others, 1.0, 1e4)[:, None]
    options = {"sparsity": 0.1, "init": init, "l1": 0.1}
    # In float64: an objective that is flat to the rounding of float32 leaves the features free by its root.
    small, same = (semi_nmf(rows.double(), 7, tol=1e-9, max_iter=1000, **options) for rows in (x, large))
    torch.testing.assert_close(small.features, same.features, atol=1e-4, rtol=1e-4)
    large[0] *= 1e8
    # One of the seven features is theirs.
    found, without = semi_nmf(large, 7, center=True, **options), semi_nmf(x[others], 6, center=True, **options)
    assert bool(found.codes.isfinite().all()) and never_rises(found.history)

    def left(result):
        rows = x[others] - result.center
        return float((rows - nnls(rows, result.features, l1=0.1) @ result.features).square().sum())

    assert left(found) < 1.1 * left(without)


def test_center():
    x, _ = planted()
    x = x + 2
    assert not semi_nmf(x, 3, max_iter=2).center.any()
    torch.testing.assert_close(semi_nmf(x, 3, max_iter=2, center=True).center, origin(x))
    torch.testing.assert_close(semi_nmf(x, 3, max_iter=2, l1=0.1, center=True).center, origin(x))
    centered, shifted = (semi_nmf(rows, 3, max_iter=2, center=True) for rows in (x, x - 5))
    assert centered.history == pytest.approx(shifted.history, rel=1e-4)
    large = x.clone()
    large[5] = 1e30
    middle = semi_nmf(large, 3, max_iter=2, l1=0.1, center=True).center
    assert float((middle - origin(x[torch.arange(300) != 5])).norm()) < 0.05 * float(x.norm(dim=1).median())


@pytest.mark.parametrize("n", [1, 2, 3, 8, 301])
def test_the_centre_is_the_mean_of_the_shortest_half(n, monkeypatch):
    x = torch.randn(n, 7, generator=generator())
    x[:, 1], x[:, 2], x[:, 3] = 0.1, x[:, 2].relu(), x[:, 3].round()
    monkeypatch.setattr(semi_nmf_rows, "_ENTRIES_AT_ONCE", 3 * n)
    expected = torch.from_numpy(shortest_half_means(x.numpy()))
    torch.testing.assert_close(semi_nmf_rows.center_of(x), expected, atol=1e-9, rtol=1e-9)
    shuffled = x[torch.randperm(n, generator=generator())]
    assert torch.equal(semi_nmf_rows.center_of(shuffled), semi_nmf_rows.center_of(x))


def test_the_centre_is_where_no_feature_is_active():
    """Where the mean is not: each of the first ten neurons is raised in two of five activations."""
    x = 0.1 * torch.randn(2000, 20, generator=generator()) + 3
    x[:, :10] += 2 * (torch.rand(2000, 10, generator=generator()) < 0.4)
    assert float((semi_nmf_rows.center_of(x) - 3).abs().max()) < 0.05 < 0.7 < float((x.mean(0) - 3)[:10].min())


@pytest.mark.slow
@pytest.mark.parametrize("l1", [0, 0.1])
@pytest.mark.parametrize("init", INITS)
def test_activations_without_much_to_find(init, l1):
    g = generator()
    sphere = torch.nn.functional.normalize(torch.randn(80, 20, generator=g), dim=1)
    few = torch.randn(3, 20, generator=g)[torch.arange(80) % 3]
    for x in (sphere, few, few[:1].repeat(80, 1), sphere * torch.where(torch.arange(80) == 4, 1e9, 1.0)[:, None]):
        result = semi_nmf(x, 6, sparsity=0.2, init=init, l1=l1, center=l1 > 0)
        assert bool(result.codes.isfinite().all()) and bool(result.features.isfinite().all())
        assert never_rises(result.history) and 0 <= result.loss <= 1 + 1e-6


@pytest.mark.parametrize("init", INITS)
def test_default_beats_the_published_rule(init):
    x, _ = planted(n=400, d=60, k=20, s=6, noise=0.3)
    ours = semi_nmf(x, 8, sparsity=0.1, init=init)
    paper = semi_nmf(x, 8, sparsity=0.1, init=init, method="paper")
    assert ours.loss < 0.97 * paper.loss and ours.converged


def test_finds_planted_features():
    x, features = planted(noise=0.01)
    result = semi_nmf(x, 6, sparsity=0.1, init="kmeans", tol=1e-6)
    unit = torch.nn.functional.normalize
    assert float((unit(features) @ unit(result.features).T).amax(1).min()) > 0.99
    assert result.loss < 0.01


def test_features_are_optimal_on_their_supports_and_codes_given_features():
    x, _ = planted()
    x = x.double()
    result = semi_nmf(x, 6, sparsity=0.1, tol=1e-9, max_iter=300)
    gradient = result.codes.T @ (result.codes @ result.features - x)
    scale = float((result.codes.T @ x).abs().max())
    assert float(gradient[result.features != 0].abs().max()) < 1e-3 * scale
    best = (x - nnls(x, result.features) @ result.features).square().sum() / x.square().sum()
    assert result.loss == pytest.approx(float(best), abs=1e-5)


def test_one_features_step_is_the_best_over_all_supports():
    g = generator()
    x, codes = torch.randn(20, 6, generator=g).double(), torch.rand(20, 2, generator=g).double()
    statistics = CodeStatistics.empty(2, 6, x.device)
    statistics.add(x, codes.T)
    features = torch.zeros(2, 6).double()
    features[1, :2] = torch.tensor([0.3, -0.2])
    codes[:, 1] = 0  # only the first row moves
    statistics = CodeStatistics.empty(2, 6, x.device)
    statistics.add(x, codes.T)
    best = math.inf
    for support in itertools.combinations(range(6), 2):
        fitted = codes[:, :1] @ torch.linalg.lstsq(codes[:, :1], x[:, support]).solution
        left = x.clone()
        left[:, support] -= fitted
        best = min(best, float(left.square().sum()))
    updated = update_features(statistics, features, 2)
    assert statistics.error(updated) == pytest.approx(best)
    assert torch.equal(updated[1], features[1])


def test_features_refitted_together_settle_where_error_and_penalty_balance():
    """And on the way neither rises: the bound of the penalty lies above it, and touches it."""
    for seed in range(3):
        g = generator(seed)
        x, codes = torch.randn(30, 12, generator=g).double(), torch.rand(5, 30, generator=g).double()
        statistics = CodeStatistics.of(x, codes, l1=0.05)
        features, errors = torch.randn(5, 12, generator=g).double(), []
        for _ in range(100):
            errors.append(statistics.error(features))
            features, _ = refit_together(statistics, features)
        assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
        unit = features / features.norm(dim=1, keepdim=True)
        slope = codes @ (codes.T @ features - x) + 0.05 * (codes @ x.norm(dim=1))[:, None] * unit
        assert float(slope.abs().max()) < 1e-4 * float((codes @ x).abs().max())


@pytest.mark.parametrize("count", [1, 3, 12])
def test_features_step_never_raises_the_error(count):
    for seed in range(20):
        g = generator(seed)
        x, codes = torch.randn(30, 12, generator=g), torch.rand(5, 30, generator=g)
        statistics = CodeStatistics.empty(5, 12, x.device)
        statistics.add(x, codes)
        features = update_features(statistics, torch.zeros(5, 12), count)
        for _ in range(3):
            new = update_features(statistics, features, count)
            assert statistics.error(new) <= statistics.error(features) * (1 + 1e-6)
            features = new


@pytest.mark.parametrize("method", ["coordinate", "paper"])
@pytest.mark.parametrize("init", INITS)
def test_ties_go_to_the_lowest_index(init, method):
    options = {"sparsity": 0.25, "init": init, "method": method}
    x = torch.ones(10, 20)
    assert semi_nmf(x, 1, max_iter=3, **options).features[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]
    # Sums whose rounding depends on their order, over more than one block of them.
    x = torch.rand(1500, 1, generator=generator()).repeat(1, 37)
    assert semi_nmf(x, 1, max_iter=3, **options).features[0].nonzero()[:, 0].tolist() == list(range(10))


@pytest.mark.parametrize("method", ["coordinate", "paper"])
@pytest.mark.parametrize("init", INITS)
def test_of_equal_neurons_the_first_is_used_first(init, method):
    """Neurons j and j + 41 are equal, so that the seventh of a feature is one of two."""
    x, _ = planted(d=41)
    feature = semi_nmf(x.repeat(1, 2), 1, sparsity=0.085, init=init, method=method, max_iter=20).features[0]
    first, second = (feature != 0).chunk(2)
    assert (int(first.sum()), int(second.sum())) == (4, 3) and not bool((second & ~first).any())


def test_supports_do_not_depend_on_the_rounding_of_the_product():
    x, codes = planted(n=1000, d=30, noise=0.5)[0].repeat(1, 2), torch.rand(5, 1000, generator=generator())
    statistics = CodeStatistics.of(x, codes)
    expected = update_features(statistics, torch.zeros(5, 60), 7) != 0
    exact = CodeStatistics.of(x.double(), codes.double())
    off = (statistics.product - exact.product).abs()
    bound = statistics.rounding * exact.gram.diagonal().sqrt()[:, None] * exact.squares.sqrt()
    assert bool((off <= bound).all())
    for seed in range(10):
        # As other kernels may round it; 30 times worse than this one did.
        noise = 30 * float(off.max()) * (2 * torch.rand(5, 60, generator=generator(seed)).double() - 1)
        statistics.product = exact.product + noise.clamp(-bound, bound)
        assert torch.equal(update_features(statistics, torch.zeros(5, 60), 7) != 0, expected)


def test_sparsity_counts_are_rounded_up_but_not_by_rounding_errors():
    x = torch.randn(60, 100, generator=generator())
    for sparsity, count in [(0.07, 7), (0.071, 8), (0.001, 1), (0.29, 29)]:
        assert int((semi_nmf(x, 3, sparsity=sparsity, max_iter=2).features != 0).sum(1).max()) == count


@pytest.mark.slow
def test_deterministic_and_blind_to_the_global_random_state():
    x, _ = planted()
    for init in INITS:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = semi_nmf(x, 6, sparsity=0.1, init=init, max_iter=5, generator=generator(3))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        second = semi_nmf(x, 6, sparsity=0.1, init=init, max_iter=5, generator=generator(3))
        assert torch.equal(first.codes, second.codes) and torch.equal(first.features, second.features)
    other = semi_nmf(x, 6, sparsity=0.1, init="random", max_iter=5, generator=generator(4))
    assert not torch.equal(second.features, other.features)


def test_svd_start_keeps_the_heavier_side():
    x, _ = planted()
    for sign in (1, -1):
        codes, features = initialise(sign * x, 4, "svd", generator())
        for i in range(4):
            one, other = codes[:, i], (-(x * sign) @ features[i] / features[i].square().sum()).clamp(min=0)
            assert float(one.square().sum()) >= float(other.square().sum()) * (1 - 1e-4)


def test_svd_start_of_a_large_matrix_is_as_good_as_the_exact_one():
    g = generator()
    x = torch.randn(400, 60, generator=g) @ torch.randn(60, 300, generator=g) + torch.randn(400, 300, generator=g)
    codes, features = initialise(x, 20, "svd", g)
    exact = torch.linalg.svdvals(x)[:20]
    torch.testing.assert_close(features.square().sum(1), exact, rtol=1e-2, atol=0)
    assert codes.shape == (400, 20)


def test_dead_features_are_revived_and_counted():
    x, _ = planted()
    start = semi_nmf(x, 6, sparsity=0.1, max_iter=1)
    codes, features = start.codes.clone(), start.features.clone()
    codes[:, :3] = 0
    features[3] = 0
    codes[:, 3] = 0
    result = semi_nmf(x, 6, sparsity=0.1, start=(codes, features), tol=1e-6)
    assert result.n_revived >= 4 and result.n_dead == 0 and never_rises(result.history)
    assert result.loss < start.loss


def test_duplicate_features_are_merged_and_counted():
    x, _ = planted()
    start = semi_nmf(x, 3, sparsity=0.1, max_iter=30)
    # Each copy serves half of the activations, so that no other step would tell them apart.
    half = torch.arange(len(x))[:, None] % 2
    doubled = torch.cat((start.codes * half, start.codes * (1 - half)), 1), torch.cat((start.features, start.features))
    result = semi_nmf(x, 6, sparsity=0.1, start=doubled, tol=1e-6)
    assert result.n_revived >= 1 and result.n_duplicate == 0 and never_rises(result.history)
    assert result.loss < start.loss - 0.05


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("seed", range(6))
def test_what_cannot_be_revived_is_counted(init, seed):
    x = torch.randn(50, 1, generator=generator(seed)).abs() * torch.randn(1, 8, generator=generator(seed + 100))
    # The penalty forbids features that cancel each other, and one takes all activations of a ray.
    result = semi_nmf(x, 3, sparsity=1.0, init=init, l1=0.1)
    assert result.loss < 0.02
    assert result.n_dead + result.n_duplicate >= 2
    no_feature = ~result.features.any(dim=1)
    assert not result.codes[:, no_feature].any()


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("method", ["coordinate", "paper"])
def test_hard_activations(init, method):
    x, _ = planted(n=80)
    constant, negative, repeated = x.clone(), -x.abs() - 0.1, x[:1].repeat(80, 1)
    constant[:, 3], constant[:, 7] = 0.0, 5.0
    for hard in (constant, negative, repeated, torch.zeros_like(x), x * 1e-8, x * 1e8):
        result = semi_nmf(hard, 5, sparsity=0.1, init=init, method=method, max_iter=10)
        assert bool(result.codes.isfinite().all()) and bool(result.features.isfinite().all())
        assert never_rises(result.history) and 0 <= result.loss <= 1
    assert not semi_nmf(constant, 5, sparsity=1.0, init=init, method=method, max_iter=10).features[:, 3].any()


def test_scale_does_not_matter():
    x, _ = planted()
    plain, scaled = (semi_nmf(x * scale, 6, sparsity=0.1) for scale in (1.0, 1024.0))
    assert plain.n_iter == scaled.n_iter and plain.loss == pytest.approx(scaled.loss, rel=1e-5)


@pytest.mark.parametrize("method", ["coordinate", "paper"])
@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e30])
def test_sizes_whose_squares_leave_float32(scale, method):
    x, _ = planted()
    plain, scaled = (semi_nmf(x * s, 6, sparsity=0.1, method=method, max_iter=20) for s in (1.0, scale))
    assert scaled.loss == pytest.approx(plain.loss, rel=0.02)
    codes, features = scaled.codes.double(), scaled.features.double()
    left = (x.double() * scale - codes @ features).square().sum() / (x.double() * scale).square().sum()
    assert scaled.loss == pytest.approx(float(left), abs=1e-5)


def test_what_is_started_from_is_made_sparse_even_where_it_does_not_count():
    x, _ = planted()
    codes, features = initialise(x, 6, "svd", generator())
    codes[:, 0] *= 1e-7
    features[0] *= 1e7
    result = semi_nmf(x, 6, sparsity=0.3, start=(codes, features), max_iter=1)
    assert int((result.features != 0).sum(1).max()) <= 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype(dtype):
    result = semi_nmf(planted()[0].to(dtype), 4, sparsity=0.1, max_iter=3)
    assert result.codes.dtype == result.features.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_metrics_of_each_iteration():
    seen = []
    result = semi_nmf(planted()[0], 4, sparsity=0.1, max_iter=7, tol=1e-9, on_metrics=seen.append)
    assert [m["objective"] for m in seen] == result.history and [m["iteration"] for m in seen] == list(
        range(1, result.n_iter + 1)
    )


def test_bad_input():
    x, _ = planted(n=30)
    for sparsity in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="sparsity must lie in"):
            semi_nmf(x, 3, sparsity=sparsity)
    with pytest.raises(ValueError, match=r"n_components is 31, but init='svd' gives at most min\(n, d\) = 30"):
        semi_nmf(x, 31)
    with pytest.raises(ValueError, match="n_components is 31, but init='kmeans'"):
        semi_nmf(x, 31, init="kmeans")
    assert semi_nmf(x, 31, init="random", max_iter=2, sparsity=0.1).features.shape == (31, 40)
    with pytest.raises(ValueError, match="init must be one of.*got 'svdd'.*Did you mean 'svd'"):
        semi_nmf(x, 3, init="svdd")
    with pytest.raises(ValueError, match="method must be one of"):
        semi_nmf(x, 3, method="mu")
    for l1 in (-0.1, 1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"l1 must lie in \[0, 1\)"):
            semi_nmf(x, 3, l1=l1)
    with pytest.raises(ValueError, match="published rule has no L1 penalty"):
        semi_nmf(x, 3, l1=0.1, method="paper")
    with pytest.raises(ValueError, match="n_components must be a whole number"):
        semi_nmf(x, 0)
    with pytest.raises(ValueError, match="at least one activation"):
        semi_nmf(x[:0], 3)
    with pytest.raises(ValueError, match="start must be codes >= 0"):
        semi_nmf(x, 3, start=(-torch.ones(30, 3), torch.ones(3, 40)))
    x[4, 1] = float("inf")
    with pytest.raises(ValueError, match="x has 1 non-finite.*row 4"):
        semi_nmf(x, 3)


# --- streaming ---


def test_streaming_reaches_the_fit_in_memory():
    x, _ = planted(n=2000)
    streamed = semi_nmf_streaming(x.split(300), 6, sparsity=0.1, sample_size=400, max_passes=8)
    whole = semi_nmf(x, 6, sparsity=0.1)
    assert streamed.loss < whole.loss * 1.1 and streamed.loss < streamed.history[0] and never_rises(streamed.history)
    assert streamed.n_samples == 2000 and streamed.history[-1] == pytest.approx(streamed.loss, rel=1e-12)
    codes = nnls(x, streamed.features)
    left = (x.double() - codes.double() @ streamed.features.double()).square().sum() / x.double().square().sum()
    assert streamed.loss == pytest.approx(float(left), abs=1e-5)
    torch.testing.assert_close(streamed.code_gram, (codes.T @ codes).double(), rtol=1e-3, atol=0.1)
    torch.testing.assert_close(streamed.code_product, (codes.T @ x).double(), rtol=1e-3, atol=0.1)
    assert int((streamed.features != 0).sum(1).max()) <= 4


@pytest.mark.slow
def test_streaming_with_l1_is_on_average_as_good_as_in_memory():
    """Of each draw either may be better by several per cent: they end in different optima."""
    ratios = []
    for seed in range(4):
        x = planted(n=1000, seed=seed)[0] + 1
        options = {"sparsity": 0.1, "l1": 0.1, "center": True}
        streamed = semi_nmf_streaming(x.split(300), 6, sample_size=400, max_passes=6, **options)
        assert never_rises(streamed.history) and streamed.history[-1] < streamed.history[0]
        ratios.append(streamed.history[-1] / semi_nmf(x, 6, **options).history[-1])
    assert sum(ratios) / len(ratios) < 1.03


def test_streaming_with_l1():
    x, _ = planted(n=1000)
    x = x + 1
    options = {"sparsity": 0.1, "l1": 0.1, "center": True}
    streamed = semi_nmf_streaming(x.split(300), 6, sample_size=400, max_passes=6, **options)
    assert float((streamed.center - origin(x)).norm()) < 0.1 * float(x.norm(dim=1).median())
    total = x.double().square().sum()
    x = x - streamed.center
    codes = nnls(x, streamed.features, l1=0.1)
    left = (x.double() - codes.double() @ streamed.features.double()).square().sum() / total
    assert streamed.loss == pytest.approx(float(left), abs=1e-4)
    torch.testing.assert_close(streamed.code_gram, (codes.T @ codes).double(), rtol=1e-2, atol=0.1)
    whole = semi_nmf_streaming([x], 6, sample_size=5000, max_passes=1, **options)
    torch.testing.assert_close(whole.center, origin(x), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_streaming_does_not_depend_on_the_cut():
    x, _ = planted(n=1000)
    fits = [semi_nmf_streaming(x.split(size), 5, sparsity=0.1, sample_size=300, max_passes=3) for size in (1000, 7)]
    assert fits[0].loss == pytest.approx(fits[1].loss, rel=1e-3)
    torch.testing.assert_close(fits[0].features, fits[1].features, rtol=1e-2, atol=1e-2)


def test_streaming_sample_larger_than_the_stream():
    x, _ = planted()
    streamed = semi_nmf_streaming([x], 6, sparsity=0.1, sample_size=10_000, max_passes=1)
    assert streamed.n_passes == 1 and streamed.loss <= semi_nmf(x, 6, sparsity=0.1).loss * 1.001


def test_streaming_takes_the_tolerance_asked_for():
    x, _ = planted(n=600)
    passes = {
        tol: len(semi_nmf_streaming([x], 5, sparsity=0.1, sample_size=40, max_iter=2, max_passes=20, tol=tol).history)
        for tol in (1e-4, None, 0.3)
    }
    assert passes[1e-4] > passes[None] > passes[0.3] == 2


class _Changing:
    """A stream that loses a row each time it is read."""

    def __init__(self, x):
        self._x = x

    def __iter__(self):
        self._x = self._x[:-1]
        return iter([self._x])


def test_streaming_bad_input():
    x, _ = planted()
    with pytest.raises(ValueError, match="read only once"):
        semi_nmf_streaming((block for block in x.split(50)), 3)
    with pytest.raises(ValueError, match="no activations"):
        semi_nmf_streaming([], 3)
    with pytest.raises(ValueError, match="298 activations on the first pass and 297"):
        semi_nmf_streaming(_Changing(x), 3, sparsity=0.1)
    with pytest.raises(ValueError, match="last dimension must be 40"):
        semi_nmf_streaming([x, x[:, :39]], 3)
    with pytest.raises(ValueError, match="n_components is 41"):
        semi_nmf_streaming([x], 41)
    x[0, 0] = float("nan")
    with pytest.raises(ValueError, match="a batch has 1 non-finite"):
        semi_nmf_streaming([x], 3)


def test_what_a_feature_costs_to_replace_is_the_lower_of_two_bounds():
    """Left to the others as they are, or made one with another of the same side: by least squares and by an SVD."""
    rng = np.random.default_rng(0)
    codes, features = rng.exponential(size=(50, 6)) * (rng.random((50, 6)) < 0.5), rng.normal(size=(6, 9))
    features[1] = features[0] + 0.2 * features[1]
    features[3] = -features[2] + 0.2 * features[3]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    found = replacement_costs(torch.from_numpy(codes.T @ codes), torch.from_numpy(features)).numpy()
    expected, kinds = [], set()
    for i in range(6):
        others = np.delete(features, i, axis=0)
        left = features[i] - np.linalg.lstsq(others.T, features[i], rcond=None)[0] @ others
        bounds = [(codes[:, i] ** 2).sum() * (left**2).sum()]
        for j in range(6):
            if features[i] @ features[j] > 0 and (codes[:, i] ** 2).sum() < (codes[:, j] ** 2).sum():
                pair = [i, j]
                bounds.append(np.linalg.svd(codes[:, pair] @ features[pair])[1][1] ** 2)
        expected.append(min(bounds))
        kinds.add(int(np.argmin(bounds)) > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert kinds == {True, False}
