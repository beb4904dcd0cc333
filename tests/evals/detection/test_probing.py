"""Probes keep what codes hold, and noise keeps nothing."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from saelens_ext.concepts.detector import Detector
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.evals.concepts_data import Concept
from saelens_ext.evals.detection.detection_cells import Reading, concept_splits
from saelens_ext.evals.detection.probes import fit_probe, most_different
from saelens_ext.evals.detection.probing import ProbeEvidence, evaluate_probes
from saelens_ext.evals.detection.probing_cells import assigned, one_hot, pooled, training_sentences
from saelens_ext.evals.evidence import Evidence
from saelens_ext.host.models import resolve_hook
from tests.continuations._dictionaries import make
from tests.evals.planted import HOOK, N_TRIGGERS, TRIGGERS, D, concept, model_with_directions


@pytest.fixture(scope="module")
def model():
    return model_with_directions()


def standard(encoder, hook=HOOK):
    """A SAE whose latents are max(0, x W)."""
    sae = make("standard", hook, D, d_sae=encoder.shape[1])
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        sae.W_dec.copy_(torch.nn.functional.normalize(encoder.T, dim=1))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def planted():
    """One latent for each trigger."""
    return standard(torch.eye(D)[:, :N_TRIGGERS].contiguous())


def elsewhere(k=N_TRIGGERS, seed=0):
    """Latents that the triggers do not move."""
    weights = torch.randn(D, k, generator=torch.Generator().manual_seed(seed))
    weights[:N_TRIGGERS] = 0
    return standard(weights)


def regions():
    units = torch.cat([torch.eye(D)[:N_TRIGGERS], elsewhere(4).W_dec.detach()])
    return ExemplarPartition.from_regions(units, units, torch.zeros(D), 0.9, metadata={"hook_name": HOOK})


def concepts(n, **options):
    return [concept(i, TRIGGERS[i % N_TRIGGERS], n_per_side=24, **options) for i in range(n)]


def plain(evidence, probe, metric="accuracy"):
    return evidence.per_unit(metric).loc[probe].mean()


@pytest.mark.slow
def test_codes_that_hold_the_concept_keep_it_and_others_do_not(model):
    found = evaluate_probes(model, {"planted": planted(), "elsewhere": elsewhere()}, concepts(12), ks=(1, 3))
    assert not found.failures
    for probe in ("k=1", "k=3"):
        assert plain(found, probe)["planted"] > 0.95
        assert plain(found, probe)["raw activations"] > 0.95
        assert abs(plain(found, probe)["elsewhere"] - 0.5) < 0.08
    assert plain(found, "one-hot")["planted"] > 0.95 and plain(found, "all")["raw activations"] > 0.75
    chosen = found.cells.query("method == 'planted' and probe == 'k=1' and metric == 'accuracy'")
    assert (chosen["column"] == chosen["concept"].str.split().str[1].astype(int) % N_TRIGGERS).mean() > 0.95
    claim = found.claim("planted")
    assert "is above elsewhere (+0.4" in claim or "elsewhere (+0.5" in claim
    assert found.kinds["random activations for planted"] == "control"


@pytest.mark.slow
def test_retention_is_a_ratio_to_the_raw_probe(model):
    found = evaluate_probes(model, {"planted": planted()}, concepts(4), ks=(1,), n_splits=2)
    wide = found.cells.pivot_table(
        index=["concept", "split", "probe", "method"], columns="metric", values="value", dropna=False
    )
    for (name, split, *_), row in wide.dropna(subset="accuracy").iterrows():
        raw = wide.loc[(name, split, "all", "raw activations"), "accuracy"]
        assert row["retention"] == pytest.approx(row["accuracy"] / raw)
        if raw >= 0.6:
            assert row["retention_above_chance"] == pytest.approx((row["accuracy"] - 0.5) / (raw - 0.5))
        else:
            assert np.isnan(row["retention_above_chance"])


@pytest.mark.slow
def test_nothing_is_retained_of_nothing(model):
    noise = [concept(200 + i, None, n_per_side=24) for i in range(10)]
    found = evaluate_probes(model, {"elsewhere": elsewhere()}, noise, ks=(1,), controls=())
    raw = found.cells.query("probe == 'all' and metric == 'accuracy'").set_index(["concept", "split"])["value"]
    assert abs(raw.mean() - 0.5) < 0.08
    above = found.cells.query("probe == 'k=1' and method == 'elsewhere' and metric == 'retention_above_chance'")
    above = above.set_index(["concept", "split"])["value"]
    assert above[raw < 0.6].isna().all() and above[raw >= 0.6].notna().all() and (raw < 0.6).any()
    assert set(found.kinds) == {"elsewhere", "raw activations"}


def test_a_histogram_counts_the_nearest_region(model):
    one = concept(0, TRIGGERS[0], n_per_side=4)
    partition = regions()
    reading = Reading.of(model, [HOOK], one, concept_splits(one, 1, 0), 3)
    histograms = pooled(reading, assigned(partition))
    for row, sentence in enumerate((*one.positives, *one.negatives)):
        _, cache = model.run_with_cache(model.to_tokens(sentence), names_filter=HOOK)
        x = cache[HOOK][0, 1:]
        x = x[x.norm(dim=1) > 0]  # the neutral letter lies at the centre, and in no region
        expected = torch.bincount(partition.assign(x).regions, minlength=16) / (model.to_tokens(sentence).shape[1] - 1)
        np.testing.assert_allclose(histograms[row], expected.numpy(), atol=1e-6)


def test_one_hot_of_codes_that_are_all_zero_is_zero():
    scores = torch.tensor([[0.0, 0.0, 0.0], [0.1, 3.0, 2.0], [-2.0, -1.0, -3.0]])
    detector = one_hot(Detector(hook_name=HOOK, names=("a", "b", "c"), score=lambda x: scores, row_cost=3))
    assert detector.score(scores).tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_every_kind_of_dictionary_is_probed_at_its_own_hook(model):
    transcoder = make("transcoder", "blocks.0.ln2.hook_normalized", write="blocks.0.hook_mlp_out", d_sae=6)
    named = {"regions": regions(), "transcoder": transcoder, "topk": make("topk", HOOK, d_sae=7, k=2)}
    found = evaluate_probes(model, named, concepts(2), ks=(2,), n_splits=1)
    assert not found.failures
    hooks = {HOOK, "blocks.0.ln2.hook_normalized"}
    assert {name for name in found.kinds if name.startswith("raw")} == {f"raw activations at {hook}" for hook in hooks}
    controls = [f"random activations for {name}" for name in named]
    assert set(found.per_unit().loc["one-hot"].dropna(axis=1, how="all").columns) == {*named, *controls}


def test_two_spellings_of_a_hook_are_one_place(model):
    alias = "blocks.0.hook_in"
    assert resolve_hook(model, alias) == resolve_hook(model, HOOK)
    named = {"planted": planted(), "again": make("topk", alias, d_sae=7, k=2)}
    found = evaluate_probes(model, named, concepts(2), ks=(1,), n_splits=1)
    assert not found.failures and [name for name in found.kinds if name.startswith("raw")] == ["raw activations"]


def test_coresets_are_drawn_from_what_is_given_or_from_sentences_not_judged_on(model):
    few = concepts(2)
    given = {HOOK: 10 * regions().exemplars}
    found = evaluate_probes(model, {"regions": regions()}, few, ks=(1,), activations=given, n_splits=1)
    # As many activations as are given: the coreset is the partition, triggers and all.
    table = found.per_unit("auroc").loc["one-hot"]
    assert table["random activations for regions"].min() > 0.95 < table["regions"].min()
    for name, message in (("blocks.1.hook_resid_pre", "no dictionary reads; they read at"), ("regions", "regions")):
        with pytest.raises(ValueError, match=message):
            evaluate_probes(model, {"regions": regions()}, few, ks=(1,), activations={name: given[HOOK]}, n_splits=1)
    splits = [concept_splits(each, 3, 0, test_fraction=0.3) for each in few]
    spare = set(training_sentences(few, splits))
    for each, own in zip(few, splits):
        sentences = [*each.positives, *each.negatives]
        judged = {sentences[row] for split in own for side in split.judging for row in side}
        assert judged and not judged & spare and len(spare) > 5


@pytest.mark.slow
def test_the_order_of_dictionaries_changes_no_number(model):
    named = {"planted": planted(), "elsewhere": elsewhere(), "regions": regions()}
    one = evaluate_probes(model, named, concepts(2), ks=(1,), n_splits=1)
    other = evaluate_probes(model, dict(reversed(named.items())), concepts(2)[::-1], ks=(1,), n_splits=1)
    keys = ["concept", "probe", "method", "metric"]
    tables = [e.cells.sort_values(keys, ignore_index=True) for e in (one, other)]
    same = ~tables[0]["method"].str.startswith("random")  # coresets are drawn from sentences in the order given
    pd.testing.assert_frame_equal(tables[0][same], tables[1][same])


@pytest.mark.slow
def test_the_model_reads_each_sentence_once(model):
    read = []
    handle = model.embed.register_forward_hook(lambda module, given, output: read.append(given[0].numel()))
    totals = []
    try:
        for named in ({"planted": planted()}, {"planted": planted(), "b": elsewhere(), "c": elsewhere(40)}):
            read.clear()
            evaluate_probes(model, named, concepts(2), ks=(1,), controls=())
            totals.append(sum(read))
    finally:
        handle.remove()
    assert totals[0] == totals[1]


def test_what_fails_is_recorded_and_the_rest_goes_on(model):
    elsewhere_hook = make("standard", "blocks.9.hook_resid_post", D)
    too_wide = make("standard", HOOK, D + 1)
    silent = Concept(name="silent", positives=("a", "b", "c", "d"), negatives=("We say e.", "f", "g", "h"))
    named = {"planted": planted(), "nowhere": elsewhere_hook, "too wide": too_wide}
    found = evaluate_probes(model, named, [*concepts(2), silent], ks=(1,), n_splits=1)
    failures = {(f.method, f.unit) for f in found.failures}
    assert ("nowhere", "") in failures and ("", "silent") in failures
    assert {unit for method, unit in failures if method == "too wide"} >= {"concept 0", "concept 1"}
    assert found.per_unit().loc["k=1"]["planted"].notna().sum() == 2
    assert "too wide" not in set(found.cells["method"])
    # A coreset larger than what there is to draw from costs its control alone.
    small = {HOOK: torch.eye(D)[:3]}
    found = evaluate_probes(model, {"planted": planted()}, concepts(2), ks=(1,), activations=small, n_splits=1)
    assert [f.method for f in found.failures] == ["random activations for planted"]
    assert "k must lie in 1 to 3" in found.failures[0].error


@pytest.mark.slow
def test_it_is_saved_and_loaded(model, tmp_path):
    found = evaluate_probes(model, {"planted": planted()}, concepts(6), ks=(1,), n_splits=1)
    found.save(tmp_path)
    loaded = Evidence.load(tmp_path)
    assert isinstance(loaded, ProbeEvidence) and loaded.claim() == found.claim()
    assert loaded.section().forest == found.section().forest


def test_what_is_refused(model):
    few = concepts(1)
    short = replace(few[0], positives=few[0].positives[:3])
    for named, given, options, message in [
        ({}, few, {}, "at least one dictionary by its name"),
        ({"planted": planted()}, [], {}, "no concept"),
        ({"planted": planted()}, [short], {}, "3 different positives; at least 4"),
        ({"planted": planted()}, few, {"ks": (0,)}, r"ks\[0\] must be a whole number of at least 1, got 0"),
        ({"planted": planted()}, few, {"ks": (1, 13)}, "ks has 13, and 'planted' has 12 latents.*Leave that k out"),
        ({"planted": planted()}, few, {"ks": ()}, "ks is empty"),
        ({"planted": planted()}, few, {"controls": ("pca",)}, r"controls\[0\] must be one of 'coreset', got 'pca'"),
        ({"planted": planted()}, few, {"test_fraction": 1.0}, "test_fraction must lie in"),
        ({"raw activations": planted()}, few, {}, "called 'raw activations'.*another name"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_probes(model, named, given, **options)
    found = evaluate_probes(model, {"planted": planted()}, few, ks=(1,), n_splits=1)
    with pytest.raises(ValueError, match="at least 6 concepts, got 1"):
        found.claim()
    with pytest.raises(ValueError, match="Nothing could be computed. nowhere: ValueError"):
        evaluate_probes(model, {"nowhere": make("standard", "blocks.9.hook_resid_post", D)}, few, ks=(1,))


def test_a_probe_is_sklearns_on_standardised_columns():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(60, 5)) * [1, 100, 1, 0, 1] + 3, np.arange(60) % 2 == 0
    x[y, 1] += 100
    probe = fit_probe(x, y)
    z = StandardScaler().fit_transform(x)
    expected = [LogisticRegression(C=c, max_iter=1000).fit(z, y).decision_function(z) for c in (1e-4, 1e-2, 1.0)]
    assert any(np.allclose(probe.decide(x), each, atol=1e-3) for each in expected)
    assert most_different(x, y, 2)[0] == 1


def test_a_wide_probe_is_that_of_all_its_columns():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(30, 200)), np.arange(30) % 2 == 0
    x[y, 7] += 4
    wide = fit_probe(x, y).decide(x)
    z = StandardScaler().fit_transform(x)
    expected = [
        LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(z, y).decision_function(z) for c in (1e-4, 1e-2, 1.0)
    ]
    assert any(np.allclose(wide, each, atol=2e-2) for each in expected)
