"""Pushing a dictionary to the Hub and getting the same one back, with the real client over HTTP."""

import json
import re

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCardData
from sae_lens import SAE, Transcoder, TranscoderConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_ext import DictionaryProfile, ExemplarFitResult, ExemplarPartition
from saelens_ext.hub import load_from_hub, pull_from_hub, push_to_hub
from tests.hub.server import READER

# The client's own upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

REPO = "lab/dictionaries"


def same(left: SAE, right: SAE) -> None:
    assert type(left) is type(right)
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def card(hub, repo: str = REPO) -> tuple[dict, str]:
    _, front, body = hub.repos[repo].files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_fit_with_everything_beside_it_comes_back(hub, made, tmp_path):
    report = tmp_path / "r.html"
    report.write_text("<p>seen")
    commit = push_to_hub(
        made.partition,
        REPO,
        "blocks.1/p20",
        profile=made.profile,
        runner_config={"seed": 3},
        report=report,
        license="mit",
        metrics={"explained_variance": 0.5},
        base_model="lab/tiny",
    )
    assert commit == f"{hub.url}/{REPO}/commit/{commit.oid}"
    assert hub.repos[REPO].messages == ["initial commit", "Push blocks.1/p20"]  # one commit
    found = load_from_hub(REPO, "blocks.1/p20")
    same(found.dictionary, made.partition.dictionary)
    assert found.fit.dictionary is found.dictionary
    assert found.fit.unseen_mass == made.partition.unseen_mass
    assert torch.equal(found.fit.provenance.windows, made.partition.provenance.windows)
    assert torch.equal(found.profile.counts, made.profile.counts)
    assert found.runner_config == {"seed": 3}
    assert found.report.read_text() == "<p>seen"
    assert found.commit == commit.oid
    assert load_from_hub(REPO, "blocks.1/p20", dtype=torch.bfloat16).dictionary.W_dec.dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["partition", "snmf", "standard", "bare"])
def test_each_kind_is_loaded_by_saelens_too(hub, made, kind):
    pushed = made.snmf.dictionary if kind == "bare" else getattr(made, kind)
    dictionary = getattr(pushed, "dictionary", pushed)
    push_to_hub(pushed, REPO, "x")
    same(SAE.from_pretrained(REPO, "x"), dictionary)
    found = load_from_hub(REPO, "x")
    same(found.dictionary, dictionary)
    assert found.profile is None and (found.fit is None) == (kind in ("standard", "bare"))
    assert json.loads(hub.repos[REPO].files["x/cfg.json"])["device"] == "cpu"


def test_a_hierarchy_and_its_levels(hub, made):
    push_to_hub(made.hierarchy, REPO, "tree")
    found = load_from_hub(REPO, "tree", dtype="float64").dictionary
    assert found.ranks == (6, 3) and torch.equal(found.links[0], made.hierarchy.links[0])
    assert found.dictionaries[0].W_dec.dtype is torch.float64
    same(SAE.from_pretrained(REPO, "tree/level_1"), made.hierarchy.dictionaries[1])
    same(load_from_hub(REPO, "tree/level_1").dictionary, made.hierarchy.dictionaries[1])
    assert [line.split("|")[1].strip() for line in card(hub)[1].splitlines() if line.startswith("| `tree")] == [
        "`tree`"
    ]


def test_a_saved_directory_is_pushed_with_what_lies_in_it(hub, made, tmp_path):
    made.partition.save(tmp_path / "d")
    made.profile.save(tmp_path / "d")
    (tmp_path / "d" / "notes.txt").write_text("mine")
    push_to_hub(tmp_path / "d", REPO, "x")
    assert sorted(hub.repos[REPO].files) == [".gitattributes", "README.md"] + [
        f"x/{name}"
        for name in (
            "cfg.json",
            "fit.json",
            "fit.safetensors",
            "profile.json",
            "profile.safetensors",
            "sae_weights.safetensors",
        )
    ]
    pulled = pull_from_hub(REPO, "x", tmp_path / "pulled" / "deep")
    same(SAE.load_from_disk(pulled), made.partition.dictionary)
    same(ExemplarPartition.load_from_disk(pulled), made.partition.dictionary)
    assert ExemplarFitResult.load(pulled).n_seen == made.partition.n_seen
    assert DictionaryProfile.load(pulled).n_activations == made.profile.n_activations
    push_to_hub(pulled, REPO, "again")
    assert hub.repos[REPO].files["again/cfg.json"] == hub.repos[REPO].files["x/cfg.json"]
    assert pull_from_hub(REPO, "again", pulled) == pulled


def test_pulling_over_other_files_is_refused(hub, made, tmp_path):
    push_to_hub(made.snmf.dictionary, REPO, "x")
    made.profile.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("profile*")}
    with pytest.raises(
        FileExistsError, match=r"holds profile.json, profile.safetensors, which would not belong to 'x'"
    ):
        pull_from_hub(REPO, "x", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_the_card_lists_all_and_keeps_what_others_wrote(hub, made):
    hub.create(
        REPO,
        {
            "README.md": b"---\nlicense: apache-2.0\ntags:\n- mine\nmodel-index: [{name: m}]\n---\n\nMy words.\n",
            "old/cfg.json": b"{}",
            "old/sae_weights.safetensors": b"x",
        },
    )
    push_to_hub(made.partition, REPO, "a", base_model="lab/tiny")
    push_to_hub(made.snmf, REPO, "b", base_model="lab/other")
    hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["README.md"].data += b"\nMore words.\n"
    push_to_hub(made.standard, REPO, "a")
    front, body = card(hub)
    assert front == {
        "library_name": "saelens",
        "license": "apache-2.0",
        "model-index": [{"name": "m"}],
        "base_model": ["lab/tiny", "lab/other"],
        "tags": [
            "mine",
            "saelens",
            "saelens-ext",
            "mechanistic-interpretability",
            "sparse-dictionary",
            "exemplar-partition",
            "snmf",
            "sparse-autoencoder",
            "standard",
        ],
    }
    assert body.startswith("\nMy words.\n") and body.endswith("\nMore words.\n")
    assert re.findall(r"^\| (`.*?`) \| (.*?) \|", body, re.M)[:3] == [
        ("`a`", "SAELens standard"),
        ("`b`", "SNMFDictionary"),
        ("`old`", "SAELens SAE"),
    ]
    assert body.count("## `a`") == body.count("## `b`") == 1
    assert "Voronoi" not in body  # the section of the dictionary that was replaced
    assert {"a/cfg.json", "b/cfg.json", "old/cfg.json", "b/fit.json"} <= set(hub.repos[REPO].files)
    assert "a/fit.json" not in hub.repos[REPO].files  # statistics of the old one


def test_the_card_says_where_a_transcoder_writes(hub):
    metadata = SAEMetadata(hook_name="blocks.1.ln2.hook_in", hook_name_out="blocks.1.mlp.hook_out")
    options = {"d_in": 8, "d_out": 8, "d_sae": 4, "apply_b_dec_to_input": False, "metadata": metadata}
    push_to_hub(Transcoder(TranscoderConfig(**options)), REPO, "across")
    (row,) = [line for line in card(hub)[1].splitlines() if line.startswith("| `across`")]
    assert "`blocks.1.ln2.hook_in`, `blocks.1.mlp.hook_out`" in row


def test_the_card_says_how_it_was_built_and_how_good_it_is(hub, made):
    push_to_hub(made.partition, REPO, "a", profile=made.profile, metrics={"explained_variance": 0.123456})
    push_to_hub(made.snmf, REPO, "b")
    _, body = card(hub)
    for line in (
        "| explained_variance | 0.1235 |",
        f"| activations clustered | {made.partition.n_seen} |",
        "| hook_name | `blocks.1.hook_out` |",
        f"| squared error / sum of squares | {made.snmf.loss:.4g} |",
        "| percentile | 20 |",
        "| model_class_name | `SAETransformerBridge` |",
    ):
        assert line in body, line
    assert "pip install saelens-ext" in body and "Without `import saelens_ext`" in body


def test_metrics_are_read_by_the_hubs_own_reader(hub, made):
    theirs = {
        "name": "theirs",
        "results": [{"task": {"type": "t"}, "dataset": {"name": "d", "type": "d"}, "metrics": []}],
    }
    hub.create(REPO, {"README.md": f"---\nmodel-index: [{json.dumps(theirs)}]\n---\n".encode()})
    values = {"explained_variance": torch.tensor(0.5), "l0": 3, "note": "a word", "none": float("nan")}
    push_to_hub(made.partition, REPO, "a", metrics=values)
    push_to_hub(made.snmf, REPO, "b", metrics={"explained_variance": 0.25})

    def read() -> tuple:
        index = card(hub)[0]["model-index"]
        found = ModelCardData(**{"model-index": index[1:]})
        assert index[0] == theirs and found.model_name == "dictionaries"
        return sorted((r.metric_args["sae_id"], r.metric_type, r.metric_value) for r in found.eval_results)

    assert read() == [("a", "explained_variance", 0.5), ("a", "l0", 3), ("b", "explained_variance", 0.25)]
    push_to_hub(made.partition, REPO, "a", metrics={"l0": 4})
    assert read() == [("a", "l0", 4), ("b", "explained_variance", 0.25)]
    push_to_hub(made.snmf, REPO, "b")
    assert read() == [("a", "l0", 4)]


def test_evidence_beside_a_dictionary_goes_to_its_card_and_to_its_metrics(hub, made, tmp_path):
    folder = made.partition.save(tmp_path / "d")
    figures = {"evidence/novelty/news/EP_p1/auroc": 0.87, "evidence/novelty/code/EP_p1/auroc": None}
    verdict = "EP p1 is no better than as many random activations."
    evidence = {"novelty": {"title": "Novelty", "verdict": verdict, "figures": figures}}
    (folder / "evidence_results.json").write_text(json.dumps(evidence))
    push_to_hub(folder, REPO, "x", metrics={"l0": 3})
    front, body = card(hub)
    assert f"### Novelty\n\n{verdict}" in body and "evidence_results.json" in body
    results = ModelCardData(**{"model-index": front["model-index"]}).eval_results
    assert {r.metric_type: r.metric_value for r in results} == {"evidence/novelty/news/EP_p1/auroc": 0.87, "l0": 3}
    assert load_from_hub(REPO, "x").evidence == evidence


@pytest.mark.parametrize("revision", [None, "trial"])
@pytest.mark.parametrize("kind", ["partition", "hierarchy", "standard"])
def test_the_snippet_runs(hub, made, kind, revision):
    push_to_hub(getattr(made, kind), REPO, "blocks.1/x", revision=revision)
    branch = hub.repos[REPO].commits[hub.repos[REPO].branches[revision or "main"]]
    (snippet,) = re.findall(r"```python\n(.*?)```", branch["README.md"].data.decode(), re.S)
    names: dict = {}
    exec(snippet, names)
    assert names["found"].sae_id == "blocks.1/x"
    assert ("sae" in names) == (revision is None)


@pytest.mark.slow
def test_revisions(hub, made):
    first = push_to_hub(made.partition, REPO, "x")
    push_to_hub(made.standard, REPO, "x", revision="trial")
    second = push_to_hub(made.snmf, REPO, "x", commit_message="Better")
    hub.repos[REPO].tags["v1"] = first.oid
    assert hub.repos[REPO].messages[-1] == "Better"
    for revision, expected, commit in [
        (None, made.snmf.dictionary, second.oid),
        ("main", made.snmf.dictionary, second.oid),
        ("v1", made.partition.dictionary, first.oid),
        (first.oid, made.partition.dictionary, first.oid),
        ("trial", made.standard, hub.repos[REPO].branches["trial"]),
    ]:
        found = load_from_hub(REPO, "x", revision=revision)
        same(found.dictionary, expected)
        assert found.commit == commit
    with pytest.raises(ValueError, match="revision must be a branch"):
        push_to_hub(made.snmf, REPO, "x", revision=first.oid)


def test_the_same_again_makes_no_commit(hub, made):
    first = push_to_hub(made.snmf.dictionary, REPO, "x")
    assert push_to_hub(made.snmf.dictionary, REPO, "x").oid == first.oid
    assert len(hub.repos[REPO].commits) == 2


def test_two_people_pushing_at_once_lose_nothing(hub, made):
    push_to_hub(made.snmf.dictionary, REPO, "x")
    hub.faults.before_commit.append(lambda: push_to_hub(made.standard, REPO, "theirs"))
    push_to_hub(made.partition, REPO, "ours")
    _, body = card(hub)
    assert all(f"## `{name}`" in body for name in ("x", "theirs", "ours"))
    assert hub.repos[REPO].messages[-2:] == ["Push theirs", "Push ours"]


def test_the_token_stays_with_the_hub(hub, made):
    push_to_hub(made.partition, "lab/secret", "x", private=True)
    assert hub.repos["lab/secret"].private
    load_from_hub("lab/secret", "x", token=READER)
    cdn = [signed for _, host, _, signed in hub.requests if host == "localhost"]
    assert len(cdn) >= 4 and not any(cdn)
    assert any(signed for _, host, _, signed in hub.requests if host == "127.0.0.1")


def test_without_a_connection_the_cache_is_used(hub, made, monkeypatch):
    push_to_hub(made.partition, REPO, "a/b", profile=made.profile)
    commit = load_from_hub(REPO, "a/b").commit
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    found = load_from_hub(REPO, "a/b")
    same(found.dictionary, made.partition.dictionary)
    assert (found.commit, found.profile.n_activations) == (commit, made.profile.n_activations)


def test_the_listing_of_the_hub_agrees(hub, made):
    """The server's other listings say the same of a pushed file, so that it stands in for the Hub's."""
    push_to_hub(made.partition, REPO, "x")
    api = HfApi(endpoint=hub.url)
    (by_path,) = api.get_paths_info(REPO, ["x/sae_weights.safetensors"])
    (by_tree,) = (file for file in api.list_repo_tree(REPO, "x") if file.path.endswith("sae_weights.safetensors"))
    (by_info,) = (f for f in api.model_info(REPO, files_metadata=True).siblings if f.rfilename == by_path.path)
    assert by_path.lfs.sha256 == by_tree.lfs.sha256 == by_info.lfs.sha256 and by_path.blob_id == by_info.blob_id
    assert [branch.name for branch in api.list_repo_refs(REPO).branches] == ["main"]


def test_a_name_without_owner_is_in_the_tokens_account(hub, made):
    push_to_hub(made.standard, "mine", "x")
    push_to_hub(made.standard, "mine", "y")
    assert list(hub.repos) == ["lab/mine"]
    assert 'SAE.from_pretrained("lab/mine", "y")' in card(hub, "lab/mine")[1]
    with pytest.raises(ValueError, match="'lab/mine' exists and is public"):
        push_to_hub(made.standard, "mine", "x", private=True)
