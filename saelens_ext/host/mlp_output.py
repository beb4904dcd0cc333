"""What directions over an MLP's neurons become in the residual stream.

Symbols
    z      a direction over neurons, ``(d_mlp,)``: what is added to the activations that enter the output matrix
    W_out  the MLP's output matrix, ``(d_mlp, d_model)``;  b_out its bias
    v      z W_out, the change of the MLP's output that adding z makes
    s      what some models multiply the MLP's output with before they add it (Granite's residual multiplier), else 1
    w      gains of the norm that some models apply to the MLP's output (Gemma 2 and 3, OLMo 2), ``(d_model,)``
    rms    root of the mean square over d_model
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from sae_lens import SAE
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from saelens_ext import _checks
from saelens_ext.host.edit_effects import without_hooks
from saelens_ext.host.flat_sae import check_dictionary
from saelens_ext.host.hook_edits import hooked
from saelens_ext.host.hook_names import hook_layer, locate
from saelens_ext.host.models import HostModel, check_model, resolve_hook
from saelens_ext.host.prompt_passes import device_of, logits_of
from saelens_ext.ops.modes import evaluating, out_of_inference, standard_modes
from saelens_ext.ops.precision import wide

_SCALES: WeakKeyDictionary[nn.Module, dict[tuple[int, bool], float]] = WeakKeyDictionary()


@standard_modes(gradients=False)
def residual_directions(
    model: HostModel, features: SAE[Any] | Tensor, *, hook_name: str | None = None, layer: int | None = None
) -> Tensor:
    """Map directions over an MLP's neurons to what they write into the residual stream.

    Without a norm behind the MLP this is ``s * z @ W_out``: adding ``a z`` to the neurons adds exactly ``a`` times the
    result to the residual stream, whatever else the neurons do. The bias ``b_out`` is no part of a direction.

    With a norm (RMS norm) behind the MLP it is ``s * w * v / rms(v)``: what the MLP would write if z alone were active,
    at any strength; -z gives exactly the opposite. What adding z to other activations writes depends on them, since the
    norm divides by the size of all of it: a small change v of an output m writes ``w * (v - m <m, v> / |m|^2) /
    rms(m)``, the same direction but for the part of v along m. The lengths of the results say nothing about the
    features.

    Args:
        model: any TransformerLens model; a bridge in compatibility mode or not.
        features: ``(k, d_mlp)``, or a dictionary at a neuron hook, whose ``W_dec`` is taken.
        hook_name: the neurons' hook, any alias of ``blocks.L.mlp.hook_post``; by default the dictionary's own.
        layer: the block, from 0, instead of ``hook_name``.

    Returns:
        ``(k, d_model)``, in float32 or wider, on the device of ``W_out``. A zero feature gives a zero row.

    Raises:
        ValueError: a hook that is not one of MLP neurons, no hook or no such layer, an MLP without an output matrix (a
            mixture of experts) or with more behind it than a norm and a scale, features of another width or not finite.

    Examples:
        >>> sx.residual_directions(model, torch.eye(model.cfg.d_mlp)[:5], layer=1).shape == (5, model.cfg.d_model)
        True

    Source: arXiv 2506.10920, f = W_out z; its code adds b_out before the norm of Gemma, where it is zero.
    """
    check_model(model, proxy=False)
    if not isinstance(features, Tensor):
        check_dictionary(features, "features")
    rows = features.W_dec if isinstance(features, SAE) else features
    layer = _layer_of(model, features, hook_name, layer)
    weights = _output_weights(model, layer)
    if rows.ndim != 2 or rows.shape[1] != len(weights):
        raise ValueError(f"features must have shape (k, {len(weights)}), a column per neuron, got {tuple(rows.shape)}.")
    dtype = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)
    written = _checks.finite(rows, "features").to(weights.device, dtype) @ weights.to(dtype)
    norm = _norm_behind(model, layer)
    return _scale_behind(model, layer, weights, norm) * (written if norm is None else _normalised(norm, written))


# --- where the neurons are ---


def _layer_of(model: HostModel, features: SAE[Any] | Tensor, hook_name: str | None, layer: int | None) -> int:
    if hook_name is not None and layer is not None:
        raise ValueError(f"Give hook_name or layer, not both; got {hook_name!r} and {layer}.")
    n_layers = model.cfg.n_layers
    if layer is not None:
        if not 0 <= layer < n_layers:
            raise ValueError(f"layer must be one of 0 to {n_layers - 1}, got {layer}.")
        return int(layer)
    if hook_name is None and isinstance(features, SAE):
        hook_name = features.cfg.metadata.hook_name_out or features.cfg.metadata.hook_name
    if hook_name is None:
        raise ValueError("Nothing says whose neurons these are: pass layer=, or hook_name= ('blocks.3.mlp.hook_post').")
    name, found = locate(model, hook_name)[0], hook_layer(model, hook_name)
    neurons = None if found is None else _neuron_hook(model, found)
    if found is None or name != neurons:
        where = f"those of block {found if neurons else 'L'} are at {neurons or 'blocks.L.mlp.hook_post'!r}"
        raise ValueError(
            f"The hook {hook_name!r} is not one of MLP neurons, which alone go through the MLP's output matrix; on "
            f"this model {where}. A direction at any other hook of the residual stream's width is one already; for a "
            "dictionary over the neurons of a block, pass layer=."
        )
    return found


def _neuron_hook(model: HostModel, layer: int) -> str | None:
    """The hook in front of the output matrix, under the name that fires on this model."""
    try:
        return locate(model, f"blocks.{layer}.mlp.hook_post")[0]
    except ValueError:
        return None


def output_weights(model: HostModel, hook_name: str) -> Tensor | None:
    """``W_out`` as ``(d_mlp, d_model)`` where the hook is that of an MLP's neurons, else None.

    Raises:
        ValueError: no such hook, or neurons without a single output matrix.
    """
    layer = hook_layer(model, hook_name)
    if layer is None or locate(model, hook_name)[0] != _neuron_hook(model, layer):
        return None
    return _output_weights(model, layer)


def _output_weights(model: HostModel, layer: int) -> Tensor:
    """``W_out`` as ``(d_mlp, d_model)``."""
    mlp = getattr(model.blocks[layer], "mlp", None)
    try:
        weights = getattr(mlp, "W_out", None)
    except AttributeError:  # a bridge's property, on an MLP without such a part
        weights = None
    if not isinstance(weights, Tensor) or weights.ndim != 2 or weights.shape[1] != model.cfg.d_model:
        raise ValueError(
            f"The MLP of block {layer} ({type(mlp).__name__}) has no single output matrix over its neurons, as a "
            "mixture of experts or quantised weights have none, so its neurons have no direction in the residual "
            "stream."
        )
    return weights.detach()


# --- the norm behind the MLP ---


def _norm_behind(model: HostModel, layer: int) -> nn.Module | None:
    """The norm between the MLP and the residual stream; None for most models."""
    block: Any = model.blocks[layer]
    if isinstance(model, HookedTransformer):
        if model.cfg.use_normalization_before_and_after:
            return block.ln2_post
        return block.ln2 if model.cfg.original_architecture in POST_NORM_ARCHITECTURES else None
    # A bridge's block says itself where the MLP's contribution can be read: behind that norm, if there is one.
    name = str(block.hook_aliases.get("hook_mlp_out", "")).split(".")[0]
    return getattr(block, name) if name.startswith("ln") else None


def _normalised(norm: Any, written: Tensor) -> Tensor:
    """``w * v / rms(v)``, rows of zeros left as they are."""
    rms = written.square().mean(dim=1, keepdim=True).sqrt()
    units = torch.where(rms > 0, written / rms, 0.0)
    if hasattr(norm, "original_component"):
        # The Hugging Face module knows how its gains are stored, as 1 + w in some models; and no hook runs.
        return norm.original_component(units).to(written.dtype)
    return units * norm.w.detach().to(written)


# --- the scale behind both ---


def _scale_behind(model: HostModel, layer: int, weights: Tensor, norm: nn.Module | None) -> float:
    """s, found by trying it out on the model, once for each block."""
    declared = float(getattr(model.blocks[layer], "residual_contribution_scale", 1.0))
    known = _SCALES.setdefault(model, {})
    key = (layer, bool(getattr(model, "compatibility_mode", False)))
    if key not in known:
        if getattr(model, "acts_to_saes", None):
            return declared  # the answer would be that of the attached SAEs
        known[key] = _measured_scale(model, layer, None if norm is not None else weights, declared)
    return known[key]


@standard_modes(model_too=True)
def _measured_scale(model: HostModel, layer: int, weights: Tensor | None, declared: float) -> float:
    """How many times what the output matrix (or, with none given, the norm behind it) writes reaches the stream."""
    start = resolve_hook(model, f"blocks.{layer}." + ("hook_mlp_out" if weights is None else "mlp.hook_post"))
    end = resolve_hook(model, f"blocks.{layer}.hook_resid_post")
    seen: dict[str, Tensor] = {}

    def begin(x: Tensor, hook: Any = None) -> Tensor:
        seen["start"] = x.detach().requires_grad_()
        return seen["start"]

    hooks = [(start, begin), (end, lambda x, hook=None: seen.update(end=x))]
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device_of(model))
    out_of_inference(model)
    with evaluating(model), without_hooks(model), hooked(model, hooks), torch.enable_grad():
        logits_of(model, ids)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(seen["end"].shape, generator=generator).to(seen["end"])
        (found,) = torch.autograd.grad(seen["end"], seen["start"], probe)
    expected = wide(probe if weights is None else probe.to(weights) @ weights.T).flatten()
    measured = wide(found).flatten()
    scale = float(measured @ expected / expected.square().sum())
    exact = found.dtype in (torch.float32, torch.float64)
    rounding = 1e-3 if exact else 5e-2
    if float((measured - scale * expected).norm()) > rounding * float(measured.norm()):
        if weights is None:
            return declared
        raise ValueError(
            f"Behind the output matrix of the MLP of block {layer} lies more than a norm and a scale, so what its "
            "neurons write into the residual stream is no fixed direction."
        )
    return declared if abs(scale - declared) <= (1e-5 if exact else rounding) * abs(declared) else scale
