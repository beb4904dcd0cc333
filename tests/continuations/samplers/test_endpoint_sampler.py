"""Continuations from a completions endpoint on this machine, which serves a tiny model or plays a script."""

import json
import pickle
from contextlib import ExitStack

import pytest
import torch

from saelens_ext.continuations.sample import sample_continuations, score_continuations
from saelens_ext.continuations.samplers.endpoint_sampler import EndpointSampler
from saelens_ext.continuations.samplers.sampler import Sampler
from saelens_ext.host.endpoint import EndpointUnavailableError
from saelens_ext.host.hook_edits import hooked
from tests.continuations.samplers.served import completion, served
from tests.harnesses.openai_script import scripted
from tests.models_zoo import make_model, make_tokenizer

PREFIX = "The assert statement"
TALK = [{"role": "user", "content": "Why?"}]
DRAWS = {"max_new_tokens": 4, "top_p": 1.0, "deduplicate": False}


@pytest.fixture(scope="module")
def bridge():
    return make_model("llama", "SAETransformerBridge")


@pytest.fixture
def endpoint():
    with ExitStack() as stack:

        def start(play, **options):
            server = stack.enter_context(scripted(play))
            return server, EndpointSampler(server.url, "m", **options)

        yield start


def whole_words(tokenizer):
    """A hook that lets only tokens be drawn that are a word each, with the space before it."""
    barred = [tokenizer(tokenizer.decode([i]), add_special_tokens=False)["input_ids"] != [i] for i in range(320)]
    barred = [bad or not tokenizer.decode([i])[1:].isalpha() for i, bad in enumerate(barred)]
    barred = [bad or not tokenizer.decode([i]).startswith(" ") for i, bad in enumerate(barred)]
    return lambda x, hook: x - 1e4 * torch.tensor(barred)


def said(texts, **choice):
    return {"choices": [{"text": text, "finish_reason": "length", **choice} for text in texts]}


@pytest.mark.parametrize(
    ("host", "prefix", "prompt_as", "form"),
    [
        ("SAETransformerBridge", PREFIX, "text", "openai"),
        ("SAETransformerBridge", TALK, "tokens", "llama.cpp"),
        pytest.param("SAETransformerBridge", TALK, "text", "ids", marks=pytest.mark.slow),
        pytest.param("HookedSAETransformer", PREFIX, "text", "ids", marks=pytest.mark.slow),
    ],
)
def test_the_same_model_there_as_here(endpoint, host, prefix, prompt_as, form, caplog):
    model = make_model("llama", host)
    server, sampler = endpoint(served(model, form), prompt_as=prompt_as)
    # Where only texts tell the tokens, the model writes those that a text is cut into.
    with hooked(model, [("unembed.hook_out", whole_words(model.tokenizer))] if form == "openai" else []):
        found = sample_continuations(model, prefix, 6, sampler=sampler, **DRAWS)
        given = score_continuations(model, prefix, [found.ids_of(row) for row in range(len(found))])
        again = sample_continuations(model, prefix, 6, sampler=sampler, batch_size=4, **DRAWS)
    assert given.texts == found.texts == again.texts
    assert torch.allclose(given.log_probs, found.log_probs, atol=1e-5)
    about = found.metadata["sampling"]["log_prob_difference"]
    assert about["n_tokens"] == int(found.lengths.sum()) and about["cut_otherwise"] == 0
    assert about["mean_absolute"] < 1e-5 and abs(about["largest"]) < 1e-4 and found.log_probs.std() > 0.1
    assert not [r for r in caplog.records if "prefix as" in r.message or "nats per token" in r.message]
    # Each draw is asked for with a seed of its own, whatever the batches.
    seeds = {body["seed"] for body in server.bodies}
    assert seeds == set(range(len(seeds))) and isinstance(sampler, Sampler)


def test_what_is_asked_for(bridge, endpoint):
    server, sampler = endpoint(served(bridge), request_options={"min_tokens": 2})
    options = {"temperature": 0.5, "top_p": 0.8, "seed": 7, "stop": "e"}
    sample_continuations(bridge, PREFIX, 1, sampler=sampler, max_new_tokens=3, **options)
    body = min(server.bodies, key=lambda body: body["seed"])
    assert bridge.tokenizer.decode(body["prompt"]) == f"<s>{PREFIX}"
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (3, 0.5, 0.8)
    assert body["stop"] == ["e"] and body["min_tokens"] == 2 and "n" not in body and body["logprobs"] == 1
    assert body["seed"] == 7 * 1_000_003


def test_another_model_there_is_measured_and_warned_of(bridge, endpoint, caplog):
    other = make_model("llama", "SAETransformerBridge", seed=1)
    _, sampler = endpoint(served(other, "ids"))
    found = sample_continuations(bridge, PREFIX, 8, sampler=sampler, **DRAWS)
    ids = [found.ids_of(row) for row in range(len(found))]
    theirs, own = (score_continuations(one, PREFIX, ids) for one in (other, bridge))
    difference = (theirs.log_probs - own.log_probs)[own.mask]
    about = found.metadata["sampling"]["log_prob_difference"]
    assert about["mean"] == pytest.approx(float(difference.mean()), abs=1e-5)
    assert about["mean_absolute"] == pytest.approx(float(difference.abs().mean()), abs=1e-5) and difference.std() > 0.1
    assert abs(about["largest"]) == pytest.approx(float(difference.abs().max()), abs=1e-4)
    assert "nats per token on average" in caplog.text and "are not the model's" not in caplog.text


@pytest.mark.parametrize("form", ["openai", "ids"])
def test_another_tokenizer_there_is_warned_of_and_texts_are_scored(bridge, endpoint, form, caplog):
    other = make_model("llama", "SAETransformerBridge", make_tokenizer(family="sentence_piece"))
    _, sampler = endpoint(served(other, form), prompt_as="text")
    found = sample_continuations(bridge, PREFIX, 6, sampler=sampler, **DRAWS)
    assert "are not the model's" in caplog.text
    given = score_continuations(bridge, PREFIX, list(found.texts))
    assert torch.equal(given.token_ids, found.token_ids) and torch.allclose(given.log_probs, found.log_probs, atol=1e-5)


def test_another_bos_there_is_warned_of(bridge, endpoint, caplog):
    def play(n, body):
        reply = completion(bridge, body)
        return 200, {**reply, "usage": {"prompt_tokens": reply["usage"]["prompt_tokens"] + 1}}

    _, sampler = endpoint(play)
    n = len(sample_continuations(bridge, PREFIX, 1, sampler=sampler, **DRAWS).prefix_ids)
    assert f"it read the prefix as {n + 1} tokens, and the model reads {n}" in caplog.text


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(bridge, endpoint, status):
    server, sampler = endpoint(lambda n, body: (status, "busy") if n <= 2 else (200, said([" is"])), max_concurrency=1)
    found = sample_continuations(bridge, PREFIX, 2, sampler=sampler, **DRAWS)
    assert found.texts == (" is", " is") and len(server.bodies) == 6


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "APITimeoutError"),
        ((429, "busy"), "RateLimitError"),
        ((401, "who are you"), "AuthenticationError.*OPENAI_API_KEY"),
        ((404, "no such model"), "NotFoundError.* must serve /completions: where"),
        ((400, "prompt must be a string"), "BadRequestError.* prompt_as='text' is for"),
        ((200, b"<html>Bad gateway</html>"), "gave no answer"),
        ((200, b""), "gave no answer"),
        ((200, {"choices": []}), "without choices"),
        ((200, {"error": {"message": "out of memory"}}), "out of memory"),
        ((200, {"choices": [{"message": {"content": "a chat"}}]}), "without choices"),
    ],
)
def test_no_answer_is_an_error_that_says_why(bridge, endpoint, answer, why):
    _, sampler = endpoint(lambda n, body: answer, timeout=0.2 if answer is None else 60, max_retries=1)
    with pytest.raises(EndpointUnavailableError, match=f"(?s){why}"):
        sample_continuations(bridge, PREFIX, 2, sampler=sampler, **DRAWS)


def test_fewer_choices_than_asked_for_are_asked_for_again(bridge, endpoint):
    server, sampler = endpoint(lambda n, body: (200, completion(bridge, {**body, "n": 1})), choices_per_request=3)
    found = sample_continuations(bridge, PREFIX, 6, sampler=sampler, **DRAWS)
    _, one_by_one = endpoint(served(bridge))
    assert found.texts == sample_continuations(bridge, PREFIX, 6, sampler=one_by_one, **DRAWS).texts
    asked = [(body["seed"], body.get("n", 1)) for body in server.bodies]
    assert sorted(asked)[:6] == [(i, 3 - i % 3) for i in range(6)] and len(set(asked)) == len(asked)


def test_a_model_that_cannot_be_compared_is_warned_of(bridge, endpoint, caplog):
    _, sampler = endpoint(lambda n, body: (200, said([f" is {n}"])))
    found = sample_continuations(bridge, PREFIX, 2, sampler=sampler, **DRAWS)
    assert found.metadata["sampling"]["log_prob_difference"]["n_tokens"] == 0
    assert "The EndpointSampler gave no log-probability to compare" in caplog.text
    caplog.clear()
    _, sampler = endpoint(served(bridge))
    sample_continuations(bridge, PREFIX, 2, sampler=sampler, **DRAWS)
    assert "to compare" not in caplog.text


def test_more_choices_than_asked_for_are_left(bridge, endpoint):
    _, sampler = endpoint(lambda n, body: (200, said([" is", " was", " has"])), choices_per_request=2)
    found = sample_continuations(bridge, PREFIX, 4, sampler=sampler, **DRAWS)
    assert found.texts == (" is", " was") * 2


def test_empty_completions_count_as_drawn(bridge, endpoint):
    server, sampler = endpoint(lambda n, body: (200, said(["" if body["seed"] % 2 else " is"])))
    found = sample_continuations(bridge, PREFIX, 3, sampler=sampler, **DRAWS)
    assert found.texts == (" is",) * 3 and found.metadata["sampling"]["n_empty"] == 2
    _, silent = endpoint(lambda n, body: (200, said([" "])))
    with pytest.raises(ValueError, match="None of 10 draws has visible text"):
        sample_continuations(bridge, PREFIX, 1, sampler=silent, **DRAWS)


@pytest.mark.parametrize(
    ("logprobs", "n_tokens"),
    [
        (None, 0),
        ({"tokens": [], "token_logprobs": []}, 0),
        ({"tokens": None, "token_logprobs": [-1.0]}, 0),
        ({"tokens": [" is"], "token_logprobs": [-1.0]}, 1),  # the first of two
        ({"tokens": [" is", " one"], "token_logprobs": [-1.0]}, 1),
        ({"tokens": [" is", " one"], "token_logprobs": [None, -1.0]}, 1),
        ({"tokens": [" is", " one", "</s>"], "token_logprobs": [-1.0, -1.0, -1.0]}, 2),
        ({"tokens": [" was", " one"], "token_logprobs": [-1.0, -1.0]}, 0),  # of another text
    ],
)
def test_truncated_log_probabilities(bridge, endpoint, logprobs, n_tokens):
    _, sampler = endpoint(lambda n, body: (200, said([" is one"], logprobs=logprobs)))
    found = sample_continuations(bridge, PREFIX, 1, sampler=sampler, **DRAWS)
    ids = bridge.tokenizer(" is one", add_special_tokens=False)["input_ids"]
    assert found.ids_of(0) == ids
    about, pieces = found.metadata["sampling"]["log_prob_difference"], len(ids)
    if pieces == 2:
        assert about["n_tokens"] == n_tokens
    assert ("mean" in about) == (about["n_tokens"] > 0)


def echoed(model, before="", every=1):
    """A server that puts the prompt before a continuation, ``before`` in front; or before one in some alone."""

    def play(n, body):
        reply, prompt = completion(model, body), body["prompt"]
        prompt = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
        for choice in reply["choices"]:
            choice["text"] = before + prompt + choice["text"] if n % every == 0 else choice["text"]
        return 200, reply

    return play


@pytest.mark.parametrize("prefix", [PREFIX, TALK], ids=["text", "chat"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("prompt_as", "before"), [("tokens", ""), ("text", "<s> "), ("text", "\n")])
def test_a_prompt_that_is_put_before_the_continuation_is_an_error(bridge, endpoint, prefix, n, prompt_as, before):
    server, sampler = endpoint(echoed(bridge, before), prompt_as=prompt_as)
    with pytest.raises(EndpointUnavailableError, match=r"puts the prompt before each continuation \(echo\).*Turn that"):
        sample_continuations(bridge, prefix, n, sampler=sampler, **DRAWS)
    assert [body["max_tokens"] for body in server.bodies].count(1) == 1


def test_continuations_that_repeat_the_prompt_by_themselves_are_kept(bridge, endpoint):
    """All of them, or all but one; and none is repeated in one token."""
    repeated = " " + PREFIX + " again"
    server, sampler = endpoint(lambda n, body: (200, said([repeated if body["max_tokens"] > 1 else " The"])))
    assert sample_continuations(bridge, PREFIX, 2, sampler=sampler, **DRAWS).texts == (repeated,) * 2
    assert [body["max_tokens"] for body in server.bodies].count(1) == 1
    server, sampler = endpoint(echoed(bridge, every=2), prompt_as="text")
    found = sample_continuations(bridge, PREFIX, 4, sampler=sampler, **DRAWS)
    assert 0 < sum(text.startswith(PREFIX) for text in found.texts) < 4
    assert 1 not in [body["max_tokens"] for body in server.bodies]


def test_half_a_character_at_the_end_is_left_out(bridge, endpoint):
    _, sampler = endpoint(lambda n, body: (200, said([" is\ufffd"])))
    assert sample_continuations(bridge, PREFIX, 1, sampler=sampler, **DRAWS).texts == (" is",)


def test_the_key_is_sent_and_written_nowhere(bridge, endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server, sampler = endpoint(served(bridge), cache_directory=tmp_path / "answers")
    found = sample_continuations(bridge, PREFIX, 3, sampler=sampler, **DRAWS)
    found.save(tmp_path / "set")
    assert server.keys == {"Bearer sk-secret"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 5 and not any(b"sk-secret" in path.read_bytes() for path in files)
    assert b"sk-secret" not in pickle.dumps(sampler) and "sk-secret" not in json.dumps(sampler.describe())
    before = len(server.bodies)
    again = sample_continuations(bridge, PREFIX, 3, sampler=sampler, **DRAWS)
    assert again.texts == found.texts and len(server.bodies) == before, "answers are kept"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("localhost:8000/v1", "m"), {}, "must begin with http"),
        (("http://me:sk-secret@host/v1", "m"), {}, "no user name"),
        (("http://host/v1?key=sk-secret", "m"), {}, "no user name, password or query"),
        (("http://host/v1/completions", "m"), {}, "base_url ends before /completions"),
        (("http://host/v1/chat/completions/", "m"), {}, "base_url ends before /completions"),
        (("http://host/v1", ""), {}, "model is empty"),
        (("http://host/v1", "m"), {"prompt_as": "ids"}, "prompt_as must be one of 'tokens', 'text'"),
        (("http://host/v1", "m"), {"choices_per_request": 0}, "choices_per_request"),
        (("http://host/v1", "m"), {"timeout": 0}, "timeout"),
        (("http://host/v1", "m"), {"max_retries": -1}, "max_retries"),
        (("http://host/v1", "m"), {"request_options": {"temperature": 2}}, "temperature, which the arguments"),
    ],
)
def test_options_that_cannot_be(arguments, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        EndpointSampler(*arguments, **options)
    assert "sk-secret" not in str(refused.value)
