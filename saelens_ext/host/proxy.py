"""Hugging Face models that SAELens hosts as a `HookedProxyLM`, whose hooks are the paths of its modules."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int64
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from saelens_ext._modes import callers_autocast

Read = Callable[[Tensor, Any], None]


def describe_proxy(model: HookedProxyLM) -> dict[str, Any]:
    """As ``describe_model``; the class is "AutoModelForCausalLM", as SAELens records it."""
    hosted: Any = model.model
    config, rows = hosted.config, hosted.get_input_embeddings().weight[:64].detach().float()
    return {
        "model_name": config.name_or_path,
        "model_class_name": "AutoModelForCausalLM",
        "compatibility_mode": None,
        "normalization_type": None,
        "writing_weights_centered": bool((rows.mean(dim=-1).abs() < 1e-3 * rows.std(dim=-1)).all()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "n_layers": int(config.num_hidden_layers),
        "d_model": int(config.hidden_size),
    }


@torch.no_grad()
def run_proxy(
    model: HookedProxyLM, tokens: Int64[Tensor, "b l"], real: Bool[Tensor, "b l"], hooks: list[tuple[str, Read]]
) -> None:
    """Run the model on right-padded tokens until each of the hooks, all of different names, has fired."""
    waiting = {name for name, _ in hooks}

    def until_all_have_fired(name: str, read: Read) -> Read:
        def fire(activation: Tensor, hook: Any) -> None:
            read(activation, hook)
            waiting.discard(name)
            if not waiting:
                raise StopAtLayerException(activation)

        return fire

    device = next(model.parameters()).device
    fwd_hooks: list[Any] = [(name, until_all_have_fired(name, read)) for name, read in hooks]
    # The proxy's own forward drops the attention mask; its hooks fire in the model's forward too.
    with model.hooks(fwd_hooks=fwd_hooks), callers_autocast():
        try:
            model.model(input_ids=tokens.to(device), attention_mask=real.to(device, torch.int64))
        except StopAtLayerException:
            pass
