"""What to say when memory does not suffice: how much was needed, for what, and what needs less."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SAID = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")

FEWER_ROWS = "Give fewer activations at a time."


class NotEnoughMemory(MemoryError):
    """There is less memory than something needs; says how much, and the remedy."""


@contextmanager
def memory_for(what: str, n_bytes: int | None, remedy: str) -> Iterator[None]:
    """Let a lack of memory inside end as a :class:`NotEnoughMemory` in plain words; also a decorator.

    Args:
        what: what needs it, with its sizes.
        n_bytes: how much it needs at least; None where nobody knows.
        remedy: a sentence.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, NotEnoughMemory) or not lacks_memory(error):
            raise
        needs = "need more memory than there is" if n_bytes is None else f"need at least {written(n_bytes)} of memory"
        raise NotEnoughMemory(f"{what} {needs}, which could not be had. {remedy}") from error


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is that of Python, of numpy, of a device or of the CPU's allocator that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _SAID)


def written(n_bytes: int) -> str:
    """A number of bytes to read: ``"1.5 GB"``."""
    for unit in ("GB", "MB", "kB"):
        size = n_bytes / 1000 ** {"GB": 3, "MB": 2, "kB": 1}[unit]
        if size >= 1:
            return f"{size:,.0f} {unit}" if size >= 10 else f"{size:.1f} {unit}"
    return f"{n_bytes} bytes"
