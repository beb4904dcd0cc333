"""Uploads with the real client, to a server on the loopback interface."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from neuronpedia.requests.base_request import NPRequest
from sae_lens import SAE, StandardSAE, StandardSAEConfig

import saelens_ext as sx
from saelens_ext.hub import neuronpedia
from saelens_ext.hub.neuronpedia import NeuronpediaError, neuronpedia_labels, push_to_neuronpedia

KEY = "np-key"


class Site(ThreadingHTTPServer):
    """Keeps what is uploaded, and answers as told: ``answers`` are the statuses of the next calls, then 200."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.batches, self.answers, self.explanations = [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = 401 if self.headers["X-Api-Key"] != KEY else self.server.answers.pop(0) if self.server.answers else 200
        if status == 200:
            assert self.path == "/api/feature/upload-batch"
            self.server.batches.append(body)
        self._answer(status, {"message": "ok"})

    def do_GET(self):
        self.server.asked = self.path
        self._answer(self.server.answers.pop(0) if self.server.answers else 200, self.server.explanations)

    def _answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    server = Site()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(NPRequest, "BASE_URL", f"{server.url}/api")
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    monkeypatch.setattr(neuronpedia.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(neuronpedia, "BATCH", 8)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def made(tiny_bridge, tiny_texts):
    stream = sx.ActivationStream(tiny_bridge, tiny_texts, "blocks.1.hook_out", context_size=32, max_tokens=400)
    partition = sx.fit_exemplar_partition(stream, percentile=5).dictionary
    profile = sx.profile_dictionary(partition, stream, n_examples=3, n_random=6)
    tokenizer = tiny_bridge.tokenizer
    return SimpleNamespace(
        profile=profile,
        tokenizer=tokenizer,
        lens=sx.logit_lens(tiny_bridge, partition.exemplars, top_n=4),
        labels=sx.label_latents(profile, tokenizer, n_null=200),
        stream=stream,
        partition=partition,
    )


def push(made, **options):
    arguments = {"lens": made.lens, "labels": made.labels} | options
    return push_to_neuronpedia(made.profile, made.tokenizer, "tiny", "1-res-ep", **arguments)


def test_the_client_uploads_what_the_profile_holds(site, made, capsys):
    found = push(made)
    assert found.url == "https://www.neuronpedia.org/tiny/1-res-ep" and found.n_features == made.profile.d_sae
    assert found.n_sent == found.n_batches == len(site.batches) == -(-made.profile.d_sae // 8) > 1
    assert not capsys.readouterr().out
    assert {(batch["modelId"], batch["source"]) for batch in site.batches} == {("tiny", "1-res-ep")}
    features = [feature for batch in site.batches for feature in batch["features"]]
    assert [feature["index"] for feature in features] == list(range(made.profile.d_sae))
    assert sum(feature["density"] for feature in features) == pytest.approx(1)  # every activation is in one region
    for latent, feature in enumerate(features):
        ids, logits = made.lens.promoted_ids[latent], made.lens.promoted_logits[latent]
        assert [entry["value"] for entry in feature["topLogits"]] == logits.tolist()
        decoded = made.tokenizer.decode([int(ids[0])])
        assert "�" in decoded or feature["topLogits"][0]["token"] == decoded
        assert len(feature["bottomLogits"]) == 4
        sure = bool(made.labels.distinguishes[latent]) and made.labels.texts[latent]
        assert [entry["text"] for entry in feature["explanations"]] == ([made.labels.texts[latent]] if sure else [])
        top = [one for one in feature["activations"] if one["quantileFraction"] is None]
        assert len(top) == min(3, int(made.profile.counts[latent]))
        assert all(len(one["tokens"]) == len(one["values"]) for one in feature["activations"])
        peak = int(made.profile.top.contexts[latent, 0, : made.profile.context].ge(0).sum())
        expected = made.profile.top.token_values[latent, 0, made.profile.context]
        assert top[0]["values"][peak] == pytest.approx(float(expected), rel=1e-3)
        binned = [one for one in feature["activations"] if one["quantileFraction"] is not None]
        shares = {(one["quantileMin"], one["quantileMax"]): one["quantileFraction"] for one in binned}
        assert sum(shares.values()) == pytest.approx(1)
    assert any(feature["explanations"] for feature in features)


def test_a_dry_run_writes_the_same(site, made, tmp_path, monkeypatch):
    push(made)
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    found = push(made, dry_run=tmp_path / "batches", state=tmp_path)
    written = [json.loads(path.read_text()) for path in sorted((tmp_path / "batches").iterdir())]
    assert written == site.batches and found.n_sent == len(written)
    assert not (tmp_path / neuronpedia.STATE_FILENAME).exists()


def test_an_upload_that_breaks_goes_on_where_it_was(site, made, tmp_path):
    site.answers = [
        200,
        503,
        429,
        200,
        500,
        500,
        500,
        500,
    ]  # the second batch at the third attempt, then none
    n = -(-made.profile.d_sae // 8)
    with pytest.raises(NeuronpediaError, match=f"Server error.* 2 of {n} batches had arrived"):
        push(made, state=tmp_path)
    assert len(site.batches) == 2
    found = push(made, state=tmp_path)
    assert found.n_sent == n - 2 and found.n_batches == n
    indices = [feature["index"] for batch in site.batches for feature in batch["features"]]
    assert indices == list(range(made.profile.d_sae))
    assert push(made, state=tmp_path).n_sent == 0
    changed = replace(made.profile, counts=made.profile.counts + 1)
    assert push_to_neuronpedia(changed, made.tokenizer, "tiny", "1-res-ep", state=tmp_path).n_sent == n


def test_what_cannot_be_uploaded(site, made, tmp_path, monkeypatch):
    other = replace(made.profile.top, token_values=None)
    for error, match, arguments in [
        (ValueError, "got 'tiny/x'", (made.profile, made.tokenizer, "tiny/x", "1-res-ep")),
        (ValueError, "'res'", (made.profile, made.tokenizer, "tiny", "res")),
        (
            ValueError,
            "of layer 3, the profile of blocks.1.hook_out",
            (made.profile, made.tokenizer, "tiny", "3-res-ep"),
        ),
        (ValueError, "make it again", (replace(made.profile, top=other), made.tokenizer, "tiny", "1-res-ep")),
    ]:
        with pytest.raises(error, match=match):
            push_to_neuronpedia(*arguments)
    with pytest.raises(ValueError, match="latents must be some of 0 to .*, got -1"):
        push(made, latents=[-1])
    with pytest.raises(ValueError, match="lens is of 2 latents"):
        push(made, lens=replace(made.lens, promoted_ids=made.lens.promoted_ids[:2]))
    with pytest.raises(NeuronpediaError, match="refused the key.* 0 of"):
        push(made, api_key="wrong")
    site.answers = [400]
    with pytest.raises(NeuronpediaError, match="400"):
        push(made)
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    with pytest.raises(NeuronpediaError, match="set NEURONPEDIA_API_KEY"):
        push(made)
    monkeypatch.setattr(NPRequest, "BASE_URL", "http://127.0.0.1:9/api")
    with pytest.raises(NeuronpediaError, match="did not take a batch"):
        push(made, api_key=KEY)
    assert not site.batches


def test_latents_that_never_fire_and_a_profile_without_random_examples(site, made):
    sae = StandardSAE(StandardSAEConfig(d_in=made.partition.cfg.d_in, d_sae=5))
    sae.cfg.metadata.hook_name = "blocks.1.hook_out"
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    profile = sx.profile_dictionary(sae, made.stream)
    push_to_neuronpedia(profile, made.tokenizer, "tiny", "1-res-sae", latents=[4, 0])
    (batch,) = site.batches
    assert [(one["index"], one["density"], one["activations"]) for one in batch["features"]] == [(4, 0, []), (0, 0, [])]
    assert batch["features"][0]["topLogits"] is None


def released(d_sae=6, name="gpt2-small/6-res-jb") -> SAE:
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=d_sae))
    sae.cfg.metadata.neuronpedia_id, sae.cfg.metadata.hook_name = name, "blocks.6.hook_resid_pre"
    return sae


def test_labels_of_a_release(site, tmp_path):
    site.explanations = [
        {"index": "4", "description": " days of the week", "typeName": "oai_token-act-pair"},
        {"index": "0", "description": "names", "typeName": "oai_token-act-pair"},
        {"index": "4", "description": "a second opinion", "typeName": None},
    ]
    labels = neuronpedia_labels(released(), site=site.url)
    assert site.asked == "/api/explanation/export?modelId=gpt2-small&saeId=6-res-jb"
    assert labels.texts == ("names", "", "", "", "days of the week", "")
    assert labels[4].score_text.startswith("not scored") and not labels[4].distinguishes
    assert labels.method == "Neuronpedia (oai_token-act-pair)"
    assert sx.Labels.load(labels.save(tmp_path)).texts == labels.texts


def test_labels_that_are_not_there(site):
    with pytest.raises(ValueError, match="neuronpedia_id is None"):
        neuronpedia_labels(released(name=None), site=site.url)
    with pytest.raises(NeuronpediaError, match="has no labels of gpt2-small/6-res-jb"):
        neuronpedia_labels(released(), site=site.url)
    site.explanations = [{"index": 6, "description": "x"}]
    with pytest.raises(NeuronpediaError, match="has a latent 6, this SAE has 6"):
        neuronpedia_labels(released(), site=site.url)
    for nonsense in ({"error": "no"}, [{"index": 1}], ["x"], [{"index": "one", "description": "x"}]):
        site.explanations = nonsense
        with pytest.raises(NeuronpediaError, match="gave no labels of gpt2-small/6-res-jb"):
            neuronpedia_labels(released(), site=site.url)
    site.answers = [500]
    with pytest.raises(NeuronpediaError, match="500"):
        neuronpedia_labels(released(), site=site.url)
