"""The command behind ``make evidence``, on a tiny model."""

import json

import pytest

from saelens_ext.demo import evidence
from saelens_ext.evals.synthetic import SyntheticEvidence
from tests import models_zoo


@pytest.fixture
def tiny(monkeypatch):
    model = models_zoo.make_model("llama", "SAETransformerBridge")
    monkeypatch.setattr(evidence, "load_demo_model", lambda device="cpu": model)
    monkeypatch.setattr(evidence, "HOOK", "blocks.1.hook_out")
    monkeypatch.setattr(evidence, "CONTEXT_SIZE", 16)
    monkeypatch.setattr(evidence, "PERCENTILES", (20, 40))


def test_one_page_and_one_file_of_figures(tiny, tmp_path, capsys):
    assert evidence.main(["--kinds=novelty", "--n-activations=3000", f"--output={tmp_path}"]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content) == ["about", "novelty"] and content["about"]["hook"] == "blocks.1.hook_out"
    sets = {row["set"] for row in content["novelty"]["summary"]}
    assert {"code", "tweets", "random_tokens", "shuffled_words", "reversed_tokens"} <= sets
    assert content["novelty"]["verdict"] in capsys.readouterr().out
    assert "AUROC by percentile" in (tmp_path / "evidence.html").read_text()


def test_two_evaluations_of_one_kind_have_no_place_in_one_folder(tmp_path):
    found = evidence.evaluate_on_synthetic(methods=("EP",), n_seeds=1, n_activations=200, n_judged=100, n_bootstrap=20)
    assert isinstance(found, SyntheticEvidence)
    with pytest.raises(ValueError, match="different kinds, got synthetic, synthetic"):
        evidence.save_evidence([found, found], tmp_path)
