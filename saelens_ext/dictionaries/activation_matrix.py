"""One hook's activations as a matrix, or in blocks where they do not fit in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations import ActivationStream
from saelens_ext.models import resolve_hook

_FLOAT32_BYTES = 4


@dataclass(kw_only=True)
class ActivationSource:
    """What a fit reads: a stream over one hook, or a matrix."""

    stream: ActivationStream | None
    matrix: Tensor | None
    hook_name: str
    """As given to the stream; may be empty for a matrix."""
    held_out_every: int | None
    """Every so manieth document is kept out of the fit; None keeps none."""

    @classmethod
    def of(cls, source: ActivationStream | Tensor, hook_name: str | None, held_out: float | int) -> "ActivationSource":
        """Check what the user gave.

        Args:
            source: a stream over one hook, or activations ``(n, d)``.
            hook_name: where a matrix was read.
            held_out: share of the documents to keep out, in [0, 0.5].

        Raises:
            ValueError: several hooks; documents to be held out of a matrix, which has none; a share out of range.
        """
        if not 0 <= held_out <= 0.5:
            raise ValueError(f"held_out must lie in [0, 0.5], got {held_out!r}; it is the share of documents kept out of the fit.")
        every = round(1 / held_out) if held_out else None
        if isinstance(source, Tensor):
            if every is not None:
                raise ValueError("A matrix does not say which rows are of one document; held_out must be 0, or give a stream.")
            return cls(stream=None, matrix=_checks.finite(source.detach(), "activations"), hook_name=hook_name or "", held_out_every=None)
        if len(source.hook_names) != 1:
            raise ValueError(f"The stream has {len(source.hook_names)} hooks; make one stream for each dictionary.")
        if hook_name is not None:
            raise ValueError(f"The stream reads {source.requested_hook_names[0]!r}; hook_name is for a matrix, got {hook_name!r}.")
        return cls(stream=source, matrix=None, hook_name=source.requested_hook_names[0], held_out_every=every)

    def metadata(self) -> dict[str, Any]:
        """Where the activations come from, in SAELens' names."""
        if self.stream is None:
            return {"hook_name": self.hook_name} if self.hook_name else {}
        return self.stream.describe() | {"hook_name": resolve_hook(self.stream.model, self.hook_name)}

    def blocks(self, *, held_out: bool = False) -> Iterator[Float[Tensor, "m d"]]:
        """Activations to fit, or those kept out, in stream order; float32 unless they are float64."""
        if self.stream is None:
            if not held_out:
                yield _wide(self.matrix)
            return
        for batch in self.stream:
            rows = batch.activations[self.hook_name]
            if self.held_out_every is not None:
                out = batch.document_ids % self.held_out_every == self.held_out_every - 1
                rows = rows[(out if held_out else ~out).to(rows.device)]
            elif held_out:
                return
            if len(rows):
                yield _wide(rows)

    def in_memory(self, limit: int) -> tuple[Float[Tensor, "n d"], bool]:
        """The activations to fit, as far as they fit into ``limit`` bytes of float32; and whether that is all."""
        parts, size = [], 0
        for block in self.blocks():
            parts.append(block)
            size += block.numel() * _FLOAT32_BYTES
            if size > limit and self.stream is not None:
                return torch.cat(parts), False
        if not parts:
            raise ValueError("There are no activations to fit: all documents were held out, or the stream is empty.")
        return torch.cat(parts) if len(parts) > 1 else parts[0], True


class Restartable:
    """The blocks of a source, from the start each time it is iterated."""

    def __init__(self, source: ActivationSource, *, held_out: bool = False) -> None:
        self._source, self._held_out = source, held_out

    def __iter__(self) -> Iterator[Tensor]:
        return self._source.blocks(held_out=self._held_out)


def _wide(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
