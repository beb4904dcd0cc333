"""Every place that has a name, on every architecture, is read and written as on a HookedTransformer."""

from functools import cache

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from saelens_ext.host.hook_edits import edit_point, hooked
from saelens_ext.host.hook_names import _SPELLINGS, _SPELLINGS_BY_BLOCK, is_in_stream, resolve_hook
from saelens_ext.host.models import load_model
from tests import models_zoo
from tests.models_zoo import ZOO

TOKENS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
ROWS = list(dict.fromkeys(name for name, _ in (*_SPELLINGS, *_SPELLINGS_BY_BLOCK["plain"])))
PLACES = [row.replace("{}", "1") for row in ROWS]
BOTH = [name for name, row in ZOO.items() if len(row.model_classes) == 2]
BRIDGES = [name for name, row in ZOO.items() if "SAETransformerBridge" in row.model_classes]
SHOWN_ONLY = ("gptj", "gpt_neo")


@cache
def host(architecture: str, model_class: str = "SAETransformerBridge"):
    return models_zoo.make_model(architecture, model_class)


def pair(architecture: str):
    return host(architecture, "HookedSAETransformer"), host(architecture)


@torch.no_grad()
def run(model, functions):
    with hooked(model, list(functions.items())):
        return model(TOKENS, attention_mask=torch.ones_like(TOKENS))


def read(model, names) -> dict[str, torch.Tensor]:
    kept = {}
    run(model, {name: lambda x, hook=None, name=name: kept.__setitem__(name, x.clone()) for name in names})
    return kept


def noise(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.numel(), generator=torch.Generator().manual_seed(1)).reshape(x.shape)


def disturbed(model, name) -> torch.Tensor:
    return run(model, {name: lambda x, hook=None: x + noise(x)})


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.flatten(2), b.flatten(2), atol=1e-3, rtol=1e-3)


def place(model, name: str, find=resolve_hook) -> str | None:
    try:
        return find(model, name)
    except ValueError:
        return None


@pytest.mark.parametrize("architecture", BOTH)
def test_a_place_is_on_both_hosts_or_on_neither(architecture):
    hooked_model, bridge = pair(architecture)
    found = {name: (place(hooked_model, name), place(bridge, name)) for name in PLACES}
    one_sided = {name for name, (one, other) in found.items() if (one is None) != (other is None)}
    # A HookedTransformer adds zeros for the positions that ALiBi does without.
    assert one_sided == ({"hook_pos_embed"} if architecture == "bloom" else set())
    row = ZOO[architecture]
    assert (found["blocks.1.hook_resid_mid"][1] is None) == row.parallel
    assert (found["blocks.1.mlp.hook_post"][1] is None) == ("neurons" in row.refused)
    assert all(found[name][1] for name in ("hook_embed", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"))


@pytest.mark.parametrize("architecture", BOTH)
def test_every_place_is_read_and_written_alike(architecture):
    hooked_model, bridge = pair(architecture)
    plain = run(bridge, {})
    compared = 0
    for name in PLACES:
        there, here = place(hooked_model, name), place(bridge, name)
        if there is None or here is None:
            continue
        assert same(read(hooked_model, [there])[there], read(bridge, [here])[here]), f"{name} is read as {here}"
        if architecture == "olmo2" and name.endswith("mlp.hook_in"):
            continue  # see below
        moved = disturbed(bridge, edit_point(bridge, name))
        assert same(moved, disturbed(hooked_model, edit_point(hooked_model, name))), f"{name} is written as {here}"
        assert not same(moved, plain), f"a change at {here} changes nothing"
        compared += 1
    assert compared >= 9


@pytest.mark.parametrize("architecture", BOTH)
def test_every_name_of_a_bridge_is_refused_or_the_same_tensor(architecture):
    hooked_model, bridge = pair(architecture)
    fired = read(bridge, [name for name in bridge.hook_dict if name.startswith(("blocks.1.", "embed", "pos_embed"))])
    there = {name: place(hooked_model, name) for name in fired}
    # A name of both is each host's own, as that of the pattern with its different order of dimensions.
    pairs = {name: other for name, other in there.items() if other is not None and other != name}
    values = read(hooked_model, pairs.values())
    assert not [name for name, other in pairs.items() if not same(values[other], fired[name])]
    assert len(pairs) >= 8


@pytest.mark.parametrize("architecture", [name for name in BRIDGES if not ZOO[name].parallel])
def test_what_changes_in_the_middle_flows_past_the_mlp(architecture):
    bridge = host(architecture)
    middle, written, output = (
        edit_point(bridge, f"blocks.1.hook_{end}") for end in ("resid_mid", "mlp_out", "resid_post")
    )
    kept = {}

    def keep(name):
        return lambda x, hook=None: kept.__setitem__(name, x.clone())

    with hooked(bridge, [(middle, lambda x, hook=None: x + 3 * noise(x))]):
        run(bridge, {name: keep(name) for name in (middle, written, output)})
    assert not same(kept[middle], read(bridge, [middle])[middle])
    assert same(kept[output], kept[middle] + kept[written])


@pytest.mark.parametrize("architecture", [name for name in BRIDGES if ZOO[name].parallel])
def test_parallel_blocks_have_no_middle(architecture):
    with pytest.raises(ValueError, match="no middle"):
        resolve_hook(host(architecture), "blocks.1.hook_resid_mid")


@pytest.mark.parametrize("architecture", [name for name in BRIDGES if ZOO[name].experts])
def test_experts_have_no_neurons(architecture):
    for end in ("hook_pre", "hook_post", "hook_pre_linear"):
        with pytest.raises(ValueError, match="no hook|names neurons"):
            resolve_hook(host(architecture), f"blocks.1.mlp.{end}")


def test_places_that_a_model_does_not_have(tiny_bridge, tiny_gpt2_bridge):
    with pytest.raises(ValueError, match="rotary"):
        resolve_hook(tiny_bridge, "hook_pos_embed")
    with pytest.raises(ValueError, match="no hook 'blocks.1.mlp.hook_pre_linear'"):
        resolve_hook(tiny_gpt2_bridge, "blocks.1.mlp.hook_pre_linear")


@pytest.mark.parametrize(
    ("architecture", "alike"), [("llama", True), ("gemma2", False), ("olmo2", False), ("bloom", False)]
)
def test_a_module_of_hugging_face_is_what_is_added_or_refused(architecture, alike):
    proxy = HookedProxyLM(models_zoo.make_hf_model(architecture), models_zoo.make_tokenizer())
    names = [f"blocks.1.hook_{end}" for end in ("attn_out", "mlp_out")]
    found = [place(proxy, name) for name in names]
    assert found == (["model.layers.1.self_attn", "model.layers.1.mlp"] if alike else [None, None])
    assert place(proxy, "blocks.1.hook_resid_post").endswith((".layers.1", ".h.1"))


@pytest.mark.parametrize("architecture", ["llama", "bloom", *SHOWN_ONLY])
@pytest.mark.parametrize("end", ["hook_pattern", "hook_attn_scores"])
def test_a_hook_that_only_shows_cannot_be_written(architecture, end):
    name = f"blocks.1.attn.{end}"
    if architecture in SHOWN_ONLY:
        with pytest.raises(ValueError, match="only shows"):
            edit_point(host(architecture), name)
    else:
        assert edit_point(host(architecture), name) == name
    assert resolve_hook(host(architecture), name) == name


@pytest.mark.parametrize(
    ("architecture", "name"), [("llama", "ln1.hook_in"), ("pythia", "ln2.hook_in"), ("olmo2", "attn.hook_in")]
)
def test_the_stream_on_a_branch_cannot_be_written(architecture, name):
    with pytest.raises(ValueError, match="Act at 'blocks.1.hook_in'"):
        edit_point(host(architecture), f"blocks.1.{name}")


def test_without_a_norm_in_front_the_mlp_reads_the_middle():
    """Of OLMo-2: a bridge calls the middle by that name, and acts on the stream there; the other host cannot."""
    hooked_model, bridge = pair("olmo2")
    assert edit_point(bridge, "blocks.1.hook_resid_mid") == "blocks.1.mlp.hook_in"
    with pytest.raises(ValueError, match="Act at 'blocks.1.hook_resid_mid'"):
        edit_point(hooked_model, "blocks.1.mlp.hook_in")


def openai_gpt():
    config = OpenAIGPTConfig(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64, architectures=["OpenAIGPTLMHeadModel"]
    )
    return OpenAIGPTLMHeadModel(config)


def test_a_norm_behind_the_sum_leaves_no_middle_to_write():
    model = load_model("tiny", hf_model=openai_gpt().eval(), tokenizer=models_zoo.make_tokenizer(), device="cpu")
    assert read(model, [resolve_hook(model, "blocks.0.hook_resid_mid")])
    with pytest.raises(ValueError, match="can be read .* but not changed"):
        edit_point(model, "blocks.0.hook_resid_mid")
    assert edit_point(model, "blocks.0.hook_resid_pre")


def test_a_hook_that_never_fires_cannot_be_written():
    model = load_model("tiny", hf_model=openai_gpt().eval(), tokenizer=models_zoo.make_tokenizer(), device="cpu")
    with pytest.raises(ValueError, match="does not fire"):
        edit_point(model, "blocks.0.hook_resid_post")


def test_looking_for_an_effect_leaves_other_hooks_and_the_model_alone():
    model = models_zoo.make_model("gpt2", "SAETransformerBridge")
    calls, point = [], model.hook_dict["blocks.1.hook_out"]
    point.add_hook(lambda x, hook: calls.append("outer"))
    model.train()
    edit_point(model, "blocks.1.hook_resid_mid")
    edit_point(model, "blocks.1.hook_resid_post")
    assert calls == [] and model.training and all(module.training for module in model.blocks)
    model.eval()
    run(model, {})
    assert calls == ["outer"] and [len(p.fwd_hooks) for p in set(model.hook_dict.values()) if p.fwd_hooks] == [1]
    assert not any(p._forward_pre_hooks for p in model.hook_dict.values())


def test_a_width_alone_makes_no_direction_of_the_stream(tiny_hooked, tiny_bridge):
    """The activations of the heads are as wide as the residual stream."""
    for model in (tiny_hooked, tiny_bridge):
        assert read(model, [resolve_hook(model, "blocks.1.attn.hook_z")]).popitem()[1].flatten(2).shape[-1] == 32
        for end, expected in (("hook_resid_mid", True), ("hook_mlp_out", True), ("attn.hook_z", False)):
            assert is_in_stream(model, f"blocks.1.{end}") is expected
        assert is_in_stream(model, "hook_embed") and not is_in_stream(model, "ln_final.hook_normalized")
    assert not is_in_stream(host("gemma2"), "blocks.1.mlp.hook_out"), "what is added is normalised first"
    assert is_in_stream(host("granite"), "blocks.1.hook_mlp_out")
