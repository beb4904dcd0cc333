"""From a batch of continuations to the gradient of each one's target at every site: one forward, one backward pass.

A long continuation is taken in chunks of columns instead. A first pass, without gradients, leaves the keys and values
of all of them; then the chunks are run again from the last to the first, each from the keys and values before it, and
the gradients that it has at those go on into the chunks that made them. That is the chain rule, so the gradients are
those of one piece, up to rounding; of the graph only one chunk is held at a time.

Symbols
    b, M, T   continuations; tokens of the prefix; of the longest continuation of the batch
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from saelens_ext.continuations.attribution.frozen_model import Trace
from saelens_ext.continuations.attribution.sites import Refusal, Site
from saelens_ext.continuations.attribution.target import Target
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import KVCache, device_of, logits_of


@dataclass(frozen=True)
class BatchGradients:
    """What the passes over one batch showed; sums are over the sites of the cut, on the CPU."""

    targets: Tensor
    """``(b,)``."""
    gradients: dict[str, Tensor]
    """Of each continuation's target at each site of the prefix, ``(b, M, d)``, heads joined, float32."""
    prefix: Tensor
    """Activation times gradient at the prefix, ``(b,)``."""
    continuation: Tensor
    """The same behind it."""
    bias: Tensor
    """What the biases alone give, where that was asked for, else 0: ``(b,)``."""


class Passes:
    """Runs a batch inside ``traced``, whole or chunk by chunk; rows of a batch do not touch one another.

    Args:
        prefix_ids: M tokens.
        token_ids: ``(b, T)``, -1 beyond a continuation's end.
        targeted: ``token_ids`` with -1 at those that the target is not of; by default it is of all.
        chunks: the columns of each chunk, in order; by default there is one.
    """

    def __init__(
        self,
        model: HostModel,
        trace: Trace,
        target: Target,
        prefix_ids: Sequence[int],
        token_ids: Tensor,
        targeted: Tensor | None = None,
        chunks: Sequence[slice] = (),
    ):
        self._model, self._trace, self._target = model, trace, target
        targeted = token_ids if targeted is None else targeted
        self._n_prefix, ahead = len(prefix_ids), len(prefix_ids) - 1
        self._ids = batch_ids(prefix_ids, token_ids, device_of(model))
        # By the column that predicts a token, which is the one before its own.
        self._predicted = pad(targeted, (ahead, 1), value=-1)
        self._weights = pad(target.token_weights(targeted), (ahead, 1))
        self._chunks = list(chunks) or [slice(0, self._ids.shape[1])]

    def forward(self, columns: slice | None = None, cache: KVCache | None = None) -> Tensor:
        """The targets ``(b,)`` in the graph, or what a chunk adds to them, which goes on from a cache.

        ValueError: the unembedding is no module.
        """
        trace, columns = self._trace, columns or self._chunks[0]
        trace.forget()
        if cache is None:
            logits_of(self._model, self._ids)
        else:
            cache.run(self._ids[:, columns])
        if trace.final is None:
            name = type(self._model).__name__
            raise ValueError(f"This {name} does not run its unembedding as a module, as attribution needs.")
        asked = slice(max(columns.start, self._n_prefix - 1), min(columns.stop, self._ids.shape[1] - 1))
        if asked.start >= asked.stop:
            return trace.final.new_zeros(len(self._ids), dtype=torch.float32)
        final = trace.final[:, asked.start - columns.start : asked.stop - columns.start]
        return self._target(final, *(part[:, asked].to(final.device) for part in (self._predicted, self._weights)))

    def gradients(self, sites: Sequence[Site], *, biases: bool = False) -> BatchGradients:
        """The gradient of each continuation's target at every site.

        ``biases``: measure too what the biases give: run the frozen model with every source at zero.

        Refusal: a dictionary from which no path leads to the logits.
        """
        found = _Found(sites, len(self._ids), self._n_prefix)
        caches = self._caches(biases)
        whole = caches[0] if caches else None
        later = [torch.zeros_like(part) for part in whole.tensors] if whole else []
        for columns in reversed(self._chunks):
            past = _until(whole, columns.start) if whole else []
            self._trace.recording = biases
            found.add(columns.start, *self._differentiated(sites, columns, whole, past, later))
            if biases:
                zero = caches[1].started(_until(caches[1], columns.start)) if caches else None
                found.add_biases(*self._at_zero(sites, columns, zero))
        self._trace.recording = False
        self._trace.forget()
        return found.gathered()

    def _caches(self, biases: bool) -> list[KVCache]:
        """Keys and values of all but the last chunk, of the model and, for its biases, with every source at zero."""
        if len(self._chunks) == 1:
            return []
        caches = [KVCache(self._model, len(self._ids)).started() for _ in range(1 + biases)]
        with torch.no_grad():
            for columns in self._chunks[:-1]:
                self._trace.recording = biases
                self.forward(columns, caches[0])
                if biases:
                    self._at_zero([], columns, caches[1])
        return caches

    def _at_zero(
        self, sites: Sequence[Site], columns: slice, cache: KVCache | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """With every source at zero: what a chunk adds to the targets, and its activations at the sites."""
        self._trace.recording, self._trace.at_zero = False, True
        with torch.no_grad():
            constant = self.forward(columns, cache)
        self._trace.at_zero = False
        return constant, {site.hook: self._trace.captured[site.hook] for site in sites}

    def _differentiated(
        self, sites: Sequence[Site], columns: slice, whole: KVCache | None, past: list[Tensor], later: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """What a chunk adds to the targets, gradients and activations at its sites.

        ``later`` holds the gradients at keys and values: those of the chunk's own are used, those of its past added.
        """
        cache = whole.started(past) if whole else None
        value = self.forward(columns, cache)
        ends = [(value.sum(), torch.ones_like(value.sum()))]
        if cache is not None:
            if columns is not self._chunks[-1]:  # which is nobody's past
                own = [
                    [_columns(x, cache, columns.start, columns.stop) for x in part] for part in (cache.tensors, later)
                ]
                ends += zip(*own, strict=True)
            ends = [end for end in ends if end[0].requires_grad]
        captured = {site.hook: self._trace.captured[site.hook] for site in sites}
        inputs = [*captured.values(), *past]
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if ends:
            outputs, given = zip(*ends)
            grads = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
        for total, part in zip(later, grads[len(captured) :]):
            if part is not None and cache is not None:
                _columns(total, cache, 0, columns.start).add_(part)
        gradients = {hook: part for hook, part in zip(captured, grads) if part is not None}
        return value.detach(), gradients, {hook: part.detach() for hook, part in captured.items()}


class _Found:
    """Gathers a batch's results from its chunks."""

    def __init__(self, sites: Sequence[Site], n: int, n_prefix: int):
        self._sites, self._n_prefix = sites, n_prefix
        self._cut = {site.hook for site in sites if site.in_cut}
        self._targets, self._prefix, self._continuation, self._bias = torch.zeros(4, n).unbind()
        self._gradients: dict[str, Tensor] = {}
        self._reached: set[str] = set()
        self._last: dict[str, Tensor] = {}

    def add(self, first: int, value: Tensor, gradients: dict[str, Tensor], activations: dict[str, Tensor]) -> None:
        """A chunk that begins at column ``first``."""
        self._targets += value.float().cpu()
        self._reached |= gradients.keys()
        self._last = {}
        for hook, x in activations.items():
            x = _joined(x)
            gradient = _joined(gradients[hook]) if hook in gradients else torch.zeros_like(x)
            behind = max(0, self._n_prefix - first)
            if behind:
                shape = len(x), self._n_prefix, x.shape[-1]
                whole = self._gradients.setdefault(hook, x.new_zeros(shape))
                whole[:, first : first + x.shape[1]] = gradient[:, :behind]
            if hook in self._cut:
                self._last[hook] = gradient
                each = (gradient * x).sum(dim=-1)
                self._prefix += each[:, :behind].sum(dim=1).cpu()
                self._continuation += each[:, behind:].sum(dim=1).cpu()

    def add_biases(self, constant: Tensor, at_zero: dict[str, Tensor]) -> None:
        """What the biases give in the chunk that was added last."""
        self._bias += constant.float().cpu()
        for hook, gradient in self._last.items():
            # A site that is not a leaf still carries the biases from below it; they are in its own part already.
            self._bias -= (gradient * _joined(at_zero[hook])).sum(dim=(1, 2)).cpu()

    def gathered(self) -> BatchGradients:
        """All of it; Refusal where a dictionary was not reached."""
        for site in self._sites:
            if site.has_dictionary and site.hook not in self._reached:
                raise Refusal(
                    f"From the dictionary at {site.hook} no path that this backend keeps leads to the logits: what it "
                    "feeds is frozen, or the hook only shows what is computed elsewhere."
                )
        return BatchGradients(self._targets, self._gradients, self._prefix, self._continuation, self._bias)


def batch_ids(prefix_ids: Sequence[int], token_ids: Tensor, device: torch.device) -> Tensor:
    """Prefix and continuations as columns ``(b, M + T)``, padded on the right with the prefix's first token.

    The model is causal and the mask says that every column counts, so what stands in the padding changes nothing.
    """
    start = torch.tensor(prefix_ids).expand(len(token_ids), -1)
    return torch.cat([start, torch.where(token_ids >= 0, token_ids, prefix_ids[0])], dim=1).to(device)


def _until(cache: KVCache, stop: int) -> list[Tensor]:
    """The keys and values of the first columns, each the start of a graph."""
    return [_columns(part, cache, 0, stop).detach().requires_grad_() for part in cache.tensors]


def _columns(tensor: Tensor, cache: KVCache, first: int, stop: int | None) -> Tensor:
    return tensor[(slice(None),) * cache.tokens_dim + (slice(first, stop),)]


def _joined(x: Tensor) -> Tensor:
    return (x.flatten(2) if x.ndim > 3 else x).float()
