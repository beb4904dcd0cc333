"""Evaluations through the command: one page, one JSON file, and figures where people look."""

import json

import joblib
import numpy as np
import pytest

from saelens_ext.cli.commands import COMMANDS
from saelens_ext.evals import Evidence
from tests.report.parsed_page import Page

WORDS = ["assert", "raises", "object", "name", "value", "class", "method", "number", "string", "module", "index"]
FAST = ["--n_permutations=200", "--quiet", "--json"]


def sentences(n, seed, extra=()):
    generator = np.random.default_rng(seed)
    return [f"{' '.join(generator.choice(WORDS, size=6))} {seed} {i} {' '.join(extra)}" for i in range(n)]


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    path = tmp_path_factory.mktemp("concepts") / "concepts.jsonl"
    made = [
        {"name": f"concept {i}", "positives": sentences(6, i, ("end", "!")), "negatives": sentences(6, 50 + i)}
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in made))
    return path


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    (folder / "inside.txt").write_text("\n".join(sentences(25, 7)))
    (folder / "digits.json").write_text(json.dumps([" ".join("3141592653"[i % 7 :]) + f" {i}" for i in range(22)]))
    return folder


def check(found, kind, folder, copied):
    """What every evaluation leaves."""
    assert found.status == 0, found.err
    page, results = ((folder / name).read_text() for name in ("evidence.html", "results.json"))
    content = json.loads(results)
    assert content[kind]["verdict"] == found.data["verdict"] and content[kind]["summary"]
    assert found.data["verdict"][:60] in Page(page).text
    assert Evidence.load(folder / kind).verdict() == found.data["verdict"]
    if copied is not None:
        beside = json.loads((copied / "evidence_results.json").read_text())[kind]
        assert beside["verdict"] == found.data["verdict"] and all(
            name.startswith(f"evidence/{kind}/") for name in beside["figures"]
        )
    return content


@pytest.fixture
def copied(built, tmp_path):
    import shutil

    return shutil.copytree(built["coarse"], tmp_path / "coarse")


@pytest.mark.slow
def test_novelty(command, copied, documents, tmp_path):
    found = command(
        "evidence", "novelty", copied, f"--inside={documents / 'inside.txt'}", "--built_in=reversed_tokens",
        f"--outside=digits={documents / 'digits.json'}", "--n_bootstrap=50", "--rates=0.1", "--n_coresets=2",
        f"--output_path={tmp_path / 'out'}", *FAST,
    )  # fmt: skip
    content = check(found, "novelty", tmp_path / "out", copied)
    assert {row["set"] for row in found.data["summary"]} == {"digits", "reversed_tokens"}
    assert content["novelty"]["settings"]["rates"] == [0.1]


@pytest.mark.slow
def test_detection_beside_another_dictionary(command, copied, built, concepts, tmp_path):
    found = command(
        "evidence", "detection", copied, f"--compare={built['fine']}", f"--concepts={concepts}", "--n_splits=1",
        "--n_coresets=2", f"--output_path={tmp_path / 'out'}", f"--folder={tmp_path / 'kept'}", *FAST,
    )  # fmt: skip
    assert len(list((tmp_path / "kept").glob("concept *.json"))) == 6
    content = check(found, "detection", tmp_path / "out", copied)
    methods = {row["method"] for row in content["detection"]["summary"]}
    assert {"coarse exemplar", "coarse mean"} < methods and any("random activations" in name for name in methods)


@pytest.mark.slow
def test_probes(command, copied, concepts, tmp_path):
    given = [copied, f"--concepts={concepts}", f"--output_path={tmp_path / 'out'}", *FAST]
    asked = ("evidence", "probes", *given, "--ks=1,2", "--n_splits=1")
    found = command(*asked)
    check(found, "probes", tmp_path / "out", copied)
    spread = [*asked, f"--folder={tmp_path / 'kept'}", "--n_workers=2", '--actor_options={"num_cpus": 1}']
    with joblib.parallel_config(backend="sequential"):
        assert command(*spread).data == found.data
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("concept *.json")}
    assert len(kept) == 6
    assert command(*spread, "--workers=ray").data == found.data  # nothing is left for workers to do
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "holds a sweep that differs in seed" in command(*spread, "--seed=1").error
    assert "--folder=" in command(*asked, f"--folder={tmp_path / 'out' / 'results.json' / 'x'}").error


@pytest.mark.slow
def test_steering(command, copied, concepts, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(["The assert statement", "A list of names"]))
    found = command(
        "evidence", "steering", copied, f"--concepts={concepts}", f"--prompts={tmp_path / 'prompts.txt'}",
        "--targets=0.05", "--signs=-1", "--n=2", "--max_new_tokens=4", "--baselines=random",
        f"--output_path={tmp_path / 'out'}", f"--folder={tmp_path / 'kept'}", *FAST,
    )  # fmt: skip
    assert len(list((tmp_path / "kept").glob("concept *.json"))) == 6
    content = check(found, "steering", tmp_path / "out", copied)
    assert {row["method"] for row in found.data["summary"]} == {"coarse exemplar", "coarse mean", "random direction"}
    assert content["steering"]["settings"]["signs"] == [-1] and content["steering"]["settings"]["n_prompts"] == 2


def test_steering_needs_prompts_and_a_whole_endpoint(command, copied, documents):
    assert "--prompts=FILE" in command("evidence", "steering", copied).error
    prompts = f"--prompts={documents / 'inside.txt'}"
    assert "--judge_model=NAME" in command("evidence", "steering", copied, prompts, "--judge_url=http://x").error


@pytest.mark.slow
def test_behaviour_with_a_sweep(command, copied, tmp_path):
    files = {}
    for name, seed, end in (("shows", 1, "assert"), ("lacks", 2, "value"), ("neutral", 3, "name")):
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("\n".join(sentences(20 if name != "neutral" else 2, seed, (end,))))
    # The model is random, so that answers begin with one letter or another; half of them count.
    (tmp_path / "phrases.json").write_text(json.dumps(list("abcdefghijklm")))
    found = command(
        "evidence", "behaviour", copied, *(f"--{name}={path}" for name, path in files.items()), "--chat_template=false",
        f"--phrases={tmp_path / 'phrases.json'}", "--within=1", "--max_new_tokens=2", "--min_members=1",
        "--n_random=2", "--n_directions=1,2", "--basis=exemplar", "--n_bootstrap=50", "--sweep=true",
        f"--output_path={tmp_path / 'out'}", *FAST,
    )  # fmt: skip
    content = check(found, "behaviour", tmp_path / "out", copied)
    assert content["behaviour"]["settings"]["n_directions"] == [1, 2]
    assert {row["method"] for row in found.data["summary"]} >= {"no ablation", "Gaussian direction"}
    assert "cells ablating the best candidate changes the rate" in content["behaviour_sweep"]["verdict"]
    assert len(list((tmp_path / "out" / "cells").glob("cell p*.json"))) == 25


def test_behaviour_needs_prompts(command, copied):
    found = command("evidence", "behaviour", copied, "--quiet")
    assert found.status == 2 and "--shows=FILE and --lacks=FILE" in found.err


def test_synthetic(command, tmp_path):
    found = command(
        "evidence", "synthetic", "--methods=EP", "--n_seeds=2", "--n_activations=300", "--n_judged=200",
        f"--output_path={tmp_path / 'out'}", *FAST,
    )  # fmt: skip
    check(found, "synthetic", tmp_path / "out", None)


def test_estimates_go_to_wandb(command, tmp_path, monkeypatch, offline):
    logged = {}
    from saelens_ext.runner.tracking import WandbTracker

    original = WandbTracker.log_result

    def watched(self, key, figures, *rest, **more):
        logged.update(figures)
        return original(self, key, figures, *rest, **more)

    monkeypatch.setattr(WandbTracker, "log_result", watched)
    found = command(
        "evidence", "synthetic", "--methods=EP", "--n_seeds=1", "--n_activations=300", "--n_judged=200",
        f"--output_path={tmp_path / 'out'}", "--logger.log_to_wandb", *FAST,
    )  # fmt: skip
    assert found.status == 0, found.err
    assert 0 < logged["metrics/evidence/synthetic/EP/mcc"] <= 1


@pytest.fixture
def replicas(built, tmp_path):
    """Four folders of one dictionary."""
    import shutil

    return [shutil.copytree(built["coarse"], tmp_path / f"seed{number}" / "coarse") for number in range(4)]


def test_stability_of_replicas(command, replicas, tmp_path):
    given = [replicas[0], f"--compare={replicas[1]}", f"--output_path={tmp_path / 'out'}"]
    found = command("evidence", "stability", *given, *FAST)
    check(found, "stability", tmp_path / "out", replicas[0])
    shares = {row["method"]: row["estimate"] for row in found.data["summary"]}
    assert shares["replicas"] == 1  # a copy is found again
    assert "--compare=FOLDER" in command("evidence", "stability", replicas[0]).error


def test_checkpoints(command, replicas, tmp_path):
    first, other, *second = replicas
    found = command(
        "evidence", "checkpoints", first, f"--compare={other}", *(f"--second={one}" for one in second),
        f"--output_path={tmp_path / 'out'}", *FAST,
    )  # fmt: skip
    check(found, "checkpoints", tmp_path / "out", first)
    latents = Evidence.load(tmp_path / "out" / "checkpoints").latents
    assert set(latents["state"]) == {"persisted"} and latents["quintile"].nunique() > 1  # fits were read
    missing = command("evidence", "checkpoints", first, f"--compare={other}", f"--second={second[0]}").error
    assert "got 2 and 1" in missing and "--second=FOLDER" in missing
    twice = command("evidence", "checkpoints", first, f"--compare={first}", *(f"--second={one}" for one in second))
    assert "named twice" in twice.error


@pytest.mark.slow
def test_clusters(command, built, place, tmp_path):
    (tmp_path / "prefixes.txt").write_text("\n".join(sentences(6, 3)))
    asked = (
        "evidence", "clusters", f"--model_name={place / 'model'}", f"--dictionaries={built['fine']}",
        f"--prefixes={tmp_path / 'prefixes.txt'}", "--n=16", "--max_new_tokens=4", "--cells=3:0.5",
        "--min_cluster_size=2", "--max_rows=4", "--strengths=-1,1", "--signs=positive", "--controls=length",
        f"--output_path={tmp_path / 'out'}", *FAST,
    )  # fmt: skip
    found = command(*asked)
    content = check(found, "clusters", tmp_path / "out", None)
    assert content["clusters"]["settings"]["cells"] == [[3, 0.5]] and "clusterings" in content
    assert len(content["clusterings"]["summary"]) and (tmp_path / "out" / "prefixes" / "sweep.json").exists()
    again = command(*asked)
    assert again.data["verdict"] == found.data["verdict"]
    # Prefixes that were asked before, and are not now, take no part.
    (tmp_path / "prefixes.txt").write_text("\n".join(sentences(7, 3)[1:]))
    others = check(command(*asked), "clusters", tmp_path / "out", None)["clusterings"]
    assert others["settings"]["n_prefixes"] <= 6
    assert "--prefixes=FILE" in command("evidence", "clusters").error
    assert "--dictionaries=FOLDER" in command("evidence", "clusters", asked[4]).error


@pytest.mark.slow
def test_supernodes(command, built, place, tmp_path):
    file = tmp_path / "swaps.jsonl"
    prompts = [f"{start} A and B:" for start in "QPxyzw"]
    file.write_text("".join(json.dumps({"prompt": one, "first": "A", "second": "B"}) + "\n" for one in prompts))
    asked = (
        "evidence", "supernodes", f"--model_name={place / 'model'}", f"--dictionaries={built['fine']}",
        f"--swaps={file}", "--n=4", "--max_new_tokens=3", "--backend=gradient", "--weights=path", "--n_supernodes=3",
        f"--output_path={tmp_path / 'out'}", *FAST,
    )  # fmt: skip
    found = command(*asked)
    content = check(found, "supernodes", tmp_path / "out", None)["supernodes"]
    settings = content["settings"]
    assert settings["n_supernodes"] == 3 and settings["audit"]["weights"] == "path"
    assert {row["method"] for row in found.data["summary"]} >= {"supernodes", "shuffled", "half way"}
    assert len(list((tmp_path / "out" / "prompts").glob("prompt *.json"))) == 6
    assert command(*asked).data == found.data
    workers = ("--n_workers=2", "--workers=ray", '--actor_options={"num_cpus": 1}')
    assert command(*asked, *workers).data == found.data  # nothing is left for workers to do
    assert "workers must be one of" in command(*asked, "--workers=dask").error
    assert "--swaps=FILE" in command("evidence", "supernodes").error
    assert "--dictionaries=FOLDER" in command("evidence", "supernodes", asked[4]).error
    assert "There is no option --min_cluster_size" in command(*asked, "--min_cluster_size=2").error


@pytest.mark.slow
def test_overlap_and_nesting_beside_another_dictionary(command, copied, built, tmp_path):
    given = [copied, f"--compare={built['fine']}", "--training_tokens=300", "--n_bootstrap=20"]
    found = command(
        "evidence", "overlap", *given, "--min_active=2", f"--output_path={tmp_path / 'o'}", "--quiet", "--json"
    )
    content = check(found, "overlap", tmp_path / "o", copied)
    assert content["overlap"]["settings"]["n_tokens"] == 300 and len(found.data["summary"]) == 4
    found = command("evidence", "nesting", *given, "--n_shuffles=5", f"--output_path={tmp_path / 'n'}", *FAST)
    content = check(found, "nesting", tmp_path / "n", copied)
    assert content["nesting"]["settings"]["partitions"][1] == "coarse"  # whatever the order they are given in
    for name in ("overlap", "nesting"):
        assert "--compare=FOLDER" in command("evidence", name, copied).error


def test_decompose(command, copied, built, tmp_path):
    found = command(
        "evidence", "decompose", copied, f"--basis={built['fine']}", "--n_null=2", f"--output_path={tmp_path / 'out'}",
        "--quiet", "--json",
    )  # fmt: skip
    check(found, "decomposition", tmp_path / "out", copied)
    assert {row["method"] for row in found.data["summary"]} == {"basis", "turned basis"}
    assert "--basis=FOLDER" in command("evidence", "decompose", copied).error


@pytest.mark.slow
def test_models(command, place, tmp_path):
    given = [place / "model", place / "model", "--context_size=16", "--training_tokens=300", "--n_replicas=2"]
    reading = ["--hook_name=blocks.1.hook_out", f"--dataset_path={place / 'text.jsonl'}", "--percentile=20"]
    (tmp_path / "asked.txt").write_text("The assert statement\nA list of names")
    found = command(
        "evidence", "models", *given, *reading, f"--prompts=asked={tmp_path / 'asked.txt'}",
        f"--output_path={tmp_path / 'out'}", "--quiet", "--json",
    )  # fmt: skip
    assert found.status == 0, found.err
    page, content = (
        (tmp_path / "out" / "evidence.html").read_text(),
        json.loads((tmp_path / "out" / "results.json").read_text()),
    )
    assert {"checkpoints", "prompt_shift"} < set(content) and "Matched regions side by side" in page
    assert (tmp_path / "out" / "gained.csv").read_text().startswith("latent,members,own")
    assert "asked" in found.data["verdict"] and Evidence.load(tmp_path / "out" / "prompt_shift").verdict()
    assert "--hook_name=HOOK" in command("evidence", "models", *given).error
    assert "--prompts takes NAME=FILE" in command("evidence", "models", *given, *reading, "--prompts=asked").error


RESAMPLED = {"overlap": "--n_shifts", "decompose": "--n_null", "models": "--n_replicas"}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("evidence ")])
def test_help_lists_the_options_of_the_evaluation(command, name):
    found = command(*name.split(), "--help")
    assert found.status == 0 and f"usage: saelens-ext {name}" in found.out
    resampled = RESAMPLED.get(name.removeprefix("evidence "), "--n_permutations")
    for option in ("--output_path", resampled, "--seed", "--json"):
        assert option in found.out
    assert "of everything random" in found.out.lower() or "seed" in found.out


def test_what_is_missing_is_said(command, copied, documents):
    assert "--inside=FILE" in command("evidence", "novelty", copied).error
    given = f"--inside={documents / 'inside.txt'}"
    assert (
        "--outside takes NAME=FILE, got 'digits'"
        in command("evidence", "novelty", copied, given, "--outside=digits").error
    )
    assert "There is no command evidence" in command("evidence").error
    assert "There is no option --rate" in command("evidence", "novelty", copied, given, "--rate=0.1").error
