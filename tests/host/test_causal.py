"""Nothing is sampled from or scored by a model that sees later tokens; its activations can be read."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

import saelens_ext as sx
from saelens_ext.evals.novelty.scores import next_token_entropy
from saelens_ext.host.prompt_passes import is_causal
from tests.models_zoo import HOSTED, VARIATIONS, make_model, make_tokenizer

WIDTHS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


def bert():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=320, initializer_range=0.3, **size))


def bart():
    """Its bridge gives the encoder and the decoder the same tokens."""
    return BartForConditionalGeneration(BartConfig(vocab_size=320, init_std=0.3, **WIDTHS, **HEADS))


def t5():
    config = T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=2)
    return T5ForConditionalGeneration(config)


def hosted(make):
    torch.manual_seed(0)
    return sx.load_model("tiny", hf_model=make().eval(), tokenizer=make_tokenizer())


@pytest.mark.parametrize(
    ("name", "model_class"),
    [pytest.param(*row, marks=[pytest.mark.slow] if row[0] in VARIATIONS else []) for row in HOSTED],
)
def test_causal_models_are_known_as_such_in_each_precision(name, model_class):
    assert is_causal(make_model(name, model_class)) and is_causal(make_model(name, model_class).to(torch.bfloat16))


@pytest.mark.parametrize("make", [bert, bart])
def test_a_model_that_sees_later_tokens_is_refused_where_texts_are_continued(make):
    model = hosted(make)
    assert not is_causal(model)
    for call in (
        lambda: sx.sample_continuations(model, "The assert", 4),
        lambda: sx.score_continuations(model, "The assert", [" statement"]),
        lambda: sx.sample_texts(model, ["The assert"]),
        lambda: next_token_entropy(model, torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="'tiny'.* depends on the tokens behind it.*activations can be read"):
            call()


def test_its_activations_are_read():
    read = sx.read_texts(hosted(bert), "blocks.1.hook_out", ["On Monday we met.", "At noon."], positions="last")
    assert read.activations["blocks.1.hook_out"].shape == (2, 32)


def test_a_bridge_that_lost_its_mask_is_refused(monkeypatch):
    """As DeepSeek's was, given in a model with sdpa attention."""
    model = make_model("llama", "SAETransformerBridge")
    forward = type(model).forward

    def both_ways(self, ids, **options):
        return forward(self, ids, **options) + forward(self, ids.flip(1), **options).flip(1)

    monkeypatch.setattr(type(model), "forward", both_ways)
    with pytest.raises(ValueError, match="wrong attention mask: load it with saelens_ext.load_model"):
        sx.sample_continuations(model, "The assert", 4)


def test_a_model_that_wants_more_than_tokens_is_warned_of():
    with pytest.warns(UserWarning, match="T5ForConditionalGeneration does not run on token ids alone, .*ValueError"):
        model = hosted(t5)
    with pytest.raises(ValueError, match="cannot go on from a prompt"):
        sx.sample_texts(model, ["The assert"])
