"""The name of one place inside a model, in every spelling that a host library has for it.

The same activation has three names. `HookedTransformer` calls the residual stream after block 3
``blocks.3.hook_resid_post``, a `TransformerBridge` ``blocks.3.hook_out``, and SAELens' `HookedProxyLM` uses the
module path of the Hugging Face model, ``model.layers.3``. A bridge ignores names that it does not know without a
word, so every name given by a user goes through `resolve_hook` before it is hooked.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Union

from transformer_lens import HookedRootModule, HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from saelens_ext._checks import near_matches

AnyHost = Union[HookedRootModule, TransformerBridge]

ATTACHED = "hook_sae_output"
"""The sub-hook by which a hook point that an attached SAE has replaced is recognised, in either model class."""

# One row per place: HookedTransformer's spelling first, then a bridge's. `{}` is the block.
_SPELLINGS = (
    ("hook_embed", "embed_ln.hook_out"),
    ("hook_embed", "embed.hook_out"),
    ("hook_pos_embed", "pos_embed.hook_out"),
    ("blocks.{}.hook_resid_pre", "blocks.{}.hook_in"),
    ("blocks.{}.hook_resid_post", "blocks.{}.hook_out"),
    ("blocks.{}.attn.hook_q", "blocks.{}.attn.q.hook_out"),
    ("blocks.{}.attn.hook_k", "blocks.{}.attn.k.hook_out"),
    ("blocks.{}.attn.hook_v", "blocks.{}.attn.v.hook_out"),
    ("blocks.{}.attn.hook_z", "blocks.{}.attn.o.hook_in"),
    ("blocks.{}.mlp.hook_pre", "blocks.{}.mlp.gate.hook_out"),
    # `in` is the linear half of a gated MLP and the only half of a plain one: the first that the model has is meant.
    ("blocks.{}.mlp.hook_pre_linear", "blocks.{}.mlp.in.hook_out"),
    ("blocks.{}.mlp.hook_pre", "blocks.{}.mlp.in.hook_out"),
    ("blocks.{}.mlp.hook_post", "blocks.{}.mlp.out.hook_in"),
)
BLOCKS = ("plain", "adding", "norms_around", "norms_behind")
"""Kinds of blocks: norms before each sublayer; the same, with sublayers that add the residual stream themselves
(BLOOM); norms before and behind each sublayer (Gemma 2); norms only behind (OLMo 2)."""

# HookedTransformer hooks what is added to the residual stream. Where the output of the sublayer's module is something
# else, that has no HookedTransformer name.
_SPELLINGS_BY_BLOCK = {
    "plain": (
        ("blocks.{}.hook_resid_mid", "blocks.{}.ln2.hook_in"),
        ("blocks.{}.hook_attn_out", "blocks.{}.attn.hook_out"),
        ("blocks.{}.hook_attn_out", "blocks.{}.attn.o.hook_out"),
        ("blocks.{}.hook_mlp_out", "blocks.{}.mlp.hook_out"),
        ("blocks.{}.hook_mlp_out", "blocks.{}.mlp.out.hook_out"),
        ("blocks.{}.mlp.hook_in", "blocks.{}.ln2.hook_out"),
    ),
    "adding": (
        ("blocks.{}.hook_resid_mid", "blocks.{}.ln2.hook_in"),
        ("blocks.{}.hook_attn_out", "blocks.{}.attn.o.hook_out"),
        ("blocks.{}.hook_mlp_out", "blocks.{}.mlp.out.hook_out"),
        ("blocks.{}.mlp.hook_in", "blocks.{}.ln2.hook_out"),
    ),
    "norms_around": (
        ("blocks.{}.hook_resid_mid", "blocks.{}.ln2.hook_in"),
        ("blocks.{}.hook_attn_out", "blocks.{}.ln1_post.hook_out"),
        ("blocks.{}.hook_mlp_out", "blocks.{}.ln2_post.hook_out"),
        ("blocks.{}.mlp.hook_in", "blocks.{}.ln2.hook_out"),
    ),
    "norms_behind": (
        ("blocks.{}.hook_resid_mid", "blocks.{}.mlp.hook_in"),
        ("blocks.{}.hook_attn_out", "blocks.{}.ln1.hook_out"),
        ("blocks.{}.hook_mlp_out", "blocks.{}.ln2.hook_out"),
    ),
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
    """Translate a hook name of any host into the name that fires on ``model`` for that place.

    The name may be in the spelling of `HookedTransformer` (``blocks.3.hook_resid_post``), of a bridge
    (``blocks.3.hook_out``) or of the Hugging Face modules (``model.layers.3``, the residual stream after block 3).

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


def one_spelling(model: AnyHost, hook_names: Iterable[str]) -> dict[str, str]:
    """For each name the first of ``hook_names`` that means the same place; ValueError as `resolve_hook`."""
    first: dict[str, str] = {}
    return {name: first.setdefault(resolve_hook(model, name), name) for name in hook_names}


def hook_layer(model: AnyHost, hook_name: str) -> int | None:
    """The block (0-based) that a hook lies in, or None for one outside the blocks; ValueError as `resolve_hook`."""
    return _block(locate(model, hook_name)[0])


def stop_layer(model: AnyHost, hook_names: str | Iterable[str]) -> int | None:
    """The number of blocks a forward pass must run for every one of ``hook_names``, in any spelling, to fire.

    Returns:
        A value for the host's ``stop_at_layer`` (0: the embeddings are enough), or None when a hook lies after the
        blocks, so that the whole pass is needed.

    Raises:
        ValueError: as `resolve_hook`.
    """
    names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
    needed = [_blocks_needed(locate(model, name)[0]) for name in names]
    return None if None in needed else max(filter(None, needed), default=0)


def is_in_stream(model: AnyHost, hook_name: str) -> bool:
    """Whether a hook shows the residual stream or what is added to it, so that a direction there is one of the stream.

    A width alone does not tell: that of a head's or an MLP's activations may be the same.

    Raises:
        ValueError: as `resolve_hook`.
    """
    name = locate(model, hook_name)[0]
    layer = _block(name)
    ends = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
    places = ("hook_embed", "hook_pos_embed") if layer is None else [f"blocks.{layer}.{end}" for end in ends]
    for place in places:
        try:
            if locate(model, place)[0] == name:
                return True
        except ValueError:  # a place that this model does not have
            continue
    return False


def output_behind(model: AnyHost, name: str) -> str | None:
    """Where a change in the middle of a block must be made once more: at the block's output.

    A bridge shows the residual stream between attention and MLP as the input of what follows, where the skip
    connection has branched off already. What is added in the middle must be added at the block's output as well.

    Returns:
        The name of the block's output; None where a change flows on by itself.
    """
    block = re.fullmatch(rf"(blocks\.(\d+))\.(.+?)(?:\.{ATTACHED})?", name)
    if block is None or not isinstance(model, TransformerBridge):
        return None
    aliases = getattr(model.blocks[int(block[2])], "hook_aliases", {})
    # What a norm in the stream itself gives (OPT-350M) has no skip connection beside it.
    is_middle = aliases.get("hook_resid_mid") == block[3] != "ln1.hook_out"
    return f"{block[1]}.hook_out" if is_middle else None


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
            if name.startswith("rotary_emb."):
                raise _absent(model, hook_name, "Its positions are rotary: nothing is added to the stream for them.")
            _check_gate(model, name)
            return name, False
    if hook_name.endswith("hook_resid_mid") and getattr(getattr(model, "cfg", None), "parallel_attn_mlp", False):
        raise _absent(model, hook_name, "Attention and MLP read the same residual stream, so a block has no middle.")
    aliases = _bridge_aliases(model) if isinstance(model, TransformerBridge) else ()
    known = [name for name in (*hooks, *aliases) if name != hook_name]
    raise ValueError(
        f"{type(model).__name__} has no hook {hook_name!r}.{near_matches(hook_name, known)} "
        "Its names are the keys of model.hook_dict; TransformerLens names (blocks.3.hook_resid_post) and names of "
        "Hugging Face modules (model.layers.3) are translated."
    )


def _absent(model: AnyHost, hook_name: str, reason: str) -> ValueError:
    return ValueError(f"This {type(model).__name__} has no hook {hook_name!r}. {reason}")


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
        # A bridge knows best where its architecture has a place, and which it has not.
        yield from _bridge_aliases(model).get(name, ())
        module = _module_block(name)
        if module is not None:
            yield module[0].replace("{}", str(module[1]))
        return
    kind = _block_kind(model, hooks)
    if kind == "adding" and name == "embed.hook_out":
        return  # HookedTransformer shows the embedding behind its norm alone
    spellings = spellings_of(name, kind)
    yield from spellings
    if not isinstance(model, HookedTransformer):
        yield from _module_paths(spellings, hooks)


def _bridge_aliases(model: TransformerBridge) -> dict[str, tuple[str, ...]]:
    """Every alias of a bridge with the names it may stand for, in the bridge's own order of preference."""
    aliases = {**model.hook_aliases, **model._collect_hook_aliases_from_registry()}
    return {alias: (target,) if isinstance(target, str) else tuple(target) for alias, target in aliases.items()}


def spellings_of(name: str, kind: str) -> list[str]:
    """The spellings of ``name``, those of `HookedTransformer` and of bridges, on a model with blocks of a kind."""
    layer = _block(name)
    template, layer = _module_block(name) or (name.replace(f"blocks.{layer}.", "blocks.{}.", 1), layer)
    pairs = [pair for pair in _SPELLINGS + _SPELLINGS_BY_BLOCK[kind] if template in pair]
    return [spelling.replace("{}", str(layer)) for spelling in (template, *chain.from_iterable(pairs))]


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
    places = set(spellings)
    for layer in (_block(spelling) for spelling in tuple(places)):
        # A block's input is the output of the one before; module paths have no name of its own for it.
        if layer and f"blocks.{layer}.hook_in" in places:
            places.add(f"blocks.{layer - 1}.hook_out")
    for path in hooks:
        place = _module_block(path)
        if place is not None and place[0].replace("{}", str(place[1])) in places:
            yield path


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


def _block_kind(model: AnyHost, hooks: Iterable[str]) -> str:
    """Which of `BLOCKS` a model has that is no bridge."""
    cfg = getattr(model, "cfg", None)
    # Hugging Face modules, of which HookedProxyLM has hooks.
    ends = {path.rsplit(".", 1)[-1] for path in hooks}
    if getattr(cfg, "post_embedding_ln", False) or "word_embeddings_layernorm" in ends:
        return "adding"
    if getattr(cfg, "use_normalization_before_and_after", False) or "pre_feedforward_layernorm" in ends:
        return "norms_around"
    if getattr(cfg, "original_architecture", None) in POST_NORM_ARCHITECTURES or "post_feedforward_layernorm" in ends:
        return "norms_behind"
    return "plain"
