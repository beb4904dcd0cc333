"""The sweeps that ship: their parameters are fields of the configs, and what an agent would call is read as meant."""

from pathlib import Path

import pytest
import yaml

from saelens_ext.runner import ExemplarRunnerConfig, SNMFRunnerConfig
from tests.runner.test_config import parse

SWEEPS = Path(__file__).parents[2] / "sweeps"
COMMANDS = {"exemplar_percentiles": ("exemplars", ExemplarRunnerConfig), "snmf_ranks": ("snmf", SNMFRunnerConfig)}


def read(name: str) -> dict:
    return yaml.safe_load((SWEEPS / f"{name}.yaml").read_text())


def calls(parameters: dict):
    """The arguments of the first and the last run, as ``${args}`` gives them."""
    for index in (0, -1):
        yield [
            f"--{name}={entry['values'][index] if 'values' in entry else entry['value']}"
            for name, entry in parameters.items()
        ]


def test_every_sweep_is_tested():
    assert {path.stem for path in SWEEPS.iterdir()} == {*COMMANDS, "clusterer_weights"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_sweep_of_dictionaries(name):
    sweep, (command, kind) = read(name), COMMANDS[name]
    assert sweep["command"] == ["${env}", "saelens-ext", command, "${args}"] and sweep["program"] == "saelens-ext"
    for arguments, index in zip(calls(sweep["parameters"]), (0, -1)):
        config = parse(kind, *arguments)
        assert config.logger.log_to_wandb and len(config.dictionary_names()[0][2]) == 1, "one dictionary, so one run"
        for parameter, entry in sweep["parameters"].items():
            value = config
            for part in parameter.split("."):
                value = getattr(value, part)
            assert value == (entry["values"][index] if "values" in entry else entry["value"]), parameter


def test_the_metric_of_a_sweep_is_logged():
    assert read("exemplar_percentiles")["metric"]["name"] == "metrics/explained_variance"
    assert read("snmf_ranks")["metric"]["name"] == "metrics/held_out_relative_squared_error"
    assert read("snmf_ranks")["parameters"]["dictionary.held_out"]["value"] > 0
