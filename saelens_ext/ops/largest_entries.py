"""The largest of some values that rounding has disturbed."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def largest_entries(
    x: Float[Tensor, " d"],
    count: int,
    error: Float[Tensor, " d"] | None = None,
    preferred: Bool[Tensor, " d"] | None = None,
) -> Tensor:
    """Indices of the ``count`` entries of largest magnitude.

    Args:
        x: ``(d,)`` values.
        count: how many, at most d.
        error: by how much each value may be off; values that may be equal to the smallest of the largest are tied.
            By default only equal values are.
        preferred: which of the tied entries go first; otherwise and among them, those of lower index do.
    """
    size = x.abs()
    values, indices = size.topk(count)
    cut = values[-1]
    reach = torch.zeros_like(size) if error is None else error + error[indices[-1]]
    possible = size >= cut - reach
    if int(possible.sum()) == count:
        return indices
    sure = size > cut + reach
    sure, tied = sure.nonzero()[:, 0], (possible & ~sure).nonzero()[:, 0]
    if preferred is not None:
        tied = torch.cat((tied[preferred[tied]], tied[~preferred[tied]]))
    return torch.cat((sure, tied[: count - len(sure)]))
