"""Hosting from a folder or memory what TransformerLens knows by published names only."""

from pathlib import Path
from typing import Any

import torch
from sae_lens import HookedSAETransformer
from transformer_lens.loading_from_pretrained import convert_hf_model_config, make_model_alias_map
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The host's names of sizes and those of Hugging Face configurations.
_SIZES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_key_value_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size",
}
_REMEDY = (
    "Load it as an SAETransformerBridge (the default), which takes any configuration and gives the same activations."
)


def hooked_by_name(
    name_or_path: str | Path,
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device,
    dtype: torch.dtype,
) -> HookedSAETransformer:
    """A model by the host's own loader, under the published name of its configuration.

    ValueError: neither its name nor its sizes are those of a model on the host's list.
    """
    official = official_name(name_or_path, hf_model)
    return HookedSAETransformer.from_pretrained_no_processing(
        official, hf_model=hf_model, tokenizer=tokenizer, device=str(device), dtype=dtype
    )


def official_name(name_or_path: str | Path, hf_model: PreTrainedModel) -> str:
    """The name on the host's list: that which was given or recorded, otherwise that of a model of the same sizes.

    ValueError: there is none, or the model of that name has other sizes.
    """
    known = make_model_alias_map()
    for given in (str(name_or_path), str(hf_model.config.name_or_path)):
        official = known.get(given.lower()) or known.get(Path(given).name.lower())
        if official is not None:
            if differing := _differences(official, hf_model):
                known_as = f"TransformerLens knows {given!r} as {official}"
                raise ValueError(f"{known_as}, and this model differs from that: {differing}. {_REMEDY}")
            return official
    # Of these alone the host has the sizes without asking the hub.
    for official in OFFICIAL_MODEL_NAMES:
        if "gemma" in official.lower() and not _differences(official, hf_model):
            return official
    raise ValueError(
        f"TransformerLens hosts a {_architecture(hf_model)} only under the name of a published one, and neither "
        f"{str(name_or_path)!r} nor the sizes of this model are those of one on its list. {_REMEDY} If it is one on "
        "the list, give that name (with hf_model=), or call its folder so."
    )


def same_model(name: str, other: str) -> bool:
    """Whether two names, with or without owner or folder, or by an alias of the host, are of one model."""
    known = make_model_alias_map()
    lasts = [known.get(one.lower(), one) for one in (name, other)]
    return len({known.get(Path(last).name.lower(), Path(last).name).rpartition("/")[2].lower() for last in lasts}) == 1


def _differences(official: str, hf_model: PreTrainedModel) -> str:
    """How the sizes of a model differ from those that the host has for a name; empty if they do not."""
    try:
        known = convert_hf_model_config(official)
    except NotImplementedError as error:
        return str(error)
    except OSError as error:
        unreached = f"TransformerLens asks the model hub for the configuration of {official}, and could not reach it."
        raise ValueError(f"{unreached} {_REMEDY}") from error
    config = hf_model.config.get_text_config()
    pairs: dict[str, tuple[Any, Any]] = {"architecture": (known["original_architecture"], _architecture(hf_model))}
    pairs |= {size: (known.get(size), getattr(config, name, None)) for size, name in _SIZES.items()}
    differing = {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}
    return ", ".join(f"{name} {mine} instead of {theirs}" for name, (theirs, mine) in differing.items())


def _architecture(hf_model: PreTrainedModel) -> str:
    return (hf_model.config.architectures or [type(hf_model).__name__])[0]
