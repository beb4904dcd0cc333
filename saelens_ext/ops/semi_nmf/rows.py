"""Activations as a semi-nonnegative factorisation takes them: from their centre, and each of the same weight."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_ext.ops.nnls.kernels import lengths
from saelens_ext.ops.precision import where_float64_is
from saelens_ext.ops.semi_nmf.updates import CHUNK_ROWS, CodeStatistics, sum_of_squares

_ROUNDING = 64.0
_ENTRIES_AT_ONCE = 2**18


def center_of(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Where activations lie that no feature is active on; float64.

    Of each neuron the mean over that half of the activations that lies closest together. Codes are not negative, so
    that the mean over all is moved along the features by as much as these are active: from there, what is inactive is
    active backwards, and a factorisation spends features on undoing that. A neuron that the active features leave alone
    on more than half of the activations has its narrowest half where they do.

    Source: the mean of the shortest half, or shorth (Andrews et al., Robust Estimates of Location, 1972).
    """
    half = len(x) // 2 + 1
    x = where_float64_is(x)
    within = torch.arange(half, device=x.device)
    centers = []
    for columns in x.split(max(1, _ENTRIES_AT_ONCE // len(x)), dim=1):
        values = columns.T.contiguous().sort(dim=1).values
        first = (values[:, half - 1 :] - values[:, : len(x) - half + 1]).argmin(dim=1)
        centers.append(values.gather(1, first[:, None] + within).double().mean(dim=1))
    return torch.cat(centers)


@dataclass(frozen=True)
class Rows:
    """The rows of a fit, and the way back."""

    values: Float[Tensor, "n d"]
    """The rows: of unit length or zero if all are to weigh the same, else in units of their size."""
    center: Float[Tensor, " d"]
    """What was subtracted, in the activations' own units."""
    lengths: Float[Tensor, "n 1"]
    """The lengths by which the rows were divided, in units of their size; 1 if they were not."""
    unit: float
    """Their size: a power of two, by which dividing rounds nothing. Squares in these units do not overflow or vanish.
    """
    equal: bool
    """Whether all rows weigh the same."""
    total: float
    """Sum of squares of the activations before the centre was subtracted, in units of their size."""

    @classmethod
    def of(cls, x: Float[Tensor, "n d"], *, center: bool, equal: bool) -> "Rows":
        """From activations, in float32 or float64; one copy of them is made."""
        x = x.detach()
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        unit = 2.0 ** math.floor(math.log2(max(-float(x.min()), float(x.max())) or 1.0))
        values = x / unit
        middle = center_of(values).to(values) if center else torch.zeros_like(values[0])
        return cls._of(values, middle, unit, equal)

    @classmethod
    def around(cls, x: Float[Tensor, "n d"], center: Float[Tensor, " d"], *, equal: bool) -> "Rows":
        """From some of the activations, in their own units, given the centre of all."""
        return cls._of(x.clone(), center, 1.0, equal)

    @classmethod
    def _of(cls, values: Tensor, center: Tensor, unit: float, equal: bool) -> "Rows":
        """From a copy of the activations, which is overwritten, and the centre, both in units of ``unit``."""
        total = sum_of_squares(values)
        length = torch.ones_like(values[:, :1])
        if bool(center.any()):
            rounding = _ROUNDING * torch.finfo(values.dtype).eps * lengths(values)[:, None]
            values -= center
        else:
            rounding = torch.zeros_like(length, dtype=torch.float64)
        if equal:
            length = lengths(values)[:, None]
            # What differs from the centre by rounding alone has no direction.
            none = length <= rounding
            length = torch.where(none, 0.0, length).to(values)
            values.div_(torch.where(none, 1.0, length)).masked_fill_(none, 0.0)
        return cls(values, center * unit, length, unit, equal, total)

    def statistics(self, codes: Float[Tensor, "n k"]) -> CodeStatistics:
        """Of the rows in their own lengths, in units of their size, with codes of the fit."""
        statistics = CodeStatistics.empty(codes.shape[1], self.values.shape[1], codes.device)
        parts = (part.split(CHUNK_ROWS) for part in (self.values, self.lengths, codes))
        for values, length, code in zip(*parts, strict=True):
            statistics.add(values * length, (code * length).T)
        return statistics
