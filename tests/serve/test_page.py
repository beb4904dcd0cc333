"""What the page's server answers, and what it refuses."""

import json
import re

import pytest
from starlette.testclient import TestClient

from saelens_ext.serve.page import MAX_BODY, LivePage
from saelens_ext.serve.server import LOOPBACK
from saelens_ext.steering.sampling import SamplingOptions, sample_texts
from tests.serve.test_live import TEXT

# The client's own choice among its two ways to talk to an application.
pytestmark = pytest.mark.filterwarnings("ignore:Using `httpx` with `starlette:DeprecationWarning")
STEER = {"job": "a", "text": TEXT, "changes": [], "options": {"max_new_tokens": 3, "temperature": 1, "seed": 3}}


@pytest.fixture(scope="module")
def client(live):
    with TestClient(LivePage(live, "<i>title</i>").app([LOOPBACK]), f"http://{LOOPBACK}:1") as client:
        yield client


def lines(answer):
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.text.splitlines()]


def refused(answer, status=400):
    assert answer.status_code == status
    return answer.json()["error"]


def test_the_page_runs_its_own_script_only_and_is_kept_nowhere(client):
    answer = client.get("/")
    assert answer.headers["cache-control"] == "no-store" and answer.headers["x-frame-options"] == "DENY"
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', answer.text)
    assert "default-src &#39;none&#39;" in policy and "unsafe-inline" not in re.sub("style-src-attr.*", "", policy)
    assert "&lt;i&gt;title" in answer.text and "<i>title" not in answer.text
    assert "://" not in re.sub(r'"http://www.w3.org/2000/svg"', "", answer.text)


def test_a_reading_names_labels(client, live):
    answer = client.post("/read", json={"text": TEXT}).json()
    tokens = answer["regions"]["tokens"]
    assert [token["text"] for token in tokens] == [token.text for token in live.read(TEXT)["regions"]]
    regions = {str(token["region"]) for token in tokens}
    assert regions <= answer["regions"]["labels"].keys()
    one = answer["regions"]["labels"][str(tokens[3]["region"])]
    label = live.dictionaries["regions"].labels[tokens[3]["region"]]
    assert one == {"text": label.text, "sure": label.distinguishes}


def test_control_and_bidirectional_characters_are_spelt_out(client):
    tokens = client.post("/read", json={"text": "a\u202eb\x1bc"}).json()["neurons"]["tokens"]
    shown = "".join(token["text"] for token in tokens)
    assert "\u202e" not in shown and "\x1b" not in shown and "⟨U+001B⟩" in shown


def test_steering_streams_to_the_end(client, live, model):
    changes = [{"dictionary": "regions", "latent": 2, "nats": 0.3, "ablate": False}]
    updates = lines(client.post("/steer", json=STEER | {"changes": changes}))
    assert [update["n_tokens"] for update in updates[1:]] == [1, 2, 3] and updates[-1]["done"]
    assert updates[-1]["strengths"][0]["reached"]
    options = SamplingOptions(max_new_tokens=3, seed=3)
    assert [[updates[-1]["unsteered"]]] == sample_texts(model, TEXT, n=1, options=options)


def test_a_latent_is_shown(client):
    assert "region 2" in client.post("/latent", json={"dictionary": "regions", "latent": 2}).json()["html"]
    assert client.post("/latent", json={"dictionary": "neurons", "latent": 2}).json()["html"] is None
    found = client.post("/find", json={"dictionary": "regions", "query": "3"}).json()["latents"]
    assert [one["latent"] for one in found] == [3]


@pytest.mark.parametrize(
    ("path", "asked", "message"),
    [
        ("read", {"text": ""}, "The text is empty"),
        ("read", {"text": "\ud800"}, "half a character"),
        ("read", {"text": 3}, "The text must be a text, got 3"),
        ("read", {}, "The text must be a text, got None"),
        ("read", {"text": "word " * 3000}, "tokens, and at most"),
        (
            "read",
            {"messages": "Why?"},
            "The conversation has the message 'W', and a message has role and content alone",
        ),
        ("read", {"messages": []}, "The conversation must be a text or a conversation, got []"),
        ("read", {"messages": [{"role": "tool", "content": "4"}]}, "must be one of 'system', 'user', 'assistant'"),
        ("steer", {"text": TEXT, "job": "1", "chat_template_options": 5}, "The template options must be a JSON object"),
        ("latent", {"dictionary": "regions", "latent": "1"}, "Region '1' is not in regions"),
        ("latent", {"dictionary": ["regions"], "latent": 1}, "There is no dictionary"),
        ("find", {"dictionary": "regions", "query": "x" * 201}, "at most 200 characters"),
        ("steer", STEER | {"text": " "}, "The text is empty"),
        ("steer", STEER | {"job": ""}, "job must be a text of 1 to 64"),
        ("steer", STEER | {"changes": "all"}, "changes must be a list of objects, got 'all'"),
        ("steer", STEER | {"changes": [{"latent": 1}]}, "must name a dictionary and a latent"),
        ("steer", STEER | {"changes": [{"dictionary": "regions", "latent": 1, "nats": "1"}]}, "nats must be a number"),
        ("steer", STEER | {"changes": [{"dictionary": "regions", "latent": 1, "nat": 1}]}, "does not know 'nat'"),
        ("steer", STEER | {"options": {"max_new_tokens": 0}}, "max_new_tokens must be a whole number of at least 1"),
        ("steer", STEER | {"options": {"max_new_tokens": 1.5}}, "max_new_tokens must be a whole number, got 1.5"),
        ("steer", STEER | {"options": {"temperature": -1}}, "temperature must be finite and at least 0"),
        ("steer", STEER | {"options": {"temperature": None}}, "temperature must be a number, got None"),
        ("steer", STEER | {"options": {"seed": 2**40}}, "The seed must be between"),
        ("steer", STEER | {"options": {"max_new_tokens": 10**6}}, "At most 200 new tokens are sampled"),
    ],
)
def test_bad_requests_are_refused_in_plain_words(client, path, asked, message):
    answer = client.post(f"/{path}", content=json.dumps(asked), headers={"Content-Type": "application/json"})
    assert message in refused(answer)


def test_what_is_no_request_of_the_page_is_refused(client):
    form = client.post("/read", content=json.dumps({"text": TEXT}), headers={"Content-Type": "text/plain"})
    assert "must be of type application/json" in refused(form)
    as_json = {"Content-Type": "application/json"}
    assert "must be a JSON object" in refused(client.post("/read", content=b"{", headers=as_json))
    assert "got list" in refused(client.post("/read", content=b"[]", headers=as_json))
    assert "must be a JSON object" in refused(client.post("/read", content=b"[" * 100_000, headers=as_json))
    large = json.dumps({"text": "a" * MAX_BODY}).encode()
    assert "at most 500,000 bytes" in refused(client.post("/read", content=large, headers=as_json))
    # Another site's page that a browser was made to believe is this machine.
    assert client.post("/read", json={"text": TEXT}, headers={"Host": "evil.example:1"}).status_code == 400
    assert client.get("/read").status_code == 405


def test_a_failure_of_the_model_is_told_and_the_page_goes_on(client, live, monkeypatch):
    def fail(self, prompt, *, chat_template_options=None):
        raise RuntimeError("out of memory\nat a place")

    monkeypatch.setattr(type(live), "read", fail)
    assert refused(client.post("/read", json={"text": TEXT})) == "The model failed (RuntimeError): out of memory"
    monkeypatch.undo()
    assert client.post("/read", json={"text": TEXT}).status_code == 200


def test_nothing_that_was_typed_is_written(client, opened_for_writing):
    client.post("/read", json={"text": TEXT})
    lines(client.post("/steer", json=STEER))
    assert opened_for_writing == []
    with open("/dev/null", "w"):
        pass
    assert opened_for_writing == ["/dev/null"]
