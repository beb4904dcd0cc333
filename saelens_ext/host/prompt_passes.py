"""Forward passes over prompts on any TransformerLens model: tokens in, logits out, with or without a KV cache."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from saelens_ext import _checks
from saelens_ext._modes import callers_autocast
from saelens_ext.host.bos import TextStart, text_start
from saelens_ext.host.chat_template import Prompt, asked
from saelens_ext.host.models import HostModel, tokenizer_of

_MAX_BATCH_TOKENS = 4096


def prompt_ids(
    model: HostModel, prompt: Prompt, *, templated: bool = False, chat_template_options: Mapping[str, Any] | None = None
) -> Tensor:
    """Token ids ``(length,)`` int64 of a prompt on the model's device, as ``model.to_tokens`` gives them.

    BOS comes first where it does for this model, and only once; a ``templated`` prompt was written by a chat template,
    which decides about it itself, and which writes a conversation here, with its options. An EOS that a tokenizer puts
    behind every text does not come, since the prompt is to be continued.

    Raises:
        ValueError: no tokenizer, or a prompt that is no text, has no token, or one that the model does not have.
    """
    tokenizer = tokenizer_of(model)
    if not isinstance(prompt, str):
        given = asked(tokenizer, prompt, options=chat_template_options, name="The prompt")
        prompt, templated = given.text, True
    start = TextStart() if templated else text_start(model)
    ids = [*start.ids, *start.after(tokenizer, _checks.text(prompt, "The prompt"))]
    beyond = [i for i in ids if i >= int(model.cfg.d_vocab)]
    if beyond:
        raise ValueError(
            f"The prompt has the token {tokenizer.convert_ids_to_tokens(beyond[0])!r}, of id {beyond[0]}, and this "
            f"model's vocabulary has {model.cfg.d_vocab} tokens: the tokenizer is another model's, or has tokens that "
            "were added later. Enlarge the embeddings (hf_model.resize_token_embeddings) before hosting the model."
        )
    if not ids:
        raise ValueError(f"The prompt {prompt!r} has no token, and this model has no BOS; give it a word.")
    return torch.tensor(ids, device=device_of(model))


def device_of(model: HostModel) -> torch.device:
    """Where the model's first parameter lies."""
    return next(iter(model.parameters())).device


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the context; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def logits_of(model: HostModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits ``(b, length, d_vocab)`` of token ids ``(b, length)``; ``mask`` is False at right padding."""
    # Without an explicit mask a HookedTransformer guesses padding from the token ids, and pad may equal BOS.
    mask = torch.ones_like(ids) if mask is None else mask.long()
    with callers_autocast():
        return model(ids, return_type="logits", attention_mask=mask)


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows in batches, longest first, so that those of like length share one and what does not fit fails at once.

    A batch has at most ``batch_size`` rows, and as wide as its longest no more than 4096 tokens; or is one row.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    found: list[list[int]] = []
    while order:
        n = max(1, min(batch_size, _MAX_BATCH_TOKENS // max(1, lengths[order[0]])))
        found.append(order[:n])
        order = order[n:]
    return found


def has_kv_cache(model: HostModel) -> bool:
    """Whether passes over this model can go on from the keys and values of earlier tokens."""
    return bool(getattr(getattr(model, "adapter", None), "supports_kv_cache", True))


class KVCache:
    """Keys and values of a batch of n equally long sequences, on any model that :func:`has_kv_cache`."""

    def __init__(self, model: HostModel, n: int):
        self._model = model
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
        logits = logits_of(self._model, self._ids) if self._cache is None else self._cache.run(self._fresh)
        return logits[:, -1]

    def append(self, tokens: Tensor) -> None:
        """Let each sequence go on with one token, ``(b,)``."""
        self._fresh = tokens.to(self._ids)[:, None]
        self._ids = torch.cat([self._ids, self._fresh], dim=1)
