"""Tiny random models and a tokenizer trained on the spot: the laws hold for these as for any model, at no cost.

Each architecture comes in both host classes with the same weights. Norm gains and biases are random, so that a mix-up
of before and after a norm shows, and the weights are large enough for attention to matter.
"""

from functools import lru_cache
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from saelens_ext.models import load_model

N_LAYERS, D_MODEL, N_HEADS, N_CTX, VOCABULARY = 3, 32, 4, 64, 320
D_MLP = {"llama": 64, "gpt2": 4 * D_MODEL}
MODEL_CLASSES = ("HookedSAETransformer", "SAETransformerBridge")
ARCHITECTURES = ("llama", "gpt2")

CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


@lru_cache(maxsize=1)
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    return tokenizer


def make_tokenizer(pad: str = "<pad>", bos: str = "<s>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BOS 0, EOS 1 and padding 2; ``pad`` may name one of the others (GPT-2, Pythia)."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained().to_str()),
        bos_token=bos,
        eos_token="</s>",
        pad_token=pad,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_hf_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random Hugging Face model, ``"llama"`` (rotary, RMS norm, gated MLP, grouped queries) or ``"gpt2"``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_llama_config()) if architecture == "llama" else GPT2LMHeadModel(_gpt2_config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "ln_" in name or name.endswith("bias"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def _llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP["llama"],
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=2,
        max_position_embeddings=N_CTX,
        initializer_range=0.3,
        architectures=["LlamaForCausalLM"],
        **SPECIAL_IDS,
    )


def _gpt2_config() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_positions=N_CTX,
        initializer_range=0.3,
        architectures=["GPT2LMHeadModel"],
        **SPECIAL_IDS,
    )


SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def make_model(architecture: str, model_class: str, tokenizer=None, seed: int = 0):
    """The tiny model of an architecture, hosted by a class; equal seeds have equal weights."""
    return load_model(
        f"tiny-{architecture}",
        model_class=model_class,
        device="cpu",
        hf_model=make_hf_model(architecture, seed),
        tokenizer=tokenizer or make_tokenizer(),
    )
