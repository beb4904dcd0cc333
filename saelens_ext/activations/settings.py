"""Settings that streams of activations share, checked."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from typing_extensions import TypedDict

from saelens_ext._checks import positive
from saelens_ext.host.bos import TextStart
from saelens_ext.host.tokens import special_token_ids


class StreamOptions(TypedDict, total=False):
    """How a stream reads: options of ``ActivationStream``."""

    context_size: int
    batch_size: int
    max_tokens: int | None
    exclude_special_tokens: bool | Sequence[int]
    prepend_bos: bool | None
    text_column: str
    seqpos_slice: Sequence[int | None]
    last_token_only: bool
    add_generation_prompt: bool
    shuffle_seed: int | None
    progress: bool


def checked_names(hook_name: str | Sequence[str]) -> tuple[str, ...]:
    """The hook names without repeats; raises ValueError for none, or one that does not hold an activation per token."""
    given = (hook_name,) if isinstance(hook_name, str) else tuple(dict.fromkeys(hook_name))
    if not given:
        raise ValueError("hook_name is an empty list: name at least one hook to read.")
    for name in given:
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            raise ValueError(f"The hook {name!r} holds one value per pair of positions, not one activation per token.")
    return given


def checked_context_size(context_size: int, limit: int | None) -> int:
    """The size, if it lies from 2 to the model's own limit."""
    size = positive(context_size, "context_size")
    if size < 2 or (limit is not None and size > limit):
        raise ValueError(f"context_size must lie from 2 (BOS and a token) to {limit}, the model's, got {context_size}.")
    return size


def excluded_ids(tokenizer: Any, exclude: bool | Sequence[int], start: TextStart = TextStart()) -> Int64[Tensor, " k"]:
    """Token ids to leave out: the special ones, with those that every text starts with; those listed; or none."""
    if isinstance(exclude, bool):
        exclude = sorted({*special_token_ids(tokenizer), *start.ids}) if exclude else []
    return torch.tensor([int(i) for i in exclude], dtype=torch.int64)


def positions_read(seqpos_slice: tuple[int | None, ...], context_size: int) -> Bool[Tensor, " L"]:
    """Which positions of a window a slice reads; raises ValueError if none."""
    read = torch.zeros(context_size, dtype=torch.bool)
    read[list(range(context_size)[slice(*seqpos_slice)])] = True
    if not bool(read.any()):
        raise ValueError(f"seqpos_slice={seqpos_slice!r} selects no position of a window of {context_size} tokens.")
    return read
