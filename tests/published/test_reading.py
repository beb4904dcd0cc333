"""Published dictionaries under every spelling, protocol and version, and what their reading checks."""

import hashlib
import io
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from huggingface_hub.hf_api import RepoFile
from sae_lens import SAE

from saelens_ext.published import convert
from saelens_ext.published.convert import convert_published_dictionary, read_published_dictionary
from saelens_ext.published.dictionary import PublishedDictionary
from saelens_ext.published.regions import check_separation
from tests.published import foreign

CURRENT = {"module": "ep.discovery.dictionary", "names": ("Dictionary", "Partition")}
LEGACY = {"module": "cas.discovery.dictionary", "names": ("ConceptLibrary", "Concept")}
SPELLINGS = [CURRENT, LEGACY, CURRENT | {"numpy_core": "numpy.core"}, LEGACY | {"numpy_core": "numpy.core"}]
BUILD = "gemma-2-2b_L12_p10"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / BUILD
    made.mkdir()
    return made


def metadata(k: int = 12, threshold: float = 0.3) -> dict:
    config = {
        "model": "google/gemma-2-2b",
        "layer": 12,
        "hook_name": None,
        "context_length": 128,
        "percentile": 10.0,
        "seed": 0,
    }
    return {
        "config": {"wandb_project": "ep"},
        "discovery_config": config,
        "discovery": {"n_partitions": k, "threshold": threshold, "elapsed_s": 12.5, "snapshots": []},
        "n_tokens": 346752,
    }


def assert_same(published: PublishedDictionary, state: dict, regions: list[dict]) -> None:
    """Every field of the pickle is found again."""
    column = lambda key: np.stack([region[key] for region in regions])  # noqa: E731
    assert published.dictionary.cfg.threshold == state["threshold"]
    torch.testing.assert_close(published.dictionary.center.detach(), torch.tensor(state["center"]), rtol=0, atol=0)
    for rows, key in (
        (published.dictionary.exemplars, "exemplar_direction"),
        (published.dictionary.means, "mean_member_direction"),
    ):
        torch.testing.assert_close(rows.detach(), torch.tensor(column(key)), rtol=0, atol=0)
    assert published.counts.tolist() == [region["member_count"] for region in regions]
    assert published.coherence.tolist() == pytest.approx([min(1.0, region["member_coherence"]) for region in regions])
    assert published.distance_sums.tolist() == [region["sum_dist_to_exemplar"] for region in regions]
    assert published.squared_distance_sums.tolist() == [region["sum_sq_dist_to_exemplar"] for region in regions]
    assert published.labels == tuple(region["label"] for region in regions)
    assert (published.merge_close, published.last_founding_rate) == (
        state["merge_close"],
        state["_last_batch_new_partition_rate"],
    )
    for i, region in enumerate(regions):
        assert published.members.row(i).tolist() == region["constituent_sample_indices"]
        assert published.exemplar_indices[i] == region["constituent_sample_indices"][0]
        assert published.iterations.row(i).tolist() == sorted(region["source_iterations"])
        for examples, key, sign in (
            (published.nearest, "sample_prompts", -1),
            (published.boundary, "boundary_prompts", 1),
        ):
            n = len(region[key])
            found = [
                (
                    examples.distances[i, j].item(),
                    published.prompts[examples.prompts[i, j]],
                    examples.positions[i, j].item(),
                )
                for j in range(n)
            ]
            assert {entry[1:] for entry in found} == {entry[1:] for entry in region[key]}
            assert [entry[0] for entry in found] == pytest.approx(
                sorted((abs(e[0]) for e in region[key]), reverse=sign == 1), abs=1e-6
            )
            assert examples.distances[i, n:].isnan().all() and (examples.prompts[i, n:] == -1).all()
        if published.reservoir is not None:
            assert np.array_equal(published.reservoir.row(i).numpy(), np.stack(region["sample_members"]))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: "-".join(map(str, spelling.values())))
@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_and_spelling_gives_every_field(folder, protocol, spelling):
    state, regions = foreign.make_state()
    content = foreign.pickled(state, regions, protocol, **spelling)
    assert spelling["module"].encode() in content and spelling.get("numpy_core", "numpy._core").encode() in content
    published = read_published_dictionary(foreign.write(folder, content), reservoir=True)
    assert_same(published, state, regions)


@pytest.mark.parametrize("protocol", range(6))
def test_pythons_other_pickler_is_read_as_well(folder, protocol, monkeypatch):
    def dumps(value, protocol):
        file = io.BytesIO()
        pickle._Pickler(file, protocol).dump(value)
        return file.getvalue()

    monkeypatch.setattr(pickle, "dumps", dumps)
    state, regions = foreign.make_state()
    assert_same(
        read_published_dictionary(foreign.write(folder, foreign.pickled(state, regions, protocol)), reservoir=True),
        state,
        regions,
    )


@pytest.mark.parametrize("dtype", [">f4", "<f8", "f2"])
def test_other_float_types_become_float32(folder, dtype):
    state, regions = foreign.make_state()
    for region in regions:
        region["exemplar_direction"] = region["exemplar_direction"].astype(dtype)
    state["threshold"], state["center"] = np.float32(0.25), state["center"].astype(dtype)
    regions[0]["member_coherence"] = np.float64(1 + 1e-7)
    published = read_published_dictionary(foreign.write(folder, foreign.pickled(state, regions)))
    expected = np.stack([region["exemplar_direction"].astype(np.float32) for region in regions])
    assert np.array_equal(published.dictionary.exemplars.detach().numpy(), expected)
    assert published.dictionary.cfg.threshold == 0.25 and published.coherence[0] == 1


@pytest.mark.parametrize("k", [12, 200])
def test_assignment_is_that_of_the_published_rule(folder, k):
    state, regions = foreign.make_state(k=k, d=16, threshold=0.3 if k == 12 else 1e-3)
    published = read_published_dictionary(foreign.write(folder, foreign.pickled(state, regions)))
    generator = np.random.default_rng(5)
    near = np.stack([region["exemplar_direction"] for region in regions])[generator.integers(0, k, 1000)]
    near = near + generator.uniform(0, 0.3, (1000, 1)) * generator.standard_normal((1000, 16)) / 4
    x = (state["center"] + 20 * np.concatenate([near, generator.standard_normal((2000, 16))])).astype(np.float32)
    # The author's rule, written out in float64: centre, divide by the norm plus 1e-12, nearest exemplar by 1 - cosine.
    centred = x.astype(np.float64) - state["center"]
    rows = centred / (np.linalg.norm(centred, axis=1, keepdims=True) + 1e-12)
    distances = 1 - rows @ np.stack([region["exemplar_direction"] for region in regions]).T.astype(np.float64)
    regions_found, found = published.dictionary.assign(torch.tensor(x))
    assert np.array_equal(regions_found.numpy(), distances.argmin(axis=1))
    np.testing.assert_allclose(found.numpy(), distances.min(axis=1), atol=1e-6)
    joined = published.dictionary.assign(torch.tensor(x), reject=True).regions >= 0
    assert np.array_equal(joined.numpy(), distances.min(axis=1) <= published.dictionary.cfg.threshold)
    assert 0 < joined.sum() < len(x)


def test_convert_writes_what_saelens_and_we_load(folder, tmp_path):
    state, regions = foreign.make_state()
    path = foreign.write(folder, foreign.pickled(state, regions))
    (folder / "gemma-2-2b_layer12_metadata.json").write_text(json.dumps(metadata()))
    convert_published_dictionary(path, tmp_path / "out", reservoir=True)
    again = PublishedDictionary.load(tmp_path / "out")
    assert_same(again, state, regions)
    sae = SAE.load_from_disk(str(tmp_path / "out"))
    assert sae.cfg.architecture() == "exemplar_partition" and sae.cfg.percentile == 10
    recorded = sae.cfg.metadata
    assert (recorded.model_name, recorded.hook_name, recorded.context_size) == (
        "google/gemma-2-2b",
        "blocks.12.hook_resid_post",
        129,
    )
    assert recorded.published["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() == again.source["sha256"]
    assert again.build["discovery"]["elapsed_s"] == 12.5 and again.source["disagreements"] == {}
    assert again.to_dataframe().loc[1, "label"] == "about things"
    assert json.dumps(again.summary())
    without = read_published_dictionary(path)
    assert without.reservoir is None and PublishedDictionary.load(without.save(tmp_path / "without")).reservoir is None


def test_settings_come_from_the_caller_then_the_metadata_then_the_names(folder):
    path = foreign.write(folder, foreign.pickled(*foreign.make_state()))
    by_name = read_published_dictionary(path).dictionary.cfg
    assert (by_name.metadata.model_name, by_name.metadata.hook_name, by_name.percentile) == (
        "gemma-2-2b",
        "blocks.12.hook_resid_post",
        10,
    )
    other = metadata()
    other["discovery_config"] |= {"hook_name": "blocks.3.hook_resid_mid", "percentile": 4}
    by_metadata = read_published_dictionary(path, metadata=other).dictionary.cfg
    assert (by_metadata.metadata.model_name, by_metadata.metadata.hook_name) == (
        "google/gemma-2-2b",
        "blocks.3.hook_resid_mid",
    )
    assert by_metadata.percentile == 4
    given = read_published_dictionary(path, metadata=other, hook_name="h", model_name="m", percentile=2).dictionary.cfg
    assert (given.metadata.model_name, given.metadata.hook_name, given.percentile) == ("m", "h", 2)


def test_what_disagrees_or_is_unknown_is_said_and_kept(folder, caplog):
    state, regions = foreign.make_state()
    state["_use_torch"] = False
    state["concepts"] = None
    path = foreign.write(folder, foreign.pickled(state, regions))
    with caplog.at_level(logging.WARNING):
        published = read_published_dictionary(path, metadata=metadata(k=13))
    assert published.source["ignored"] == ["_use_torch"]
    assert published.source["disagreements"] == {"n_partitions": {"metadata": 13, "file": 12}}
    assert "_use_torch" in caplog.text and "disagree" in caplog.text


def test_a_legacy_attribute_holds_the_regions(folder):
    state, regions = foreign.make_state()
    content = foreign.pickled(state, regions).replace(b"\x8c\x0apartitions", b"\x8c\x08concepts")
    published = read_published_dictionary(
        foreign.write(folder, foreign._without_frames(content, foreign.pickled(state, regions)))
    )
    assert_same(published, state, regions)


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ("state", "threshold", 0.0, r"threshold is 0; a cosine distance in \(0, 2\]"),
        ("state", "threshold", 2.5, "threshold is 2.5"),
        ("state", "threshold", float("nan"), "finite number"),
        ("state", "threshold", "0.3", "instead of a finite number"),
        ("state", "threshold", 1.9, "no more than the threshold 1.9"),
        ("state", "center", np.zeros((4, 4), dtype="f4"), r"the centre has shape \(4, 4\)"),
        ("state", "center", np.full(16, np.inf, dtype="f4"), "the centre holds NaN or infinity"),
        ("state", "center", np.arange(16), "dtype 'i8'"),
        ("region", "exemplar_direction", np.full(16, 0.5, dtype="f4"), "region 3 has norm 2"),
        ("region", "exemplar_direction", np.ones(15, dtype="f4"), "vector of 16 floats"),
        ("region", "mean_member_direction", np.zeros(16, dtype="f4"), "mean_member_direction of region 3 has norm 0"),
        ("region", "mean_member_direction", None, "instead of an array"),
        ("region", "member_coherence", 1.5, "member_coherence of region 3 is 1.5"),
        ("region", "member_coherence", -0.1, "member_coherence of region 3 is -0.1"),
        ("region", "member_count", 0, "member_count of region 3 is 0"),
        ("region", "member_count", True, "member_count of region 3 is True"),
        ("region", "source_iterations", [1], "set of batches"),
        ("region", "constituent_sample_indices", [1, -2], "negative number -2"),
        ("region", "constituent_sample_indices", [1, 2.5], "something else than whole numbers"),
        ("region", "sample_prompts", [(-3.0, "text", 1)], "distance 3"),
        ("region", "sample_prompts", [(0.0, 7, 1)], "where a prompt is expected"),
        ("region", "sample_prompts", [(0.0, "text")], "instead of"),
        ("region", "label", 3, "a label is 3"),
    ],
)
def test_broken_rules_of_the_method_are_refused(folder, where, key, value, message):
    state, regions = foreign.make_state()
    (state if where == "state" else regions[3])[key] = value
    path = foreign.write(folder, foreign.pickled(state, regions))
    with pytest.raises(ValueError, match=message) as refusal:
        read_published_dictionary(path)
    assert str(refusal.value).startswith(f"{path} is refused: ") and "\n" not in str(refusal.value)


def test_separation_is_checked_in_blocks(monkeypatch):
    monkeypatch.setattr("saelens_ext.published.regions._BLOCK_BYTES", 4 * 50 * 7)
    rows = torch.nn.functional.normalize(torch.randn(50, 40, generator=torch.Generator().manual_seed(0)), dim=1)
    nearest = float((1 - rows @ rows.T + 2 * torch.eye(50)).min())
    check_separation(rows, nearest - 1e-3)
    with pytest.raises(ValueError, match="apart"):
        check_separation(rows, nearest + 1e-3)
    rows[41] = rows[17]
    with pytest.raises(ValueError, match="regions 17 and 41"):
        check_separation(rows, 0.01)


# --- files and downloads ---


def test_file_errors_are_clear(folder, tmp_path):
    path = foreign.write(folder, foreign.pickled(*foreign.make_state()))
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_published_dictionary(tmp_path / "none.pkl")
    with pytest.raises(ValueError, match="has SHA-256"):
        read_published_dictionary(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        read_published_dictionary(path, sha256="abc")
    with pytest.raises(ValueError, match="raise max_bytes"):
        read_published_dictionary(path, max_bytes=100)
    (tmp_path / "empty.pkl").touch()
    with pytest.raises(ValueError, match="0 bytes"):
        read_published_dictionary(tmp_path / "empty.pkl")
    unreadable = "not readable as JSON"
    for content, message in (("{", unreadable), ("[" * 10**5, unreadable), ("[]", "JSON object")):
        (folder / "gemma-2-2b_layer12_metadata.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_published_dictionary(path)
    with pytest.raises(ValueError, match="something else than names"):
        read_published_dictionary(path, metadata={"discovery_config": {"hook_name": ["x"]}})


def test_a_damaged_save_is_recognised(folder, tmp_path):
    path = foreign.write(folder, foreign.pickled(*foreign.make_state()))
    convert_published_dictionary(path, tmp_path / "a")
    content = json.loads((tmp_path / "a" / "published.json").read_text())
    (tmp_path / "a" / "published.json").write_text(json.dumps(content | {"n_regions": 11}))
    with pytest.raises(ValueError, match="do not belong together"):
        PublishedDictionary.load(tmp_path / "a")
    del content["prompts"]
    (tmp_path / "a" / "published.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks prompts"):
        PublishedDictionary.load(tmp_path / "a")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub client's cache as a download leaves it, and what the hub states about the file."""
    snapshot = (
        tmp_path / "cache" / "datasets--J-RUM--exemplar-partitioning" / "snapshots" / convert.PUBLISHED_REVISION / BUILD
    )
    snapshot.mkdir(parents=True)
    path = foreign.write(snapshot, foreign.pickled(*foreign.make_state()))
    (snapshot / "gemma-2-2b_layer12_metadata.json").write_text(json.dumps(metadata()))

    size, checksum = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    lfs = {"size": size, "oid": checksum, "pointerSize": 134}
    stated = RepoFile(path=f"{BUILD}/{path.name}", size=size, oid="0" * 40, lfs=lfs)
    asked = []

    def get_paths_info(self, repo_id, paths, *, revision, repo_type):
        asked.append((repo_id, paths, revision, repo_type))
        return [stated]

    monkeypatch.setattr("huggingface_hub.HfApi.get_paths_info", get_paths_info)
    return path, stated, asked


@pytest.mark.parametrize("source", [BUILD, f"{BUILD}/gemma-2-2b_layer12.pkl"])
def test_a_download_is_pinned_and_held_to_the_stated_checksum(hub, tmp_path, source):
    path, stated, asked = hub
    published = convert_published_dictionary(source, tmp_path / "out", cache_dir=tmp_path / "cache")
    assert asked == [
        (convert.PUBLISHED_REPO, [f"{BUILD}/gemma-2-2b_layer12.pkl"], convert.PUBLISHED_REVISION, "dataset")
    ]
    assert published.source["revision"] == convert.PUBLISHED_REVISION
    assert SAE.load_from_disk(str(tmp_path / "out")).cfg.metadata.published["repo_id"] == convert.PUBLISHED_REPO
    stated.lfs.sha256 = "1" * 64
    with pytest.raises(ValueError, match="has SHA-256"):
        convert_published_dictionary(source, tmp_path / "again", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "again").exists()


def test_a_download_refuses_what_is_not_pinned(hub, tmp_path):
    options = {"output": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    path, stated, asked = hub
    with pytest.raises(ValueError, match="revision must be a commit"):
        convert_published_dictionary(BUILD, revision="main", **options)
    with pytest.raises(FileNotFoundError, match="neither a file nor a build"):
        convert_published_dictionary("../../nothing/there", **options)
    with pytest.raises(ValueError, match="more than max_bytes=10"):
        convert_published_dictionary(BUILD, max_bytes=10, **options)
    stated.lfs = None
    with pytest.raises(ValueError, match="states no SHA-256"):
        convert_published_dictionary(BUILD, **options)
    asked.clear()
    convert_published_dictionary(BUILD, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **options)
    assert not asked
