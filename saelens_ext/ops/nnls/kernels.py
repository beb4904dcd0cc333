"""The solvers behind non-negative least squares, all batched over activations.

Symbols:
    k: features; m: activations of one chunk. Everything here is per unit feature, so that tolerances mean something.
    Q: ``(k, k)`` Gram of the unit features, its diagonal 1 (for a feature that is zero, too: nothing else touches it).
    T: ``(k, m)`` targets, the products of unit features with activations, less what an L1 penalty takes off.
    C: ``(k, m)`` codes >= 0, with multipliers M = Q C - T >= 0 at the optimum, zero where C is not.
    KKT residual: |Q C - T| where C > 0 and max(T - Q C, 0) where C = 0; zero exactly at the optimum.
    K: the inverse of Q. The multipliers are themselves the solution of a non-negative least squares with Gram K and
        targets -K T, and C = K (T + M).

Codes of signed features are mostly positive, so that few multipliers are: coordinate descent on the multipliers (the
dual) then takes a handful of sweeps where the codes themselves (the primal) take hundreds. Where most codes are zero it
is the other way round.

Codes stand in columns because a coordinate step touches one feature of all activations: a contiguous row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn.functional import embedding_bag

from saelens_ext.ops.nnls.active_set import exchange
from saelens_ext.ops.nnls.few import RELAXATION, sweep_candidates
from saelens_ext.ops.precision import float64_device, where_float64_is

SUM_ROWS = 1024
_BLOCK = 32
_LARGEST_CONDITION = {torch.float32: 1e5, torch.float64: 1e9}
_SHORTEST = 1e-30
_SPARSE = 32
"""A product with features gathers their neurons where there are this many times as many neurons in all."""


@dataclass(frozen=True)
class FeatureGram:
    """What the solvers need of the features, made once per call."""

    unit: Float[Tensor, "k d"]
    """Unit rows in the working dtype; a zero feature stays zero."""
    norm: Float[Tensor, " k"]
    """Lengths of the features, 1 for a zero feature."""
    gram: Float[Tensor, "k k"]
    """Q in the working dtype."""
    exact_unit: Float64[Tensor, "k d"]
    """Unit rows in float64."""
    exact: Float64[Tensor, "k k"]
    """Q in float64."""
    length: Float64[Tensor, " k"]
    """Lengths in float64, 0 for a zero feature."""
    used: int | None = None
    """Neurons that a feature uses at most, where that is known."""

    @classmethod
    def of(cls, features: Float[Tensor, "k d"], used: int | None = None) -> "FeatureGram":
        """Prepare features of float32 or float64. Rows shorter than 1e-30 count as zero."""
        unit, norm = unit_rows(features)
        return cls._of(unit, norm, unit @ unit.T, features.dtype, used)

    @classmethod
    def from_gram(cls, maps: Float64[Tensor, "k d"], gram: Float64[Tensor, "k k"], dtype: torch.dtype) -> "FeatureGram":
        """Prepare the problem of minimising <C, Q C - 2 T> with a given Gram Q, where T is ``maps`` times the
        activations.

        Args:
            maps: ``(k, d)`` what takes activations to targets; zero where the diagonal of Q is.
            gram: ``(k, k)`` Q, positive semi-definite.
            dtype: the working dtype.
        """
        norm = gram.diagonal().clamp(min=0).sqrt()
        norm = torch.where(norm < _SHORTEST, 1.0, norm)
        return cls._of(maps / norm[:, None], norm, gram / norm / norm[:, None], dtype)

    @classmethod
    def _of(
        cls, unit: Tensor, norm: Tensor, exact: Tensor, dtype: torch.dtype, used: int | None = None
    ) -> "FeatureGram":
        """From float64 parts."""
        length = torch.where(exact.diagonal() > 0, norm, 0.0)
        # The coordinate step takes the diagonal for one; rounding must not make it anything else.
        exact = exact.fill_diagonal_(1.0)
        return cls(unit.to(dtype), norm.to(dtype), exact.to(dtype), unit, exact, length, used)

    @property
    def products(self) -> Float64[Tensor, "k k"]:
        """Of all pairs of features, as long as they are."""
        return self.exact * self.length * self.length[:, None]

    def products_with(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "k m"]:
        """Of the unit features with activations."""
        if self._neurons is None:
            return self.unit @ x.T
        indices, values = self._neurons
        return embedding_bag(indices, x.T.contiguous(), mode="sum", per_sample_weights=values)

    @cached_property
    def _neurons(self) -> tuple[Tensor, Tensor] | None:
        """Which neurons each feature uses, and how much; None where they are not few."""
        used = int(self.unit.count_nonzero(dim=1).max()) if self.used is None else self.used
        if used * _SPARSE > self.unit.shape[1]:
            return None
        indices = self.unit.abs().topk(max(1, used), dim=1).indices
        return indices, self.unit.gather(1, indices)

    @cached_property
    def inverse(self) -> Float64[Tensor, "k k"] | None:
        """K in float64; None where the features are too dependent for the working dtype."""
        return _safe_inverse(self.exact, _LARGEST_CONDITION[self.gram.dtype])

    @cached_property
    def dual_gram(self) -> Float[Tensor, "k k"] | None:
        """K scaled to a unit diagonal, in the working dtype."""
        if self.inverse is None:
            return None
        root = self.inverse.diagonal().sqrt()
        return (self.inverse / root / root[:, None]).fill_diagonal_(1.0).to(self.gram.dtype)


def unit_rows(features: Float[Tensor, "k d"]) -> tuple[Float64[Tensor, "k d"], Float64[Tensor, " k"]]:
    """Features of length 1, and their lengths, 1 for one that is zero, or shorter than 1e-30."""
    wide = features.double()
    norm = wide.square().sum(dim=1).sqrt()
    zero = norm < _SHORTEST
    norm = torch.where(zero, 1.0, norm)
    return torch.where(zero[:, None], 0.0, wide / norm[:, None]), norm


def wide_blocks(x: Float[Tensor, "n d"]) -> Iterator[Tensor]:
    """The rows in float64, some at a time, to be overwritten at will: each block is written over the one before.

    A copy of its own for each would be more memory than there are rows: allocators do not always use again what is
    given back to them between blocks.
    """
    buffer = torch.empty(min(SUM_ROWS, len(x)), x.shape[1], dtype=torch.float64, device=float64_device(x.device))
    for rows in x.split(SUM_ROWS):
        yield buffer[: len(rows)].copy_(where_float64_is(rows))


def lengths(x: Float[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """Norms of activations, in float64: beside an enormous activation, squares of the others may vanish in float32."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in wide_blocks(x)])


def _safe_inverse(gram: Float64[Tensor, "k k"], largest_condition: float) -> Float64[Tensor, "k k"] | None:
    """The inverse; None if the condition number, in the 1-norm, is above the limit."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed) or not len(gram):
        return None
    inverse = torch.cholesky_inverse(factor)
    condition = torch.linalg.matrix_norm(gram, 1) * torch.linalg.matrix_norm(inverse, 1)
    return inverse if float(condition) < largest_condition else None


def sweep(
    codes: Float[Tensor, "k m"], target: Float[Tensor, "k m"], gram: Float[Tensor, "k k"], n_sweeps: int = 1
) -> None:
    """Minimise over each code in turn, features in order, ``n_sweeps`` times, in place; the error never rises.

    The gradient is refreshed by one matrix product per block of features, and within the block by rank-one updates:
    the same steps as feature by feature, at nearly the speed of a matrix product.
    """
    k = len(gram)
    for start in list(range(0, k, _BLOCK)) * n_sweeps:
        rows = slice(start, min(start + _BLOCK, k))
        block, inner = codes[rows], gram[rows, rows]
        moved = torch.addmm(target[rows], gram[rows], codes, alpha=-1)
        views = zip(block.unbind(), moved.unbind(), inner.unbind(1), strict=True)
        for i, (old, new, column) in enumerate(views, start=1):
            torch.add(old, new, alpha=RELAXATION, out=new).clamp_(min=0)
            if i < len(block):
                moved[i:].addr_(column[i:], old.sub_(new))
        block.copy_(moved)


def penalised(
    products: Float[Tensor, "k m"], sizes: Float[Tensor, " m"], l1: float | int | Float[Tensor, "k 1"]
) -> Float[Tensor, "k m"]:
    """T - l1 |x|: the targets under an L1 penalty on the codes, whose weight is a cosine, or one for each feature."""
    return products - l1 * sizes if isinstance(l1, Tensor) or l1 else products


def descent(
    codes: Float[Tensor, "k m"], target: Float[Tensor, "k m"], gram: Float[Tensor, "k k"]
) -> Float[Tensor, "k m"]:
    """T - Q C: where each code would be moved to, were it free."""
    return torch.addmm(target, gram, codes, alpha=-1)


def kkt_residual(codes: Float[Tensor, "k m"], direction: Float[Tensor, "k m"]) -> Float[Tensor, " m"]:
    """The largest violation of the optimality conditions of each activation, given its :func:`descent` direction."""
    return torch.where(codes > 0, direction.abs(), direction).amax(dim=0).clamp_(min=0)


class PrimalIteration:
    """Coordinate descent on the codes of some activations; over their candidates alone where these are ``few``."""

    def __init__(
        self,
        problem: FeatureGram,
        target: Float[Tensor, "k m"],
        codes: Float[Tensor, "k m"] | None = None,
        few: bool = False,
    ) -> None:
        self._gram, self._target, self._few = problem.gram, target, few
        self._codes = torch.zeros_like(target) if codes is None else codes

    def advance(self, n_sweeps: int) -> Float[Tensor, "k m"]:
        """The codes after so many more sweeps."""
        if self._few:
            direction = descent(self._codes, self._target, self._gram)
            some = sweep_candidates(self._codes, direction, self._gram, n_sweeps)
            self._few = some is not None
            self._codes = self._codes if some is None else some
        if not self._few:
            sweep(self._codes, self._target, self._gram, n_sweeps)
        return self._codes

    def keep(self, columns: Tensor) -> None:
        """Go on with these activations only."""
        self._codes, self._target = self._codes[:, columns], self._target[:, columns]


class DualIteration:
    """Coordinate descent on the multipliers of some activations."""

    def __init__(self, problem: FeatureGram, target: Float[Tensor, "k m"]) -> None:
        if problem.inverse is None or problem.dual_gram is None:
            raise ValueError("the features are too dependent for the dual; use PrimalIteration.")
        self._gram, self._primal_gram = problem.dual_gram, problem.gram
        self._root = problem.inverse.diagonal().sqrt().to(target.dtype)[:, None]
        self._inverse = problem.inverse.to(target.dtype)
        self._free = self._solved(target)
        self._goal = self._free / -self._root
        self._multipliers = torch.zeros_like(target)
        self._swept = False

    def _solved(self, right: Tensor) -> Tensor:
        """K times the right-hand sides, refined once: K in float32 alone would lose the condition number's digits."""
        first = self._inverse @ right
        return first.addmm_(self._inverse, descent(first, right, self._primal_gram))

    def advance(self, n_sweeps: int) -> Float[Tensor, "k m"]:
        """The codes after so many more sweeps: zero exactly where the multipliers are not."""
        sweep(self._multipliers, self._goal, self._gram, n_sweeps)
        self._swept = True
        codes = torch.addmm(self._free, self._inverse, self._multipliers / self._root)
        return codes.clamp_(min=0).mul_(self._multipliers <= 0)

    def exchanged(
        self, inactive: Bool[Tensor, "k m"], scale: Float[Tensor, " m"], max_rounds: int
    ) -> Float[Tensor, "k m"]:
        """Codes by :func:`~saelens_ext.ops.nnls.active_set.exchange` from a guess of which are zero; to be checked."""
        return exchange(inactive.T, self._free.T, self._inverse, scale, max_rounds).T

    @property
    def inactive(self) -> Bool[Tensor, "k m"]:
        """Which codes are zero for now: those with a multiplier, or before any sweep those that would be negative."""
        return self._multipliers > 0 if self._swept else self._free < 0

    @property
    def size(self) -> int:
        """Activations still kept."""
        return self._free.shape[1]

    def keep(self, columns: Tensor) -> None:
        """Go on with these activations only."""
        self._free, self._goal = self._free[:, columns], self._goal[:, columns]
        self._multipliers = self._multipliers[:, columns]
