"""Exact non-negative least squares of many activations on the same features, with or without an L1 penalty.

Symbols:
    x: ``(n, d)`` activations; F: ``(k, d)`` features; g: the codes of one activation, ``(k,)``, >= 0.
    g minimises |x - g F|^2 + 2 l1 |x| sum_i g_i |F_i|. As l1 |x| is compared with products of the activation with unit
    features, l1 is a cosine, and the codes of c x are c times those of x.
    KKT residual: how far F (x - g F) - l1 |x| |F| is from 0 where g > 0, and from <= 0 where g = 0, per unit feature
    and relative to the largest product of the activation with a unit feature.

Where features are dependent, the reconstruction ``g F`` is unique but the codes are not; one solution is returned.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.optimize import nnls as scipy_nnls
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelens_ext._checks import finite, positive, width
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.nnls.active_set import SupportSolver, pivot
from saelens_ext.ops.nnls.kernels import (
    DualIteration,
    FeatureGram,
    PrimalIteration,
    descent,
    kkt_residual,
    lengths,
    penalised,
)
from saelens_ext.ops.precision import where_float64_is

logger = logging.getLogger(__name__)

_CHUNK_ROWS = 2048
_WIDE_ROWS = 1024
_PILOT_ROWS = 256
_SWEEPS_BETWEEN_CHECKS = 3
_SWEEPS_BEFORE_EXCHANGE = 2
_EXCHANGE_ROUNDS = 5
_FEW_INACTIVE, _MANY_INACTIVE = 16, 48
"""Mean numbers of zero codes: up to the first their exchange needs no sweeps to begin with, above the second it costs
more than sweeps."""
_FEW_LEFT = 0.1
_PIVOT_RIDGE = 1e-11
"""The KKT residual that the ridge leaves is below sqrt(ridge) times the activation's norm, however dependent the
features.
"""
_PIVOT_ROUNDS = 50
_GRADIENT_RIDGE = 1e-8
_ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}
_DEFAULT_TOL = {torch.float32: 2e-5, torch.float64: 1e-10}


def nnls(
    x: Float[Tensor, "n d"],
    features: Float[Tensor, "k width"],
    *,
    l1: float | int = 0.0,
    tol: float | None = None,
    max_sweeps: int = 30,
) -> Float[Tensor, "n k"]:
    """The non-negative codes that reconstruct each activation best: exact, deterministic and differentiable.

    With an L1 penalty, those that balance the squared error and their own sum best, still a convex problem. Coordinate
    descent, on the codes or on their multipliers, brings most activations to the tolerance; the rest are finished by an
    active-set method in float64. The gradient is that of the solution map: on the positive codes the problem is an
    ordinary least squares, and the other codes do not move. Second derivatives are not offered.

    Memory beyond inputs and outputs is bounded: 4,096 activations at a time.

    Args:
        x: ``(n, d)`` activations, any float dtype; n may be 0.
        features: ``(k, d)`` features; zero rows get zero codes.
        l1: weight of the L1 penalty, a cosine in [0, 1).
        tol: the largest KKT residual, relative to the activation's largest product with a unit feature. By default 2e-5
            for float32 and narrower (which are computed in float32), 1e-10 for float64.
        max_sweeps: coordinate sweeps before the active-set method takes over. It changes the time, not the accuracy.

    Returns:
        ``(n, k)`` codes, >= 0, in the dtype of ``x``. All zero for an activation to which no feature points.

    Raises:
        ValueError: an entry is NaN or infinite, the widths differ, ``l1`` is out of range, or ``tol`` or
            ``max_sweeps`` is not positive.
    """
    width(x, features.shape[1], "x")
    finite(x, "x")
    finite(features, "features")
    positive(max_sweeps, "max_sweeps")
    check_l1(l1)
    working = torch.float64 if torch.float64 in (x.dtype, features.dtype) else torch.float32
    tol = _DEFAULT_TOL[working] if tol is None else tol
    if not tol > 0:
        raise ValueError(
            f"tol must be positive, got {tol!r}; it is the largest relative KKT residual, and 1e-4 is a usual value."
        )
    matrices = (where_float64_is(part).to(working) for part in (x, features))
    codes = _NonNegativeLeastSquares.apply(*matrices, float(l1), float(tol), int(max_sweeps))
    return codes.to(x.device).to(x.dtype)


def check_l1(l1: float | int) -> None:
    """Refuse a weight of the L1 penalty that is no cosine, or would leave every code zero."""
    if not 0 <= l1 < 1:
        raise ValueError(
            f"l1 must lie in [0, 1), got {l1!r}; it is the cosine that a feature must exceed to be active. 0.1 is a "
            "usual value, 0 plain non-negative least squares."
        )


class _NonNegativeLeastSquares(torch.autograd.Function):
    """The solution map and its implicit gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, features: Tensor, l1: float, tol: float, max_sweeps: int) -> Tensor:
        codes = solve_codes(x, FeatureGram.of(features), tol, max_sweeps, l1)
        ctx.save_for_backward(x, features, codes)
        ctx.l1 = l1
        return codes

    @staticmethod
    @once_differentiable
    @standard_modes()
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """With S the positive codes and N the lengths of the features, g_S = (F_S F_S')^-1 (F_S x - l1 |x| N_S). Let
        v_S = (F_S F_S')^-1 upstream_S; then the gradient is v F - l1 <v, N> x / |x| for x and, for F, the sum of
        v (x - g F)' - g (v F)' - l1 |x| diag(v) F / N over activations."""
        x, features, codes = ctx.saved_tensors
        solved = _solve_for_gradient(features, upstream, codes > 0)
        moved = solved @ features
        by_features = solved.T @ (x - codes @ features) - codes.T @ moved if ctx.needs_input_grad[1] else None
        if ctx.l1:
            size, length = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (x, features))
            moved = moved - ctx.l1 * (solved @ length) * x / torch.where(size > 0, size, 1.0)
            if by_features is not None:
                by_features -= ctx.l1 * (solved.T @ size) * features / torch.where(length > 0, length, 1.0)
        return (moved if ctx.needs_input_grad[0] else None), by_features, None, None, None


def _solve_for_gradient(features: Tensor, upstream: Tensor, support: Tensor) -> Tensor:
    """``(F_S F_S')^+ upstream`` per row; a smoothed pseudo-inverse, so that dependent features give no huge
    gradients.
    """
    problem = FeatureGram.of(features.double())
    solver = SupportSolver(problem.exact, _GRADIENT_RIDGE, has_inverse=problem.inverse is not None)
    solved = torch.empty_like(upstream)
    for start in range(0, len(upstream), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        once = solver.solve(upstream[rows].double() / problem.norm, support[rows])
        twice = solver.solve(once, support[rows])
        # With e the ridge, (A + e)^-1 - e (A + e)^-2 = A (A + e)^-2: the inverse where A is large, zero where A is.
        solved[rows] = ((once - _GRADIENT_RIDGE * twice) / problem.norm).to(upstream.dtype)
    return solved


@torch.no_grad()
def solve_codes(
    x: Float[Tensor, "n d"],
    problem: FeatureGram,
    tol: float = _DEFAULT_TOL[torch.float32],
    max_sweeps: int = 30,
    l1: float | int = 0.0,
) -> Float[Tensor, "n k"]:
    """The codes, without checks and without gradient; see :func:`nnls`."""
    codes, l1 = x.new_zeros(len(x), len(problem.norm)), float(l1)
    if not codes.numel():
        return codes
    dual = dual_is_faster(x[:_PILOT_ROWS], problem, l1)
    for start in range(0, len(x), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        codes[rows] = _solve_chunk(x[rows], problem, dual, tol, max_sweeps, l1).T
    return codes.div_(problem.norm)


@torch.no_grad()
def dual_is_faster(x: Float[Tensor, "n d"], problem: FeatureGram, l1: float | int = 0.0) -> bool:
    """Whether a few sweeps over the multipliers get these activations nearer to the optimum than over the codes."""
    if problem.inverse is None or not len(x):
        return False
    target = penalised(problem.products_with(x), torch.linalg.vector_norm(x, dim=1), l1)
    residuals = []
    for iteration in (PrimalIteration(problem, target, few=l1 > 0), DualIteration(problem, target)):
        codes = iteration.advance(_SWEEPS_BETWEEN_CHECKS)
        residuals.append(float(kkt_residual(codes, descent(codes, target, problem.gram)).sum()))
    return residuals[1] < residuals[0]


def _solve_chunk(x: Tensor, problem: FeatureGram, dual: bool, tol: float, max_sweeps: int, l1: float) -> Tensor:
    """Codes ``(k, m)`` per unit feature: coordinate sweeps, dropping activations as they converge, then pivoting."""
    products = problem.products_with(x)
    size = lengths(x)
    # An activation orthogonal to all features has only rounding for products: nothing there to be relative to.
    scale = torch.maximum(products.abs().amax(dim=0), _ROUNDING[x.dtype] / tol * size.to(x.dtype))
    target = penalised(products, size.to(x.dtype), l1)
    codes = torch.empty_like(target)
    left = torch.arange(len(x), device=x.device)
    iteration = DualIteration(problem, target) if dual else PrimalIteration(problem, target, few=l1 > 0)
    attempts = _attempts(iteration, scale * tol, max_sweeps)
    for current in attempts:
        codes[:, left] = current
        # Places, not a mask: the host waits once to know how many there are.
        still = (kkt_residual(current, descent(current, target, problem.gram)) > tol * scale).nonzero()[:, 0]
        left, target, scale = left[still], target[:, still], scale[still]
        if not len(left):
            return codes
        iteration.keep(still)
    codes[:, left] = _finish(codes[:, left], x[left], problem, tol * scale, l1)
    return codes


def _attempts(iteration: PrimalIteration | DualIteration, tolerance: Tensor, max_sweeps: int) -> Iterator[Tensor]:
    """Ever better codes, ``(k, ·)``, of the activations that the iteration still keeps; ends where it pays to pivot."""
    if isinstance(iteration, DualIteration):
        if float(iteration.inactive.sum()) > _FEW_INACTIVE * len(tolerance):
            iteration.advance(_SWEEPS_BEFORE_EXCHANGE)
        if float(iteration.inactive.sum()) <= _MANY_INACTIVE * len(tolerance):
            yield iteration.exchanged(iteration.inactive, tolerance, _EXCHANGE_ROUNDS)
            if iteration.size < _FEW_LEFT * len(tolerance):
                return
    for _ in range(0, max_sweeps, _SWEEPS_BETWEEN_CHECKS):
        yield iteration.advance(_SWEEPS_BETWEEN_CHECKS)


def _finish(codes: Tensor, x: Tensor, problem: FeatureGram, tolerance: Tensor, l1: float) -> Tensor:
    """Codes ``(k, m)`` by active-set methods in float64, from where coordinate descent stopped.

    Pivoting settles rows together, but where features are dependent it may go round in circles: the rows that it has
    not settled after some rounds are left to scipy's method, which takes one at a time and always ends.
    """
    parts = [
        penalised(problem.exact_unit @ rows.double().T, torch.linalg.vector_norm(rows.double(), dim=1), l1).T
        for rows in x.split(_WIDE_ROWS)
    ]
    target = torch.cat(parts)
    solver = SupportSolver(problem.exact, _PIVOT_RIDGE, has_inverse=problem.inverse is not None)
    passive = (codes > 0).T.contiguous()
    solved, optimal = pivot(passive, target, problem.exact, solver, tolerance.double(), _PIVOT_ROUNDS)
    if not bool(optimal.all()):
        logger.info(
            "Pivoting left %d of %d activations to scipy's non-negative least squares.", int((~optimal).sum()), len(x)
        )
        solved[~optimal] = _one_by_one(x[~optimal].double(), target[~optimal], problem, l1)
    return solved.T.to(codes.dtype)


def _one_by_one(x: Tensor, target: Float64[Tensor, "m k"], problem: FeatureGram, l1: float) -> Float64[Tensor, "m k"]:
    """Codes by Lawson and Hanson's active-set method."""
    matrix, right = problem.exact_unit.T, x
    if l1:
        # Other activations on other features with the same products: with L L' = Q, those are L^-1 T on L.
        ridge = _PIVOT_RIDGE * torch.eye(len(problem.exact), dtype=target.dtype, device=target.device)
        root = torch.linalg.cholesky(problem.exact + ridge)
        matrix, right = root.T, torch.linalg.solve_triangular(root, target.T, upper=False).T
    rows = [scipy_nnls(matrix.cpu().numpy(), row)[0] for row in right.cpu().numpy()]
    return torch.from_numpy(np.stack(rows)).to(target.device)
