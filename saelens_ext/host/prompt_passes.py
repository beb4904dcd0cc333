"""Forward passes over prompts on any TransformerLens model: tokens in, logits out, with or without a KV cache."""

import copy
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.model_bridge import TransformerBridge
from transformers.cache_utils import DynamicCache, DynamicLayer

from saelens_ext import _checks
from saelens_ext.host.agreement import N_TOKENS, differences, rounding, spread_ids
from saelens_ext.host.bos import TextStart, text_start
from saelens_ext.host.chat_template import Prompt, asked
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.ops.memory import lacks_memory
from saelens_ext.ops.modes import callers_autocast, evaluating, standard_modes
from saelens_ext.ops.precision import wide

_MAX_BATCH_TOKENS = 4096
_MAX_PATTERN = 2**20
"""Entries of one head's attention pattern in a pass: queries times keys, over all rows."""
_FEWEST_COLUMNS = 32
_N_STEPS = 4
"""The last of the tokens on which a cache is tried, which are compared."""
_TRIED: WeakKeyDictionary[HostModel, dict[Callable[[HostModel], bool], bool]] = WeakKeyDictionary()

logger = logging.getLogger(__name__)


def prompt_ids(
    model: HostModel, prompt: Prompt, *, templated: bool = False, chat_template_options: Mapping[str, Any] | None = None
) -> Tensor:
    """Token ids ``(length,)`` int64 of what a model is to go on from: :func:`text_ids`, of a causal language model.

    Raises:
        ValueError: as there, or a model whose predictions depend on later tokens.
    """
    check_causal(model)
    return text_ids(model, prompt, templated=templated, chat_template_options=chat_template_options)


def text_ids(
    model: HostModel, text: Prompt, *, templated: bool = False, chat_template_options: Mapping[str, Any] | None = None
) -> Tensor:
    """Token ids ``(length,)`` int64 of a text on the model's device, as ``model.to_tokens`` gives them.

    BOS comes first where it does for this model, and only once; a ``templated`` text was written by a chat template,
    which decides about it itself, and which writes a conversation here, with its options. An EOS that a tokenizer puts
    behind every text does not come, since a prompt is to be continued.

    Raises:
        ValueError: no tokenizer, or a text that is none, has no token, or one that the model does not have.
    """
    tokenizer = tokenizer_of(model)
    if not isinstance(text, str):
        given = asked(tokenizer, text, options=chat_template_options, name="The prompt")
        text, templated = given.text, True
    start = TextStart() if templated else text_start(model)
    ids = [*start.ids, *start.after(tokenizer, _checks.text(text, "The prompt"))]
    beyond = [i for i in ids if i >= int(model.cfg.d_vocab)]
    if beyond:
        raise ValueError(
            f"The prompt has the token {tokenizer.convert_ids_to_tokens(beyond[0])!r}, of id {beyond[0]}, and this "
            f"model's vocabulary has {model.cfg.d_vocab} tokens: the tokenizer is another model's, or has tokens that "
            "were added later. Enlarge the embeddings (hf_model.resize_token_embeddings) before hosting the model."
        )
    if not ids:
        raise ValueError(f"The prompt {text!r} has no token, and this model has no BOS; give it a word.")
    return torch.tensor(ids, device=device_of(model))


def device_of(model: HostModel) -> torch.device:
    """Where the model's first parameter lies."""
    return next(iter(model.parameters())).device


def logits_of(model: HostModel, ids: Tensor, mask: Tensor | None = None, *, last: int | None = None) -> Tensor:
    """Logits ``(b, length, d_vocab)`` of token ids ``(b, length)``; ``mask`` is False at right padding.

    Of the ``last`` columns alone, ``(b, last, d_vocab)``, where the model can leave out the others: a bridge whose
    unembedding has no hooks, and whose Hugging Face model knows how.
    """
    # Without an explicit mask a HookedTransformer guesses padding from the token ids, and pad may equal BOS.
    mask = torch.ones_like(ids) if mask is None else mask.long()
    kept = {} if last is None or not _leaves_out_logits(model) else {"logits_to_keep": last}
    with callers_autocast():
        return model(ids, return_type="logits", attention_mask=mask, **kept)


def _leaves_out_logits(model: HostModel) -> bool:
    if not isinstance(model, TransformerBridge):
        return False
    return not _hooked(model, "unembed.") and "logits_to_keep" in signature(model.original_model.forward).parameters


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows in batches, longest first, so that those of like length share one and what does not fit fails at once.

    A batch has at most ``batch_size`` rows, and as wide as its longest no more than 4096 tokens and 2^20 pairs of
    tokens in a row; or is one row (see :func:`position_chunks`).
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    found: list[list[int]] = []
    while order:
        longest = max(1, lengths[order[0]])
        n = max(1, min(batch_size, _MAX_BATCH_TOKENS // longest, _MAX_PATTERN // longest**2))
        found.append(order[:n])
        order = order[n:]
    return found


def position_chunks(length: int, rows: int = 1) -> list[slice]:
    """The columns of long rows in chunks of like size, of which each has at most 2^20 pairs with what precedes it.

    A chunk is 32 columns at least. What need not be cut is one.
    """
    most = _MAX_PATTERN // rows
    size = length if length**2 <= most else max(_FEWEST_COLUMNS, most // length)
    size = math.ceil(length / math.ceil(length / size))
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def check_causal(model: HostModel) -> None:
    """Raise ValueError for a model whose predictions depend on later tokens."""
    if not is_causal(model):
        raise ValueError(
            f"What this {type(model).__name__} ({model.cfg.model_name!r}) predicts after a token depends on the tokens "
            "behind it, so it cannot go on from a prompt, nor can texts be scored. Its activations can be read. If it "
            "should be a causal language model, its host gives it a wrong attention mask: load it with "
            "saelens_ext.load_model."
        )


def is_causal(model: HostModel) -> bool:
    """Whether what a model predicts depends on no later token, as is tried once for each model."""
    return _tried(model, _looks_back)


def has_kv_cache(model: HostModel) -> bool:
    """Whether passes over this model can go on from the keys and values of earlier tokens: the host says so, and what
    they give is what passes in one piece give, as is tried once for each model.
    """
    return bool(getattr(getattr(model, "adapter", None), "supports_kv_cache", True)) and _tried(model, _steps_fit)


def is_resumable(model: HostModel) -> bool:
    """Whether passes in chunks are those in one piece: there is a cache for them, as is tried once for each model, and
    no hooks that may count positions.
    """
    return not _hooked(model) and has_kv_cache(model) and _tried(model, _chunks_fit)


def _hooked(model: HostModel, within: str = "") -> bool:
    """Whether some hook point whose name begins so has hooks."""
    return any(getattr(point, "fwd_hooks", None) for name, point in model.hook_dict.items() if name.startswith(within))


@contextmanager
def _no_hooks(model: HostModel) -> Iterator[None]:
    """Set the hooks of all hook points aside, which may count passes, rows or positions."""
    aside = [(point, point._forward_hooks) for point in model.hook_dict.values() if getattr(point, "fwd_hooks", None)]
    for point, _ in aside:
        point._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for point, hooks in aside:
            point._forward_hooks = hooks


def _tried(model: HostModel, trial: Callable[[HostModel], bool]) -> bool:
    """What a trial of a model finds; each is made once for each model."""
    known = _TRIED.setdefault(model, {})
    if trial not in known:
        # What is remembered is of the model, not of the autocast of who asks first.
        with standard_modes(model_too=True), evaluating(model), _no_hooks(model):
            known[trial] = trial(model)
    return known[trial]


def _looks_back(model: HostModel) -> bool:
    """Whether what is predicted behind the first tokens stays when those after them change."""
    hf_model = model.original_model if isinstance(model, TransformerBridge) else None
    if hf_model is not None and getattr(hf_model.config, "is_encoder_decoder", False):
        return False  # its encoder sees all tokens
    ids, half = spread_ids(model.cfg.d_vocab, device_of(model)), N_TOKENS // 2
    try:
        logits = logits_of(model, torch.cat([ids, torch.cat([ids[:, :half], ids[:, half:].flip(1)], dim=1)]))
        one, other = wide(logits[:, :half]).log_softmax(dim=-1)
        # Of all places but a few, since by rounding alone a mixture may choose other experts at one.
        change = median(differences(one[at : at + 1], other[at : at + 1])[0] for at in range(half))
    except Exception as error:  # its message will be that of the first pass that somebody asks for
        if lacks_memory(error):  # which says nothing of the model
            raise
        logger.debug("%s was not tried: %s", type(model).__name__, error)
        return True
    return not change > _bound(model)  # no numbers are no sign of looking ahead


def _steps_fit(model: HostModel) -> bool:
    return _fits(model, _in_steps)


def _chunks_fit(model: HostModel) -> bool:
    return _fits(model, _in_chunks)


def _fits(model: HostModel, way: Callable[[HostModel, Tensor], Tensor]) -> bool:
    """Whether a way to run through tokens gives the logits of one pass, within what rounding explains."""
    ids = spread_ids(model.cfg.d_vocab, device_of(model))
    expected = wide(logits_of(model, ids)[0, -_N_STEPS:]).log_softmax(dim=-1)
    try:
        found = wide(way(model, ids)).log_softmax(dim=-1)
    except Exception as error:  # whatever a host's cache stumbles over
        if lacks_memory(error):  # which says nothing of the model
            raise
        logger.debug("%s does not go on from a cache: %s", type(model).__name__, error)
        return False
    return differences(found, expected)[0] <= _bound(model)


def _bound(model: HostModel) -> float:
    return rounding(next(iter(model.parameters())).dtype)


def _in_steps(model: HostModel, ids: Tensor) -> Tensor:
    """Logits of the last tokens, each run by itself behind those before."""
    cache, steps = KVCache(model, 1), ids[:, 1 - _N_STEPS :].split(1, dim=1)
    return torch.cat([cache.run(part)[0, -1:] for part in (ids[:, : 1 - _N_STEPS], *steps)])


def _in_chunks(model: HostModel, ids: Tensor) -> Tensor:
    """Logits of the last tokens, run together behind two chunks that were, for one of two copies of these."""
    cache, half = KVCache(model, 1).started(), N_TOKENS // 2
    for columns in (slice(0, half), slice(half, -_N_STEPS)):
        cache.run(ids[:, columns])
    return cache.select([0, 0]).run(ids[:, -_N_STEPS:].expand(2, -1))[1]


class KVCache:
    """Keys and values of a batch of n equally long sequences, on any model that :func:`has_kv_cache`."""

    def __init__(self, model: HostModel, n: int):
        self._model, self._n = model, n
        self._length = 0
        self._cache: Any = None
        if isinstance(model, HookedTransformer):
            self._cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, n)

    @callers_autocast()
    def run(self, ids: Tensor) -> Tensor:
        """Run and remember the next tokens of every sequence, ``(n, L)``; gives their logits ``(n, L, d_vocab)``."""
        self._length += ids.shape[1]
        if isinstance(self._model, HookedTransformer):
            mask = torch.ones_like(ids)
            return self._model(ids, return_type="logits", past_kv_cache=self._cache, attention_mask=mask)
        past = {} if self._cache is None else {"past_key_values": self._cache}
        past["attention_mask"] = ids.new_ones(len(ids), self._length)
        logits, self._cache = self._model(ids, return_type="logits_and_cache", use_cache=True, **past)
        return logits

    def started(self, past: Sequence[Tensor] = ()) -> "KVCache":
        """Another of the same model and number of sequences, that keeps all tokens, also behind a sliding window.

        ``past``: keys and values to start with, in the order of :attr:`tensors`, on through which gradients run.
        """
        n = self._n
        made = KVCache(self._model, n)
        made._length = past[0].shape[self.tokens_dim] if past else 0
        if isinstance(self._model, HookedTransformer):
            made._cache.append_attention_mask(torch.ones(n, made._length, dtype=torch.int64))
            for entry, keys, values in zip(made._cache.entries, past[::2], past[1::2]):
                entry.past_keys, entry.past_values = keys, values
            return made
        made._cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            made._cache.layers.append(layer)
        return made

    @property
    def tensors(self) -> list[Tensor]:
        """Keys and values of each layer, one after the other, with the tokens in dimension :attr:`tokens_dim`."""
        if isinstance(self._model, HookedTransformer):
            return [part for entry in self._cache.entries for part in (entry.past_keys, entry.past_values)]
        return [part for layer in self._cache.layers for part in (layer.keys, layer.values)]

    @property
    def tokens_dim(self) -> int:
        """Of the four dimensions of :attr:`tensors`, that of the tokens."""
        return 1 if isinstance(self._model, HookedTransformer) else 2

    def select(self, rows: Sequence[int]) -> "KVCache":
        """A copy with some of the sequences, each any number of times; this one stays as it is."""
        chosen = torch.tensor(list(rows), device=device_of(self._model))
        copied = KVCache(self._model, len(rows))
        copied._length = self._length
        if isinstance(self._model, HookedTransformer):
            copied._cache.previous_attention_mask = self._cache.previous_attention_mask[chosen]
            for entry, full in zip(copied._cache.entries, self._cache.entries, strict=True):
                entry.past_keys, entry.past_values = full.past_keys[chosen], full.past_values[chosen]
        else:
            copied._cache = copy.deepcopy(self._cache)
            copied._cache.batch_select_indices(chosen)
        return copied


class CachedPasses:
    """A batch of equally long sequences that grows token by token, through the host's KV cache where it has one.

    The hosts' own ``generate`` is not used: a `HookedTransformer` does not run ``hook_embed`` there, and both draw
    from the global random state, a whole batch at a time. ``ids`` are the sequences so far, ``(b, length)``.
    """

    def __init__(self, model: HostModel, ids: Tensor):
        self._model = model
        self._ids = self._fresh = ids
        self._cache = KVCache(model, len(ids)) if has_kv_cache(model) else None

    def logits(self) -> Tensor:
        """Logits ``(b, d_vocab)`` of the token after the last; call it once between two calls of :meth:`append`."""
        if self._cache is None:
            return logits_of(self._model, self._ids)[:, -1]
        rows, length = self._fresh.shape
        # A long prompt goes through in chunks: the logits of all its tokens would take more than its keys and values.
        *before, last = position_chunks(length, rows) if is_resumable(self._model) else [slice(0, length)]
        if before:
            self._cache = self._cache.started()
        for columns in before:
            self._cache.run(self._fresh[:, columns])
        return self._cache.run(self._fresh[:, last])[:, -1]

    def append(self, tokens: Tensor) -> None:
        """Let each sequence go on with one token, ``(b,)``."""
        self._fresh = tokens.to(self._ids)[:, None]
        self._ids = torch.cat([self._ids, self._fresh], dim=1)
