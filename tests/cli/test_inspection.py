"""Looking at saved dictionaries through the command."""

import json
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from sae_lens import SAE

from saelens_ext.analysis.labels import label_latents
from saelens_ext.analysis.match import match_dictionaries
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.cli.report import lens_of
from saelens_ext.host.by_name import same_model
from tests import models_zoo
from tests.continuations._dictionaries import make
from tests.runner.runs import HOOK, NEURONS


@pytest.fixture
def copied(built, tmp_path):
    """Copies of the dictionaries that a test may change."""
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in built.items()}


@pytest.fixture
def foreign(tmp_path, place):
    """A SAELens SAE without anything beside it."""
    sae = make("standard", HOOK, 32, d_sae=12)
    sae.cfg.metadata.model_name, sae.cfg.metadata.context_size = str(place / "model"), 16
    sae.save_model(tmp_path / "foreign")
    return tmp_path / "foreign"


@pytest.mark.parametrize("name", ["fine", "snmf"])
def test_a_profile_is_that_of_the_run(name, copied, command):
    before = DictionaryProfile.load(copied[name])
    for path in copied[name].glob("profile.*"):
        path.unlink()
    found = command("profile", copied[name], "--json")
    assert found.status == 0, found.err
    again = DictionaryProfile.load(copied[name], SAE.load_from_disk(copied[name]))
    assert torch.equal(again.counts, before.counts) and torch.equal(again.top.token_ids, before.top.token_ids)
    (row,) = found.data["profiles"]
    assert (row["activations"], row["latents"]) == (600, len(before.counts))


def test_a_profile_of_other_text(copied, command, tmp_path):
    (tmp_path / "other.txt").write_text(
        "\n".join(f"Sentence number {i} is about nothing in particular." for i in range(20))
    )
    found = command(
        "profile", copied["fine"], f"--dataset_path={tmp_path / 'other.txt'}", "--training_tokens=100", "--json"
    )
    assert found.status == 0, found.err
    assert DictionaryProfile.load(copied["fine"]).n_activations == 100


@pytest.mark.slow
def test_a_foreign_sae_needs_to_be_told_what_to_read(foreign, command, place):
    missing = command("profile", foreign)
    assert missing.status == 2 and "No dataset was named: --dataset_path=NAME" in missing.error
    found = command("profile", foreign, f"--dataset_path={place / 'text.jsonl'}", "--training_tokens=200", "--json")
    assert found.status == 0, found.err
    assert found.data["profiles"][0]["latents"] == 12 and DictionaryProfile.load(foreign).n_activations == 200
    evaluated = command(
        "eval",
        foreign,
        f"--dataset_path={place / 'text.jsonl'}",
        "--n_eval_batches=1",
        "--store_batch_size_prompts=4",
        "--json",
    )
    assert evaluated.status == 0, evaluated.err
    assert evaluated.data["token_stats"]["unseen_documents"] is None  # nobody knows what it was trained on
    reported = command("report", foreign)
    assert reported.status == 0, reported.err
    page = (foreign / "report.html").read_text()
    assert "This dictionary (standard) encodes an activation of width 32 into 12 features" in page
    assert "#snmf-evaluation" in page and "explained_variance" in page and "#snmf-fit" not in page
    assert data_of(foreign)["promoted"][0] is not None


def data_of(folder) -> dict:
    """What the report on features works on."""
    page = (folder / "report.html").read_text()
    return json.loads(re.search(r'id="feature-data">(.*?)</script>', page)[1])


@pytest.mark.slow
def test_a_dictionary_of_ours_without_its_fit_has_a_report(copied, command):
    for name in ("fine", "snmf"):
        for path in copied[name].glob("fit.*"):
            path.unlink()
        found = command("report", copied[name], "--json")
        assert found.status == 0, found.err
        data = data_of(copied[name])
        assert data["distances"] is (name == "fine") and data["sizes"] == [len(data["firing"])]
        # Features of neurons promote what they write into the residual stream.
        assert data["promoted"][0] is not None


@pytest.mark.parametrize("name", ["report", "eval", "profile", "match", "push"])
def test_a_file_is_no_folder(name, copied, command):
    path = copied["fine"] / "cfg.json"
    more = {"match": [copied["coarse"]], "push": ["someone/something", "x"]}.get(name, [])
    found = command(name, path, *more)
    assert found.status == 1 and f"{path} is a file; give the folder" in found.error and str(path.parent) in found.error


def test_another_model_is_said_before_it_is_read(copied, command, place, tmp_path):
    models_zoo.make_hf_model("llama", seed=1).save_pretrained(tmp_path / "twin")
    models_zoo.make_tokenizer().save_pretrained(tmp_path / "twin")
    twin = command("eval", copied["fine"], "--n_eval_batches=1", f"--model_name={tmp_path / 'twin'}", "--save=false")
    assert twin.status == 0, twin.err
    assert f"and {tmp_path / 'twin'} is read: figures are of activations" in twin.err and "was built on" in twin.err
    same = command("eval", copied["fine"], "--n_eval_batches=1", f"--model_name={place / 'model'}", "--save=false")
    assert same.status == 0 and "was built on" not in same.err
    wide = models_zoo.make_hf_model("llama")
    wide.config.hidden_size = 48
    wide.config.save_pretrained(tmp_path / "wide")  # no weights: refused before they are looked for
    for name in ("eval", "profile", "report"):
        found = command(name, copied["fine"], f"--model_name={tmp_path / 'wide'}")
        assert found.status == 1, name
        assert f"of width 32, and {tmp_path / 'wide'} has width 48: give the model" in found.error


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("gpt2-small", "openai-community/gpt2", True),
        ("google/gemma-2-2b", "/models/gemma-2-2b", True),
        ("Qwen/Qwen2-0.5B", "qwen2-0.5b", True),
        ("gpt2", "gpt2-medium", False),
    ],
)
def test_names_of_one_model(one, other, same):
    assert same_model(one, other) is same


def test_an_evaluation_is_that_of_the_run(copied, command):
    before = json.loads((copied["fine"] / "evals.json").read_text())
    (copied["fine"] / "evals.json").unlink()
    found = command("eval", copied["fine"], "--n_eval_batches=1", "--json")
    assert found.status == 0, found.err
    assert found.data == before == json.loads((copied["fine"] / "evals.json").read_text())
    (copied["fine"] / "evals.json").unlink()
    people = command("eval", copied["fine"], "--n_eval_batches=1", "--save=false")
    assert "explained_variance " in people.out and not (copied["fine"] / "evals.json").exists()


def test_an_evaluation_of_something_without_a_value_is_strict_json(copied, command, monkeypatch):
    monkeypatch.setattr(
        "saelens_ext.runner.evaluation.evaluate",
        lambda *args: {"token_stats": {"a": float("nan"), "b": torch.tensor(2.0)}},
    )
    found = command("eval", copied["fine"], "--json", "--save=false")
    assert found.data["token_stats"] == {"a": None, "b": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fine", []),
        pytest.param("fine", ["--lens=false", "--compare={coarse}"], marks=pytest.mark.slow),
        pytest.param("snmf", [], marks=pytest.mark.slow),
        ("snmf", ["--lens=false", "--title=Of neurons"]),
    ],
)
def test_reports(name, more, copied, command, tmp_path):
    found = command("report", copied[name], *(one.format(**copied) for one in more), "--json")
    assert found.status == 0, found.err
    path = copied[name] / "report.html"
    page = path.read_text()
    assert found.data == {"report": str(path.resolve())} and page.startswith("<!")
    assert ("Of neurons" if "--title=Of neurons" in more else f"{HOOK if name == 'fine' else NEURONS} of") in page
    elsewhere = command("report", copied[name], f"--html={tmp_path / 'x' / 'page.html'}", "--lens=false")
    assert elsewhere.status == 0 and (tmp_path / "x" / "page.html").exists()


@pytest.mark.slow
def test_a_released_sae_is_profiled_labelled_and_reported_on(foreign, command, place, tmp_path, monkeypatch):
    """By the name of a release, of which SAELens knows where to get it; no file of ours lies beside it."""
    asked = []

    def from_pretrained(release, sae_id, device):
        asked.append((release, sae_id))
        return SAE.load_from_disk(foreign, device=device)

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    named = ["report", "some-release:layer_1", f"--dataset_path={place / 'text.jsonl'}", "--training_tokens=300"]
    found = command(*named, f"--compare={foreign}", "--json")
    assert found.status == 0, found.err
    assert asked == [("some-release", "layer_1")] and found.data == {"report": str(tmp_path / "report.html")}
    assert "reading 300 activations" in found.err
    data = data_of(tmp_path)
    assert data["n_profiled"] == 300 and any(label and label["text"] for label in data["labels"])
    page = (tmp_path / "report.html").read_text()
    assert 'id="compared-pairs"' in page and "Mutual pairs" in page
    bare = command(*named, "--labels=false", "--json")
    assert bare.status == 0 and set(data_of(tmp_path)["labels"]) == {None}
    nowhere = command("report", "some-release")
    assert nowhere.status == 1 and "not written as repo_id:sae_id" in nowhere.error


@pytest.mark.slow
def test_saved_labels_are_those_of_the_report(copied, command):
    profile = DictionaryProfile.load(copied["fine"])
    labels = label_latents(profile, models_zoo.make_tokenizer())
    replace(labels, texts=tuple(f"named {i}" for i in range(len(labels)))).save(copied["fine"])
    found = command("report", copied["fine"], "--lens=false")
    assert found.status == 0, found.err
    assert '"named 0"' in (copied["fine"] / "report.html").read_text()
    replace(labels, hook_name="elsewhere").save(copied["fine"])
    assert "do not belong together" in command("report", copied["fine"], "--lens=false").error


def test_the_lens_is_of_directions_in_the_stream(tiny_bridge):
    """A width alone does not make one: the heads' activations are as wide as the stream."""
    assert lens_of(tiny_bridge, make("standard", HOOK, 32)) is not None
    assert lens_of(tiny_bridge, make("standard", "blocks.1.attn.hook_z", 32)) is None
    assert lens_of(tiny_bridge, make("transcoder", "blocks.1.hook_resid_mid", write="blocks.1.attn.o.hook_in")) is None


def test_a_report_without_a_profile_says_how_to_make_one(copied, command):
    (copied["fine"] / "profile.json").unlink()
    found = command("report", copied["fine"])
    assert found.status == 1 and f"make it with `saelens-ext profile {copied['fine']}`" in found.error


@pytest.mark.slow
def test_a_hierarchy(command, place, tmp_path, tiny_bridge, tiny_texts):
    from saelens_ext.activations.stream import ActivationStream
    from saelens_ext.dictionaries.fit_hierarchy import fit_hierarchical_snmf

    stream = ActivationStream(tiny_bridge, tiny_texts, NEURONS, context_size=16, max_tokens=200)
    folder = fit_hierarchical_snmf(stream, (4, 2), max_iter=5).save(tmp_path / "tree")
    named = [f"--model_name={place / 'model'}"]
    missing = command("report", folder, *named)
    assert missing.status == 1 and "level_0 holds no profile" in missing.error
    reading = [f"--dataset_path={place / 'text.jsonl'}", "--context_size=16", "--training_tokens=100"]
    profiled = command("profile", folder, *named, *reading, "--json")
    assert profiled.status == 0, profiled.err
    assert [row["latents"] for row in profiled.data["profiles"]] == [4, 2]
    reported = command("report", folder, *named)
    assert reported.status == 0, reported.err
    assert command("eval", folder, *named).error.endswith(f"is a hierarchy; evaluate one level, {folder}/level_0 say.")
    assert "is a hierarchy of 2: name one" in command("match", folder, folder).error
    assert command("match", folder / "level_0", folder / "level_0").status == 0


def test_match(built, command, tmp_path):
    found = command("match", built["fine"], built["coarse"], "--seed=3", f"--csv={tmp_path / 'm.csv'}", "--json")
    assert found.status == 0, found.err
    first, second = (SAE.load_from_disk(built[name]) for name in ("fine", "coarse"))
    expected = match_dictionaries(first, second, seed=3)
    assert found.data["first"] == json.loads(json.dumps(expected.summary()["first"]))
    rows = pd.read_csv(tmp_path / "m.csv")
    assert len(rows) == first.cfg.d_sae + second.cfg.d_sae and list(rows["nearest"]) == list(
        expected.to_dataframe()["nearest"]
    )
    people = command("match", built["fine"], built["fine"], "--center=shared", "--null=rotation")
    assert people.status == 0 and "100.0%" in people.out and "By chance 1.0%" in people.out


def test_dictionaries_of_other_widths_do_not_match(built, command):
    found = command("match", built["fine"], built["snmf"])
    assert found.status == 1 and "32" in found.error and "64" in found.error
