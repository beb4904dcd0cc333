"""Overlap is what a double loop over latents and tokens gives, and shifted tokens share nothing but chance."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

import saelens_ext as sx
from saelens_ext.evals import OverlapEvidence, overlap_by_tokens
from saelens_ext.host.flat_sae import encode_flat
from tests import models_zoo
from tests.continuations._dictionaries import make

HOOK = "blocks.1.hook_out"


@pytest.fixture(scope="module")
def stream(tiny_bridge, tiny_texts):
    return sx.ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=16, batch_size=3, max_tokens=500)


@pytest.fixture(scope="module")
def saes(stream):
    fits = [sx.fit_exemplar_partition(stream, percentile=percentile) for percentile in (5, 20)]
    fine, coarse = (fit.dictionary for fit in fits)
    return {"fine": fine, "coarse": coarse, "dense": make("standard", HOOK, models_zoo.D_MODEL, d_sae=16)}


def sets_of(sae, stream, top_n, min_active):
    """The keys (sequence, position) of each latent's strongest tokens."""
    keys, codes = [], []
    for batch in stream:
        keys += list(zip(batch.sequence_ids.tolist(), batch.positions.tolist()))
        codes.append(encode_flat(sae, batch.activations[HOOK]).detach())
    codes = torch.cat(codes)
    sets = []
    for column in codes.T:
        order = column.sort(descending=True, stable=True).indices
        active = [i for i in order.tolist() if column[i] > 0]
        sets.append({keys[i] for i in active[:top_n]} if len(active) >= min_active else set())
    return sets


@pytest.mark.slow
def test_f1_is_that_of_a_double_loop(saes, stream):
    found = overlap_by_tokens(saes, stream, top_n=15, min_active=3, n_shifts=2, n_bootstrap=5)
    sets = {name: sets_of(sae, stream, 15, 3) for name, sae in saes.items()}
    for name in saes:
        for other in saes:
            if name == other:
                continue
            by_hand = [
                max(2 * len(a & b) / (len(a) + len(b)) if a and b else 0.0 for b in sets[other]) for a in sets[name]
            ]
            values = found.per_unit("f1").loc[f"{name} in {other}"]["same tokens"]
            np.testing.assert_allclose(values.to_numpy(), by_hand)
            share = found.summary(metric="share_strong").set_index(["pair", "method"])["estimate"]
            assert share[f"{name} in {other}", "same tokens"] == np.mean(np.array(by_hand) > 0.5)  # of all latents


def test_a_dictionary_overlaps_with_itself_and_shifts_do_not(saes, stream):
    twins = {"a": saes["fine"], "b": saes["fine"]}
    found = overlap_by_tokens(twins, stream, min_active=3, n_shifts=50, n_bootstrap=20)
    alive = torch.tensor([bool(tokens) for tokens in sets_of(saes["fine"], stream, 100, 3)])
    strong = found.per_unit("share_strong").loc["a in b"]["same tokens"].to_numpy()
    assert (strong == alive.numpy()).all() and 0 < strong.mean() < 1
    assert (found.partners["a in b"][alive] == alive.nonzero().squeeze(1)).all()
    assert (found.partners["a in b"][~alive] == -1).all()
    assert found.null["a in b"].mean() < 0.2
    assert "more than shifted tokens" in found.claim() and found.comparisons()["p_holm"].max() < 0.05
    assigned = found.per_unit("one_to_one").loc["b in a"]["same tokens"].to_numpy()
    np.testing.assert_allclose(assigned, alive.numpy())


def test_windows_of_one_document_never_collide(tiny_bridge, saes):
    document = "The cat sat on the mat. " * 20  # every window holds the same tokens
    stream = sx.ActivationStream(tiny_bridge, [document, document], HOOK, context_size=16)
    n = sum(len(batch) for batch in stream)
    found = overlap_by_tokens({"a": saes["coarse"], "b": saes["coarse"]}, stream, top_n=n, min_active=1, n_bootstrap=5)
    counts = [len(tokens) for tokens in sets_of(saes["coarse"], stream, n, 1)]
    assert sum(counts) == n and found.settings["n_tokens"] == n
    assert found.per_unit("f1")["same tokens"].max() == 1


def test_batches_change_nothing(tiny_texts, saes):
    """In float64: windows that begin alike have equal codes, which float32 would round otherwise in other batches."""
    model = models_zoo.make_model("llama", "SAETransformerBridge").double()
    two = {name: copy.deepcopy(saes[name]).double() for name in ("fine", "coarse")}
    tables = []
    for batch_size in (2, 7):
        stream = sx.ActivationStream(model, tiny_texts, HOOK, context_size=16, batch_size=batch_size)
        tables.append(overlap_by_tokens(two, stream, top_n=10, min_active=2, n_bootstrap=5).summary())
    pd.testing.assert_frame_equal(*tables)


def test_saved_and_too_few_shifts(saes, stream, tmp_path):
    found = overlap_by_tokens(saes, stream, top_n=15, min_active=3, n_shifts=20, n_bootstrap=10)
    assert "Too few shifts for any claim: 6 pairs need more than 119" in found.verdict()
    again = sx.Evidence.load(found.save(tmp_path))
    assert isinstance(again, OverlapEvidence) and again.verdict() == found.verdict()
    assert "shifted tokens" in sx.write_evidence_report(tmp_path / "page.html", [found.section()]).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_n": 10}, "top_n must be at least min_active=20, got 10"),
        ({"min_active": 0}, "min_active"),
        ({"n_shifts": 0}, "n_shifts"),
        ({"confidence": 1.0}, "confidence"),
    ],
)
def test_bad_options(saes, stream, options, message):
    with pytest.raises(ValueError, match=message):
        overlap_by_tokens(saes, stream, **options)


def test_bad_dictionaries(saes, stream):
    with pytest.raises(ValueError, match="at least 2 dictionaries by name, got 1"):
        overlap_by_tokens({"a": saes["fine"]}, stream)
    elsewhere = make("standard", "blocks.0.hook_out", models_zoo.D_MODEL, d_sae=16)
    with pytest.raises(ValueError, match="the hook of b"):
        overlap_by_tokens({"a": saes["fine"], "b": elsewhere}, stream)
