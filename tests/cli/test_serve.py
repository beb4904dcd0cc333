"""``serve``: what it opens, and what it refuses before it has loaded anything."""

import shutil
import urllib.request
from threading import Thread
from time import sleep

import pytest
import uvicorn

from saelens_ext.serve.server import address_of, listen
from tests import models_zoo
from tests.continuations._dictionaries import make


@pytest.fixture
def served(monkeypatch):
    """Ends every server as soon as its page has been fetched, and gives the pages."""
    pages = []
    run = uvicorn.Server.run

    def run_once(self, sockets=None):
        def fetch():
            while not self.started:
                sleep(0.01)
            with urllib.request.urlopen(address_of(sockets[0])) as answer:
                pages.append(answer.read().decode())
            self.should_exit = True

        thread = Thread(target=fetch)
        thread.start()
        run(self, sockets)
        thread.join()

    monkeypatch.setattr(uvicorn.Server, "run", run_once)
    return pages


@pytest.mark.slow
def test_dictionaries_are_served_with_the_model_that_they_were_built_on(command, built, served):
    folders = [built["fine"], built["snmf"]]
    outcome = command("serve", *folders, "--port=0")
    assert outcome.status == 0 and "was closed" in outcome.out and "http://127.0.0.1:" in outcome.err
    (page,) = served
    assert all(f'"name":"{folder.name}"' in page for folder in folders)
    assert "no profile" not in outcome.err


def test_a_dictionary_without_a_profile_is_served_all_the_same(command, built, place, served, tmp_path):
    copy = shutil.copytree(built["fine"], tmp_path / "bare")
    for file in [*copy.glob("profile*"), *copy.glob("labels*")]:
        file.unlink()
    outcome = command("serve", copy, f"--model_name={place / 'model'}", "--port=0")
    assert outcome.status == 0 and "has no profile, so no examples and no labels" in outcome.err
    assert len(served) == 1


def test_a_port_in_use_is_said_before_anything_is_loaded(command, tmp_path):
    with listen(port=0) as taken:
        outcome = command("serve", tmp_path / "nowhere", f"--port={taken.getsockname()[1]}")
    assert "is in use: give another, --port=" in outcome.error


def test_a_folder_or_model_that_does_not_fit_is_refused(command, built, place, tmp_path):
    assert "There is no folder" in command("serve", tmp_path / "nowhere", "--port=0").error
    wide = tmp_path / "wide"
    make("standard", "blocks.1.hook_out", 2 * models_zoo.D_MODEL).save_model(wide)
    model = f"--model_name={place / 'model'}"
    assert "width" in command("serve", wide, model, "--port=0").error
    elsewhere = tmp_path / "elsewhere"
    make("standard", "blocks.77.hook_out").save_model(elsewhere)
    assert "blocks.77" in command("serve", elsewhere, model, "--port=0").error
    assert "FOLDER" in command("serve", "--port=0").error
