"""What comes in order, taken so many at a time without being held."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Protocol, TypeVar, cast, runtime_checkable

T = TypeVar("T")
Found = TypeVar("Found")
Blocks = TypeVar("Blocks", covariant=True)


@runtime_checkable
class Mapped(Protocol[Blocks]):
    """Blocks that may lie elsewhere, where work on them can be done."""

    def mapped(self, work: Callable[[Iterator[Blocks]], Found], size: int = 1) -> Iterator[Found]:
        """What the work gives for so many blocks at a time, in order; it must read all that it is given."""
        ...


def groups(items: Iterable[T], size: int) -> Iterator[Iterator[T]]:
    """So many consecutive items at a time, fewer at the end; each group is to be read before the next, and to its end.

    Items are made when they are read: none is held here.
    """
    iterator = iter(items)
    for first in iterator:
        group = chain([first], islice(iterator, size - 1))
        del first
        yield group


def mapped(blocks: Iterable[T], work: Callable[[Iterator[T]], Found], size: int = 1) -> Iterator[Found]:
    """What the work gives for so many blocks at a time, in order: done where they lie, or here."""
    if isinstance(blocks, Mapped):
        yield from cast(Mapped[T], blocks).mapped(work, size)
    else:
        yield from (work(group) for group in groups(blocks, size))
