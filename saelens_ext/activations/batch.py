"""Activations with the token, document and position that each belongs to.

Symbols: ``n`` activations in a batch, ``b`` windows in a batch, ``L`` the context size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from saelens_ext.ops.modes import standard_modes

NO_TOKEN = -1
"""What fills a window beyond its last token."""

COLUMNS = ("token_ids", "sequence_ids", "positions", "document_ids")
"""What a batch says of every row."""


@dataclass(frozen=True)
class ActivationBatch:
    """Activations with where they come from, row by row.

    Row ``i`` of everything belongs to one token. ``len(batch)`` is the number of rows.
    """

    activations: dict[str, Shaped[Tensor, "n _"]]
    """For each hook, by the name the user gave it, one activation per row, on the model's device and in its dtype."""
    token_ids: Int64[Tensor, " n"]
    """The token at which the activation was read, on the CPU as all that follow."""
    sequence_ids: Int64[Tensor, " n"]
    """The window, counted from 0 over the whole stream."""
    positions: Int64[Tensor, " n"]
    """The place within the window, BOS being 0 where there is one."""
    document_ids: Int64[Tensor, " n"]
    """The row of the dataset."""
    windows: Int64[Tensor, "b L"]
    """The tokens of every window of this batch, filled up with -1."""
    first_sequence_id: int
    """The number of the first of ``windows``."""

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    @standard_modes()
    def context(self, rows: Any) -> Int64[Tensor, "r L"]:
        """The whole windows that rows come from.

        Args:
            rows: row numbers, or a boolean mask over the rows; anything that indexes a tensor.

        Returns:
            One window per row asked for, filled up with -1.
        """
        return self.windows[torch.atleast_1d(self.sequence_ids[rows]) - self.first_sequence_id]

    @standard_modes()
    def first(self, n: int) -> "ActivationBatch":
        """The first ``n`` rows, with all the windows."""
        columns = {name: getattr(self, name)[:n] for name in COLUMNS}
        return replace(self, activations={name: rows[:n] for name, rows in self.activations.items()}, **columns)

    @classmethod
    def join(cls, batches: "Sequence[ActivationBatch]") -> "ActivationBatch":
        """Consecutive batches of one stream, at least one, as one."""
        first = batches[0]
        joined = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in (*COLUMNS, "windows")}
        activations = {name: torch.cat([batch.activations[name] for batch in batches]) for name in first.activations}
        return cls(activations=activations, first_sequence_id=first.first_sequence_id, **joined)
