"""The largest of some values that rounding has disturbed."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def largest_entries(
    x: Float[Tensor, "*rows d"],
    count: int,
    error: Float[Tensor, "*rows d"] | None = None,
    preferred: Bool[Tensor, "*rows d"] | None = None,
) -> Tensor:
    """Indices of the ``count`` entries of largest magnitude of each row, without waiting for the device.

    Args:
        x: ``(…, d)`` values.
        count: how many, at most d.
        error: by how much each value may be off; values that may be equal to the smallest of the largest are tied.
            By default only equal values are.
        preferred: which of the tied entries go first; otherwise and among them, those of lower index do.
    """
    size = x.abs()
    values, indices = size.topk(count)
    cut = values[..., -1:]
    reach = torch.zeros_like(size) if error is None else error + error.gather(-1, indices[..., -1:])
    tied = size >= cut - reach
    rank = tied.long() + (size > cut + reach) * 2 + (0 if preferred is None else tied & preferred)
    return (rank * size.shape[-1] - torch.arange(size.shape[-1], device=x.device)).topk(count).indices
