"""What a stream or a dictionary reads is what the model computes at that place, in either host class."""

from copy import deepcopy

import pytest
import torch
from sae_lens import SAE

from saelens_ext import ActivationStream, ExemplarPartition, SNMFDictionary
from saelens_ext.host.models import resolve_hook, retarget
from tests.architectures._hosts import LAYER, TOKENS, normal, places, run, shared_model
from tests.models_zoo import D_MODEL, ZOO, make_model

TEXTS = ["The assert statement, é ☃ (x)", "One", "Assertions are\n\nthe most convenient way of it all, and more"]
BOTH = [name for name, row in ZOO.items() if len(row.model_classes) == 2]


def test_a_stream_reads_what_run_with_cache_does(host):
    _, row, model = host
    names = places(row)
    stream = ActivationStream(model, TEXTS, names, context_size=12, batch_size=3, exclude_special_tokens=False)
    n_windows = 0
    for batch in stream:
        for number, window in enumerate(batch.windows, batch.first_sequence_id):
            real = window[window >= 0]
            mine = batch.sequence_ids == number
            assert torch.equal(batch.token_ids[mine], real)
            fired = [resolve_hook(model, name) for name in names]
            with torch.no_grad():
                _, cache = model.run_with_cache(real[None], names_filter=fired)
            for name, there in zip(names, fired, strict=True):
                expected = cache[there][0].flatten(1)
                torch.testing.assert_close(batch.activations[name][mine], expected, rtol=1e-4, atol=5e-5)
            n_windows += 1
    assert n_windows > len(TEXTS), "a document of several windows, and a window that is padded"


@pytest.mark.parametrize("architecture", BOTH)
def test_both_host_classes_have_the_same_activations(architecture):
    names = [*places(ZOO[architecture], 0), *places(ZOO[architecture], 2)]
    streams = [
        ActivationStream(shared_model(architecture, kind), TEXTS, names, context_size=12)
        for kind in ZOO[architecture].model_classes
    ]
    for one, other in zip(*streams, strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.positions, other.positions)
        for name in names:
            torch.testing.assert_close(one.activations[name], other.activations[name], rtol=1e-3, atol=1e-4)


def dictionary(hook_name: str, d_in: int) -> SAE:
    """Regions; groups of neurons where the width is theirs."""
    metadata = {"hook_name": hook_name}
    if hook_name.endswith("mlp.hook_post"):
        return SNMFDictionary.from_features(0.2 * normal(10, d_in), metadata=metadata)
    rows = torch.nn.functional.normalize(normal(16, d_in), dim=1)
    return ExemplarPartition.from_regions(rows, rows, 0.1 * normal(d_in, seed=2), 0.9, k=3, metadata=metadata)


@pytest.mark.parametrize("place", ["hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post"])
def test_an_attached_dictionary_reads_the_activation_and_its_error_term_restores_it(host, place):
    _, row, model = host
    if row.experts and place == "mlp.hook_post":
        return  # there are no such neurons
    name = f"blocks.{LAYER}.{place}"
    plain, seen = host.plain
    sae = dictionary(name, seen[name].shape[-1])
    expected = sae.encode(seen[name]).detach()
    retarget(sae, model)
    with torch.no_grad():
        logits, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=True)
        replaced = model.run_with_saes(TOKENS, saes=[sae], use_error_term=False)
    (codes,) = [cache[key] for key in cache if key.endswith("hook_sae_acts_post")]
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-5)
    assert (codes != 0).any()
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)
    assert (replaced - plain).abs().max() > 1e-2, "without the error term the dictionary must show"
    again, read = run(model, [name])  # a hook fires again where the dictionary was
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(read[name], seen[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", BOTH)
def test_a_dictionary_means_the_same_in_both_host_classes(architecture):
    name, codes = f"blocks.{LAYER}.hook_mlp_out", []
    for kind in ZOO[architecture].model_classes:
        model = shared_model(architecture, kind)
        sae = retarget(dictionary(name, D_MODEL), model)
        with torch.no_grad():
            _, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae])
        codes.append(next(cache[key] for key in cache if key.endswith("hook_sae_acts_post")))
    torch.testing.assert_close(codes[0], codes[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", ["hook_attn_out", "hook_mlp_out"])
def test_a_dictionary_on_a_copy_of_granite_changes_the_copy_alone(place):
    model = make_model("granite", "SAETransformerBridge")
    copy, sae = deepcopy(model), dictionary(f"blocks.{LAYER}.{place}", D_MODEL)
    with torch.no_grad():
        plain = model(TOKENS)
        for one, other in ((copy, model), (model, copy)):
            retarget(sae, one)
            with one.saes([sae], use_error_term=False):
                assert (one(TOKENS) - plain).abs().max() > 1e-2
                assert torch.equal(other(TOKENS), plain)
            assert torch.equal(one(TOKENS), plain)
