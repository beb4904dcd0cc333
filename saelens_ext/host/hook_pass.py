"""A pass through a model up to its last hook, for every host class.

The hooks of a `HookedProxyLM`, in which SAELens hosts a Hugging Face model, are the paths of its modules.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Int64
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from saelens_ext.host.hook_names import stop_layer
from saelens_ext.ops.modes import callers_autocast

Read = Callable[[Tensor, Any], None]
AnyModel = HookedTransformer | TransformerBridge | HookedProxyLM


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


def limits_of(model: AnyModel) -> tuple[int | None, int | None]:
    """The longest context and the number of token ids."""
    if isinstance(model, HookedProxyLM):
        config: Any = model.model.config
        return getattr(config, "max_position_embeddings", None), config.vocab_size
    return getattr(model.cfg, "n_ctx", None), getattr(model.cfg, "d_vocab", None)


@torch.no_grad()
def run_to_last_hook(
    model: AnyModel,
    tokens: Int64[Tensor, "b l"],
    real: Bool[Tensor, "b l"],
    hooks: list[tuple[str, Read]],
) -> None:
    """Run the model on right-padded tokens until every hook has fired, and no further than the host can stop."""
    if isinstance(model, HookedProxyLM):
        return _run_proxy(model, tokens, real, hooks)

    def stop_here(activation: Tensor, hook: Any) -> None:
        raise StopAtLayerException(activation)

    device = next(iter(model.parameters())).device
    names = [name for name, _ in hooks]
    stop = stop_layer(model, names)
    needs_logits = any(name.startswith("unembed") for name in names)
    if isinstance(model, TransformerBridge) and (stop is None or stop >= model.cfg.n_layers) and not needs_logits:
        # A bridge stops only before a block, and after the last one come the logits, the widest tensor of the pass.
        hooks, stop = [*hooks, ("unembed.hook_in", stop_here)], None
    with callers_autocast():
        model.run_with_hooks(
            tokens.to(device),
            attention_mask=real.to(device, torch.int64),
            fwd_hooks=cast(Any, hooks),
            stop_at_layer=stop,
            return_type="logits" if needs_logits else None,
        )


def _run_proxy(
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
