"""Going on from the keys and values of earlier tokens is tried once on each model, not believed."""

import pytest
import torch
from transformers import JambaConfig, JambaForCausalLM, MptConfig, MptForCausalLM

from saelens_ext import load_model
from saelens_ext.continuations.attribution import shown
from saelens_ext.continuations.attribution.shown import check_backend, runs_in_chunks
from saelens_ext.host import prompt_passes
from saelens_ext.host.prompt_passes import CachedPasses, KVCache, has_kv_cache, is_causal, is_resumable, logits_of
from saelens_ext.ops.modes import standard_modes
from tests.models_zoo import HOSTED, VARIATIONS, make_model, make_tokenizer

SIZE = {"vocab_size": 320, "initializer_range": 0.3, "pad_token_id": 2}


def bridge(hf_model):
    return load_model("tiny", hf_model=hf_model.eval(), tokenizer=make_tokenizer())


def mpt():
    """TransformerLens' bridge says that it has a cache, and steps through it give other logits than one pass."""
    torch.manual_seed(0)
    return bridge(MptForCausalLM(MptConfig(d_model=32, n_layers=2, n_heads=4, **SIZE)))


def jamba():
    """Its cache can be gone on from, and has parts that are no keys and values."""
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2, "mamba_dt_rank": 4}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "use_mamba_kernels": False}
    torch.manual_seed(0)
    return bridge(JambaForCausalLM(JambaConfig(**layers, **heads, **size, **SIZE)))


@pytest.mark.parametrize(
    ("name", "model_class"),
    [pytest.param(*row, marks=[pytest.mark.slow] if row[0] in VARIATIONS else []) for row in HOSTED],
)
def test_a_cache_that_gives_what_one_pass_gives_is_used(name, model_class):
    model = make_model(name, model_class)
    assert has_kv_cache(model) and is_resumable(model)


@pytest.mark.parametrize("make", [mpt, jamba])
def test_what_is_sampled_from_is_what_one_pass_gives(make, monkeypatch):
    monkeypatch.setattr(prompt_passes, "_MAX_PATTERN", 32)  # the prompt is long
    monkeypatch.setattr(prompt_passes, "_FEWEST_COLUMNS", 4)
    model = make()
    assert model.adapter.supports_kv_cache and not is_resumable(model)
    ids = torch.randint(3, 300, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        passes = CachedPasses(model, ids[:, :10])
        for length in range(10, 14):
            torch.testing.assert_close(passes.logits(), logits_of(model, ids[:, :length])[:, -1], rtol=1e-4, atol=1e-4)
            passes.append(ids[:, length])


def test_it_is_tried_once_for_each_model_without_the_hooks_that_are_there(monkeypatch):
    model, ways, hooks = make_model("llama", "SAETransformerBridge"), [], []
    fits = prompt_passes._fits
    monkeypatch.setattr(prompt_passes, "_fits", lambda model, way: ways.append(way) or fits(model, way))

    def by_position(x, hook):
        hooks.append(x.shape)
        return x + torch.arange(x.shape[1])[:, None]

    for _ in range(2):
        with model.hooks(fwd_hooks=[("blocks.0.hook_in", by_position)]):
            assert has_kv_cache(model) and not is_resumable(model) and not hooks
        assert is_resumable(model)
    assert len(ways) == 2, "steps and chunks"
    with model.hooks(fwd_hooks=[("blocks.0.hook_in", by_position)]), torch.no_grad():
        logits_of(model, torch.arange(3, 7)[None])
    assert hooks == [(1, 4, model.cfg.d_model)], "they are there as before"


def test_the_autocast_of_who_asks_first_is_not_remembered():
    """It rounds more than the model does."""
    model, seen = make_model("llama", "SAETransformerBridge"), []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", dtype=torch.bfloat16), standard_modes():
        assert has_kv_cache(model) and is_resumable(model)
    assert seen and not any(seen)


def test_too_little_memory_for_a_trial_is_not_taken_for_an_answer(monkeypatch):
    model, run = make_model("llama", "SAETransformerBridge"), KVCache.run

    def out_of_memory(cache, ids):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(KVCache, "run", out_of_memory)
    for ask in (has_kv_cache, is_resumable):
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            ask(model)
    monkeypatch.setattr(KVCache, "run", run)
    assert has_kv_cache(model) and is_resumable(model)


def test_too_little_memory_for_other_trials_is_no_answer_either(monkeypatch):
    model, one_pass = make_model("llama", "SAETransformerBridge"), prompt_passes.logits_of

    def out_of_memory(*given, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(prompt_passes, "logits_of", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        is_causal(model)
    monkeypatch.setattr(prompt_passes, "logits_of", one_pass)
    monkeypatch.setattr(shown.Passes, "gradients", out_of_memory)
    for ask in (runs_in_chunks, check_backend):
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            ask(model, "gradient")
    monkeypatch.undo()
    assert is_causal(model) and runs_in_chunks(model, "gradient")
    check_backend(model, "gradient")
