"""A hook of neurons lies in front of an output matrix; where an MLP has none, its name is refused everywhere."""

import pytest
import torch
import transformers

from saelens_ext import fit_snmf, neuron_group_effect, residual_directions
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.host.models import load_model, resolve_hook, retarget
from tests.models_zoo import D_MODEL, HOSTED, N_CTX, N_HEADS, SPECIAL_IDS, VOCABULARY, ZOO, make_model, make_tokenizer

EXPERTS = [(name, kind) for name, kind in HOSTED if ZOO[name].experts]
BRIDGED = [name for name, kind in EXPERTS if kind == "SAETransformerBridge"]
NEURONS = "blocks.1.mlp.hook_post"
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}


def bridge(family: str, **options):
    """A tiny bridge of a mixture that is not in the zoo."""
    config = getattr(transformers, f"{family}Config")(
        **SIZE | SPECIAL_IDS | options, architectures=[f"{family}ForCausalLM"]
    )
    hf_model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    return load_model(f"tiny-{family}", hf_model=hf_model, tokenizer=make_tokenizer(), device="cpu")


@pytest.mark.parametrize("end", ["hook_pre", "hook_post", "hook_pre_linear"])
@pytest.mark.parametrize(("architecture", "kind"), EXPERTS)
def test_a_mixture_of_experts_has_no_hook_of_neurons(architecture, kind, end):
    model = make_model(architecture, kind)
    with pytest.raises(ValueError, match=f"mlp.{end}"):
        resolve_hook(model, f"blocks.1.mlp.{end}")


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize("architecture", BRIDGED)
def test_the_error_says_what_the_name_stands_for(architecture, compatible):
    model = make_model(architecture, "SAETransformerBridge")
    if compatible:
        model.enable_compatibility_mode(no_processing=True)
    output = resolve_hook(model, "blocks.1.mlp.hook_out")
    with pytest.raises(ValueError, match=f"no single output matrix.*'{output}'; give that name"):
        resolve_hook(model, NEURONS)


@pytest.mark.parametrize("architecture", BRIDGED)
def test_whatever_takes_neurons_refuses(architecture):
    model = make_model(architecture, "SAETransformerBridge")
    features = torch.randn(3, D_MODEL)
    snmf = SNMFDictionary.from_features(features, metadata={"hook_name": NEURONS})
    calls = [
        lambda: fit_snmf(ActivationStream(model, ["The assert statement is a test"], NEURONS, context_size=8), 2),
        lambda: residual_directions(model, snmf),
        lambda: residual_directions(model, features, hook_name=NEURONS),
        lambda: residual_directions(model, features, layer=1),
        lambda: neuron_group_effect(model, NEURONS, [0], [1.0], [5], "The assert"),
        lambda: retarget(snmf, model),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no single output matrix"):
            call()


def test_a_dense_layer_among_mixtures_has_neurons():
    model = bridge(
        "DeepseekV3",
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    features = torch.randn(3, 64)
    found = residual_directions(model, features, hook_name="blocks.0.mlp.hook_post")
    weight = model.original_model.model.layers[0].mlp.down_proj.original_component.weight
    torch.testing.assert_close(found, features @ weight.T)
    with pytest.raises(ValueError, match="no single output matrix"):
        resolve_hook(model, NEURONS)


def test_shared_experts_are_no_exception_to_a_mixture():
    model = bridge("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=48)
    for end in ("hook_pre", "hook_post"):
        with pytest.raises(ValueError, match="no single output matrix"):
            resolve_hook(model, f"blocks.1.mlp.{end}")
    with pytest.raises(ValueError, match="not one of MLP neurons"):
        residual_directions(model, torch.randn(3, 48), hook_name="blocks.1.mlp.shared_expert.out.hook_in")
