"""OPT-350M's shape: a block norms the residual stream itself behind each sum, and embeddings are narrower than it.

What the laws of the other architectures take from sums is taken here from hooks of torch on the Hugging Face model.
"""

import pytest
import torch
from transformers import OPTForCausalLM

from saelens_ext import ActivationStream, ExemplarPartition
from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.host.models import load_model, retarget
from saelens_ext.host.prompt_passes import CachedPasses, logits_of
from saelens_ext.steering.interventions import add_direction
from tests.architectures._hosts import LAYER, TOKENS, normal, run
from tests.continuations._dictionaries import make
from tests.models_zoo import D_MODEL, NORMED_STREAM, make_hf_model, make_model, make_tokenizer

BLOCK = f"blocks.{LAYER}"
# Each place, the module that it lies at, and whether it is what goes in or what comes out.
PLACES = {
    "hook_embed": ("embed_tokens", "out"),
    f"{BLOCK}.hook_resid_pre": (f"layers.{LAYER}", "in"),
    f"{BLOCK}.hook_attn_out": (f"layers.{LAYER}.self_attn", "out"),
    f"{BLOCK}.hook_resid_mid": (f"layers.{LAYER}.self_attn_layer_norm", "out"),
    f"{BLOCK}.mlp.hook_pre": (f"layers.{LAYER}.fc1", "out"),
    f"{BLOCK}.mlp.hook_post": (f"layers.{LAYER}.fc2", "in"),
    f"{BLOCK}.hook_mlp_out": (f"layers.{LAYER}.fc2", "out"),
    f"{BLOCK}.hook_resid_post": (f"layers.{LAYER}", "out"),
}
# Where a direction is added to what flows on.
STREAM = [name for name in PLACES if "hook_resid" in name or name.endswith("_out")]


@pytest.fixture(scope="module")
def model():
    return make_model("opt_350m", "SAETransformerBridge")


@torch.no_grad()
def plain_run(tokens, change=None, at=None):
    """Logits and activations of the Hugging Face model; with ``change`` of what stands at a place."""
    hf_model, seen = make_hf_model("opt_350m"), {}
    for name, (path, side) in PLACES.items():
        module = hf_model.model.decoder.get_submodule(path)

        def keep(value, name=name):
            seen[name] = value.reshape(*tokens.shape, -1).clone()
            return change(value) if name == at else value

        def enter(_, args, kwargs, keep=keep):
            if args:
                return (keep(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": keep(kwargs["hidden_states"])}

        def leave(_, args, output, keep=keep):
            return (keep(output[0]), *output[1:]) if isinstance(output, tuple) else keep(output)

        if side == "in":
            module.register_forward_pre_hook(enter, with_kwargs=True)
        else:
            module.register_forward_hook(leave)
    return hf_model(tokens).logits, seen


def test_it_is_the_hugging_face_model_at_every_place(model):
    expected, there = plain_run(TOKENS)
    assert there["hook_embed"].shape[-1] == D_MODEL // 2
    logits, seen = run(model, list(PLACES))
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
    assert set(seen) == set(there)
    for name, activations in seen.items():
        torch.testing.assert_close(activations, there[name], rtol=1e-4, atol=5e-5)


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
def test_the_other_host_class_refuses_it():
    with pytest.raises(ValueError, match="Load it as an SAETransformerBridge"):
        make_model("opt_350m", "HookedSAETransformer")


def test_a_stream_reads_every_place(model):
    texts = ["The assert statement, é ☃ (x)", "One", "Assertions are the most convenient way of it all, and more"]
    stream = ActivationStream(model, texts, list(PLACES), context_size=12, batch_size=3, exclude_special_tokens=False)
    n_windows = 0
    for batch in stream:
        for number, window in enumerate(batch.windows, batch.first_sequence_id):
            _, there = plain_run(window[window >= 0][None])
            for name, expected in there.items():
                read = batch.activations[name][batch.sequence_ids == number]
                torch.testing.assert_close(read, expected[0], rtol=1e-4, atol=5e-5)
            n_windows += 1
    assert n_windows > len(texts)


@pytest.mark.parametrize("place", STREAM)
def test_a_direction_is_added_to_what_flows_on(model, place):
    direction = normal(D_MODEL)
    expected, _ = plain_run(TOKENS, lambda x: x - 1.5 * direction / direction.norm(), place)
    with add_direction(model, place, direction, -1.5):
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(TOKENS), plain_run(TOKENS)[0], rtol=0, atol=5e-5)


def test_padding_and_a_cache_change_nothing(model):
    expected, _ = plain_run(TOKENS)
    with torch.no_grad():
        mask = (torch.arange(TOKENS.shape[1]) < torch.tensor([[TOKENS.shape[1]], [9]])).long()
        padded = logits_of(model, TOKENS, mask)
        torch.testing.assert_close(padded[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
        passes = CachedPasses(model, TOKENS[:, :5])
        for column in range(5, TOKENS.shape[1] + 1):
            torch.testing.assert_close(passes.logits(), expected[:, column - 1], rtol=1e-4, atol=1e-4)
            if column < TOKENS.shape[1]:
                passes.append(TOKENS[:, column])


@pytest.mark.parametrize("backend", ["linear", "relp"])
def test_patterns_that_are_only_shown_are_not_frozen(model, backend):
    found = score_continuations(model, "The assert statement", [[70, 9, 44], [8]])
    with pytest.raises(ValueError, match="pattern"):
        attribute_continuations(model, make("standard", f"{BLOCK}.hook_resid_post"), found, backend=backend)


def test_it_is_the_same_from_a_folder(tmp_path, model):
    make_hf_model("opt_350m").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path, device="cpu")(TOKENS), model(TOKENS))


@pytest.fixture(params=[False, True], ids=["norms_last", "norms_first"])
def opt(request):
    """This shape, and that of the other sizes."""
    config = NORMED_STREAM["opt_350m"].make_config()
    config.do_layer_norm_before = request.param
    torch.manual_seed(0)
    return load_model("tiny-opt", hf_model=OPTForCausalLM(config).eval(), tokenizer=make_tokenizer())


@pytest.mark.parametrize("place", ["hook_resid_mid", "mlp.hook_post", "hook_mlp_out", "hook_resid_post"])
@pytest.mark.filterwarnings("ignore:.* is the middle of a block:UserWarning")
def test_where_a_dictionary_is_or_was_tokens_are_read_one_by_one(opt, place):
    """The MLP of this architecture sees the tokens of all texts in one row."""
    model, name = opt, f"{BLOCK}.{place}"
    logits, before = run(model, [name])
    rows = torch.nn.functional.normalize(normal(16, before[name].shape[-1]), dim=1)
    sae = ExemplarPartition.from_regions(rows, rows, 0 * rows[0], 0.9, k=3, metadata={"hook_name": name})
    retarget(sae, model)
    for tokens in (TOKENS, TOKENS[:1, :5]):
        there, wanted = before[name][: len(tokens), : tokens.shape[1]], logits[: len(tokens), : tokens.shape[1]]
        with torch.no_grad():
            restored, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
            replaced = model.run_with_saes(tokens, saes=[sae], use_error_term=False)
        (codes,) = [cache[key] for key in cache if key.endswith("hook_sae_acts_post")]
        torch.testing.assert_close(codes, sae.encode(there).detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(restored, wanted, rtol=0, atol=1e-5)
        assert (replaced - wanted).abs().max() > 1e-2
        again, after = run(model, [name])
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5)


def test_a_transcoder_of_its_mlp_restores_the_model_with_its_error(opt):
    model = opt
    transcoder = retarget(make("skip_transcoder", f"{BLOCK}.hook_resid_mid", write=f"{BLOCK}.hook_mlp_out"), model)
    with torch.no_grad():
        restored = model.run_with_saes(TOKENS, saes=[transcoder], use_error_term=True)
        replaced = model.run_with_saes(TOKENS, saes=[transcoder], use_error_term=False)
    torch.testing.assert_close(restored, model(TOKENS), rtol=0, atol=1e-5)
    assert replaced.shape == restored.shape and (replaced - restored).abs().max() > 1e-2
