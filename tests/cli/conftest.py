"""A tiny model in a folder, a text in a file, and dictionaries that the command built from them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import wandb

from saelens_ext.cli.main import main
from tests import models_zoo
from tests.runner.runs import HOOK, NEURONS, TEXTS
from tests.wandb_files import WandbRun, read_run


@dataclass
class Outcome:
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def data(self):
        """The one JSON object on stdout; NaN and Infinity, which Python would read, are no JSON."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def error(self) -> str:
        """The one line of an error, which is the last on stderr; stdout is empty."""
        assert self.status != 0 and self.out == "" and "Traceback" not in self.err
        return self.err.rstrip("\n").splitlines()[-1]


@pytest.fixture
def command(capsys):
    """Run the command in this process, and give what it printed."""

    def run(*arguments) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    return run


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Folder with a model, ``model``, and a text, ``text.jsonl``."""
    folder = tmp_path_factory.mktemp("place")
    models_zoo.make_hf_model("llama").save_pretrained(folder / "model")
    models_zoo.make_tokenizer().save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.fixture(scope="session")
def reading(place) -> list[str]:
    """What a build reads."""
    return [
        f"--model_name={place / 'model'}",
        f"--dataset_path={place / 'text.jsonl'}",
        "--context_size=16",
        "--training_tokens=600",
        "--store_batch_size_prompts=4",
        "--checkpoint_path=none",
    ]


@pytest.fixture(scope="session")
def built(place, reading) -> dict[str, Path]:
    """Folders of two partitions and of a factorisation."""
    more = ["--n_eval_batches=1", f"--output_path={place / 'built'}", "--quiet"]
    partitions = ["--dictionary.percentile=5,20", "--dictionary.calibration_activations=200"]
    assert main(["exemplars", *reading, *more, f"--hook_name={HOOK}", *partitions]) == 0
    assert (
        main(
            [
                "snmf",
                *reading,
                *more,
                f"--hook_name={NEURONS}",
                "--dictionary.n_components=4",
                "--dictionary.sparsity=0.2",
            ]
        )
        == 0
    )
    names = {"fine": f"{HOOK}_exemplars_p5", "coarse": f"{HOOK}_exemplars_p20", "snmf": f"{NEURONS}_snmf_k4_s0.2"}
    return {key: place / "built" / name for key, name in names.items()}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """wandb as a child of its agent finds it, but offline; its files are below the folder."""
    settings = {
        "MODE": "offline",
        "DIR": tmp_path,
        "SILENT": "true",
        "SWEEP_ID": "swept",
        "RUN_ID": "point1",
        "PROJECT": "of_the_sweep",
        "CONFIG_DIR": tmp_path / "config",
        "CACHE_DIR": tmp_path / "cache",
        "DATA_DIR": tmp_path / "data",
        "DISABLE_GIT": "true",
        "DISABLE_CODE": "true",
        "CONSOLE": "off",
        "X_DISABLE_STATS": "true",
        "X_DISABLE_META": "true",
        "X_SAVE_REQUIREMENTS": "false",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    wandb.teardown()  # it keeps the settings of its first use
    yield tmp_path
    wandb.teardown()


def logged_run(folder: Path) -> WandbRun:
    """The one run that was logged below a folder."""
    wandb.teardown()  # its service may still be writing
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    return read_run(log)
