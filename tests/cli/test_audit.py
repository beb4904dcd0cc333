"""The audit through the command, and its points of a sweep."""

import json
from pathlib import Path

import joblib
import pandas as pd
import pytest

from saelens_ext.cli import audit as audit_command
from saelens_ext.cli.audit_options import SamplerOptions
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.opening import texts_in
from tests.cli.conftest import logged_run
from tests.harnesses.openai_script import scripted

SMALL = [
    "--n=16",
    "--max_new_tokens=5",
    "--betas=1.0,1.25",
    "--gammas=[0.3, 0.7]",
    "--n_clusters=1,24",
    "--min_cluster_size=1",
    "--n_resamples=2",
    "--max_rows=4",
    "--strengths=-1,1",
]
PREFIX = "The assert statement"


@pytest.fixture(scope="module")
def asked(built, place) -> list[str]:
    return ["audit", f"--model_name={place / 'model'}", f"--dictionaries={built['fine']}", *SMALL]


@pytest.mark.slow
def test_an_audit(asked, command, tmp_path):
    found = command(*asked, f"--prefix={PREFIX}", f"--output_path={tmp_path}", "--json")
    assert found.status == 0, found.err
    (one,) = found.data["prefixes"]
    assert (
        one["prompt"] == one["prefix"] == PREFIX
        and one["n_continuations"] == 16
        and sum(mode["n_members"] for mode in one["modes"]) == 16
    )
    assert found.data["claim"] or one["not_validated"]
    verdict = found.data["verdict"]
    assert verdict == one["verdict"] and [f["key"] for f in verdict["findings"]][:3] == ["moves", "by_mode", "joint"]
    rows = pd.read_csv(tmp_path / "continuations.csv")
    assert (
        len(rows) == 16 and rows["cluster"].nunique() == len(pd.read_csv(tmp_path / "modes.csv")) == one["n_clusters"]
    )
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!") and PREFIX in page
    assert set(found.data["files"]) == {"continuations", "modes", "report"}
    again = command(*asked, f"--prefix={PREFIX}", f"--output_path={tmp_path}")  # from what is there
    assert verdict["headline"] in " ".join(again.out.split())
    assert again.status == 0 and repr(PREFIX) in again.out and f"report: {tmp_path / 'report.html'}" in again.out
    other = command(*asked, f"--prefix={PREFIX}", f"--output_path={tmp_path}", "--top_p=0.8")
    assert other.status == 1 and "top_p: 0.9 there, 0.8 now" in other.error


def test_ctrl_c_says_where_the_stages_are(asked, command, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("saelens_ext.continuations.audit_stages.stages.attribute_continuations", interrupted)
    found = command(*asked, f"--prefix={PREFIX}", f"--output_path={tmp_path}")
    assert (
        found.status == 130
        and f"Stages that were finished are in {tmp_path}; the same command goes on from there." in found.error
    )
    assert len(list(tmp_path.glob("prefix_*/continuations"))) == 1


def test_prefixes_from_a_file(tmp_path):
    inputs = audit_command.AuditInputs(prefix=["a, b"], prefixes=str(tmp_path / "p"))
    (tmp_path / "p").write_text("one\n\ntwo\n")
    assert audit_command._prefixes(inputs)[0] == ["a, b", "one", "two"]
    (tmp_path / "p").write_text(json.dumps(["line\nbreak", "c"]))
    assert audit_command._prefixes(inputs)[0] == ["a, b", "line\nbreak", "c"]
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}]
    (tmp_path / "p").write_text(json.dumps([talk, "c"]))
    assert audit_command._prefixes(inputs)[0] == ["a, b", talk, "c"]
    for written in (json.dumps(talk), json.dumps(talk) + "\n" + json.dumps(talk[:1])):
        (tmp_path / "p").write_text(written)
        assert audit_command._prefixes(inputs)[0] == ["a, b", talk, talk[:1]][: 1 + len(written.splitlines())]
    (tmp_path / "p").write_text(f"one\n{json.dumps(talk)}\n[INST] two\n")
    assert audit_command._prefixes(inputs)[0] == ["a, b", "one", talk, "[INST] two"]
    (tmp_path / "p").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON list of texts and conversations"):
        audit_command._prefixes(inputs)
    (tmp_path / "p").write_text("[broken")
    with pytest.raises(ValueError, match="must hold a JSON list of texts and conversations"):
        audit_command._prefixes(inputs)


def test_texts_and_conversations_in_lines_of_json(tmp_path):
    talk, path = [{"role": "user", "content": "Why?"}], tmp_path / "p.jsonl"
    path.write_text(f'"line\\nbreak"\n\n{json.dumps(talk)}\n')
    assert texts_in(path, conversations=True) == ["line\nbreak", talk]
    with pytest.raises(
        ValueError, match="must hold a JSON list of texts, or one in each line; it lists something else"
    ):
        texts_in(path)
    path.write_text("no JSON\n")
    with pytest.raises(ValueError, match="or one in each line; it is not readable as either"):
        texts_in(path, conversations=True)


@pytest.mark.slow
def test_figures_are_logged_under_one_run(asked, command, offline):
    more = ["--validate=false", "--logger.log_to_wandb=true", f"--output_path={offline / 'out'}"]
    found = command(*asked, f"--prefix={PREFIX}", "--prefix=A, or b", *more, "--json")
    assert found.status == 0, found.err
    run = logged_run(offline)
    assert (run.run_id, run.project, run.exit_code) == ("point1", "of_the_sweep", 0)
    first, second = found.data["prefixes"]
    for name in ("beta", "gamma", "objective", "rate", "semantic_distortion", "attribution_distortion", "n_clusters"):
        assert run.logged(f"metrics/{name}") == [pytest.approx((first[name] + second[name]) / 2)]
        assert run.logged(f"metrics/prefix_001/{name}") == [pytest.approx(second[name])]
    assert run.config["betas"] == [1.0, 1.25] and run.config["prefix"] == [PREFIX, "A, or b"]
    # Each point of a sweep has a folder of its own.
    assert len(list((offline / "out" / "point1").glob("prefix_*/audit.json"))) == 2


@pytest.mark.slow
def test_prompts_over_workers_and_their_index(asked, command, tmp_path):
    (tmp_path / "prompts").write_text(f"{PREFIX}\nAn expression list\n")
    more = [f"--prefixes={tmp_path / 'prompts'}", "--validate=false", "--json"]
    alone = command(*asked, *more, f"--output_path={tmp_path / 'alone'}")
    with joblib.parallel_config(backend="sequential"):
        found = command(*asked, *more, f"--output_path={tmp_path / 'workers'}", "--n_workers=2")
    assert alone.status == found.status == 0, found.err
    assert found.data["prefixes"] == alone.data["prefixes"] and found.data["failures"] == {}
    assert found.data["files"]["report"] == str(tmp_path / "workers" / "index.html")
    assert "pages/001.html" in (tmp_path / "workers" / "index.html").read_text()
    assert "An expression list" in (tmp_path / "workers" / "pages" / "001.html").read_text()
    other = command(*asked, *more, "--output_path=none", "--n_workers=2")
    assert other.status == 1 and "n_workers=2 needs folder=" in other.error


def test_prefixes_of_the_continuations(tmp_path):
    path = tmp_path / "given.jsonl"
    path.write_text('{"prompt": "a", "continuation": " x"}\n{"prompt": "b", "continuation": " y"}')
    alone = audit_command.AuditInputs(continuations=str(path))
    assert audit_command._prefixes(alone) == (["a", "b"], {"a": [" x"], "b": [" y"]})
    assert audit_command._prefixes(audit_command.AuditInputs(continuations=str(path), prefix=["a"]))[0] == ["a"]
    with pytest.raises(UsageError, match="--continuations=FILE.eval"):
        audit_command._prefixes(audit_command.AuditInputs(samples=["a"], prefix=["a"]))
    with pytest.raises(UsageError, match="No prefix was given"):
        audit_command._prefixes(audit_command.AuditInputs())


def test_a_sampler_on_the_command_line():
    made = SamplerOptions(url="http://localhost:8000/v1", request_options={"min_p": 0.1}).made("gpt2", Path("out"))
    assert made is not None and made.describe() == {
        "kind": "endpoint",
        "base_url": "http://localhost:8000/v1",
        "model": "gpt2",
        "prompt_as": "tokens",
        "request_options": {"min_p": 0.1},
    }
    assert made.cache_directory == str(Path("out", "endpoint")) and SamplerOptions().made("gpt2", None) is None
    with pytest.raises(UsageError, match="without --sampler.url"):
        SamplerOptions(model="m").made("gpt2", None)


@pytest.mark.slow
def test_an_audit_of_what_an_endpoint_drew(asked, command, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    words = [" is", " was", " has", " had", " can", " will", " may", " must", " might"]

    def play(number, body):
        text = words[body["seed"] % 9] + words[body["seed"] // 9 % 9]
        return 200, {"choices": [{"text": text, "finish_reason": "length"}]}

    with scripted(play) as server:
        more = [f"--sampler.url={server.url}", "--sampler.model=m", "--validate=false", f"--output_path={tmp_path}"]
        found = command(*asked, f"--prefix={PREFIX}", *more, "--json")
        assert found.status == 0, found.err
        assert found.data["about"]["sampler"]["base_url"] == server.url and len(server.bodies) == 16
        again = command(*asked, f"--prefix={PREFIX}", *more, "--json")
        assert again.data["prefixes"] == found.data["prefixes"] and len(server.bodies) == 16
        other = command(*asked, f"--prefix={PREFIX}", *more, "--sampler.prompt_as=text")
        assert other.status == 1 and "another about" in other.error
    assert "is is" in (tmp_path / "continuations.csv").read_text() and server.keys == {"Bearer sk-secret"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in path.read_bytes() for path in files)
