"""Forward passes whose gradients are those of another, simpler model with the same activations.

The rules, by backend:

``"linear"``    attention patterns and norm scales are constants and MLP outputs are given vectors, so that the logits
    are linear in what is left: the local replacement model of arXiv 2503.20802 ("Circuit Tracing").
``"gradient"``  nothing is changed: the real model above the hook.
``"relp"``      attention patterns and norm scales are constants (arXiv 2202.07304); an activation function f(z) is
    z times the constant f(z) / z (identity rule); of a gated product f(z) u each factor gets half the gradient (half
    rule, arXiv 2406.07592). Together these are the rules of arXiv 2508.21258 (RelP). Relevance is conserved up to
    biases.

Symbols
    b, L, d   batch, tokens, width
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saelens_ext.continuations.attribution.sites import Refusal, Site, points_ending
from saelens_ext.host.hook_edits import HookFunction, hooked
from saelens_ext.host.models import HostModel, resolve_hook
from saelens_ext.host.prompt_passes import device_of
from saelens_ext.ops.modes import evaluating

_ON_THE_BLOCK = re.compile(r"blocks\.\d+\.hook_(attn|mlp)_out$")


class Trace:
    """What one forward pass left behind."""

    def __init__(self) -> None:
        self.captured: dict[str, Tensor] = {}
        """The activation at each site, as it stands in the graph."""
        self.final: Tensor | None = None
        """What the unembedding received, ``(b, L, d)``."""
        self.live: dict[str, Tensor] = {}
        """Inputs of skip transcoders and pre-activations of MLPs."""
        self.frozen: dict[str, Any] = {}
        """Frozen values, kept when ``recording`` and used again when ``at_zero``."""
        self.recording = False
        self.at_zero = False
        """Whether every leaf is replaced by zero, so that only biases are left."""

    def forget(self) -> None:
        """Let go of the last pass and its graph; what was frozen stays."""
        self.captured.clear()
        self.live.clear()
        self.final = None


@contextmanager
def traced(model: HostModel, sites: Sequence[Site], dictionaries: Sequence[SAE[Any]], backend: str) -> Iterator[Trace]:
    """Let forward passes inside the context build the graph of a backend.

    Parameters need no gradient inside, modules are in evaluation mode, and the logits of the first token alone are
    computed; afterwards the model is as before.

    Raises:
        Refusal: an MLP whose activation function cannot be found, for ``"relp"``.
    """
    trace = Trace()
    hooks: list[tuple[str, HookFunction]] = []
    if backend != "gradient":
        names = [*points_ending(model, "hook_scale"), *points_ending(model, "hook_pattern")]
        hooks += [(name, _freeze(trace, name)) for name in names]
    if backend == "relp":
        hooks += _linear_mlps(model, trace)
    for site in sites:
        hooks += _site_hooks(model, trace, site, dictionaries, backend)
    with ExitStack() as stack:
        # A bridge says whenever a norm's scale is set that its rounding may change; here that is the point.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        stack.enter_context(_still(model))
        stack.enter_context(hooked(model, hooks))
        stack.enter_context(_routed(model, sites))
        handle = model.unembed.register_forward_pre_hook(_keep_final(trace))
        stack.callback(handle.remove)
        yield trace


@contextmanager
def _routed(model: HostModel, sites: Sequence[Site]) -> Iterator[None]:
    """Let gradients run through hook points that the host leaves out of the graph while their values stay the same.

    A bridge's block that scales what a sublayer writes (Granite) puts the hooked activation in the place of its own
    only where it was changed, or where a backward hook is to see its gradient.
    """
    is_bridge = isinstance(model, TransformerBridge)
    names = [site.hook for site in sites if is_bridge and _ON_THE_BLOCK.match(site.hook)]
    with hooked(model, [(name, lambda gradient, hook=None: None) for name in names], "bwd"):
        yield


@contextmanager
def _still(model: HostModel) -> Iterator[None]:
    """Evaluation mode, gradients on, none for parameters, full precision; afterwards everything as it was."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    full_precision = torch.autocast(device_of(model).type, enabled=False)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad(), full_precision:
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _keep_final(trace: Trace) -> Any:
    def run(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        trace.final = arguments[0]
        # The logits are not used; one token's are enough to keep the host content.
        return (arguments[0][:, :1], *arguments[1:])

    return run


def _freeze(trace: Trace, name: str) -> HookFunction:
    def run(x: Tensor, hook: Any = None) -> Tensor:
        if trace.at_zero:
            return trace.frozen[name]
        if trace.recording:
            trace.frozen[name] = x.detach()
        return x.detach()

    return run


def _site_hooks(
    model: HostModel, trace: Trace, site: Site, dictionaries: Sequence[SAE[Any]], backend: str
) -> list[tuple[str, HookFunction]]:
    skip = getattr(dictionaries[site.dictionary], "W_skip", None) if site.has_dictionary else None
    if site.leaf and skip is not None and backend == "linear":
        return [(site.read, _keep_live(trace, site.read)), (site.hook, _leaf_with_skip(trace, site, skip))]
    if site.leaf:
        return [(site.hook, _leaf(trace, site.hook))]
    converts = getattr(model.hook_dict[site.hook], "hook_conversion", None) is not None
    return [(site.hook, _capture(trace, site.hook, converts))]


def _leaf(trace: Trace, name: str) -> HookFunction:
    def run(x: Tensor, hook: Any = None) -> Tensor:
        trace.captured[name] = _start(x, trace)
        return trace.captured[name]

    return run


def _leaf_with_skip(trace: Trace, site: Site, skip: Tensor) -> HookFunction:
    """The skip connection is linear, so what it carries still comes from further below."""

    def run(x: Tensor, hook: Any = None) -> Tensor:
        through = trace.live[site.read] @ skip.detach().T.to(x)
        trace.captured[site.hook] = _start(x - through, trace)
        return trace.captured[site.hook] + through

    return run


def _start(x: Tensor, trace: Trace) -> Tensor:
    return torch.zeros_like(x) if trace.at_zero else x.detach().requires_grad_()


def _capture(trace: Trace, name: str, converts: bool) -> HookFunction:
    def run(x: Tensor, hook: Any = None) -> Tensor | None:
        started = not x.requires_grad and not trace.at_zero
        trace.captured[name] = x.detach().requires_grad_() if started else x
        # Where the point converts its activation, what it was given is no part of the graph unless it is handed back.
        return trace.captured[name] if started or converts else None

    return run


def _keep_live(trace: Trace, name: str) -> HookFunction:
    def run(x: Tensor, hook: Any = None) -> None:
        trace.live[name] = x

    return run


# --- relevance rules inside MLPs ---


def _linear_mlps(model: HostModel, trace: Trace) -> list[tuple[str, HookFunction]]:
    hooks: list[tuple[str, HookFunction]] = []
    for layer in range(int(model.cfg.n_layers)):
        try:
            pre, post = (resolve_hook(model, f"blocks.{layer}.mlp.{end}") for end in ("hook_pre", "hook_post"))
        except ValueError as error:
            raise Refusal(
                f"Relevance rules need the neurons of every MLP before and after its activation function, and those "
                f"of block {layer} cannot be found: {error}"
            ) from error
        try:
            linear = resolve_hook(model, f"blocks.{layer}.mlp.hook_pre_linear")
        except ValueError:
            linear = pre
        hooks += [(name, _keep_live(trace, name)) for name in dict.fromkeys((pre, linear))]
        hooks.append((post, _linear_in(trace, post, list(dict.fromkeys((pre, linear))))))
    return hooks


def _linear_in(trace: Trace, post: str, factors: list[str]) -> HookFunction:
    """The same neurons, as a linear function of each factor alone, weighted equally."""

    def run(x: Tensor, hook: Any = None) -> Tensor:
        live = [trace.live[name] for name in factors]
        if not trace.at_zero:
            value, fixed = x.detach(), [factor.detach() for factor in live]
            ratios = [torch.where(f == 0, 0, value / torch.where(f == 0, 1, f)) for f in fixed]
            # The values stay exactly those of the model.
            constant = value - _mean_product(fixed, ratios)
            if trace.recording:
                trace.frozen[post] = (ratios, constant)
        else:
            ratios, constant = trace.frozen[post]
        return _mean_product(live, ratios) + constant

    return run


def _mean_product(factors: list[Tensor], ratios: list[Tensor]) -> Tensor:
    return torch.stack([factor * ratio for factor, ratio in zip(factors, ratios, strict=True)]).mean(dim=0)
