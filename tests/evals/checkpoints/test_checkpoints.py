"""A model does not differ from itself, unrelated dictionaries share nothing, and what was replaced is what changed."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

import saelens_ext as sx
from saelens_ext.evals import CheckpointEvidence, compare_checkpoints
from tests.evals.dictionaries.test_stability import noisy, rows


def replicas(x, n, seed=0, size=0.05):
    return {f"r{number}": noisy(x, 100 * seed + number, size) for number in range(n)}


def fits(model, texts, seeds):
    return {
        str(seed): sx.fit_exemplar_partition(
            sx.ActivationStream(model, texts, "blocks.1.hook_out", context_size=32, shuffle_seed=seed), percentile=10
        )
        for seed in seeds
    }


def states(found, side):
    own = found.latents[found.latents["side"] == side]
    return own.pivot(index="latent", columns="replica", values="state").to_numpy()


def test_identical_dictionaries_persist_whatever_their_order():
    x = rows(60)
    found = compare_checkpoints({"a": x, "b": x.flip(0)}, {"a": 2 * x, "b": x[torch.randperm(60)]})
    assert set(found.latents["state"]) == {"persisted"}
    pairs = found.matched_pairs()
    assert len(pairs) == 120 and pairs["across"].min() == pytest.approx(1, abs=1e-5)
    own = pairs[pairs["replica"] == "a"]
    first_of_second = own[own["other"] == "a"]
    assert (first_of_second["latent"] == first_of_second["nearest"]).all()


def test_unrelated_dictionaries_are_reproducible_by_chance_alone():
    first, second = ({f"r{n}": rows(300, seed=10 * s + n) for n in range(2)} for s in (1, 2))
    found = compare_checkpoints(first, second, level=0.9)
    share = found.summary(metric="share_reproducible")
    assert share["estimate"].to_numpy() == pytest.approx([0.1, 0.1], abs=0.04)
    assert abs(found.drift().difference) < 0.01


def test_what_was_replaced_is_dropped_and_what_replaced_it_is_introduced():
    shared, old, new = rows(160, seed=1), rows(40, seed=2), rows(40, seed=3)
    first, second = replicas(torch.cat([shared, old]), 3), replicas(torch.cat([shared, new]), 3, seed=1)
    found = compare_checkpoints(first, second)
    for side, word in (("first", "dropped"), ("second", "introduced")):
        changed = states(found, side) == word
        assert changed[160:].mean() >= 0.9 and changed[:160].mean() <= 0.1
    summary = found.summary().set_index(["side", "metric", "method"])["estimate"]
    assert summary["first", "share_changed", "across"] == pytest.approx(0.2, abs=0.04)
    assert summary["first", "share_changed", "within"] < 0.1  # nothing was trained between replicas


def test_a_direction_that_replicas_lack_is_undecided():
    shared = rows(80, seed=1)
    sides = [
        {name: torch.cat([noisy(shared, 10 * s + n), rows(20, seed=50 + 10 * s + n)]) for n, name in enumerate("abc")}
        for s in range(2)
    ]
    found = compare_checkpoints(*sides)
    assert (states(found, "first")[80:] == "undecided").mean() >= 0.9


def test_drift_is_tested_by_every_labelling_of_replicas():
    x, y = rows(50), rows(50, seed=7)
    near, far = replicas(x, 3), replicas(torch.cat([x[:25], y[25:]]), 4, seed=1)
    found = compare_checkpoints(near, far)
    drift = found.drift()
    assert drift.n_labellings == 35 and drift.p == drift.smallest_p == pytest.approx(1 / 35)
    assert "the sides differ" in found.claim()
    values = found.pairs["median_cosine"].numpy()
    within = [values[i, j] for i in range(7) for j in range(7) if i != j and (i < 3) == (j < 3)]
    across = [values[i, j] for i in range(7) for j in range(7) if (i < 3) != (j < 3)]
    assert drift.difference == pytest.approx(np.mean(within) - np.mean(across))
    same = compare_checkpoints(near, replicas(x, 4, seed=2))
    assert same.drift().p > 0.05 and "cannot be told from relabelling" in same.verdict()


def test_relabelling_is_drawn_where_there_are_too_many_labellings():
    found = compare_checkpoints(replicas(rows(20), 3), replicas(rows(20, seed=5), 4, seed=1), n_permutations=20)
    assert found.drift().p == pytest.approx(found.drift().smallest_p, abs=0.15) and found.drift().smallest_p == 1 / 21


def test_too_few_replicas_are_said_outright():
    two = compare_checkpoints(replicas(rows(20), 2), replicas(rows(20, seed=5), 3, seed=1))
    assert math.isnan(two.drift().p) and "at least 3 + 3 replicas, got 2 + 3" in two.verdict()
    three = compare_checkpoints(replicas(rows(20), 3), replicas(rows(20, seed=5), 3, seed=1))
    assert three.drift().p == three.drift().smallest_p == pytest.approx(0.1)
    assert "Too few replicas for any claim" in three.verdict()
    with pytest.raises(ValueError, match="at least 6 replicas, got 5"):
        two.claim()


@pytest.mark.slow
def test_regions_of_the_same_tokens(tiny_bridge, tiny_texts):
    first, second = fits(tiny_bridge, tiny_texts, (0, 1)), fits(tiny_bridge, tiny_texts, (2, 3))
    texts = list(tiny_texts)[:4]
    found = compare_checkpoints(first, second, models=(tiny_bridge, tiny_bridge), texts=texts)
    x = sx.read_texts(tiny_bridge, "blocks.1.hook_out", texts).activations["blocks.1.hook_out"]
    labels = [fit.dictionary.assign(x).regions.numpy() for fit in (*first.values(), *second.values())]
    by_hand = [[adjusted_mutual_info_score(a, b) for b in labels] for a in labels]
    np.testing.assert_allclose(found.pairs["agreement"].numpy(), by_hand, atol=1e-9)
    counts = found.by_quintile().groupby("side")[["persisted", "dropped", "introduced", "undecided"]].sum().sum(axis=1)
    assert counts["first"] == sum(fit.n_regions for fit in first.values())
    own = found.latents[found.latents["side"] == "first"]
    sizes = own.groupby("quintile").size()
    assert list(sizes.index) == [1, 2, 3, 4, 5] and sizes.max() - sizes.min() <= len(own) // 5
    predictor = torch.cat([fit.counts.double() * fit.coherence.double() ** 2 for fit in first.values()]).numpy()
    top, bottom = predictor[own["quintile"] == 5], predictor[own["quintile"] == 1]
    assert top.min() >= np.quantile(predictor, 0.8) and bottom.max() <= np.quantile(predictor, 0.2)


def test_saved_and_read_and_shown(tmp_path):
    found = compare_checkpoints(replicas(rows(30), 3), replicas(rows(30, seed=5), 4, seed=1))
    again = sx.Evidence.load(found.save(tmp_path))
    assert isinstance(again, CheckpointEvidence)
    pd.testing.assert_frame_equal(again.latents, found.latents, check_dtype=False)
    assert again.verdict() == found.verdict() and again.drift() == found.drift()
    section = found.section()
    assert [table.title for table in section.tables[-2:]] == ["States", "Matched pairs"]
    page = sx.write_evidence_report(tmp_path / "page.html", [section]).read_text()
    assert "persisted" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": {"a": rows(5)}}, "first has 1 replicas; give at least 2"),
        ({"second": {}}, "second has 0 replicas"),
        ({"second": {"a": rows(5, d=8), "b": rows(5, d=8)}}, "width"),
        ({"level": 1.0}, "level"),
        ({"texts": ["One text."]}, "models and texts go together, got 0 models"),
        ({"models": 1}, "got 1 models and no texts"),
        ({"models": 2, "texts": ["One text."]}, "first holds bare directions"),
    ],
)
def test_bad_input(tiny_bridge, change, message):
    if "models" in change:
        change = {**change, "models": [tiny_bridge] * change["models"]}
    two = {"a": rows(5), "b": rows(5, seed=1)}
    with pytest.raises(ValueError, match=message):
        compare_checkpoints(**{"first": two, "second": two, **change})
