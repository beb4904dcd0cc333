"""What a user reads when something is wrong with a repository, the token, the connection or the disk, and that nothing
is lost.
"""

import errno
import json

import pytest
import torch
from huggingface_hub import constants
from sae_lens import SAE

from saelens_ext import DictionaryProfile
from saelens_ext.hub import load_from_hub, pull_from_hub, push_to_hub
from tests.hub.server import READER

# The client's own upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

REPO = "lab/dictionaries"


@pytest.fixture
def pushed(hub, made):
    push_to_hub(made.partition, REPO, "a/b", profile=made.profile)
    hub.requests.clear()
    return hub


def edit_config(hub, **changes) -> None:
    """Change cfg.json in the repository itself."""
    blob = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["a/b/cfg.json"]
    blob.data = json.dumps(json.loads(blob.data) | changes).encode()


# --- not there ---


def test_no_such_repository_revision_or_dictionary(pushed):
    with pytest.raises(
        FileNotFoundError,
        match=r"no model repository 'lab/other', or it is private and this token may not see it. Sign in with `hf",
    ):
        load_from_hub("lab/other", "a/b")
    with pytest.raises(FileNotFoundError, match=r"'lab/dictionaries' has no such revision"):
        load_from_hub(REPO, "a/b", revision="v9")
    with pytest.raises(FileNotFoundError, match=r"'lab/dictionaries' holds no dictionary 'a'. It holds 'a/b'\."):
        load_from_hub(REPO, "a")


def test_a_repository_without_our_files(hub):
    hub.create("lab/model", {"config.json": b"{}", "model.safetensors": b"x", "layer_3/params.npz": b"x"})
    with pytest.raises(
        FileNotFoundError,
        match=r"no dictionary in SAELens' format, .* it holds config.json, layer_3/params.npz, model.safetensors",
    ):
        load_from_hub("lab/model", "layer_3")
    hub.create("lab/half", {"x/cfg.json": b"{}"})
    with pytest.raises(FileNotFoundError, match="no dictionary in SAELens' format"):
        load_from_hub("lab/half", "x")


@pytest.mark.parametrize("sae_id", ["", "/a", "a/", "../a", "a/../b", ".git", "a b", "a\\b", "a[0]"])
def test_names_that_are_none(hub, made, sae_id):
    with pytest.raises(ValueError, match="sae_id must be the path of a folder"):
        push_to_hub(made.snmf, REPO, sae_id)
    with pytest.raises(ValueError, match="repo_id must be 'name' or 'owner/name'"):
        load_from_hub("lab/a/b", "x")
    assert not hub.requests


# --- not allowed ---


def test_a_private_repository_without_a_token(hub, made, monkeypatch):
    push_to_hub(made.snmf, "lab/secret", "x", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="'lab/secret', or it is private"):
        load_from_hub("lab/secret", "x")
    with pytest.raises(FileNotFoundError, match="'lab/secret', or it is private"):
        load_from_hub("lab/secret", "x", token="hf_wrong")
    assert load_from_hub("lab/secret", "x", token=READER).fit is not None


def test_a_gated_repository(hub):
    hub.create("lab/gated", gated=True)
    with pytest.raises(PermissionError, match=r"'lab/gated' is gated: ask for access on http.*/lab/gated"):
        load_from_hub("lab/gated", "x", token=READER)


def test_no_right_to_write(pushed, made):
    before = dict(pushed.repos[REPO].files)
    with pytest.raises(
        PermissionError,
        match=r"This token may not write 'lab/dictionaries': .*You don't have the rights to write here.* Sign in",
    ):
        push_to_hub(made.snmf, REPO, "c", token=READER)
    with pytest.raises(PermissionError, match="This token may not write 'others/new': .*under this namespace"):
        push_to_hub(made.snmf, "others/new", "c")
    assert pushed.repos[REPO].files == before and list(pushed.repos) == [REPO]


def test_private_is_no_promise_about_a_public_repository(pushed, made):
    with pytest.raises(ValueError, match="'lab/dictionaries' exists and is public"):
        push_to_hub(made.snmf, REPO, "c", private=True)
    assert len(pushed.repos[REPO].messages) == 2


# --- not what it should be ---


def test_an_architecture_that_is_not_known(pushed):
    edit_config(pushed, architecture="exemplar_partitions")
    with pytest.raises(
        ValueError,
        match=r"architecture 'exemplar_partitions', which is not registered .* Did you mean 'exemplar_partition'",
    ) as caught:
        load_from_hub(REPO, "a/b")
    assert "import saelens_ext)" not in str(caught.value)  # each architecture is named once


def test_a_newer_format(pushed):
    edit_config(pushed, format_version=7)
    with pytest.raises(
        ValueError, match=r"format_version 7, this saelens-ext reads up to 1: upgrade with `pip install -U saelens-ext`"
    ):
        load_from_hub(REPO, "a/b")


def test_weights_that_are_cut_off_in_the_repository(pushed):
    blob = pushed.repos[REPO].commits[pushed.repos[REPO].branches["main"]]["a/b/sae_weights.safetensors"]
    blob.data = blob.data[:-8]
    with pytest.raises(ValueError, match="sae_weights.safetensors is not a whole safetensors file"):
        load_from_hub(REPO, "a/b")


def test_a_file_damaged_on_the_way_is_fetched_again(pushed, made):
    pushed.faults.corrupt_downloads = 1
    found = load_from_hub(REPO, "a/b")
    assert torch.equal(found.dictionary.W_dec, made.partition.dictionary.W_dec)


def test_a_file_that_stays_damaged_is_refused_and_not_kept_as_good(pushed, tmp_path):
    pushed.faults.corrupt_downloads = 99
    with pytest.raises(
        ValueError, match=r"has the checksum [0-9a-f]{64}, the Hub says [0-9a-f]{64}: it was damaged on the way"
    ):
        load_from_hub(REPO, "a/b")
    with pytest.raises(ValueError, match="has the checksum"):
        pull_from_hub(REPO, "a/b", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    pushed.faults.corrupt_downloads = 0
    assert load_from_hub(REPO, "a/b").fit is not None


def test_a_file_damaged_in_the_cache_is_fetched_again(pushed, made):
    weights = load_from_hub(REPO, "a/b").path / "sae_weights.safetensors"
    data = weights.read_bytes()
    weights.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert torch.equal(load_from_hub(REPO, "a/b").dictionary.exemplars, made.partition.dictionary.exemplars)
    assert weights.read_bytes() == data


def test_a_profile_of_another_dictionary_is_not_pushed(hub, made):
    with pytest.raises(ValueError, match="they do not belong together"):
        push_to_hub(made.snmf, REPO, "x", profile=made.profile)
    with pytest.raises(ValueError, match="push its level by itself"):
        push_to_hub(made.hierarchy, REPO, "x", profile=made.profile)
    assert not hub.repos


def test_files_to_push_that_are_not_there_or_not_whole(hub, made, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"There is no directory .*nowhere; give the one a dictionary was saved into"
    ):
        push_to_hub(tmp_path / "nowhere", REPO, "x")
    with pytest.raises(
        FileNotFoundError, match="holds no SAELens dictionary: it lacks cfg.json and sae_weights.safetensors"
    ):
        push_to_hub(tmp_path, REPO, "x")
    with pytest.raises(FileNotFoundError, match="There is no report"):
        push_to_hub(made.snmf, REPO, "x", report=tmp_path / "r.html")
    with pytest.raises(ValueError, match="runner_config must hold texts, finite numbers"):
        push_to_hub(made.snmf, REPO, "x", runner_config={"seed": object()})
    made.snmf.save(tmp_path / "d")
    weights = tmp_path / "d" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        push_to_hub(tmp_path / "d", REPO, "x")
    assert not hub.repos


def test_a_card_that_cannot_be_read_is_left_alone(hub, made):
    hub.create(REPO, {"README.md": b"---\ntags: [a\n---\nwords"})
    with pytest.raises(
        ValueError, match=r"front matter of the repository's README.md is not readable .* Correct it on the Hub"
    ):
        push_to_hub(made.snmf, REPO, "x")
    assert list(hub.repos[REPO].files) == ["README.md"]


# --- broken off ---


def test_a_download_cut_off_half_way_is_resumed(pushed, made):
    pushed.faults.cut_downloads = 2
    assert torch.equal(load_from_hub(REPO, "a/b").profile.counts, made.profile.counts)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_download_that_never_arrives_leaves_a_usable_cache(pushed, made):
    pushed.faults.fail = {"/lfs/": 503}
    with pytest.raises(OSError, match=r"answered 503 when asked to read 'lab/dictionaries'.* load again"):
        load_from_hub(REPO, "a/b")
    with pytest.raises(OSError, match="503|not found"):
        SAE.from_pretrained(REPO, "a/b")
    pushed.faults.fail = {}
    found = load_from_hub(REPO, "a/b")
    assert torch.equal(found.dictionary.W_dec, made.partition.dictionary.W_dec)


def test_the_hub_is_not_reached(hub, made, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ConnectionError, match=r"The connection to http://127.0.0.1:9 failed .*Connection refused.* load again"
    ):
        load_from_hub(REPO, "x")
    with pytest.raises(ConnectionError, match=r"The connection to .* failed .* Nothing was published"):
        push_to_hub(made.snmf, REPO, "x")


@pytest.mark.parametrize("fault", ["upload", "commit"])
def test_a_push_cut_off_publishes_nothing_and_can_be_repeated(pushed, made, fault):
    before = dict(pushed.repos[REPO].files)
    if fault == "upload":
        pushed.faults.cut_uploads = 99
    else:
        pushed.faults.before_commit.append(lambda: (_ for _ in ()).throw(ConnectionError("cut")))
    with pytest.raises(
        ConnectionError, match=r"The connection to .* failed .* Nothing was published: the repository is as before"
    ):
        push_to_hub(made.snmf, REPO, "c")
    assert pushed.repos[REPO].files == before
    pushed.faults.cut_uploads = 0
    push_to_hub(made.snmf, REPO, "c")
    assert load_from_hub(REPO, "c").fit.loss == made.snmf.loss


def test_an_upload_cut_off_once_is_repeated_by_the_client(pushed, made):
    pushed.faults.cut_uploads = 1
    push_to_hub(made.snmf, REPO, "c")


def test_a_server_error_names_it(pushed, made):
    pushed.faults.fail = {"/preupload/": 500}
    with pytest.raises(
        OSError,
        match=r"answered 500 when asked to write 'lab/dictionaries': The server says no\. Nothing was published",
    ):
        push_to_hub(made.snmf, REPO, "c")


# --- the disk ---


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_disk_space(pushed, made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", full)
        with pytest.raises(
            OSError, match=r"The disk is full \(the cache, .*\): 'lab/dictionaries' was not loaded. .* set HF_HUB_CACHE"
        ) as caught:
            load_from_hub(REPO, "a/b")
        assert caught.value.errno == errno.ENOSPC
    with monkeypatch.context() as patch:
        patch.setattr("saelens_ext._files.save_file", full)
        with pytest.raises(OSError, match="was not pushed. Free some space, or set TMPDIR"):
            push_to_hub(made.snmf, REPO, "c")
    (tmp_path / "pulled").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            pull_from_hub(REPO, "a/b", tmp_path / "pulled")
    assert not list((tmp_path / "pulled").iterdir())
    assert DictionaryProfile.load(pull_from_hub(REPO, "a/b", tmp_path / "pulled")).d_sae == made.profile.d_sae


def test_a_cache_that_may_not_be_written(pushed, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "cache"))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", refuse)
    with pytest.raises(
        PermissionError,
        match=r"cache may not be written: Permission denied. Change its permissions, or set HF_HUB_CACHE",
    ):
        load_from_hub(REPO, "a/b")
    assert not list(tmp_path.glob("cache/**/*.safetensors"))
