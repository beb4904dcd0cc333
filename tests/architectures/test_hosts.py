"""Laws that hold for every architecture in every host class that takes it."""

import pytest
import torch

from saelens_ext.host.models import resolve_hook
from tests.models_zoo import (
    MODEL_CLASSES,
    N_LAYERS,
    TOKENIZERS,
    VOCABULARY,
    ZOO,
    make_hf_model,
    make_model,
    make_tokenizer,
)

TOKENS = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


def test_a_host_is_the_hugging_face_model(host):
    architecture, row, model = host
    with torch.no_grad():
        expected = make_hf_model(architecture)(TOKENS, output_hidden_states=True)
        seen = {}
        for layer in range(N_LAYERS - 1):  # the last of the hidden states is normalised
            name = resolve_hook(model, f"blocks.{layer}.hook_resid_post")
            model.add_hook(name, lambda x, hook, layer=layer: seen.update({layer: x.clone()}))
        logits = model(TOKENS)
        model.reset_hooks()
    assert expected.logits.std() > 0.5 and expected.logits.isfinite().all()
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=5e-5)
    for layer, stream in seen.items():
        torch.testing.assert_close(stream, expected.hidden_states[layer + 1], rtol=1e-4, atol=5e-5)
    assert len(seen) == N_LAYERS - 1


def test_the_table_says_what_the_host_says(host):
    _, row, model = host
    assert bool(getattr(model.cfg, "parallel_attn_mlp", False)) == row.parallel
    assert bool(model.cfg.default_prepend_bos) == row.prepends_bos
    assert bool(getattr(model.cfg, "num_experts", 0)) == row.experts


@pytest.mark.parametrize(
    ("architecture", "model_class"),
    [(name, kind) for name, row in ZOO.items() for kind in MODEL_CLASSES if kind in row.refused],
)
def test_what_no_host_class_takes_is_refused(architecture, model_class):
    with pytest.raises(ValueError, match="Load it as an SAETransformerBridge"):
        make_model(architecture, model_class)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_tokenizer_has_its_ids_and_gives_the_text_back(family):
    tokenizer = make_tokenizer(family=family)
    text = "The assert statement, é ☃\n\n(x)"
    ids = tokenizer(text).input_ids
    assert len(tokenizer) == VOCABULARY and tokenizer.decode(ids) == text and min(ids) > 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        None if family == "without_bos" else 0,
        1,
        2,
    )
