"""Profiles against a double loop, whatever the dictionary, the batches and the file's fate."""

import contextlib
import json
import math
import os
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.analysis import profile as profile_module
from saelens_ext.analysis.profile import DictionaryProfile, profile_dictionaries, profile_dictionary
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition

D, K, HOOK = 6, 12, "blocks.0.hook_out"
TENSORS = ("counts", "mean_activation", "max_activation", "coherence", "mean_distance", "max_distance")


class CutStream(ActivationStream):
    """Given rows as a stream, cut into batches of any number of rows."""

    max_tokens = model = None

    def __init__(self, x: torch.Tensor, rows: int = 1000, window: int = 9, hook_name: str = HOOK):
        n, self.rows = len(x), rows
        self.hook_names = self.requested_hook_names = (hook_name,)
        sequence_ids, positions = torch.arange(n) // window, torch.arange(n) % window + 1
        windows = torch.full((int(sequence_ids[-1]) + 1, window + 1), -1)
        windows[:, 0] = 1
        windows[sequence_ids, positions] = token_ids = 100 + torch.arange(n) * 7 % 50
        self.columns = {
            "token_ids": token_ids,
            "sequence_ids": sequence_ids,
            "positions": positions,
            "document_ids": sequence_ids // 2,
        }
        self.x, self.windows = x, windows

    def __iter__(self):
        for rows in torch.arange(len(self.x)).split(self.rows):
            columns = {name: column[rows] for name, column in self.columns.items()}
            yield ActivationBatch(
                activations={self.hook_names[0]: self.x[rows]}, windows=self.windows, first_sequence_id=0, **columns
            )

    def describe(self):
        return {}


def integers(*shape: int, low: int = -4, high: int = 5, seed: int = 0) -> torch.Tensor:
    """Small whole numbers: products of them are exact in any order, and ties are many."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


class Regions(StandardSAE):
    """A dictionary with regions that knows no centre: the nearest of its rows by dot product."""

    def assign(self, x):
        best = (x @ self.W_dec.T).max(dim=1)
        regions = torch.where(best.values < -2, -1, best.indices)
        return SimpleNamespace(regions=regions, distances=10 - best.values).__dict__.values()


def filled(sae: SAE, seed: int = 3) -> SAE:
    with torch.no_grad():
        for i, parameter in enumerate(sae.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=seed + i))
    return sae


def options(**extra):
    metadata = SAEMetadata(hook_name=HOOK, model_name="tiny")
    return {"d_in": D, "d_sae": K, "metadata": metadata, **extra}


def partition(**extra) -> ExemplarPartition:
    rows = torch.nn.functional.normalize(torch.randn(2 * K, D, generator=torch.Generator().manual_seed(5)), dim=1)
    return ExemplarPartition.from_regions(rows[:K], rows[K:], torch.ones(D), 0.9, metadata={"hook_name": HOOK}, **extra)


DICTIONARIES = {
    "standard": lambda: filled(StandardSAE(StandardSAEConfig(**options()))),
    "standard_normalised": lambda: filled(
        StandardSAE(StandardSAEConfig(**options(normalize_activations="layer_norm")))
    ),
    "topk": lambda: filled(TopKSAE(TopKSAEConfig(**options(k=3)))),
    "jumprelu": lambda: filled(JumpReLUSAE(JumpReLUSAEConfig(**options()))),
    "transcoder": lambda: filled(Transcoder(TranscoderConfig(**options(d_out=5, apply_b_dec_to_input=False)))),
    "regions": lambda: filled(Regions(StandardSAEConfig(**options()))),
    "partition": partition,
    "partition_signed": lambda: partition(readout="cosine", basis="mean"),
}


def expected_context(stream: CutStream, row: int, context: int) -> list[int]:
    window, position = (
        stream.windows[stream.columns["sequence_ids"][row]].tolist(),
        int(stream.columns["positions"][row]),
    )
    return [window[j] if 0 <= j < len(window) else -1 for j in range(position - context, position + context + 1)]


def assert_examples(examples, stream, ranked: list[list[tuple[float, int]]], n: int, context: int) -> None:
    """``ranked[j]``: (value, row) of latent j in the order expected."""
    for j, rows in enumerate(ranked):
        rows = rows[:n]
        assert torch.allclose(examples.values[j, : len(rows)], torch.tensor([value for value, _ in rows]), atol=1e-5)
        assert examples.values[j, len(rows) :].isnan().all() and examples.values.shape[1] == n
        for name in ("token_ids", "document_ids", "positions"):
            expected = [int(stream.columns[name][row]) for _, row in rows] + [-1] * (n - len(rows))
            assert getattr(examples, name)[j].tolist() == expected, (name, j)
        contexts = [expected_context(stream, row, context) for _, row in rows]
        contexts += [[-1] * (2 * context + 1)] * (n - len(rows))
        assert examples.contexts[j].tolist() == contexts


@pytest.mark.parametrize("name", DICTIONARIES)
def test_profile_is_that_of_a_double_loop(name, monkeypatch):
    monkeypatch.setattr(profile_module, "_CODES_PER_BLOCK", 16 * K)
    sae, stream = DICTIONARIES[name](), CutStream(integers(150, D, seed=9), rows=11)
    profile = profile_dictionary(sae, stream, n_examples=4, n_boundary=3, context=3)
    with torch.no_grad():
        codes = sae.encode(stream.x)
        regions, distances = sae.assign(stream.x) if hasattr(sae, "assign") else (None, None)
    assert profile.n_activations == 150 and profile.d_sae == K
    active = [[(float(codes[i, j]), i) for i in range(150) if codes[i, j] != 0] for j in range(K)]
    for j in range(K):
        values = [value for value, _ in active[j]]
        assert math.isclose(profile.mean_activation[j], sum(values) / len(values) if values else 0, abs_tol=1e-5)
        assert math.isclose(profile.max_activation[j], max(values, default=0), abs_tol=1e-5)
    if regions is None:
        members = active
        assert_examples(
            profile.top, stream, [sorted(rows, key=lambda pair: (-pair[0], pair[1])) for rows in active], 4, 3
        )
        assert profile.boundary is None and profile.coherence is None and profile.mean_distance is None
        assert profile.n_unassigned == 0 and profile.latent_names[1] == "latent 1"
    else:
        members = [[(float(distances[i]), i) for i in range(150) if regions[i] == j] for j in range(K)]
        assert_examples(profile.top, stream, [sorted(rows) for rows in members], 4, 3)
        assert_examples(
            profile.boundary, stream, [sorted(rows, key=lambda pair: (-pair[0], pair[1])) for rows in members], 3, 3
        )
        for j, rows in enumerate(members):
            expected = (sum(v for v, _ in rows) / len(rows), max(rows)[0]) if rows else (math.nan, math.nan)
            found = torch.stack([profile.mean_distance[j], profile.max_distance[j]])
            assert torch.allclose(found, torch.tensor(expected), atol=1e-5, equal_nan=True)
        assert profile.n_unassigned == 150 - sum(map(len, members))
        assert profile.latent_names[1] == "region 1"
    assert profile.counts.tolist() == [len(rows) for rows in members]
    assert sum(map(bool, members)) > 3, "the oracle has seen too little"


def test_coherence_is_the_length_of_the_mean_direction():
    sae, stream = partition(), CutStream(integers(150, D, seed=9))
    profile = profile_dictionary(sae, stream)
    directions = torch.nn.functional.normalize((stream.x - sae.center).double(), dim=1)
    for j in range(K):
        mean = directions[sae.assign(stream.x).regions == j].mean(dim=0).norm()
        assert torch.allclose(profile.coherence[j], mean.float(), atol=1e-6, equal_nan=True)


def test_an_activation_at_the_centre_is_a_member_of_no_region():
    sae = partition()
    x = integers(40, D, seed=2)
    x[[3, 17]] = sae.center.detach()
    profile = profile_dictionary(sae, CutStream(x))
    assert profile.n_unassigned == 2 and int(profile.counts.sum()) == 38
    assert profile_dictionary(DICTIONARIES["regions"](), CutStream(x)).coherence is None


def assert_same(left: DictionaryProfile, right: DictionaryProfile) -> None:
    for field in fields(DictionaryProfile):
        a, b = getattr(left, field.name), getattr(right, field.name)
        pairs = [(a, b)]
        if field.name in ("top", "boundary") and a is not None:
            pairs = [(getattr(a, part.name), getattr(b, part.name)) for part in fields(a)]
        for one, other in pairs:
            if isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype and torch.equal(one.nan_to_num(-9), other.nan_to_num(-9)), field.name
            else:
                assert one == other, field.name


@pytest.mark.parametrize("name", ["standard", "topk", "partition", "partition_signed"])
def test_batches_change_nothing(name, monkeypatch):
    monkeypatch.setattr(profile_module, "_CODES_PER_BLOCK", 100 * K)
    sae, x = DICTIONARIES[name](), torch.randn(530, D, generator=torch.Generator().manual_seed(0))
    whole = profile_dictionary(sae, CutStream(x, 530))
    for rows in (1, 7, 99, 100, 256):
        assert_same(profile_dictionary(sae, CutStream(x, rows)), whole)


def test_of_equal_examples_the_first_in_the_stream_stay():
    sae = DICTIONARIES["standard"]()
    profile = profile_dictionary(sae, CutStream(integers(1, D, seed=9).expand(60, D), rows=13), n_examples=5, context=0)
    j = int(profile.counts.argmax())
    assert profile.top.positions[j].tolist() == [1, 2, 3, 4, 5] and profile.top.document_ids[j].tolist() == [0] * 5


def test_memory_is_bounded_for_many_latents(monkeypatch):
    sae = StandardSAE(StandardSAEConfig(d_in=4, d_sae=65_536, metadata=SAEMetadata(hook_name=HOOK)))
    sizes = []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: sizes.append(len(x)) or encode(x))
    profile = profile_dictionary(sae, CutStream(torch.randn(130, 4)), n_examples=2, context=2)
    assert max(sizes) * 65_536 <= 2**22 and sum(sizes) == 130
    assert profile.top.contexts.shape == (65_536, 2, 5)


def test_a_hook_z_sae_takes_flat_rows_and_is_left_as_it_was():
    hook = "blocks.0.attn.hook_z"
    cfg = StandardSAEConfig(d_in=D, d_sae=K, reshape_activations="hook_z", metadata=SAEMetadata(hook_name=hook))
    sae = filled(StandardSAE(cfg))
    plain = filled(StandardSAE(StandardSAEConfig(**options())))
    x = integers(30, D, seed=4)
    assert torch.equal(
        profile_dictionary(sae, CutStream(x, hook_name=hook)).counts, profile_dictionary(plain, CutStream(x)).counts
    )
    assert sae.hook_z_reshaping_mode
    assert torch.equal(sae(x.reshape(1, 30, 2, 3)).reshape(30, D), plain(x))


def test_a_bfloat16_dictionary_is_profiled():
    profile = profile_dictionary(DICTIONARIES["standard"]().to(torch.bfloat16), CutStream(integers(30, D).bfloat16()))
    assert int(profile.counts.sum()) > 0 and profile.top.values.dtype == torch.float32


def test_the_dictionary_is_left_as_it_is():
    sae = DICTIONARIES["standard"]()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.train()
    profile_dictionary(sae, CutStream(integers(30, D)))
    assert sae.training and all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    assert torch.is_grad_enabled()


# --- on a model ---


@pytest.mark.parametrize("model_name", ["tiny_bridge", "tiny_hooked"])
def test_on_a_model_with_the_dictionarys_own_name_for_the_hook(model_name, tiny_texts, request):
    model = request.getfixturevalue(model_name)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=40, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post")))
    stream = ActivationStream(
        model, tiny_texts, "blocks.1.hook_resid_post", context_size=16, batch_size=4, max_tokens=300
    )
    profile = profile_dictionary(sae, stream, n_examples=3, context=2)
    x = torch.cat([batch.activations["blocks.1.hook_resid_post"] for batch in stream])
    with torch.no_grad():
        codes = sae.encode(x)
    assert profile.counts.tolist() == (codes != 0).sum(0).tolist()
    largest = codes.sort(dim=0, descending=True, stable=True)
    full = profile.counts >= 3
    assert torch.allclose(profile.top.values[full], largest.values[:3].T[full], atol=1e-4)
    tokens = torch.cat([batch.token_ids for batch in stream])
    assert torch.equal(profile.top.token_ids[full], tokens[largest.indices[:3].T[full]])
    assert torch.equal(profile.top.contexts[full][:, :, 2].long(), profile.top.token_ids[full])
    assert profile.hook_name == "blocks.1.hook_resid_post"


def test_a_stream_over_several_hooks_gives_the_dictionarys(tiny_bridge, tiny_texts):
    stream = ActivationStream(
        tiny_bridge, tiny_texts, ["blocks.0.hook_out", "blocks.1.hook_out"], context_size=16, max_tokens=100
    )
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=40, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post")))
    assert profile_dictionary(sae, stream).hook_name == "blocks.1.hook_out"
    assert profile_dictionary(sae, stream, hook_name="blocks.0.hook_out").hook_name == "blocks.0.hook_out"
    assert profile_dictionary(sae, stream, hook_name="blocks.0.hook_resid_post").hook_name == "blocks.0.hook_out"
    sae.cfg.metadata.hook_name = "blocks.2.hook_out"
    with pytest.raises(ValueError, match="does not read"):
        profile_dictionary(sae, stream)
    sae.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match="names no hook"):
        profile_dictionary(sae, stream)


def test_several_dictionaries_in_one_pass(tiny_bridge, tiny_texts, monkeypatch):
    stream = ActivationStream(
        tiny_bridge, tiny_texts, ["blocks.0.hook_out", "blocks.1.hook_out"], context_size=16, max_tokens=200
    )
    saes = [
        StandardSAE(StandardSAEConfig(d_in=32, d_sae=k, metadata=SAEMetadata(hook_name=f"blocks.{layer}.hook_out")))
        for k, layer in ((8, 1), (40, 0), (24, 1))
    ]
    alone, passes = [profile_dictionary(sae, stream, n_examples=3) for sae in saes], []
    monkeypatch.setattr(
        ActivationStream, "__iter__", lambda self, inner=ActivationStream.__iter__: passes.append(1) or inner(self)
    )
    for one, other in zip(profile_dictionaries(saes, stream, n_examples=3), alone, strict=True):
        assert_same(one, other)
    assert passes == [1]
    with pytest.raises(ValueError, match="empty"):
        profile_dictionaries([], stream)


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :4], "last dimension must be 6"),
        (lambda x: x.index_fill(0, torch.tensor([7]), torch.nan), "non-finite"),
        (lambda x: x.index_fill(0, torch.tensor([7]), torch.inf), "non-finite"),
        (lambda x: x * 1e38, "non-finite"),
    ],
)
def test_bad_activations(change, message):
    for name in ("standard", "partition"):
        if name == "partition" and message == "non-finite" and change(torch.ones(9, D)).isfinite().all():
            continue
        with pytest.raises(ValueError, match=message):
            profile_dictionary(DICTIONARIES[name](), CutStream(change(integers(30, D))))


@pytest.mark.parametrize("bad", [{"n_examples": 0}, {"n_boundary": -1}, {"context": -1}])
def test_bad_options(bad):
    with pytest.raises(ValueError):
        profile_dictionary(DICTIONARIES["standard"](), CutStream(integers(30, D)), **bad)


def test_a_sae_over_whole_sequences_is_refused():
    sae = DICTIONARIES["standard"]()
    sae.cfg.architecture = lambda: "temporal"
    with pytest.raises(ValueError, match="token by token"):
        profile_dictionary(sae, CutStream(integers(30, D)))


# --- tables and files ---


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


@pytest.mark.parametrize("failing", range(1, 5))
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
    header = {"kind": profile_module.KIND, "save_id": save_id}
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
