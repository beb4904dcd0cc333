"""A planted direction wins, a random one equals chance, and nothing is judged where it was chosen."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import saelens_ext as sx
from saelens_ext.evals import SteeringEvidence, compare_steering, export_for_people, read_ratings
from saelens_ext.evals.steering.ratings import text_ids
from saelens_ext.steering.judges import JudgeScore
from saelens_ext.steering.sampling import sample_steered

HOOK = "blocks.2.hook_resid_pre"
PROMPTS = ["The assert statement", "A list of names", "When the loop ends", "It is so"]
OPTIONS = sx.SamplingOptions(max_new_tokens=6, top_k=None)
WORDS = ("cat", "sea", "law", "sun", "car", "oak")


@pytest.fixture(scope="module")
def model(tiny_hooked):
    return tiny_hooked


def letter_of(concept: str) -> str:
    return concept.removeprefix("the letter ")


@pytest.fixture(scope="module")
def concepts():
    return [
        sx.Concept(
            name=f"the letter {letter}",
            positives=tuple(f"{letter} {letter}{letter} number {n}" for n in range(6)),
            negatives=tuple(f"nothing is number {n}" for n in range(6)),
        )
        for letter in "qzxkjwvb"
    ]


def judge(concept, prompt, texts):
    """Rates by the share of tokens... of characters that are the concept's letter; never quite nothing."""
    return [JudgeScore(min(2.0, 0.1 + 20 * text.count(letter_of(concept)) / max(1, len(text))), 2.0) for text in texts]


@pytest.fixture(scope="module")
def planted(model, concepts):
    """Directions that promote the letter's token."""
    rows = []
    for concept in concepts:
        token = model.tokenizer.encode(letter_of(concept.name), add_special_tokens=False)[-1]
        rows.append(model.W_U[:, token].detach())
    return torch.stack(rows)


def methods_of(planted):
    return [
        sx.Method.from_directions("planted", planted, HOOK),
        sx.Method.from_directions(
            "noise", torch.randn(planted.shape, generator=torch.Generator().manual_seed(5)), HOOK, kind="control"
        ),
    ]


def compared(model, planted, concepts, **options):
    names = [concept.name for concept in concepts]
    arguments = {
        "prompts": PROMPTS,
        "targets": (0.1, 1.0),
        "signs": (1,),
        "n": 4,
        "options": OPTIONS,
        "columns": {"planted": {name: number for number, name in enumerate(names)}},
        "baselines": ("random", "prompting"),
    } | options
    return compare_steering(model, methods_of(planted), concepts, {"letters": judge}, **arguments)


@pytest.fixture(scope="module")
def found(model, planted, concepts):
    return compared(model, planted, concepts)


@pytest.mark.slow
def test_a_planted_direction_wins(found):
    means = found.summary(metric="score").set_index("method")["estimate"]
    assert means["planted"] > means["noise"] and means["planted"] > means["random direction"]
    table = found.comparisons("planted").set_index("other")
    assert table.loc["noise", "difference"] > 0 and table.loc["noise", "p"] < 0.05
    assert found.claim("planted").startswith("Over 8 concepts (judge: letters), planted (held-out score")
    assert found.kinds == {
        "planted": "unsupervised", "noise": "control", "random direction": "control", "prompting": "supervised",
    }  # fmt: skip
    assert not found.failures


def test_scores_are_of_prompts_that_chose_nothing(found):
    """By hand from the texts: the target is the best on the first half, the score is that of the other half."""
    texts = found.texts
    assert set(texts[texts["half"] == "choose"]["prompt"]) == set(PROMPTS[::2])
    assert set(texts[texts["half"] == "report"]["prompt"]) == set(PROMPTS[1::2])
    values = found.cells[found.cells["metric"] == "score"].set_index(["concept", "method"])["value"]
    for (concept, method), own in texts.groupby(["concept", "method"]):
        if method == "unsteered":
            continue
        best = {}
        for target, part in own.groupby("target", dropna=False):
            chosen = np.mean([row.score for row in part.itertuples() if row.half == "choose"])
            best[target] = (chosen, np.mean([row.score for row in part.itertuples() if row.half == "report"]))
        assert values[concept, method] == pytest.approx(max(best.values(), key=lambda pair: pair[0])[1])
    plain = texts[texts["method"] == "unsteered"].groupby(["concept", "prompt"])["concept_rating"].mean()
    wrong = found.cells[found.cells["metric"] == "wrong_way"]
    assert wrong["value"].between(0, 1).all() and len(plain) == 8 * len(PROMPTS)


def test_strengths_are_those_of_the_search(found, model, planted, concepts):
    own = found.texts[(found.texts["method"] == "planted") & (found.texts["concept"] == concepts[2].name)]
    search = sx.match_strength(model, HOOK, planted[2], targets=(0.1, 1.0), prompts=PROMPTS[::2], signs=(1,))
    for strength in search.strengths:
        (coefficient,) = set(own[own["target"] == strength.target]["coefficient"])
        assert coefficient == pytest.approx(strength.coefficient, rel=1e-3)


def test_texts_are_those_of_plain_steering(model, planted):
    offsets = torch.stack([2.0 * planted[0] / planted[0].norm(), -1.0 * planted[1] / planted[1].norm()])
    together = sample_steered(model, HOOK, offsets, PROMPTS, n=3, options=OPTIONS, batch_size=5)
    for offset, said in zip(offsets, together):
        with sx.add_direction(model, HOOK, offset, float(offset.norm())):
            assert said == sx.sample_texts(model, PROMPTS, n=3, options=OPTIONS)


def test_judges_see_no_order_and_no_names(model, planted, concepts):
    seen = []

    def watching(concept, prompt, texts):
        seen.append((concept, prompt, texts))
        return judge(concept, prompt, texts)

    arguments = {"prompts": PROMPTS, "targets": (1.0,), "signs": (1,), "n": 4, "options": OPTIONS, "baselines": ()}
    made = compare_steering(model, methods_of(planted), concepts[:2], watching, **arguments)
    assert len(seen) == 2 * len(PROMPTS)  # one call for all texts of a concept and prompt
    by_method = made.texts[(made.texts["concept"] == seen[0][0]) & (made.texts["prompt"] == seen[0][1])][
        "text"
    ].tolist()
    assert sorted(by_method) == sorted(seen[0][2]) and by_method != seen[0][2]
    turned = compare_steering(model, methods_of(planted)[::-1], concepts[:2], judge, **arguments)
    first, second = (one.summary().set_index(["metric", "method"])["estimate"].sort_index() for one in (made, turned))
    pd.testing.assert_series_equal(first, second)


def test_a_target_that_is_not_reached_scores_nothing(model, planted, concepts):
    made = compared(model, planted, concepts[:1], targets=(1e6,))
    values = made.cells.set_index(["method", "metric"])["value"]
    assert values["planted", "score"] == 0 and values["planted", "unreached"] == 1
    assert ("planted", "score_reached") not in values.index and ("prompting", "score") in values.index


def test_a_random_method_is_not_told_from_a_random_direction(found):
    """Texts without any signal: false alarms are as rare as they should be."""
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(40):
        cells = pd.DataFrame(
            {"concept": c, "judge": "j", "method": m, "metric": "score", "value": generator.gamma(2), "draw": 0}
            for c in range(12) for m in ("one", "random direction")
        )  # fmt: skip
        made = SteeringEvidence(
            cells=cells, kinds={"one": "unsupervised", "random direction": "control"}, texts=found.texts
        )
        alarms += made.comparisons("one")["p"].iloc[0] < 0.05
    assert alarms <= 5  # 2 expected; 5 or fewer in 98% of such runs


def test_the_directions_steered_with_are_named(found, concepts):
    own = found.steered_with().set_index(["concept", "method"])["column"]
    for number, concept in enumerate(concepts):
        assert own[concept.name, "planted"] == number
    assert set(own.index.get_level_values("method")) == {"planted", "noise"}


def test_two_spellings_of_a_hook_share_their_baselines(model, planted, concepts):
    noise = torch.randn(3, planted.shape[1], generator=torch.Generator().manual_seed(1))
    methods = [sx.Method.from_directions(name, noise, hook) for name, hook in (("a", HOOK), ("b", "blocks.2.hook_in"))]
    found = compare_steering(
        model, methods, concepts[:2], judge, prompts=PROMPTS[:2], targets=(0.1,), signs=(1,), n=2, options=OPTIONS,
        baselines=("random", "pca"),
    )  # fmt: skip
    assert set(found.kinds) == {"a", "b", "random direction", "principal components"}
    scores = found.per_unit()
    pd.testing.assert_series_equal(scores["a"], scores["b"], check_names=False)


def test_saved_and_shown(found, tmp_path):
    again = sx.Evidence.load(found.save(tmp_path / "steering"))
    assert isinstance(again, SteeringEvidence)
    pd.testing.assert_frame_equal(again.texts, found.texts)
    pd.testing.assert_frame_equal(again.curve(), found.curve())
    section = again.section()
    assert [table.title for table in section.tables] == [
        "Estimates", "Comparisons", "Without any choice", "What each method steers with",
    ]  # fmt: skip
    assert section.figures and "Gaussian" in section.controls["random direction"]
    page = sx.write_evidence_report(tmp_path / "page.html", [section], title="Steering")
    assert "Steering towards concepts" in page.read_text()


@pytest.mark.slow
def test_people_as_another_judge(found, tmp_path):
    path = export_for_people(found.texts, tmp_path / "rate.csv", n=60)
    sheet = pd.read_csv(path, keep_default_na=False)
    assert list(sheet.columns) == ["id", "concept", "prompt", "text", "concept_rating", "fluency_rating"]
    assert len(sheet) == 60 and sheet["id"].is_unique
    ids = dict(zip(text_ids(found.texts), found.texts["method"]))
    counts = sheet["id"].map(ids).value_counts()
    assert set(counts.index) == set(found.texts["method"]) and counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match="holds no rating yet"):
        read_ratings(path)
    by_id = {key: row for key, row in zip(text_ids(found.texts), found.texts.itertuples())}
    sheet["concept_rating"] = [round(by_id[key].concept_rating) for key in sheet["id"]]
    sheet["fluency_rating"] = 2
    sheet = sheet.astype(object)
    sheet.loc[3:5, ["concept_rating", "fluency_rating"]] = ""
    sheet.to_csv(path, index=False)
    rated = found.with_ratings("people", read_ratings(path))
    assert (rated.texts["judge"] == "people").sum() == 57
    assert set(rated.summary()["judge"]) == {"letters", "people"}
    agreement = rated.agreement().set_index(["rating", "statistic"])["estimate"]
    assert agreement["concept_rating", "kappa"] > 0.9 and agreement["fluency_rating", "kappa"] == 1
    assert found.agreement().empty
    with pytest.raises(ValueError, match="called 'people' already"):
        rated.with_ratings("people", read_ratings(path))
    with pytest.raises(ValueError, match="of no text of this comparison, the first of 'x'"):
        found.with_ratings("people", pd.DataFrame({"id": ["x"], "concept_rating": [1.0], "fluency_rating": [1.0]}))
    for wrong in ("3", "good", ""):
        sheet.loc[0, "concept_rating"] = wrong
        sheet.to_csv(path, index=False)
        with pytest.raises(ValueError, match="Line 2 of .* must be numbers from 0 to 2"):
            read_ratings(path)


def test_files_of_ratings_that_are_refused(tmp_path):
    path = tmp_path / "rate.csv"
    path.write_text("id,concept_rating\na,1\n")
    with pytest.raises(ValueError, match="lacks the columns fluency_rating; it is not a file of export_for_people"):
        read_ratings(path)
    path.write_text("id,concept_rating,fluency_rating\na,1,2\nb,,\na,0,2\n")
    with pytest.raises(ValueError, match="Line 4 of .* rates a a second time"):
        read_ratings(path)


def test_bad_input(model, planted, concepts):
    for message, options in [
        ("prompts must be at least 2 different ones, got 1", {"prompts": ["a b"]}),
        ("prompts must be at least 2 different ones, got 2", {"prompts": ["a b", "a b"]}),
        ("baselines", {"baselines": ("magic",)}),
        ("columns", {"columns": {"nobody": {}}}),
        (
            r"columns\['planted'\]\['the letter q'\] must be one of 0 to 7, got 8",
            {"columns": {"planted": {"the letter q": 8}}},
        ),
        ("confidence", {"confidence": 2}),
    ]:
        with pytest.raises(ValueError, match=message):
            compared(model, planted, concepts, **options)
    with pytest.raises(ValueError, match="judges is empty"):
        compare_steering(model, methods_of(planted), concepts, {}, prompts=PROMPTS)
    with pytest.raises(ValueError, match="no concept"):
        compared(model, planted, [])


def test_what_fails_is_named_and_the_rest_goes_on(model, planted, concepts):
    scores_only = replace(methods_of(planted)[1], name="scores only", directions=None)

    def broken(concept, prompt, texts):
        if concept == concepts[0].name:
            raise RuntimeError("no answer")
        return [JudgeScore(math.nan, 1.0), *judge(concept, prompt, texts)[1:]]

    made = compare_steering(
        model, [*methods_of(planted), scores_only], concepts[:2], broken, prompts=PROMPTS, targets=(1.0,),
        signs=(1,), n=2, options=OPTIONS, baselines=("diff_means", "pca", "kmeans"),
    )  # fmt: skip
    texts = list(map(str, made.failures))
    assert any("scores only" in text and "only scores" in text for text in texts)
    assert any(concepts[0].name in text and "no answer" in text for text in texts)
    assert set(made.cells["concept"]) == {concepts[1].name} or "score" in set(made.cells["metric"])
    assert {"difference of means", "principal components", "k-means"} <= set(made.kinds) | {"DiffMeans"}
