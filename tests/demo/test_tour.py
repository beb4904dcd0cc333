"""The demo's part on neuron features, on a tiny model; the whole demo runs for minutes."""

from functools import partial

from datasets import Dataset

from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.demo import split_corpus
from saelens_ext.demo import tour as demo
from saelens_ext.dictionaries.fit_snmf import fit_snmf
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult


def test_neuron_features_are_built_saved_and_agree(tiny_bridge, tiny_texts, tmp_path, monkeypatch):
    settings = {
        "CONTEXT_SIZE": 32,
        "NEURON_HOOK": "blocks.1.mlp.hook_post",
        "RANKS": (8, 4, 2),
        "HELD_OUT_TOKENS": 40,
        "STEER_TARGET": 0.01,
        "NEW_TOKENS": 3,
        "SAE_K": 2,
        "SAE_SAMPLES": 1024,
    }
    for name, value in settings.items():
        monkeypatch.setattr(demo, name, value)
    build, held_out = split_corpus(Dataset.from_dict({"text": tiny_texts}))
    said = []
    section = demo.build_neuron_features(tiny_bridge, build, held_out, tmp_path, 300, said.append)
    assert [level.dictionary.cfg.d_sae for level in section.levels] == [8, 4, 2]
    assert {text.feature for text in section.steered.texts} == set(range(8))
    assert (
        section.fit.n_held_out == 40
        and section.fit.held_out_loss > 0
        and all(level.held_out_loss > 0 for level in section.levels)
    )
    loaded = HierarchicalSNMF.load(tmp_path / "snmf_hierarchy")
    assert (loaded.dictionaries[0].W_dec == section.levels[0].dictionary.W_dec).all()
    for number, dictionary in enumerate(loaded.dictionaries):
        profile = DictionaryProfile.load(tmp_path / "snmf_hierarchy" / f"level_{number}", dictionary)
        assert profile.counts.tolist() == section.levels[number].profile.counts.tolist()
    assert SNMFFitResult.load(tmp_path / "snmf").held_out_loss == section.fit.held_out_loss
    methods = [row.method for row in section.concept.rows]
    assert (
        methods == ["SNMF features", "SAE latents", "Regions", "difference of means"]
        and (tmp_path / "concept.json").exists()
    )
    assert (tmp_path / "steered.json").exists() and any("Unsteered" in line for line in said)


def test_the_audit_of_the_demo(tiny_bridge, tiny_texts, tmp_path, monkeypatch):
    settings = {
        "CONTEXT_SIZE": 32,
        "NEURON_HOOK": "blocks.1.mlp.hook_post",
        "AUDIT_HOOKS": ["blocks.0.mlp.hook_post"],
        "N_CONTINUATIONS": 12,
        "ANSWER_TOKENS": 4,
        "AUDIT_PROMPT": "The assert statement",
        "AUDIT_BETAS": (2.0, 3.0),
        "AUDIT_GAMMAS": (0.5,),
    }
    for name, value in settings.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "audit_continuations", partial(without_chat, demo.audit_continuations))
    build, _ = split_corpus(Dataset.from_dict({"text": tiny_texts}))
    known = fit_snmf(demo.excerpts_stream(tiny_bridge, build, "blocks.1.mlp.hook_post", 300), 6).dictionary
    said = []
    report = demo.audit_prompt(tiny_bridge, build, known, tmp_path, 300, said.append)
    assert report.name == "audit.html" and "The assert statement" in report.read_text(encoding="utf-8")
    assert (tmp_path / "audit" / "prefix_000" / "clustering.json").exists() and len(said) > 2


def without_chat(audit, *args, **options):
    """The tiny model has no chat template."""
    return audit(*args, **options | {"chat_template": False})
