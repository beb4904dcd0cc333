"""One dictionary's directions as sums of a few of another's: what a broad feature splits into.

Symbols
    t  a direction of the target, of unit length;  B  unit directions of the basis, (m, d)
    w  non-negative weights, at most ``max_terms`` of them positive
    explained = 1 - |t - w B|^2, in [0, 1]: the share of t that the terms account for
    null  the same with the basis turned at random: terms that share nothing with the target but the space
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sae_lens import SAE
from scipy.optimize import nnls as exact_nnls
from scipy.stats import ortho_group
from torch import Tensor

from saelens_ext import _checks
from saelens_ext._modes import standard_modes
from saelens_ext.analysis.match import direction_rows
from saelens_ext.ops.nnls import nnls

if TYPE_CHECKING:
    import pandas

_ROUNDING = 1e-9
"""Weights of unit directions below this are rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition:
    """The directions of a target in those of a basis; tensors on the CPU, one row per latent of the target."""

    terms: Tensor
    """Latents of the basis, the largest weight first: int64 ``(k, max_terms)``, -1 where there are fewer."""
    weights: Tensor
    """Their weights: float64 ``(k, max_terms)``, 0 where there are fewer."""
    explained: Tensor
    """Share of each direction that its terms explain, in [0, 1]: float64 ``(k,)``, NaN for a dead latent."""
    null: Tensor
    """The same with the basis turned at random: float64 ``(n_null, k)``."""

    @property
    def p_value(self) -> Tensor:
        """How often, per latent, a turned basis explains as much: (1 + #) / (n_null + 1), float64 ``(k,)``."""
        at_least = (self.null >= self.explained - 1e-12).sum(dim=0).double()
        return torch.where(self.explained.isnan(), torch.nan, (1 + at_least) / (len(self.null) + 1))

    def summary(self) -> dict[str, Any]:
        """The main figures, JSON-safe: medians of what is explained, by the basis and by the turned ones, the share of
        latents that the basis explains better than every turned one does, and the mean number of terms.
        """
        alive = ~self.explained.isnan()
        explained, null = self.explained[alive], self.null[:, alive]
        return {
            "n": len(self.explained),
            "n_without_direction": int((~alive).sum()),
            "median_explained": float(explained.median()),
            "median_explained_by_null": float(null.median()),
            "share_above_null": float((explained > null.amax(dim=0)).double().mean()),
            "share_expected_by_chance": 1 / (len(self.null) + 1),
            "mean_terms": float((self.terms[alive] >= 0).sum(dim=1).double().mean()),
        }

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per latent of the target and term."""
        import pandas

        rows, places = (self.terms >= 0).nonzero(as_tuple=True)
        columns = {"latent": rows, "term": self.terms[rows, places], "weight": self.weights[rows, places]}
        columns |= {"explained": self.explained[rows], "p": self.p_value[rows]}
        return pandas.DataFrame({name: column.numpy() for name, column in columns.items()})


@standard_modes()
@torch.no_grad()
def decompose_dictionary(
    target: SAE[Any] | Tensor, basis: SAE[Any] | Tensor, *, max_terms: int = 5, n_null: int = 20, seed: int = 0
) -> Decomposition:
    """Write every direction of a dictionary as a non-negative sum of a few directions of another.

    All weights are found together by exact non-negative least squares, the largest ``max_terms`` are kept, and these
    are fitted again. The null does the same with the basis turned by random rotations.

    Args:
        target: a SAELens SAE, ours or not, or directions ``(k, d)``.
        basis: the other, of the same width.
        max_terms: at most so many terms, at least 1.
        n_null: rotations, at least 1; 20 allow a p-value of 1/21.
        seed: of the rotations.

    Raises:
        ValueError: other widths, no directions, entries that are not finite, or a number below 1.

    Examples:
        >>> found = sx.decompose_dictionary(partition, partition, n_null=2)
        >>> bool((found.explained > 0.999).all())  # every direction is a term of itself
        True

    Source: meta-SAEs (arXiv 2502.04878) decompose decoder directions by training; here the weights are exact.
    """
    _checks.positive(max_terms, "max_terms")
    rows = [_units(part, name) for part, name in ((target, "target"), (basis, "basis"))]
    if rows[0].shape[1] != rows[1].shape[1]:
        raise ValueError(
            f"target has directions of width {rows[0].shape[1]} and basis of {rows[1].shape[1]}; give dictionaries of "
            "the same width."
        )
    generator = np.random.default_rng(seed)
    alive = rows[0].any(dim=1)
    terms, weights, explained = _decomposed(rows[0], rows[1], max_terms)
    null = []
    for _ in range(_checks.positive(n_null, "n_null")):
        turn = torch.from_numpy(ortho_group.rvs(rows[1].shape[1], random_state=generator))
        null.append(_decomposed(rows[0], rows[1] @ turn, max_terms)[2])
    dead = torch.full_like(explained, torch.nan)
    return Decomposition(
        terms=terms, weights=weights, explained=torch.where(alive, explained, dead), null=torch.stack(null)
    )


def _units(dictionary: SAE[Any] | Tensor, name: str) -> Tensor:
    return torch.nn.functional.normalize(direction_rows(dictionary, name).cpu().double(), dim=1)


def _decomposed(target: Tensor, basis: Tensor, max_terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, weights and the explained share of every row."""
    n = min(max_terms, len(basis))
    largest = nnls(target, basis).topk(n, dim=1)
    terms = torch.full((len(target), max_terms), -1)
    weights, explained = target.new_zeros(len(target), max_terms), target.new_zeros(len(target))
    for row, (t, chosen) in enumerate(zip(target, largest.indices)):
        fitted, residual = exact_nnls(basis[chosen].T.numpy(), t.numpy())
        order = np.argsort(-fitted, kind="stable")[: int((fitted > _ROUNDING).sum())]
        terms[row, : len(order)] = chosen[order.copy()]
        weights[row, : len(order)] = torch.from_numpy(fitted[order])
        explained[row] = max(0.0, 1 - residual**2)
    return terms, weights, explained
