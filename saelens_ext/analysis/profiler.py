"""Gathers the profiles of dictionaries, block by block of a stream or of a stretch of it.

A stretch is so many consecutive activations; the blocks that begin in it are counted with it, and those beside it are
coded for the tokens around its first and last. So what the stretches give, merged in their order, is what the whole
stream gives.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from sae_lens import SAE
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.ray_stream import RayActivationStream
from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.analysis.examples import BlockCutter, RowBlock, TokenValues
from saelens_ext.analysis.tallies import Tallies
from saelens_ext.host.bos import warn_of_other_bos
from saelens_ext.host.flat_sae import encode_flat, refuse_sequence_codes
from saelens_ext.host.hook_names import resolve_hook
from saelens_ext.ops.modes import standard_modes

# Codes held at once: 16 MB in float32, whatever the number of latents.
_CODES_PER_BLOCK = 2**22
_MAX_BLOCK = 4096
# The rows of a stretch, at least: what is read twice beside it, and what comes back of it, is then little of it.
_BLOCKS_OF_STRETCH = 32
_ROWS_PER_LATENT = 20


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """A dictionary that is profiled, and how."""

    sae: SAE[Any]
    key: str
    """The hook, as the stream was given it."""
    aliases: tuple[str, ...]
    """Every name of it."""
    rows: int
    """Of a block."""
    context: int
    """Tokens kept on either side of an example."""
    sizes: dict[str, int]
    """The other options of :class:`Tallies`."""

    @classmethod
    def of(
        cls, sae: SAE[Any], stream: ActivationStream, hook_name: str | None, *, context: int, **sizes: int
    ) -> "Profiled":
        """Check that the stream can be profiled; ValueError as :func:`profile_dictionary`."""
        refuse_sequence_codes(sae)
        starts = getattr(stream, "prepend_bos", None)  # a stream of one's own need not know
        warn_of_other_bos(sae.cfg.metadata.get("prepend_bos"), starts, "the texts of this stream")
        key, aliases = profiled_hook(sae, stream, hook_name)
        # A block reaches at least as far as a context, so that none spans more than three.
        rows = max(context, 1, min(_MAX_BLOCK, _CODES_PER_BLOCK // sae.cfg.d_sae))
        return cls(sae=sae, key=key, aliases=aliases, rows=rows, context=context, sizes=sizes)

    def tallies(self) -> Tallies:
        """Nothing gathered yet."""
        return Tallies(self.sae, context=self.context, **self.sizes)

    def fields(self, found: Tallies) -> dict[str, Any]:
        """The fields of the profile."""
        return {"hook_name": self.key, "hook_aliases": self.aliases, "context": self.context} | found.results()

    def on_cpu(self) -> "Profiled":
        """The same with the dictionary, or a copy of it, on the CPU, whence it can travel anywhere."""
        there = self.sae.W_dec.device.type == "cpu"
        return self if there else replace(self, sae=deepcopy(self.sae).to("cpu"))


class Profiler:
    """Reads a stretch of a stream into the tallies of one dictionary.

    Args:
        profiled: the dictionary.
        tallies: are filled.
        first: the number in the stream of the first activation that is read.
        start: that of the first activation of the stretch.
        stop: that of the first one behind it.
    """

    def __init__(
        self, profiled: Profiled, tallies: Tallies, first: int = 0, start: int = 0, stop: float | int = math.inf
    ):
        self._profiled, self._tallies, self._start, self._stop = profiled, tallies, start, stop
        self._blocks = BlockCutter(profiled.key, profiled.context, profiled.rows, first)
        # Blocks with their codes: the end of the last one that went by, and the one that waits for the next.
        self._behind: list[tuple[RowBlock, Tensor]] = []
        self._waiting: list[tuple[RowBlock, Tensor]] = []

    def take(self, batch: ActivationBatch) -> None:
        """Add a batch; its blocks are counted when the next one is there, with the codes around their tokens."""
        self._take(self._blocks.cut(batch))

    def finish(self) -> None:
        """Count what is left."""
        self._take(self._blocks.rest())
        self._count([])

    def _take(self, blocks: Iterable[RowBlock]) -> None:
        sae, key, rows = self._profiled.sae, self._profiled.key, self._profiled.rows
        for block in blocks:
            if not self._start - rows <= int(block.numbers[0]) < self._stop + rows:
                continue
            what = f"The activation at {key}"
            x = _checks.finite(_checks.width(block.x, sae.cfg.d_in, what), what).to(sae.W_dec.device)
            coded = replace(block, x=x), encode_flat(sae, x)
            self._count([coded])
            self._waiting = [coded]

    def _count(self, ahead: list[tuple[RowBlock, Tensor]]) -> None:
        """Count the block that waits, if any; ``ahead`` is the one that follows it."""
        if not self._waiting:
            return
        ((block, codes),) = self._waiting
        context = self._profiled.context
        if self._start <= int(block.numbers[0]) < self._stop:
            head = [(block[:context], codes[:context]) for block, codes in ahead]
            around = [*self._behind, *self._waiting, *head]
            values = TokenValues(around, len(self._behind), context)
            self._tallies.take(self._profiled.sae, codes, replace(block, values=values))
        last = slice(max(0, len(block) - context), None)
        self._behind = [(block[last], codes[last])]


def gather(dictionaries: Sequence[Profiled], stream: ActivationStream, count: Callable[[int], Any]) -> list[Tallies]:
    """What a pass over a stream tells of each dictionary; ``count`` is told of activations that were read."""
    found = [one.tallies() for one in dictionaries]
    if isinstance(stream, RayActivationStream):
        work, (stretch, margin) = partial(gathered_there, [one.on_cpu() for one in dictionaries]), _sizes(dictionaries)
        for parts in stream.mapped_stretches(work, stretch, margin):
            for whole, part in zip(found, parts, strict=True):
                whole.merge(part)
            count(parts[0].n)
    else:
        _read(dictionaries, found, stream, count)
    return found


def _sizes(dictionaries: Sequence[Profiled]) -> tuple[int, int]:
    """The activations of a stretch, and those on either side that its first and last blocks and contexts may need."""
    rows = max(one.rows for one in dictionaries)
    enough = math.ceil(_ROWS_PER_LATENT * max(one.sae.cfg.d_sae for one in dictionaries) / rows)
    stretch = max(_BLOCKS_OF_STRETCH, enough) * rows
    # Behind the stretch, what is left of its last block, if anything, and the block after that.
    return stretch, max(one.rows if stretch % one.rows == 0 else 2 * one.rows for one in dictionaries)


def _read(
    dictionaries: Sequence[Profiled],
    found: Sequence[Tallies],
    batches: Iterable[ActivationBatch],
    count: Callable[[int], Any] = int,
    *stretch: int,
) -> None:
    profilers = [Profiler(one, tallies, *stretch) for one, tallies in zip(dictionaries, found, strict=True)]
    for batch in batches:
        for profiler in profilers:
            profiler.take(batch)
        count(len(batch))
    for profiler in profilers:
        profiler.finish()


@standard_modes(gradients=False)
def gathered_there(
    dictionaries: Sequence[Profiled], batches: Iterator[ActivationBatch], *stretch: int
) -> list[Tallies]:
    """What a stretch tells; gathered where its batches are computed, on the device of their activations."""
    first = next(batches)
    for one in dictionaries:
        one.sae.to(first.activations[one.key].device)
    found, batches = [one.tallies() for one in dictionaries], chain([first], batches)
    del first
    _read(dictionaries, found, batches, int, *stretch)
    return found


def profiled_hook(sae: SAE[Any], stream: ActivationStream, hook_name: str | None) -> tuple[str, tuple[str, ...]]:
    """The stream's key for the hook to profile, and every name under which that hook is known here."""
    resolved = dict(zip(stream.requested_hook_names, stream.hook_names, strict=True))
    own = sae.cfg.metadata.hook_name
    hook = hook_name or own or (stream.hook_names[0] if len(resolved) == 1 else None)
    if hook is None:
        raise ValueError(f"The dictionary names no hook; pass hook_name= as one of {', '.join(resolved)}.")
    place = hook if hook in stream.hook_names else resolved.get(hook) or resolve_hook(stream.model, hook)
    keys = [key for key, name in resolved.items() if name == place]
    if not keys:
        whose = "hook_name is" if hook_name else "The dictionary is of"
        raise ValueError(
            f"{whose} {hook!r}, which the stream does not read; it reads {', '.join(resolved)}. Make a stream over "
            "that hook, or pass hook_name= to profile the dictionary on another one."
        )
    names = [keys[0], place] if hook_name or own is None else [keys[0], place, own]
    return keys[0], tuple(dict.fromkeys(names))
