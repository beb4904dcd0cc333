"""Labels by a language model. The endpoint is a server on this machine that plays a script."""

import json
import math
from contextlib import ExitStack

import pytest
import torch

from saelens_ext.analysis.labeller import Description, Labeller
from saelens_ext.analysis.labels import Labels, label_latents
from saelens_ext.analysis.openai_labeller import (
    OpenAILabeller,
    parse_description,
    parse_ratings,
    parse_sentences,
)
from saelens_ext.host.chat_endpoint import EndpointUnavailableError
from tests.analysis import planted
from tests.analysis.planted import SILENT, THE_TOKEN, TOKEN, WORDS
from tests.analysis.test_labels import lens_of
from tests.harnesses.openai_script import scripted


@pytest.fixture(scope="module")
def profile():
    return planted.make_profile(n_noise=3)


@pytest.fixture(scope="module")
def tokenizer():
    return planted.make_tokenizer()


@pytest.fixture
def endpoint():
    pytest.importorskip("openai", reason="pip install 'saelens-ext[judge]'")
    with ExitStack() as stack:

        def start(play, **options):
            server = stack.enter_context(scripted(play))
            labeller = OpenAILabeller(server.url, "m", api_key="k", max_concurrency=1, **options)
            stack.callback(labeller.close)
            return server, labeller

        yield start


def reader(number, body):
    """Names the token that the first context marks, and rates contexts by whether they mark it."""
    task, question = (message["content"] for message in body["messages"][:2])
    if task.startswith("You get"):
        named = question.split("'")[1]
        lines = question.splitlines()[1:]
        return 200, "\n".join(f"{line.split(':')[0]}: {9 if f'<< {named}>>' in line else 1}" for line in lines)
    if "sentences" in task:
        return 200, "\n".join(f"{n}. Sentence {n} with {question}" for n in range(1, 6))
    if question.startswith("Likelier"):
        return 200, "They are alike.\nDescription: " + ("none" if "basa" in question else "words in b")
    return 200, "Look.\n**Description: the word '" + question.split("<< ")[1].split(">>")[0] + "'**"


def test_descriptions_sentences_and_scores(endpoint, profile, tokenizer, tmp_path):
    server, labeller = endpoint(reader, cache_directory=tmp_path / "cache")
    assert isinstance(labeller, Labeller)
    labels = label_latents(profile, tokenizer, method=labeller, lens=lens_of(profile, [1, 2]))
    assert labels.method == "m" and labels.texts[TOKEN] == f"the word '{WORDS[THE_TOKEN]}'"
    label = labels[TOKEN]
    assert label.auroc > 0.95 and label.distinguishes and label.n_members <= 10 and label.n_others <= 10
    assert labels.outputs[TOKEN] == "words in b" and labels.texts[SILENT] == labels.outputs[SILENT] == ""
    assert len(labels.sentences[TOKEN]["activating"]) == len(labels.sentences[TOKEN]["neutral"]) == 5
    assert labels.sentences[TOKEN]["activating"][0].startswith("Sentence 1 with")
    n_latents = sum(map(bool, labels.texts))
    n_asked = len(server.bodies)
    assert sum(body["messages"][0]["content"].startswith("You get") for body in server.bodies) == n_latents
    assert n_asked == len({json.dumps(body) for body in server.bodies}) <= 5 * n_latents
    # The contexts asked about are not those shown, and are in no order that gives the answer away.
    own = [body for body in server.bodies if f"<< {WORDS[THE_TOKEN]}>>" in body["messages"][1]["content"]]
    shown = [line.split(") ")[1] for body in own[:1] for line in lines_of(body, "(")]
    asked = next(body for body in own if f"the word '{WORDS[THE_TOKEN]}'" in body["messages"][1]["content"])
    rated = [line.split(": ", 1)[1] for line in lines_of(asked, tuple("123456789"))]
    assert shown and not set(shown) & set(rated)
    marked = [f"<< {WORDS[THE_TOKEN]}>>" in line for line in rated]
    assert sum(marked) == label.n_members and marked != sorted(marked, reverse=True)
    assert Labels.load(labels.save(tmp_path)).sentences == labels.sentences
    again = label_latents(profile, tokenizer, method=labeller, lens=lens_of(profile, [1, 2]))
    assert again.texts == labels.texts and len(server.bodies) == n_asked


def lines_of(body, start):
    return [line for line in body["messages"][1]["content"].splitlines() if line.startswith(start)]


def test_no_concept_is_no_output_description(endpoint, profile, tokenizer):
    _, labeller = endpoint(reader, n_sentences=0)
    labels = label_latents(profile, tokenizer, method=labeller, latents=[TOKEN], lens=lens_of(profile, [1, 2]))
    assert labels.outputs[TOKEN] == "words in b" and labels.sentences[TOKEN] == {"activating": [], "neutral": []}
    (found,) = labeller.describe([_evidence(promoted=["basa"])])
    assert found.output == "" and found.activating == []


def _evidence(**more):
    from saelens_ext.analysis.labeller import Evidence

    return Evidence(latent=0, contexts=["a << b>> c"], values=[1.0], **more)


def test_nonsense_leaves_that_latent_without_and_the_others_with(endpoint, profile, tokenizer, caplog):
    def play(number, body):
        nonsense = f"<< {WORDS[THE_TOKEN]}>>" in body["messages"][1]["content"]
        return (200, "I would say seven.") if nonsense else reader(number, body)

    server, labeller = endpoint(play, max_attempts=2, n_sentences=0)
    labels = label_latents(profile, tokenizer, method=labeller)
    assert labels.texts[TOKEN] == "" and sum(map(bool, labels.texts)) >= 2
    assert "counts as missing" in caplog.text


def test_ratings_that_are_nonsense_leave_the_label_unscored(endpoint, profile, tokenizer):
    play = lambda n, body: (200, "all good") if "Rate" in body["messages"][0]["content"] else reader(n, body)  # noqa: E731
    _, labeller = endpoint(play, max_attempts=1, n_sentences=0)
    label = label_latents(profile, tokenizer, method=labeller, latents=[TOKEN])[TOKEN]
    assert label.text and math.isnan(label.auroc) and not label.distinguishes


@pytest.mark.parametrize(
    ("answer", "timeout", "said"), [((401, "who are you"), 60, "who are you"), (None, 0.2, "raise timeout")]
)
def test_an_endpoint_that_refuses_or_is_silent(endpoint, profile, tokenizer, answer, timeout, said):
    _, labeller = endpoint(lambda n, body: answer, timeout=timeout, max_retries=0)
    with pytest.raises(EndpointUnavailableError, match=said):
        label_latents(profile, tokenizer, method=labeller)


def test_what_was_answered_before_a_failure_is_kept(endpoint, profile, tokenizer, tmp_path):
    server, labeller = endpoint(
        lambda n, body: reader(n, body) if n != 4 else (400, "no"), n_sentences=0, cache_directory=tmp_path
    )
    with pytest.raises(EndpointUnavailableError, match="The labeller m .* goes on from there"):
        label_latents(profile, tokenizer, method=labeller)
    assert len(server.bodies) == 4
    labels = label_latents(profile, tokenizer, method=labeller)
    assert len(server.bodies) == 1 + 2 * sum(map(bool, labels.texts))  # only the refused question was asked twice


def test_a_key_and_the_client_are_needed(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="The labeller has no API key"):
        OpenAILabeller("http://127.0.0.1:9/v1", "m")
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'saelens-ext\[judge\]'"):
        OpenAILabeller("http://127.0.0.1:9/v1", "m", api_key="k")


def test_any_object_that_describes_and_rates_will_do(profile, tokenizer):
    class Lengths:
        """Describes a latent by its number, and rates nothing."""

        def describe(self, evidence):
            return [Description(input=f"latent\n{one.latent}\u202e") for one in evidence]

        def rate(self, questions):
            return [[0.0] * len(contexts) for _, contexts in questions]

    labels = label_latents(profile, tokenizer, method=Lengths())
    assert labels.method == "Lengths" and labels.texts[TOKEN] == "latent↵0⟨U+202E⟩"
    assert labels[TOKEN].auroc == 0.5 and not labels.distinguishes.any()
    assert torch.equal(labels.p_value.isnan(), torch.tensor([not text for text in labels.texts]))


@pytest.mark.parametrize(
    "answer, found",
    [
        ("Description: days", "days"),
        ("They are days.\n\n**description: days of the week**", "days of the week"),
        ("", None),
        ("Description:", None),
        ("days", None),
        ("Description: days\nBut who knows", None),
    ],
)
def test_only_a_plain_description_counts(answer, found):
    assert parse_description(answer) == found


def test_only_whole_lists_count():
    assert parse_sentences("1. One.\n\n- Two.", 2) == ["One.", "Two."] and parse_sentences("One.", 2) is None
    assert parse_ratings("1: 3\n2: 10", 2) == [3, 10] and parse_ratings("2) 0\n1. 7", 2) == [7, 0]
    for wrong in ("1: 3", "1: 3\n1: 4", "1: 3\n2: 11", "1: 3\n2: high", "", "1: 3\n2: 4\n3: 5"):
        assert parse_ratings(wrong, 2) is None
