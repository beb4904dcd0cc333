"""What is planted is detected, what is not is not, and nothing is judged where it was chosen."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from saelens_ext.concepts.comparison import compare_detection
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.diff_means import split_sentences
from saelens_ext.concepts.sentence_scores import sentence_scores
from saelens_ext.evals import baselines
from saelens_ext.evals.concepts_data import Concept
from saelens_ext.evals.detection.detection import DetectionEvidence, evaluate_detection
from saelens_ext.evals.detection.detection_cells import concept_splits
from saelens_ext.evals.evidence import Evidence
from saelens_ext.evals.methods import Method
from tests import models_zoo
from tests.continuations._dictionaries import make
from tests.evals.planted import HOOK, N_TRIGGERS, TRIGGERS, D, concept, model_with_directions, words


@pytest.fixture(scope="module")
def model():
    return model_with_directions()


def directions(name, rows, **options):
    return Method.from_directions(name, rows, HOOK, similarity="dot", **options)


def gaussian(k, *, seed=0, first=0, **options):
    rows = torch.randn(k, D, generator=torch.Generator().manual_seed(seed))
    rows[:, :first] = 0
    return directions(options.pop("name", f"gaussian {k}"), rows, **options)


def plain(evidence, metric="auroc", rule="auroc"):
    return evidence.per_unit(metric).loc[rule]


@pytest.mark.slow
def test_a_planted_direction_is_found_and_controls_find_nothing(model):
    concepts = [concept(i, TRIGGERS[i % N_TRIGGERS]) for i in range(50)]
    methods = [directions("planted", torch.eye(D)), gaussian(20, first=N_TRIGGERS, kind="control", name="elsewhere")]
    found = evaluate_detection(model, methods, concepts, n_splits=2, diff_means=True, probe=False)
    for rule in ("auroc", "contrast"):
        assert plain(found, rule=rule)["planted"].mean() > 0.99
        assert abs(plain(found, rule=rule)["elsewhere"].mean() - 0.5) < 0.05
        assert abs(plain(found, "permuted_auroc", rule)["elsewhere"].mean() - 0.5) < 0.05
    # One token in twenty tells, and six sentences a side choose: the supervised direction is noisy.
    means = plain(found).mean()
    assert means["elsewhere"] + 0.05 < means["difference of means"] < means["planted"]
    chosen = found.cells.query("method == 'planted' and rule == 'contrast' and metric == 'auroc'")
    expected = chosen["concept"].str.split().str[1].astype(int) % N_TRIGGERS
    assert (chosen["column"] == expected).mean() > 0.95
    claim = found.claim("planted")
    assert "planted (mean held-out AUROC 0.9" in claim or "planted (mean held-out AUROC 1.0" in claim
    assert "is above elsewhere (+0." in claim and not found.failures


@pytest.mark.slow
def test_permuted_labels_choose_without_knowledge_where_a_column_separates_perfectly(model):
    # One permutation for all concepts, with a positive too many on one side, gave means from 0.51 to 0.68.
    concepts = [concept(i, TRIGGERS[i % N_TRIGGERS], n_per_side=n) for i, n in enumerate([12] * 12 + [10] * 12)]
    for seed in range(2):
        found = evaluate_detection(model, [directions("planted", torch.eye(D))], concepts, seed=seed, probe=False)
        for rule in ("auroc", "contrast"):
            assert abs(plain(found, "permuted_auroc", rule)["planted"].mean() - 0.5) < 0.05


def test_permuted_labels_say_nothing_of_the_true_ones_and_differ_between_concepts():
    for n_up, n_down in ((12, 12), (26, 16), (10, 30)):
        sides = [tuple(f"{sign} {j}" for j in range(n)) for sign, n in (("yes", n_up), ("no", n_down))]
        concepts = [Concept(name=f"c{i}", positives=sides[0], negatives=sides[1]) for i in range(40)]
        splits = [concept_splits(each, 1, 3)[0] for each in concepts]
        for split in splits:
            for side in split.choosing:
                halves = [set(half.tolist()) & set(side.tolist()) for half in split.permuted]
                assert len(halves[0]) == len(halves[1]) == len(side) // 2 and not halves[0] & halves[1]
        assert len({tuple(split.permuted[0].sort().values.tolist()) for split in splits}) > 35


def longer(number, *, n_more, size=40):
    """Noise on both sides, the positives longer by up to so many words: on average, not always."""
    generator = np.random.default_rng([7, number])
    n_words = [generator.integers(4, 9 + more, size=size) for more in (n_more, 0)]
    sides = [tuple("We " + " ".join(words(generator, n)) + "." for n in side) for side in n_words]
    return Concept(name=f"concept {number}", positives=sides[0], negatives=sides[1])


@pytest.mark.slow
def test_where_one_side_is_longer_any_direction_detects_its_length(model):
    concepts = [longer(i, n_more=6) for i in range(20)]
    noise = [gaussian(60, first=N_TRIGGERS)]
    found = evaluate_detection(model, noise, concepts, n_splits=3, probe=False, diff_means=False)
    for rule in ("auroc", "contrast"):
        means = {m: plain(found, m, rule)["gaussian 60"].mean() for m in ("auroc", "permuted_auroc", "any_auroc")}
        # A choice without knowledge, and none at all, detect length alike; so does one made with the labels.
        assert min(means.values()) > 0.55
        assert abs(means["permuted_auroc"] - means["any_auroc"]) < 0.06
        assert abs(plain(found, "equal_length_auroc", rule)["gaussian 60"].mean() - 0.5) < 0.05
        assert plain(found, rule=rule)["number of tokens"].mean() > 0.75
        assert plain(found, "equal_length_auroc", rule)["number of tokens"].mean() < 0.6
    assert (
        found.kinds["number of tokens"] == "control" and "without the model" in found.descriptions["number of tokens"]
    )
    averaged = evaluate_detection(model, noise, concepts, n_splits=3, probe=False, diff_means=False, pooling="mean")
    assert abs(plain(averaged, "any_auroc")["gaussian 60"].mean() - 0.5) < 0.03
    assert abs(plain(averaged, "permuted_auroc")["gaussian 60"].mean() - 0.5) < 0.05
    same = evaluate_detection(model, noise, [longer(i, n_more=0) for i in range(20)], n_splits=3, rules=["auroc"])
    assert abs(plain(same, "any_auroc")["gaussian 60"].mean() - 0.5) < 0.03
    assert abs(plain(same)["number of tokens"].mean() - 0.5) < 0.06


def test_pairs_of_about_equal_length_by_a_double_loop(model):
    one = longer(3, n_more=0, size=20)
    found = evaluate_detection(model, [gaussian(7)], [one], n_splits=1, rules=["auroc"], probe=False)
    column = int(found.cells.query("method == 'gaussian 7'")["column"].iloc[0])
    sides = []
    for side in (one.positives, one.negatives):
        judging = split_sentences([s.lower() for s in side], seed=0)[1]
        texts = [s for s in side if s.lower() in judging]
        scores = sentence_scores(model, gaussian(7).detector, texts)[:, column]
        sides.append([(len(model.to_tokens(t)[0]) - 1, float(score)) for t, score in zip(texts, scores)])
    wins = [(a > b) + (a == b) / 2 for n, a in sides[0] for m, b in sides[1] if abs(n - m) <= 0.1 * max(n, m)]
    assert 20 <= len(wins) < 100
    assert plain(found, "equal_length_auroc")["gaussian 7"].item() == pytest.approx(np.mean(wins))
    apart = Concept(name="apart", positives=[f"{s} {s}" for s in one.positives], negatives=one.negatives)
    none = evaluate_detection(model, [gaussian(7)], [apart], n_splits=1, rules=["auroc"], probe=False)
    assert np.isnan(plain(none, "equal_length_auroc")["gaussian 7"].item())


@pytest.mark.slow
def test_many_columns_of_noise_look_good_where_they_were_chosen(model):
    concepts = [concept(100 + i, None) for i in range(16)]
    found = evaluate_detection(model, [gaussian(500, first=N_TRIGGERS)], concepts, n_splits=3, probe=False)
    for rule in ("auroc", "contrast"):
        assert plain(found, "optimism", rule)["gaussian 500"].mean() > 0.1
        assert abs(plain(found, rule=rule)["gaussian 500"].mean() - 0.5) < 0.06
    assert plain(found, "chosen_auroc")["gaussian 500"].mean() > 0.85
    assert "cannot be told from difference of means" in found.claim()


@pytest.mark.parametrize("seed", [0, 5])
def test_one_concept_is_compare_detection(model, seed):
    one = concept(3, TRIGGERS[3])
    method = gaussian(30)
    found = evaluate_detection(model, [method], [one], n_splits=1, rules=["auroc"], probe=False, seed=seed)
    compared = compare_detection(
        model, {"m": method.detector}, one.positives, one.negatives, diff_means_at=HOOK, seed=seed
    )
    for row, name in zip(compared.rows, ("gaussian 30", "difference of means")):
        assert plain(found)[name].item() == pytest.approx(row.auroc)
        assert plain(found, "chosen_auroc")[name].item() == pytest.approx(row.chosen_auroc)
    cell = found.cells.query("method == 'gaussian 30'").iloc[0]
    assert (cell["column"], cell["chosen"]) == (compared.rows[0].column, compared.rows[0].chosen)


def test_the_contrast_rule_by_a_double_loop(model):
    one = concept(7, TRIGGERS[1])
    method = gaussian(9)
    found = evaluate_detection(model, [method], [one], n_splits=1, rules=["contrast"], probe=False, diff_means=False)
    means = []
    for side in (one.positives, one.negatives):
        scores = []
        for sentence in split_sentences(side, seed=0)[0]:
            tokens = model.to_tokens(sentence)
            _, cache = model.run_with_cache(tokens, names_filter=HOOK)
            scores += list(method.detector.score(cache[HOOK][0, 1:]))
        means.append(torch.stack(scores).mean(dim=0))
    assert int(found.cells["column"].iloc[0]) == int((means[0] - means[1]).argmax())


@pytest.mark.slow
def test_the_order_and_number_of_methods_change_no_number(model):
    concepts = [concept(i, TRIGGERS[i]) for i in range(3)]
    methods = [gaussian(8, seed=1), gaussian(8, seed=2, name="other"), directions("planted", torch.eye(D))]
    one = evaluate_detection(model, methods, concepts, n_splits=2)
    other = evaluate_detection(model, methods[::-1], concepts[::-1], n_splits=2)
    alone = evaluate_detection(model, methods[:1], concepts, n_splits=2)
    keys = ["concept", "method", "rule", "metric", "split"]
    tables = [e.cells.sort_values(keys, ignore_index=True) for e in (one, other)]
    pd.testing.assert_frame_equal(*tables)
    own = one.cells[one.cells["method"].isin(alone.kinds)].sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(own, alone.cells.sort_values(keys, ignore_index=True))
    summaries = [e.summary().sort_values(["method", "rule", "metric"], ignore_index=True) for e in (one, other)]
    pd.testing.assert_frame_equal(*summaries)


@pytest.mark.slow
def test_the_model_reads_each_sentence_once(model):
    concepts = [concept(i, TRIGGERS[i], n_hard=4) for i in range(3)]
    read = []
    handle = model.embed.register_forward_hook(lambda module, given, output: read.append(given[0].numel()))
    deep = Method.from_directions("deep", torch.eye(D)[:3], "blocks.1.hook_resid_post")
    totals = []
    try:
        for methods in ([deep], [deep, gaussian(5), gaussian(50), directions("planted", torch.eye(D))]):
            read.clear()
            evaluate_detection(model, methods, concepts, n_splits=4)
            totals.append(sum(read))
    finally:
        handle.remove()
    assert totals[0] == totals[1]
    sentences = [s for c in concepts for s in (*c.positives, *c.negatives, *c.hard_negatives)]
    assert totals[0] < 1.5 * sum(model.to_tokens(s).shape[1] for s in sentences)  # padding within a batch


def test_draws_of_a_control_are_averaged_and_hard_negatives_judged_apart(model):
    x = torch.randn(80, D, generator=torch.Generator().manual_seed(0))
    coresets = [baselines.random_activations(x, 6, HOOK, draw=draw) for draw in range(3)]
    concepts = [concept(i, TRIGGERS[i], n_hard=5) for i in range(2)]
    # A hard negative that says the trigger too cannot be told from a positive.
    says_it = tuple(f"We {TRIGGERS[0]} {word} now." for word in ("abc", "fgh", "klm", "pqr"))
    concepts[0] = replace(concepts[0], name="hard", hard_negatives=says_it)
    found = evaluate_detection(model, [*coresets, directions("planted", torch.eye(D))], concepts, n_splits=2)
    own = found.cells.query("method == @coresets[0].name and metric == 'auroc' and rule == 'auroc'")
    assert set(own["draw"]) == {0, 1, 2} and len(own) == 3 * 2 * 2
    mean = own.groupby("concept")["value"].mean()
    assert plain(found)[coresets[0].name]["hard"] == pytest.approx(mean["hard"])
    hard = plain(found, "hard_negative_auroc")["planted"]
    assert plain(found)["planted"].min() > 0.99 and hard["concept 1"] > 0.99 and hard["hard"] < 0.6
    assert found.settings["n_columns"] == {coresets[0].name: 6, "planted": D}


def test_codes_and_transcoders_are_methods_like_others(model):
    transcoder = make("transcoder", "blocks.0.ln2.hook_normalized", write="blocks.0.hook_mlp_out", d_sae=9)
    methods = [
        Method.from_dictionary("codes", make("topk", HOOK, d_sae=9, k=3), similarity="code"),
        Method.from_dictionary("writes", transcoder),
        Method.from_dictionary("reads", transcoder, similarity="code"),
    ]
    found = evaluate_detection(model, methods, [concept(i, TRIGGERS[i]) for i in range(2)], n_splits=1)
    assert set(found.kinds) >= {"codes", "writes", "reads"} and not found.failures
    assert {name for name in found.kinds if name.startswith("difference of means at ")} == {
        f"difference of means at {hook}" for hook in (HOOK, "blocks.0.hook_mlp_out", "blocks.0.ln2.hook_normalized")
    }
    assert plain(found).notna().all(axis=None)


def test_a_hook_spelt_in_two_ways_is_one_hook():
    bridge = models_zoo.make_model("llama", "SAETransformerBridge")
    rows = torch.eye(D)[:3]
    spelt = [
        Method.from_directions(f"at {hook}", rows, hook) for hook in ("blocks.1.hook_out", "blocks.1.hook_resid_post")
    ]
    found = evaluate_detection(bridge, spelt, [concept(i, TRIGGERS[i]) for i in range(2)], n_splits=1)
    assert set(found.kinds) == {*(m.name for m in spelt), "difference of means", "logistic probe", "number of tokens"}
    table = plain(found)
    assert (table[spelt[0].name] == table[spelt[1].name]).all() and not found.failures


def test_an_untrained_twin_is_a_control(model):
    twin = baselines.untrained_twin(model)
    concepts = [concept(i, TRIGGERS[i]) for i in range(2)]
    found = evaluate_detection(model, [gaussian(3)], concepts, n_splits=2, untrained_twin=twin)
    names = ["untrained twin: difference of means", "untrained twin: logistic probe"]
    assert [found.kinds[name] for name in names] == ["control", "control"]
    alone = evaluate_detection(twin, [gaussian(3)], concepts, n_splits=2)
    for name in names:
        np.testing.assert_allclose(plain(found)[name], plain(alone)[name.removeprefix("untrained twin: ")])


def test_what_fails_is_recorded_and_the_rest_goes_on(model):

    def broken(x):
        raise RuntimeError("no scores today")

    sometimes = gaussian(4, name="sometimes")
    calls = []

    def flaky(x):
        calls.append(len(x))
        if len(calls) > 3:
            raise MemoryError("too much")
        return sometimes.detector.score(x)

    methods = [
        gaussian(5),
        Method(name="broken", detector=Detector(hook_name=HOOK, names=("a",), score=broken, row_cost=1)),
        Method(name="flaky", detector=Detector(hook_name=HOOK, names=tuple("abcd"), score=flaky, row_cost=4)),
        Method.from_directions("nowhere", torch.eye(D), "blocks.9.hook_resid_post"),
        Method.from_directions("too wide", torch.eye(D + 1), HOOK),
    ]
    silent = Concept(name="silent", positives=("a", *concept(1, None).positives), negatives=tuple("bcde"))
    concepts = [concept(0, TRIGGERS[0]), silent, concept(2, TRIGGERS[2])]
    found = evaluate_detection(model, methods, concepts, n_splits=1, rules=["auroc"])
    failures = [(f.method, f.unit, f.error.split(":")[0]) for f in found.failures]
    assert ("nowhere", "", "ValueError") in failures and ("", "silent", "ValueError") in failures
    assert {("broken", c, "RuntimeError") for c in ("concept 0", "concept 2")} <= set(failures)
    assert ("flaky", "concept 2", "MemoryError") in failures
    table = plain(found)
    assert table["gaussian 5"].notna().sum() == 2 == table["logistic probe"].notna().sum()
    assert "too wide" not in table and "broken" not in table and "silent" not in table.index
    assert "no scores today" in found.section().failures[-1] or any("no scores" in f for f in found.section().failures)


def test_a_method_that_always_fails_is_named_once(model):
    wide = Method.from_directions("too wide", torch.eye(D + 1), HOOK)
    concepts = [concept(i, TRIGGERS[i]) for i in range(3)]
    found = evaluate_detection(model, [gaussian(5), wide], concepts, n_splits=1)
    assert [(f.method, f.unit) for f in found.failures] == [("too wide", "")]
    with pytest.raises(ValueError, match="Nothing could be computed. too wide on concept 0: ValueError"):
        evaluate_detection(model, [wide], concepts, n_splits=1, diff_means=False, probe=False, length=False)


def test_sentences_that_differ_by_case_only_stay_together(model):
    one = concept(0, TRIGGERS[0], n_per_side=5)
    doubled = Concept(
        name="doubled", positives=(*one.positives, *(f" {s.upper()} " for s in one.positives)), negatives=one.negatives
    )
    for split in concept_splits(doubled, 4, 0):
        first, second = ({doubled.positives[i].strip().lower() for i in rows[0]} for rows in split[:2])
        assert first and second and not first & second
        permuted, choosing = (set(torch.cat(rows).tolist()) for rows in (split.permuted, split.choosing))
        assert permuted <= choosing and len(choosing - permuted) <= 2


@pytest.mark.slow
def test_it_is_saved_and_loaded(model, tmp_path):
    found = evaluate_detection(model, [gaussian(5)], [concept(i, TRIGGERS[i]) for i in range(6)], n_splits=1)
    found.save(tmp_path)
    loaded = Evidence.load(tmp_path)
    assert isinstance(loaded, DetectionEvidence) and loaded.claim() == found.claim()
    pd.testing.assert_frame_equal(loaded.cells, found.cells)
    # In a process that has imported nothing else.
    code = "from saelens_ext.evals.evidence import Evidence; print(type(Evidence.load({!r})).__name__)"
    fresh = subprocess.run(
        [sys.executable, "-c", code.format(str(tmp_path))], capture_output=True, text=True, check=True
    )
    assert fresh.stdout.strip() == "DetectionEvidence"


def test_what_is_refused(model):
    one = concept(0, TRIGGERS[0])
    few = Concept(name="few", positives=("We a b.", "We A b. ", "We c d.", "We e f."), negatives=one.negatives)
    for methods, concepts, options, message in [
        ([], [one], {}, "methods is empty"),
        ([gaussian(3)], [], {}, "no concept"),
        ([gaussian(3), gaussian(3)], [one], {}, "Two methods are called 'gaussian 3'"),
        ([gaussian(3)], [one, one], {}, "the name 'concept 0' 2 times"),
        ([gaussian(3)], [few], {}, "'few' has 3 different positives; at least 4 are needed.*Add sentences"),
        ([gaussian(3)], [one], {"rules": ["best"]}, r"rules\[0\] must be one of 'auroc', 'contrast', got 'best'"),
        ([gaussian(3)], [one], {"rules": []}, "rules is empty"),
        ([gaussian(3, name="number of tokens")], [one], {}, "called 'number of tokens'.*rename it"),
        ([gaussian(3)], [one], {"n_splits": 0}, "n_splits must be a whole number of at least 1, got 0"),
        ([gaussian(3)], [one], {"confidence": 95.0}, "confidence must lie in"),
        ([gaussian(3, name="difference of means")], [one], {}, "called 'difference of means'.*rename it"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_detection(model, methods, concepts, **options)
    found = evaluate_detection(model, [gaussian(3)], [one], n_splits=1)
    with pytest.raises(ValueError, match="at least 6 concepts, got 1"):
        found.claim()
