"""Profiles against a double loop, whatever the dictionary, the batches and the file's fate."""

import math

import pytest
import torch
from sae_lens import (
    StandardSAE,
    StandardSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis import profiler as profile_module
from saelens_ext.analysis.profile import profile_dictionaries, profile_dictionary
from tests.analysis.profiled import (
    DICTIONARIES,
    HOOK,
    CutStream,
    D,
    K,
    assert_examples,
    assert_same,
    filled,
    integers,
    options,
    partition,
)


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


@pytest.mark.slow
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
