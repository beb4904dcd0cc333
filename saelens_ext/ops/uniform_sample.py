"""A uniform sample of the rows of a stream, drawn where its blocks lie.

Every row gets a key, made from its number in the stream, and the rows with the smallest keys are the sample. So it does
not depend on how the stream is cut, nor on where its parts are read, of which only rows that may stay come back.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from saelens_ext._checks import finite, width
from saelens_ext.ops.groups import groups
from saelens_ext.ops.precision import where_float64_is

Found = TypeVar("Found")
Numbered = tuple[Tensor, Tensor]
"""Rows ``(n, d)``, and the number of each in the stream, int64 ``(n,)`` on the CPU, all different."""

BATCHES = 32
"""Consecutive batches of which one sample comes back."""


@runtime_checkable
class NumberedBlocks(Protocol):
    """Blocks that may lie elsewhere, where work on them can be done, with the number of each row in the stream."""

    def mapped_with_numbers(self, work: Callable[[Iterator[Numbered]], Found], size: int = 1) -> Iterator[Found]:
        """What the work gives for so many blocks at a time, in order; it must read all that it is given."""
        ...


@dataclass
class UniformSample:
    """The rows with the smallest keys so far."""

    size: int
    """Rows to keep, at most."""
    rows: Tensor | None = None
    """``(m, d)`` in stream order, float32 or float64; None before the first block."""
    keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    """Of the rows, ``(m,)``."""
    n: int = 0
    """Rows that were read."""
    n_batches: int = 0
    """Batches that were read."""

    def merge(self, other: "UniformSample") -> None:
        """Take in the sample of a later part of the stream."""
        self.n, self.n_batches = self.n + other.n, self.n_batches + other.n_batches
        if other.rows is not None:
            self.take(other.rows, other.keys)

    def take(self, rows: Tensor, keys: Tensor) -> None:
        """Keep those rows that are among the smallest."""
        kept = rows[:0] if self.rows is None else self.rows
        width(rows, kept.shape[1], "a batch")
        # Only rows that may stay are copied: after the first blocks, few do.
        limit = self.keys.max() if len(self.keys) == self.size else torch.inf
        chosen = (keys < limit).nonzero()[:, 0]
        kept = torch.cat((kept, rows[chosen.to(rows.device)].to(kept)))
        keys = torch.cat((self.keys, keys[chosen]))
        stay = keys.argsort(stable=True)[: self.size].sort().values
        self.rows, self.keys = kept[stay.to(kept.device)], keys[stay]


def uniform_sample(batches: Iterable[Tensor], size: int, generator: torch.Generator) -> UniformSample:
    """A sample of the rows of all batches, without replacement; it reads them once.

    Args:
        batches: blocks ``(n_i, d)``, or `NumberedBlocks`.
        size: rows of the sample; all where there are fewer.
        generator: gives the seed, on the CPU.

    Raises:
        ValueError: no row at all, one that is not finite, or batches of different widths.
    """
    seed, found = int(torch.randint(2**62, (1,), generator=generator)), UniformSample(size)
    work = partial(_sampled, size, seed)
    if isinstance(batches, NumberedBlocks):
        parts = batches.mapped_with_numbers(work, BATCHES)
    else:
        parts = (work(group) for group in groups(_numbered(batches), BATCHES))
    for part in parts:
        found.merge(part)
    if found.rows is None or not found.n:
        raise ValueError("batches gave no activations; the stream must hold at least one.")
    return found


def _numbered(batches: Iterable[Tensor]) -> Iterator[Numbered]:
    n = 0
    for batch in batches:
        yield batch, torch.arange(n, n + len(batch))
        n += len(batch)


def _sampled(size: int, seed: int, blocks: Iterator[Numbered]) -> UniformSample:
    """The sample of some blocks; drawn where they are."""
    found = UniformSample(size)
    for rows, numbers in blocks:
        rows = where_float64_is(rows.detach())
        rows = finite(rows, "a batch").to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        found.n, found.n_batches = found.n + len(rows), found.n_batches + 1
        found.take(rows, row_keys(numbers, seed))
    return found


def row_keys(numbers: Tensor, seed: int) -> Tensor:
    """Uniform in [0, 1), float64 ``(n,)``, one for each number, by the mixing function of SplitMix64; any whole seed.

    Source: Steele, Lea & Flood (2014), Fast splittable pseudorandom number generators.
    """
    mixed = (numbers.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)
