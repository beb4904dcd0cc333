"""The examples of a latent as text: the text around a token joins to what was read."""

import pytest
import torch

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.profile import profile_dictionary
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partition
from saelens_ext.dictionaries.fit_snmf import fit_snmf
from tests.models_zoo import make_model

TEXTS = [
    "the cat sat on the mat and looked at the dog",
    "a dog ran after the cat and the cat ran away",
    "the mat was red and the dog was old",
]


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "SAETransformerBridge")


@pytest.fixture(scope="module")
def profiled(model):
    stream = ActivationStream(model, TEXTS, "blocks.0.hook_out", context_size=16)
    fit = fit_exemplar_partition(stream, percentile=30)
    return fit, profile_dictionary(fit.dictionary, stream, context=4)


def test_the_parts_are_the_text_that_was_read(model, profiled):
    _, profile = profiled
    largest = int(profile.counts.argmax())
    table = profile.contexts(largest, model.tokenizer, 3)
    assert list(table.columns) == ["value", "document", "before", "token", "after"]
    assert 0 < len(table) <= 3
    for number, row in enumerate(table.itertuples()):
        ids = profile.top.contexts[largest, number]
        text = "".join(model.tokenizer.batch_decode([[i] for i in ids[ids >= 0].tolist()]))
        assert row.before + row.token + row.after == text
        assert row.token == model.tokenizer.decode([int(profile.top.token_ids[largest, number])])
        assert row.value == pytest.approx(float(profile.top.values[largest, number]))
        assert row.document == int(profile.top.document_ids[largest, number])


def test_places_without_an_example_are_left_out(model, profiled):
    _, profile = profiled
    smallest = int(profile.counts.argmin())
    assert len(profile.contexts(smallest, model.tokenizer, 10)) == min(10, int(profile.counts[smallest]))


def test_boundary_examples_are_the_farthest(model, profiled):
    _, profile = profiled
    largest = int(profile.counts.argmax())
    edge = profile.contexts(largest, model.tokenizer, which="boundary")["value"]
    assert edge.is_monotonic_decreasing
    assert edge.iloc[0] == pytest.approx(float(profile.max_distance[largest]))


def test_what_is_not_there_is_named(model, profiled):
    _, profile = profiled
    with pytest.raises(ValueError, match=f"latent must be one of 0 to {profile.d_sae - 1}, got {profile.d_sae}"):
        profile.contexts(profile.d_sae, model.tokenizer)
    with pytest.raises(ValueError, match="n must be"):
        profile.contexts(0, model.tokenizer, 0)
    stream = ActivationStream(model, TEXTS, "blocks.0.mlp.hook_post", context_size=16)
    features = fit_snmf(stream, 2, sparsity=0.5).dictionary
    with pytest.raises(ValueError, match="no boundary examples"):
        profile_dictionary(features, stream).contexts(0, model.tokenizer, which="boundary")
    assert torch.isfinite(features.W_dec).all()
