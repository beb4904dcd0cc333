"""The audit as one call: stage by stage, resumable, the same again."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from saelens_ext.audit import AuditConfig, audit_continuations
from saelens_ext.continuations.audit_stages import stages as stages_module
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.host.sentence_model import load_sentence_model
from tests.continuations._dictionaries import make
from tests.models_zoo import make_model

PREFIX = "The assert statement"
OPTIONS = {
    "n": 16,
    "max_new_tokens": 5,
    "betas": (1.0, 1.25),
    "gammas": (0.3, 0.7),
    "n_clusters": (1, 16),
    "min_cluster_size": 1,
    "n_resamples": 2,
    "max_rows": 6,
}


@pytest.fixture(scope="module")
def setting():
    model = make_model("llama", "SAETransformerBridge")
    return model, [make("standard", "blocks.1.hook_out", model.cfg.d_model, d_sae=32)]


@pytest.fixture(scope="module")
def kept(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    return folder, audit_continuations(*setting[:1], PREFIX, setting[1], folder=folder, **OPTIONS)


def same(first, second):
    pd.testing.assert_frame_equal(first.to_dataframe(), second.to_dataframe())
    for mine, other in zip(first.prefixes, second.prefixes, strict=True):
        assert torch.equal(mine.continuations.signatures, other.continuations.signatures)
        pd.testing.assert_frame_equal(mine.path, other.path)
        assert (mine.validation is None) == (other.validation is None)
        if mine.validation is not None:
            pd.testing.assert_frame_equal(mine.validation.members, other.validation.members, check_dtype=False)


@pytest.mark.slow
def test_what_it_finds(kept):
    _, audit = kept
    (prefix,) = audit.prefixes
    table, modes = audit.to_dataframe(), audit.modes()
    assert len(table) == 16 and set(table["cluster"]) == set(range(prefix.clusterer.n_clusters_))
    assert list(modes["n_members"]) == list(np.bincount(table["cluster"])) and modes["weight"].sum() == pytest.approx(1)
    assert table["is_medoid"].sum() == len(modes)
    assert list(modes["text"]) == [prefix.continuations.texts[i] for i in modes["medoid"]]
    assert len(prefix.path) == 4 and prefix.path["stability"].notna().any()
    assert prefix.validation is not None or prefix.not_validated
    assert audit.verdict == prefix.verdict and repr(audit).startswith(audit.verdict.headline)
    assert (audit.verdict["moves"].answer == "untested") or prefix.validation is not None
    assert (
        audit.modes()["at_floor"].tolist() == (audit.modes()["n_members"] <= prefix.clusterer.min_cluster_size).tolist()
    )


@pytest.mark.slow
def test_prefix_and_prompt_mean_one_thing_each_everywhere(setting):
    prompts = ["Why?", "And so?"]
    audit = audit_continuations(setting[0], prompts, setting[1], chat_template=True, **OPTIONS)
    prefixes = [one.prefix for one in audit.prefixes]
    assert prefixes == [one.continuations.prefix for one in audit.prefixes] == [f"<s>[user] {p}\n" for p in prompts]
    assert [one.prompt for one in audit.prefixes] == [one.continuations.prompt for one in audit.prefixes] == prompts
    for table in (audit.to_dataframe(), audit.modes()):
        assert list(zip(table["prompt"], table["prefix"])) == [
            pair for pair in zip(prompts, prefixes) for _ in range((table["prefix"] == pair[1]).sum())
        ]
    rows = audit.to_dataframe()
    assert len(rows.merge(audit.modes(), on=["prompt", "prefix", "cluster"])) == len(rows)
    assert any(one.validation is not None for one in audit.prefixes)
    for one in audit.prefixes:
        if one.validation is not None:
            assert one.validation.prefixes == [one.prefix]
            assert set(one.validation.cells["prefix"]) == set(one.validation.directions["prefix"]) == {one.prefix}


def test_the_most_stable_clustering_is_chosen(kept):
    _, audit = kept
    (prefix,) = audit.prefixes
    chosen = prefix.path[
        (prefix.path["beta"] == prefix.clusterer.beta) & (prefix.path["gamma"] == prefix.clusterer.gamma)
    ].iloc[0]
    assert chosen["n_clusters"] == prefix.clusterer.n_clusters_ and chosen["objective"] == pytest.approx(
        prefix.clusterer.objective_
    )
    best = prefix.path["stability"].max()
    assert chosen["stability"] >= best - prefix.path.loc[prefix.path["stability"].idxmax(), "stability_se"] - 1e-12


def test_a_second_call_repeats_no_stage(kept, setting, monkeypatch):
    folder, audit = kept
    for stage in ("sample_continuations", "embed_continuations", "attribute_continuations", "rate_distortion_path"):
        monkeypatch.setattr(stages_module, stage, None)
    if audit.prefixes[0].validation is not None:
        monkeypatch.setattr(stages_module, "validate_clusters", None)
    same(audit, audit_continuations(setting[0], PREFIX, setting[1], folder=folder, **OPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["embed_continuations", "attribute_continuations", "rate_distortion_path", "validate_clusters"]
)
def test_an_interrupted_audit_goes_on(kept, setting, stage, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stages_module, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            audit_continuations(setting[0], PREFIX, setting[1], folder=tmp_path, **OPTIONS)
    monkeypatch.setattr(stages_module, "sample_continuations", None)
    same(kept[1], audit_continuations(setting[0], PREFIX, setting[1], folder=tmp_path, **OPTIONS))


@pytest.mark.slow
def test_without_a_folder_it_is_the_same(kept, setting):
    same(kept[1], audit_continuations(setting[0], PREFIX, setting[1], **OPTIONS))


@pytest.mark.slow
def test_an_audit_that_failed_at_once_gives_way_to_another(setting, tmp_path):
    with pytest.raises(ValueError, match="temperature"):
        audit_continuations(setting[0], PREFIX, setting[1], folder=tmp_path, **OPTIONS, temperature=-1)
    sampled = audit_continuations(setting[0], PREFIX, setting[1], folder=tmp_path, **OPTIONS, validate=False)
    assert len(sampled.to_dataframe()) == 16


def test_settings_are_checked_before_anything_is_computed(setting):
    wrong = {
        "n": 0,
        "top": 0,
        "max_rows": 0,
        "n_resamples": 1,
        "min_cluster_size": 0,
        "n_clusters": (5, 2),
        "strengths": (1.0,),
        "betas": (),
        "gammas": (2.0,),
        "backend": "magic",
        "embedding": "none",
        "direction": "mediod",
        "sign": "both",
        "held_out": 1.0,
        "generate": -1,
        "partitions": ("lengths",),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name.removesuffix("s")):
            audit_continuations(setting[0], PREFIX, setting[1], **{name: value})
    for name, value in {"n": None, "betas": 1.0, "n_clusters": [2, 3, 4], "seed": "x", "temperature": True}.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            AuditConfig(**{name: value})


@pytest.mark.slow
def test_how_modes_are_tested_can_be_chosen(setting):
    asked = {"direction": "center", "held_out": 0.3, "partitions": ["length", "top_activation"], "generate": 2}
    found = audit_continuations(setting[0], PREFIX, setting[1], **OPTIONS | asked).prefixes[0].validation
    assert found.settings["direction"] == "center" and found.settings["held_out"] == 0.3
    assert {"length", "top_activation"} < set(found.members["method"]) and (found.generations["n"] == 2).all()
    assert (found.directions.loc[found.directions["method"] == "joint", "row"] == -1).all()


def test_settings_of_numpy_and_of_a_sweep_are_pythons():
    found = AuditConfig(
        n=np.int64(5), betas=np.array([1, 2.0]), n_clusters=[2, 3], min_cluster_size="None", stop=["a"], seed=3.0
    )
    assert found == AuditConfig(n=5, betas=(1.0, 2.0), n_clusters=(2, 3), stop=("a",), seed=3)
    assert type(found.n) is int and type(found.seed) is int


def test_an_audit_knows_other_weights_again(setting, kept):
    model, (dictionary,) = setting
    folder, _ = kept
    other = make("standard", "blocks.1.hook_out", model.cfg.d_model, d_sae=32)
    with torch.no_grad():
        other.W_dec.copy_(dictionary.W_dec.flip(0))
        other.W_enc.copy_(dictionary.W_enc)
        other.b_enc.copy_(dictionary.b_enc)
    with pytest.raises(ValueError, match="another about"):
        audit_continuations(model, PREFIX, [other], folder=folder, **OPTIONS)


def test_too_many_modes_are_shown_and_said(setting):
    audit = audit_continuations(
        *setting[:1], PREFIX, setting[1], **OPTIONS | {"n_clusters": (2, 2), "betas": (4.0,), "gammas": (0.5,)}
    )
    (found,) = audit.prefixes
    assert found.clusterer.n_clusters_ > 2 and found.validation is None
    assert found.not_validated.startswith(
        f"The nearest to the number of modes asked for, {found.clusterer.n_clusters_}, is shown. No cell has 2 to 2"
    )


@pytest.mark.slow
def test_one_bad_prefix_does_not_cost_the_others(setting, monkeypatch, tmp_path):
    sample = stages_module.sample_continuations

    def one_row(model, prefix, *args, **kwargs):
        found = sample(model, prefix, *args, **kwargs)
        return found.select([0]) if prefix == "Bad" else found

    monkeypatch.setattr(stages_module, "sample_continuations", one_row)
    with pytest.raises(
        ValueError, match=r"1 of 2 prefixes could not be audited; 'Bad': 'Bad' gave 1 continuation\(s\)"
    ):
        audit_continuations(setting[0], ["Bad", PREFIX], setting[1], folder=tmp_path, **OPTIONS | {"validate": False})
    assert len(list(tmp_path.glob("prefix_*/clustering.json"))) == 1


@pytest.mark.slow
def test_continuations_without_text_are_left_out(setting, monkeypatch, caplog):
    sample = stages_module.sample_continuations

    def with_blanks(*args, **kwargs):
        found = sample(*args, **kwargs)
        return replace(found, texts=("  ", *found.texts[1:]))

    monkeypatch.setattr(stages_module, "sample_continuations", with_blanks)
    audit = audit_continuations(setting[0], PREFIX, setting[1], **OPTIONS | {"validate": False})
    assert len(audit.to_dataframe()) == 15 and "1 of 16 continuations are left out" in caplog.text


def planted():
    """Two modes that differ in what they say and in one source."""
    from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer
    from saelens_ext.continuations.continuation_set import ContinuationSet

    g = torch.Generator().manual_seed(0)
    group = torch.arange(20) % 2
    signatures = 0.1 * torch.randn(20, 6, generator=g)
    signatures[:, 4] += 3.0 * group
    embeddings = torch.nn.functional.normalize(
        torch.stack((1.0 - group, group + 0.0), dim=1) + 0.1 * torch.randn(20, 2, generator=g), dim=1
    )
    continuations = ContinuationSet(
        prompt="p",
        prefix="p",
        prefix_ids=(1, 2),
        token_ids=torch.arange(20)[:, None],
        lengths=torch.ones(20, dtype=torch.long),
        texts=tuple(f"text {i}" for i in range(20)),
        log_probs=-torch.ones(20, 1),
        weights=torch.full((20,), 0.05),
        embeddings=embeddings,
        signatures=signatures,
    )
    clusterer = JointClusterer(1.0, 0.5, random_state=0).fit(embeddings.numpy(), signatures.numpy())
    return PrefixAudit(
        continuations=continuations, clusterer=clusterer, path=pd.DataFrame(), validation=None
    ), group.numpy()


def test_distinguishing_sources_of_planted_modes():
    found, group = planted()
    assert found.clusterer.n_clusters_ == 2
    for cluster in (0, 1):
        table = found.distinguishing_sources(cluster, 3)
        inside = found.labels == cluster
        signatures = found.continuations.signatures.double().numpy()
        assert table["source"][0] == 4 and abs(table["t"][0]) > 20 > table["t"][1:].abs().max()
        assert table["difference"][0] == pytest.approx(signatures[inside, 4].mean() - signatures[~inside, 4].mean())
        members = found.exemplary_members(cluster, 4)
        assert members[0] == found.clusterer.medoid_indices_[cluster] and len(set(group[members])) == 1
    with pytest.raises(ValueError, match="cluster must be one of 0 to 1, got 2"):
        found.distinguishing_sources(2)


def test_what_is_refused(kept, setting, tmp_path):
    model, dictionaries = setting
    folder, _ = kept
    with pytest.raises(ValueError, match="another config .*top_p: 0.9 there, 0.8 now"):
        audit_continuations(model, PREFIX, dictionaries, folder=folder, **OPTIONS, top_p=0.8)
    with pytest.raises(ValueError, match="another about .*dictionaries"):
        audit_continuations(
            model,
            PREFIX,
            [make("standard", "blocks.0.hook_out", model.cfg.d_model, d_sae=32)],
            folder=folder,
            **OPTIONS,
        )
    with pytest.raises(ValueError, match="'tempreature'.*temperature"):
        audit_continuations(model, PREFIX, dictionaries, tempreature=2)
    with pytest.raises(ValueError, match="prefixes is empty; give a list of at least one prompt"):
        audit_continuations(model, [], dictionaries)
    with pytest.raises(ValueError, match="prefixes must all be different, got"):
        audit_continuations(model, [PREFIX, PREFIX], dictionaries)
    (path,) = folder.glob("prefix_*/audit.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(ValueError, match="99"):
        audit_continuations(model, PREFIX, dictionaries, folder=folder, **OPTIONS)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"labels": ...}, "clustering.json lacks labels"), ({"format_version": 99}, "format_version 99")],
)
def test_a_damaged_clustering_is_named(change, message, kept, setting):
    folder, _ = kept
    (path,) = folder.glob("prefix_*/clustering.json")
    whole = path.read_text()
    content = json.loads(whole) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(ValueError, match=message):
        audit_continuations(setting[0], PREFIX, setting[1], folder=folder, **OPTIONS)
    path.write_text(whole)


@pytest.mark.slow
def test_a_batch_size_holds_in_every_stage_and_may_change_between_calls(setting, tmp_path):
    model, dictionaries = setting
    embedder = load_sentence_model(None)
    rows, options = [], OPTIONS | {"generate": 2, "partitions": ("length",)}
    parts = [*model.modules(), *embedder.modules()]
    embeddings = [part for part in parts if isinstance(part, torch.nn.Embedding)]
    hooks = [part.register_forward_pre_hook(lambda _, given: rows.append(len(given[0]))) for part in embeddings]
    try:
        audit_continuations(
            model, PREFIX, dictionaries, embedder, **options
        )  # and, once, whether attribution works on the model
        assert max(rows) > 5
        rows.clear()
        small = audit_continuations(model, PREFIX, dictionaries, embedder, folder=tmp_path, batch_size=3, **options)
        assert 0 < max(rows) <= 3
        rows.clear()
        again = audit_continuations(model, PREFIX, dictionaries, embedder, folder=tmp_path, batch_size=5, **options)
        assert not rows
    finally:
        for hook in hooks:
            hook.remove()
    same(small, again)
