"""The steps of semi-nonnegative matrix factorisation, each of which lowers the error or leaves it.

Symbols:
    X: ``(n, d)`` activations. G: ``(n, k)`` codes >= 0. H: ``(k, d)`` signed features, at most s non-zeros in each row.
    A = G'G ``(k, k)``, B = G'X ``(k, d)`` and S_i = sum_t |x_t| g_ti: all that the features' step needs to know.
    error = |X - G H|^2 + 2 l1 sum_ti |x_t| g_ti |h_i| = |X|^2 - 2 <B, H> + <A H, H> + 2 l1 sum_i S_i |h_i|, from
        float64 sums.

The features' step takes the rows of H in turn. Given the others, the error is ``A_ii |h - v|^2 + 2 l1 S_i |h|`` plus a
constant, with ``v = H_i + (B_i - A_i H) / A_ii``. The square separates over neurons, so keeping the s largest |v| and
shortening what is kept by l1 S_i / A_ii is the exact minimiser over all rows with s non-zeros, support included. This
is why hard sparsity need not make the error rise. Without an L1 penalty all rows are then refitted together on the
supports: one least squares per neuron.

B is a float32 product, whose last bits depend on the kernel, on the number of threads and on the column: two equal
neurons need not get equal entries. Entries of v that are no further apart than the rounding of B allows count as tied;
neurons that the feature uses already stay, which keeps the error from rising, and then the lower index goes first.

Codes are held transposed, ``(k, n)``, as the solvers of non-negative least squares want them.

Source: hierarchical alternating least squares (Cichocki and Phan 2009) with the sparsity of Shafran et al.
(arXiv 2506.10920); the projection onto exact supports and the refit are this package's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from saelens_ext.ops.grid_products import summation_error
from saelens_ext.ops.largest_entries import largest_entries
from saelens_ext.ops.nnls.active_set import SupportSolver
from saelens_ext.ops.nnls.kernels import (
    SUM_ROWS,
    DualIteration,
    FeatureGram,
    PrimalIteration,
    descent,
    penalised,
    unit_rows,
    wide_blocks,
)

CHUNK_ROWS = 2048
DUPLICATE_COSINE = 0.99
_SWEEPS = 3
_ROWS_AT_ONCE = 32
_REFIT_RIDGE = 1e-8
_FAINT = 1e-12
_SHORTEST = 1e-300
_SHORTEST_FEATURE = 1e-30


@dataclass
class CodeStatistics:
    """What a pass over the activations leaves of the codes."""

    gram: Float[Tensor, "k k"]
    """A, float64."""
    product: Float[Tensor, "k d"]
    """B, float64."""
    squares: Float[Tensor, " d"]
    """Sum of squares of each neuron, float64."""
    sums: Float[Tensor, " k"]
    """S, float64."""
    l1: float = 0.0
    """Weight of the L1 penalty that the error includes."""
    rounding: float = 0.0
    """Bound on the error of an entry of B, as a fraction of the norm of the codes times the norm of the neuron."""

    @classmethod
    def empty(cls, k: int, d: int, device: torch.device, l1: float = 0.0) -> "CodeStatistics":
        """Of no activations."""
        shapes = (k, k), (k, d), (d,), (k,)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes), l1=l1)

    def of_no_codes(self) -> "CodeStatistics":
        """For other codes of the same activations, which are then added with their sizes."""
        gram, product, sums = (torch.zeros_like(part) for part in (self.gram, self.product, self.sums))
        return replace(self, gram=gram, product=product, sums=sums)

    @property
    def total(self) -> float:
        """|X|^2."""
        return float(self.squares.sum())

    @classmethod
    def of(cls, x: Float[Tensor, "n d"], codes: Float[Tensor, "k n"], l1: float = 0.0) -> "CodeStatistics":
        """Of some activations and their codes."""
        statistics = cls.empty(len(codes), x.shape[1], x.device, l1)
        statistics.add(x, codes)
        return statistics

    def merge(self, other: "CodeStatistics") -> None:
        """Take in those of other activations."""
        for name in ("gram", "product", "squares", "sums"):
            mine = getattr(self, name)
            mine += getattr(other, name)
        self.rounding = max(self.rounding, other.rounding)

    def add(
        self, x: Float[Tensor, "m d"], codes: Float[Tensor, "k m"], sizes: Float64[Tensor, " m"] | None = None
    ) -> None:
        """Take in some activations and their codes; with the activations' sizes, only the codes.

        Products of short blocks, summed in float64, carry no bias. A is float64 throughout: it is inverted, and rounded
        to float32 it would not be positive definite where codes are nearly dependent.
        """
        if sizes is None:
            sizes = self._sizes_added(x)
        parts = zip(x.split(SUM_ROWS), codes.split(SUM_ROWS, dim=1), sizes.split(SUM_ROWS), strict=True)
        for rows, columns, size in parts:
            wide = columns.double()
            self.gram += wide @ wide.T
            self.product += columns @ rows
            self.sums += wide @ size
            self.rounding = max(self.rounding, summation_error(len(rows), rows.dtype))

    def _sizes_added(self, x: Tensor) -> Tensor:
        """The sizes of activations, after their squares were added."""
        sizes = []
        for rows in wide_blocks(x):
            # In float64, since the float32 reductions of torch on the CPU understate by up to 1%.
            squares = rows.square_()
            self.squares += squares.sum(dim=0)
            sizes.append(squares.sum(dim=1).sqrt())
        return torch.cat(sizes)

    def penalty(self, features: Float[Tensor, "k d"]) -> Float64[Tensor, ""]:
        """The L1 penalty of these codes with some features, on their device."""
        return 2 * self.l1 * self.sums @ torch.linalg.vector_norm(features.double(), dim=1)

    def error(self, features: Float[Tensor, "k d"]) -> float:
        """The error of these codes with some features."""
        return finite_error(float(self.error_there(features)))

    def error_there(
        self, features: Float[Tensor, "k d"], products: Float64[Tensor, "k k"] | None = None
    ) -> Float64[Tensor, ""]:
        """The same on their device, as it is rounded; the features' ``products`` H H' save time where they are
        known.
        """
        wide = features.double()
        products = wide @ wide.T if products is None else products
        change = (self.gram * products).sum() - 2 * (wide * self.product).sum()
        return self.squares.sum() + change + self.penalty(features)


def finite_error(error: float) -> float:
    """The error, 0 where rounding made it negative; ValueError where it is no number."""
    if not math.isfinite(error):
        raise ValueError(
            "The squared error is not finite: the activations are too large for their dtype. Scale them down."
        )
    return max(0.0, error)


def sum_of_squares(x: Float[Tensor, "n d"]) -> float:
    """Sum of squares of activations ``(n, d)`` in double precision, block by block: a whole copy would take twice
    their memory.
    """
    return sum(float(rows.square_().sum()) for rows in wide_blocks(x))


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
    indices = largest_entries(features, count, error)
    return torch.zeros_like(features).scatter_(1, indices, features.gather(1, indices))


def update_features(
    statistics: CodeStatistics, features: Float[Tensor, "k d"], count: int, n_sweeps: int = 1
) -> Float[Tensor, "k d"]:
    """New features of at most ``count`` non-zeros per row, whose error is not above that of ``features``.

    Rows whose codes are all zero are left as they are.
    """
    if count >= features.shape[1] and not statistics.l1:
        return _better(statistics, refit(statistics, None, features), features)
    swept = _sweep_features(statistics, features.double(), count, n_sweeps).to(features.dtype)
    if statistics.l1:
        return swept
    return _better(statistics, refit(statistics, swept != 0, swept), swept)


def _better(statistics: CodeStatistics, new: Tensor, old: Tensor) -> Tensor:
    """The new features, unless their error is higher."""
    return torch.where(statistics.error_there(new) <= statistics.error_there(old), new, old)


def _sweep_features(statistics: CodeStatistics, features: Tensor, count: int, n_sweeps: int) -> Tensor:
    """Each row in turn to its exact minimiser; float64.

    What is left for some rows comes from one product; within them it is kept up by rank-one updates.
    """
    features = features.clone()
    live = _live(statistics)
    weights = torch.where(live, statistics.gram.diagonal(), 1.0)
    shortened = statistics.l1 * statistics.sums / weights
    error = statistics.rounding * statistics.squares.sqrt() / weights.sqrt()[:, None]
    for start in list(range(0, len(features), _ROWS_AT_ONCE)) * n_sweeps:
        rows = slice(start, start + _ROWS_AT_ONCE)
        left = torch.addmm(statistics.product[rows], statistics.gram[rows], features, alpha=-1)
        columns = statistics.gram[rows, rows].unbind(1)
        parts = zip(features[rows], left, weights[rows], shortened[rows], error[rows], live[rows], columns, strict=True)
        for i, (old, mine, weight, short, rounding, has_codes, column) in enumerate(parts, start=1):
            best = torch.addcdiv(old, mine, weight)
            chosen = largest_entries(best, count, rounding, old != 0)
            values = best[chosen]
            values = values * (1 - short / torch.linalg.vector_norm(values).clamp(min=_SHORTEST)).clamp(min=0)
            new = torch.where(has_codes, torch.zeros_like(best).scatter_(0, chosen, values), old)
            left[i:].addr_(column[i:], old - new)
            old.copy_(new)
    return features


def refit(
    statistics: CodeStatistics, support: Bool[Tensor, "k d"] | None, features: Float[Tensor, "k d"]
) -> Float[Tensor, "k d"]:
    """Least squares on given supports, or on all neurons; rows whose codes are all zero keep their values."""
    live = _live(statistics)
    root = torch.where(live, statistics.gram.diagonal().sqrt(), 1.0)
    gram = (statistics.gram / root / root[:, None]).fill_diagonal_(1.0)
    target = (statistics.product / root[:, None]).T
    keeps = ~live
    if support is None:
        # Every neuron has the same system.
        shared = gram + _REFIT_RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(shared)
        keeps = keeps | (failed != 0)  # codes too dependent for float64
        solved = torch.cholesky_solve(target.T * live[:, None], factor).T
    else:
        solved = SupportSolver(gram, _REFIT_RIDGE, has_inverse=False).solve(target, support.T & live)
    return torch.where(keeps[:, None], features, (solved / root).T.to(features.dtype))


def refit_together(
    statistics: CodeStatistics, features: Float[Tensor, "k d"]
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k d"]]:
    """All features as if they could use every neuron: ``(k, d)`` values whose error is not above that of ``features``,
    and by how much each may be off by rounding, so that equal neurons tie.

    The penalty is taken by its quadratic bound, 2 |h| <= |h|^2 / l + l with l the length so far, which touches it
    there: without it, features may grow large and cancel, and be cut to different neurons.
    """
    length = torch.linalg.vector_norm(features.double(), dim=1).clamp(min=_SHORTEST_FEATURE)
    bounded = replace(statistics, gram=statistics.gram + torch.diag(statistics.l1 * statistics.sums / length))
    dense = refit(bounded, None, features)
    weights = bounded.gram.diagonal().sqrt().clamp(min=_SHORTEST_FEATURE)
    return dense, statistics.rounding * statistics.squares.sqrt() / weights[:, None]


def _live(statistics: CodeStatistics) -> Tensor:
    """``(k,)`` which features have codes beyond rounding."""
    weights = statistics.gram.diagonal()
    return weights > _FAINT * weights.max()


def normalised(features: Float[Tensor, "k d"]) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    """Unit rows, and the lengths, 1 for a zero row: without it codes and features would drift apart in scale."""
    unit, norm = unit_rows(features)
    return unit.to(features.dtype), norm.to(features.dtype)


def update_codes(
    x: Float[Tensor, "m d"],
    problem: FeatureGram,
    codes: Float[Tensor, "k m"],
    dual: bool,
    sizes: Float[Tensor, " m"],
    l1: float | Float[Tensor, "k 1"] = 0.0,
) -> Float[Tensor, "k m"]:
    """Codes ``(k, m)`` for one block of activations that are at least as good as the given ones, row by row.

    Args:
        x: ``(m, d)`` activations.
        problem: of the features.
        codes: ``(k, m)`` the codes so far, for these features.
        dual: whether to look for new codes through their multipliers, or to improve the old ones directly.
        sizes: ``(m,)`` norms of the activations.
        l1: weight of the L1 penalty, or one for each unit feature.
    """
    target = penalised(problem.products_with(x), sizes, l1)
    scaled = codes * problem.norm[:, None]
    if not dual:
        few = isinstance(l1, Tensor) or l1 > 0
        return PrimalIteration(problem, target, scaled, few=few).advance(_SWEEPS) / problem.norm[:, None]
    new = DualIteration(problem, target).advance(_SWEEPS)
    # A few sweeps need not have reached the optimum: an activation keeps its codes where they are better.
    new = torch.where(_gain(new, target, problem) >= _gain(scaled, target, problem), new, scaled)
    return new / problem.norm[:, None]


def _gain(codes: Tensor, target: Tensor, problem: FeatureGram) -> Tensor:
    """By how much the codes lower each activation's error: <C, 2 T - Q C>."""
    return (codes * descent(codes, target, problem.gram).add_(target)).sum(dim=0)


def first_duplicates(features: Float[Tensor, "k d"]) -> Int[Tensor, " k"]:
    """Of each feature the first earlier one that points the same way, cosine above 0.99; k if none does."""
    unit = normalised(features)[0]
    near = (unit @ unit.T > DUPLICATE_COSINE).triu(diagonal=1)
    places = torch.arange(len(unit), device=unit.device)[:, None]
    return torch.where(near, places, len(unit)).amin(dim=0)


def duplicates(first: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (kept, surplus) of features that point the same way, of what :func:`first_duplicates` gave; no feature is
    kept in one and surplus in another.
    """
    kept: dict[int, int] = {}
    for surplus, earlier in enumerate(first):
        if earlier < len(first):
            kept[surplus] = kept.get(earlier, earlier)
    return [(one, surplus) for surplus, one in kept.items()]


def replacement_costs(gram: Float64[Tensor, "k k"], unit: Float[Tensor, "k d"]) -> Float64[Tensor, " k"]:
    """By how much the error would rise, at most and to first order, if each feature were left to the others.

    That is the lower of two bounds. With all codes free and the other features as they are, it is |g_i|^2 / (Q^-1)_ii.
    And two features h_i, h_j may become one, the best rank-one approximation of g_i h_i + g_j h_j: that leaves the
    smaller eigenvalue of the product of their two-by-two Gram matrices, which is small where two features halve a
    group between them. Of such a pair only the one with the smaller codes gets the lower cost.

    Args:
        gram: ``(k, k)`` A.
        unit: ``(k, d)`` the features, unit rows.
    """
    problem = FeatureGram.of(unit)
    weights = gram.diagonal()
    alone = weights if problem.inverse is None else weights / problem.inverse.diagonal()
    trace = weights[:, None] + weights + 2 * gram * problem.exact
    determinant = (weights[:, None] * weights - gram.square()) * (1 - problem.exact.square())
    merged = (trace - (trace.square() - 4 * determinant).clamp(min=0).sqrt()) / 2
    # Codes that are positive on features that point apart have no common sign.
    smaller = (weights[:, None] < weights) | ((weights[:, None] == weights) & torch.ones_like(gram).triu(1).bool())
    merged = torch.where(smaller & (problem.exact > 0), merged, torch.inf)
    return torch.minimum(alone, merged.amin(dim=1))


def dead(features: Float[Tensor, "k d"], statistics: CodeStatistics) -> Bool[Tensor, " k"]:
    """Which features are zero, or have a part in the reconstruction that is: below 1e-12 of the sum of squares."""
    part = features.double().square().sum(dim=1) * statistics.gram.diagonal()
    return part <= _FAINT * statistics.squares.sum()
