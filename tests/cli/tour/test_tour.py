"""The whole demo, on a tiny model; on the packaged one it runs for minutes."""

import json
from functools import partial

import pytest
from datasets import Dataset

from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.cli.tour import tour as demo
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from tests import models_zoo

pytestmark = pytest.mark.slow  # all stages at once

TINY = {
    "CONTEXT_SIZE": 32,
    "HOOK": "blocks.1.hook_resid_post",
    "PERCENTILES": (20, 40),
    "CHOSEN_PERCENTILE": 20,
    "PROMPT": "The assert",
    "NEURON_HOOK": "blocks.1.mlp.hook_post",
    "RANKS": (8, 4, 2),
    "HELD_OUT_TOKENS": 40,
    "STEERED_FEATURES": 5,
    "STEER_TARGET": 0.01,
    "NEW_TOKENS": 3,
    "SAE_K": 2,
    "SAE_SAMPLES": 1024,
    "AUDIT_HOOKS": ["blocks.0.mlp.hook_post"],
    "N_CONTINUATIONS": 12,
    "ANSWER_TOKENS": 4,
    "AUDIT_PROMPT": "The assert statement",
    "AUDIT_BETAS": (2.0, 3.0),
    "AUDIT_GAMMAS": (0.5,),
}


@pytest.fixture(scope="module")
def toured(tiny_texts, tmp_path_factory):
    """The whole tour on a tiny model of the class that it loads: its paths, where it wrote, and what it said."""
    folder, said = tmp_path_factory.mktemp("tour"), []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY.items():
            patch.setattr(demo, name, value)
        patch.setattr(demo, "audit_continuations", partial(without_chat, demo.audit_continuations))
        patch.setattr(demo, "load_demo_model", lambda: models_zoo.make_model("llama", "SAETransformerBridge"))
        patch.setattr(demo, "load_demo_corpus", lambda: Dataset.from_dict({"text": tiny_texts * 4}))
        reports = demo.run_demo(folder, 600, said.append)
    return reports, folder, said


def test_the_tour_writes_two_pages_and_says_where_the_first_is_early(toured):
    (about_dictionaries, about_audit), folder, said = toured
    assert about_dictionaries == folder / "report.html" and about_audit == folder / "audit.html"
    page = about_dictionaries.read_text(encoding="utf-8")
    assert "blocks.1.hook_out" in page and "blocks.1.mlp" in page
    early = next(number for number, line in enumerate(said) if str(about_dictionaries) in line)
    assert early < next(number for number, line in enumerate(said) if "Factorising" in line)


def test_regions_are_built_evaluated_and_steered_with(toured):
    _, folder, said = toured
    for percentile in TINY["PERCENTILES"]:
        fit = ExemplarFitResult.load(folder / f"percentile_{percentile}")
        profile = DictionaryProfile.load(folder / f"percentile_{percentile}", fit.dictionary)
        assert int(profile.counts.sum()) == fit.n_seen - fit.n_undirected == profile.n_activations
    assert json.loads((folder / "evals.json").read_text())["reconstruction_quality"]["explained_variance"] is not None
    labels = [one["label"] for one in json.loads((folder / "generations.json").read_text())["generations"]]
    assert labels[0] == "Unsteered" and len(labels) == 3 and any("Unsteered" in line for line in said)


def test_neuron_features_are_built_saved_and_agree(toured):
    _, folder, _ = toured
    fit, loaded = SNMFFitResult.load(folder / "snmf"), HierarchicalSNMF.load(folder / "snmf_hierarchy")
    assert [dictionary.cfg.d_sae for dictionary in loaded.dictionaries] == [8, 4, 2]
    for number, dictionary in enumerate(loaded.dictionaries):
        profile = DictionaryProfile.load(folder / "snmf_hierarchy" / f"level_{number}", dictionary)
        assert profile.n_activations == fit.n_seen and len(profile.counts) == dictionary.cfg.d_sae
    assert fit.n_held_out == 40 and fit.held_out_loss > 0
    texts = json.loads((folder / "steered.json").read_text())["texts"]
    strongest = fit.shares.argsort(descending=True)[:5].tolist()
    assert sorted({text["feature"] for text in texts}) == sorted(strongest)
    rows = json.loads((folder / "concept.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["SNMF features", "SAE latents", "Regions", "difference of means"]


def test_the_audit_of_the_demo(toured):
    (_, report), folder, _ = toured
    assert "The assert statement" in report.read_text(encoding="utf-8")
    assert list((folder / "audit").glob("prefix_*/clustering.json"))


def without_chat(audit, *args, **options):
    """The tiny model has no chat template."""
    return audit(*args, **options | {"chat_template": False})
