"""Activations drawn at random from all that a profile reads: what members of a latent are compared with."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saelens_ext.analysis.examples import RowBlock
from saelens_ext.ops.uniform_sample import row_keys


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
    """Draws ``n`` of the rows it is given: those with the smallest keys, which a seed and their numbers decide."""

    def __init__(self, n: int, seed: int):
        self._n, self._seed = n, seed
        self._keys = torch.zeros(0, dtype=torch.float64)
        self._rows: RowBlock | None = None
        self._latents: list[Tensor] = []

    def take(self, block: RowBlock, active: Tensor) -> None:
        """Offer a block; ``active``: the region of each row ``(r,)``, or whether each latent is active ``(r, k)``."""
        rows = replace(block, x=block.x[:, :0].cpu())
        self._keep(rows, row_keys(block.numbers, self._seed), lambda row: _members(active[row]))

    def merge(self, later: "BackgroundTally") -> None:
        """Take in what was drawn from another part of the stream."""
        if later._rows is not None:
            self._keep(later._rows, later._keys, later._latents.__getitem__)

    def _keep(self, block: RowBlock, keys: Tensor, latents: Callable[[int], Tensor]) -> None:
        """Keep those rows of a block that are among the smallest."""
        keys, n_old = torch.cat([self._keys, keys]), len(self._keys)
        best = keys.argsort()[: self._n]
        old, new = best[best < n_old], best[best >= n_old] - n_old
        rows = block[new]
        self._rows = rows if self._rows is None else self._rows[old].followed_by(rows)
        self._latents = [self._latents[row] for row in old.tolist()] + [latents(row) for row in new.tolist()]
        self._keys = keys[torch.cat([old, new + n_old])]

    def background(self) -> Background | None:
        """What was drawn, in random order; None where nothing was offered."""
        if self._rows is None:
            return None
        order = self._keys.argsort()
        rows, latents = self._rows[order], [self._latents[row] for row in order.tolist()]
        names = ("document_ids", "sequence_ids", "positions", "contexts")
        pairs = [torch.stack([torch.full_like(part, row), part], dim=1) for row, part in enumerate(latents)]
        return Background(**{name: getattr(rows, name) for name in names}, active=torch.cat(pairs))


def _members(active: Tensor) -> Tensor:
    if active.ndim == 0:
        return active[active >= 0].reshape(-1).cpu()
    return active.nonzero().squeeze(1).cpu()
