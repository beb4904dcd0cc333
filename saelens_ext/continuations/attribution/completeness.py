"""Whether a model's frozen twin is really linear: do all sources together make up the target?

For the linear backend, and for relevance rules, the target is  sum over the cut's sites <gradient, activation> + what
the biases alone give. The second part is not what is left over: it is measured, by running the frozen model with every
source at zero. So the sum fails when a pattern or a norm is not frozen after all, when a path bypasses the cut, and
when the target is read at another position than the one that predicts the token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from saelens_ext.continuations.attribution.frozen_model import traced
from saelens_ext.continuations.attribution.gradients import Passes
from saelens_ext.continuations.attribution.sites import Refusal, Site
from saelens_ext.continuations.attribution.target import Target
from saelens_ext.host.models import HostModel


@dataclass(frozen=True)
class Completeness:
    """The parts of the targets of b continuations, in units of logits, each ``(b,)`` float32."""

    target: Tensor
    prefix: Tensor
    """Of all sources at the prefix, dropped ones included."""
    continuation: Tensor
    """Of all sources at the continuation's own tokens."""
    bias: Tensor
    """Of the model's biases, measured with every source at zero."""

    @property
    def gap(self) -> Tensor:
        """What the parts miss the target by, in units of logits."""
        return self.target - self.prefix - self.continuation - self.bias

    @property
    def relative_gap(self) -> Tensor:
        """The gap as a fraction of the target or of the largest part, whichever is larger in size."""
        parts = torch.stack([self.target, self.prefix, self.continuation, self.bias]).abs()
        return self.gap.abs() / parts.amax(dim=0).clamp_min(1e-30)


def measure_completeness(
    model: HostModel,
    sites: Sequence[Site],
    dictionaries: Sequence[SAE[Any]],
    target: Target,
    prefix_ids: Sequence[int],
    token_ids: Tensor,
    backend: str = "linear",
    targeted: Tensor | None = None,
    chunks: Sequence[slice] = (),
) -> Completeness:
    """Take the targets of a few continuations apart.

    Args:
        sites: from ``plan_sites``, and ``dictionaries`` those that they name.
        prefix_ids: M tokens.
        token_ids: ``(b, T)``, -1 beyond a continuation's end.
        backend: ``"linear"`` or ``"relp"``.
        targeted: as ``chunks`` for :class:`Passes`.
    """
    with traced(model, sites, dictionaries, backend) as trace:
        passes = Passes(model, trace, target, prefix_ids, token_ids, targeted, chunks)
        found = passes.gradients(sites, biases=True)
    return Completeness(found.targets, found.prefix, found.continuation, found.bias)


def check_linear(completeness: Completeness, tolerance: float) -> None:
    """Refuse a model whose sources do not make up the target, but for a relative gap that rounding explains."""
    worst = float(completeness.relative_gap.max())
    if not worst <= tolerance:
        raise Refusal(
            "With all frozen that this backend freezes, the sources of this model make up the target only to "
            f"{worst:.1e} of its size, not to {tolerance:g}: something else in it is not linear, or a path leads "
            "around the sources."
        )


def rounding(dtype: torch.dtype, backend: str) -> float:
    """What rounding may make of a backend's sum, as a fraction of its largest part.

    In half precision the ratios of relevance rules are rounded as well. A freeze that does not hold leaves far more.
    """
    if dtype in (torch.float32, torch.float64):
        return 1e-3
    return 5e-2 if backend == "linear" else 0.25
