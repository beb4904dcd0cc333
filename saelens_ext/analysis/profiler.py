"""Gathers the profile of one dictionary, block by block of a stream."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sae_lens import SAE
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.background import BackgroundTally
from saelens_ext.analysis.examples import BlockCutter, RowBlock, TokenValues
from saelens_ext.analysis.tallies import CodeTally, RandomExamples, RegionTally
from saelens_ext.host.bos import warn_of_other_bos
from saelens_ext.host.flat_sae import encode_flat, refuse_sequence_codes
from saelens_ext.host.hook_names import resolve_hook

# Codes held at once: 16 MB in float32, whatever the number of latents.
_CODES_PER_BLOCK = 2**22
_MAX_BLOCK = 4096


class Profiler:
    """The profile of one dictionary while it is gathered."""

    def __init__(
        self,
        sae: SAE[Any],
        stream: ActivationStream,
        hook_name: str | None,
        random: RandomExamples | None,
        *,
        n_examples: int,
        n_boundary: int,
        context: int,
    ):
        refuse_sequence_codes(sae)
        starts = getattr(stream, "prepend_bos", None)  # a stream of one's own need not know
        warn_of_other_bos(sae.cfg.metadata.get("prepend_bos"), starts, "the texts of this stream")
        self.sae, self.context = sae, context
        self.key, self.aliases = profiled_hook(sae, stream, hook_name)
        has_regions = hasattr(sae, "assign")
        self.codes = CodeTally(sae, n_examples, context, None if has_regions else random)
        self.regions = RegionTally(sae, n_examples, n_boundary, context, random) if has_regions else None
        self.background: BackgroundTally | None = None
        # A block reaches at least as far as a context, so that none spans more than three.
        rows = max(context, 1, min(_MAX_BLOCK, _CODES_PER_BLOCK // sae.cfg.d_sae))
        self.blocks = BlockCutter(self.key, context, rows)
        self.n = 0
        # Blocks with their codes: the end of the last one that was counted, and the one that waits for the next.
        self.behind: list[tuple[RowBlock, Tensor]] = []
        self.waiting: list[tuple[RowBlock, Tensor]] = []

    def take(self, blocks: Iterable[RowBlock]) -> None:
        """Add blocks of activations; each is counted when the next one is there, with the codes around its tokens."""
        for block in blocks:
            what = f"The activation at {self.key}"
            x = _checks.finite(_checks.width(block.x, self.sae.cfg.d_in, what), what).to(self.sae.W_dec.device)
            coded = replace(block, x=x), encode_flat(self.sae, x)
            self._count([coded])
            self.waiting = [coded]
            self.n += len(block)

    def _count(self, ahead: list[tuple[RowBlock, Tensor]]) -> None:
        """Count the block that waits, if any; ``ahead`` is the one that follows it."""
        if not self.waiting:
            return
        ((block, codes),) = self.waiting
        head = [(block[: self.context], codes[: self.context]) for block, codes in ahead]
        around = [*self.behind, *self.waiting, *head]
        block = replace(block, values=TokenValues(around, len(self.behind), self.context))
        self.codes.take(codes, block if self.regions is None else None)
        active = codes != 0 if self.regions is None else self.regions.take(block.x, block)
        if self.background is not None:
            self.background.take(replace(block, x=block.x[:, :0]), active)
        last = slice(max(0, len(block) - self.context), None)
        self.behind = [(block[last], codes[last])]

    def finish(self) -> dict[str, Any]:
        """The fields of the profile of everything taken."""
        self.take(self.blocks.rest())
        self._count([])
        results = self.codes.results() | (self.regions.results() if self.regions is not None else {})
        results["background"] = None if self.background is None else self.background.background()
        places = {"hook_name": self.key, "hook_aliases": self.aliases}
        return places | {"n_activations": self.n, "context": self.context} | results


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
