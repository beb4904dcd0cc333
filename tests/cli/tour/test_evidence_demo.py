"""The command behind ``make evidence``, on a tiny model."""

import json

import pytest

from saelens_ext.cli.tour import evidence
from saelens_ext.evals.dictionaries.synthetic import SyntheticEvidence
from tests import models_zoo


@pytest.fixture
def tiny(monkeypatch):
    model = models_zoo.make_model("llama", "SAETransformerBridge")
    monkeypatch.setattr(evidence, "load_demo_model", lambda device="cpu": model)
    monkeypatch.setattr(evidence, "HOOK", "blocks.1.hook_out")
    monkeypatch.setattr(evidence, "CONTEXT_SIZE", 16)
    monkeypatch.setattr(evidence, "PERCENTILES", (20, 40))


@pytest.mark.slow
def test_one_page_and_one_file_of_figures(tiny, tmp_path, capsys):
    assert evidence.main(["--kinds=novelty", "--n-activations=3000", f"--output={tmp_path}"]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content) == ["about", "novelty"] and content["about"]["hook"] == "blocks.1.hook_out"
    sets = {row["set"] for row in content["novelty"]["summary"]}
    assert {"code", "tweets", "sums in RPN", "random_tokens", "shuffled_words", "reversed_tokens"} <= sets
    assert content["novelty"]["verdict"] in capsys.readouterr().out
    assert "AUROC by percentile" in (tmp_path / "evidence.html").read_text()


def test_two_evaluations_of_one_kind_have_no_place_in_one_folder(tmp_path):
    found = evidence.evaluate_on_synthetic(methods=("EP",), n_seeds=1, n_activations=200, n_judged=100, n_bootstrap=20)
    assert isinstance(found, SyntheticEvidence)
    with pytest.raises(ValueError, match="different kinds, got synthetic, synthetic"):
        evidence.save_evidence([found, found], tmp_path)


def test_what_fails_loses_nothing_else(monkeypatch, tmp_path, capsys):
    def fails(*_, **__):
        raise ImportError("pip install --no-deps something")

    monkeypatch.setattr(evidence, "load_demo_model", fails)
    original = evidence.evaluate_on_synthetic
    small = {"methods": ("EP",), "n_seeds": 2, "n_activations": 200, "n_judged": 100, "n_bootstrap": 20}
    monkeypatch.setattr(evidence, "evaluate_on_synthetic", lambda n_seeds: original(**small))
    assert evidence.main(["--kinds=novelty,synthetic,probes", f"--output={tmp_path}"]) == 1
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["about", "synthetic"]
    assert str(tmp_path / "evidence.html") in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evidence.main(["--kinds=novelty,surprise"])
    assert "got 'surprise'" in capsys.readouterr().err


@pytest.mark.slow
def test_detection_and_probes(tiny, tmp_path, monkeypatch):
    few = (
        "96_spam_is",
        "105_click_bait",
        "113_movie_sent",
        "69_blood-pressure",
        "80_side-effects",
        "72_gene-expression",
    )
    original = evidence.packaged_concepts

    def six(names=None, *, n_per_side=100, words=(4, 60), seed=0):
        return original(names or few, n_per_side=n_per_side, words=words, seed=seed)

    monkeypatch.setattr(evidence, "packaged_concepts", six)
    options = ["--n-activations=1500", "--n-per-side=8", f"--output={tmp_path}"]
    assert evidence.main(["--kinds=detection,probes", *options]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert {"detection", "probes"} < set(content)
    methods = {row["method"] for row in content["detection"]["summary"]}
    assert {"EP p40 exemplar", "EP p40 mean", "SAE"} < methods and len(methods) > 4


@pytest.mark.slow
def test_steering(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "NEURON_HOOK", "blocks.1.mlp.out.hook_in")
    monkeypatch.setattr(evidence, "TOPICS", ("69_blood-pressure", "74_magnetic-field"))
    monkeypatch.setattr(evidence, "N_GROUPS", 6)
    options = ["--n-activations=500", "--n-per-side=6", f"--output={tmp_path}"]
    assert evidence.main(["--kinds=steering", *options]) == 0
    content = json.loads((tmp_path / "results.json").read_text())["steering"]
    methods = {row["method"] for row in content["summary"]}
    assert {"neuron groups", "SAE", "difference of means", "k-means", "prompting"} < methods
    assert content["settings"]["targets"] == [0.2]
