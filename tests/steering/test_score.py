"""Scores of steered text: the harmonic mean of two ratings, and the score of a direction at its best strength."""

import math

import pandas
import pytest
import torch

from saelens_ext.steering.judges import JudgeScore
from saelens_ext.steering.sampling import SamplingOptions
from saelens_ext.steering.score import steering_score
from tests.steering.steered import sample_steered

HOOK = "blocks.1.hook_resid_post"

# --- scores ---


@pytest.mark.parametrize(
    "concept, fluency, score", [(2, 2, 2), (1, 2, 4 / 3), (0, 2, 0), (2, 0, 0), (0, 0, 0), (0.5, 0.5, 0.5)]
)
def test_the_score_is_the_harmonic_mean(concept, fluency, score):
    assert JudgeScore(concept, fluency).score == pytest.approx(score)


def test_a_missing_rating_is_no_zero():
    assert math.isnan(JudgeScore(math.nan, 2.0).score) and math.isnan(JudgeScore(0.0, math.nan).score)


@pytest.mark.parametrize("rating", [-0.1, 2.1, math.inf])
def test_ratings_outside_the_scale_are_refused(rating):
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        JudgeScore(rating, 1.0)


# --- the score of a direction ---


def counting_judge(concept, prompt, continuations):
    """Rates the letters of a text: any monotone fact about it will do."""
    return [JudgeScore(min(2.0, text.count(concept) / 2), 2.0) for text in continuations]


@pytest.fixture(scope="module")
def scores(tiny_hooked):
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    return steering_score(
        tiny_hooked,
        HOOK,
        directions,
        ["a", ("e", "o")],
        counting_judge,
        prompts=["I", "The", "So", "We"],
        targets=(0.05, 0.5, 99.0),
        n=3,
        options=SamplingOptions(max_new_tokens=6),
        max_strength=50.0,
    )


def test_every_cell_that_can_be_reached_is_in_the_table(scores):
    table = scores.to_dataframe()
    assert len(table) == 2 * 2 * 2 * 4 * 3
    assert set(table["target"]) == {0.05, 0.5}
    assert {(row.direction, row.sign, row.concept) for row in scores.continuations} == {
        (0, 1, "a"),
        (0, -1, "a"),
        (1, 1, "e"),
        (1, -1, "o"),
    }
    assert table.groupby("half")["prompt"].unique().map(sorted).to_dict() == {
        "choose": ["I", "So"],
        "report": ["The", "We"],
    }
    assert all(score.n_unreached == 1 for score in scores.by_sign())
    assert len(scores.curve()) == 8 and isinstance(scores.summary(), pandas.DataFrame)


def test_the_target_is_chosen_on_one_half_and_scored_on_the_other(scores):
    table = scores.to_dataframe()
    for found in scores.by_sign():
        own = table[(table["direction"] == found.direction) & (table["sign"] == found.sign)]
        means = own[own["half"] == "choose"].groupby("target")["score"].mean()
        assert found.choosing_score == pytest.approx(means.max()) and means[found.target] == means.max()
        held_out = own[(own["half"] == "report") & (own["target"] == found.target)]["score"]
        assert found.score == pytest.approx(held_out.mean()) and found.n_scored == len(held_out) == 6
    for found in scores.by_direction():
        assert found.choosing_score == max(s.choosing_score for s in scores.by_sign() if s.direction == found.direction)


def test_the_scored_half_has_no_say_in_the_choice(tiny_hooked):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    seen = {"choose": 0, "report": 0}

    def run(report_value):
        # Prompt "B" is the reporting one. Whatever it would say, the choice must not move.
        def judge(concept, prompt, continuations):
            seen["report" if prompt == "B" else "choose"] += 1
            value = report_value(seen["report"]) if prompt == "B" else 1.0 / seen["choose"]
            return [JudgeScore(value, value)] * len(continuations)

        seen.update(choose=0, report=0)
        (found,) = steering_score(
            tiny_hooked,
            HOOK,
            direction,
            ["x"],
            judge,
            prompts=["A", "B"],
            targets=(0.05, 0.2, 0.4),
            signs=(1,),
            n=1,
            options=SamplingOptions(max_new_tokens=3),
        ).by_sign()
        return found

    rising = run(lambda n: 0.5 * n)
    assert rising.target == 0.05 and rising.score == 0.5
    assert run(lambda n: 2.0 - 0.5 * n).target == 0.05


def test_missing_ratings_are_left_out_and_counted(tiny_hooked):
    def judge(concept, prompt, continuations):
        return [JudgeScore(2.0, math.nan) if i == 1 else JudgeScore(1.0, 1.0) for i in range(len(continuations))]

    (found,) = steering_score(
        tiny_hooked,
        HOOK,
        torch.ones(1, 32) + torch.arange(32),
        ["x"],
        judge,
        prompts="I",
        targets=(0.1,),
        signs=(-1,),
        n=6,
        options=SamplingOptions(max_new_tokens=3),
    ).by_sign()
    assert (found.score, found.n_scored, found.n_missing) == (1.0, 2, 1)


def test_a_direction_that_reaches_nothing_has_no_score(tiny_hooked):
    (found,) = steering_score(
        tiny_hooked,
        HOOK,
        torch.randn(1, 32),
        ["x"],
        counting_judge,
        prompts="I",
        targets=(500.0,),
        n=2,
        max_strength=1.0,
    ).by_direction()
    assert math.isnan(found.score) and found.sign is None and found.n_unreached == 2


def test_a_cell_holds_what_its_strength_gives(tiny_hooked, scores):
    direction = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))[0]
    strength = scores.searches[0].at(-1, 0.5)
    said = sample_steered(
        tiny_hooked, ["I", "The", "So", "We"], HOOK, direction, strength.coefficient, n=3, max_new_tokens=6
    )
    cell = [row for row in scores.continuations if (row.direction, row.sign, row.target) == (0, -1, 0.5)]
    assert [row.text for row in cell] == [text for texts in said for text in texts]
    assert {row.coefficient for row in cell} == {strength.coefficient} and {row.kl for row in cell} == {strength.kl}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"concepts": ["a", "b"]}, "as many concepts"),
        ({"prompts": ["I", "I"]}, "twice"),
        ({"n": 1}, "n must be at least 2"),
        ({"options": SamplingOptions(temperature=0)}, "temperature is 0"),
        ({"judge": lambda concept, prompt, texts: []}, "one score per continuation: 4, got 0"),
    ],
)
def test_bad_input_of_the_score_is_refused(tiny_hooked, changed, message):
    arguments = {"concepts": ["a"], "judge": counting_judge, "prompts": "I", "n": 4, "targets": (0.1,)} | changed
    with pytest.raises(ValueError, match=message):
        steering_score(tiny_hooked, HOOK, torch.ones(1, 32) + torch.arange(32), **arguments)
