"""Every failure is one line on stderr, an exit status, and nothing on stdout."""

import os
import re

import pytest

from saelens_ext.cli import inspection
from saelens_ext.cli.commands import COMMANDS
from saelens_ext.cli.errors import one_line

USAGE = [
    ([], "No command was given; there are exemplars, snmf"),
    (["exemplar"], "There is no command exemplar; .* Did you mean exemplars"),
    (["--json"], "The command comes first, before --json"),
    (["match", "a"], "The following arguments are required: SECOND"),
    (["match", "a", "b", "c"], "'c' is not expected here"),
    (["match", "a", "b", "--centre=own"], "There is no option --centre. Did you mean --center"),
    (["match", "a", "b", "--center=onw"], "--center: invalid choice: 'onw' .choose from '?own'?, '?shared'?"),
    (["match", "a", "b", "--level=x"], "--level: takes a number, got 'x'"),
    (["match", "a", "b", "--seed=1.5"], "--seed: takes a whole number, got '1.5'"),
    (["match", "a", "b", "--json=perhaps"], "--json/--nojson: takes true or false, got 'perhaps'"),
    (["match", "a", "b", "--csv"], "--csv: expected one argument"),
    (["match", "a", "b", "--csv", "--json"], "--csv: expected one argument"),
    (["exemplars"], "hook_name must name at least one hook"),
    (
        ["exemplars", "--hook_name=x", "--percentile=3"],
        "There is no option --percentile. Did you mean --dictionary.percentile",
    ),
    (["exemplars", "--hook_name=x", "--modle_name=3"], "There is no option --modle_name. Did you mean --model_name"),
    (["exemplars", "--hook_name=x", "--model=3"], "There is no option --model."),  # not taken for its beginning
    (["exemplars", "--hook_name=x", "--dictionary.percentile=a"], "--dictionary.percentile: takes P.*got 'a'"),
    (["exemplars", "--hook_name=x", "--dictionary.percentile=101"], r"percentile must lie in \(0, 100\), got 101"),
    (
        ["exemplars", "--hook_name=x", "--model_from_pretrained_kwargs={"],
        "--model_from_pretrained_kwargs: takes JSON, got '{'",
    ),
    (["exemplars", "--hook_name=x"], "No dataset was named"),
    (["snmf", "--hook_name=x", "--dictionary.sparsity=2"], "sparsity must lie in"),
    (
        ["snmf", "--hook_name=x", "--model_name=demo", "--dataset_path=demo", "--model_class_name=HookedTransformer"],
        "demo model is a SAETransformerBridge",
    ),
    (["audit"], "No prefix was given"),
    (["audit", "--prefix=x"], "No dictionary was named"),
    (["audit", "--prefix=x", "--dictionaries=x", "--n_clusters=3"], "n_clusters must be 1 <= fewest <= most"),
    (["audit", "--prefix=x", "--betas=a"], r"--betas: takes X\[,X…\], got 'a'"),
    (["eval", "x", "--n_eval_batches=0"], "--n_eval_batches must be at least 1"),
    (["demo", "--max_tokens=0"], "--max_tokens must be at least 1"),
    (["pull", "a/b"], "required: SAE_ID, FOLDER"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(arguments) for arguments, _ in USAGE])
def test_command_lines_that_are_not_understood(arguments, message, command):
    found = command(*arguments)
    assert found.status == 2 and found.err.count("\n") == 1
    assert found.error.startswith("saelens-ext: error: ")
    assert re.search(message, found.error), found.error


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_is_taken_for_its_beginning(name, command):
    places = {
        "match": ["a", "b"],
        "evidence models": ["a", "b"],
        "convert": ["a", "b"],
        "push": ["a", "b", "c"],
        "pull": ["a", "b", "c"],
    }
    words = {"audit": "--model_nam=", "demo": "--output_pat=", "match": "--cente=own", "convert": "--hook_nam=x"}
    word = words.get(name, "--revisio=x" if name in ("push", "pull") else "--model_nam=gpt2")
    bare = ("exemplars", "snmf", "audit", "demo", "evidence synthetic", "evidence clusters", "evidence supernodes")
    given = places.get(name, [] if name in bare else ["a"])
    required = ["--hook_name=a"] if name in ("exemplars", "snmf") else []
    required += ["--output_path=a", "--latent=0"] if name == "export" else []
    found = command(*name.split(), *given, word, *required)
    assert found.status == 2 and f"There is no option {word.partition('=')[0]}." in found.error


FAILURES = [
    (["match", "{fine}", "nowhere"], "There is no folder nowhere, and it is not written as repo_id:sae_id"),
    (["profile", "nowhere"], "There is no folder nowhere"),
    (["profile", "{place}/model"], "holds no SAELens dictionary: it lacks cfg.json and sae_weights.safetensors"),
    (["report", "{fine}", "--compare={snmf}"], "first has directions of width 32 and second of 64"),
    (["convert", "nosuch", "{tmp}/o"], "nosuch is neither a file nor a build"),
    (["convert", "{fine}/cfg.json", "{tmp}/o"], "is refused: it breaks off or is damaged at byte 0"),
    (["convert", "nosuch", "{fine}/cfg.json/o"], "cfg.json is a file; results go into a folder"),
    (["push", "nowhere", "a/b", "x"], "There is no directory nowhere"),
    (["pull", "a/b", "../x", "{tmp}/o"], "sae_id must be the path of a folder"),
    (["audit", "--prefixes={tmp}/none"], "No such file or directory: '.*none'"),
    (
        ["audit", "--prefix=x", "--dictionaries={fine}", "--output_path=none", "--model_name={place}/text.jsonl"],
        "could not be read: .*text.jsonl is no folder of a saved model; give one, or the name of a model on the Hub",
    ),
    (
        [
            "audit",
            "--prefix=x",
            "--dictionaries={fine}",
            "--output_path=none",
            "--model_name={place}/model",
            "--temperature=-1",
        ],
        "temperature must be",
    ),
    (
        ["exemplars", "--hook_name=blocks.1.hok_out", "{reading}", "--output_path=none"],
        "has no hook 'blocks.1.hok_out'. Did you mean 'blocks.1.hook_out'",
    ),
    (
        ["exemplars", "--hook_name=x", "{reading}", "--output_path={fine}/cfg.json"],
        "cfg.json is a file; results go into a folder",
    ),
    (
        ["exemplars", "--hook_name=x", "{reading}", "--dataset_path={fine}/fit.safetensors"],
        "fit.safetensors is a file of an unknown kind",
    ),
    (["exemplars", "--hook_name=x", "{reading}", "--resume_from_checkpoint={tmp}"], "."),
]


@pytest.mark.parametrize(("arguments", "message"), FAILURES, ids=[" ".join(arguments[:3]) for arguments, _ in FAILURES])
def test_failures(arguments, message, command, built, place, reading, tmp_path):
    words = [
        word
        for one in arguments
        for word in (reading if one == "{reading}" else [one.format(tmp=tmp_path, place=place, **built)])
    ]
    found = command(*words, "--json")
    assert found.status == 1, found.err
    assert found.error.startswith("saelens-ext: error: ") and re.search(message, found.error), found.error


def test_debug_shows_where(command):
    found = command("match", "--debug", "x", "y")
    assert found.status == 1 and found.out == ""
    assert "Traceback" in found.err and "open_dictionary" in found.err
    assert found.err.rstrip().splitlines()[-1].startswith("saelens-ext: error: There is no folder x")


def test_a_folder_without_permission(command, built, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # who runs the tests may be allowed everything
    found = command("convert", "x", tmp_path / "o")
    assert found.status == 1 and "may not be written; choose a folder of yours" in found.error


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("two\n   lines"), "two lines"),
        (KeyError("snmf"), "KeyError: 'snmf' (--debug shows where)"),
        (ZeroDivisionError(), "ZeroDivisionError (--debug shows where)"),
        (ValueError(), "ValueError (--debug shows where)"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory: 'x'"),
        (OSError("a sentence"), "a sentence"),
        (RuntimeError("x" * 2000), "x" * 900 + "… (--debug shows all)"),
    ],
)
def test_errors_in_one_line(error, shown):
    assert one_line(error) == shown


def test_an_unexpected_error_names_its_kind(command, built, monkeypatch):
    def broken(*args, **kwargs):
        raise AttributeError("'X' object has no attribute 'y'")

    monkeypatch.setattr(inspection, "match_dictionaries", broken)
    found = command("match", built["fine"], built["coarse"])
    assert (found.status, found.error) == (
        1,
        "saelens-ext: error: AttributeError: 'X' object has no attribute 'y' (--debug shows where)",
    )


@pytest.mark.parametrize(("name", "words"), [("match", "Nothing was written"), ("push", "all together or not at all")])
def test_ctrl_c(name, words, command, monkeypatch, built):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("saelens_ext.cli.inspection.match_dictionaries", interrupted)
    monkeypatch.setattr("saelens_ext.cli.share.push_to_hub", interrupted)
    places = {"match": [built["fine"], built["coarse"]], "push": [built["fine"], "a/b", "x"]}
    found = command(name, *places[name])
    assert found.status == 130 and found.error.startswith("saelens-ext: Interrupted. ") and words in found.error
