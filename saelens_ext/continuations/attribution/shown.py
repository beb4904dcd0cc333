"""Whether a model lets itself be frozen as a backend needs it: tried out on the model, before anything relies on it.

A hook may only show what is computed elsewhere, so that an edit there changes nothing; and a host may compute a norm
anew, and differently, when its scale is set. So every hook that is to be frozen is edited by a variable of value zero,
and must hand its gradient on; and a short prompt is taken apart whole, whose frozen target must be the model's own and
the sum of its sources.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from saelens_ext.continuations.attribution.completeness import check_linear, measure_completeness, rounding
from saelens_ext.continuations.attribution.frozen_model import traced
from saelens_ext.continuations.attribution.gradients import Passes
from saelens_ext.continuations.attribution.sites import Refusal, base_sites, points_ending
from saelens_ext.continuations.attribution.target import Target
from saelens_ext.host.hook_edits import HookFunction, hooked
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import is_resumable
from saelens_ext.ops.memory import lacks_memory

logger = logging.getLogger(__name__)

_PREFIX, _CONTINUATION, _ROWS = 4, 3, 3
# By model, then by backend and by what else changes the answer: why the backend is refused, or None.
_FAULTS: WeakKeyDictionary[HostModel, dict[tuple[Any, ...], str | None]] = WeakKeyDictionary()


def check_backend(model: HostModel, backend: str) -> None:
    """Refuse a backend whose freezes do not hold on this model, naming them; tried once for each model."""
    key = _key(model, backend)
    known = _FAULTS.setdefault(model, {})
    if key not in known:
        known[key] = _fault(model, backend)
    if known[key] is not None:
        raise Refusal(known[key])


def _key(model: HostModel, backend: str) -> tuple[Any, ...]:
    hooks = sum(len(point.fwd_hooks) for point in model.hook_dict.values() if hasattr(point, "fwd_hooks"))
    return backend, bool(getattr(model, "compatibility_mode", False)), next(iter(model.parameters())).dtype, hooks


def runs_in_chunks(model: HostModel, backend: str) -> bool:
    """Whether a continuation's gradients can be found chunk by chunk: tried on a short prompt, once for each model."""
    if not is_resumable(model):
        return False
    key = ("chunks", *_key(model, backend))
    known = _FAULTS.setdefault(model, {})
    if key not in known:
        known[key] = _chunk_fault(model, backend)
        if known[key] is not None:
            logger.warning("Long continuations are attributed in one piece on this model: %s", known[key])
    return known[key] is None


def _chunk_fault(model: HostModel, backend: str) -> str | None:
    sites = base_sites(model, backend)
    target, prefix, ids = _prompt(model)
    chunks = [slice(0, 3), slice(3, 5), slice(5, len(prefix) + ids.shape[1])]
    try:
        with traced(model, sites, [], backend) as trace:
            whole, cut = (Passes(model, trace, target, prefix, ids, None, c).gradients(sites) for c in ([], chunks))
    except (AttributeError, TypeError, RuntimeError, NotImplementedError, ValueError, IndexError) as error:
        if lacks_memory(error):  # which says nothing of the model
            raise
        return f"its keys and values cannot be kept from chunk to chunk ({type(error).__name__}: {error})."
    tolerance = rounding(next(iter(model.parameters())).dtype, "relp")
    pairs = [(whole.targets, cut.targets), *((whole.gradients[hook], cut.gradients[hook]) for hook in whole.gradients)]
    worst = max(float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs)
    return None if worst <= tolerance else f"chunks of it give gradients that differ by {worst:.1e} of their size."


def _fault(model: HostModel, backend: str) -> str | None:
    try:
        silent = [] if backend == "gradient" else _without_effect(model)
    except Refusal as refusal:
        return str(refusal)
    patterns = [name for name in silent if name.endswith("hook_pattern")]
    if patterns:
        return (
            f"It must freeze every attention pattern, and on this model {_named(patterns)} cannot be frozen: the "
            "block has no pattern there, or the hook only shows it."
        )
    try:
        _take_apart(model, backend)
    except Refusal as refusal:
        return f"{refusal} Editing {_named(silent)} has no effect." if silent else str(refusal)
    return None


def _without_effect(model: HostModel) -> list[str]:
    """Hooks to be frozen at which an edit changes nothing, and patterns that do not show."""
    zeros: dict[str, Tensor] = {}

    def add(name: str) -> HookFunction:
        def run(x: Tensor, hook: Any = None) -> Tensor:
            zeros[name] = torch.zeros_like(x).requires_grad_()
            return x + zeros[name]

        return run

    patterns = points_ending(model, "hook_pattern")
    hooks = [(name, add(name)) for name in [*points_ending(model, "hook_scale"), *patterns]]
    target, prefix, ids = _prompt(model)
    with _host_errors("attention patterns and norm scales are edited"), traced(model, [], [], "gradient") as trace:
        with hooked(model, hooks):
            reached = Passes(model, trace, target, prefix, ids).forward().sum()
    gradients = torch.autograd.grad(reached, list(zeros.values()), allow_unused=True) if reached.requires_grad else ()
    dead = [name for name, gradient in zip_longest(zeros, gradients) if gradient is None]
    shown = {name.split(".attn")[0] for name in zeros if name in patterns}
    blocks = [f"blocks.{layer}" for layer in range(int(model.cfg.n_layers))]
    return dead + [f"{block}.attn.hook_pattern" for block in blocks if block not in shown]


def _take_apart(model: HostModel, backend: str) -> None:
    """A short prompt's targets under the backend: the model's own, and the sum of their sources."""
    sites = base_sites(model, backend)
    target, prefix, ids = _prompt(model)
    with traced(model, [], [], "gradient") as trace, torch.no_grad():
        own = Passes(model, trace, target, prefix, ids).forward().float().cpu()
    with _host_errors("what this backend freezes is set"):
        if backend == "gradient":
            with traced(model, sites, [], backend) as trace:
                batch = Passes(model, trace, target, prefix, ids).gradients(sites)
            live = sites[0].hook
            if not bool(batch.gradients[live].any()):
                raise Refusal(f"An edit at {live} does not change what this model predicts: it has no gradient there.")
            return
        parts = measure_completeness(model, sites, [], target, prefix, ids, backend)
    # In half precision a norm whose scale is set is rounded otherwise, and what follows from that adds up over layers.
    tolerance = rounding(next(iter(model.parameters())).dtype, "relp")
    largest = torch.stack([own, parts.prefix, parts.continuation, parts.bias]).abs().amax(dim=0)
    moved = float((parts.target - own).norm() / largest.norm().clamp_min(1e-30))
    if not moved <= tolerance:
        raise Refusal(
            f"Setting attention patterns and norm scales to the values that they have changes what this model "
            f"predicts, by {moved:.1e} of its size: the host computes a norm differently where its scale is set."
        )
    check_linear(parts, tolerance)


def _prompt(model: HostModel) -> tuple[Target, list[int], Tensor]:
    """Tokens from all over the vocabulary."""
    ids = torch.linspace(0, int(model.cfg.d_vocab) - 1, _PREFIX + _ROWS * _CONTINUATION).long()
    return Target(model, "sum"), ids[:_PREFIX].tolist(), ids[_PREFIX:].reshape(_ROWS, _CONTINUATION)


@contextmanager
def _host_errors(when: str) -> Iterator[None]:
    """A host that fails when a hook is edited does not let it be frozen."""
    try:
        yield
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        if lacks_memory(error):
            raise
        raise Refusal(f"The host fails when {when}: {type(error).__name__}: {error}.") from error


def _named(hooks: list[str]) -> str:
    return ", ".join(hooks[:3]) + (f" and {len(hooks) - 3} more" if len(hooks) > 3 else "")
