"""The sweeps of the repository: every point is a command line that the command understands, and one of each really
runs.
"""

import itertools
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from saelens_ext.cli.commands import COMMANDS
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.parser import parse
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.runner import ExemplarRunnerConfig, SNMFRunnerConfig
from tests.cli.conftest import logged_run
from tests.runner.runs import HOOK, NEURONS

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))


def points(sweep: dict) -> list[dict]:
    """The values that a grid search gives, point by point, as wandb hands them to its agents."""
    names = list(sweep["parameters"])
    values = [one.get("values", [one.get("value")]) for one in sweep["parameters"].values()]
    return [{name: {"value": value} for name, value in zip(names, chosen)} for chosen in itertools.product(*values)]


def command_line(sweep: dict, point: dict) -> list[str]:
    """What ``wandb agent`` would run at a point, by wandb's own functions."""
    macros = create_sweep_command_args({"args": point}) | {
        "program": [sweep["program"]],
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
    }
    words = []
    for chunk in create_sweep_command(list(sweep["command"])):
        words += macros[chunk[2:-1]] if chunk.startswith("${") else [chunk]
    assert words[:2] == ["/usr/bin/env", "saelens-ext"]
    return words[2:]


def test_there_is_one_for_each_method():
    commands = [yaml.safe_load(path.read_text())["command"] for path in SWEEPS]
    assert {next(word for word in words if word in COMMANDS) for words in commands} == {"exemplars", "snmf", "audit"}


@pytest.mark.parametrize("path", SWEEPS, ids=[path.stem for path in SWEEPS])
def test_every_point_is_understood(path):
    sweep = yaml.safe_load(path.read_text())
    assert sweep["method"] == "grid"
    given = points(sweep)
    swept = {name for name, one in sweep["parameters"].items() if "values" in one}
    assert len(given) > 3 and swept
    for point in given:
        name, *arguments = command_line(sweep, point)
        options, _ = parse(COMMANDS[name], arguments)
        logger = next(one.logger for one in options if hasattr(one, "logger"))
        assert logger.log_to_wandb and logger.wandb_project == "saelens_ext" == sweep["project"]
        for parameter in swept:
            assert taken(options, parameter) == point[parameter]["value"], parameter


def taken(options: list, parameter: str):
    """The value that an option object has for a swept parameter."""
    *parents, name = parameter.split(".")
    found = next(one for one in options if hasattr(one, parameter.split(".")[0]))
    for parent in parents:
        found = getattr(found, parent)
    value = getattr(found, name)
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=[path.stem for path in SWEEPS])
def test_a_point_runs(path, offline, command, place, reading, built):
    sweep = yaml.safe_load(path.read_text())
    point = points(sweep)[-1]
    name, *arguments = command_line(sweep, point)
    # The same line with a tiny model: of an option that is given twice the last holds.
    tiny = {
        "exemplars": [
            *reading,
            f"--hook_name={HOOK}",
            "--n_eval_batches=1",
            "--dictionary.calibration_activations=200",
        ],
        "snmf": [
            *reading,
            f"--hook_name={NEURONS}",
            "--n_eval_batches=1",
            "--dictionary.n_components=4",
            "--dictionary.sparsity=0.2",
            "--dictionary.held_out=0.3",
        ],
        "audit": [
            f"--model_name={place / 'model'}",
            f"--dictionaries={built['fine']}",
            "--n=16",
            "--max_new_tokens=4",
            "--n_clusters=1,24",
            "--min_cluster_size=1",
            "--n_resamples=2",
        ],
    }[name]
    found = command(name, *arguments, *tiny, f"--output_path={offline / 'out'}", "--json")
    assert found.status == 0, found.err
    run = logged_run(offline)
    assert (run.run_id, run.project, run.exit_code) == ("point1", "of_the_sweep", 0)
    if name == "audit":
        (one,) = found.data["prefixes"]
        assert (one["beta"], one["gamma"]) == tuple(point[key]["value"] for key in ("betas", "gammas"))
        for key in ("objective", "rate"):
            assert run.logged(f"metrics/{key}") == [pytest.approx(one[key])]
    else:
        (one,) = found.data["dictionaries"]
        assert run.logged(sweep["metric"]["name"])[-1] == pytest.approx(one["figures"][sweep["metric"]["name"]])


@pytest.mark.parametrize(
    ("command", "name", "read"),
    [
        ("exemplars", "eval_batch_size_prompts", lambda config: config.eval_batch_size_prompts),
        ("exemplars", "dictionary.threshold", lambda config: config.dictionary.threshold),
        ("exemplars", "dictionary.calibration_activations", lambda config: config.dictionary.calibration_activations),
        ("exemplars", "logger.wandb_entity", lambda config: config.logger.wandb_entity),
        ("snmf", "dictionary.seed", lambda config: config.dictionary.seed),
        ("snmf", "checkpoint_path", lambda config: config.checkpoint_path),
        ("audit", "min_cluster_size", None),
        ("audit", "embedder", lambda inputs: inputs.embedder),
        ("match", "n_null", lambda options: options.n_null),
        ("report", "title", lambda options: options.title),
    ],
)
@pytest.mark.parametrize("word", ["None", "null", "none"])
def test_what_an_agent_writes_for_none(command, name, read, word):
    places = {"match": ["a", "b"], "report": ["a"], "audit": []}.get(command, ["--hook_name=a"])
    options, _ = parse(COMMANDS[command], [*places, f"--{name}={word}"])
    assert (options[1].min_cluster_size if read is None else read(options[0])) is None


def test_a_text_that_is_missing_is_no_name():
    options, _ = parse(COMMANDS["exemplars"], ["--hook_name=a", "--model_name=None", "--dataset_path=null"])
    assert options[0].model_name == options[0].dataset_path == ""
    with pytest.raises(ValueError, match="hook_name must name at least one hook"):
        parse(COMMANDS["snmf"], ["--hook_name=null"])
    with pytest.raises(UsageError, match="--training_tokens: takes a whole number, got 'None'"):
        parse(COMMANDS["exemplars"], ["--hook_name=a", "--training_tokens=None"])


def test_the_configs_are_those_of_the_package():
    assert COMMANDS["exemplars"].option_classes() == [ExemplarRunnerConfig]
    assert COMMANDS["snmf"].option_classes() == [SNMFRunnerConfig]
    (_, settings), _ = parse(COMMANDS["audit"], [])
    assert isinstance(settings, AuditConfig) and AuditConfig(**vars(settings)) == AuditConfig()
