"""Whether a hosted model computes what the Hugging Face model computed before a host took it over.

The hosts rebuild attention, norms and positions, and where a rebuilt part differs from its original, every activation
behind it is of another model, without a word. So a few tokens are run through both.
"""

import logging
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
from transformers import PreTrainedModel

from saelens_ext.ops.modes import evaluating
from saelens_ext.ops.precision import wide

logger = logging.getLogger(__name__)

N_TOKENS = 12
ROUNDING = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""By the dtype of the weights: up to which relative difference of log-probabilities is put down to rounding. Another
implementation of attention makes 1e-6, 4e-3 and 4e-2 on small random models; a wrong one 0.2 or more."""
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
        """None for a model that does not run on tokens alone, or has no weights yet."""
        if any(parameter.is_meta for parameter in hf_model.parameters()):
            return None
        try:
            table: Any = hf_model.get_input_embeddings().weight
            # All over the vocabulary; to tell two models apart no token need be a special one.
            ids = torch.linspace(0, len(table) - 1, N_TOKENS + 2, device="cpu")[1:-1].long()[None].to(table.device)
            found = _log_probs(hf_model, ids)
        except Exception as error:  # whatever an architecture asks for beside tokens
            logger.debug("%s does not run on tokens alone: %s", type(hf_model).__name__, error)
            return None
        return cls(kind=type(hf_model).__name__, dtype=hf_model.dtype, ids=ids, log_probs=found)

    def warn_of_differences(self, model: Any) -> None:
        """Warn where the hosted model does not run, or gives other log-probabilities than rounding explains."""
        who = f"{type(model).__name__}, made from a {self.kind},"
        try:
            # With a mask, as the passes of this package run it; some of the hosts' attention then sees later tokens.
            found = _log_probs(model, self.ids, attention_mask=torch.ones_like(self.ids))
        except Exception as error:  # whatever a host's code stumbles over
            said = f"This {who} does not run, though its model does: {type(error).__name__}: {error}. {_REMEDY}"
            warnings.warn(said, UserWarning, stacklevel=2)
            return
        if found.shape != self.log_probs.shape:
            return
        difference = found - self.log_probs
        spread = float((self.log_probs - self.log_probs.mean(dim=-1, keepdim=True)).norm())
        relative = float(difference.norm()) / spread if spread else 0.0
        if relative > ROUNDING.get(self.dtype, ROUNDING[torch.bfloat16]):
            warnings.warn(
                f"This {who} computes something else: on {len(found)} tokens, log-probabilities differ by up to "
                f"{float(difference.abs().max()):.2g} nats ({relative:.0%} of their spread). All that is read from it "
                f"is of what it computes. {_REMEDY}",
                UserWarning,
                stacklevel=2,
            )


class Watched:
    """A class of Hugging Face models, in whose place it loads one and notes what that computes."""

    def __init__(self, model_class: Any, device: str | torch.device | None) -> None:
        self._class, self._device = model_class, device
        self.before: Before | None = None

    def from_pretrained(self, name: str, **options: Any) -> PreTrainedModel:
        """As the class itself does, which the host picks by the configuration if none was given."""
        architecture = determine_architecture_from_hf_config(options["config"])
        model_class = self._class or get_hf_model_class_for_architecture(architecture)
        hf_model: Any = model_class.from_pretrained(name, **options)
        if self._device is not None and "device_map" not in options:
            hf_model = hf_model.to(self._device)  # where the host puts it next
        self.before = Before.of(hf_model)
        return hf_model


def _log_probs(model: Any, ids: Int64[Tensor, "1 n"], **options: Tensor) -> Float[Tensor, "n vocabulary"]:
    with evaluating(model):
        output = model(ids, **options)
    logits = output if isinstance(output, Tensor) else output.logits
    return wide(logits[0]).log_softmax(dim=-1).cpu()
