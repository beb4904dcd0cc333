"""What is attributed: a continuation's target, a linear function of what the unembedding receives.

Symbols
    M, T      tokens of the prefix; of the longest continuation of a batch
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

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.continuations.attribution.frozen_model import traced
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import device_of, logits_of
from saelens_ext.ops.precision import wide

TARGETS = ("mean", "sum", "first")
OBSERVABLE = "observable"
"""What a result calls a target that was given as a direction over the vocabulary."""
_SCALES: WeakKeyDictionary[HostModel, float] = WeakKeyDictionary()


class Target:
    """The demeaned logits of continuations, as a linear function of what the unembedding receives; ``reduction`` is
    one of `TARGETS`, or u, ``(d_vocab,)``, which takes the place of the tokens' own logits.
    """

    def __init__(self, model: HostModel, reduction: str | Tensor):
        self._rows = model.W_U.detach().T
        self._bias = model.b_U.detach().float().to(self._rows.device)
        # The mean over rows in pieces, since a float32 copy of a half-precision vocabulary may not fit.
        total = torch.stack([part.float().sum(dim=0) for part in self._rows.split(8192)]).sum(dim=0)
        self._mean = total / len(self._rows)
        self._bias_mean = self._bias.mean()
        self._scale = logit_scale(model)
        self._reduction = reduction if isinstance(reduction, str) else "mean"
        self._observable = None if isinstance(reduction, str) else self._observed(reduction)

    def _observed(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """An observable's direction before the unembedding ``(d,)``, and what the unembedding's bias adds to it."""
        weights = weights.to(self._bias)
        weights = weights - weights.mean()
        parts = zip(self._rows.split(8192), weights.split(8192), strict=True)
        return torch.stack([part @ rows.float() for rows, part in parts]).sum(dim=0), weights @ self._bias

    def demeaned_logits(self, predicting: Tensor, token_ids: Tensor) -> Tensor:
        """c_t ``(b, T)`` of tokens ``(b, T)``, or the observable there, from what the unembedding receives at the
        columns that predict them ``(b, T, d)``.

        What stands beyond a continuation's end has no meaning.
        """
        # In a model that is spread over devices the unembedding may lie on another than what comes before.
        here, place = predicting.device, self._rows.device
        tokens, predicting = token_ids.clamp_min(0).to(place), predicting.float().to(place)
        if self._observable is not None:
            direction, bias = self._observable
            return (self._scale * (predicting @ direction + bias)).to(here)
        directions = self._rows[tokens].float() - self._mean
        found = (predicting * directions).sum(dim=-1) + (self._bias[tokens] - self._bias_mean)
        return (self._scale * found).to(here)

    def token_weights(self, token_ids: Tensor) -> Tensor:
        """v_t, ``(b, T)``, 0 where there is no token, -1."""
        real = (token_ids >= 0).float()
        if self._reduction == "mean":
            return real / real.sum(dim=1, keepdim=True)
        return real * (real.cumsum(dim=1) == 1) if self._reduction == "first" else real

    def __call__(self, predicting: Tensor, token_ids: Tensor, weights: Tensor | None = None) -> Tensor:
        """The targets ``(b,)``; or of a part of the columns, with their v_t as ``weights``, their share of them."""
        weights = self.token_weights(token_ids) if weights is None else weights
        logits = self.demeaned_logits(predicting, token_ids)
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
            given = wide(logits_of(model, ids)[:, 0]).flatten().cpu()
        assert trace.final is not None
        weights, bias = model.W_U, model.b_U
        plain = wide(trace.final[:, 0].to(weights.device) @ weights + bias.to(weights.device)).flatten().cpu()
        scale = float(given @ plain / plain.square().sum().clamp_min(1e-30))
        # Neither rounding nor a cap is a scale: what it leaves over is as large as what it explains.
        is_scale = float((given - scale * plain).norm()) < 0.1 * abs(scale - 1) * float(given.norm())
        _SCALES[model] = scale if is_scale else 1.0
    return _SCALES[model]
