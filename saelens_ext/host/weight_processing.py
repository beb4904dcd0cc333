"""What decides which activations a model gives: its norms, the centring of its weights; and how an SAE's differ."""

import re
from collections.abc import Mapping
from typing import Any

from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge


def normalization_type(model: HookedTransformer | TransformerBridge) -> str | None:
    """The host's name for the norm; a bridge with the norms' weights folded away does not say so: they are all 1."""
    kind = model.cfg.normalization_type
    if kind not in ("LN", "RMS") or not getattr(model, "compatibility_mode", False):
        return kind
    gains = [getattr(getattr(block, norm, None), "weight", None) for block in model.blocks for norm in ("ln1", "ln2")]
    folded = all(bool((gain == gain[0]).all()) for gain in gains if gain is not None)
    return f"{kind}Pre" if folded else kind


def writing_weights_centered(model: HookedTransformer | TransformerBridge) -> bool | None:
    """Whether the rows of the embedding sum to zero, as they do once the host has centred what is written."""
    try:
        rows = model.W_E[:64].detach().float()
    except AttributeError:
        return None
    return bool((rows.mean(dim=-1).abs() < 1e-3 * rows.std(dim=-1)).all())


# Hooks, in either spelling, at which a change of the weights' processing cannot be seen, or can. Centring what is
# written to the residual stream shows wherever that stream or a part of it is read. Folding a norm's weights shows
# between the norm and the next matrix; it comes with folding value biases, which shows in values and what heads make of
# them.
WITHIN_A_LAYER = re.compile(
    r"hook_(q|k|v|z|pre|pre_linear|post|normalized|scale|rot_q|rot_k)$|\.(q|k|v|qkv|gate|in)\.hook_(in|out)$"
    r"|\.(out|o)\.hook_in$|mlp\.hook_in$|attn\.hook_in$|ln\w*\.hook_out$|unembed"
)
_AFTER_A_NORM = re.compile(r"ln\w*\.hook_out$|(?:mlp|attn|unembed|\.q|\.k|\.v|\.qkv|\.gate|\.in)\.hook_in$")
_VALUES = re.compile(r"hook_(v|z)$|\.v\.hook_out$|\.o\.hook_in$")


def activation_differences(metadata: SAEMetadata, model: Mapping[str, Any]) -> list[str]:
    """Sentences on what changes the activations at the SAE's hooks; what was not recorded is not judged.

    Another model class alone changes nothing: both hosts give the same activations from the same unprocessed weights.
    """
    built = _recorded(metadata)
    hooks = [name for name in (metadata.hook_name, metadata.hook_name_out) if name]
    if built["writing_weights_centered"] is None and _class_differs(built, model):
        then, now = (f"{d['model_class_name']} (compatibility_mode={d['compatibility_mode']})" for d in (built, model))
        return [f"it was built on a {then} and this is a {now}, and nothing records how the weights were processed"]
    found = []
    if any(_shows(name, built, model) for name in hooks):
        centring = "centring of the weights that write to the residual stream"
        for key, what in {"writing_weights_centered": centring, "normalization_type": "the norm"}.items():
            if _differs(key, built, model):
                found.append(f"{what} was {built[key]!r} and is {model[key]!r} here")
    return found


def _recorded(metadata: SAEMetadata) -> dict[str, Any]:
    """What an SAE records of its model; SAELens' own SAEs record the arguments that the model was loaded with."""
    keys = ("model_class_name", "compatibility_mode", "normalization_type", "writing_weights_centered")
    built = {key: metadata.get(key) for key in keys}
    arguments = metadata.model_from_pretrained_kwargs
    if built["writing_weights_centered"] is None and arguments:
        built["writing_weights_centered"] = arguments.get("center_writing_weights")
    return built


def _shows(hook_name: str, built: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether a recorded difference in how the weights were processed changes the activations at this hook."""
    if _differs("writing_weights_centered", built, model) and not WITHIN_A_LAYER.search(hook_name):
        return True
    if not _differs("normalization_type", built, model):
        return False
    biased = str(model["normalization_type"]).startswith("LN")
    return bool(_AFTER_A_NORM.search(hook_name) or (biased and _VALUES.search(hook_name)))


def _differs(key: str, built: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    return built[key] is not None and model[key] is not None and built[key] != model[key]


def _class_differs(built: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether the recorded family of model class, or its compatibility mode, is another one."""
    if built["model_class_name"] is None:
        return False
    bridged = ["Bridge" in str(description["model_class_name"]) for description in (built, model)]
    modes = [bool(description["compatibility_mode"]) for description in (built, model)]
    return bridged[0] != bridged[1] or modes[0] != modes[1]
