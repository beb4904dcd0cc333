"""Options from a file are checked as those of the command line, which override them."""

import pytest

from saelens_ext.cli.commands import COMMANDS
from saelens_ext.cli.parser import parse

RUN = """
hook_name: [blocks.1.hook_out, blocks.2.hook_out]
training_tokens: 600
checkpoint_path: null
model_from_pretrained_kwargs: {dtype: bfloat16}
dictionary:
  percentile: [1, 2.5]
logger:
  log_to_wandb: false
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("spelling", ["--config={}", "--config {}"])
def test_a_file_says_what_the_command_line_would(run, spelling):
    given = spelling.format(run).split(" ")
    (config,), _ = parse(COMMANDS["exemplars"], [*given, "--training-tokens=700", "--dictionary.seed=5"])
    words = ["--hook_name=blocks.1.hook_out,blocks.2.hook_out", "--training_tokens=700", "--checkpoint_path=none"]
    words += ["--dictionary.percentile=1,2.5", "--logger.log_to_wandb=false", "--dictionary.seed=5"]
    (expected,), _ = parse(COMMANDS["exemplars"], [*words, '--model_from_pretrained_kwargs={"dtype": "bfloat16"}'])
    assert config.to_dict() == expected.to_dict()


def test_an_audit_takes_one_too(tmp_path):
    (tmp_path / "a.yaml").write_text("prefix: I think that\ndictionaries: [x, y]\nbetas: [0.5, 1]\n")
    (inputs, settings), _ = parse(COMMANDS["audit"], [f"--config={tmp_path / 'a.yaml'}", "--dictionaries=z"])
    (expected, wanted), _ = parse(COMMANDS["audit"], ["--prefix=I think that", "--dictionaries=z", "--betas=0.5,1"])
    assert (inputs, settings) == (expected, wanted)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hook_name: x\nmodel_nam: y", "There is no option --model_nam. Did you mean --model_name"),
        ("hook_name: x\ndictionary: {percentil: 3}", "no option --dictionary.percentil. Did you mean"),
        ("hook_name: x\ntraining_tokens: many", "--training_tokens: takes a whole number, got 'many'"),
        ("[1", "cannot be read"),
        ("word", "a mapping of options to values"),
    ],
)
def test_what_a_file_gets_wrong_is_said(command, tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    found = command("exemplars", f"--config={tmp_path / 'x.yaml'}")
    assert found.status == 2 and message in found.error, found.error
    assert "cannot be read" in command("snmf", f"--config={tmp_path / 'none.yaml'}").error
    assert "--config needs a value" in command("snmf", "--config").error
    assert "There is no option --config" in command("match", "a", "b", "--config=x").error
