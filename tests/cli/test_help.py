"""What the command says of itself."""

import subprocess

import pytest

from saelens_ext.cli.commands import COMMANDS
from saelens_ext.cli.parser import parse, parser_of


def test_the_overview_names_every_command(command):
    found = command("--help")
    assert (found.status, found.err) == (0, "")
    for name, one in COMMANDS.items():
        assert f"  {name} " in found.out and one.summary in found.out
    assert command("-h").out == found.out
    assert command("--version").out.startswith("saelens-ext 0.") and command("match", "--version").status == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_every_option(name, command):
    found = command(*name.split(), "--help")
    assert (found.status, found.err) == (0, "")
    head, *rest = found.out.splitlines()
    assert head.startswith(f"usage: saelens-ext {name} ") and head.endswith("[OPTIONS]")
    assert f"  saelens-ext {COMMANDS[name].example}" in found.out
    for wrong in ("%(", "<__TEMP__>", "part_", "[int]", "[str]", "['"):
        assert wrong not in found.out, wrong
    options = [line.split()[0] for line in rest if line.startswith("  --")]
    assert len(options) == len(set(options)) and {"--json", "--quiet", "--debug"} <= set(options)
    shown = " ".join(found.out.split())
    for action in parser_of(COMMANDS[name])._actions:
        assert action.help, action.dest
    assert "(default: None)" not in shown and "(default: )" not in shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("exemplars", "--dictionary.percentile P[,P…] Percentile or percentiles of the pairwise distances"),
        (
            "exemplars",
            "--streaming true|false Read a named dataset as it arrives instead of downloading it first. (default: "
            "true)",
        ),
        ("snmf", "--dictionary.n_components K[,K…] Number or numbers of features. (default: 100)"),
        (
            "audit",
            "--gammas X[,X…] Values of gamma to try, the fraction of beta that weights the semantic view. "
            "(default: 0.1,0.3,0.5,0.7,0.9)",
        ),
        ("audit", "--logger.wandb_project TEXT Project of the runs. (default: saelens_ext)"),
        ("match", "--center own|shared Compare directions"),
        ("push", "usage: saelens-ext push FOLDER REPO_ID SAE_ID [OPTIONS]"),
    ],
)
def test_options_come_with_their_kind_and_default(name, shown, command):
    assert shown in " ".join(command(name, "--help").out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_understood(name):
    import shlex

    arguments = shlex.split(COMMANDS[name].example)[len(name.split()) :]
    options, output = parse(COMMANDS[name], arguments)
    assert len(options) == len(COMMANDS[name].option_classes()) and not output.json


def test_spellings_of_options():
    command = COMMANDS["audit"]
    for given in (
        ["--max-new-tokens=3", "--betas=1,2"],
        ["--max_new_tokens", "3", "--betas=[1.0, 2]"],
        ["--max_new_tokens=3", "--betas", "1,2"],
    ):
        (_, settings), _ = parse(command, given)
        assert settings.max_new_tokens == 3 and settings.betas == (1, 2)
    (inputs, settings), output = parse(
        command,
        [
            "--prefix=a, b",
            "--prefix",
            "c",
            "--dictionaries=x,y:z",
            "--stop=,",
            "--n_clusters=2,5",
            "--strengths=-1,0.5",
            "--json",
            "--validate=False",
        ],
    )
    assert list(inputs.prefix) == ["a, b", "c"] and list(inputs.dictionaries) == ["x", "y:z"] and output.json
    assert (settings.stop, settings.n_clusters, settings.strengths, settings.validate) == (
        (",",),
        (2, 5),
        (-1, 0.5),
        False,
    )
    assert parse(command, ['--stop=["a,", "\\n"]'])[0][1].stop == ("a,", "\n")


def test_a_switch_does_not_take_the_word_behind_it():
    (options,), output = parse(COMMANDS["push"], ["--private", "folder", "--json", "a/b", "--debug=false", "x"])
    assert (options.dictionary, options.repo_id, options.sae_id, options.private) == ("folder", "a/b", "x", True)
    assert output.json and not output.debug
    (options,), _ = parse(COMMANDS["push"], ["folder", "a/b", "x", "--private", "false"])
    assert not options.private


def completed(script, *words):
    """What bash offers for the last of some words behind the program's name."""
    ask = """
    source "$0"
    COMP_WORDS=(saelens-ext "$@"); COMP_CWORD=$#; COMP_LINE="saelens-ext $*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
    $(complete -p saelens-ext | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    echo "${COMPREPLY[@]}"
    """
    return subprocess.run(["bash", "-c", ask, str(script), *words], capture_output=True, text=True).stdout.split()


def test_a_shell_completes_commands_options_and_choices(command, tmp_path):
    script = tmp_path / "completion"
    script.write_text(command("--print-completion=bash").out)
    assert set(completed(script, "ex")) == {"exemplars", "export"}
    assert completed(script, "exemplars", "--dictionary.perc") == ["--dictionary.percentile"]
    assert set(completed(script, "audit", "--max_")) == {"--max_new_tokens", "--max_sources", "--max_rows"}
    assert completed(script, "match", "a", "b", "--center", "o") == ["own"]
    assert "eval_every_n_wandb_logs" not in script.read_text(), "options that mean nothing here are not offered"
    assert command("--print-completion", "zsh").out.startswith("#compdef saelens-ext")
    refused = command("--print-completion=cmd")
    assert refused.status == 2 and "--print-completion takes bash or" in refused.error and "got 'cmd'" in refused.error
