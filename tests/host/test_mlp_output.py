"""Directions over neurons, against what the model itself writes into the residual stream when they are added."""

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
)

from saelens_ext import SNMFDictionary
from saelens_ext.host.mlp_output import residual_directions
from saelens_ext.host.models import load_model, resolve_hook, retarget
from tests import models_zoo
from tests.models_zoo import D_MLP, D_MODEL

LAYER, TOKENS = 1, torch.tensor([[0, 5, 6, 9, 44]])
NEURONS = f"blocks.{LAYER}.mlp.hook_post"
HOSTS = ("HookedSAETransformer", "SAETransformerBridge", "compatibility mode")
_models: dict[tuple[str, str], object] = {}


def host(architecture: str, kind: str):
    """A tiny model of an architecture, made once."""
    if (architecture, kind) not in _models:
        model = models_zoo.make_model(architecture, HOSTS[1] if kind == HOSTS[2] else kind)
        if kind == HOSTS[2]:
            model.enable_compatibility_mode()
        _models[architecture, kind] = model
    return _models[architecture, kind]


def features_of(architecture: str, k: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(k, D_MLP[architecture], generator=generator)
    return rows * (torch.rand(rows.shape, generator=generator) < 0.3)


@torch.no_grad()
def written(model, edit, out: str = "hook_mlp_out") -> torch.Tensor:
    """What block ``LAYER`` adds to the residual stream for its MLP, with the neurons edited."""
    seen: list[torch.Tensor] = []
    hooks = [
        (resolve_hook(model, NEURONS), lambda x, hook: edit(x)),
        (resolve_hook(model, f"blocks.{LAYER}.{out}"), lambda x, hook: seen.append(x.clone())),
    ]
    with model.hooks(fwd_hooks=hooks):
        model(TOKENS)
    return seen[0]


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("architecture", models_zoo.ARCHITECTURES)
@pytest.mark.parametrize("alpha", [-3.0, 0.5])
def test_adding_a_feature_changes_the_residual_stream_by_its_direction(architecture, kind, alpha):
    model, features = host(architecture, kind), features_of(architecture)
    directions = residual_directions(model, features, hook_name=NEURONS)
    plain = written(model, lambda x: x, "hook_resid_post")
    for feature, direction in zip(features, directions, strict=True):
        changed = written(model, lambda x: x + alpha * feature, "hook_resid_post")
        assert torch.allclose(changed - plain, (alpha * direction).expand_as(plain), atol=2e-4)


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("architecture", models_zoo.GEMMAS)
@pytest.mark.parametrize("alpha", [-2.0, 0.5, 100.0])
def test_behind_a_norm_it_is_what_the_feature_alone_writes(architecture, kind, alpha):
    model, features = host(architecture, kind), features_of(architecture)
    directions = residual_directions(model, features, layer=LAYER)
    for feature, direction in zip(features, directions, strict=True):
        alone = written(model, lambda x: (alpha * feature).expand_as(x).clone())
        assert torch.allclose(alone, (direction if alpha > 0 else -direction).expand_as(alone), atol=1e-4)


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("architecture", models_zoo.GEMMAS)
def test_behind_a_norm_a_small_change_of_other_activations_is_as_the_documentation_says(architecture, kind):
    model, feature = host(architecture, kind), features_of(architecture, 1)
    direction = residual_directions(model, feature, layer=LAYER)[0]
    plain, step = written(model, lambda x: x), 1e-3
    measured = (written(model, lambda x: x + step * feature[0]) - plain) / step
    block = model.blocks[LAYER]
    neurons: list[torch.Tensor] = []
    written(model, lambda x: neurons.append(x.clone()) or x)
    m, v = neurons[0] @ block.mlp.W_out.detach(), feature[0] @ block.mlp.W_out.detach()
    gains = direction * v.square().mean().sqrt() / v
    along = (m @ v / m.square().sum(dim=-1))[..., None] * m
    expected = gains * (v - along) / m.square().mean(dim=-1, keepdim=True).sqrt()
    assert torch.allclose(measured, expected, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", [*models_zoo.ARCHITECTURES, *models_zoo.GEMMAS])
def test_both_model_classes_agree(architecture):
    features = features_of(architecture)
    hooked, bridged = (residual_directions(host(architecture, kind), features, layer=0) for kind in HOSTS[:2])
    assert torch.allclose(hooked, bridged, atol=1e-5)


@pytest.mark.parametrize("kind", HOSTS[:2])
def test_opposite_scaled_and_empty_features(kind):
    features = features_of("gemma2")
    features[1] = 0
    for architecture in ("gemma2", "llama"):
        model = host(architecture, kind)
        directions = residual_directions(model, features, layer=LAYER)
        assert torch.equal(residual_directions(model, -features, layer=LAYER), -directions)
        assert torch.equal(directions[1], torch.zeros(D_MODEL)) and bool(directions.isfinite().all())
        assert residual_directions(model, features[:0], layer=LAYER).shape == (0, D_MODEL)
    tiny = residual_directions(host("gemma2", kind), 1e-6 * features, layer=LAYER)
    assert torch.allclose(tiny, residual_directions(host("gemma2", kind), features, layer=LAYER), atol=1e-4)


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("name", [NEURONS, f"blocks.{LAYER}.mlp.out.hook_in"])
def test_every_name_of_the_neurons_will_do(kind, name):
    model, features = host("llama", kind), features_of("llama")
    found = residual_directions(model, features, hook_name=name)
    assert torch.equal(found, residual_directions(model, features, layer=LAYER))


@pytest.mark.parametrize("kind", HOSTS[:2])
def test_of_dictionaries(kind):
    model, features = host("llama", kind), features_of("llama")
    snmf = SNMFDictionary.from_features(features, metadata={"hook_name": NEURONS})
    expected = residual_directions(model, features, layer=LAYER)
    assert torch.equal(residual_directions(model, snmf), expected) and torch.equal(
        snmf.residual_directions(model), expected
    )
    assert torch.equal(snmf.residual_directions(model, layer=0), residual_directions(model, features, layer=0))
    standard = StandardSAE(StandardSAEConfig(d_in=D_MLP["llama"], d_sae=5))
    with pytest.raises(ValueError, match="Nothing says whose neurons"):
        residual_directions(model, standard)
    standard.cfg.metadata.hook_name = NEURONS
    assert torch.equal(
        residual_directions(model, standard), residual_directions(model, standard.W_dec.detach(), layer=LAYER)
    )


@pytest.mark.parametrize("kind", HOSTS[:2])
def test_what_is_attached_or_hooked_does_not_matter(kind):
    model, features = host("gemma2", kind), features_of("gemma2")
    expected = residual_directions(model, features, layer=LAYER)
    inside = SNMFDictionary.from_features(features, metadata={"hook_name": NEURONS})
    behind = SNMFDictionary.from_features(features[:, :D_MODEL], metadata={"hook_name": f"blocks.{LAYER}.hook_mlp_out"})
    point = resolve_hook(model, f"blocks.{LAYER}.ln2_post.hook_normalized")
    with model.saes([retarget(inside, model), retarget(behind, model)]):
        with model.hooks(fwd_hooks=[(point, lambda x, hook: 3 * x)]):
            assert torch.equal(inside.residual_directions(model), expected)


@pytest.mark.parametrize("kind", HOSTS[:2])
def test_in_half_precision_the_product_is_not_rounded(kind):
    hf_model = models_zoo.make_hf_model("gpt2").bfloat16()
    model = load_model("tiny", model_class=kind, hf_model=hf_model, tokenizer=models_zoo.make_tokenizer(), device="cpu")
    features = features_of("gpt2")
    directions = residual_directions(model, features, layer=LAYER)
    assert directions.dtype == torch.float32 and torch.allclose(
        directions, features @ model.blocks[LAYER].mlp.W_out.float(), atol=1e-5
    )
    assert residual_directions(model, features.double(), layer=LAYER).dtype == torch.float64


def test_a_model_with_norms_only_behind():
    options = {
        "vocab_size": models_zoo.VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
        "architectures": ["Olmo2ForCausalLM"],
    }
    hf_model = Olmo2ForCausalLM(Olmo2Config(**options, **models_zoo.SPECIAL_IDS)).eval()
    for layer in hf_model.model.layers:
        layer.post_feedforward_layernorm.weight.data.uniform_(0.5, 2)
    model = load_model("tiny-olmo2", hf_model=hf_model, tokenizer=models_zoo.make_tokenizer(), device="cpu")
    features = features_of("llama", 2)
    directions = residual_directions(model, features, layer=LAYER)
    alone = written(model, lambda x: (3 * features[0]).expand_as(x).clone())
    assert torch.allclose(alone, directions[0].expand_as(alone), atol=1e-4)


@pytest.mark.parametrize("kind", HOSTS[:2])
@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_post", "blocks.2.mlp.hook_pre", "blocks.2.hook_mlp_out"])
def test_a_hook_that_is_not_of_neurons_is_refused_by_name(kind, hook):
    model = host("llama", kind)
    with pytest.raises(ValueError) as refused:
        residual_directions(model, features_of("llama"), hook_name=hook)
    for part in (hook, resolve_hook(model, "blocks.2.mlp.hook_post"), "layer="):
        assert part in str(refused.value)


@pytest.mark.parametrize("kind", HOSTS[:2])
@pytest.mark.parametrize(
    "features, options, message",
    [
        (torch.ones(2, 64), {"hook_name": "hook_embed"}, "'blocks.L.mlp.hook_post'"),
        (torch.ones(2, 64), {"hook_name": "blocks.7.mlp.hook_post"}, "has no hook"),
        (torch.ones(2, 64), {"hook_name": NEURONS, "layer": 1}, "not both"),
        (torch.ones(2, 64), {"layer": 3}, "layer must be one of 0 to 2"),
        (torch.ones(2, 64), {"layer": -1}, "layer must be one of 0 to 2"),
        (torch.ones(2, 64), {}, "Nothing says whose neurons"),
        (torch.ones(2, 32), {"layer": 1}, r"shape \(k, 64\)"),
        (torch.ones(64), {"layer": 1}, r"shape \(k, 64\)"),
        (torch.full((2, 64), torch.nan), {"layer": 1}, "non-finite"),
    ],
)
def test_bad_input_is_a_clear_error(kind, features, options, message):
    with pytest.raises(ValueError, match=message):
        residual_directions(host("llama", kind), features, **options)


@pytest.mark.parametrize("kind", HOSTS[:2])
def test_a_mixture_of_experts_has_no_output_matrix(kind):
    options = {
        "vocab_size": models_zoo.VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "architectures": ["MixtralForCausalLM"],
    }
    hf_model = MixtralForCausalLM(MixtralConfig(**options, **models_zoo.SPECIAL_IDS)).eval()
    model = load_model(
        "tiny-moe", model_class=kind, hf_model=hf_model, tokenizer=models_zoo.make_tokenizer(), device="cpu"
    )
    with pytest.raises(ValueError, match="no single output matrix"):
        residual_directions(model, torch.ones(2, 64), layer=1)


# --- what scales an MLP's output behind its output matrix ---

DENSE = [(name, kind) for name, kind in models_zoo.HOSTED if not models_zoo.ZOO[name].experts]
PLAIN = [(name, kind) for name, kind in DENSE if not models_zoo.ZOO[name].post_norm]


def assert_a_feature_adds_its_direction(model, features, alpha):
    directions = residual_directions(model, features, layer=LAYER)
    plain = written(model, lambda x: x, "hook_resid_post")
    for feature, direction in zip(features, directions, strict=True):
        changed = written(model, lambda x: x + alpha * feature, "hook_resid_post")
        torch.testing.assert_close(changed - plain, (alpha * direction).expand_as(plain), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("architecture", "kind"), PLAIN)
def test_what_a_feature_adds_to_the_stream_on_every_architecture(architecture, kind):
    assert_a_feature_adds_its_direction(host(architecture, kind), features_of(architecture, 2), -3.0)


@pytest.mark.parametrize(
    ("architecture", "kind"), [(name, kind) for name, kind in DENSE if models_zoo.ZOO[name].post_norm]
)
def test_behind_a_norm_on_every_architecture(architecture, kind):
    model, features = host(architecture, kind), features_of(architecture, 2)
    for feature, direction in zip(features, residual_directions(model, features, layer=LAYER), strict=True):
        alone = written(model, lambda x: (3 * feature).expand_as(x).clone())
        torch.testing.assert_close(alone, direction.expand_as(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attached", [False, True])
def test_a_residual_multiplier_in_compatibility_mode_and_with_what_is_attached(attached):
    model, features = host("granite", HOSTS[2]), features_of("granite", 2)
    expected = 0.5 * features @ model.blocks[LAYER].mlp.W_out.detach()
    place = resolve_hook(model, f"blocks.{LAYER}.hook_resid_post")
    behind = SNMFDictionary.from_features(features[:, :D_MODEL], metadata={"hook_name": place})
    with model.hooks(fwd_hooks=[(place, lambda x, hook: 3 * x)]):
        if attached:
            fresh = models_zoo.make_model("granite", HOSTS[1])
            with fresh.saes([retarget(behind, fresh)]):
                torch.testing.assert_close(residual_directions(fresh, features, layer=LAYER), expected)
        torch.testing.assert_close(residual_directions(model, features, layer=LAYER), expected)


def other_bridge(made, config, **options):
    common = {
        "vocab_size": models_zoo.VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "architectures": [made.__name__],
    }
    hf_model = made(config(**common | options, **models_zoo.SPECIAL_IDS)).eval()
    return load_model("tiny", hf_model=hf_model, tokenizer=models_zoo.make_tokenizer(), device="cpu")


def test_a_scale_that_no_attribute_of_the_host_tells():
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    model = other_bridge(FalconH1ForCausalLM, FalconH1Config, mlp_multipliers=[0.7, 0.6], **sizes)
    features = features_of("llama", 2)
    assert_a_feature_adds_its_direction(model, features, 2.0)
    torch.testing.assert_close(
        residual_directions(model, features, layer=0), 0.6 * features @ model.blocks[0].mlp.W_out.detach()
    )


def test_a_scale_of_half_precision_is_the_hosts_own():
    hf_model = models_zoo.make_hf_model("granite").bfloat16()
    model = load_model("tiny", hf_model=hf_model, tokenizer=models_zoo.make_tokenizer(), device="cpu")
    features = features_of("granite", 2)
    expected = 0.5 * features @ model.blocks[LAYER].mlp.W_out.detach().float()
    torch.testing.assert_close(residual_directions(model, features, layer=LAYER), expected)


def test_a_scale_is_tried_once_for_a_model(monkeypatch):
    from saelens_ext.host import mlp_output

    calls, measured = [], mlp_output._measured_scale
    monkeypatch.setattr(mlp_output, "_measured_scale", lambda *args: calls.append(args[1]) or measured(*args))
    model = models_zoo.make_model("granite", HOSTS[1])
    for layer in (0, 1, 0, 1):
        residual_directions(model, features_of("granite"), layer=layer)
    assert calls == [0, 1]


def test_what_is_no_scale_is_refused():
    model = models_zoo.make_model("llama", HOSTS[1])
    block = model.blocks[LAYER]
    block.mlp.register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(ValueError, match="more than a norm and a scale"):
        residual_directions(model, features_of("llama"), layer=LAYER)
    residual_directions(model, features_of("llama"), layer=0)
