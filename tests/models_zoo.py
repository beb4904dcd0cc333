"""Tiny random models and a tokenizer trained on the spot: the laws hold for these as for any model, at no cost.

Each architecture comes in both host classes with the same weights. Norm gains and biases are random, so that a mix-up
of before and after a norm shows, and the weights are large enough for attention to matter.

Gemma models ("gemma2", "gemma3": norms before and behind each sublayer) are made from the host's own configurations of
the published ones, shrunk, since it takes these models by name only.
"""

from functools import lru_cache
from pydoc_data.topics import topics

import torch
from sae_lens import HookedSAETransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformer_lens.loading_from_pretrained import get_pretrained_model_config
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from saelens_ext.host.models import _with_bos, load_model

N_LAYERS, D_MODEL, N_HEADS, N_CTX, VOCABULARY = 3, 32, 4, 64, 320
D_MLP = {"llama": 64, "gpt2": 4 * D_MODEL, "gemma2": 64, "gemma3": 64}
MODEL_CLASSES = ("HookedSAETransformer", "SAETransformerBridge")
ARCHITECTURES = ("llama", "gpt2")
GEMMAS = {"gemma2": "google/gemma-2-2b", "gemma3": "google/gemma-3-1b-pt"}

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
    """A byte-level BPE tokenizer with BOS 0, EOS 1 and padding 2; ``pad`` may name one of the others (GPT-2,
    Pythia).
    """
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
    """A random Hugging Face model, ``"llama"`` (rotary, RMS norm, gated MLP, grouped queries), ``"gpt2"`` or a
    Gemma.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if architecture in GEMMAS:
            model = _gemma(architecture)
        else:
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


def _gemma(architecture: str) -> PreTrainedModel:
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP[architecture],
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": 2,
        "head_dim": D_MODEL // N_HEADS,
        "query_pre_attn_scalar": D_MODEL // N_HEADS,
        "max_position_embeddings": N_CTX,
        "initializer_range": 0.3,
    }
    if architecture == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**options, architectures=["Gemma2ForCausalLM"], **SPECIAL_IDS))
    return Gemma3ForCausalLM(Gemma3TextConfig(**options, architectures=["Gemma3ForCausalLM"], **SPECIAL_IDS))


def _hooked_gemma(architecture: str, hf_model: PreTrainedModel, tokenizer) -> HookedSAETransformer:
    """The host's configuration of a published Gemma at the size of ours, with our weights."""
    config = get_pretrained_model_config(GEMMAS[architecture], hf_cfg={"vocab_size": VOCABULARY}, device="cpu")
    sizes = {
        "d_model": D_MODEL,
        "d_mlp": D_MLP[architecture],
        "d_head": D_MODEL // N_HEADS,
        "rotary_dim": D_MODEL // N_HEADS,
        "n_heads": N_HEADS,
        "n_key_value_heads": 2,
        "n_layers": N_LAYERS,
        "n_ctx": N_CTX,
        "d_vocab": VOCABULARY,
        "d_vocab_out": VOCABULARY,
        "attn_scale": (D_MODEL // N_HEADS) ** 0.5,
        "model_name": f"tiny-{architecture}",
    }
    for name, value in sizes.items():
        setattr(config, name, value)
    model = HookedSAETransformer(config, _with_bos(tokenizer), move_to_device=False)
    model.load_and_process_state_dict(
        {name: tensor.detach().clone() for name, tensor in convert_gemma_weights(hf_model, config).items()},
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def make_model(architecture: str, model_class: str, tokenizer=None, seed: int = 0):
    """The tiny model of an architecture, hosted by a class; equal seeds have equal weights."""
    hf_model, tokenizer = make_hf_model(architecture, seed), tokenizer or make_tokenizer()
    if architecture in GEMMAS and model_class == "HookedSAETransformer":
        return _hooked_gemma(architecture, hf_model, tokenizer)
    return load_model(
        f"tiny-{architecture}", model_class=model_class, device="cpu", hf_model=hf_model, tokenizer=tokenizer
    )
