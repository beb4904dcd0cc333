"""Profiles as tables and files: whole, or refused."""

import contextlib
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelens_ext.analysis import profile as profile_module
from saelens_ext.analysis.profile import DictionaryProfile, profile_dictionary
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from tests.analysis.profiled import DICTIONARIES, HOOK, CutStream, D, K, assert_same, integers, partition


def test_dataframe_has_a_row_per_latent():
    frame = profile_dictionary(partition(), CutStream(integers(150, D))).to_dataframe()
    assert len(frame) == K and frame["count"].sum() == 150 and abs(frame["frequency"].sum() - 1) < 1e-12
    assert {"name", "coherence", "mean_distance", "max_activation"} <= set(frame.columns)
    assert "coherence" not in profile_dictionary(DICTIONARIES["topk"](), CutStream(integers(20, D))).to_dataframe()


@pytest.fixture
def profiles():
    return [profile_dictionary(partition(), CutStream(integers(150, D, seed=seed)), context=2) for seed in (1, 2)]


@pytest.mark.parametrize("name", ["standard", "partition", "regions"])
def test_saved_and_loaded(name, tmp_path):
    profile = profile_dictionary(
        DICTIONARIES[name](), CutStream(integers(60, D)), n_boundary=0 if name == "regions" else 5
    )
    profile = replace(profile, latent_names=tuple(f"name <{j}>" for j in range(K)))
    assert profile.save(tmp_path / "deep" / "down") == tmp_path / "deep" / "down"
    assert_same(DictionaryProfile.load(tmp_path / "deep" / "down"), profile)
    assert sorted(os.listdir(tmp_path / "deep" / "down")) == ["profile.json", "profile.safetensors"]


@pytest.mark.parametrize("failing", range(1, 4))
def test_an_interrupted_save_leaves_the_old_profile(failing, profiles, tmp_path, monkeypatch):
    old, new = profiles
    old.save(tmp_path)
    replaced, calls = os.replace, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == failing:
            raise KeyboardInterrupt
        replaced(*args)

    for expected in (old, new):
        calls.clear()
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", interrupted)
            new.save(tmp_path)
            assert expected is new, "the first save was to be interrupted"
        # What the first interruption left behind may spare the second save its last steps.
        assert_same(DictionaryProfile.load(tmp_path), new if len(calls) < failing else old)
    new.save(tmp_path)
    assert_same(DictionaryProfile.load(tmp_path), new)
    assert sorted(os.listdir(tmp_path)) == ["profile.json", "profile.safetensors"]


def test_files_of_two_saves_are_not_one_profile(profiles, tmp_path):
    old, new = profiles
    old.save(tmp_path / "a")
    new.save(tmp_path / "b")
    os.replace(tmp_path / "a" / "profile.json", tmp_path / "b" / "profile.json")
    with pytest.raises(ValueError, match="not of the same save"):
        DictionaryProfile.load(tmp_path / "b")


@pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
@pytest.mark.parametrize("left", [0, 1, 40, -1])
def test_truncated_files(name, left, profiles, tmp_path):
    profiles[0].save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: left - 2 if left < 0 else left])
    with pytest.raises(ValueError, match=name):
        DictionaryProfile.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "upgrade"),
        ({"format_version": "1"}, "format_version"),
        ({"kind": "else"}, "is not a"),
        ({"save_id": None}, "save_id"),
        ({"d_sae": 13}, "damaged"),
        ({"context": 3}, "damaged"),
        ({"latent_names": []}, "damaged"),
        ({"hook_name": ...}, "lacks hook_name"),
        ({"context": "2"}, "lacks context"),
        ({"d_sae": None, "n_activations": 1.5}, "lacks d_sae, n_activations"),
    ],
)
def test_foreign_and_newer_descriptions(change, message, profiles, tmp_path):
    profiles[0].save(tmp_path)
    content = json.loads((tmp_path / "profile.json").read_text()) | change
    (tmp_path / "profile.json").write_text(
        json.dumps({key: value for key, value in content.items() if value is not ...})
    )
    with pytest.raises(ValueError, match=message):
        DictionaryProfile.load(tmp_path)


def test_tensors_that_are_not_a_profile(profiles, tmp_path):
    profiles[0].save(tmp_path)
    path = tmp_path / "profile.safetensors"
    tensors, save_id = load_file(path), json.loads((tmp_path / "profile.json").read_text())["save_id"]
    header = {"kind": profile_module.FORMAT.kind, "save_id": save_id}
    for change, message in (
        ({"counts": ...}, "lacks counts"),
        ({"top.contexts": ...}, "lacks top.contexts"),
        ({"boundary.values": ...}, "lacks boundary.values"),
        ({"coherence": torch.zeros(3)}, "damaged"),
        ({"top.values": torch.tensor(1.0)}, "damaged"),
        ({"boundary.positions": torch.zeros(K, 4)}, "damaged"),
    ):
        save_file({name: tensor for name, tensor in (tensors | change).items() if tensor is not ...}, path, header)
        with pytest.raises(ValueError, match=message):
            DictionaryProfile.load(tmp_path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="not of the same save"):
        DictionaryProfile.load(tmp_path)


def test_a_missing_file_is_named(profiles, tmp_path):
    with pytest.raises(FileNotFoundError, match="profile.json"):
        DictionaryProfile.load(tmp_path)
    profiles[0].save(tmp_path)
    (tmp_path / "profile.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="profile.safetensors"):
        DictionaryProfile.load(tmp_path)


def test_the_profile_of_another_dictionary_is_refused(profiles, tmp_path):
    own = partition()
    own.save_model(tmp_path)
    profiles[0].save(tmp_path)
    assert_same(DictionaryProfile.load(tmp_path), profiles[0])
    assert_same(DictionaryProfile.load(tmp_path, own), profiles[0])
    own.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    assert_same(DictionaryProfile.load(tmp_path, own), profiles[0])
    smaller = ExemplarPartition.from_regions(
        own.exemplars[:5], own.means[:5], own.center, 0.9, metadata={"hook_name": HOOK}
    )
    elsewhere = partition()
    elsewhere.cfg.metadata.hook_name = "blocks.1.hook_out"
    for other, message in ((smaller, "5"), (elsewhere, "blocks.1.hook_out")):
        with pytest.raises(ValueError, match=f"{message}.*do not belong together"):
            DictionaryProfile.load(tmp_path, other)
        other.save_model(tmp_path)
        with pytest.raises(ValueError, match="do not belong together"):
            DictionaryProfile.load(tmp_path)
