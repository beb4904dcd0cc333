"""From a batch of continuations to the gradient of each one's target at every site: one forward, one backward pass.

Symbols
    M, T      tokens of the prefix; of the longest continuation of the batch
    y_t       token t of a continuation, t = 1 … T, at column M + t - 1
    c_t       its demeaned logit: logit of y_t minus the mean logit over the vocabulary, read at column M + t - 2, the
              column before its own, whose logits predict it; before a final soft cap, if the model has one, and behind
              a scale of the logits, if it has that (Granite, Cohere)
    v_t       weights over t: 1 / length (mean), 1 (sum), or 1 for the first token alone; where answers are marked, 0
              outside of a continuation's answer, whose length and first token then count
    target    sum_t v_t c_t
    u         an observable in place of c_t: a direction over the vocabulary, the same at every t; its mean is
              subtracted, so that it too weighs demeaned logits, and v_t is 1 / length
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.continuations.attribution.frozen_model import Trace, traced
from saelens_ext.continuations.attribution.sites import Refusal, Site
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import device_of, logits_of
from saelens_ext.ops.precision import wide

TARGETS = ("mean", "sum", "first")
OBSERVABLE = "observable"
"""What a result calls a target that was given as a direction over the vocabulary."""
_SCALES: WeakKeyDictionary[HostModel, float] = WeakKeyDictionary()


class Target:
    """The demeaned logits of continuations behind ``n_prefix`` tokens, as a linear function of what the unembedding
    receives; ``reduction`` is one of `TARGETS`, or u, ``(d_vocab,)``, which takes the place of the tokens' own logits.
    """

    def __init__(self, model: HostModel, n_prefix: int, reduction: str | Tensor):
        self._rows = model.W_U.detach().T
        self._bias = model.b_U.detach().float()
        # The mean over rows in pieces, since a float32 copy of a half-precision vocabulary may not fit.
        total = torch.stack([part.float().sum(dim=0) for part in self._rows.split(8192)]).sum(dim=0)
        self._mean = total / len(self._rows)
        self._bias_mean = self._bias.mean()
        self._scale = logit_scale(model)
        self._n_prefix = n_prefix
        self._reduction = reduction if isinstance(reduction, str) else "mean"
        self._observable = None if isinstance(reduction, str) else self._observed(reduction)

    def _observed(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """An observable's direction before the unembedding ``(d,)``, and what the unembedding's bias adds to it."""
        weights = weights.to(self._bias)
        weights = weights - weights.mean()
        parts = zip(self._rows.split(8192), weights.split(8192), strict=True)
        return torch.stack([part @ rows.float() for rows, part in parts]).sum(dim=0), weights @ self._bias

    def demeaned_logits(self, final: Tensor, token_ids: Tensor) -> Tensor:
        """c_t ``(b, T)`` of tokens ``(b, T)``, or the observable there, from the unembedding's input at all columns
        ``(b, M + T, d)``.

        What stands beyond a continuation's end has no meaning.
        """
        tokens = token_ids.clamp_min(0)
        first = self._n_prefix - 1
        predicting = final[:, first : first + tokens.shape[1]].float()
        if self._observable is not None:
            direction, bias = self._observable
            return self._scale * (predicting @ direction + bias)
        directions = self._rows[tokens].float() - self._mean
        return self._scale * ((predicting * directions).sum(dim=-1) + (self._bias[tokens] - self._bias_mean))

    def token_weights(self, token_ids: Tensor) -> Tensor:
        """v_t, ``(b, T)``, 0 where there is no token, -1."""
        real = (token_ids >= 0).float()
        if self._reduction == "mean":
            return real / real.sum(dim=1, keepdim=True)
        return real * (real.cumsum(dim=1) == 1) if self._reduction == "first" else real

    def __call__(self, final: Tensor, token_ids: Tensor) -> Tensor:
        """The targets ``(b,)``."""
        weights = self.token_weights(token_ids)
        logits = self.demeaned_logits(final, token_ids)
        return torch.where(weights > 0, logits * weights, 0).sum(dim=1)


def check_target(target: str | Tensor, model: HostModel) -> None:
    """Raise ValueError unless ``target`` is one of `TARGETS` or a direction over this model's vocabulary."""
    if isinstance(target, str):
        _checks.choice(target, TARGETS, "target")
        return
    size = int(model.W_U.shape[1])
    if not isinstance(target, Tensor) or target.shape != (size,):
        got = tuple(target.shape) if isinstance(target, Tensor) else repr(target)
        raise ValueError(
            f"target must be one of {', '.join(map(repr, TARGETS))} or a tensor of shape ({size},), one weight per "
            f"token of the vocabulary, got {got}."
        )
    _checks.finite(target.float(), "target")
    if bool((target == target[0]).all()):
        raise ValueError(
            f"target weighs every token by {float(target[0]):g}; its mean is subtracted, so nothing is left. Give the "
            "tokens that you ask about another weight than the rest."
        )


@torch.no_grad()
def logit_scale(model: HostModel) -> float:
    """What a model multiplies the logits of its unembedding with; 1 for most, and for those that cap them instead."""
    if model not in _SCALES:
        ids = torch.linspace(0, int(model.cfg.d_vocab) - 1, 8, device=device_of(model)).long()[:, None]
        with traced(model, [], [], "gradient") as trace, torch.no_grad():
            given = wide(logits_of(model, ids)[:, 0]).flatten()
        assert trace.final is not None
        plain = wide(trace.final[:, 0] @ model.W_U + model.b_U).flatten()
        scale = float(given @ plain / plain.square().sum().clamp_min(1e-30))
        # Neither rounding nor a cap is a scale: what it leaves over is as large as what it explains.
        is_scale = float((given - scale * plain).norm()) < 0.1 * abs(scale - 1) * float(given.norm())
        _SCALES[model] = scale if is_scale else 1.0
    return _SCALES[model]


@dataclass(frozen=True)
class BatchGradients:
    """What one batch's pass showed."""

    targets: Tensor
    """``(b,)``."""
    gradients: dict[str, Tensor]
    """Of each continuation's target at each site, ``(b, M + T, d)``, heads joined, float32."""
    activations: dict[str, Tensor]
    """The sites' activations in that pass, in the same shape."""

    def totals(self, sites: Sequence[Site], n_prefix: int) -> tuple[Tensor, Tensor]:
        """Activation times gradient over the sites of the cut: at the prefix, and behind it, each ``(b,)``."""
        cut = [site.hook for site in sites if site.in_cut]
        sums = torch.stack([(self.gradients[hook] * self.activations[hook]).sum(dim=-1) for hook in cut]).sum(dim=0)
        return sums[:, :n_prefix].sum(dim=1).cpu(), sums[:, n_prefix:].sum(dim=1).cpu()


def batch_ids(prefix_ids: Sequence[int], token_ids: Tensor, device: torch.device) -> Tensor:
    """Prefix and continuations as columns ``(b, M + T)``, padded on the right with the prefix's first token.

    The model is causal and the mask says that every column counts, so what stands in the padding changes nothing.
    """
    start = torch.tensor(prefix_ids).expand(len(token_ids), -1)
    return torch.cat([start, torch.where(token_ids >= 0, token_ids, prefix_ids[0])], dim=1).to(device)


def forward(
    model: HostModel,
    trace: Trace,
    target: Target,
    prefix_ids: Sequence[int],
    token_ids: Tensor,
    targeted: Tensor | None = None,
) -> Tensor:
    """Run a batch inside ``traced``; its targets ``(b,)``, in the graph. ValueError: the unembedding is no module.

    ``targeted``: ``token_ids`` with -1 at those that the target is not of; by default it is of all.
    """
    trace.captured.clear()
    trace.final = None
    logits_of(model, batch_ids(prefix_ids, token_ids, device_of(model)))
    if trace.final is None:
        raise ValueError(f"This {type(model).__name__} does not run its unembedding as a module, as attribution needs.")
    return target(trace.final, (token_ids if targeted is None else targeted).to(trace.final.device))


def gradients_of(
    model: HostModel,
    trace: Trace,
    sites: Sequence[Site],
    target: Target,
    prefix_ids: Sequence[int],
    token_ids: Tensor,
    targeted: Tensor | None = None,
) -> BatchGradients:
    """The gradient of each continuation's target at every site; rows of a batch do not touch one another.

    ``targeted`` as for :func:`forward`.

    Refusal: a dictionary from which no path leads to the logits.
    """
    targets = forward(model, trace, target, prefix_ids, token_ids, targeted)
    captured = [trace.captured[site.hook] for site in sites]
    found = torch.autograd.grad(targets.sum(), captured, allow_unused=True)
    gradients, activations = {}, {}
    for site, gradient, x in zip(sites, found, captured, strict=True):
        if gradient is None and site.has_dictionary:
            raise Refusal(
                f"From the dictionary at {site.hook} no path that this backend keeps leads to the logits: what it "
                "feeds is frozen, or the hook only shows what is computed elsewhere."
            )
        gradients[site.hook] = _joined(torch.zeros_like(x) if gradient is None else gradient)
        activations[site.hook] = _joined(x.detach())
    trace.captured.clear()
    return BatchGradients(targets.detach(), gradients, activations)


def _joined(x: Tensor) -> Tensor:
    return (x.flatten(2) if x.ndim > 3 else x).float()
