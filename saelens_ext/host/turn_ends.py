"""Which tokens end what a model says."""

from functools import lru_cache
from typing import Any

from transformers import GenerationConfig

from saelens_ext.host.chat_template import end_of_turn
from saelens_ext.host.models import HostModel, tokenizer_of


def end_ids(model: HostModel) -> frozenset[int]:
    """Token ids after which the model has nothing more to say.

    They are the tokenizer's EOS, every end that the model's generation config names, and the mark that its chat
    template puts behind an answer.
    """
    tokenizer = tokenizer_of(model)
    named = [tokenizer.eos_token_id, getattr(model.cfg, "eos_token_id", None), _configured(model)]
    ids = [i for one in named for i in (one if isinstance(one, list | tuple) else [one]) if i is not None]
    return frozenset(map(int, ids)) | end_of_turn(tokenizer)


def _configured(model: HostModel) -> Any:
    """EOS of the model's generation config, or of its config where it has none; one id, several or None."""
    hosted = getattr(model, "original_model", model)
    for config in (getattr(hosted, "generation_config", None), getattr(hosted, "config", None)):
        if (ends := getattr(config, "eos_token_id", None)) is not None:
            return ends
    return None if hosted is not model else _published(str(tokenizer_of(model).name_or_path))


@lru_cache(maxsize=32)
def _published(name: str) -> Any:
    """The same by the model's files on this machine: a `HookedTransformer` keeps no generation config."""
    try:
        return GenerationConfig.from_pretrained(name, local_files_only=True).eos_token_id if name else None
    except (OSError, ValueError):
        return None
