"""Whether a change at a hook point of a bridge takes effect, tested on the model itself.

A `HookedTransformer` computes from what its hook points give back. A bridge runs the Hugging Face model's own code, so
that some of its hook points only show what is computed elsewhere, others lie on a branch of the residual stream, and
some never fire. Each is tested once, by passes over a few tokens in which no other hooks run.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from saelens_ext.host.hook_names import ATTACHED, locate, output_behind
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import device_of
from saelens_ext.ops.modes import evaluating, standard_modes

# Hook points at which a change was seen to take effect; an attached SAE brings points of its own.
_effective: WeakSet[nn.Module] = WeakSet()
_N_TOKENS = 4
_LEVEL = 2**31  # of our own hooks, by which they are removed; the hosts count contexts from 0, and hook_edits from -1


def check_takes_effect(model: HostModel, name: str) -> None:
    """Check that a change at a hook is a change of the model, and in the middle of a block that it can be made whole.

    Raises:
        ValueError: the hook does not fire, or only shows what is computed elsewhere, or shows the residual stream on a
            branch; or the middle of a block whose output is not what stands there plus what the MLP adds.
    """
    if not isinstance(model, TransformerBridge):
        if name.endswith(".mlp.hook_in") and model.cfg.original_architecture in POST_NORM_ARCHITECTURES:
            raise _on_a_branch(name, name.replace("mlp.hook_in", "hook_resid_mid"))
        return
    if model.hook_dict[name] in _effective:
        return
    if output_behind(model, name) is not None:
        _check_middle(model, name)
    elif ".hook_sae_" in name:
        # What an attached SAE computes is the host's own code, in either class.
        _check_attached(model, name)
    else:
        _check_point(model, name)
    _effective.add(model.hook_dict[name])


def _check_point(model: TransformerBridge, name: str) -> None:
    stream = re.sub(r"^(blocks\.\d+)\..*", r"\1.hook_in", name)
    seen: dict[str, Tensor] = {}
    watched = {place for place in (name, stream) if isinstance(model.hook_dict.get(place), HookPoint)}
    before = _short_pass(model, {place: partial(seen.__setitem__, place) for place in watched})
    if name not in seen:
        raise ValueError(f"The hook {name!r} does not fire in a forward pass of this model, so nothing can act there.")
    # Where a model is split over devices, a block is handed the stream from another.
    if name != stream and stream in seen and torch.equal(seen[name], seen[stream].to(seen[name].device)):
        raise _on_a_branch(name, stream)
    if torch.equal(_short_pass(model, {name: _disturbed}), before):
        raise ValueError(
            f"On this {type(model).__name__} the hook {name!r} only shows what is computed elsewhere: a change there "
            "changes nothing. Act at another hook, or load the model as a HookedTransformer "
            "(model_class='HookedSAETransformer')."
        )


def _on_a_branch(name: str, stream: str) -> ValueError:
    return ValueError(
        f"At {name!r} the residual stream is on a branch: a change there would not reach what flows past it. Act at "
        f"{stream!r}."
    )


def _check_attached(model: TransformerBridge, name: str) -> None:
    base = name.partition(".hook_sae_")[0]
    if output_behind(model, base) is not None:
        raise ValueError(
            f"A SAE is attached in the middle of a block, at {base}, where a bridge passes what it gives to the MLP "
            f"alone: a change at {name!r} would not reach what flows past it. Detach the SAE with model.reset_saes() "
            "and use scale_latent or clamp_latent, or load the model as a HookedTransformer."
        )


def _check_middle(model: TransformerBridge, name: str) -> None:
    """Check that a block gives what stands in its middle plus what its MLP adds, and takes no notice of a change."""
    point, block, output = name.removesuffix(f".{ATTACHED}"), name[: name.index(".", 7)], output_behind(model, name)
    assert output is not None  # the caller found one
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen[places[module]] = arguments[0]

    # Of a place that an attached SAE has taken, hook_dict holds the SAE's own points alone.
    places = {model.get_submodule(place): place for place in (point, output)}
    handles = [module.register_forward_pre_hook(note) for module in places]
    try:
        written, attached = locate(model, f"{block}.hook_mlp_out")
        _short_pass(model, {f"{written}.{ATTACHED}" if attached else written: torch.zeros_like, name: _disturbed})
        exact = len(seen) == 2 and torch.allclose(seen[point], seen[output], rtol=1e-3, atol=1e-5)
    except ValueError:  # no place where the MLP's contribution could be taken away
        exact = False
    finally:
        for handle in handles:
            handle.remove()
    if not exact:
        raise ValueError(
            f"On this {type(model).__name__} the middle of a block can be read (at {name}) but not changed: the block "
            f"does not give what stands there plus what its MLP adds. Act at {block}.hook_in or {output}."
        )


@standard_modes(model_too=True)
@torch.no_grad()
def _short_pass(model: TransformerBridge, functions: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Tensor:
    """Logits of a few tokens, with functions at hook points and no hooks but permanent ones beside them."""
    ids = (torch.arange(_N_TOKENS, device=device_of(model))[None] + _N_TOKENS) % model.cfg.d_vocab
    points = model.hook_dict
    with evaluating(model), without_hooks(model, keep_permanent=True), warnings.catch_warnings():
        # A bridge says whenever a norm's scale is set that its rounding may change.
        warnings.simplefilter("ignore")
        try:
            for name, function in functions.items():
                act: Any = lambda x, hook=None, function=function: function(x)  # noqa: E731
                points[name].add_hook(act, level=_LEVEL)
            # Not through the model's call, so that hooks on the model itself do not see these tokens.
            return model.forward(ids, return_type="logits", attention_mask=torch.ones_like(ids))
        finally:
            for name in functions:
                points[name].remove_hooks("fwd", level=_LEVEL)


@contextmanager
def without_hooks(module: nn.Module, *, keep_permanent: bool = False) -> Iterator[None]:
    """Keep the hooks of a module's hook points from running inside the context.

    Permanent hooks, by which the hosts attach transcoders, run with ``keep_permanent``.
    """
    points = [part for part in module.modules() if isinstance(part, HookPoint)]
    kept = [point._forward_hooks for point in points]
    try:
        for point, hooks in zip(points, kept, strict=True):
            permanent = {handle.hook.id for handle in point.fwd_hooks if handle.is_permanent and keep_permanent}
            point._forward_hooks = type(hooks)((key, hook) for key, hook in hooks.items() if key in permanent)
        yield
    finally:
        for point, hooks in zip(points, kept, strict=True):
            point._forward_hooks = hooks


def _disturbed(x: Tensor) -> Tensor:
    """Activations with noise of about their own size."""
    if not x.is_floating_point():
        return x
    finite = x[x.isfinite()].float()
    size = 1 + (finite.square().mean().sqrt() if len(finite) else 0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x + (size * noise.to(x.device)).to(x.dtype)
