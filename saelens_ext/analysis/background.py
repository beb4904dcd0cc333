"""Activations drawn at random from all that a profile reads: what members of a latent are compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from saelens_ext.analysis.examples import RowBlock


@dataclass(frozen=True, kw_only=True)
class Background:
    """Activations drawn at random without replacement, whatever latents are active there; tensors on the CPU."""

    document_ids: Tensor
    """Row of the dataset: int64 ``(n,)``."""
    sequence_ids: Tensor
    """The window, counted from 0 over the whole stream: int64 ``(n,)``."""
    positions: Tensor
    """Position in its window, BOS included: int64 ``(n,)``."""
    contexts: Tensor
    """Token ids around it: int32 ``(n, 2c + 1)``, the token itself in column c, -1 beyond the window."""
    active: Tensor
    """Pairs of an activation and a latent that it is a member of: int64 ``(pairs, 2)``."""


class BackgroundTally:
    """Draws ``n`` of the rows it is given, reproducibly: each gets a random number, and the largest are kept."""

    def __init__(self, n: int, seed: int):
        self._n = n
        self._generator = torch.Generator().manual_seed(seed)
        self._scores = torch.zeros(0)
        self._rows: RowBlock | None = None
        self._latents: list[Tensor] = []

    def take(self, block: RowBlock, active: Tensor) -> None:
        """Offer a block; ``active``: the region of each row ``(r,)``, or whether each latent is active ``(r, k)``."""
        scores = torch.cat([self._scores, torch.rand(len(block), generator=self._generator)])
        best = scores.topk(min(self._n, len(scores))).indices
        n_old = len(self._scores)
        old, new = best[best < n_old], best[best >= n_old] - n_old
        rows = block[new]
        self._rows = rows if self._rows is None else self._rows[old].followed_by(rows)
        self._latents = [self._latents[row] for row in old.tolist()] + [_members(active[row]) for row in new.tolist()]
        self._scores = scores[torch.cat([old, new + n_old])]

    def background(self) -> Background | None:
        """What was drawn; None where nothing was offered."""
        if self._rows is None:
            return None
        names = ("document_ids", "sequence_ids", "positions", "contexts")
        pairs = [torch.stack([torch.full_like(part, row), part], dim=1) for row, part in enumerate(self._latents)]
        return Background(**{name: getattr(self._rows, name) for name in names}, active=torch.cat(pairs))


def _members(active: Tensor) -> Tensor:
    if active.ndim == 0:
        return active[active >= 0].reshape(-1).cpu()
    return active.nonzero().squeeze(1).cpu()
