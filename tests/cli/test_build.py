"""Building through the command: what it says, what it writes, and what Ctrl-C leaves."""

import json
import re
import signal

import pytest
import torch

from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.cli.main import main
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.runner import checkpoints
from tests.runner.runs import HOOK, assert_same_partition


def test_dictionaries_lie_in_folders_of_their_names(built):
    assert ExemplarFitResult.load(built["fine"]).n_regions > ExemplarFitResult.load(built["coarse"]).n_regions
    assert SNMFFitResult.load(built["snmf"]).n_components == 4
    for folder in built.values():
        assert {"cfg.json", "profile.json", "evals.json", "runner_cfg.json"} <= {path.name for path in folder.iterdir()}


def test_results_go_to_stdout_and_all_else_to_stderr(reading, command):
    arguments = [
        "exemplars",
        *reading,
        f"--hook_name={HOOK}",
        "--n_eval_batches=0",
        "--profile=false",
        "--output_path=none",
    ]
    people = command(*arguments)
    assert people.status == 0 and "Loading" in people.err and "Loading" not in people.out
    head, row, *rest = people.out.splitlines()
    assert head.split()[0] == "dictionary" and row.startswith(f"{HOOK}_exemplars_p10 ") and not rest
    machine = command(*arguments, "--json", "--quiet")
    assert machine.status == 0 and machine.err == ""
    (found,) = machine.data["dictionaries"]
    assert found["n_seen"] == 600 and str(found["d_sae"]) in row and found["path"] is None


def test_what_libraries_print_is_no_result(reading, command, monkeypatch):
    from saelens_ext.cli import opening

    open_model = opening.open_model

    def chatty(config):
        print("a banner")
        return open_model(config)

    monkeypatch.setattr(opening, "open_model", chatty)
    found = command(
        "exemplars",
        *reading,
        f"--hook_name={HOOK}",
        "--n_eval_batches=0",
        "--profile=false",
        "--output_path=none",
        "--json",
    )
    assert "a banner" in found.err and len(found.data["dictionaries"]) == 1


def test_ctrl_c_says_how_to_go_on_and_going_on_gives_the_same(reading, command, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = [
        "exemplars",
        *reading,
        f"--hook_name={HOOK}",
        "--n_eval_batches=0",
        "--profile=false",
        "--dictionary.calibration_activations=200",
    ]
    assert command(*arguments, f"--output_path={whole}").status == 0
    save = checkpoints.Checkpoint.save

    def save_and_interrupt(self, folder):
        path = save(self, folder)
        monkeypatch.setattr(checkpoints.Checkpoint, "save", save)
        signal.raise_signal(signal.SIGINT)
        return path

    monkeypatch.setattr(checkpoints.Checkpoint, "save", save_and_interrupt)
    kept = [f"--checkpoint_path={tmp_path / 'kept'}", "--n_checkpoints=3", f"--output_path={cut}"]
    found = command(*arguments, *kept)
    assert found.status == 130 and not list(cut.glob("*/cfg.json"))
    (resume,) = re.findall(r"The same command with (--resume_from_checkpoint=\S+) goes on", found.error)
    assert command(*arguments, *kept, resume).status == 0
    (one,), (other,) = whole.iterdir(), cut.iterdir()
    assert_same_partition(ExemplarFitResult.load(one), ExemplarFitResult.load(other))


def test_ctrl_c_after_the_pass_names_what_is_finished(reading, command, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("saelens_ext.runner.runner.profile_dictionaries", interrupted)
    found = command("exemplars", *reading, f"--hook_name={HOOK}", f"--output_path={tmp_path}", "--n_eval_batches=0")
    (folder,) = tmp_path.iterdir()
    assert found.status == 130 and f"Finished and saved: {folder}." in found.error
    assert ExemplarFitResult.load(folder).n_seen == 600


def test_another_checkpoint_is_refused_by_name(reading, command, tmp_path):
    arguments = [
        "exemplars",
        *reading,
        f"--hook_name={HOOK}",
        "--n_eval_batches=0",
        "--profile=false",
        "--output_path=none",
    ]
    kept = [f"--checkpoint_path={tmp_path}", "--n_checkpoints=1", "--logger.wandb_id=mine"]
    assert command(*arguments, *kept).status == 0
    found = command(*arguments, *kept, f"--resume_from_checkpoint={tmp_path / 'mine'}", "--dictionary.percentile=3")
    assert found.status == 1 and "dictionary.percentile was 10.0 and is 3" in found.error


def test_without_a_login_nothing_is_built(reading, command, monkeypatch):
    monkeypatch.setattr("saelens_ext.runner.tracking._logged_in", lambda: False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    found = command("exemplars", *reading, f"--hook_name={HOOK}", "--logger.log_to_wandb=true")
    assert found.status == 1 and "wandb is not logged in" in found.error and "Loading" not in found.err


def test_the_demo_model_has_a_name(reading, command, tmp_path, monkeypatch, tiny_bridge, tiny_texts):
    from datasets import Dataset

    monkeypatch.setattr("saelens_ext.cli.opening.load_demo_model", lambda device: tiny_bridge)
    monkeypatch.setattr("saelens_ext.cli.opening.load_demo_corpus", lambda: Dataset.from_dict({"text": tiny_texts}))
    named = ["--model_name=demo", "--dataset_path=demo", "--n_eval_batches=0", f"--output_path={tmp_path}"]
    assert command("exemplars", *reading, *named, f"--hook_name={HOOK}").status == 0
    (folder,) = tmp_path.iterdir()
    config = json.loads((folder / "runner_cfg.json").read_text())
    assert (config["model_name"], config["dataset_path"]) == ("demo", "demo")
    before = DictionaryProfile.load(folder)
    assert command("profile", folder, "--n_examples=3").status == 0  # by the same names, which its config has
    again = DictionaryProfile.load(folder)
    assert torch.equal(again.counts, before.counts) and again.top.values.shape[1] == 3


@pytest.mark.parametrize("kind", ["HookedTransformer", "AutoModelForCausalLM"])
def test_other_ways_of_loading(kind, reading, command, built):
    arguments = [
        "exemplars",
        *reading,
        f"--hook_name={HOOK}",
        "--n_eval_batches=1",
        "--profile=false",
        "--output_path=none",
        "--json",
    ]
    found = command(
        *arguments,
        f"--model_class_name={kind}",
        "--dictionary.percentile=5",
        "--dictionary.calibration_activations=200",
    )
    assert found.status == 0, found.err
    (one,) = found.data["dictionaries"]
    assert one["d_sae"] == ExemplarFitResult.load(built["fine"]).n_regions  # the same activations
    assert one["figures"]["metrics/explained_variance"] > 0


def test_main_leaves_the_process_as_it_was(command, built):
    import logging
    import sys
    import warnings

    before = (
        list(logging.getLogger().handlers),
        logging.getLogger("saelens_ext").level,
        warnings.showwarning,
        sys.stdout,
        torch.is_grad_enabled(),
    )
    command("match", built["fine"], built["coarse"])
    command("match", "a", "b")
    assert (list(logging.getLogger().handlers), logging.getLogger("saelens_ext").level, warnings.showwarning) == before[
        :3
    ]
    assert (sys.stdout, torch.is_grad_enabled()) == before[3:]
    assert main(["--help"]) == 0
