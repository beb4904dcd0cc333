"""A user's own process, with the Hub named in its environment: first without the package imported, then with it."""

import os
import subprocess
import sys

import pytest
from huggingface_hub import constants

from saelens_ext.hub import push_to_hub
from tests.hub.server import TOKEN

# The client's own upload of large files.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning"),
]

SCRIPT = """
import sys
from sae_lens import SAE

saved, repo = sys.argv[1:]
for load in (lambda: SAE.load_from_disk(saved), lambda: SAE.from_pretrained(repo, "x")):
    try:
        load()
    except KeyError as error:
        print(error)
assert "saelens_ext" not in sys.modules

import saelens_ext
from saelens_ext.hub import load_from_hub, push_to_hub

print(type(SAE.load_from_disk(saved)).__name__, type(SAE.from_pretrained(repo, "x")).__name__)
push_to_hub(saved, repo, "y", metrics={"l0": 1.0})
found = load_from_hub(repo, "y")
print(found.fit.n_regions, found.dictionary.cfg.d_sae, found.commit)
"""


def test_without_and_with_the_import(hub, made, tmp_path):
    repo = "lab/dictionaries"
    made.partition.save(tmp_path / "saved")
    push_to_hub(made.partition, repo, "x")
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), repo], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    message = "'exemplar_partition (pip install saelens-ext, import saelens_ext)'"
    k, commit = made.partition.n_regions, hub.repos[repo].branches["main"]
    assert done.stdout.splitlines() == [message, message, "ExemplarPartition ExemplarPartition", f"{k} {k} {commit}"]
    assert (tmp_path / "home" / "hub").is_dir() and not os.path.exists(constants.HF_HUB_CACHE)
    assert "## `x`" in hub.repos[repo].files["README.md"].decode() and b"## `y`" in hub.repos[repo].files["README.md"]
