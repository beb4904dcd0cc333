"""Examples of latents, gathered from a stream: the tokens at which each latent is strongest, nearest or farthest.

Symbols
    k  latents
    n  examples kept per latent
    c  tokens of context on either side
    r  rows (activations) of a block
    W  = 2c + 1 columns of a context
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from saelens_ext.activations.stream import ActivationBatch
from saelens_ext.ops.memory import memory_for

# Latents whose lists are merged at once: bounds the copies of their contexts.
_MERGE_LATENTS = 4096


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples of each latent, the best first; tensors on the CPU. Places that hold no example are NaN or -1."""

    values: Tensor
    """What ranks them, an activation or a cosine distance: float32 ``(k, n)``, NaN where empty."""
    token_ids: Tensor
    """The token: int64 ``(k, n)``."""
    document_ids: Tensor
    """Row of the dataset: int64 ``(k, n)``."""
    positions: Tensor
    """Position in its window, BOS included: int64 ``(k, n)``."""
    contexts: Tensor
    """Token ids around it: int32 ``(k, n, 2c + 1)``, the token itself in column c, -1 beyond the window."""
    sequence_ids: Tensor | None = None
    """The window, counted from 0 over the whole stream: int64 ``(k, n)``; None in profiles of older versions."""
    token_values: Tensor | None = None
    """The latent's code at every token of the context: float16 ``(k, n, 2c + 1)``, NaN beyond the window and at tokens
    that were not read. Two bytes a token, at the default of 10 examples in 33 tokens 660 bytes a latent. None in
    profiles from before they were kept.
    """


class TokenValues:
    """The codes of the tokens around each row of the block ``current`` of ``parts``.

    These follow each other, each with its codes ``(r, k)``; ``context`` tokens on either side count.
    """

    def __init__(self, parts: Sequence[tuple["RowBlock", Tensor]], current: int, context: int):
        self._codes = torch.cat([codes for _, codes in parts])
        sequences, positions = (torch.cat([getattr(b, n) for b, _ in parts]) for n in ("sequence_ids", "positions"))
        start = sum(len(block) for block, _ in parts[:current])
        rows = start + torch.arange(len(parts[current][0]))
        around = rows[:, None] + torch.arange(-context, context + 1)
        there = around.clamp(0, len(positions) - 1)
        # Rows are in order of their positions, and tokens that are not read have none.
        columns = positions[there] - positions[rows, None] + context
        same = (there == around) & (sequences[there] == sequences[rows, None])
        same &= (columns >= 0) & (columns <= 2 * context)
        self._neighbours = torch.full_like(around, -1)
        self._neighbours[same.nonzero()[:, 0], columns[same]] = around[same]

    def of(self, rows: Tensor, latents: Tensor) -> Tensor:
        """The codes of latent ``latents[i]`` around the rows ``rows[i]``, ``(m, n)``: float16 ``(m, n, W)``."""
        at, half = self._neighbours[rows], torch.finfo(torch.float16).max
        device = self._codes.device
        values = self._codes[at.clamp_min(0).to(device), latents[:, None, None].to(device)].float().cpu()
        return values.clamp(-half, half).masked_fill(at < 0, torch.nan).half()


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Consecutive activations of a stream with what is known of them."""

    x: Tensor
    """Activations ``(r, d)``."""
    token_ids: Tensor
    """``(r,)`` int64, as the four below."""
    document_ids: Tensor
    """``(r,)``."""
    positions: Tensor
    """``(r,)``."""
    sequence_ids: Tensor
    """``(r,)``."""
    numbers: Tensor
    """``(r,)``, the place of each in the whole stream."""
    contexts: Tensor
    """``(r, 2c + 1)`` int32."""
    values: TokenValues | None = None
    """The codes around each row, once they are known."""

    @classmethod
    def of(cls, batch: ActivationBatch, hook_name: str, context: int, first: int) -> "RowBlock":
        """One hook of a batch of the stream, whose first row has this number."""
        contexts = centred_contexts(batch.context(torch.arange(len(batch))), batch.positions, context)
        places = {name: getattr(batch, name) for name in ("token_ids", "document_ids", "positions", "sequence_ids")}
        numbers = torch.arange(first, first + len(batch))
        return cls(x=batch.activations[hook_name], contexts=contexts, numbers=numbers, **places)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, rows: slice | Tensor) -> "RowBlock":
        columns: dict[str, Any] = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return RowBlock(**columns)

    def followed_by(self, other: "RowBlock") -> "RowBlock":
        """Both, one after the other."""
        columns: dict[str, Any] = {n: torch.cat([getattr(self, n), getattr(other, n)]) for n in _COLUMNS}
        return RowBlock(**columns)


_COLUMNS = [field.name for field in fields(RowBlock) if field.name != "values"]


def centred_contexts(windows: Tensor, positions: Tensor, context: int) -> Tensor:
    """The tokens around a position of each window: ids ``(r, 2 * context + 1)`` int32 with the token in the middle.

    Args:
        windows: token ids ``(r, L)``, padded with -1, as is the result beyond either end of a window.
        positions: column of the token in its window ``(r,)``.
        context: tokens on either side.
    """
    columns = positions[:, None] + torch.arange(-context, context + 1)
    inside = (columns >= 0) & (columns < windows.shape[1])
    taken = windows.gather(1, columns.clamp(0, windows.shape[1] - 1))
    return torch.where(inside, taken, -1).to(torch.int32)


class BlockCutter:
    """Cuts a stream into blocks of ``rows`` activations (the last may be shorter), however it is batched.

    Matrix products round differently for different numbers of rows; with the same rows in the same block, what is
    computed from them is the same to the last bit. So a part of a stream, of which the first row has the number
    ``first``, is cut where the whole would be: rows in front of the first whole block are left out.
    """

    def __init__(self, hook_name: str, context: int, rows: int, first: int = 0):
        self._hook_name, self._context, self._rows = hook_name, context, rows
        self._next, self._left_out = first, -first % rows
        self._carried: RowBlock | None = None

    def cut(self, batch: ActivationBatch) -> Iterator[RowBlock]:
        """The blocks that a batch completes; to be run through before the next batch."""
        block = RowBlock.of(batch, self._hook_name, self._context, self._next)
        self._next += len(batch)
        if self._left_out:
            n = min(self._left_out, len(block))
            block, self._left_out = block[n:], self._left_out - n
        carried = block if self._carried is None else self._carried.followed_by(block)
        whole = len(carried) - len(carried) % self._rows
        self._carried = carried[whole:]
        for start in range(0, whole, self._rows):
            yield _copied(carried[start : start + self._rows])

    def rest(self) -> Iterator[RowBlock]:
        """What is left behind the last whole block, if anything."""
        if self._carried is not None and len(self._carried):
            yield _copied(self._carried)


def _copied(block: RowBlock) -> RowBlock:
    # A slice starts at any address and some kernels round by alignment; a fresh tensor is always aligned alike.
    return replace(block, x=block.x.clone())


class ExampleTable:
    """The n best examples of each of k latents so far; of equal ones, the first in the stream.

    It travels without the latents that have none, and can then only be merged into another.
    """

    def __init__(self, k: int, n: int, context: int, device: torch.device):
        self._n = n
        # A copy of the last column where the scores are computed, so that few candidates leave that device.
        self.worst = torch.full((k,), -torch.inf, device=device)
        names = ("token_ids", "document_ids", "positions", "sequence_ids")
        what = f"{n} examples of each of {k:,} latents, with {context} tokens on either side,"
        with memory_for(what, k * n * (40 + 6 * (2 * context + 1)), "Lower n_examples or context."):
            self._latents = torch.arange(k)
            self._scores = torch.full((k, n), -torch.inf)
            self._values = torch.full((k, n), torch.nan)
            self._records = {name: torch.full((k, n), -1) for name in names} | {
                "token_values": torch.full((k, n, 2 * context + 1), torch.nan, dtype=torch.float16),
                "contexts": torch.full((k, n, 2 * context + 1), -1, dtype=torch.int32),
            }

    def __getstate__(self) -> dict[str, Any]:
        some = self._scores[:, 0] > -torch.inf
        columns = {"_latents": self._latents, "_scores": self._scores, "_values": self._values}
        records = {name: table[some] for name, table in self._records.items()}
        return {name: column[some] for name, column in columns.items()} | {"_n": self._n, "_records": records}

    def offer(self, latents: Tensor, scores: Tensor, rows: Tensor, block: RowBlock, values: Tensor) -> None:
        """Offer row ``rows[i]`` of the block, in stream order: it scores ``scores[i]`` for latent ``latents[i]``, and
        ``values[i]`` is shown of it."""
        better = scores > self.worst[latents]
        latents, scores, rows = latents[better].cpu(), scores[better].float().cpu(), rows[better].cpu()
        values = values[better].float().cpu()
        if len(latents) == 0:
            return
        # By latent, within it by score, within that in stream order: two stable sorts, the last key first.
        order = scores.sort(descending=True, stable=True).indices
        order = order[latents[order].sort(stable=True).indices]
        latents, scores, rows, values = latents[order], scores[order], rows[order], values[order]
        touched, sizes = latents.unique_consecutive(return_counts=True)
        group = torch.arange(len(touched)).repeat_interleave(sizes)
        rank = torch.arange(len(latents)) - (sizes.cumsum(0) - sizes)[group]
        best = rank < self._n

        def table(entries: Tensor, fill: float | int) -> Tensor:
            filled = torch.full((len(touched), self._n), fill, dtype=entries.dtype)
            filled[group[best], rank[best]] = entries[best]
            return filled

        new_rows = table(rows, 0)

        def records(name: str, part: slice, places: Tensor) -> Tensor:
            source = new_rows[part].gather(1, places)
            if name != "token_values":
                return getattr(block, name)[source]
            assert block.values is not None  # a block is offered once its surroundings are known
            return block.values.of(source, touched[part])

        self._merge(touched, table(scores, -torch.inf), table(values, torch.nan), records)

    def merge(self, later: "ExampleTable") -> None:
        """Take in the examples of a later part of the stream."""

        def records(name: str, part: slice, places: Tensor) -> Tensor:
            return later._records[name][part][torch.arange(len(places))[:, None], places]

        self._merge(later._latents, later._scores, later._values, records)

    def _merge(
        self, latents: Tensor, scores: Tensor, values: Tensor, records: Callable[[str, slice, Tensor], Tensor]
    ) -> None:
        """Take in lists of examples of some latents, the best first: ``scores`` and ``values`` ``(m, n)``, and for a
        name and a slice of the latents the records at some places ``(m, n)`` of their lists."""
        for start in range(0, len(latents), _MERGE_LATENTS):
            part = slice(start, start + _MERGE_LATENTS)
            here = latents[part]
            both = torch.cat([self._scores[here], scores[part]], dim=1)
            # The lists come first and the sort is stable: an equal newcomer stays behind, and so does an empty place.
            ordered, origin = both.sort(dim=1, descending=True, stable=True)
            origin = origin[:, : self._n]
            self._scores[here] = ordered[:, : self._n]
            self._values[here] = torch.cat([self._values[here], values[part]], dim=1).gather(1, origin)
            is_new = origin >= self._n
            places = torch.where(is_new, origin - self._n, 0)
            for name, table in self._records.items():
                old = table[here[:, None], torch.where(is_new, 0, origin)]
                table[here] = torch.where(
                    is_new[..., None] if old.ndim == 3 else is_new, records(name, part, places), old
                )
        self.worst[latents.to(self.worst.device)] = self._scores[latents, -1].to(self.worst.device)

    def examples(self) -> Examples:
        """What has been gathered. Ends the gathering."""
        return Examples(values=self._values, **self._records)
