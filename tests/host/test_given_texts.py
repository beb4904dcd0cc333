"""Prompts, prefixes, sentences and continuations are the texts that were given, or an error that says what was."""

import json

import numpy as np
import pandas
import pytest
import torch

import saelens_ext as ext
from saelens_ext import _checks
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.host.prompt_passes import prompt_ids
from saelens_ext.steering.sampling import sample_texts
from tests.models_zoo import make_model, make_tokenizer

HOOK, HALF = "blocks.1.hook_resid_post", "half \ud800 a character"
TEXTS = ["The cat sat on the mat.", "A dog ran to the sea."]
TABLE = pandas.DataFrame({"text": TEXTS})


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "SAETransformerBridge")


# The annotations refuse other types than these under pytest, so they are tried on the check that all entries share.
@pytest.mark.parametrize("given", [TABLE, {"text": TEXTS}, set(TEXTS), b"bytes", None, "a text"], ids=type)
def test_what_is_no_list_is_refused(given):
    with pytest.raises(ValueError, match="prompts must be a list of at least one string, got"):
        _checks.texts(given, "prompts")


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="prompts is empty; give a list of at least one string"):
        _checks.texts([], "prompts")


@pytest.mark.parametrize("make", [pandas.Series, np.array, iter, tuple], ids=lambda make: make.__name__)
def test_columns_arrays_and_iterators_are_lists(make):
    found = _checks.texts(make(TEXTS), "prompts")
    assert found == TEXTS and {type(text) for text in found} == {str}


def test_an_entry_that_is_no_text_is_named():
    with pytest.raises(ValueError, match=r"prompts\[1\] must be a text, got 5 of type int"):
        _checks.texts([TEXTS[0], 5], "prompts")


ENTRIES = {
    "sampling": lambda model, given: sample_texts(model, given, n=1),
    "audit": lambda model, given: ext.audit_continuations(model, given, [], n=4),
    "scoring": lambda model, given: score_continuations(model, "The", given),
    "sentences": lambda model, given: ext.diff_means(model, HOOK, given, TEXTS),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_a_text_with_half_a_character_is_named(model, entry):
    with pytest.raises(ValueError, match=r"(\[1\]|Number 1 of the continuations) has half a character .* at place 5"):
        entry(model, [TEXTS[0], HALF])


def test_a_prefix_with_half_a_character_is_named(model):
    for make in (prompt_ids, lambda m, given: ext.sample_continuations(m, given, 2)):
        with pytest.raises(ValueError, match="has half a character"):
            make(model, HALF)


def test_a_single_text_is_no_list_of_continuations(model):
    with pytest.raises(ValueError, match="continuations must be a list of at least one .*, got ' a b'"):
        score_continuations(model, "The", " a b")


def test_numbers_of_numpy_in_a_sampling_are_plain_numbers(model):
    given = {"temperature": np.float32(0.5), "top_p": np.float64(0.75), "max_new_tokens": np.int32(3)}
    options = ext.SamplingOptions(seed=np.int64(2), top_k="none", **given)
    assert options == ext.SamplingOptions(temperature=0.5, top_p=0.75, max_new_tokens=3, seed=2, top_k=None)
    assert {type(options.seed), type(options.max_new_tokens)} == {int} and type(options.temperature) is float
    with pytest.raises(ValueError, match="top_k must be a whole number or None, got 'many'"):
        ext.SamplingOptions(top_k="many")
    found = ext.sample_continuations(model, "The cat", 3, top_p=np.float64(0.75), max_new_tokens=3)
    assert json.loads(json.dumps(found.metadata["sampling"])) == found.metadata["sampling"]


def test_a_token_that_the_model_does_not_have_is_named():
    model = make_model("llama", "SAETransformerBridge", tokenizer=make_tokenizer())
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    with pytest.raises(ValueError, match=r"'<\|im_end\|>', of id 320, .* 320 tokens"):
        ext.sample_continuations(model, "Hi<|im_end|>", 2, max_new_tokens=2)


def test_texts_scored_in_inference_mode_give_tensors_that_can_be_used_outside(model):
    with torch.inference_mode():
        found = score_continuations(model, "The", [" cat", " dog sat"])
    assert not any(x.is_inference() for x in (found.log_probs, found.token_ids, found.lengths))
    assert torch.equal(found.log_probs, score_continuations(model, "The", [" cat", " dog sat"]).log_probs)
