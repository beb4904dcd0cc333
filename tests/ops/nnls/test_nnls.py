"""Non-negative least squares: against scipy, by its optimality conditions, and its gradient."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.optimize import nnls as scipy_nnls

from saelens_ext.ops.nnls.active_set import SupportSolver, pivot
from saelens_ext.ops.nnls.few import sweep_candidates
from saelens_ext.ops.nnls.kernels import DualIteration, FeatureGram, PrimalIteration, descent, penalised
from saelens_ext.ops.nnls.solve import nnls


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_kkt(x, features, codes):
    """Per raw feature, relative to the largest product of the activation: computed in float64."""
    x, features, codes = x.double(), features.double(), codes.double()
    descent = (x - codes @ features) @ features.T
    violation = torch.where(codes > 0, descent.abs(), descent.clamp(min=0))
    return violation.amax(1) / (x @ features.T).abs().amax(1).clamp(min=1e-30)


def sparse_features(k, d, seed=0):
    features = randn(k, d, seed=seed)
    return features * (randn(k, d, seed=seed + 1).abs() > 1.5)


CASES = {
    "fewer features": (randn(30, 40), randn(12, 40, seed=1)),
    "more features than neurons": (randn(30, 10), randn(25, 10, seed=1)),
    "twice as many features as neurons": (3 * randn(60, 48), 2 * randn(90, 48, seed=1)),
    "many sparse features": (3 * randn(60, 48), sparse_features(150, 48)),
    "sparse features": (randn(30, 60), sparse_features(50, 60)),
    "non-negative features": (randn(30, 40).abs(), randn(35, 40, seed=1).abs()),
    "ill conditioned": (randn(30, 20), randn(20, 20, seed=1) * torch.logspace(0, -3, 20) + randn(20, 1, seed=2)),
    "unequal lengths": (randn(30, 40), randn(12, 40, seed=1) * torch.logspace(-4, 4, 12)[:, None]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_scipy(case, dtype):
    x, features = (part.to(dtype) for part in CASES[case])
    codes = nnls(x, features)
    assert codes.dtype == dtype and bool((codes >= 0).all())
    best = np.array([scipy_nnls(features.double().T.numpy(), row.double().numpy())[1] for row in x])
    ours = torch.linalg.vector_norm(x.double() - codes.double() @ features.double(), dim=1).numpy()
    scale = torch.linalg.vector_norm(x.double(), dim=1).numpy()
    np.testing.assert_allclose(ours / scale, best / scale, atol=1e-4 if dtype == torch.float32 else 1e-9)
    assert float(relative_kkt(x, features, codes).max()) < 1e-4


def test_unique_codes_equal_those_of_scipy():
    x, features = CASES["sparse features"]
    expected = np.array([scipy_nnls(features.T.numpy(), row.numpy())[0] for row in x])
    np.testing.assert_allclose(nnls(x, features).numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("max_sweeps", [1, 200])
def test_active_set_method_and_coordinate_descent_agree(max_sweeps):
    x, features = CASES["sparse features"]
    torch.testing.assert_close(nnls(x, features, max_sweeps=max_sweeps), nnls(x, features), atol=1e-8, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [PrimalIteration, DualIteration])
def test_both_coordinate_descents_reach_the_optimum(iteration):
    x, features = CASES["sparse features"]
    problem = FeatureGram.of(features)
    codes = iteration(problem, problem.unit @ x.T).advance(3000) / problem.norm[:, None]
    torch.testing.assert_close(codes.T, nnls(x, features), atol=1e-6, rtol=0)


def test_coordinate_descent_never_raises_the_error():
    x, features = CASES["more features than neurons"]
    problem = FeatureGram.of(features)
    iteration = PrimalIteration(problem, problem.unit @ x.T)
    errors = [(x - iteration.advance(1).T @ problem.unit).square().sum(1) for _ in range(10)]
    assert all(bool((after <= before + 1e-12).all()) for before, after in zip(errors, errors[1:], strict=False))


def test_sweeps_over_candidates_lower_the_penalised_error_and_end_at_the_optimum():
    x, features = randn(70, 60), sparse_features(90, 60)
    problem = FeatureGram.of(features)
    target = penalised(problem.products_with(x), x.norm(dim=1), 0.3)
    codes, errors = torch.zeros_like(target), []
    for _ in range(30):
        direction = descent(codes, target, problem.gram)
        errors.append(-(codes * (direction + target)).sum(0))
        new = sweep_candidates(codes, direction, problem.gram, 1)
        assert new is not None and bool((new >= 0).all())
        assert not new[(codes == 0) & (direction <= 0)].any(), "only candidates move"
        codes = new
    assert all(bool((after <= before + 1e-12).all()) for before, after in zip(errors, errors[1:], strict=False))
    torch.testing.assert_close(codes.T / problem.norm, nnls(x, features, l1=0.3), atol=1e-6, rtol=0)
    dense = torch.ones_like(codes)
    assert sweep_candidates(dense, descent(dense, target, problem.gram), problem.gram, 1) is None
    nothing = torch.zeros_like(codes)
    assert not sweep_candidates(nothing, nothing - 1, problem.gram, 1).any()


@pytest.mark.parametrize("used", [None, 2, 5])
@pytest.mark.parametrize("d", [64, 300])
def test_products_with_features_of_few_neurons_are_the_plain_ones(d, used):
    features = torch.zeros(7, d, dtype=torch.float64)
    features[:6, 3:5], features[2, 9] = randn(6, 2), 0.0
    x = randn(11, d, seed=2)
    problem = FeatureGram.of(features, used)
    torch.testing.assert_close(problem.products_with(x), problem.unit @ x.T)
    assert (FeatureGram.of(features)._neurons is None) == (d < 64)
    assert FeatureGram.of(randn(3, d))._neurons is None


@pytest.mark.parametrize("has_inverse", [False, True])
def test_systems_on_supports(has_inverse):
    unit = FeatureGram.of(randn(9, 30)).unit
    gram, target = unit @ unit.T, randn(200, 9, seed=3)
    support = randn(200, 9, seed=4) > torch.linspace(-2, 2, 200, dtype=torch.float64)[:, None]
    solved = SupportSolver(gram, 0.0, has_inverse=has_inverse).solve(target, support)
    for row in range(200):
        s = support[row]
        expected = torch.zeros(9, dtype=torch.float64)
        expected[s] = torch.linalg.solve(gram[s][:, s], target[row, s])
        torch.testing.assert_close(solved[row], expected)


def test_pivoting_from_any_guess():
    x, features = CASES["sparse features"]
    problem = FeatureGram.of(features)
    target = x @ problem.unit.T
    solver = SupportSolver(problem.exact, 1e-12, has_inverse=False)
    tolerance = torch.full((len(x),), 1e-10, dtype=torch.float64)
    for guess in (torch.zeros_like(target) > 0, torch.zeros_like(target) == 0, randn(*target.shape, seed=9) > 0):
        codes, optimal = pivot(guess, target, problem.exact, solver, tolerance, 500)
        assert bool(optimal.all())
        torch.testing.assert_close(codes / problem.norm, nnls(x, features), atol=1e-7, rtol=0)


def test_duplicate_zero_and_opposite_features():
    base = randn(6, 20)
    features = torch.cat((base, base, torch.zeros(2, 20), -base[:2], 3 * base[:1]))
    x = randn(15, 20, seed=5)
    for dtype in (torch.float32, torch.float64):
        codes = nnls(x.to(dtype), features.to(dtype))
        assert bool(codes.isfinite().all()) and not codes[:, 12:14].any()
        best = nnls(x, torch.cat((base, -base[:2]))) @ torch.cat((base, -base[:2]))
        torch.testing.assert_close(codes.double() @ features, best, atol=1e-4, rtol=1e-4)
    assert bool(nnls(x, features[:0]).numel() == 0) and nnls(x[:0], features).shape == (0, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_orthogonal_or_opposite_activation_has_zero_codes(dtype):
    features = torch.zeros(3, 8, dtype=dtype)
    features[:, :4] = randn(3, 4).abs()
    x = torch.zeros(3, 8, dtype=dtype)
    x[0, 4:] = 1.0
    x[1, :4] = -1.0
    assert not nnls(x, features).any()


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e20])
def test_scale_of_activations_and_features(scale):
    x, features = (part.float() for part in CASES["sparse features"])
    expected = nnls(x, features)
    torch.testing.assert_close(nnls(x * scale, features) / scale, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(nnls(x, features * scale) * scale, expected, atol=1e-4, rtol=1e-3)


def test_half_precision_in_and_out():
    x, features = CASES["sparse features"]
    codes = nnls(x.bfloat16(), features.bfloat16())
    assert codes.dtype == torch.bfloat16
    torch.testing.assert_close(
        codes.double(), nnls(x.bfloat16().double(), features.bfloat16().double()), rtol=1e-2, atol=1e-3
    )


def test_deterministic_and_rows_do_not_depend_on_each_other():
    x, features = randn(9000, 24, dtype=torch.float32), randn(20, 24, seed=1, dtype=torch.float32)
    codes = nnls(x, features)
    assert torch.equal(codes, nnls(x, features))
    torch.testing.assert_close(codes[8995:], nnls(x[8995:], features), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("lengths", [1.0, 1e-2])
def test_gradient(lengths):
    x, features = randn(2, 7), randn(4, 7, seed=1)
    features[0] *= lengths
    codes = nnls(x, features)
    assert bool((codes == 0).any()) and bool((codes > 0).any()), "active and inactive codes must be among them"
    assert torch.autograd.gradcheck(nnls, (x.requires_grad_(), features.requires_grad_()), rtol=1e-3, atol=1e-4)


def test_gradient_stays_small_with_dependent_features():
    base = randn(5, 12)
    features = torch.cat((base, base)).requires_grad_()
    x = randn(6, 12, seed=3).requires_grad_()
    codes = nnls(x, features)
    codes[:, :5].square().sum().backward()
    assert bool(x.grad.isfinite().all()) and float(x.grad.abs().max()) < 1e3
    assert bool(features.grad.isfinite().all()) and float(features.grad.abs().max()) < 1e3


def test_gradient_follows_the_dtype_and_only_what_is_asked():
    x, features = (part.float() for part in CASES["sparse features"])
    nnls(x.requires_grad_(), features).sum().backward()
    assert x.grad.dtype == torch.float32 and bool(x.grad.isfinite().all())


def test_bad_input():
    x, features = (part.clone() for part in CASES["fewer features"])
    with pytest.raises(ValueError, match="last dimension must be 39"):
        nnls(x, features[:, :39])
    with pytest.raises(ValueError, match="tol must be positive, got -1"):
        nnls(x, features, tol=-1.0)
    with pytest.raises(ValueError, match="max_sweeps"):
        nnls(x, features, max_sweeps=0)
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="row 3"):
        nnls(x, features)
    with pytest.raises(ValueError, match="features has"):
        nnls(features, x)


# --- under an L1 penalty ---


def penalised_problem(n=40, k=12, d=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g).double(), 3 * torch.randn(k, d, generator=g).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "d"), [(12, 20), (40, 20), (3, 20)])
def test_optimality_under_an_l1_penalty(k, d, dtype):
    x, features = (part.to(dtype) for part in penalised_problem(k=k, d=d))
    codes = nnls(x, features, l1=0.2).double()
    x, features = x.double(), features.double()
    length = features.norm(dim=1)
    unit = features / length[:, None]
    slope = (x - codes @ features) @ unit.T - 0.2 * x.norm(dim=1)[:, None]
    scale = (x @ unit.T).abs().amax(1)
    off = torch.where(codes > 0, slope.abs(), slope.clamp(min=0)).amax(1) / scale
    assert float(off.max()) <= 2e-5
    assert bool((codes == 0).any()) and bool((codes > 0).any())


def test_codes_under_an_l1_penalty_are_those_of_a_general_solver():
    x, features = penalised_problem(n=5, k=6)
    codes = nnls(x, features, l1=0.15)
    for row, code in zip(x, codes, strict=True):
        weights = 0.15 * row.norm() * features.norm(dim=1)

        def objective(g, row=row, weights=weights):
            left = row - torch.from_numpy(g) @ features
            return float(0.5 * left.square().sum() + weights @ torch.from_numpy(g))

        start = np.full(6, 0.1)
        found = minimize(objective, start, bounds=[(0, None)] * 6, method="L-BFGS-B", options={"ftol": 1e-15})
        assert objective(code.numpy()) <= found.fun + 1e-8


def test_codes_under_an_l1_penalty_scale_with_the_activation_and_against_the_features():
    x, features = penalised_problem()
    codes = nnls(x, features, l1=0.2)
    torch.testing.assert_close(nnls(7 * x, features, l1=0.2), 7 * codes)
    torch.testing.assert_close(nnls(x, features / 4, l1=0.2), 4 * codes)
    assert not nnls(torch.zeros(2, 20), features.float(), l1=0.2).any()
    # A lone feature is active from a cosine of l1 on.
    feature = torch.eye(2)[:1]
    angled = torch.tensor([[0.19, (1 - 0.19**2) ** 0.5], [0.21, (1 - 0.21**2) ** 0.5]])
    assert (nnls(angled, feature, l1=0.2) > 0).flatten().tolist() == [False, True]


@pytest.mark.slow
def test_gradient_under_an_l1_penalty():
    x, features = penalised_problem(n=6, k=5)
    x.requires_grad_(), features.requires_grad_()
    assert torch.autograd.gradcheck(lambda *parts: nnls(*parts, l1=0.1), (x, features), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("l1", [-0.1, 1.0, float("nan")])
def test_an_l1_penalty_out_of_range(l1):
    with pytest.raises(ValueError, match=r"l1 must lie in \[0, 1\)"):
        nnls(*penalised_problem(), l1=l1)
