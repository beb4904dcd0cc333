"""Judges that fail, metrics by loops over made-up texts, and what is steered with where nothing is given."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import saelens_ext as sx
from saelens_ext.evals.attempts import Attempts
from saelens_ext.evals.steering.arms import arms_of, shared_baselines
from saelens_ext.evals.steering.steering import SteeringEvidence
from saelens_ext.evals.steering.texts import judged, scores_of
from saelens_ext.steering.judges import JudgeScore
from tests.models_zoo import make_model

PROMPTS = ["p0", "p1", "p2", "p3"]
ABOUT = {f"c{number}": f"about c{number}" for number in range(6)}


def said():
    """Two texts of each of two methods at two targets, told and unsteered, for six concepts; each says what it is."""
    rows = [
        {"concept": concept, "method": method, "draw": 0, "column": -1, "sign": 1, "target": target or np.nan,
         "kl": 0.0, "coefficient": 1.0, "kl_everywhere": 0.5, "prompt": prompt, "half": ("choose", "report")[place % 2],
         "number": number, "text": f"{concept} {method} {target} {prompt} {number}"}
        for concept in ABOUT
        for method, targets in (("a", (0.1, 0.2)), ("b", (0.1, 0.2)), ("prompting", (None,)), ("unsteered", (None,)))
        for target in targets
        for place, prompt in enumerate(PROMPTS)
        for number in range(2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def score_of(text):
    """A made-up rating of a text, whoever says it and in whatever order."""
    rng = np.random.default_rng(list(text.encode()))
    return JudgeScore(float(rng.uniform(0, 2)), float(rng.uniform(0, 2)))


def rating(concept, prompt, texts):
    assert concept.startswith("about c") and all(prompt in text for text in texts)
    return [score_of(text) for text in texts]


def unusable(concept, prompt, texts):
    return [JudgeScore(math.nan, math.nan) for _ in texts]


def too_few(concept, prompt, texts):
    return rating(concept, prompt, texts)[:-1]


def evidence_of(judges):
    attempts = Attempts()
    texts = judged(said(), judges, ABOUT, PROMPTS, attempts, seed=0)
    kinds = {"a": "unsupervised", "b": "control", "prompting": "supervised"}
    return SteeringEvidence(
        cells=scores_of(texts, []), kinds=kinds, texts=texts, failures=attempts.summary(len(ABOUT)),
        settings={"n_bootstrap": 20, "n_permutations": 50},
    )  # fmt: skip


def test_metrics_are_those_of_loops_over_texts():
    found = evidence_of({"one": rating})
    assert all(row.score == score_of(row.text).score for row in found.texts.itertuples()) and len(found.texts) == 288
    values = found.cells.set_index(["concept", "method", "metric"])["value"]
    texts = list(found.texts.itertuples())
    for concept in ABOUT:
        plain = {p: np.mean([t.concept_rating for t in texts if t[1:3] == (concept, "unsteered") and t.prompt == p])
                 for p in PROMPTS}  # fmt: skip
        for method, targets in (("a", (0.1, 0.2)), ("b", (0.1, 0.2)), ("prompting", (None,))):
            own = [t for t in texts if t[1:3] == (concept, method)]
            halves = {
                (target, half): [t for t in own if t.half == half and (target is None or t.target == target)]
                for target in targets for half in ("choose", "report")
            }  # fmt: skip
            best = max(targets, key=lambda target: np.mean([t.score for t in halves[target, "choose"]]))
            report = halves[best, "report"]
            by_prompt = {p: [t for t in report if t.prompt == p] for p in ("p1", "p3")}
            expected = {
                "score": np.mean([t.score for t in report]),
                "concept_rating": np.mean([t.concept_rating for t in report]),
                "fluency_rating": np.mean([t.fluency_rating for t in report]),
                "wrong_way": np.mean([np.mean([t.concept_rating for t in by_prompt[p]]) < plain[p] for p in by_prompt]),
                "sd_over_prompts": np.std([np.mean([t.score for t in by_prompt[p]]) for p in by_prompt], ddof=1),
            }
            for metric, value in expected.items():
                assert values[concept, method, metric] == pytest.approx(value), (concept, method, metric)
    assert 0 < values.xs("wrong_way", level="metric").mean() < 1


def test_texts_without_a_usable_rating_are_left_out_and_counted():
    unrated = JudgeScore(math.nan, math.nan)

    def picky(concept, prompt, texts):
        return [score_of(text) if text[-1] == "0" or " b " not in text else unrated for text in texts]

    found = evidence_of({"one": rating, "picky": picky})
    said_ = [str(failure) for failure in found.failures]
    assert len(said_) == 1 and "no usable rating of 48 of 96 texts by 'picky'" in said_[0] and said_[0].startswith("b")
    scores = found.per_unit()
    pd.testing.assert_series_equal(scores.loc["one", "a"], scores.loc["picky", "a"])
    assert scores.notna().all(axis=None) and (scores.loc["one", "b"] != scores.loc["picky", "b"]).all()
    agreement = found.agreement().set_index(["rating", "statistic"])
    # Those that are unsteered or told what to write about count as well.
    assert (agreement["n_texts"] == 288 - 48).all() and np.allclose(agreement["estimate"], 1)


def test_a_judge_that_never_gives_a_usable_rating_leaves_the_others():
    found = evidence_of({"one": rating, "none": unusable})
    alone = evidence_of({"one": rating})
    assert found.agreement().empty and set(found.summary()["judge"]) == {"one"}
    assert found.verdict() == alone.verdict() and len(found.failures) == 4
    assert "no usable rating of 96 of 96 texts by 'none'" in found.section().failures[0]


def test_a_judge_that_gives_too_few_scores_is_named_and_nothing_of_it_counts():
    found = evidence_of({"one": rating, "short": too_few})
    assert {failure.unit for failure in found.failures} == set(ABOUT)
    assert "The judge 'short' gave 11 scores for 12 texts; it must give one each." in str(found.failures[0])
    assert set(found.texts["judge"]) == {"one"} and found.verdict() == evidence_of({"one": rating}).verdict()


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "HookedSAETransformer")


HOOK = "blocks.1.hook_resid_pre"
CONCEPTS = [
    sx.Concept(
        name=letter,
        positives=tuple(f"{letter} {letter}{letter} number {n}" for n in range(4)),
        negatives=tuple(f"nothing is number {n}" for n in range(4)),
    )
    for letter in "qz"
]


def arms(model, methods, named=(), seed=0, fails=False):
    attempts, how = Attempts(), {"batch_size": 4, "seed": seed}
    shared = shared_baselines(model, methods, CONCEPTS, named, attempts, **how)
    each = [
        arms_of(model, methods, shared, one, place, {}, named, attempts, **how) for place, one in enumerate(CONCEPTS)
    ]
    assert bool(attempts.failures) == fails
    return attempts.failures if fails else [arm for own in each for arm in own]


def test_the_best_detector_among_columns_with_a_direction_is_steered_with(model):
    """A column that detects best has no direction, as a latent whose decoder died."""
    means = {one.concept: one.direction for one in arms(model, [noise(model)], ("diff_means",)) if one.column < 0}
    rows = torch.stack([means["q"], -means["q"], means["z"], -means["z"]])
    method = sx.Method.from_directions("m", rows, HOOK)
    own = {one.concept: one for one in arms(model, [method])}
    assert {name: one.column for name, one in own.items()} == {"q": 0, "z": 2}
    assert torch.equal(own["z"].direction, method.directions[2])
    alive = method.directions.clone()
    alive[0] = 0
    others = {one.concept: one.column for one in arms(model, [replace(method, directions=alive)])}
    assert others["q"] != 0 and others["z"] == 2
    dead = replace(method, directions=torch.zeros_like(alive))
    failures = arms(model, [dead], fails=True)
    assert all("dead latent, without a direction" in str(one) for one in failures) and len(failures) == 2


def noise(model):
    rows = torch.randn(3, model.cfg.d_model, generator=torch.Generator().manual_seed(5))
    return sx.Method.from_directions("noise", rows, HOOK, kind="control")


def test_baselines_are_made_for_each_concept(model):
    found = arms(model, [noise(model)], ("diff_means", "random", "pca", "kmeans"))
    by_method = {}
    for one in found:
        by_method.setdefault(one.method, {})[one.concept] = one
    assert set(by_method) == {"noise", "difference of means", "random direction", "principal components", "k-means"}

    def mean(sentences):
        """Over sentences, of the mean over their tokens but the first, of activations of one length."""
        rows = [model.run_with_cache(text, names_filter=HOOK)[1][HOOK][0, 1:] for text in sentences]
        return torch.stack([torch.nn.functional.normalize(row, dim=1).mean(dim=0) for row in rows]).mean(dim=0)

    for concept in CONCEPTS:
        with torch.no_grad():
            expected = mean(concept.positives) - mean(concept.negatives)
        own = by_method["difference of means"][concept.name].direction
        assert float(torch.nn.functional.cosine_similarity(own.cpu(), expected, dim=0)) > 0.99
    first, second = (by_method["random direction"][concept.name].direction for concept in CONCEPTS)
    assert abs(float(torch.nn.functional.cosine_similarity(first, second, dim=0))) < 0.9
    again = arms(model, [noise(model)], ("random",), seed=1)
    assert not any(torch.equal(one.direction, first) for one in again)
