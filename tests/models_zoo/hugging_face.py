"""The models themselves."""

from copy import deepcopy
from functools import cache

import torch
import transformers
from transformers import PreTrainedModel

from tests.models_zoo.table import NORMED_STREAM, ZOO


def make_hf_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random Hugging Face model of an architecture of the zoo; equal seeds have equal weights."""
    return deepcopy(_made(architecture, seed))  # a host rewires what it is given


@cache
def _made(architecture: str, seed: int) -> PreTrainedModel:
    config = {**ZOO, **NORMED_STREAM}[architecture].make_config()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, config.architectures[0])(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "ln_" in name or name.endswith(("bias", "sinks")):
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()
