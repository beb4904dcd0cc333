"""One hook's activations as a matrix, or in blocks where they do not fit in memory."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from saelens_ext.activations.matrix_stream import MatrixStream
from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.ops.memory import memory_for
from saelens_ext.ops.uniform_sample import Numbered

T = TypeVar("T")
# More places than a window has.
_LONGEST = 2**24


@dataclass(kw_only=True)
class ActivationSource:
    """What a fit reads: one hook of a stream."""

    stream: ActivationStream
    hook_name: str
    """As given to the stream; empty for a matrix of which it is not known."""
    held_out: float = 0.0
    """Share of the documents that are kept out of the fit, evenly spread."""

    @classmethod
    def of(
        cls,
        source: ActivationStream | Tensor,
        hook_name: str | None,
        held_out: float | int = 0.0,
        *,
        document_ids: Tensor | None = None,
        batch_size: int | None = None,
    ) -> "ActivationSource":
        """Check what the user gave: a stream over one hook, or activations ``(n, d)`` read at a hook.

        Args:
            held_out: fraction of the documents to keep out, in [0, 0.5].
            document_ids: the document of each row of a matrix; None: each is one of its own.
            batch_size: rows of a matrix in a batch; None: all.

        Raises:
            ValueError: several hooks; documents to be held out of a matrix that has none; a fraction out of range.
        """
        if not 0 <= held_out <= 0.5:
            raise ValueError(f"held_out, a fraction of the documents, must lie in [0, 0.5], got {held_out!r}.")
        if not isinstance(source, Tensor | ActivationStream):
            raise ValueError(f"Give an ActivationStream or an (n, d) tensor, got a {type(source).__name__}.")
        if isinstance(source, Tensor):
            if held_out and document_ids is None:
                raise ValueError("A matrix does not say where documents end: give document_ids, or set held_out=0.")
            source = MatrixStream(source, hook_name or "", document_ids=document_ids, batch_size=batch_size)
        elif hook_name is not None or document_ids is not None:
            name, value = ("hook_name", repr(hook_name)) if hook_name is not None else ("document_ids", "some")
            raise ValueError(
                f"The stream reads {source.requested_hook_names[0]!r}; {name} is for a matrix, got {value}."
            )
        if len(source.hook_names) != 1:
            raise ValueError(f"The stream has {len(source.hook_names)} hooks; make one stream for each dictionary.")
        return cls(stream=source, hook_name=source.requested_hook_names[0], held_out=float(held_out))

    def metadata(self) -> dict[str, Any]:
        """Where the activations come from, in SAELens' names."""
        name = dict(zip(self.stream.requested_hook_names, self.stream.hook_names))[self.hook_name]
        return self.stream.describe() | ({"hook_name": name} if name else {})

    def blocks(self, *, held_out: bool = False) -> Iterator[Float[Tensor, "m d"]]:
        """Activations to fit, or those kept out, in stream order; float32 unless they are float64.

        ValueError: at the end of a pass that was to keep documents out and met none of them.
        """
        if held_out and not self.held_out:
            return
        met = _Met()
        yield from self._picked(held_out).blocks(self.stream, met)
        self._check_met(met)

    def mapped(
        self, work: Callable[[Iterator[Any]], T], n_batches: int = 1, *, held_out: bool = False, numbered: bool = False
    ) -> Iterator[T]:
        """What some work gives for the blocks of so many batches at a time, in order, done where the stream computes
        them; see :meth:`ActivationStream.mapped`. Raises as :meth:`blocks`.

        With ``numbered``, a block comes with the number of each of its rows in the stream, int64 ``(m,)``.
        """
        if held_out and not self.held_out:
            return
        met = _Met()
        for found, here in self.stream.mapped(partial(_with_met, work, self._picked(held_out), numbered), n_batches):
            met.add(here.n_documents, here.n_out)
            yield found
        self._check_met(met)

    def rows_of(self, batch: ActivationBatch, *, held_out: bool = False) -> Float[Tensor, "m d"]:
        """A batch's activations to fit, or those kept out; float32 unless they are float64."""
        return self._picked(held_out).rows_of(batch)

    def _picked(self, held_out: bool) -> "_Picked":
        return _Picked(hook_name=self.hook_name, share=self.held_out, held_out=held_out)

    def _check_met(self, met: "_Met") -> None:
        if self.held_out and met.n_out == 0:
            raise ValueError(
                f"held_out={self.held_out:g} keeps one document in {1 / self.held_out:g} out of the fit, and of the "
                f"{met.n_documents} that the stream read none was due. Give it more documents, raise held_out (0.5 "
                "needs two documents), or set it to 0."
            )

    def in_memory(self, limit: int) -> Float[Tensor, "n d"] | None:
        """The activations to fit; None if a stream gives more than ``limit`` bytes of them."""
        parts, size = [], 0
        for block in self.blocks():
            parts.append(block)
            size += block.numel() * block.element_size()
            if size > limit and not isinstance(self.stream, MatrixStream):
                return None
        if not parts:
            raise ValueError("There are no activations to fit: all documents were held out, or the stream is empty.")
        remedy = "Lower memory_limit (fit_snmf then reads the stream in passes), or the stream's max_tokens."
        with memory_for("The activations to fit, and their copy in one piece,", 2 * size, remedy):
            x = torch.cat(parts) if len(parts) > 1 else parts[0]
        if not bool(x.any()):
            raise ValueError(f"All {len(x)} activations are zero: there is nothing to fit. Is the hook the right one?")
        return x

    @property
    def reshaping(self) -> Literal["none", "hook_z"]:
        """What a dictionary must do with what the hook gives: this host class alone keeps the heads of hook_z apart."""
        has_heads = isinstance(self.stream.model, HookedTransformer)
        return "hook_z" if has_heads and self.metadata()["hook_name"].endswith("hook_z") else "none"


class Restartable:
    """The blocks of a source, from the start each time it is iterated."""

    def __init__(self, source: ActivationSource, *, held_out: bool = False) -> None:
        self._source, self._held_out = source, held_out

    def __iter__(self) -> Iterator[Tensor]:
        return self._source.blocks(held_out=self._held_out)

    def mapped(self, work: Callable[[Iterator[Tensor]], T], size: int = 1) -> Iterator[T]:
        """What some work gives for the blocks of so many batches at a time, done where they are computed."""
        return self._source.mapped(work, size, held_out=self._held_out)

    def mapped_with_numbers(self, work: Callable[[Iterator[Numbered]], T], size: int = 1) -> Iterator[T]:
        """The same of blocks with the number of each row in the stream."""
        return self._source.mapped(work, size, held_out=self._held_out, numbered=True)


@dataclass
class _Met:
    """What was met on the way through some batches."""

    n_documents: int = 0
    n_out: int = 0
    """Activations that are kept out."""

    def add(self, n_documents: int, n_out: int) -> None:
        """Take in what was met elsewhere in the stream."""
        self.n_documents, self.n_out = max(self.n_documents, n_documents), self.n_out + n_out


@dataclass(frozen=True, kw_only=True)
class _Picked:
    """Which activations of a batch are read; it travels to where the batches are."""

    hook_name: str
    share: float
    held_out: bool

    def blocks(self, batches: Iterable[ActivationBatch], met: _Met) -> Iterator[Float[Tensor, "m d"]]:
        """Activations, batch by batch; what was met is added up."""
        return (rows for rows, _ in self.numbered(batches, met))

    def numbered(self, batches: Iterable[ActivationBatch], met: _Met) -> Iterator[Numbered]:
        """The same with the number of each row in the stream, from its window and its place there."""
        for batch in batches:
            rows, numbers = self._of(batch)
            met.add(int(batch.document_ids.max()) + 1, len(rows) if self.held_out else len(batch) - len(rows))
            if len(rows):
                yield rows, numbers

    def rows_of(self, batch: ActivationBatch) -> Float[Tensor, "m d"]:
        """A batch's; float32 unless they are float64."""
        return self._of(batch)[0]

    def _of(self, batch: ActivationBatch) -> Numbered:
        rows, numbers = batch.activations[self.hook_name], batch.sequence_ids * _LONGEST + batch.positions
        if self.share:
            out = _is_held_out(batch.document_ids, self.share)
            kept = out if self.held_out else ~out
            rows, numbers = rows[kept.to(rows.device)], numbers[kept]
        elif self.held_out:
            rows, numbers = rows[:0], numbers[:0]
        return _wide(rows), numbers


def _with_met(
    work: Callable[[Iterator[Any]], T], picked: _Picked, numbered: bool, batches: Iterator[ActivationBatch]
) -> Any:
    met = _Met()
    return work(picked.numbered(batches, met) if numbered else picked.blocks(batches, met)), met


def _is_held_out(document_ids: Tensor, share: float) -> Tensor:
    """Documents at which the number that should be out, ``share`` of those so far, reaches the next whole one."""
    # 0.1 * 30 is 3.0000000000000004 and 0.7 * 10 is 7.000000000000001: rounding must not move a document.
    due = [math.floor(round(share * i, 9)) for i in range(int(document_ids.max()) + 2)] if len(document_ids) else []
    return torch.tensor([due[i + 1] > due[i] for i in document_ids.tolist()], dtype=torch.bool)


def _wide(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
