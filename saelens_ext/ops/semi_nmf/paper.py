"""The published update rule of semi-nonnegative matrix factorisation, for comparison.

Symbols:
    X: ``(n, d)`` activations. G: ``(n, k)`` codes > 0. H: ``(k, d)`` signed features. P = X H', Q = H H'.
    M+ and M-: positive and negative part of a matrix, both >= 0.

One iteration: H by least squares; in each row of H the s largest magnitudes kept, without refitting; columns of G
scaled to length one, H to match; ``G <- G sqrt((P+ + G Q-) / (P- + G Q+ + 1e-6))``; the error. It may rise, because of
the selection, so the best iterate is kept. Codes that are zero stay zero.

Departures: exactly s entries are kept on ties (values within the rounding of G'X), the lower index first; the linear
system is solved, not inverted; the error comes from traces.

Source: Shafran et al. (arXiv 2506.10920); Ding, Li and Jordan (2010) for the rule.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_ext.ops.semi_nmf.updates import CodeStatistics, dead, keep_largest

_SMALLEST_CODE = 1e-6
_RIDGE = 1e-6
_SHORTEST = 1e-8


class PaperFit:
    """Iterates of the published rule; ``codes``, ``features``, ``statistics`` and ``error`` are those of the best.

    Args:
        x: ``(n, d)`` activations.
        codes: ``(n, k)`` to start from.
        features: ``(k, d)``; only their number matters, the first step computes them from the codes.
        count: non-zeros of each feature.
    """

    n_revived = 0

    def __init__(
        self, x: Float[Tensor, "n d"], codes: Float[Tensor, "n k"], features: Float[Tensor, "k d"], count: int
    ) -> None:
        self._x, self._count = x, count
        self._current = codes.clamp(min=_SMALLEST_CODE)
        self._of_current = CodeStatistics.of(x, self._current.T)
        self._ridge = _RIDGE * torch.eye(len(features), dtype=torch.float64, device=x.device)
        self.codes, self.features, self.statistics = self._current, torch.zeros_like(features), self._of_current
        self.error = self.statistics.error(self.features)

    @property
    def squared_error(self) -> float:
        """The squared error."""
        return self.error

    @property
    def n_dead(self) -> int:
        """Features that have no part in the reconstruction."""
        return int(dead(self.features, self.statistics).sum())

    def step(self) -> None:
        """One iteration; what is best so far changes only if the error is lower."""
        gram = self._of_current.gram
        dense = torch.linalg.solve(gram + self._ridge, self._of_current.product).to(self._x.dtype)
        length = gram.diagonal().sqrt().clamp(min=_SHORTEST).to(self._x.dtype)
        error = self._of_current.rounding * self._of_current.squares.sqrt().to(dense) / length[:, None]
        features = keep_largest(dense, self._count, error) * length[:, None]
        self._current = _multiplied(self._x @ features.T, features @ features.T, self._current / length)
        self._of_current = CodeStatistics.of(self._x, self._current.T)
        error = self._of_current.error(features)
        if error < self.error:
            self.codes, self.features, self.statistics, self.error = self._current, features, self._of_current, error


def _multiplied(products: Tensor, gram: Tensor, codes: Tensor) -> Tensor:
    """The multiplicative rule for the codes."""
    numerator = products.clamp(min=0).addmm_(codes, (-gram).clamp_(min=0))
    denominator = products.neg().clamp_(min=0).addmm_(codes, gram.clamp(min=0)).add_(1e-6)
    return codes * numerator.div_(denominator).sqrt_()
