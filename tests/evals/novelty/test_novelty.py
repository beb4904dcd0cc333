"""Novelty of documents: oracles for the estimates, intervals and tests, what is said, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

import saelens_ext as sx
from saelens_ext.evals import Evidence
from saelens_ext.evals.novelty import data
from saelens_ext.evals.novelty.evidence import INSIDE, NoveltyEvidence, Series
from saelens_ext.evals.novelty.novelty import evaluate_novelty
from saelens_ext.ops.resampling import tpr_at_fpr
from tests import models_zoo
from tests.continuations._dictionaries import make

HOOK = "blocks.1.hook_out"
STREAM = {"context_size": 16, "batch_size": 4}
FAST = {"n_bootstrap": 50, "n_permutations": 200, "n_coresets": 2, "n_activations": 700, "max_per_document": 20}
CHECKS = {"n_bootstrap": 400, "n_permutations": 999, "confidence": 0.95, "seed": 0, "rates": [0.05]}
WORDS = [
    "assert",
    "raises",
    "object",
    "name",
    "value",
    "class",
    "method",
    "number",
    "string",
    "module",
    "index",
    "statement",
]


def documents(n, seed, words=WORDS, length=14):
    generator = np.random.default_rng(seed)
    return [f"{i} " + " ".join(generator.choice(words, size=length)) for i in range(n)]


@pytest.fixture(scope="module")
def model():
    return models_zoo.make_model("llama", "SAETransformerBridge")


@pytest.fixture(scope="module")
def reference(model):
    return sx.KeptStream(sx.ActivationStream(model, documents(80, 0), HOOK, **STREAM))


@pytest.fixture(scope="module")
def partition(reference):
    return sx.fit_exemplar_partition(reference, percentile=40).dictionary


@pytest.fixture(scope="module")
def inside():
    return documents(30, 1)


@pytest.fixture(scope="module")
def outside():
    return {"digits": documents(25, 2, words=list("0123456789"))}


@pytest.fixture(scope="module")
def found(model, partition, reference, inside, outside):
    return evaluate_novelty(model, partition, reference, inside, outside, **FAST)


def made(scores, sizes, *, kinds=None, baselines=None, **settings):
    """Evidence of given scores: ``scores[method]`` is a list of draws, each with the values of every set in a row."""
    series = tuple(Series(method, draw) for method, draws in scores.items() for draw in range(len(draws)))
    given = {
        "kinds": kinds or {name: "control" if name != "EP" else "unsupervised" for name in scores},
        "settings": CHECKS | settings,
        "scores": torch.tensor(np.array([values for draws in scores.values() for values in draws])).float(),
        "series": series,
        "sizes": sizes,
        "baselines": baselines or {"EP": [name for name in scores if name != "EP"]},
        "partitions": {"EP": {"threshold": 0.5, "percentile": 1.0, "n_regions": 7}},
    }
    empty = pd.DataFrame(columns=["set", "document", "method", "metric", "value"])
    evidence = NoveltyEvidence(cells=empty, **given)
    return dataclasses.replace(evidence, cells=evidence.document_cells())


def normal_documents(generator, n, size, shift=0.0, spread=0.7):
    """Scores of documents that resemble each other within a document; their variance is 1."""
    shared = generator.normal(size=n)[:, None] * spread
    return (shared + generator.normal(size=(n, size)) * math.sqrt(1 - spread**2) + shift).ravel()


# --- oracles ---


@pytest.mark.parametrize("delta", [0.5, 1.5])
def test_a_shift_of_gaussians_has_the_auroc_that_theory_gives(delta):
    generator = np.random.default_rng(0)
    inside, outside = normal_documents(generator, 1500, 8), normal_documents(generator, 1500, 8, delta)
    evidence = made({"EP": [np.r_[inside, outside]]}, {INSIDE: [8] * 1500, "shifted": [8] * 1500}, n_bootstrap=20)
    row = evidence.summary().iloc[0]
    assert row["estimate"] == pytest.approx(norm.cdf(delta / math.sqrt(2)), abs=0.02)


@pytest.mark.slow
def test_inside_against_inside_covers_a_half_in_95_of_100_runs():
    generator, covered, runs = np.random.default_rng(1), 0, 300
    for _ in range(runs):
        scores = normal_documents(generator, 80, 6)
        evidence = made({"EP": [scores]}, {INSIDE: [6] * 40, "more of the same": [6] * 40}, rates=[])
        row = evidence.summary().iloc[0]
        covered += row["low"] <= 0.5 <= row["high"]
    assert 0.92 <= covered / runs <= 0.98


@pytest.mark.slow
def test_a_coreset_equal_to_the_exemplars_differs_by_exactly_nothing(found):
    scores = found.scores[[0, 0, 0]]
    same = dataclasses.replace(
        found,
        scores=scores,
        series=(Series("EP", 0), Series("coreset of EP", 0), Series("coreset of EP", 1)),
        kinds={"EP": "unsupervised", "coreset of EP": "control"},
        baselines={"EP": ["coreset of EP"]},
        partitions={"EP": {"threshold": 0.5, "percentile": None, "n_regions": 9}},
        cells=found.cells.iloc[:0],
    )
    table = same.comparisons()
    assert (table[["difference", "low", "high"]] == 0).all().all() and (table["p"] == 1).all()
    assert same.verdict().startswith("EP (9 exemplars) is no better than as many random activations")


@pytest.mark.slow
def test_two_scores_that_are_equally_good_are_told_apart_in_about_5_of_100_runs():
    generator, n_below, runs = np.random.default_rng(2), 0, 300
    sizes = {INSIDE: [5] * 25, "shifted": [5] * 25}
    for _ in range(runs):
        common = np.r_[normal_documents(generator, 25, 5), normal_documents(generator, 25, 5, 1.0)]
        scores = {name: [common + normal_documents(generator, 50, 5)] for name in ("EP", "knn")}
        n_below += made(scores, sizes, rates=[]).comparisons()["p"].iloc[0] < 0.05
    assert 0.02 <= n_below / runs <= 0.08


@pytest.mark.slow
def test_one_more_coreset_is_told_from_coresets_in_few_runs_however_many_documents_there_are():
    """Over documents alone, each draw is a little better or worse, and certainly so with enough of them."""
    generator, over_documents, over_both, runs = np.random.default_rng(3), 0, 0, 60
    sizes = {INSIDE: [4] * 150, "shifted": [4] * 150}
    for _ in range(runs):
        common = np.r_[normal_documents(generator, 150, 4), normal_documents(generator, 150, 4, 1.0)]
        tilt = np.r_[np.zeros(600), np.ones(600)]
        draws = [common + 0.05 * generator.normal(size=1200) + 0.2 * generator.normal() * tilt for _ in range(6)]
        row = made({"EP": draws[:1], "coreset of EP": draws[1:]}, sizes, rates=[]).comparisons().iloc[0]
        over_documents += row["p_documents"] < 0.05
        over_both += row["p"] < 0.05
    assert over_documents / runs > 0.5 and over_both / runs <= 0.15


def test_estimates_are_those_of_all_activations(found):
    for method in ("EP p40", "knn", "mahalanobis", "norm", "entropy"):
        for name in found.outside:
            ((out, own),) = found.pairs(name, method)
            truth = np.r_[np.ones(len(out.scores)), np.zeros(len(own.scores))]
            rows = found.summary().set_index(["set", "method", "metric"]).sort_index().loc[name, method]
            assert rows.loc["auroc", "estimate"] == pytest.approx(roc_auc_score(truth, np.r_[out.scores, own.scores]))
            expected = tpr_at_fpr(out.scores, own.scores, 0.05).tpr
            assert rows.loc["tpr_at_0.05", "estimate"] == pytest.approx(expected)
            assert (rows["low"] <= rows["estimate"]).all() and (rows["estimate"] <= rows["high"]).all()


def test_cells_hold_a_value_per_document_and_weighted_give_the_estimate(found):
    cells = found.cells.set_index(["method", "set", "metric"]).sort_index()
    for name in found.outside:
        values = cells.loc[("EP p40", name, "auroc"), "value"].to_numpy()
        assert len(values) == len(found.sizes[name])
        summary = found.summary().set_index(["set", "method", "metric"])["estimate"]
        assert np.average(values, weights=found.sizes[name]) == pytest.approx(summary[name, "EP p40", "auroc"])
    assert set(found.cells[found.cells["set"] == INSIDE]["metric"]) == {"score"}


def test_the_estimate_of_a_coreset_is_the_mean_over_its_draws(found):
    areas = []
    for out, own in found.pairs("digits", "coreset of EP p40"):
        truth = np.r_[np.ones(len(out.scores)), np.zeros(len(own.scores))]
        areas.append(roc_auc_score(truth, np.r_[out.scores, own.scores]))
    row = (
        found.summary().set_index(["metric", "set", "method"]).sort_index().loc["auroc", "digits", "coreset of EP p40"]
    )
    assert len(areas) == 2 and row["estimate"] == pytest.approx(np.mean(areas))
    assert (row["draw_low"], row["draw_high"]) == pytest.approx((min(areas), max(areas)))


def test_differences_are_those_of_the_estimates_and_holm_is_over_one_baseline(found):
    table = found.comparisons()
    estimates = found.summary().query("metric == 'auroc'").set_index(["set", "method"])["estimate"]
    for row in table.itertuples():
        assert row.difference == pytest.approx(estimates[row.set, row.method] - estimates[row.set, row.other])
        assert row.p == np.fmax(row.p_documents, row.p_draws)
    assert set(table["other"]) == {"coreset of EP p40", "knn", "mahalanobis", "norm", "entropy"}
    for other, rows in table.groupby("other"):
        worst = rows["p"].idxmin()
        assert rows.loc[worst, "p_holm"] == pytest.approx(min(1, rows["p"].min() * len(rows))), other
    assert set(found.comparisons("knn")["other"]) == set(found.kinds) - {"knn"}


@pytest.mark.slow
def test_a_document_is_one_unit_however_many_tokens_it_has(model, partition, reference, inside, outside):
    found = evaluate_novelty(
        model, partition, reference, inside, outside, level="document", **FAST | {"rates": (0.1,), "built_in": ()}
    )
    assert set(found.sizes["digits"]) == {1} and len(found.sizes["digits"]) == 25
    by_token = evaluate_novelty(model, partition, reference, inside, outside, built_in=(), **FAST)
    assert torch.allclose(
        torch.tensor(found.documents("digits", "EP p40").scores),
        torch.tensor(by_token.documents("digits", "EP p40").means().scores),
        atol=1e-6,
    )


# --- what is read ---


def test_scores_are_of_the_activations_of_the_documents(model, partition, reference, found, inside):
    stream = sx.ActivationStream(model, inside, HOOK, **STREAM)
    x = torch.cat([batch.activations[HOOK] for batch in stream])
    ids = torch.cat([batch.document_ids for batch in stream])
    order = np.cumsum([0, *found.sizes[INSIDE]])
    scores = found.documents(INSIDE, "EP p40").scores
    for document in (0, 3, 7):
        own = partition.assign(x[ids == document]).distances[: found.sizes[INSIDE][document]]
        at = slice(order[document], order[document + 1])
        assert torch.allclose(torch.tensor(scores[at]).float(), own, atol=1e-5)


def test_entropies_are_those_of_the_same_tokens(model, found, inside):
    logits = model(model.to_tokens(inside[0])[:, :16], return_type="logits")[0, 1:].double()
    expected = torch.distributions.Categorical(logits=logits).entropy()
    scores = found.documents(INSIDE, "entropy").scores[: len(expected)]
    assert torch.allclose(torch.tensor(scores), expected.detach(), atol=1e-4)


def test_built_in_sets_are_made_from_the_inside_documents(model, reference, inside):
    ids = data.documents_of(model, reference, inside, n_tokens=10_000, max_per_document=50)
    sets = {name: data.built_in_set(name, model, reference, ids, 0) for name in data.BUILT_IN}
    assert sets["reversed_tokens"] == [one[::-1] for one in ids]
    assert [len(one) for one in sets["random_tokens"]] == [len(one) for one in ids]
    drawn = {i for one in sets["random_tokens"] for i in one}
    assert not drawn & set(reference.excluded_ids) and len(drawn) > 100
    tokenizer = reference.tokenizer
    for before, after in zip(ids, sets["shuffled_words"]):
        words = sorted(tokenizer.decode(before).split())
        shuffled = tokenizer.decode(after).split()
        assert len(after) <= len(before) and set(shuffled[:-1]) <= set(words)
    assert sets["shuffled_words"] != ids


def test_documents_are_cut_counted_and_taken_once(model, reference):
    long = " ".join(WORDS * 20)
    ids = data.documents_of(model, reference, [long, long, "a b c", "d e f g"], n_tokens=10_000, max_per_document=30)
    assert len(ids[0]) == 30 and len(ids) == 3
    few = data.documents_of(model, reference, documents(50, 4), n_tokens=60, max_per_document=30)
    assert sum(map(len, few)) >= 60 > sum(map(len, few[:-1]))
    stream = sx.ActivationStream(model, [long, "a b c"], HOOK, **STREAM)
    assert data.documents_of(model, reference, stream, n_tokens=10_000, max_per_document=30) == ids[:2]


@pytest.mark.slow
def test_the_sample_of_the_reference_is_uniform_over_the_stream(reference):
    (hook,) = reference.requested_hook_names
    batches, n = [], 0
    for batch in reference:  # each activation says where it is
        numbers = torch.arange(n, n + len(batch)).float()[:, None]
        batches.append(dataclasses.replace(batch, activations={hook: numbers}))
        n += len(batch)
    numbered = sx.KeptStream.holding(reference, batches)
    counts = torch.zeros(n)
    for seed in range(60):
        read = data.read_reference(numbered, 100, 20, torch.Generator().manual_seed(seed))
        at = read.activations[:, 0].long()
        assert len(at) == 100 and (at.diff() > 0).all() and read.n_read == n
        counts[at] += 1
    expected = 60 * 100 / n
    tenths = torch.stack([part.mean() for part in counts.chunk(10)])
    assert (tenths - expected).abs().max() < 0.2 * expected
    whole = data.read_reference(numbered, 10**6, 20, torch.Generator())
    assert torch.equal(whole.activations[:, 0], torch.arange(n).float())


@pytest.mark.slow
def test_partitions_share_a_pass_and_the_order_of_methods_changes_nothing(model, partition, reference, inside, outside):
    finer = sx.fit_exemplar_partition(reference, percentile=5).dictionary
    sae = make("standard", HOOK, model.cfg.d_model, d_sae=8)
    two = evaluate_novelty(model, [partition, finer, sae], reference, inside, outside, built_in=(), **FAST)
    other = evaluate_novelty(model, [sae, finer, partition], reference, inside, outside, built_in=(), **FAST)
    assert set(two.kinds) == {
        "EP p40", "EP p5", "standard SAE", "coreset of EP p40", "coreset of EP p5", "knn", "mahalanobis", "norm",
        "entropy",
    }  # fmt: skip
    keys = ["set", "metric", "method"]
    assert two.summary().set_index(keys).sort_index().equals(other.summary().set_index(keys).sort_index())
    section = two.section()
    assert section.figures[0].title == "AUROC by percentile" and section.figures[0].lines[0].x == (5.0, 40.0)
    assert two.baselines["standard SAE"] == ["knn", "mahalanobis", "norm", "entropy"]


@pytest.mark.parametrize("model_class", models_zoo.MODEL_CLASSES)
def test_any_model_and_an_sae_of_either_kind(model_class, inside, outside):
    model = models_zoo.make_model("gpt2", model_class)
    hook = "blocks.1.hook_resid_post"
    stream = sx.ActivationStream(model, documents(40, 0), hook, **STREAM)
    sae = make("topk", hook, model.cfg.d_model, d_sae=128)
    found = evaluate_novelty(model, {"mine": sae}, stream, inside, outside, built_in=(), baselines=("knn",), **FAST)
    assert list(found.kinds) == ["mine", "knn"] and "mine against other measures" in found.verdict()


# --- what is said ---


def verdict_of(first, second, n=40):
    """Of an EP and a coreset of two draws that hardly differ, by their shifts on two sets."""
    generator = np.random.default_rng(5)
    common = np.r_[normal_documents(generator, n, 4), normal_documents(generator, 2 * n, 4)]
    noise = [0.02 * generator.normal(size=len(common)) for _ in range(3)]
    at = np.repeat([0, 1, 2], n * 4)
    shifted = [common + np.array([0.0, *shift])[at] for shift in (first, second, second)]
    draws = [values + e for values, e in zip(shifted, noise)]
    sizes = {INSIDE: [4] * n, "news": [4] * n, "code": [4] * n}
    return made({"EP": draws[:1], "coreset of EP": draws[1:]}, sizes, rates=[]).verdict()


def test_better_needs_a_difference_that_is_certain_and_none_that_is_worse():
    better, same, mixed = verdict_of((2, 1), (1, 1)), verdict_of((1, 1), (1, 1)), verdict_of((2, 0), (1, 1))
    assert better.startswith("EP (7 exemplars) is better than as many random activations: above on news (+")
    assert same == (
        "EP (7 exemplars) is no better than as many random activations: it cannot be told from them on 2 sets "
        f"(differences of AUROC up to {float(same.split('up to ')[1].rstrip(').')):.3f})."
    )
    assert mixed.startswith("EP (7 exemplars) is no better than as many random activations: above on news (+")
    assert "below on code (-" in mixed


def test_too_few_permutations_are_said_outright(found):
    few = dataclasses.replace(found, settings=found.settings | {"n_permutations": 20})
    assert few.verdict().startswith("Too few documents or permutations for any claim: the smallest")


def test_what_was_found_is_the_same_after_saving(found, tmp_path):
    again = Evidence.load(found.save(tmp_path))
    assert isinstance(again, NoveltyEvidence) and again.series == found.series and again.sizes == found.sizes
    pd.testing.assert_frame_equal(again.summary(), found.summary())
    pd.testing.assert_frame_equal(again.comparisons(), found.comparisons())
    pd.testing.assert_frame_equal(again.cells, found.cells)
    assert again.verdict() == found.verdict() and repr(again.section()) == repr(found.section())


def test_the_section_has_tables_of_sets_by_scores_and_the_figures(found):
    section = found.section()
    assert [table.title for table in section.tables] == [*found.metrics.values(), "Differences of AUROC"]
    assert section.tables[0].columns == ("method", *found.outside)
    assert [row[0] for row in section.tables[0].rows] == list(found.kinds)
    titles = [figure.title for figure in section.figures]
    assert titles[0] == "Distances to the nearest exemplar, EP p40" and "ROC, digits against inside" in titles
    theta = [line for line in section.figures[0].lines if line.label == "threshold θ"]
    assert theta[0].x == (pytest.approx(found.partitions["EP p40"]["threshold"]),) * 2
    for figure in section.figures:
        for line in figure.lines:
            assert len(line.x) == len(line.y) and np.isfinite([*line.x, *line.y]).all()
        if figure.title.startswith("ROC"):
            assert all(np.all(np.diff(line.y) >= 0) and line.y[-1] == 1 for line in figure.lines)
    json.dumps(section.settings, allow_nan=False)
    assert found.claim() == section.verdict


def test_the_roc_goes_through_the_reported_points(found):
    summary = found.summary().set_index(["set", "metric", "method"])["estimate"]
    for figure in found.section().figures:
        if figure.title.startswith("ROC"):
            name = figure.title.split()[1].rstrip(",")
            for line in figure.lines:
                at = line.y[np.argmin(np.abs(np.array(line.x) - 0.05))]
                assert at == pytest.approx(summary[name, "tpr_at_0.05", line.label], abs=0.03)


# --- failures ---


@pytest.mark.slow
def test_a_score_that_fails_loses_nothing_else(model, partition, reference, inside, outside):
    found = evaluate_novelty(model, partition, reference, inside, outside, k=10_000, built_in=(), **FAST)
    assert [failure.method for failure in found.failures] == ["knn"] and "knn" not in found.kinds
    assert "must lie between 1" in str(found.failures[0]) and found.section().failures[0].startswith("knn: ")
    assert set(found.summary()["method"]) == set(found.kinds)


def test_a_score_that_fails_on_one_set_is_left_out_there(model, partition, reference, inside, outside, monkeypatch):
    from saelens_ext.evals.novelty import scores as novelty_scores

    original, seen = novelty_scores.next_token_entropy, []

    def fails_later(model, token_ids, mask):
        seen.append(len(token_ids))
        if sum(seen) > 40:
            raise RuntimeError("out of memory")
        return original(model, token_ids, mask)

    monkeypatch.setattr(novelty_scores, "next_token_entropy", fails_later)
    found = evaluate_novelty(model, partition, reference, inside, outside, built_in=("reversed_tokens",), **FAST)
    assert {str(failure) for failure in found.failures} >= {"entropy on reversed_tokens: out of memory"}
    table = found.summary().query("metric == 'auroc'").set_index(["set", "method"])["estimate"]
    assert ("reversed_tokens", "knn") in table.index and ("reversed_tokens", "entropy") not in table.index
    assert np.isfinite(table).all() and found.section().tables[0].rows[-1][0] == "entropy"


def test_a_set_that_cannot_be_read_loses_nothing_else(model, partition, reference, inside, outside, monkeypatch):
    original = data.read_ids

    def broken(model, reference, documents, n_activations):
        if documents[0] == reversed_first:
            raise RuntimeError("the disk is full")
        yield from original(model, reference, documents, n_activations)

    reversed_first = data.documents_of(model, reference, inside, n_tokens=400, max_per_document=20)[0][::-1]
    monkeypatch.setattr(data, "read_ids", broken)
    found = evaluate_novelty(model, partition, reference, inside, outside, built_in=("reversed_tokens",), **FAST)
    assert found.outside == ["digits"] and str(found.failures[0]) == "reversed_tokens: the disk is full"


# --- what is refused ---


def test_documents_of_the_reference_are_refused(model, partition, reference, inside, outside):
    shared = documents(80, 0)[17]
    with pytest.raises(ValueError, match=r"Document 1 of inside is in the reference too: '17 .*fitted to"):
        evaluate_novelty(model, partition, reference, [inside[0], f"  {shared}\n", *inside[1:]], outside)
    with pytest.raises(ValueError, match="of digits is in the reference"):
        evaluate_novelty(model, partition, reference, inside, {"digits": [*outside["digits"], shared]})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rates": (0.0001,)}, r"0.0001 cannot be read off \d+ inside tokens: it must be at least"),
        ({"rates": (0.01,), "level": "document"}, "0.01 cannot be read off 30 inside documents"),
        ({"rates": (1.5,)}, r"rates must lie in \(0, 1\), got 1.5"),
        ({"level": "sentence"}, "level must be one of 'token', 'document', got 'sentence'"),
        ({"baselines": ("kn",)}, "baselines must be one of .*got 'kn'. Did you mean 'knn'"),
        ({"built_in": ("random",)}, "built_in must be one of .*got 'random'"),
        ({"n_coresets": 1}, "n_coresets must be at least 2, got 1"),
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(model, partition, reference, inside, outside, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_novelty(model, partition, reference, inside, outside, **FAST | options)


def test_too_few_documents_are_refused(model, partition, reference, inside, outside):
    with pytest.raises(ValueError, match=r"inside has 19 different documents .* at least 20"):
        evaluate_novelty(model, partition, reference, [*inside[:19], inside[0]], outside)
    with pytest.raises(ValueError, match="digits has 3 different"):
        evaluate_novelty(model, partition, reference, inside, {"digits": outside["digits"][:3]})


def test_what_cannot_be_compared_is_refused(model, partition, reference, inside, outside):
    with pytest.raises(ValueError, match="Two of the 2 dictionaries would be called 'EP p40'"):
        evaluate_novelty(model, [partition, partition], reference, inside, outside)
    with pytest.raises(ValueError, match="partitions is empty"):
        evaluate_novelty(model, [], reference, inside, outside)
    with pytest.raises(ValueError, match="called 'knn', as a baseline is"):
        evaluate_novelty(model, {"knn": partition}, reference, inside, outside)
    with pytest.raises(ValueError, match="An outside set is called 'inside'"):
        evaluate_novelty(model, partition, reference, inside, {"inside": inside})
    elsewhere = make("standard", "blocks.2.hook_out", model.cfg.d_model)
    with pytest.raises(ValueError, match=r"of the hook 'blocks.2.hook_out', and reference reads 'blocks.1.hook_out'"):
        evaluate_novelty(model, elsewhere, reference, inside, outside)
    both = sx.ActivationStream(model, documents(40, 0), [HOOK, "blocks.0.hook_out"], **STREAM)
    with pytest.raises(ValueError, match="one hook, got ActivationStream"):
        evaluate_novelty(model, partition, both, inside, outside)


@pytest.mark.parametrize("kept", [False, True])
def test_documents_are_read_at_the_positions_of_the_reference(model, kept):
    reference = sx.ActivationStream(model, documents(6, 0), HOOK, last_token_only=True, **STREAM)
    reference = sx.KeptStream(reference) if kept else reference
    batches = list(data.stream_like(model, reference, documents(5, 1)))
    assert torch.cat([batch.document_ids for batch in batches]).tolist() == list(range(5))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_conversations_end_as_those_of_the_reference(prompt, kept):
    chatty = models_zoo.make_model("llama", "SAETransformerBridge")
    chatty.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant] Well,{% endif %}"
    )
    first, second = ([{"messages": [{"role": "user", "content": f"{n} {i}"}]} for i in range(3)] for n in ("a", "b"))
    reference = sx.ActivationStream(chatty, Dataset.from_list(first), HOOK, add_generation_prompt=prompt, **STREAM)
    reference = sx.KeptStream(reference) if kept else reference
    ids = data.documents_of(chatty, reference, Dataset.from_list(second), n_tokens=10_000, max_per_document=100)
    assert [chatty.tokenizer.decode(each).endswith("Well,") for each in ids] == [prompt] * 3
