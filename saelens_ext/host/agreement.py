"""Whether a hosted model computes what the Hugging Face model computed before a host took it over.

The hosts rebuild attention, norms and positions, and where a rebuilt part differs from its original, every activation
behind it is of another model, without a word. So a few tokens are run through both.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
    get_hf_model_class_for_architecture,
)
from transformers import PreTrainedConfig, PreTrainedModel

from saelens_ext.ops.memory import lacks_memory
from saelens_ext.ops.modes import evaluating
from saelens_ext.ops.precision import wide

N_TOKENS = 12
ROUNDING = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""By the dtype of the weights: up to which relative difference of log-probabilities is put down to rounding. Another
implementation of attention makes 1e-6 in float32, 4e-3 in float16 and 4e-2 in bfloat16 on small random models; a wrong
one 0.2 or more."""
CLOSED = -1e9
"""Log-probabilities below it, in nats, are of tokens that a model never gives, such as the padding of a vocabulary."""
_REMEDY = (
    "The host's code does not fit this architecture; try the other model_class, or other versions of transformer-lens "
    "and transformers."
)


@dataclass(frozen=True, kw_only=True)
class Before:
    """What a Hugging Face model computed before it was taken over."""

    kind: str
    """The name of its class."""
    dtype: torch.dtype
    ids: Int64[Tensor, "1 n"]
    log_probs: Float[Tensor, "n vocabulary"]
    """After each token, in nats."""

    @classmethod
    def of(cls, hf_model: PreTrainedModel) -> "Before | None":
        """None for a model that does not run on tokens alone, of which it warns, or has no weights yet."""
        if any(parameter.is_meta for parameter in hf_model.parameters()):
            return None
        try:
            table: Any = hf_model.get_input_embeddings().weight
            ids = spread_ids(len(table), table.device)
            found = _log_probs(hf_model, ids)
        except Exception as error:  # whatever an architecture asks for beside tokens
            if not lacks_memory(error):
                reason = f"{type(error).__name__}: {str(error).rstrip('.')}"
                warnings.warn(
                    f"This {type(hf_model).__name__} does not run on token ids alone, which is all that this package "
                    f"gives a model ({reason}).",
                    UserWarning,
                    stacklevel=2,
                )
            return None
        return cls(kind=type(hf_model).__name__, dtype=hf_model.dtype, ids=ids, log_probs=found)

    def warn_of_differences(self, model: Any) -> None:
        """Warn where the hosted model does not run, or gives other log-probabilities than rounding explains."""
        who = f"{type(model).__name__}, made from a {self.kind},"
        ids = self.ids.to(next(iter(model.parameters())).device)  # which the host may have chosen itself
        try:
            # With a mask, as the passes of this package run it; some of the hosts' attention then sees later tokens.
            found = _log_probs(model, ids, attention_mask=torch.ones_like(ids))
        except Exception as error:  # whatever a host's code stumbles over
            if not lacks_memory(error):
                reason = str(error).rstrip(".")
                said = f"This {who} does not run, though its model does: {type(error).__name__}: {reason}. {_REMEDY}"
                warnings.warn(said, UserWarning, stacklevel=2)
            return
        if found.shape != self.log_probs.shape:
            return
        relative, largest = differences(found, self.log_probs)
        if not relative <= rounding(self.dtype):  # NaN is a difference, too
            warnings.warn(
                f"This {who} computes something else: on {len(found)} tokens, log-probabilities differ by up to "
                f"{largest:.2g} nats ({relative:.0%} of their spread). All that is read from it is of what it "
                f"computes. {_REMEDY}",
                UserWarning,
                stacklevel=2,
            )


class Watched:
    """Stands for a class of Hugging Face models: loads one as the class does, and notes what it computes."""

    def __init__(self, model_class: Any, device: str | torch.device | None) -> None:
        self._class, self._device = model_class, device
        self.before: Before | None = None

    def from_pretrained(self, name: str, **options: Any) -> PreTrainedModel:
        """As the class itself does, which the host picks by the configuration if none was given."""
        hf_model: Any = self._of(options["config"]).from_pretrained(name, **options)
        if self._device is not None and "device_map" not in options:
            hf_model = hf_model.to(self._device)  # where the host puts it next
        self.before = Before.of(hf_model)
        return hf_model

    def from_config(self, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
        """As the class itself does, which the host asks for where it is to load no weights; nothing is compared."""
        return self._of(config).from_config(config, **options)

    def _of(self, config: PreTrainedConfig) -> Any:
        return self._class or get_hf_model_class_for_architecture(determine_architecture_from_hf_config(config))


def spread_ids(n_vocabulary: int, device: torch.device) -> Int64[Tensor, "1 n"]:
    """Tokens from all over a vocabulary, to tell two ways to compute apart; no special one is needed for that."""
    return torch.linspace(0, n_vocabulary - 1, N_TOKENS + 2, device="cpu")[1:-1].long()[None].to(device)


def differences(found: Float[Tensor, "n vocabulary"], expected: Float[Tensor, "n vocabulary"]) -> tuple[float, float]:
    """How far log-probabilities are from what they should be: as a fraction of the spread of these over the
    vocabulary, and the largest difference, in nats.
    """
    usable = expected > CLOSED  # no NaN, where the model itself overflows
    means = expected.masked_fill(~usable, torch.nan).nanmean(dim=-1, keepdim=True)
    difference, spread = (found - expected)[usable], float((expected - means)[usable].norm())
    return (float(difference.norm()) / spread, float(difference.abs().max())) if spread else (0.0, 0.0)


def rounding(dtype: torch.dtype) -> float:
    """Up to which fraction rounding explains it, of a model whose weights are of a dtype."""
    return ROUNDING.get(dtype, ROUNDING[torch.bfloat16])


def _log_probs(model: Any, ids: Int64[Tensor, "1 n"], **options: Tensor) -> Float[Tensor, "n vocabulary"]:
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a first pass warns of, the first that is asked for will
        output = model(ids, **options)
    logits = output if isinstance(output, Tensor) else output.logits
    return wide(logits[0]).log_softmax(dim=-1).cpu()
