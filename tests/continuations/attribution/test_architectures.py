"""Attribution on every architecture: complete, or refused with a reason and with the backends that were found to work.

The target is the model's own mean demeaned logit; the two host classes have the same weights.
"""

import gc
import re
from functools import cache

import pytest
import torch
import transformers

from saelens_ext.continuations.attribution import shown
from saelens_ext.continuations.attribution.attribute import attribute_continuations, attribution_completeness
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.continuations.source_table import KINDS
from saelens_ext.host.models import load_model, resolve_hook
from tests.continuations._dictionaries import make
from tests.models_zoo import (
    D_MODEL,
    HOSTED,
    MODEL_CLASSES,
    N_CTX,
    N_HEADS,
    SPECIAL_IDS,
    VOCABULARY,
    ZOO,
    make_hf_model,
    make_model,
    make_tokenizer,
)

HOOKED, BRIDGE = MODEL_CLASSES
BACKENDS = ("linear", "gradient", "relp")
ALL = {"kinds": KINDS, "special_positions": True, "max_sources": 10**6}
TEXTS = [[70, 9, 104], [33], [120, 121]]
# Bridges whose attention only shows its pattern.
SHOWN_ONLY = ("gptj", "gpt_neo")


def refused(architecture, model_class, backend):
    """Whether a backend must be refused on a host."""
    if backend == "relp" and ZOO[architecture].experts:
        return True
    return backend != "gradient" and model_class == BRIDGE and architecture in SHOWN_ONLY


@cache
def made(architecture, model_class):
    """A model and continuations scored with it."""
    model = make_model(architecture, model_class)
    return model, score_continuations(model, "The assert statement", TEXTS)


on_every_host = pytest.mark.parametrize(
    ("architecture", "model_class"), HOSTED, ids=lambda value: value.replace("SAETransformer", "")
)


def own_targets(model, found):
    """The target in two loops, from the model's own logits."""
    targets = []
    for row in range(len(found)):
        ids = [*found.prefix_ids, *found.ids_of(row)]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0].float()
        cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
        logits = cap * torch.atanh(logits / cap) if cap > 0 else logits
        columns = range(len(found.prefix_ids), len(ids))
        targets.append(sum(logits[t - 1, ids[t]] - logits[t - 1].mean() for t in columns) / len(columns))
    return torch.stack(targets)


@on_every_host
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_target_is_the_models_own_or_the_backend_is_refused(architecture, model_class, backend):
    model, found = made(architecture, model_class)
    if refused(architecture, model_class, backend):
        with pytest.raises(ValueError, match="does not work here"):
            attribute_continuations(model, [], found, backend=backend)
        return
    attributed = attribute_continuations(model, [], found, backend=backend, **ALL)
    torch.testing.assert_close(attributed.columns["target"], own_targets(model, found), rtol=1e-4, atol=1e-5)
    assert attributed.signatures.isfinite().all() and attributed.signatures.abs().max() > 1e-3


def parts_of_blocks(architecture):
    """Dictionaries of what a sublayer of each block writes, or of its neurons; the stream is described by none."""
    found = [make("standard", "blocks.0.hook_attn_out"), make("standard", "blocks.1.hook_mlp_out")]
    if not ZOO[architecture].experts:
        found.append(make("standard", "blocks.2.mlp.hook_post", ZOO[architecture].d_mlp))
    return found


@on_every_host
def test_the_linear_sources_make_up_the_target(architecture, model_class):
    model, found = made(architecture, model_class)
    dictionaries = parts_of_blocks(architecture)
    if refused(architecture, model_class, "linear"):
        with pytest.raises(ValueError, match=r"blocks.0.attn.hook_pattern.*cannot be frozen"):
            attribution_completeness(model, dictionaries, found)
        return
    parts = attribution_completeness(model, dictionaries, found)
    whole = parts.prefix + parts.continuation + parts.bias
    torch.testing.assert_close(whole, own_targets(model, found), rtol=1e-4, atol=1e-5)
    attributed = attribute_continuations(model, dictionaries, found, **ALL)
    cut = torch.tensor([hook in attributed.metadata["attribution"]["cut"] for hook in attributed.sources.hooks])
    torch.testing.assert_close(attributed.signatures[:, cut].sum(dim=1), parts.prefix, rtol=1e-4, atol=1e-5)
    for index in range(len(dictionaries)):
        mine = torch.tensor([dictionary == index for dictionary in attributed.sources.dictionaries])
        assert attributed.signatures[:, mine].abs().max() > 1e-4


@on_every_host
def test_neurons_that_a_mixture_does_not_have_are_refused(architecture, model_class):
    if ZOO[architecture].experts:
        model, found = made(architecture, model_class)
        with pytest.raises(ValueError, match="no hook|no single output matrix"):
            attribute_continuations(model, make("standard", "blocks.1.mlp.hook_post", 64), found)


BOTH = [name for name, row in ZOO.items() if len(row.model_classes) == 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", BOTH)
def test_both_hosts_agree_where_neither_refuses(architecture, backend):
    if any(refused(architecture, model_class, backend) for model_class in MODEL_CLASSES):
        return
    dictionaries = [make("standard", "blocks.1.hook_resid_post"), *parts_of_blocks(architecture)]
    hooked, bridged = (
        attribute_continuations(model, dictionaries, found, backend=backend, verify=False, **ALL).signatures
        for model, found in (made(architecture, model_class) for model_class in MODEL_CLASSES)
    )
    torch.testing.assert_close(hooked, bridged, rtol=1e-3, atol=1e-3 * float(hooked.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_middle_of_a_block_whose_mlp_reads_the_stream_itself(backend):
    # OLMo 2 has its norms behind: the bridge reads the middle off the MLP's input, and the skip path runs past it.
    found = []
    for model_class in MODEL_CLASSES:
        model, scored = made("olmo2", model_class)
        dictionary = make("standard", "blocks.1.hook_resid_mid")
        found.append(attribute_continuations(model, dictionary, scored, backend=backend, **ALL).signatures)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "olmo2"])
def test_the_output_of_an_mlp_in_front_of_its_norm_leads_on(architecture):
    model, scored = made(architecture, BRIDGE)
    parts = attribution_completeness(model, make("standard", "blocks.1.mlp.out.hook_out"), scored)
    torch.testing.assert_close(
        parts.prefix + parts.continuation + parts.bias, own_targets(model, scored), rtol=1e-4, atol=1e-5
    )
    neurons = make("standard", "blocks.1.mlp.hook_post", ZOO[architecture].d_mlp)
    with pytest.raises(ValueError, match="inside the same MLP"):
        attribute_continuations(model, [neurons, make("standard", "blocks.1.hook_mlp_out")], scored)


# --- what a refusal says ---------------------------------------------------------------------------------------------


def named(message):
    """The backends that a refusal says remain."""
    remaining = message.rpartition("backend=")[2]
    return re.findall(r"'(\w+)'", remaining) if "remain" in remaining else []


REFUSED = [(*pair, backend) for pair in HOSTED for backend in ("linear", "relp") if refused(*pair, backend)]


@pytest.mark.parametrize(("architecture", "model_class", "backend"), REFUSED)
def test_a_refusal_names_what_works_and_it_does(architecture, model_class, backend):
    model, found = made(architecture, model_class)
    with pytest.raises(ValueError) as error:
        attribute_continuations(model, [], found, backend=backend)
    others = [name for name in BACKENDS if name != backend and not refused(architecture, model_class, name)]
    assert named(str(error.value)) == others
    for other in others:
        attribute_continuations(model, [], found, backend=other)


SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
    "initializer_range": 0.3,
}
FURTHER = {
    # The pattern is only shown; it is not there; the host fails when a norm's scale is set; it forgets that this
    # norm's gain is 1 + w when the scale is set; a state space model beside the attention.
    "XGLM": (
        {"d_model": D_MODEL, "ffn_dim": 64, "num_layers": 2, "attention_heads": N_HEADS, "init_std": 0.3},
        "hook_pattern",
    ),
    "OPT": ({"ffn_dim": 64, "word_embed_proj_dim": D_MODEL, "init_std": 0.3}, "hook_pattern"),
    "Olmo": ({}, "The host fails when .* norm scales are edited: AttributeError"),
    "Nemotron": ({"num_key_value_heads": N_HEADS}, "computes a norm differently"),
    "FalconH1": (
        {
            "num_key_value_heads": 2,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        "not linear",
    ),
}


@pytest.mark.parametrize("backend", ["linear", "relp"])
@pytest.mark.parametrize("family", FURTHER)
def test_further_models_that_do_not_let_themselves_be_frozen(family, backend):
    options, reason = FURTHER[family]
    config = getattr(transformers, f"{family}Config")(
        **SIZE | SPECIAL_IDS | options, architectures=[f"{family}ForCausalLM"]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model = load_model(f"tiny-{family}", hf_model=hf_model, tokenizer=make_tokenizer(), device="cpu")
    found = score_continuations(model, "The assert statement", TEXTS)
    with pytest.raises(ValueError, match=reason) as error:
        attribute_continuations(model, [], found, backend=backend)
    assert named(str(error.value)) == ["gradient"]
    with pytest.raises(ValueError, match=reason):
        attribution_completeness(model, [], found) if backend == "linear" else attribute_continuations(
            model, [], found, backend=backend, verify=False
        )
    attributed = attribute_continuations(model, [], found, backend="gradient")
    torch.testing.assert_close(attributed.columns["target"], own_targets(model, found), rtol=1e-4, atol=1e-5)


def test_a_hook_that_no_backend_leads_on_from():
    model = make_model("gptj", BRIDGE)
    found = score_continuations(model, "The assert statement", TEXTS)
    width = ZOO["gptj"].d_mlp
    sae = make("standard", resolve_hook(model, "blocks.1.mlp.hook_post"), width)
    model.blocks[1].mlp.out.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    model.blocks[1].mlp.out.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match="no path that this backend keeps") as error:
        attribute_continuations(model, sae, found, backend="gradient")
    assert named(str(error.value)) == [] and "No other" in str(error.value)


# --- other precisions and contexts ---


@pytest.mark.parametrize("backend", ["linear", "relp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gptj", "bloom", "granite"])
def test_half_precision_is_refused_where_full_precision_is(architecture, dtype, backend):
    hf_model = make_hf_model(architecture).to(dtype)
    model = load_model("tiny", hf_model=hf_model, tokenizer=make_tokenizer(), device="cpu")
    found = score_continuations(model, "The assert statement", TEXTS)
    if refused(architecture, BRIDGE, backend):
        with pytest.raises(ValueError, match="hook_pattern.*'gradient' remains"):
            attribute_continuations(model, [], found, backend=backend)
    else:
        attributed = attribute_continuations(model, [], found, backend=backend, **ALL).signatures
        exact_model, exact_found = made(architecture, BRIDGE)
        exact = attribute_continuations(exact_model, [], exact_found, backend=backend, **ALL).signatures
        assert torch.nn.functional.cosine_similarity(attributed, exact).min() > 0.9


def test_what_is_around_a_call_does_not_decide_what_is_refused():
    for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model = make_model("llama", BRIDGE)
        with context:
            for backend in ("linear", "relp"):
                shown.check_backend(model, backend)


# --- trying out ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_tried_once_for_each_backend(monkeypatch):
    tried, fault = [], shown._fault
    monkeypatch.setattr(shown, "_fault", lambda model, backend: tried.append(backend) or fault(model, backend))
    model = make_model("llama", BRIDGE)
    found = score_continuations(model, "The assert", TEXTS)
    for backend in (*BACKENDS, *BACKENDS):
        attribute_continuations(model, [], found, backend=backend)
    assert tried == list(BACKENDS)
    attribute_continuations(make_model("llama", BRIDGE), [], found)
    assert tried == [*BACKENDS, "linear"], "another model is tried anew"
    model.add_hook("blocks.1.attn.hook_pattern", lambda x, hook: x)
    attribute_continuations(model, [], found)
    assert tried[-2:] == ["linear", "linear"], "so is one that a hook was added to"


def test_what_was_found_out_does_not_keep_a_model():
    model = make_model("gpt2", HOOKED)
    attribute_continuations(model, [], score_continuations(model, "The assert", TEXTS))
    known = len(shown._FAULTS)
    del model
    gc.collect()
    assert len(shown._FAULTS) < known


@pytest.mark.parametrize("backend", BACKENDS)
def test_trying_leaves_no_trace(backend):
    model = make_model("granite", BRIDGE)
    found = score_continuations(model, "The assert", TEXTS)
    before = model(torch.tensor([[5, 6, 7]]))
    attribute_continuations(model, make("standard", "blocks.1.hook_mlp_out"), found, backend=backend)
    assert all(not point.fwd_hooks and not point.bwd_hooks for point in model.hook_dict.values())
    assert torch.equal(model(torch.tensor([[5, 6, 7]])), before)
