"""A kept stream gives what the stream gave, without running the model."""

import pytest
import torch

import saelens_ext as sx
from saelens_ext.activations.kept_stream import KeptStream

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"]


@pytest.fixture(scope="module")
def stream(tiny_bridge, tiny_texts):
    return sx.ActivationStream(tiny_bridge, tiny_texts, HOOKS, context_size=16, batch_size=4, max_tokens=301)


@pytest.fixture(scope="module")
def kept(stream):
    return KeptStream(stream)


def same(one, other):
    assert one.activations.keys() == other.activations.keys()
    assert all(torch.equal(one.activations[name], other.activations[name]) for name in one.activations)
    for part in ("token_ids", "sequence_ids", "positions", "document_ids", "windows"):
        assert torch.equal(getattr(one, part), getattr(other, part))
    assert one.first_sequence_id == other.first_sequence_id


def test_the_batches_are_those_of_the_stream_on_every_pass(stream, kept):
    for _ in range(2):
        for one, other in zip(stream, kept, strict=True):
            same(one, other)
    assert kept.describe() == stream.describe() and kept.d_in == stream.d_in
    assert list(kept.token_windows()) == list(stream.token_windows())


def test_a_pass_can_start_at_a_window(stream, kept):
    first = next(iter(kept))
    start, n_read = len(first.windows), len(first)
    for one, other in zip(stream.batches(start, n_read), kept.batches(start, n_read), strict=True):
        same(one, other)


def test_no_pass_runs_the_model(kept, tiny_bridge):
    def refuse(*_):
        raise AssertionError("the model was run")

    handle = tiny_bridge.blocks[0].register_forward_pre_hook(refuse)
    try:
        fit = sx.fit_exemplar_partition(kept.only(HOOKS[0]), percentile=20, calibration_activations=200)
        profile = sx.profile_dictionary(fit.dictionary, kept)
        sx.fit_snmf(kept.only(HOOKS[1]), 4, max_iter=3)
    finally:
        handle.remove()
    assert int(profile.counts.sum()) == 301


def test_fits_are_those_of_the_stream(stream, kept, tiny_bridge, tiny_texts):
    one_hook = sx.ActivationStream(tiny_bridge, tiny_texts, HOOKS[0], context_size=16, batch_size=4, max_tokens=301)
    options = {"percentile": 20, "calibration_activations": 200}
    direct = sx.fit_exemplar_partition(one_hook, **options)
    again = sx.fit_exemplar_partition(kept.only(HOOKS[0]), **options)
    assert torch.equal(direct.exemplar_indices, again.exemplar_indices) and torch.equal(direct.counts, again.counts)
    assert direct.dictionary.cfg.metadata.hook_name == again.dictionary.cfg.metadata.hook_name


def test_hooks_that_were_not_read_and_too_many_activations_are_refused(stream, kept):
    with pytest.raises(ValueError, match=r"'blocks\.2\.hook_out' was not read, only 'blocks\.0\.hook"):
        kept.only("blocks.2.hook_out")
    with pytest.raises(ValueError, match="memory_limit=1000 bytes"):
        KeptStream(stream, memory_limit=1000)
