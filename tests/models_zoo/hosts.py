"""The models in their host classes."""

from typing import Any

from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import get_pretrained_model_config
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights, convert_olmo2_weights
from transformers import PreTrainedModel

from saelens_ext.host.models import _with_bos, load_model
from tests.models_zoo.hugging_face import make_hf_model
from tests.models_zoo.table import D_HEAD, D_MODEL, N_CTX, N_HEADS, N_LAYERS, NORMED_STREAM, VOCABULARY, ZOO
from tests.models_zoo.tokenizer_families import make_tokenizer

HOSTED = [(name, model_class) for name, row in ZOO.items() for model_class in row.model_classes]


def make_model(architecture: str, model_class: str, tokenizer=None, seed: int = 0):
    """The tiny model of an architecture, hosted by a class; equal seeds have equal weights."""
    row, hf_model = {**ZOO, **NORMED_STREAM}[architecture], make_hf_model(architecture, seed)
    if tokenizer is None:
        tokenizer = make_tokenizer(family=row.tokenizer)
    if row.host_name and model_class == "HookedSAETransformer":
        return _hooked_by_name(architecture, hf_model, tokenizer)
    return load_model(
        f"tiny-{architecture}", model_class=model_class, device="cpu", hf_model=hf_model, tokenizer=tokenizer
    )


def _hooked_by_name(architecture: str, hf_model: PreTrainedModel, tokenizer) -> HookedSAETransformer:
    """The host's configuration of a published model at the size of ours, with our weights."""
    config = _published_config(architecture)
    sizes = {
        "d_model": D_MODEL,
        "d_mlp": ZOO[architecture].d_mlp,
        "d_head": D_HEAD,
        "rotary_dim": D_HEAD,
        "n_heads": N_HEADS,
        "n_layers": N_LAYERS,
        "n_ctx": N_CTX,
        "d_vocab": VOCABULARY,
        "d_vocab_out": VOCABULARY,
        "attn_scale": D_HEAD**0.5,
        "model_name": f"tiny-{architecture}",
    }
    if config.n_key_value_heads is not None:
        sizes["n_key_value_heads"] = 2
    for name, value in sizes.items():
        setattr(config, name, value)
    convert = convert_olmo2_weights if architecture == "olmo2" else convert_gemma_weights
    model = HookedSAETransformer(config, _with_bos(tokenizer), move_to_device=False)
    model.load_and_process_state_dict(
        {name: tensor.detach().clone() for name, tensor in convert(hf_model, config).items()},
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


def _published_config(architecture: str) -> HookedTransformerConfig:
    if architecture != "olmo2":
        return get_pretrained_model_config(ZOO[architecture].host_name, hf_cfg={"vocab_size": VOCABULARY}, device="cpu")
    # The host asks the hub for this one before it returns constants; these are the constants.
    constants: dict[str, Any] = {
        "eps": 1e-6,
        "act_fn": "silu",
        "initializer_range": 0.02,
        "normalization_type": "RMS",
        "rotary_base": 500000.0,
        "attn_types": ["global"] * N_LAYERS,
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
        "original_architecture": "Olmo2ForCausalLM",
        "device": "cpu",
    }
    return HookedTransformerConfig(
        n_layers=N_LAYERS, d_model=D_MODEL, d_head=D_HEAD, n_heads=N_HEADS, n_ctx=N_CTX, d_vocab=VOCABULARY, **constants
    )
