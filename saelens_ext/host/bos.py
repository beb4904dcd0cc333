"""Whether a text starts with BOS: the one answer that streams, prompts, sampling, attribution and scoring go by.

It is the host's own (``model.to_tokens``), which neither the tokenizer nor the model tells alone: a bridge names EOS as
the BOS of a tokenizer that has none, and for many families (Qwen, Pythia, Phi, Granite, …) puts nothing in front.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from sae_lens.load_model import HookedProxyLM
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformers import PreTrainedTokenizerBase

# A text that every tokenizer knows, to see what it puts around it. An empty one shows nothing where BOS is EOS.
_PROBE = "a"


@dataclass(frozen=True)
class TextStart:
    """What stands in front of every text."""

    ids: tuple[int, ...] = ()
    """The tokens: BOS, nothing, or what else the tokenizer begins with."""
    written: str = ""
    """What the host writes before a text to get them; empty where the tokenizer adds them by itself."""
    prepends_bos: bool = False
    """Whether BOS is the first of them."""

    def after(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Tokens of a text that follow the start; one that the text itself begins with is not counted twice."""
        start = list(self.ids)
        # verbose=False: documents longer than the model's context are expected, they are cut into windows.
        plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if start and plain[: len(start)] == start:
            return plain[len(start) :]
        if self.written:
            # A SentencePiece tokenizer may put its space before a text, but not behind a special token.
            whole = tokenizer(self.written + text, add_special_tokens=False, verbose=False)["input_ids"]
            return whole[1:] if whole[:1] == start[:1] else plain
        return plain


def text_start(model: Any, prepend_bos: bool | None = None) -> TextStart:
    """What stands in front of a model's texts; ``prepend_bos`` overrides the model's own policy.

    For a `HookedProxyLM` it is what a bridge of the same architecture does.

    Raises:
        ValueError: BOS is asked for, and the tokenizer has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    own = [] if tokenizer is None else _own_start(tokenizer)
    bos = getattr(tokenizer, "bos_token_id", None)
    prepend = _by_default(model) if prepend_bos is None else prepend_bos
    adds = getattr(getattr(model, "cfg", None), "tokenizer_prepends_bos", None)
    adds = bool(own) if adds is None else adds
    # Told to, BOS is put there whatever the host believes about a tokenizer that was set after the model was made.
    if prepend and own[:1] != [bos] and (prepend_bos or not adds) and _is_atom(tokenizer):
        return TextStart((cast(int, bos), *own), cast(Any, tokenizer).bos_token, True)
    ids = own if prepend or own[:1] != [bos] else own[1:]
    start = TextStart(tuple(ids), "", begins_with_bos(tokenizer, ids))
    if prepend_bos and not start.prepends_bos:
        raise ValueError("prepend_bos=True, and the tokenizer has no BOS token: leave prepend_bos at None or False.")
    return start


def begins_with_bos(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> bool:
    """Whether the first of some tokens is BOS."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and len(ids) > 0 and int(ids[0]) == bos


def warn_of_other_bos(built: bool | None, prepends_bos: bool | None, here: str) -> None:
    """Warn when a dictionary was built on texts that started otherwise; what is not recorded is not judged.

    ``built`` is the ``prepend_bos`` that its metadata records, ``prepends_bos`` that of the texts it is used on, which
    ``here`` names, such as "this model's texts".
    """
    if built is None or prepends_bos is None or bool(built) == prepends_bos:
        return
    did, do = ("with BOS", "without it") if built else ("without BOS", "with it")
    warnings.warn(
        f"This dictionary was built on texts that start {did}, and {here} start {do}: activations differ, most of all "
        f"at the first tokens. Read texts the same way (prepend_bos={bool(built)}), or build the dictionary with "
        f"prepend_bos={prepends_bos}.",
        UserWarning,
        stacklevel=3,
    )


# --- what the host does ---


def _by_default(model: Any) -> bool:
    if isinstance(model, HookedProxyLM):
        return _architecture_prepends(model)
    return getattr(model.cfg, "default_prepend_bos", True) is not False


def _architecture_prepends(model: HookedProxyLM) -> bool:
    """What a bridge of the architecture does; where there is no bridge, what the tokenizer does by itself."""
    config: Any = model.model.config
    architecture = (config.architectures or [type(model.model).__name__])[0]
    try:
        bridged = build_bridge_config_from_hf(config, architecture, str(config.name_or_path), torch.float32)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridged)
    except (ValueError, AttributeError):
        return True if model.tokenizer is None else bool(_own_start(model.tokenizer))
    return bool(adapter.cfg.default_prepend_bos)


def _own_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer itself puts in front of a text."""
    ids, plain = (tokenizer(_PROBE, add_special_tokens=special)["input_ids"] for special in (True, False))
    special = set(tokenizer.all_special_ids)
    return list(takewhile(special.__contains__, ids[: max(0, len(ids) - len(plain))]))


def _is_atom(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether BOS is one token where it stands in a text; a bridge puts no other in front."""
    bos = getattr(tokenizer, "bos_token", None)
    return tokenizer is not None and bos is not None and len(tokenizer(bos, add_special_tokens=False)["input_ids"]) == 1
