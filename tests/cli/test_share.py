"""Sharing dictionaries through the command, with a Hub on the loopback interface."""

import pytest
from sae_lens import SAE

from saelens_ext.published.dictionary import PublishedDictionary
from tests.hub.conftest import hub, running_hub  # noqa: F401  fixtures
from tests.published import foreign

# The client's own upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

REPO = "lab/dictionaries"


@pytest.fixture
def pushed(hub, built, command):  # noqa: F811
    found = command("push", built["fine"], REPO, "blocks.1/p5", "--license=mit", "--message=The first", "--json")
    assert found.status == 0, found.err
    return found.data


def test_push_and_pull(pushed, hub, built, command, tmp_path):  # noqa: F811
    assert pushed["url"].endswith(pushed["commit"]) and hub.repos[REPO].messages[-1] == "The first"
    assert "license: mit" in hub.repos[REPO].files["README.md"].decode()
    found = command("pull", REPO, "blocks.1/p5", tmp_path / "here", "--json")
    assert found.status == 0, found.err
    assert {"cfg.json", "sae_weights.safetensors", "fit.json", "profile.json", "runner_cfg.json"} <= set(
        found.data["files"]
    )
    ours, theirs = SAE.load_from_disk(built["fine"]), SAE.load_from_disk(tmp_path / "here")
    assert ours.W_dec.equal(theirs.W_dec)
    people = command("pull", REPO, "blocks.1/p5", tmp_path / "there")
    assert people.out.startswith(f"Pulled into {tmp_path / 'there'}: ")


def test_list_what_a_repository_holds(pushed, hub, built, command):  # noqa: F811
    assert command("push", built["snmf"], REPO, "neurons", "--license=mit").status == 0
    found = command("list", REPO, "--json")
    assert found.status == 0, found.err
    partition, snmf = found.data["dictionaries"]
    ours = SAE.load_from_disk(built["fine"])
    assert (partition["sae_id"], snmf["sae_id"]) == ("blocks.1/p5", "neurons")
    assert (partition["architecture"], snmf["architecture"]) == ("exemplar_partition", "snmf")
    assert partition["d_sae"] == ours.cfg.d_sae and partition["hook_name"] == ours.cfg.metadata.hook_name
    assert partition["percentile"] == 5 and snmf["percentile"] is None
    people = command("list", REPO)
    assert people.out.splitlines()[0].split()[:2] == ["sae_id", "architecture"] and len(people.out.splitlines()) == 3
    assert "There is no model repository" in command("list", "lab/nothing").error


def test_a_dictionary_of_the_hub_has_a_name(pushed, built, command):
    found = command("match", built["fine"], f"{REPO}:blocks.1/p5", "--json")
    assert found.status == 0 and found.data["first"]["share_mutual"] == 1


def test_what_is_not_there(pushed, hub, built, command, tmp_path):  # noqa: F811
    for arguments, message in [
        (("pull", REPO, "blocks.2/p5", tmp_path / "o"), "blocks.1/p5"),
        (("pull", "lab/nothing", "x", tmp_path / "o"), "There is no model repository 'lab/nothing'"),
        (("pull", REPO, "blocks.1/p5", tmp_path / "o", "--revision=nope"), "has no such revision"),
        (("push", built["fine"], REPO, "x", "--private"), "public"),
        (("push", built["fine"], REPO, "x", f"--report={tmp_path / 'none.html'}"), "There is no report"),
    ]:
        found = command(*arguments)
        assert found.status == 1 and message in found.error
    assert not (tmp_path / "o").exists()


def test_without_a_connection(built, command, tmp_path, monkeypatch, hub):  # noqa: F811
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    found = command("push", built["fine"], REPO, "x")
    assert (
        found.status == 1
        and "The connection to http://127.0.0.1:9 failed" in found.error
        and "Nothing was published" in found.error
    )
    assert "127.0.0.1:9 " in command("pull", REPO, "x", tmp_path / "o").error


def test_convert(command, tmp_path):
    source = tmp_path / "gemma-2-2b_L12_p10"
    source.mkdir()
    path = foreign.write(source, foreign.pickled(*foreign.make_state()))
    found = command("convert", path, tmp_path / "mine", "--json")
    assert found.status == 0, found.err
    assert (found.data["n_regions"], found.data["hook_name"], found.data["percentile"]) == (
        12,
        "blocks.12.hook_resid_post",
        10,
    )
    assert PublishedDictionary.load(tmp_path / "mine").n_regions == 12
    assert SAE.load_from_disk(tmp_path / "mine").cfg.d_sae == 12
    people = command(
        "convert", path, tmp_path / "other", "--hook_name=blocks.3.hook_out", "--model_name=mine", "--percentile=5"
    )
    assert people.out.startswith("12 regions of blocks.3.hook_out of mine at threshold 0.3")
    refused = command("convert", path, tmp_path / "none", f"--sha256={'0' * 64}")
    assert refused.status == 1 and "has SHA-256" in refused.error and not (tmp_path / "none").exists()


def test_the_demo(command, tmp_path, monkeypatch):
    def run_demo(output, max_tokens, say):
        say("Building")
        print("a banner")
        return output / f"{max_tokens}.html", output / "audit.html"

    monkeypatch.setattr("saelens_ext.cli.share.run_demo", run_demo)
    found = command("demo", f"--output_path={tmp_path}", "--max-tokens=7", "--json")
    assert found.data["report"] == str(tmp_path / "7.html")
    assert found.data["audit_report"] == str(tmp_path / "audit.html")
    assert "saelens-ext: 0 s: Building" in found.err and "a banner" in found.err
    people = command("demo", f"--output_path={tmp_path}", "--max-tokens=7", "--quiet")
    assert people.status == 0 and [line.rpartition(": ")[2] for line in people.out.splitlines()] == [
        str(tmp_path / "7.html"),
        str(tmp_path / "audit.html"),
    ]
