"""The name of one place inside a model, in every spelling that a host library has for it.

The same activation has three names. `HookedTransformer` calls the residual stream after block 3
``blocks.3.hook_resid_post``, a `TransformerBridge` ``blocks.3.hook_out``, and SAELens' `HookedProxyLM` uses the
module path of the Hugging Face model, ``model.layers.3``. A bridge ignores names that it does not know without a
word, so every name given by a user goes through `resolve_hook` before it is hooked.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Union

from transformer_lens import HookedTransformer
from transformer_lens.HookedTransformer import HookedRootModule
from transformer_lens.model_bridge import TransformerBridge

from saelens_ext._checks import near_matches

AnyHost = Union[HookedRootModule, TransformerBridge]

ATTACHED = "hook_sae_output"
"""The sub-hook by which a hook point that an attached SAE has replaced is recognised, in either model class."""

# One row per place: HookedTransformer's spelling first, then a bridge's. `{}` is the block.
_SPELLINGS = (
    ("hook_embed", "embed.hook_out"),
    ("hook_pos_embed", "pos_embed.hook_out"),
    ("blocks.{}.hook_resid_pre", "blocks.{}.hook_in"),
    ("blocks.{}.hook_resid_mid", "blocks.{}.ln2.hook_in"),
    ("blocks.{}.hook_resid_post", "blocks.{}.hook_out"),
    ("blocks.{}.hook_attn_out", "blocks.{}.attn.hook_out"),
    ("blocks.{}.hook_mlp_out", "blocks.{}.mlp.hook_out"),
    ("blocks.{}.attn.hook_q", "blocks.{}.attn.q.hook_out"),
    ("blocks.{}.attn.hook_k", "blocks.{}.attn.k.hook_out"),
    ("blocks.{}.attn.hook_v", "blocks.{}.attn.v.hook_out"),
    ("blocks.{}.attn.hook_z", "blocks.{}.attn.o.hook_in"),
    ("blocks.{}.mlp.hook_in", "blocks.{}.ln2.hook_out"),
    ("blocks.{}.mlp.hook_pre", "blocks.{}.mlp.gate.hook_out"),
    # `in` is the linear half of a gated MLP and the only half of a plain one: the first that the model has is meant.
    ("blocks.{}.mlp.hook_pre_linear", "blocks.{}.mlp.in.hook_out"),
    ("blocks.{}.mlp.hook_pre", "blocks.{}.mlp.in.hook_out"),
    ("blocks.{}.mlp.hook_post", "blocks.{}.mlp.out.hook_in"),
)
# Models that normalise a sublayer's output (Gemma 2) add it to the residual stream after that norm, and so
# HookedTransformer hooks it there; the sublayer's own output then has no HookedTransformer name.
_POST_NORM_SPELLINGS = {
    "blocks.{}.hook_attn_out": "blocks.{}.ln1_post.hook_out",
    "blocks.{}.hook_mlp_out": "blocks.{}.ln2_post.hook_out",
}
# The bridge names of Hugging Face modules, by the end of the module's path.
_HF_MODULES = (
    (r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)$", "embed.hook_out"),
    (r"(?:^|\.)wpe$", "pos_embed.hook_out"),
    (r"(?:^|\.)(?:layers|h)\.(\d+)$", "blocks.{}.hook_out"),
    (r"(?:^|\.)(?:layers|h)\.(\d+)\.(?:self_attn|attn|attention|self_attention)$", "blocks.{}.attn.hook_out"),
    (r"(?:^|\.)(?:layers|h)\.(\d+)\.mlp$", "blocks.{}.mlp.hook_out"),
)
# Where neurons are, and what a bridge gives under these names for an MLP that has no neurons in one place.
_OF_NEURONS = re.compile(r"mlp\.hook_(pre|pre_linear|post)$")
_AROUND_AN_MLP = re.compile(r"(mlp\.hook_|hook_mlp_)(in|out)$")
_OTHER_TOWERS = re.compile(r"vision|visual|audio|encoder")
# Hook points that exist but fire only when a switch of the model is on.
_GATES = (
    (("attn.hook_result",), "use_attn_result"),
    (("hook_q_input", "hook_k_input", "hook_v_input"), "use_split_qkv_input"),
    (("mlp_in",), "use_hook_mlp_in"),
    (("attn_in",), "use_attn_in"),
)


def resolve_hook(model: AnyHost, hook_name: str) -> str:
    """Translate a hook name of any host into the name that fires on ``model``.

    Args:
        model: the model to hook.
        hook_name: a name in the spelling of `HookedTransformer` (``blocks.3.hook_resid_post``), of a bridge
            (``blocks.3.hook_out``) or of the Hugging Face modules (``model.layers.3``, the residual stream after block
            3).

    Returns:
        The name under which ``model`` fires for that place.

    Raises:
        ValueError: when the model has no such place (near matches are listed), when the hook point is switched off,
            or when an attached SAE has taken the hook point's place.
    """
    name, attached = locate(model, hook_name)
    if attached:
        raise ValueError(
            f"An SAE is attached at {hook_name!r}, so two activations go by that name. Say which is meant, "
            f"'{name}.hook_sae_input' (what the SAE receives) or '{name}.{ATTACHED}' (what flows on from there), "
            "or detach the SAE first with model.reset_saes()."
        )
    return name


def hook_layer(model: AnyHost, hook_name: str) -> int | None:
    """The block (0-based) that a hook lies in, or None for one outside the blocks.

    Raises:
        ValueError: as `resolve_hook`.
    """
    return _block(locate(model, hook_name)[0])


def stop_layer(model: AnyHost, hook_names: str | Iterable[str]) -> int | None:
    """The number of blocks a forward pass must run for every one of ``hook_names`` to fire.

    Args:
        model: the model to hook.
        hook_names: one hook name or several, in any spelling.

    Returns:
        A value for the host's ``stop_at_layer`` (0: the embeddings are enough), or None when a hook lies after the
        blocks, so that the whole pass is needed.

    Raises:
        ValueError: as `resolve_hook`.
    """
    names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
    needed = [_blocks_needed(locate(model, name)[0]) for name in names]
    return None if None in needed else max((n for n in needed if n is not None), default=0)


def locate(model: AnyHost, hook_name: str) -> tuple[str, bool]:
    """The name of a place on ``model``, and whether an attached SAE has replaced the hook point there.

    Raises:
        ValueError: when the model has no such place, or its hook point is switched off; a name of neurons where the
            MLP has none in one place.
    """
    hooks = hook_points(model)
    name, attached = _locate(model, hook_name, hooks)
    if _OF_NEURONS.search(hook_name) and _AROUND_AN_MLP.search(name):
        raise ValueError(
            f"{hook_name!r} names neurons, the activations in front of an MLP's output matrix, and the MLP there has "
            "no single output matrix: it is a mixture of experts, or hides its parts. On this model the name stands "
            f"for the MLP's input or output, {name!r}; give that name to read it."
        )
    return name, attached


def _locate(model: AnyHost, hook_name: str, hooks: Mapping[str, Any]) -> tuple[str, bool]:
    if _is_plain(hook_name, model, hooks):
        _check_gate(model, hook_name)
        return hook_name, False
    base, separator, sub_hook = hook_name.partition(".hook_sae_")
    candidates = list(dict.fromkeys(_candidates(base, model, hooks)))
    # An SAE is looked for first: in compatibility mode an alias may still hold the hook point that the SAE replaced.
    for candidate in candidates:
        if f"{candidate}.{ATTACHED}" in hooks:
            if not separator:
                return candidate, True
            if f"{candidate}{separator}{sub_hook}" in hooks:
                return f"{candidate}{separator}{sub_hook}", False
    for candidate in candidates:
        if not separator and candidate in hooks:
            name = hooks[candidate].name
            _check_gate(model, name)
            return name, False
    raise ValueError(
        f"{type(model).__name__} has no hook {hook_name!r}.{near_matches(hook_name, _known_names(model, hooks))} "
        "Its names are the keys of model.hook_dict; TransformerLens names (blocks.3.hook_resid_post) and names of "
        "Hugging Face modules (model.layers.3) are translated."
    )


def _is_plain(name: str, model: AnyHost, hooks: Mapping[str, Any]) -> bool:
    """Whether ``name`` itself fires, for sure; saves collecting a bridge's aliases, at every forward pass."""
    if getattr(model, "compatibility_mode", False) or f"{name}.{ATTACHED}" in hooks:
        return False
    return name in hooks and hooks[name].name == name


def hook_points(model: AnyHost) -> Mapping[str, Any]:
    """Hook points by name, aliases and the sub-hooks of attached SAEs included; each carries the name that fires."""
    hooks = model.hook_dict
    for name, hook in hooks.items():
        # Detaching an SAE from a bridge leaves a hook point with a clipped name ("hook_out"), and a bridge looks hooks
        # up by that name: from then on it would ignore, without a word, every hook put there.
        if hook.name not in hooks:
            hook.name = name
    return hooks


def _candidates(name: str, model: AnyHost, hooks: Mapping[str, Any]) -> Iterable[str]:
    """The spellings of one place, those of the model itself first."""
    yield name
    if isinstance(model, TransformerBridge):
        yield from _bridge_aliases(model).get(name, ())
    spellings = spellings_of(name, _is_post_norm(model))
    yield from spellings
    if not isinstance(model, (HookedTransformer, TransformerBridge)):
        yield from _module_paths(spellings, hooks)


def _bridge_aliases(model: TransformerBridge) -> dict[str, tuple[str, ...]]:
    """Every alias of a bridge with the names it may stand for, in the bridge's own order of preference."""
    aliases = {**model.hook_aliases, **model._collect_hook_aliases_from_registry()}
    return {alias: (target,) if isinstance(target, str) else tuple(target) for alias, target in aliases.items()}


def spellings_of(name: str, post_norm: bool) -> list[str]:
    """The other spellings of ``name``, those of `HookedTransformer` and of bridges."""
    block = _module_block(name)
    if block is not None:
        template, layer = block
    else:
        layer = _block(name)
        template = name if layer is None else name.replace(f"blocks.{layer}.", "blocks.{}.", 1)
    found = [template]
    for hooked, bridged in _SPELLINGS:
        bridged = _POST_NORM_SPELLINGS.get(hooked, bridged) if post_norm else bridged
        if template in (hooked, bridged):
            found += [hooked, bridged]
    return [spelling.replace("{}", str(layer)) for spelling in found]


def _module_block(name: str) -> tuple[str, int | None] | None:
    """The bridge template and block of a Hugging Face module path; None when ``name`` is no such path."""
    if _OTHER_TOWERS.search(name):
        return None
    for pattern, template in _HF_MODULES:
        match = re.search(pattern, name)
        if match:
            return template, int(match.group(1)) if match.groups() else None
    return None


def _module_paths(spellings: Iterable[str], hooks: Mapping[str, Any]) -> Iterable[str]:
    """The Hugging Face modules, among ``hooks``, whose output is the place that ``spellings`` name."""
    wanted = set(spellings)
    for layer in (_block(spelling) for spelling in tuple(wanted)):
        # A block's input is the output of the one before; module paths have no name of its own for it.
        if layer and f"blocks.{layer}.hook_in" in wanted:
            wanted.add(f"blocks.{layer - 1}.hook_out")
    for path in hooks:
        place = _module_block(path)
        if place is not None and place[0].replace("{}", str(place[1])) in wanted:
            yield path


def _known_names(model: AnyHost, hooks: Mapping[str, Any]) -> list[str]:
    aliases = list(_bridge_aliases(model)) if isinstance(model, TransformerBridge) else []
    return [*hooks, *aliases]


def _block(name: str) -> int | None:
    """The block in a name of either TransformerLens spelling, or in a module path; None outside the blocks."""
    match = re.match(r"blocks\.(\d+)\.", name) or re.search(r"(?:^|\.)(?:layers|h)\.(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else None


def _blocks_needed(name: str) -> int | None:
    layer = _block(name)
    if layer is not None:
        return layer + 1
    return 0 if re.match(r"(?:hook_(?:pos_)?embed$|(?:pos_)?embed\.)", name) else None


def _check_gate(model: AnyHost, name: str) -> None:
    for endings, switch in _GATES:
        if name.endswith(endings) and getattr(getattr(model, "cfg", None), switch, True) is False:
            raise ValueError(f"The hook {name!r} is switched off on this model: call model.set_{switch}(True) first.")


def _is_post_norm(model: AnyHost) -> bool:
    return bool(getattr(getattr(model, "cfg", None), "use_normalization_before_and_after", False))
