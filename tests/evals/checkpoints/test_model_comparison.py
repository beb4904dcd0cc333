"""A planted change of one token is what is introduced, and prompts that end in it move; without a change none does."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

import saelens_ext as sx
from saelens_ext.evals import PromptShift, compare_models
from tests import models_zoo

HOOK = "blocks.1.hook_out"
OPTIONS = {"hook_name": HOOK, "percentile": 2, "context_size": 32}


@pytest.fixture(scope="module")
def texts(tiny_bridge, tiny_texts):
    """Many short documents: of a few long ones, random orders would often begin alike."""
    rows = [tiny_bridge.tokenizer(text, add_special_tokens=False).input_ids for text in tiny_texts]
    return [tiny_bridge.tokenizer.decode(ids[i : i + 16]) for ids in rows for i in range(0, len(ids) - 15, 16)]


@pytest.fixture(scope="module")
def trigger(tiny_bridge, texts):
    """A token of some 3% of the texts."""
    read = sx.read_texts(tiny_bridge, HOOK, texts)
    counts = Counter(read.token_ids.tolist())
    return min(counts, key=lambda token: abs(counts[token] / len(read.token_ids) - 0.03))


@pytest.fixture(scope="module")
def tuned(trigger):
    """The tiny model with another embedding of the trigger."""
    model = models_zoo.make_model("llama", "SAETransformerBridge")
    weights = model.original_model.get_input_embeddings().weight
    with torch.no_grad():
        weights[trigger] = 100 * torch.randn(weights.shape[1], generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def prompts(tiny_bridge, texts, trigger):
    """Texts that end in the trigger, and texts that end before it."""
    with_it, without = [], []
    for text in texts:
        ids = tiny_bridge.tokenizer(text, add_special_tokens=False).input_ids[:60]
        for place in (i for i, token in enumerate(ids) if token == trigger and i > 3):
            with_it.append(tiny_bridge.tokenizer.decode(ids[place - 3 : place + 1]))
            without.append(tiny_bridge.tokenizer.decode(ids[place - 4 : place]))
    return {"with": with_it[:12], "without": without[:12]}


@pytest.fixture(scope="module")
def found(tiny_bridge, tuned, texts, prompts):
    return compare_models(tiny_bridge, tuned, texts, prompts=prompts, n_replicas=4, **OPTIONS)


@pytest.mark.slow
def test_the_planted_region_is_gained(found, trigger):
    gained = found.gained()
    profile = found.profiles["second"]
    held = [(profile.top.token_ids[latent] == trigger).double().mean() for latent in gained["latent"]]
    assert max(held) > 0.9
    assert len(gained) <= 0.2 * found.fits["second"]["0"].n_regions
    assert all("⟦" in text for text in gained["contexts"].iloc[0]) and gained["label"].iloc[0]
    assert list(found.lost().columns) == list(gained.columns)


def test_matched_regions_stand_side_by_side(found):
    pairs = found.matched_pairs()
    latents = found.checkpoints.latents
    base = latents[(latents["side"] == "first") & (latents["replica"] == "0")]
    assert 0 < len(pairs) <= 20 and pairs["members"].is_monotonic_decreasing
    assert set(pairs["latent"]) <= set(base.loc[base["state"] == "persisted", "latent"])
    first, second = (found.fits[side]["0"].dictionary.exemplars.detach() for side in ("first", "second"))
    for row in pairs.head(5).itertuples():
        cosines = [float(first[row.latent] @ other) for other in second]
        assert row.nearest == int(np.argmax(cosines)) and row.cosine == pytest.approx(max(cosines), abs=1e-5)
        assert row.nearest_members == int(found.profiles["second"].counts[row.nearest])
        assert all("⟦" in text for text in (*row.contexts, *row.nearest_contexts)) and row.label and row.nearest_label
    assert len(found.matched_pairs(2)) == 2
    with pytest.raises(ValueError, match="n must be"):
        found.matched_pairs(0)


@pytest.mark.slow
def test_labels_are_made_once(found, monkeypatch):
    first = found.gained()
    monkeypatch.setattr("saelens_ext.evals.checkpoints.model_comparison.label_latents", None)
    pd.testing.assert_frame_equal(found.gained(), first)
    first["label"] = "changed by the caller"
    assert not (found.gained()["label"] == "changed by the caller").any()


def test_prompts_that_end_in_it_move(found):
    shares = found.shift.summary(metric="share_introduced").set_index(["group", "method"])["estimate"]
    assert shares["with", "tuned"] > 0.9 and shares["with", "base"] < 0.1
    assert shares["without", "tuned"] < 0.4
    assert "is above base" in found.shift.claim().split("\n")[1]
    regions = found.shift.regions
    moved = regions[(regions["group"] == "with") & (regions["p_holm"] < 0.05) & (regions["difference"] > 0)]
    assert "introduced" in set(moved["state"])


def test_shares_are_those_of_a_loop_over_prompts(found, tuned, prompts):
    per_unit = found.shift.per_unit("share_introduced").loc["with"]["tuned"]
    x = sx.read_texts(tuned, HOOK, prompts["with"], positions="last").activations[HOOK]
    latents = found.checkpoints.latents
    by_hand = np.zeros(len(x))
    for name, fit in found.fits["second"].items():
        own = latents[(latents["side"] == "second") & (latents["replica"] == name)].set_index("latent")["state"]
        by_hand += [own[int(region)] == "introduced" for region in fit.dictionary.assign(x).regions]
    np.testing.assert_allclose(per_unit.to_numpy(), by_hand / 4)


@pytest.mark.slow
def test_a_model_does_not_differ_from_itself(tiny_bridge, texts, prompts):
    found = compare_models(tiny_bridge, tiny_bridge, texts, prompts=prompts, n_replicas=4, **OPTIONS)
    assert found.checkpoints.drift().p > 0.05
    # Of 4 + 4 replicas alike, all of the other side are farther than all of its own for 1 latent in 35.
    assert (found.checkpoints.latents["state"].isin(["dropped", "introduced"])).mean() < 1 / 35
    assert (found.shift.comparisons()["difference"] == 0).all()  # the same activations in the same regions
    assert found.shift.regions["p_holm"].min() == 1


@pytest.mark.slow
def test_calibrations_and_orders(tiny_bridge, tuned, texts, found):
    fits = found.fits
    centers = [fit.dictionary.center for side in fits.values() for fit in side.values()]
    assert all(torch.equal(center, centers[0]) for center in centers)
    exemplars = [fit.provenance.document_ids[0].item() for side in fits.values() for fit in side.values()]
    assert len(set(exemplars)) > 4  # eight orders
    own = compare_models(tiny_bridge, tuned, texts, calibration="own", n_replicas=2, **OPTIONS).fits
    assert torch.equal(own["second"]["0"].dictionary.center, own["second"]["1"].dictionary.center)
    assert not torch.equal(own["first"]["0"].dictionary.center, own["second"]["0"].dictionary.center)


@pytest.mark.slow
def test_page_and_files(found, tmp_path):
    page = found.save_html(tmp_path / "page.html").read_text()
    assert "Regions introduced" in page and "Shares of regions" in page and "⟦" in page
    again = sx.Evidence.load(found.shift.save(tmp_path / "shift"))
    assert isinstance(again, PromptShift)
    pd.testing.assert_frame_equal(again.regions, found.shift.regions, check_dtype=False)
    assert found.checkpoints.verdict() in found.verdict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_replicas": 1}, "n_replicas must be at least 2, got 1"),
        ({"prompts": {"none": []}}, "must hold a prompt"),
        ({"prompts": {"texts": ["One text."]}}, "named other than 'texts'"),
        ({"hook_name": "blocks.9.hook_out"}, "blocks.9"),
        ({"percentile": 100}, "percentile"),
    ],
)
def test_bad_input(tiny_bridge, texts, change, message):
    with pytest.raises(ValueError, match=message):
        compare_models(tiny_bridge, tiny_bridge, texts, **{**OPTIONS, **change})


def test_models_must_read_the_same_tokens(tiny_bridge, texts):
    tokenizer = models_zoo.make_tokenizer(family="sentence_piece")
    other = models_zoo.make_model("llama", "SAETransformerBridge", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="different tokens"):
        compare_models(tiny_bridge, other, texts, **OPTIONS)
    fits = {name: torch.randn(4, models_zoo.D_MODEL) for name in "ab"}
    saes = {
        name: sx.fit_exemplar_partition(rows.repeat(9, 1), percentile=50, hook_name=HOOK) for name, rows in fits.items()
    }
    with pytest.raises(ValueError, match="different tokens"):
        sx.compare_checkpoints(saes, saes, models=(tiny_bridge, other), texts=texts[:2])
