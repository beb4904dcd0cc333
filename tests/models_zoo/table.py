"""The architectures: how each is configured, which host classes take it, and what is special about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

N_LAYERS, D_MODEL, N_HEADS, N_CTX, VOCABULARY = 3, 32, 4, 64, 320
D_HEAD = D_MODEL // N_HEADS
MODEL_CLASSES = ("HookedSAETransformer", "SAETransformerBridge")
SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

# The size, under the names that the configurations of GPT-2's time have for it, and under those of Llama's.
_GPT2_SIZE = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": N_CTX}
_LLAMA_SIZE = {
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
}
_GROUPED = _LLAMA_SIZE | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": D_HEAD, "query_pre_attn_scalar": D_HEAD}


@dataclass(frozen=True)
class Architecture:
    """One row of the zoo.

    Attributes:
        family: the beginning of the names of the Hugging Face classes (``"Qwen2"``).
        options: what the configuration is made with, the size among it.
        d_mlp: width of the MLP's neurons (of one expert's, in a mixture).
        config: the configuration's class, where it is not ``<family>Config``.
        host_name: where TransformerLens knows the architecture by name only: a published model of it.
        refused: what is refused and why; by a host class, or by what is asked of the model (``"neurons"``).
        tokenizer: the key in `TOKENIZERS` of what such models are published with.
        parallel: attention and MLP read the same residual stream, so that there is no middle.
        experts: the MLP is a mixture of experts.
        post_norm: what a sublayer writes is normalised before it is added.
        residual_scale: what a sublayer's output is multiplied with before it is added.
        prepends_bos: whether the host puts BOS in front of a text, by what its adapter says.
    """

    family: str
    options: Mapping[str, Any] = field(repr=False)
    d_mlp: int = 64
    config: str | None = None
    host_name: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str = "byte_level"
    parallel: bool = False
    experts: bool = False
    post_norm: bool = False
    residual_scale: float = 1.0
    prepends_bos: bool = True

    @property
    def model_classes(self) -> tuple[str, ...]:
        """The host classes that take it."""
        return tuple(name for name in MODEL_CLASSES if name not in self.refused)

    def make_config(self) -> transformers.PreTrainedConfig:
        made = getattr(transformers, self.config or f"{self.family}Config")
        common = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "architectures": [f"{self.family}ForCausalLM"]}
        if self.family == "GPT2":
            common["architectures"] = ["GPT2LMHeadModel"]
        return made(**common | SPECIAL_IDS | self.options)


_NO_CONVERTER = {"HookedSAETransformer": "TransformerLens has no converter for it"}
_NO_NEURONS = {"neurons": "a mixture of experts has no single output matrix"}

ZOO: dict[str, Architecture] = {
    "llama": Architecture("Llama", _GROUPED),
    "gpt2": Architecture("GPT2", _GPT2_SIZE, d_mlp=4 * D_MODEL),
    "gemma2": Architecture("Gemma2", _GEMMA, host_name="google/gemma-2-2b", post_norm=True),
    "gemma3": Architecture(
        "Gemma3", _GEMMA, config="Gemma3TextConfig", host_name="google/gemma-3-1b-pt", post_norm=True
    ),
    "qwen2": Architecture("Qwen2", _GROUPED, tokenizer="without_bos", prepends_bos=False),
    "qwen3": Architecture("Qwen3", _GROUPED | {"head_dim": 16}, tokenizer="without_bos", prepends_bos=False),
    "mistral": Architecture("Mistral", _GROUPED | {"sliding_window": 12}, tokenizer="sentence_piece"),
    "phi3": Architecture("Phi3", _GROUPED | {"sliding_window": None}, tokenizer="sentence_piece"),
    "olmo2": Architecture(
        "Olmo2",
        _LLAMA_SIZE | {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        host_name="allenai/OLMo-2-0425-1B",
        post_norm=True,
    ),
    "pythia": Architecture(
        "GPTNeoX",
        _LLAMA_SIZE | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}},
        parallel=True,
        prepends_bos=False,
    ),
    "gptj": Architecture("GPTJ", _GPT2_SIZE | {"rotary_dim": 4}, d_mlp=4 * D_MODEL, parallel=True),
    "gpt_neo": Architecture(
        "GPTNeo",
        {
            "hidden_size": D_MODEL,
            "num_layers": N_LAYERS,
            "num_heads": N_HEADS,
            "max_position_embeddings": N_CTX,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 12,
        },
        d_mlp=4 * D_MODEL,
    ),
    "bloom": Architecture(
        "Bloom",
        {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS},
        d_mlp=4 * D_MODEL,
        tokenizer="without_bos",
        prepends_bos=False,
    ),
    "mixtral": Architecture(
        "Mixtral",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        refused=_NO_NEURONS,
        tokenizer="sentence_piece",
        experts=True,
    ),
    "qwen3_moe": Architecture(
        "Qwen3Moe",
        _GROUPED | {"head_dim": 16, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
        refused=_NO_CONVERTER | _NO_NEURONS,
        tokenizer="without_bos",
        experts=True,
        prepends_bos=False,
    ),
    "granite": Architecture(
        "Granite",
        _GROUPED
        | {
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.25,
        },
        refused=_NO_CONVERTER,
        residual_scale=0.5,
        prepends_bos=False,
    ),
    "cohere": Architecture("Cohere", _GROUPED | {"logit_scale": 0.5}, refused=_NO_CONVERTER, parallel=True),
    "hunyuan": Architecture("HunYuanDenseV1", _GROUPED | {"head_dim": D_HEAD}, refused=_NO_CONVERTER),
    "gpt_oss": Architecture(
        "GptOss",
        _GROUPED
        | {
            "head_dim": 16,
            "sliding_window": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        refused=_NO_NEURONS,
        experts=True,
    ),
}

# What norms the stream itself behind each sum, so that laws of what is added to it do not hold.
NORMED_STREAM: dict[str, Architecture] = {
    "opt_350m": Architecture(
        "OPT",
        {
            "hidden_size": D_MODEL,
            "ffn_dim": 64,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "max_position_embeddings": N_CTX,
            "word_embed_proj_dim": D_MODEL // 2,
            "do_layer_norm_before": False,
            "init_std": 0.3,
        },
        refused=_NO_CONVERTER,
        post_norm=True,
    ),
}

D_MLP = {name: row.d_mlp for name, row in ZOO.items()}
# What most tests run on: a pre-norm model with rotary positions, gated MLP and no biases, and one with none of these.
ARCHITECTURES = ("llama", "gpt2")
# Norms before and behind each sublayer, and known to TransformerLens by name only.
GEMMAS = {name: ZOO[name].host_name for name in ("gemma2", "gemma3")}
# Those that differ from another row in details only: `make test` leaves their laws to `make test-slow`.
VARIATIONS = {
    "gemma3",
    "qwen3",
    "mistral",
    "phi3",
    "olmo2",
    "gptj",
    "gpt_neo",
    "bloom",
    "qwen3_moe",
    "cohere",
    "hunyuan",
    "gpt_oss",
}
