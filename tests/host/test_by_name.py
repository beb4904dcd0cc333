"""Models that TransformerLens knows by their published names only, hosted from a folder or memory.

The model has the sizes of google/gemma-3-270m, which the host holds it to, random weights and few tokens.
"""

from copy import deepcopy

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OlmoConfig,
    OlmoForCausalLM,
)

from saelens_ext.cli.main import main
from saelens_ext.host.by_name import official_name
from saelens_ext.host.models import load_model
from saelens_ext.host.turn_ends import end_ids
from tests.models_zoo import SPECIAL_IDS, VOCABULARY, make_tokenizer
from tests.runner.runs import TEXTS

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def gemma():
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        architectures=["Gemma3ForCausalLM"],
        **SPECIAL_IDS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma3ForCausalLM(config).eval()


@pytest.mark.slow
def test_from_memory_by_sizes(gemma):
    mine = deepcopy(gemma)
    mine.generation_config.eos_token_id = [1, 106]  # as Gemma's, which ends a turn with the second
    model = load_model(
        "mine", model_class="HookedSAETransformer", hf_model=mine, tokenizer=make_tokenizer(), device="cpu"
    )
    assert end_ids(model) == {1, 106}
    assert model.cfg.model_name == "mine" and model.cfg.n_layers == 18
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), gemma(TOKENS).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("google/gemma-3-270m-it", "google/gemma-3-270m-it"),
        ("gemma-3-270m-it", "google/gemma-3-270m-it"),
        ("/models/gemma-3-270m-it", "google/gemma-3-270m-it"),
        ("mine", "google/gemma-3-270m"),
    ],
)
def test_the_name_on_the_list(name, official, gemma):
    assert official_name(name, gemma) == official


@pytest.mark.slow
def test_from_a_folder_by_the_command(gemma, tmp_path):
    deepcopy(gemma).bfloat16().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    options = {
        "model_name": tmp_path / "model",
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": '{"dtype": "bfloat16"}',
        "hook_name": "blocks.3.hook_resid_post",
        "dataset_path": tmp_path / "text.txt",
        "training_tokens": 60,
        "context_size": 16,
        "profile": "false",
        "n_eval_batches": 0,
        "output_path": tmp_path / "output",
        "checkpoint_path": "none",
    }
    assert main(["exemplars", *(f"--{name}={value}" for name, value in options.items()), "--quiet"]) == 0
    assert (tmp_path / "output" / "blocks.3.hook_resid_post_exemplars_p10" / "cfg.json").exists()


def tiny(kind, config_kind, **more):
    config = config_kind(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        architectures=[kind.__name__],
        **SPECIAL_IDS,
        **more,
    )
    return kind(config)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("mine", lambda: tiny(Gemma2ForCausalLM, Gemma2Config, head_dim=8), "neither 'mine' nor the sizes"),
        (
            "google/gemma-2-2b",
            lambda: tiny(Gemma2ForCausalLM, Gemma2Config, head_dim=8),
            "differs from that: d_model 32 instead of 2304, n_layers 2 instead of 26",
        ),
        ("mine", lambda: tiny(OlmoForCausalLM, OlmoConfig), "hosts a OlmoForCausalLM only under the name"),
    ],
)
def test_what_has_no_name_on_the_list_is_told_of_the_bridge(name, make, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_model(name, model_class="HookedSAETransformer", hf_model=make(), tokenizer=make_tokenizer(), device="cpu")
    assert "Load it as an SAETransformerBridge" in str(raised.value)
