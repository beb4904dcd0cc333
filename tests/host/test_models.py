"""One place in a model has one tensor, whatever host and spelling it is reached by."""

import json
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.loading_from_pretrained import get_pretrained_state_dict
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

from saelens_ext.host.models import (
    check_model,
    describe_model,
    hook_layer,
    load_model,
    resolve_hook,
    retarget,
    stop_layer,
    tokenizer_of,
)
from tests.models_zoo import (
    ARCHITECTURES,
    D_MODEL,
    MODEL_CLASSES,
    N_CTX,
    N_HEADS,
    N_LAYERS,
    VOCABULARY,
    make_hf_model,
    make_model,
    make_tokenizer,
)

TOKENS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def read_all(model, hook_names, tokens=TOKENS):
    """What fires at names that are taken as they are, by way of the model's own `run_with_hooks`: name -> every
    firing.
    """
    fired = {name: [] for name in hook_names}
    hooks = [(name, lambda x, hook, fired=fired[name]: fired.append(x.clone())) for name in fired]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    return {name: [x.flatten(2) if x.ndim > 2 else x for x in xs] for name, xs in fired.items()}


def read(model, hook_name, tokens=TOKENS):
    """The first thing that fires at a name; None when nothing does."""
    fired = read_all(model, [hook_name], tokens)[hook_name]
    return fired[0] if fired else None


def assert_all_same(model_a, model_b, pairs):
    """Hold the tensors at pairs of names, one of each model, against each other."""
    a, b = (read_all(model, {pair[i] for pair in pairs}) for i, model in enumerate((model_a, model_b)))
    for name_a, name_b in pairs:
        assert a[name_a] and b[name_b], (name_a, name_b)
        assert_same(a[name_a][0], b[name_b][0])


def assert_same(a, b):
    assert a is not None and b is not None and a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.fixture(params=ARCHITECTURES)
def hosts(request, tiny_hooked, tiny_bridge, tiny_gpt2_hooked, tiny_gpt2_bridge):
    """(architecture, HookedSAETransformer, SAETransformerBridge) with the same weights."""
    pair = {"llama": (tiny_hooked, tiny_bridge), "gpt2": (tiny_gpt2_hooked, tiny_gpt2_bridge)}
    return request.param, *pair[request.param]


@pytest.fixture(scope="module")
def processed_bridge():
    """The GPT-2 bridge with the weights that `HookedTransformer.from_pretrained` would give it."""
    bridge = make_model("gpt2", "SAETransformerBridge")
    bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


def sae_at(hook_name, d_in=D_MODEL, **metadata):
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=8, metadata=SAEMetadata(hook_name=hook_name, **metadata)))
    with torch.no_grad():
        sae.W_dec.normal_()
    return sae


# --- the zoo ---------------------------------------------------------------------------------------------------------


def test_both_hosts_are_the_hugging_face_model(hosts):
    architecture, hooked, bridge = hosts
    with torch.no_grad():
        expected = make_hf_model(architecture)(TOKENS, output_hidden_states=True)
    for model in (hooked, bridge):
        with torch.no_grad():
            assert_same(model(TOKENS), expected.logits)
        for layer in range(N_LAYERS - 1):  # the last of the hidden states is normalised
            name = resolve_hook(model, f"blocks.{layer}.hook_resid_post")
            assert_same(read(model, name), expected.hidden_states[layer + 1])


# --- names -----------------------------------------------------------------------------------------------------------

PLACES = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_resid_mid",
    "blocks.1.hook_resid_post",
    "blocks.2.hook_resid_post",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_mlp_out",
    "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_k",
    "blocks.1.attn.hook_v",
    "blocks.1.attn.hook_z",
    "blocks.1.mlp.hook_in",
    "blocks.1.mlp.hook_pre",
    "blocks.1.mlp.hook_post",
    "blocks.1.ln2.hook_normalized",
    "ln_final.hook_normalized",
    "unembed.hook_in",
]
GATED_MLP_PLACES = ["blocks.1.mlp.hook_pre_linear"]
BRIDGE_PLACES = [
    "embed.hook_out",
    "blocks.1.hook_in",
    "blocks.1.ln2.hook_in",
    "blocks.1.ln2.hook_out",
    "blocks.1.hook_out",
    "blocks.2.hook_out",
    "blocks.1.attn.hook_out",
    "blocks.1.attn.o.hook_in",
    "blocks.1.attn.q.hook_out",
    "blocks.1.attn.k.hook_out",
    "blocks.1.attn.v.hook_out",
    "blocks.1.mlp.hook_out",
    "blocks.1.mlp.in.hook_out",
    "blocks.1.mlp.out.hook_in",
]


def test_hooked_transformer_names_translate_to_a_bridge(hosts):
    architecture, hooked, bridge = hosts
    names = PLACES + (GATED_MLP_PLACES if architecture == "llama" else ["hook_pos_embed"])
    assert [resolve_hook(hooked, name) for name in names] == names
    assert_all_same(hooked, bridge, [(name, resolve_hook(bridge, name)) for name in names])


def test_bridge_names_translate_to_a_hooked_transformer(hosts):
    architecture, hooked, bridge = hosts
    names = BRIDGE_PLACES + (["blocks.1.mlp.gate.hook_out"] if architecture == "llama" else ["pos_embed.hook_out"])
    assert [resolve_hook(bridge, name) for name in names] == names
    assert_all_same(bridge, hooked, [(name, resolve_hook(hooked, name)) for name in names])


def test_there_and_back_is_the_same_name(hosts):
    _, hooked, bridge = hosts
    for name in PLACES:
        assert resolve_hook(hooked, resolve_hook(bridge, name)) == name


def test_every_name_of_a_bridge_is_refused_or_the_same_tensor(hosts):
    """No name is translated into another tensor; those without an equal are refused."""
    _, hooked, bridge = hosts
    pairs = []
    for name in (n for n in bridge.hook_dict if n.startswith("blocks.1.")):
        try:
            pairs.append((name, resolve_hook(hooked, name)))
        except ValueError:
            continue
    fired = read_all(bridge, [name for name, _ in pairs])
    pairs = [(name, there) for name, there in pairs if name != there and fired[name]]
    assert len(pairs) >= len(BRIDGE_PLACES) - 4
    assert_all_same(bridge, hooked, pairs)


MODULES = {
    "llama": ["model.embed_tokens", "model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp"],
    "gpt2": ["transformer.wte", "transformer.h.1", "transformer.h.1.attn", "transformer.h.1.mlp"],
}


def test_module_paths_translate_both_ways(hosts):
    architecture, hooked, bridge = hosts
    proxy = HookedProxyLM(make_hf_model(architecture), make_tokenizer())
    for model in (hooked, bridge):
        pairs = [(path, resolve_hook(model, path)) for path in MODULES[architecture]]
        assert_all_same(proxy, model, pairs)
        assert [resolve_hook(proxy, name) for _, name in pairs] == MODULES[architecture]
    # The input of a block is the output of the one before it.
    assert resolve_hook(proxy, "blocks.2.hook_resid_pre") == MODULES[architecture][1]
    with pytest.raises(ValueError, match="no hook 'blocks.1.attn.hook_z'"):
        resolve_hook(proxy, "blocks.1.attn.hook_z")


def test_the_classes_of_transformer_lens_itself(tiny_bridge, tiny_hooked):
    bridge = TransformerBridge.boot_transformers(
        "tiny", hf_model=make_hf_model("llama"), tokenizer=tiny_bridge.tokenizer, device="cpu"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the host's own, of the class as such
        hooked = HookedTransformer(tiny_hooked.cfg, tiny_hooked.tokenizer)
    hooked.load_state_dict(tiny_hooked.state_dict())
    for model in (bridge, hooked):
        assert_same(read(model, resolve_hook(model, "model.layers.1")), read(tiny_bridge, "blocks.1.hook_out"))
    assert resolve_hook(bridge, "blocks.1.hook_mlp_out") == "blocks.1.mlp.hook_out"


def test_a_vision_tower_is_not_the_language_model(tiny_bridge):
    with pytest.raises(ValueError, match="no hook"):
        resolve_hook(tiny_bridge, "model.vision_tower.encoder.layers.1")
    assert resolve_hook(tiny_bridge, "model.language_model.layers.1") == "blocks.1.hook_out"


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pots", "blocks.9.hook_resid_post", "hook_resid", "", "a{b}.{}"])
def test_an_unknown_hook_is_an_error(hosts, name):
    for model in hosts[1:]:
        with pytest.raises(ValueError, match="has no hook"):
            resolve_hook(model, name)


def test_an_unknown_hook_lists_near_matches(hosts):
    for model in hosts[1:]:
        with pytest.raises(ValueError, match="Did you mean 'blocks.1.hook_resid_post'"):
            resolve_hook(model, "blocks.1.hook_resid_pots")


def test_a_hook_that_is_switched_off_is_an_error():
    for model_class in MODEL_CLASSES:
        model = make_model("gpt2", model_class)
        with pytest.raises(ValueError, match=r"set_use_hook_mlp_in\(True\)"):
            resolve_hook(model, "blocks.1.hook_mlp_in")
        with pytest.raises(ValueError, match=r"set_use_attn_in\(True\)"):
            resolve_hook(model, "blocks.1.hook_attn_in")  # an alias on a bridge
        model.set_use_hook_mlp_in(True)
        model.set_use_attn_in(True)
        for name in ("blocks.1.hook_mlp_in", "blocks.1.hook_attn_in"):
            assert read(model, resolve_hook(model, name)) is not None


def test_layers(hosts):
    for model in hosts[1:]:
        assert hook_layer(model, "blocks.2.hook_out") == 2
        assert hook_layer(model, "blocks.0.hook_resid_pre") == 0
        assert hook_layer(model, "hook_embed") is None
        assert hook_layer(model, "unembed.hook_in") is None
        assert stop_layer(model, "blocks.0.hook_resid_pre") == 1
        assert stop_layer(model, ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]) == 2
        assert stop_layer(model, ["hook_embed"]) == 0
        assert stop_layer(model, ["hook_embed", "ln_final.hook_normalized"]) is None
        with pytest.raises(ValueError, match="no hook"):
            stop_layer(model, ["blocks.7.hook_resid_post"])


@pytest.mark.parametrize("no_processing", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_fire_once_in_compatibility_mode(architecture, no_processing):
    bridge = make_model(architecture, "SAETransformerBridge")
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=no_processing)
    fired = read_all(bridge, {resolve_hook(bridge, name) for name in PLACES + BRIDGE_PLACES})
    assert {name: len(firings) for name, firings in fired.items()} == dict.fromkeys(fired, 1)


def gemma2_hosts():
    """A tiny Gemma 2, which normalises what attention and MLP write, in both hosts."""
    common = {"d_model": 32, "n_heads": 4, "n_key_value_heads": 2}
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=common["d_model"],
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=common["n_heads"],
        num_key_value_heads=common["n_key_value_heads"],
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=N_CTX,
        initializer_range=0.3,
        architectures=["Gemma2ForCausalLM"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    hooked_config = HookedTransformerConfig(
        **common,
        n_layers=2,
        d_head=8,
        d_mlp=48,
        n_ctx=N_CTX,
        d_vocab=VOCABULARY,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=8,
        final_rms=True,
        gated_mlp=True,
        eps=1e-6,
        use_normalization_before_and_after=True,
        attn_scale=8**0.5,
        attn_scores_soft_cap=50.0,
        output_logits_soft_cap=30.0,
        original_architecture="Gemma2ForCausalLM",
        init_weights=False,
        device="cpu",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model = Gemma2ForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in hf_model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    hooked = HookedSAETransformer(hooked_config)
    weights = convert_gemma_weights(deepcopy(hf_model), hooked_config)
    hooked.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return hooked, load_model("tiny-gemma2", hf_model=hf_model, tokenizer=make_tokenizer())


def test_sublayers_that_are_normalised_before_they_are_added():
    hooked, bridge = gemma2_hosts()
    for name in ("hook_attn_out", "hook_mlp_out", "hook_resid_mid", "hook_resid_post"):
        there = resolve_hook(bridge, f"blocks.1.{name}")
        assert_same(read(hooked, f"blocks.1.{name}"), read(bridge, there))
        assert resolve_hook(hooked, there) == f"blocks.1.{name}"
    # The MLP's own output, before that norm, is a place that HookedTransformer has no hook for.
    assert resolve_hook(bridge, "model.layers.1.mlp") == "blocks.1.mlp.hook_out"
    with pytest.raises(ValueError, match="no hook"):
        resolve_hook(hooked, "model.layers.1.mlp")


# --- attached SAEs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_where_an_sae_is_attached_the_name_says_too_little(model_class):
    model = make_model("llama", model_class)
    sae = sae_at("blocks.1.hook_resid_post")
    plain = read(model, resolve_hook(model, "blocks.1.hook_resid_post"))
    model.add_sae(retarget(sae, model))
    with pytest.raises(ValueError, match="hook_sae_input.*reset_saes"):
        resolve_hook(model, "blocks.1.hook_resid_post")
    assert_same(read(model, resolve_hook(model, "blocks.1.hook_resid_post.hook_sae_input")), plain)
    out = read(model, resolve_hook(model, "blocks.1.hook_out.hook_sae_output"))
    with torch.no_grad():
        assert_same(out, sae(plain))
    assert stop_layer(model, "blocks.1.hook_resid_post.hook_sae_output") == 2
    with pytest.raises(ValueError, match="has no hook"):
        resolve_hook(model, "blocks.1.hook_resid_post.hook_sae_nothing")
    # Naming the place, which is all that moving an SAE asks for, stays possible, and so do other places.
    assert retarget(sae_at("blocks.1.hook_out"), model).cfg.metadata.hook_name == sae.cfg.metadata.hook_name
    assert read(model, resolve_hook(model, "blocks.2.hook_resid_post")) is not None


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_hooks_fire_again_where_an_sae_was_detached(model_class):
    """A bridge clips the name of the hook point that it puts back, and then ignores hooks on it."""
    model = make_model("llama", model_class)
    model.run_with_saes(TOKENS, saes=[retarget(sae_at("blocks.1.hook_resid_post"), model)])
    assert read(model, resolve_hook(model, "blocks.1.hook_resid_post")) is not None


# --- description -----------------------------------------------------------------------------------------------------


def test_description(hosts):
    architecture, hooked, bridge = hosts
    expected = {
        "model_name": f"tiny-{architecture}",
        "normalization_type": "RMS" if architecture == "llama" else "LN",
        "writing_weights_centered": False,
        "dtype": "float32",
        "n_layers": N_LAYERS,
        "d_model": D_MODEL,
    }
    of_hooked = {"model_class_name": "HookedSAETransformer", "compatibility_mode": None}
    of_bridge = {"model_class_name": "SAETransformerBridge", "compatibility_mode": False}
    assert describe_model(hooked) == expected | of_hooked
    assert describe_model(bridge) == expected | of_bridge
    assert json.loads(json.dumps(describe_model(bridge))) == describe_model(bridge)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_description_of_processed_weights(architecture):
    hooked, bridge, unprocessed = (make_model(architecture, c) for c in (*MODEL_CLASSES, "SAETransformerBridge"))
    hooked.process_weights_()
    bridge.enable_compatibility_mode(disable_warnings=True)
    unprocessed.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    for model in (hooked, bridge):
        found = describe_model(model)
        assert found["normalization_type"] == ("RMSPre" if architecture == "llama" else "LNPre")
        assert found["writing_weights_centered"] is (architecture == "gpt2")  # an RMS norm does not allow it
    assert describe_model(bridge)["compatibility_mode"] is True
    assert describe_model(unprocessed)["normalization_type"] == ("RMS" if architecture == "llama" else "LN")
    assert describe_model(unprocessed)["writing_weights_centered"] is False


def test_a_model_without_a_tokenizer(tiny_bridge):
    assert tokenizer_of(tiny_bridge) is tiny_bridge.tokenizer
    model = make_model("llama", "HookedSAETransformer")
    model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer.*set_tokenizer"):
        tokenizer_of(model)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_from_a_directory(tmp_path, architecture, model_class):
    make_hf_model(architecture).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path, model_class=model_class, device="cpu")
    assert type(model).__name__ == model_class and not model.training
    with torch.no_grad():
        assert_same(model(TOKENS), make_hf_model(architecture)(TOKENS).logits)
    assert model.to_tokens("so").tolist() == make_model(architecture, model_class).to_tokens("so").tolist()


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_load_in_half_precision(model_class):
    model = load_model(
        "tiny", model_class=model_class, dtype="bfloat16", hf_model=make_hf_model("llama"), tokenizer=make_tokenizer()
    )
    assert describe_model(model)["dtype"] == "bfloat16"
    assert read(model, resolve_hook(model, "blocks.1.hook_out")).dtype == torch.bfloat16
    kept = load_model(
        "tiny", model_class=model_class, hf_model=make_hf_model("llama").half(), tokenizer=make_tokenizer()
    )
    assert describe_model(kept)["dtype"] == "float16"


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_a_tokenizer_from_memory_keeps_its_settings(model_class):
    tokenizer = make_tokenizer(pad="</s>")
    tokenizer.padding_side = "left"
    hosted = make_model("llama", model_class, tokenizer).tokenizer
    assert hosted("so").input_ids == [0, *tokenizer("so", add_special_tokens=False).input_ids]
    assert (hosted.pad_token, hosted.padding_side) == ("</s>", "left")
    assert hosted.chat_template == tokenizer.chat_template


def test_load_on_the_best_device_or_spread_over_devices(tmp_path):
    make_hf_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    alone, spread = (load_model(tmp_path, **how) for how in ({"device": "auto"}, {"device_map": {"": "cpu"}}))
    assert next(alone.parameters()).device.type == best
    with torch.no_grad():
        assert_same(alone(TOKENS).cpu(), spread(TOKENS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float33"}, "dtype must be a torch dtype"),
        ({"dtype": "int8"}, "dtype must be a torch dtype of floating point .*got 'int8'"),
        ({"device_map": {"": 99}}, r"device_map\[''\] is no device that is there: There is no device 'cuda:99' here"),
        ({"device_map": "cuda:99"}, "device_map, .* is no device that is there"),
        ({"device_map": "spread"}, "device_map, if not 'auto', .* is no device that is there"),
        ({"device_map": "auto", "max_memory": {99: "1GB"}}, "A key of max_memory is no device that is there"),
        ({"max_memory": {"cpu": "1GB"}}, 'max_memory bounds .* give device_map="auto" with it'),
        ({"n_devices": 99}, "n_devices=99 are more CUDA devices than"),
        ({"n_devices": 0}, "n_devices must be a whole number of at least 1, got 0"),
        ({"n_devices": 1, "device_map": "auto"}, "device_map and n_devices=1 each say how"),
        ({"model_class": "HookedSAETransformer"}, "TransformerLens lists, and 'x' is none"),
        ({"device": "cuda:99"}, "There is no device 'cuda:99' here, only"),
        ({"device": "gpu"}, 'device must be "auto", "cpu" or another device of torch, got .gpu.'),
        ({"device": "cpu", "n_devices": 2}, "device='cpu' puts the model in one place and n_devices spreads it"),
        ({"device_map": "auto", "model_class": "HookedSAETransformer"}, "device_map spreads a SAETransformerBridge"),
        ({"hf_model": "given", "trust_remote_code": True}, "trust_remote_code does not apply to hf_model"),
    ],
)
def test_load_refuses_what_does_not_go_together(options, message):
    if "hf_model" in options:
        options = options | {"hf_model": make_hf_model("llama"), "tokenizer": make_tokenizer()}
    with pytest.raises(ValueError, match=message):
        load_model("x", **options)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("name", ["/no/such/model", "./model", "a/b/c", Path("model")])
def test_a_path_without_a_folder_is_no_name(name, model_class):
    with pytest.raises(FileNotFoundError, match="(model|c) is no folder of a saved model; give one"):
        load_model(name, model_class=model_class)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_a_model_that_was_made_and_never_saved_is_hosted(model_class):
    made = make_hf_model("llama")
    made.config.architectures = None  # as configurations have it before they are saved
    model = load_model("x", model_class=model_class, hf_model=made, tokenizer=make_tokenizer())
    assert_same(model(TOKENS), make_hf_model("llama")(TOKENS).logits)


def test_what_the_converter_stumbles_over_is_said():
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = OPTForCausalLM(OPTConfig(vocab_size=320, word_embed_proj_dim=16, do_layer_norm_before=False, **sizes))
    with pytest.raises(ValueError, match="converter does not take this OPTForCausalLM .*Load it as an SAETransformer"):
        load_model("x", model_class="HookedSAETransformer", hf_model=opt, tokenizer=make_tokenizer())


def test_a_misspelt_name_has_near_ones():
    with pytest.raises(ValueError, match="'gpt3-small' is none. Did you mean .*'gpt2-small'.*SAETransformerBridge"):
        load_model("gpt3-small", model_class="HookedSAETransformer")


def test_what_is_no_hosted_model_is_told_how_to_become_one():
    with pytest.raises(ValueError, match=r"got a LlamaForCausalLM: saelens_ext.load_model\(name, hf_model=model"):
        check_model(make_hf_model("llama"))
    with pytest.raises(ValueError, match=r"got 'gpt2': saelens_ext.load_model\('gpt2'\) makes one"):
        check_model("gpt2")
    proxy = HookedProxyLM(make_hf_model("llama"), make_tokenizer())
    check_model(proxy)
    with pytest.raises(ValueError, match="got a HookedProxyLM"):
        check_model(proxy, proxy=False)


def test_code_that_comes_with_a_folder_is_run_where_it_is_trusted(tmp_path, monkeypatch):
    """The model's own class and tokenizer are asked for with what was said of them."""
    make_hf_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    code = "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    (tmp_path / "own.py").write_text(code)
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = []
    monkeypatch.setattr("saelens_ext.host.converted.get_pretrained_state_dict", _seen(made))
    for trust in (True, False):
        load_model(tmp_path, model_class="HookedSAETransformer", trust_remote_code=trust)
    assert made == ["Own", "LlamaForCausalLM"]


def _seen(made):
    """The host's reading of weights, which notes the class that they are read from."""

    def read(name, config, hf_model, **options):
        made.append(type(hf_model).__name__)
        return get_pretrained_state_dict(name, config, hf_model, **options)

    return read


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match="revision does not apply to a folder"):
        load_model(tmp_path, revision="main")


# --- moving SAEs -----------------------------------------------------------------------------------------------------


def test_retarget_renames_in_place(hosts):
    _, hooked, bridge = hosts
    sae = sae_at("model.layers.1.mlp", hook_name_out="blocks.1.hook_resid_post")
    assert retarget(sae, bridge) is sae
    assert sae.cfg.metadata.hook_name == "blocks.1.mlp.hook_out"
    assert sae.cfg.metadata.hook_name_out == "blocks.1.hook_out"
    retarget(sae, hooked)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_mlp_out"
    assert sae.cfg.metadata.hook_name_out == "blocks.1.hook_resid_post"


def test_a_retargeted_sae_does_the_same_on_both_hosts(hosts):
    _, hooked, bridge = hosts
    sae = sae_at("blocks.1.hook_resid_post")
    with torch.no_grad():
        on_hooked = hooked.run_with_saes(TOKENS, saes=[retarget(sae, hooked)])
        on_bridge = bridge.run_with_saes(TOKENS, saes=[retarget(sae, bridge)])
        assert not torch.allclose(on_hooked, hooked(TOKENS), atol=1e-2)
    assert_same(on_hooked, on_bridge)


def test_retarget_does_not_mind_the_width(tiny_bridge):
    retarget(sae_at("blocks.1.hook_resid_post", d_in=5), tiny_bridge)


def test_retarget_refuses(tiny_bridge):
    with pytest.raises(ValueError, match="records no hook name"):
        retarget(sae_at(None), tiny_bridge)
    with pytest.raises(ValueError, match="has no hook"):
        retarget(sae_at("blocks.8.hook_resid_post"), tiny_bridge)


def test_a_refused_retarget_changes_nothing(tiny_bridge):
    sae = sae_at("blocks.1.hook_resid_post", hook_name_out="blocks.8.hook_resid_post")
    with pytest.raises(ValueError, match="has no hook"):
        retarget(sae, tiny_bridge)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


@pytest.mark.parametrize(
    ("hook_name", "changes"),
    [
        ("blocks.1.hook_resid_post", True),
        ("blocks.1.hook_mlp_out", True),
        ("hook_embed", True),
        ("blocks.1.attn.hook_z", True),
        ("blocks.1.mlp.hook_in", True),
        ("blocks.1.mlp.hook_post", False),
        ("blocks.1.ln2.hook_normalized", False),
    ],
)
def test_retarget_warns_exactly_where_activations_change(hook_name, changes, tiny_gpt2_bridge, processed_bridge):
    """The warning is held against what it is about: the activations of both models at that hook."""
    processed = processed_bridge
    there, here = (read(model, resolve_hook(model, hook_name)) for model in (processed, tiny_gpt2_bridge))
    assert torch.allclose(there, here, atol=1e-3) is not changes
    sae = sae_at(hook_name, d_in=there.shape[-1], **describe_model(processed))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        retarget(sae, tiny_gpt2_bridge)
        retarget(sae, processed)
    assert [w.category for w in caught] == [UserWarning] * changes


def test_retarget_is_silent_between_hosts_of_unprocessed_weights(hosts):
    _, hooked, bridge = hosts
    retarget(sae_at("blocks.1.hook_resid_post", **describe_model(hooked)), bridge)
    retarget(sae_at("blocks.1.hook_resid_post", **describe_model(bridge)), hooked)


def test_retarget_warns_when_only_another_class_is_recorded(hosts):
    _, hooked, bridge = hosts
    for recorded, model in (("HookedTransformer", bridge), ("TransformerBridge", hooked)):
        with pytest.warns(UserWarning, match=f"{recorded}.*nothing records"):
            retarget(sae_at("blocks.1.hook_resid_post", model_class_name=recorded), model)
    retarget(sae_at("blocks.1.hook_resid_post", model_class_name="HookedTransformer"), hooked)
    retarget(sae_at("blocks.1.hook_resid_post"), bridge)  # nothing recorded, nothing to say


def test_retarget_reads_how_saelens_says_a_model_was_loaded(tiny_gpt2_bridge):
    sae = sae_at("blocks.1.hook_resid_pre", model_class_name="HookedTransformer")
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    with pytest.warns(UserWarning, match="centring"):
        retarget(sae, tiny_gpt2_bridge)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": False}
    retarget(sae, tiny_gpt2_bridge)


def test_heads_are_counted(tiny_hooked):
    """The zoo's models have heads, so that head-shaped hooks are tested as such."""
    assert tiny_hooked.cfg.n_heads == N_HEADS > 1
