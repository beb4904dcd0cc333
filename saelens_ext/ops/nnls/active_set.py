"""Least squares on each row's own support, and the active-set method that finds the support; float64, batched.

Symbols:
    m: rows (activations); k: features. Q: ``(k, k)`` Gram of unit features; K: its inverse, where there is one.
    passive set P of a row: the codes that may be positive; N: the others.

``Q_PP y_P = t_P`` is solved directly where P is the smaller set. Where N is, ``y = K (t + mu)`` with mu zero outside N
and ``K_NN mu_N = -(K t)_N``, which is the same with the smaller system.

Source: Kim and Park, Fast nonnegative matrix factorization: an active-set-like method (SIAM J. Sci. Comput. 2011).
"""

from bisect import bisect_right
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

_CHUNK_NUMBERS = 4 * 2**20  # 32 MB of float64
_PADDING = 1.25
_SMALLEST_SYSTEM = 8
_FULL_EXCHANGES = 3


class SupportSolver:
    """Solves ``(Q + ridge) y = t`` restricted to each row's own support.

    Args:
        gram: ``(k, k)`` Q, positive semi-definite with unit diagonal.
        ridge: added to the diagonal: keeps the systems defined when features of one support are dependent.
        has_inverse: whether Q is far enough from singular for the complementary systems.
    """

    def __init__(self, gram: Float64[Tensor, "k k"], ridge: float, *, has_inverse: bool) -> None:
        self._gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(self._gram)) if has_inverse else None

    def solve(self, target: Float64[Tensor, "m k"], support: Bool[Tensor, "m k"]) -> Float64[Tensor, "m k"]:
        """The solution of every row, ``(m, k)``, zero outside its support.

        Args:
            target: ``(m, k)`` right-hand sides; entries outside the support do not matter.
            support: ``(m, k)`` which unknowns each row has.
        """
        target = target * support
        if self._inverse is None:
            return _solve_grouped(self._gram, target, support)
        solution = torch.empty_like(target)
        dense = support.sum(dim=1) * 2 > len(self._gram)
        solution[~dense] = _solve_grouped(self._gram, target[~dense], support[~dense])
        free = target[dense] @ self._inverse
        multipliers = _solve_grouped(self._inverse, -free, ~support[dense])
        solution[dense] = (free + multipliers @ self._inverse) * support[dense]
        return solution


def _solve_grouped(
    gram: Float[Tensor, "k k"], target: Float[Tensor, "m k"], support: Bool[Tensor, "m k"]
) -> Float[Tensor, "m k"]:
    """Rows in groups of similar support size."""
    solution = torch.zeros_like(target)
    for rows, size in similar(support.sum(dim=1), _CHUNK_NUMBERS, _PADDING):
        _solve_padded(gram, target, support, rows, size, solution)
    return solution


def similar(sizes: Int[Tensor, " m"], most_numbers: int, padding: float) -> Iterator[tuple[Int[Tensor, " _"], int]]:
    """Which rows to solve together, and the largest of their sizes; rows of size 0 are in no group.

    Args:
        sizes: ``(m,)`` unknowns of each row.
        most_numbers: of the systems of a group.
        padding: how many times as large as the smallest of a group its others may be.
    """
    sizes, order = sizes.sort(stable=True)
    counts = sizes.tolist()
    start = bisect_right(counts, 0)
    while start < len(counts):
        largest = max(_SMALLEST_SYSTEM, int(padding * counts[start]))
        end = bisect_right(counts, largest)
        end = min(end, start + max(1, most_numbers // largest**2))
        yield order[start:end], counts[end - 1]
        start = end


def _solve_padded(
    gram: Float[Tensor, "k k"],
    target: Float[Tensor, "m k"],
    support: Bool[Tensor, "m k"],
    rows: Tensor,
    size: int,
    solution: Float[Tensor, "m k"],
) -> None:
    """Some rows' systems gathered into ``size`` unknowns each, the missing ones as rows of an identity."""
    row, column = support[rows].nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(rows))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    columns = row.new_zeros(len(rows), size)
    columns[row, place] = column
    valid = torch.arange(size, device=row.device) < counts[:, None]
    systems = torch.take(gram, columns[:, :, None] * len(gram) + columns[:, None, :])
    systems *= valid[:, :, None] & valid[:, None, :]
    systems.diagonal(dim1=1, dim2=2).add_(~valid)
    right = torch.zeros(len(rows), size, 1, dtype=gram.dtype, device=row.device)
    right[row, place, 0] = target[rows[row], column]
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(systems))
    solution[rows[row], column] = solved[row, place, 0]


def exchange(
    inactive: Bool[Tensor, "m k"],
    free: Float[Tensor, "m k"],
    inverse: Float[Tensor, "k k"],
    tolerance: Float[Tensor, " m"],
    max_rounds: int,
) -> Float[Tensor, "m k"]:
    """Codes by exchanging all infeasible variables at once, through the inverse Gram: for few inactive codes.

    Each round solves for the multipliers of the inactive set. It may end before a row is solved, or, in theory, cycle:
    the caller checks the rows.

    Args:
        inactive: ``(m, k)`` guess of the codes that are zero; small sets.
        free: ``(m, k)`` K t, the codes without the constraint.
        inverse: ``(k, k)`` K.
        tolerance: ``(m,)`` by how much a code or multiplier may fall short of zero.
        max_rounds: rounds at most.
    """
    inactive = inactive.clone()
    codes = torch.empty_like(free)
    rows = torch.arange(len(free), device=free.device)
    for _ in range(max_rounds):
        mine, here = inactive[rows], free[rows]
        multipliers = _solve_grouped(inverse, -here, mine)
        current = here.addmm_(multipliers, inverse).masked_fill_(mine, 0.0)
        codes[rows] = current.clamp(min=0)
        wrong = torch.minimum(current, multipliers) < -tolerance[rows, None]
        going = wrong.any(dim=1)
        rows = rows[going]
        if not len(rows):
            break
        inactive[rows] ^= wrong[going]
    return codes


def pivot(
    passive: Bool[Tensor, "m k"],
    target: Float64[Tensor, "m k"],
    gram: Float64[Tensor, "k k"],
    solver: SupportSolver,
    tolerance: Float64[Tensor, " m"],
    max_rounds: int,
) -> tuple[Float64[Tensor, "m k"], Bool[Tensor, " m"]]:
    """Codes by block principal pivoting from a guess of the passive set, all rows at once.

    Each round solves least squares on the passive sets and exchanges every variable that is infeasible (a negative code
    in, a positive gradient out). When a row's number of infeasible variables has not fallen for three rounds, only its
    infeasible variable of highest index is exchanged, which cannot cycle.

    Args:
        passive: ``(m, k)`` the guess.
        target: ``(m, k)`` products of unit features with activations.
        gram: ``(k, k)`` Q.
        solver: of the systems on supports.
        tolerance: ``(m,)`` by how much a gradient may exceed zero, and a code fall short of it.
        max_rounds: rounds after which rows are given up.

    Returns:
        ``(m, k)`` codes, >= 0; and ``(m,)`` whether each row is optimal.
    """
    passive = passive.clone()
    codes = torch.zeros_like(target)
    rows = torch.arange(len(target), device=target.device)
    fewest = torch.full_like(rows, len(gram) + 1)
    chances = torch.full_like(rows, _FULL_EXCHANGES)
    for _ in range(max_rounds):
        current = solver.solve(target[rows], passive[rows])
        codes[rows] = current.clamp(min=0)
        slack = tolerance[rows, None]
        wrong = torch.where(passive[rows], current < -slack, target[rows] - current @ gram > slack)
        count = wrong.sum(dim=1)
        going = count > 0
        rows, wrong, count = rows[going], wrong[going], count[going]
        if not len(rows):
            break
        chances[rows] = torch.where(count < fewest[rows], _FULL_EXCHANGES, chances[rows] - 1)
        fewest[rows] = torch.minimum(fewest[rows], count)
        last = wrong.shape[1] - 1 - wrong.flip(1).to(torch.uint8).argmax(dim=1)
        alone = torch.zeros_like(wrong).scatter_(1, last[:, None], True)
        passive[rows] ^= torch.where((chances[rows] < 0)[:, None], alone, wrong)
    optimal = torch.ones(len(target), dtype=torch.bool, device=target.device)
    optimal[rows] = False
    return codes, optimal
