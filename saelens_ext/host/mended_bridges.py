"""Bridges that compute something else than their model, or name a place wrongly, put right.

Cohere's rotary embedding turns adjacent pairs of a head's entries. The host turns entry i with entry i + d/2 unless its
configuration says otherwise, as it does for other such models; it then wants the cosine of each frequency once, and the
same again behind. HunYuan norms queries and keys after turning them, the host before. The first GPT's blocks are given
a mask of padding only, which the host takes to hide later tokens too, as those of other models do. Where OPT norms the
stream behind each sublayer (350M), the middle of a block is what the first norm gives; the host names the input of the
second. OPT's MLPs see the tokens of all texts in one row, which hook points there take apart and put together again. A
dictionary that is attached there does not, nor does the hook point that SAELens leaves in its place; and where norms
come last, hook points of the second norm do it with what was no row.
"""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.supported_architectures.opt import _UnflattenTokens

_KNOWN = "_put_right_or_warned_of"
_ROWS = "_texts_and_tokens"


def mend_bridge(model: Any) -> None:
    """Let such a bridge compute what its model computes; does nothing on other models, or a second time."""
    if isinstance(model, TransformerBridge) and (mend := _MENDED.get(model.cfg.architecture or "")):
        mend(model)
        vars(model)[_KNOWN] = True


def warn_of_other_model(model: Any) -> None:
    """Warn, once, of a bridge that computes something else than its model and was not put right."""
    if isinstance(model, TransformerBridge) and _KNOWN not in vars(model):
        vars(model)[_KNOWN] = True
        if (architecture := model.cfg.architecture) in _OF_ANOTHER_MODEL:
            warnings.warn(
                f"A bridge of a {architecture}, as TransformerLens makes it, computes something else than that model. "
                "Load it with saelens_ext.load_model, which puts it right.",
                UserWarning,
                stacklevel=3,
            )


def _turn_adjacent_pairs(model: TransformerBridge) -> None:
    configs = [model.cfg, *(block.attn.config for block in model.blocks)]
    if not all(config.rotary_adjacent_pairs for config in configs):
        for config in configs:
            config.rotary_adjacent_pairs = True
        model.rotary_emb.register_forward_hook(_each_frequency_once)


def _each_frequency_once(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.cat([entries[..., ::2], entries[..., ::2]], dim=-1) for entries in output)
    return cos, sin


def _norm_after_turning(model: TransformerBridge) -> None:
    for block in model.blocks:
        attention = block.attn
        for turned, norm, normed in (
            ("hook_rot_q", "q_norm", "hook_q_normed"),
            ("hook_rot_k", "k_norm", "hook_k_normed"),
        ):
            if attention.submodules.pop(norm, None) is not None:  # in its own place no more
                # No closure, whose modules a copy of the model would share.
                then = partial(_then, getattr(attention, norm), getattr(attention, normed))
                getattr(attention, turned).register_forward_hook(then)


def _then(norm: nn.Module, hook_point: nn.Module, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return hook_point(norm(output))


def _hide_later_tokens(model: TransformerBridge) -> None:
    for block in model.blocks:
        if _mask_later_tokens not in block.attn._forward_pre_hooks.values():
            block.attn.register_forward_pre_hook(_mask_later_tokens, with_kwargs=True)


def _mask_later_tokens(module: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask = options.get("attention_mask")  # what is added to scores, (b, 1, 1, n)
    if mask is not None:
        n = mask.shape[-1]
        later = torch.full((n, n), torch.finfo(mask.dtype).min, dtype=mask.dtype, device=mask.device).triu(1)
        options = options | {"attention_mask": torch.minimum(mask, later)}
    return inputs, options


def _mend_opt(model: TransformerBridge) -> None:
    norms_first = bool(getattr(model.cfg, "do_layer_norm_before", True))
    for block in model.blocks:
        if not norms_first:
            block.hook_aliases = block.hook_aliases | {"hook_resid_mid": "ln1.hook_out"}
            for place in (block.ln2.hook_in, block.ln2.hook_out, block.hook_mlp_in):
                place.hook_conversion = None
        if _take_tokens_apart not in block._forward_pre_hooks.values():
            block.register_forward_pre_hook(_take_tokens_apart, with_kwargs=True)


def _take_tokens_apart(block: Any, inputs: Any, options: dict[str, Any]) -> None:
    rows = (inputs[0] if inputs else options["hidden_states"]).shape[:2]
    in_one_row = (block.mlp, block.ln2) if block.original_component.do_layer_norm_before else (block.mlp,)
    for part in in_one_row:
        for member in (part, *part.submodules.values()):
            for place in (member.hook_in, member.hook_out):
                if not isinstance(place, HookPoint):
                    _give_tokens_apart(place, tuple(rows))
                elif place.hook_conversion is None:
                    place.hook_conversion = _UnflattenTokens()


def _give_tokens_apart(attached: Any, rows: tuple[int, int]) -> None:
    """Let a dictionary that is attached see the tokens as hooks do."""
    if _ROWS not in vars(attached):
        attached.register_forward_pre_hook(_apart)
        attached.register_forward_hook(_together)
    vars(attached)[_ROWS] = rows


def _apart(attached: Any, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].unflatten(0, vars(attached)[_ROWS])


def _together(attached: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.flatten(0, 1)


_MENDED = {
    "CohereForCausalLM": _turn_adjacent_pairs,
    "Cohere2ForCausalLM": _turn_adjacent_pairs,
    "HunYuanDenseV1ForCausalLM": _norm_after_turning,
    "OPTForCausalLM": _mend_opt,
    "OpenAIGPTLMHeadModel": _hide_later_tokens,
}
_OF_ANOTHER_MODEL = _MENDED.keys() - {"OPTForCausalLM"}
