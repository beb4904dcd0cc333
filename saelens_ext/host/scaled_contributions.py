"""Dictionaries where a bridge shows what a sublayer adds to the residual stream after a multiplier (Granite).

No module of such a model holds what is added, so the host computes it aside when its hook point has hooks, and hands
back what they make of it. It keeps that hook point for good: an SAE attached in its place is never run, and once one
was detached, neither are hooks at the point that took its place; both without a word.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.block import ScaledResidualBlockBridge

_PREPARED = "_runs_what_replaced_its_hook_points"


def run_replaced_points(model: Any) -> None:
    """Let what replaces such a hook point be run in its stead; does nothing on other models, or a second time."""
    if not isinstance(model, TransformerBridge):
        return
    for block in getattr(model, "blocks", ()):  # a few bridges have stacks of other names
        if isinstance(block, ScaledResidualBlockBridge) and _PREPARED not in vars(block):
            vars(block)[_PREPARED] = True
            names = {"hook_attn_out": block.scaled_attn_submodule, "hook_mlp_out": block.scaled_mlp_submodule}
            for name, writes in names.items():
                if writes in block.submodules and hasattr(block, name):
                    # No closure, whose modules a copy of the model would share.
                    through = partial(_through, block, name, getattr(block, name))
                    block.submodules[writes].register_forward_hook(through)


def _through(
    block: ScaledResidualBlockBridge,
    name: str,
    original: nn.Module,
    module: nn.Module,
    arguments: tuple[Any, ...],
    output: Any,
) -> Any:
    place, scale = getattr(block, name), block.residual_contribution_scale
    # The host runs the original itself; without hooks the output stays as it is, to the last bit.
    if place is original or (isinstance(place, HookPoint) and not place.has_hooks(dir="both")):
        return None
    written = output if isinstance(output, Tensor) else output[0]
    changed = place(written * scale) / scale
    return changed if isinstance(output, Tensor) else (changed, *output[1:])
