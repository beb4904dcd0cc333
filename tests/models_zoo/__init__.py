"""Tiny random models and tokenizers trained on the spot: the laws hold for these as for any model, at no cost.

`ZOO` is the table of architectures that tests parametrise over, `HOSTED` its pairs of architecture and host class;
`NORMED_STREAM` has one with laws of its own. Both host classes have the same weights. Norm gains and biases are random,
so that a mix-up of before and after a norm shows, and the weights are large enough for attention to matter.
"""

from tests.models_zoo.hosts import HOSTED, make_model
from tests.models_zoo.hugging_face import make_hf_model
from tests.models_zoo.table import (
    ARCHITECTURES,
    D_MLP,
    D_MODEL,
    GEMMAS,
    MODEL_CLASSES,
    N_CTX,
    N_HEADS,
    N_LAYERS,
    NORMED_STREAM,
    SPECIAL_IDS,
    VARIATIONS,
    VOCABULARY,
    ZOO,
    Architecture,
)
from tests.models_zoo.tokenizer_families import CHAT_TEMPLATE, CHAT_TEMPLATE_WITHOUT_BOS, TOKENIZERS, make_tokenizer

__all__ = [
    "ARCHITECTURES",
    "CHAT_TEMPLATE",
    "CHAT_TEMPLATE_WITHOUT_BOS",
    "D_MLP",
    "D_MODEL",
    "GEMMAS",
    "HOSTED",
    "MODEL_CLASSES",
    "N_CTX",
    "N_HEADS",
    "N_LAYERS",
    "NORMED_STREAM",
    "SPECIAL_IDS",
    "TOKENIZERS",
    "VARIATIONS",
    "VOCABULARY",
    "ZOO",
    "Architecture",
    "make_hf_model",
    "make_model",
    "make_tokenizer",
]
