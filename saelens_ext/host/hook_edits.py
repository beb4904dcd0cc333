"""Functions on a model's hook points for the length of a context, and nothing else changed by it."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelens_ext.host.edit_effects import check_takes_effect
from saelens_ext.host.hook_names import output_behind
from saelens_ext.host.models import HostModel, resolve_hook
from saelens_ext.ops.modes import standard_modes

HookFunction = Callable[..., Tensor | None]
Edit = Callable[[Tensor], Tensor]

# Every context marks its hooks with a number of its own, so that it takes away those and no others. The hosts count
# their own contexts upwards from 0.
_levels = itertools.count(-1, -1)


@contextmanager
def hooked(
    model: HostModel, hooks: Sequence[tuple[str, HookFunction]], direction: Literal["fwd", "bwd"] = "fwd"
) -> Iterator[HostModel]:
    """Run functions at hook points inside the context, behind the hooks that are there already; "bwd": on gradients.

    Goes to the hook points themselves: ``TransformerBridge.hooks`` runs a function once per name of a point in
    compatibility mode, and skips a name it does not know without a word. What a function changes in the middle of a
    bridge's block is changed at the block's output as well, since the skip connection runs past the middle. Names are
    those that fire on this model, as :func:`edit_point` gives them.
    """
    level = next(_levels)
    points = {name: model.hook_dict[name] for name, _ in hooks}
    outputs: dict[str, nn.Module] = {}
    handles: list[RemovableHandle] = []
    try:
        for name, function in hooks:
            output = output_behind(model, name) if direction == "fwd" else None
            if output is not None:
                function = _Repeated(function)
                # In front of everything that is at the output, a SAE included.
                outputs[output] = model.get_submodule(output)
                handles.append(outputs[output].register_forward_pre_hook(function.repeat))
            points[name].add_hook(function, dir=direction, level=level)
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for point in points.values():
            point.remove_hooks(direction, level=level)
        lost = [name for name, point in points.items() if model.hook_dict.get(name) is not point]
        lost += [name for name, module in outputs.items() if model.get_submodule(name) is not module]
        if lost:
            warnings.warn(
                f"A SAE was attached to or detached from the model at {', '.join(lost)} inside the context of an "
                "intervention. The host replaces the hook point when it does so, and the intervention was lost with "
                "it from then on. Attach the SAE first, then enter the context.",
                stacklevel=4,
            )


class _Repeated:
    """A function in the middle of a block, and what it changed, to be added at the block's output."""

    def __init__(self, function: HookFunction):
        self._function = function
        self._change: Tensor | None = None

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor | None:
        result = self._function(x, hook=hook)
        wide = torch.promote_types(x.dtype, torch.float32)
        self._change = None if result is None else result.to(wide) - x.to(wide)
        return result

    def repeat(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        change, self._change = self._change, None
        if change is None:
            return None
        x = arguments[0]
        return ((x.to(change.dtype) + change.to(x.device)).to(x.dtype), *arguments[1:])


def edit_point(model: HostModel, hook_name: str) -> str:
    """The name that fires on this model for the hook, at which what flows on can be changed.

    In the middle of a bridge's block that takes :func:`hooked`.

    Raises:
        ValueError: unknown hook; one whose place a SAE has taken; one that a transcoder attached to the model reads
            from, since it takes its input before later hooks change it; or one at which a change has no effect, or
            only a part of it.
    """
    name = resolve_hook(model, hook_name)
    for read, sae in getattr(model, "acts_to_saes", {}).items():
        is_transcoder = sae.cfg.metadata.hook_name_out not in (None, sae.cfg.metadata.hook_name)
        if is_transcoder and resolve_hook(model, read) == name:
            raise ValueError(
                f"A transcoder attached to the model reads its input at {name}, before an intervention could change "
                "it. Detach it with model.reset_saes(), or intervene before or behind this hook."
            )
    check_takes_effect(model, name)
    return name


def edit_hook(edit: Edit, d: int, hook_name: str, positions: Sequence[int] | None = None) -> HookFunction:
    """Wrap a function of activations ``(…, d)`` in float32 or wider as a hook, at every token or at some ``positions``.

    Raises:
        ValueError: positions that are empty or negative; in the forward pass, another width or positions beyond the
            prompt.
    """
    columns = None if positions is None else _PromptColumns(positions, hook_name)

    @standard_modes()
    def run(x: Tensor, hook: Any = None) -> Tensor | None:
        chosen = None if columns is None else columns.of(x)
        if columns is not None and chosen is None:
            return None
        part = x if chosen is None else x[:, chosen]
        flat = flat_rows(part, d, hook_name)
        edited = edit(flat.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype).reshape(part.shape)
        if chosen is None:
            return edited
        result = x.clone()
        result[:, chosen] = edited
        return result

    return run


def flat_rows(x: Tensor, d: int, hook_name: str) -> Tensor:
    """View an activation as ``(…, d)``, its heads joined where it has them; ValueError for another width."""
    if x.shape[-1] == d:
        return x
    if x.ndim > 3 and x.shape[-2] * x.shape[-1] == d:
        return x.flatten(-2)
    raise ValueError(
        f"The activation at {hook_name} has shape {tuple(x.shape)}, the intervention is of width {d}. "
        "Is it meant for another hook or another model?"
    )


class _PromptColumns:
    """Which columns of a forward pass are the chosen positions of the prompt."""

    def __init__(self, positions: Sequence[int], hook_name: str):
        self._positions = sorted(set(positions))
        self._hook_name = hook_name
        self._prompt_seen = False
        if not self._positions or self._positions[0] < 0:
            raise ValueError(
                f"positions must be one or more columns of the prompt, counted from 0, got {list(positions)}. "
                "For the last of n tokens pass n - 1: in a batch or while generating, -1 is no fixed place."
            )

    def of(self, x: Tensor) -> list[int] | None:
        """The columns of this pass to change; None in a step of generation from a KV cache."""
        length = x.shape[1]
        # A hook cannot see the cache. Cached generation passes the prompt first and then single tokens.
        if length == 1 and self._prompt_seen:
            return None
        self._prompt_seen = True
        if self._positions[-1] >= length:
            reach = f"positions reach to {self._positions[-1]}"
            raise ValueError(f"{reach}, but the prompt at {self._hook_name} has {length} tokens, 0 to {length - 1}.")
        return self._positions
