"""Coordinate descent on the few codes of an activation that are positive or would become so.

Symbols: those of :mod:`.kernels`.
    candidates of an activation: the features whose code is positive, or to which the rest of the activation points.
    w: how many candidates the activations of a group have at most.

Under an L1 penalty a few per cent of the codes are positive. A sweep over all features then mostly finds that nothing
moves. Here each activation has the Gram matrix of its own candidates, between which steps are exact, and the others
keep a zero: the error falls as in any coordinate descent, at a cost of w^2 in place of k^2 for each activation.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from saelens_ext.ops.nnls.active_set import similar

RELAXATION = 1.1
_SWEEPS_FOR_ONE = 2
"""Sweeps over candidates in place of one over all features; they cost little beside finding the candidates."""
_FEW = 6
"""Candidates are few where there are this many times as many features."""
_PADDING = 1.5
_GROUP_NUMBERS = 2**21


def sweep_candidates(
    codes: Float[Tensor, "k m"], direction: Float[Tensor, "k m"], gram: Float[Tensor, "k k"], n_sweeps: int
) -> Float[Tensor, "k m"] | None:
    """Codes of lower error, or equal ones, that differ at candidates only.

    Args:
        codes: ``(k, m)``, >= 0.
        direction: ``(k, m)`` where each code would be moved to, were it free, from where it is: T - Q C.
        gram: ``(k, k)`` Q.
        n_sweeps: the sweeps over all features that this stands for.

    Returns:
        The codes; None where the candidates are too many for it to be worth while.
    """
    k, m = codes.shape
    column, row = ((codes > 0) | (direction > 0)).T.nonzero(as_tuple=True)
    if len(column) * _FEW > k * m:
        return None
    counts = torch.zeros(m, dtype=torch.int64, device=codes.device).index_add_(0, column, torch.ones_like(column))
    groups = list(similar(counts, _GROUP_NUMBERS, _PADDING))
    # A feature k that is orthogonal to all stands in the places that an activation has no candidate for.
    candidates = torch.full((max((size for _, size in groups), default=0), m), k, device=codes.device)
    candidates[torch.arange(len(column), device=codes.device) - (counts.cumsum(0) - counts)[column], column] = row
    codes, direction, gram = (pad(part, (0, int(part is gram), 0, 1)) for part in (codes, direction, gram))
    for columns, size in groups:
        mine = candidates[:size, columns]
        products = torch.take(gram, mine[:, None] * (k + 1) + mine)
        some, left = codes[mine, columns], direction[mine, columns]
        steps = list(zip(some.unbind(), left.unbind(), products.unbind(), strict=True))
        for old, rest, product in steps * (n_sweeps * _SWEEPS_FOR_ONE):
            new = torch.add(old, rest, alpha=RELAXATION).clamp_(min=0)
            left.addcmul_(product, old.sub_(new))
            old.copy_(new)
        codes[mine, columns] = some
    return codes[:k]
