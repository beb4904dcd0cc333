"""The steps of semi-nonnegative matrix factorisation, each of which lowers the squared error or leaves it.

Symbols:
    X: ``(n, d)`` activations. G: ``(n, k)`` codes >= 0. H: ``(k, d)`` signed features, at most s non-zeros in each row.
    A = G'G ``(k, k)`` and B = G'X ``(k, d)``: all that the features' step needs to know of codes and activations.
    error = |X - G H|^2 = |X|^2 - 2 <B, H> + <A H, H>, from float64 sums.

The features' step takes the rows of H in turn. Given the others, the error is ``A_ii |h - v|^2`` plus a constant, with
``v = H_i + (B_i - A_i H) / A_ii``; it separates over neurons, so keeping the s largest |v| is the exact minimiser over
all rows with s non-zeros, support included. This is why hard sparsity need not make the error rise. Then all rows are
refitted together on the supports: one least squares per neuron.

B is a float32 product, whose last bits depend on the kernel, on the number of threads and on the column: two equal
neurons need not get equal entries. Entries of v that are no further apart than the rounding of B allows count as tied;
neurons that the feature uses already stay, which keeps the error from rising, and then the lower index goes first.

Codes are held transposed, ``(k, n)``, as the solvers of non-negative least squares want them.

Source: hierarchical alternating least squares (Cichocki and Phan 2009) with the sparsity of Shafran et al.
(arXiv 2506.10920); the projection onto exact supports and the refit are this package's.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_ext.ops.grid_products import summation_error
from saelens_ext.ops.largest_entries import largest_entries
from saelens_ext.ops.nnls_active_set import SupportSolver
from saelens_ext.ops.nnls_kernels import DualIteration, FeatureGram, PrimalIteration, descent

CHUNK_ROWS = 4096
DUPLICATE_COSINE = 0.99
_SUM_ROWS = 1024
_SWEEPS = 3
_REFIT_RIDGE = 1e-8
_FAINT = 1e-12


@dataclass
class CodeStatistics:
    """What a pass over the activations leaves of the codes."""

    gram: Float[Tensor, "k k"]
    """A, float64."""
    product: Float[Tensor, "k d"]
    """B, float64."""
    squares: Float[Tensor, " d"]
    """Sum of squares of each neuron, float64."""
    rounding: float = 0.0
    """Bound on the error of an entry of B, as a fraction of the norm of the codes times the norm of the neuron."""

    @classmethod
    def empty(cls, k: int, d: int, device: torch.device) -> "CodeStatistics":
        """Of no activations."""
        options = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(k, k, **options), torch.zeros(k, d, **options), torch.zeros(d, **options))

    @property
    def total(self) -> float:
        """|X|^2."""
        return float(self.squares.sum())

    @classmethod
    def of(cls, x: Float[Tensor, "n d"], codes: Float[Tensor, "k n"]) -> "CodeStatistics":
        """Of some activations and their codes."""
        statistics = cls.empty(len(codes), x.shape[1], x.device)
        statistics.add(x, codes)
        return statistics

    def add(self, x: Float[Tensor, "m d"], codes: Float[Tensor, "k m"]) -> None:
        """Take in some activations and their codes.

        Products of short blocks, summed in float64, carry no bias. A is float64 throughout: it is inverted, and rounded
        to float32 it would not be positive definite where codes are nearly dependent.
        """
        for rows, columns in zip(x.split(_SUM_ROWS), codes.split(_SUM_ROWS, dim=1), strict=True):
            wide = columns.double()
            self.gram += wide @ wide.T
            self.product += columns @ rows
            # In float64, since the float32 reductions of torch on the CPU understate by up to 1%.
            self.squares += rows.double().square().sum(dim=0)
            self.rounding = max(self.rounding, summation_error(len(rows), rows.dtype))

    def damp(self, damping: float) -> None:
        """Add to the error ``damping`` times the sum over features of |g_i|^2 |h_i|^2, by a heavier diagonal of A."""
        self.gram.diagonal().mul_(1 + damping)

    def error(self, features: Float[Tensor, "k d"]) -> float:
        """The squared error of these codes with some features."""
        wide = features.double()
        error = self.total + float((wide * (self.gram @ wide - 2 * self.product)).sum())
        if not math.isfinite(error):
            raise ValueError(
                "The squared error is not finite: the activations are too large for their dtype. Scale them down."
            )
        return max(0.0, error)


def support_size(sparsity: float | int, d: int) -> int:
    """How many of d neurons a feature may use: ceil(sparsity * d), at least 1."""
    # 0.07 * 100 is 7.000000000000001: rounding must not add a neuron.
    return max(1, math.ceil(round(sparsity * d, 9)))


def keep_largest(
    features: Float[Tensor, "k d"], count: int, error: Float[Tensor, "k d"] | None = None
) -> Float[Tensor, "k d"]:
    """A copy with only the ``count`` entries of largest magnitude in each row; ``error`` as of ``largest_entries``."""
    if count >= features.shape[1]:
        return features.clone()
    kept = torch.zeros_like(features)
    for i, (row, target) in enumerate(zip(features, kept, strict=True)):
        indices = largest_entries(row, count, None if error is None else error[i])
        target[indices] = row[indices]
    return kept


def update_features(
    statistics: CodeStatistics, features: Float[Tensor, "k d"], count: int, n_sweeps: int = 1
) -> Float[Tensor, "k d"]:
    """New features of at most ``count`` non-zeros per row, whose error is not above that of ``features``.

    Rows whose codes are all zero are left as they are.
    """
    if count >= features.shape[1]:
        candidate = refit(statistics, torch.ones_like(features, dtype=torch.bool), features)
        return candidate if statistics.error(candidate) <= statistics.error(features) else features
    swept = _sweep_features(statistics, features.double(), count, n_sweeps).to(features.dtype)
    refitted = refit(statistics, swept != 0, swept)
    return refitted if statistics.error(refitted) <= statistics.error(swept) else swept


def _sweep_features(statistics: CodeStatistics, features: Tensor, count: int, n_sweeps: int) -> Tensor:
    """Each row in turn to its exact minimiser; float64."""
    features = features.clone()
    residual = statistics.product - statistics.gram @ features
    weights = statistics.gram.diagonal().tolist()
    error = statistics.rounding * statistics.squares.sqrt()
    for i in _live(statistics).nonzero()[:, 0].tolist() * n_sweeps:
        best = features[i] + residual[i] / weights[i]
        kept = largest_entries(best, count, error / math.sqrt(weights[i]), features[i] != 0)
        change = -features[i]
        change[kept] += best[kept]
        moved = change.nonzero()[:, 0]
        features[i, moved] += change[moved]
        residual[:, moved] -= statistics.gram[:, i, None] * change[moved]
    return features


def refit(statistics: CodeStatistics, support: Tensor, features: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """Least squares on given supports, ``(k, d)`` booleans; rows whose codes are all zero keep their values."""
    live = _live(statistics)
    root = torch.where(live, statistics.gram.diagonal().sqrt(), 1.0)
    gram = (statistics.gram / root / root[:, None]).fill_diagonal_(1.0)
    target = (statistics.product / root[:, None]).T
    columns = support.T & live
    if bool(columns[:, live].all()):
        # Every neuron has the same system.
        shared = gram + _REFIT_RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(shared)
        if bool(failed):  # codes too dependent for float64: the values stay
            return features
        solved = torch.cholesky_solve(target.T * live[:, None], factor).T
    else:
        solved = SupportSolver(gram, _REFIT_RIDGE, has_inverse=False).solve(target, columns)
    return torch.where(live[:, None], (solved / root).T.to(features.dtype), features)


def _live(statistics: CodeStatistics) -> Tensor:
    """``(k,)`` which features have codes beyond rounding."""
    weights = statistics.gram.diagonal()
    return weights > _FAINT * weights.max()


def normalised(features: Float[Tensor, "k d"]) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    """Unit rows, and the lengths, 1 for a zero row: without it codes and features would drift apart in scale."""
    problem = FeatureGram.of(features)
    return problem.unit, problem.norm


def update_codes(
    x: Float[Tensor, "m d"], problem: FeatureGram, codes: Float[Tensor, "k m"], dual: bool
) -> tuple[Float[Tensor, "k m"], Float[Tensor, " m"]]:
    """Codes for one block of activations that are at least as good as the given ones, row by row.

    Args:
        x: ``(m, d)`` activations.
        problem: of the features.
        codes: ``(k, m)`` the codes so far, for these features.
        dual: whether to look for new codes through their multipliers, or to improve the old ones directly.

    Returns:
        ``(k, m)`` codes and ``(m,)`` the squared errors they leave, short of rounding.
    """
    target = problem.unit @ x.T
    scaled = codes * problem.norm[:, None]
    if not dual:
        new = PrimalIteration(problem, target, scaled).advance(_SWEEPS)
        gain = _gain(new, target, problem)
    else:
        new = DualIteration(problem, target).advance(_SWEEPS)
        gain, before = _gain(new, target, problem), _gain(scaled, target, problem)
        # A few sweeps need not have reached the optimum: an activation keeps its codes where they are better.
        new = torch.where(gain >= before, new, scaled)
        gain = torch.maximum(gain, before)
    return new / problem.norm[:, None], torch.linalg.vector_norm(x, dim=1).square() - gain


def _gain(codes: Tensor, target: Tensor, problem: FeatureGram) -> Tensor:
    """By how much the codes lower each activation's squared error: <C, 2 T - Q C>."""
    return (codes * descent(codes, target, problem.gram).add_(target)).sum(dim=0)


def duplicates(features: Float[Tensor, "k d"]) -> list[tuple[int, int]]:
    """Pairs (kept, surplus) of features that point the same way, cosine above 0.99; each surplus one appears once."""
    unit = FeatureGram.of(features).unit
    near = (unit @ unit.T > DUPLICATE_COSINE).triu(diagonal=1)
    pairs, gone = [], set()
    for i, j in near.nonzero().tolist():
        if i not in gone and j not in gone:
            pairs.append((i, j))
            gone.add(j)
    return pairs


def dead(features: Float[Tensor, "k d"], statistics: CodeStatistics) -> list[int]:
    """Features that are zero, or whose part in the reconstruction is: below 1e-12 of the sum of squares."""
    part = features.double().square().sum(dim=1) * statistics.gram.diagonal()
    return (part <= _FAINT * statistics.total).nonzero()[:, 0].tolist()
