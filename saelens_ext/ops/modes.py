"""The same results whatever modes of torch the caller has set around a call."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

_DEVICES = ("cpu", "cuda", "xpu", "mps")
_CALLERS: ContextVar[tuple[tuple[str, torch.dtype], ...]] = ContextVar("autocast that the caller set", default=())


@contextmanager
def standard_modes(*, gradients: bool = True, model_too: bool = False) -> Iterator[None]:
    """Compute as torch does when nothing is set; a context and a decorator, not for generators.

    Inference mode is left, gradients staying off: a tensor made in it can never be changed or differentiated outside.
    New tensors are float32, and nothing is cast by autocast, which rounds sums and distances to bfloat16. Only models
    run under the caller's autocast (:func:`callers_autocast`), unless ``model_too`` is set. The default dtype is one
    for all threads; it is touched only where the caller has set another. Without ``gradients`` none are recorded.
    """
    found = _autocast()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which turns gradients on
            gradients = False
        if not gradients:
            stack.enter_context(torch.no_grad())
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        stack.enter_context(without_autocast())
        if found or (model_too and _CALLERS.get()):
            stack.callback(_CALLERS.reset, _CALLERS.set(() if model_too else found))
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtype of the tensors; a context and a decorator."""
    with ExitStack() as stack:
        for device, _ in _autocast():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def callers_autocast() -> Iterator[None]:
    """Run a model as the caller of the enclosing :func:`standard_modes` would have it run."""
    with ExitStack() as stack:
        for device, dtype in _CALLERS.get():
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the context; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def out_of_inference(module: nn.Module) -> nn.Module:
    """Replace weights that were made in inference mode, which no gradient can pass, by equal ones; in place."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in cast("list[dict[str, Any]]", [part._parameters, part._buffers]):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in copies:  # tied weights stay tied
                    copy = tensor.detach().clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    copies[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
                tensors[name] = copies[id(tensor)]
    return module


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """The devices on which autocast is on, each with its dtype."""
    return tuple((device, torch.get_autocast_dtype(device)) for device in _DEVICES if torch.is_autocast_enabled(device))
