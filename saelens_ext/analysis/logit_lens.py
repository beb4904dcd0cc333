"""Which tokens a direction speaks for: the logit lens.

Symbols
    u       a unit direction in the residual stream, ``(d_model,)``
    norm    the model's final normalisation, with its weights where they are not folded away
    W, b    the unembedding and its bias, ``(d_model, d_vocab)`` and ``(d_vocab,)``
    logits  norm(u) W + b, ``(d_vocab,)``
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saelens_ext import _checks
from saelens_ext.host.edit_effects import without_hooks
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes

# Logits held at once: 64 MB in float32.
_LOGITS_PER_CHUNK = 2**24


@dataclass(frozen=True, kw_only=True, eq=False)
class LensResult:
    """The tokens that each of k directions promotes and suppresses most; tensors on the CPU."""

    promoted_ids: Tensor
    """Token ids, the largest logit first: int64 ``(k, n)``."""
    promoted_logits: Tensor
    """Their logits: float32 ``(k, n)``."""
    suppressed_ids: Tensor
    """Token ids, the smallest logit first: int64 ``(k, n)``."""
    suppressed_logits: Tensor
    """Their logits: float32 ``(k, n)``."""


@standard_modes(gradients=False)
def logit_lens(model: HostModel, directions: Tensor, *, top_n: int = 10) -> LensResult:
    """Read unit directions out through the model's final normalisation and unembedding.

    Logits are those of the unembedding. What some models do to them afterwards, a soft cap or a scale, keeps their
    order and is left out. A model whose normalisation weights are folded into the unembedding gives the same order, and
    the same logits up to one constant per direction where the unembedding is centred as well. Hooks on the
    normalisation and the unembedding do not run.

    Args:
        model: any TransformerLens model.
        directions: ``(k, d_model)``, for example a dictionary's ``W_dec``; only their directions count.
        top_n: tokens to keep at either end, 1 to d_vocab.

    Raises:
        ValueError: directions of another width than the residual stream, zero or not finite; ``top_n`` out of range; or
            a model whose final normalisation is not found.

    Examples:
        >>> lens = sx.logit_lens(model, partition.exemplars, top_n=5)
        >>> lens.promoted_ids.shape == (len(partition.exemplars), 5)
        True

    Source: the lens is nostalgebraist's (2020); the exemplars' lens is arXiv 2605.14347.
    """
    if directions.ndim != 2:
        raise ValueError(f"directions must have shape (k, d_model), got {tuple(directions.shape)}.")
    if directions.shape[1] != model.cfg.d_model:
        raise ValueError(
            f"directions are {directions.shape[1]} wide, the residual stream of this model {model.cfg.d_model}. The "
            "lens takes directions of the residual stream; a dictionary over MLP neurons or heads has to be mapped "
            "there first."
        )
    _checks.positive(top_n, "top_n")
    rows = _checks.finite(directions, "directions").float()
    norms = rows.norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        raise ValueError(f"Direction {int((norms == 0).flatten().nonzero()[0])} is zero: it points nowhere.")
    weights = model.W_U
    if top_n > weights.shape[1]:
        raise ValueError(f"top_n must be at most the size of the vocabulary, {weights.shape[1]}, got {top_n}.")
    chunk = max(1, _LOGITS_PER_CHUNK // weights.shape[1])
    ends = [_ends(_logits(model, part.to(weights)), top_n) for part in (rows / norms).split(chunk)]
    columns = [torch.cat(column) for column in zip(*ends, strict=True)]
    names = ("promoted_logits", "promoted_ids", "suppressed_logits", "suppressed_ids")
    return LensResult(**dict(zip(names, columns, strict=True)))


def _logits(model: HostModel, units: Tensor) -> Tensor:
    """Logits ``(k, d_vocab)`` in float32 of unit directions ``(k, d_model)``."""
    norm = getattr(model, "ln_final", None)
    if norm is None:
        if model.cfg.normalization_type is not None:
            raise ValueError("This model has no final normalisation at model.ln_final, so it has no logit lens.")
        norm = nn.Identity()
    with without_hooks(norm), without_hooks(model.unembed):
        return model.unembed(norm(units[None]))[0].float()


def _ends(logits: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    high, low = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
    return high.values.cpu(), high.indices.cpu(), low.values.cpu(), low.indices.cpu()
