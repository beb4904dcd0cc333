"""What each readout and basis means, and exact membership."""

import importlib
import warnings

import pytest
import torch
from huggingface_hub import CommitInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.topk_sae import TopK

import saelens_ext
from saelens_ext import ExemplarPartition, ExemplarPartitionConfig
from tests.live_bytes import LiveBytes


def make(k: int = 20, d: int = 8, seed: int = 0, threshold: float = 0.6, **options) -> ExemplarPartition:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(2 * k, d, generator=generator), dim=1)
    return ExemplarPartition.from_regions(rows[:k], rows[k:], torch.randn(d, generator=generator), threshold, **options)


@pytest.fixture
def x() -> torch.Tensor:
    return 3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(1))


def cosines(dictionary, rows, x):
    offset = (x - dictionary.center).double()
    return (offset / offset.norm(dim=1, keepdim=True)) @ rows.double().T


@pytest.mark.parametrize("basis", ["exemplar", "mean"])
def test_readouts_against_their_formulas(x, basis):
    dictionary = make(basis=basis)
    rows = dictionary.exemplars if basis == "exemplar" else dictionary.means
    assert torch.equal(dictionary.W_dec, rows)
    z = ((x - dictionary.center).double() @ rows.double().T).float()
    cosine = cosines(dictionary, rows, x).float()
    nearest = torch.nn.functional.one_hot(cosine.argmax(1), 20).float()
    third = z.topk(3, dim=1).values[:, -1:]
    expected = {
        "projection": z,
        "cosine": cosine,
        "one_hot": nearest,
        "top_k": torch.where(z >= third, z, 0).relu(),
        "top_k_cosine": torch.where(z >= third, cosine, 0).relu(),
    }
    for readout, code in expected.items():
        assert torch.allclose(dictionary.with_readout(readout, k=3).encode(x), code, atol=1e-5), readout


@pytest.mark.parametrize("readout", ["top_k", "top_k_cosine", "one_hot", "projection", "cosine"])
def test_decode_is_affine(x, readout):
    dictionary = make(readout=readout)
    code = dictionary.encode(x)
    assert torch.allclose(dictionary.decode(code), code @ dictionary.W_dec + dictionary.center, atol=1e-6)


def test_assign_is_the_nearest_exemplar_whatever_the_basis_and_readout(x):
    for dictionary in (make(), make(basis="mean", readout="cosine")):
        cosine = cosines(dictionary, dictionary.exemplars, x)
        regions, distances = dictionary.assign(x)
        assert torch.equal(regions, cosine.argmax(1))
        assert torch.allclose(distances.double(), 1 - cosine.max(1).values, atol=1e-6)


def test_assign_keeps_the_leading_shape_and_rejects(x):
    dictionary = make(threshold=0.3)
    regions, distances = dictionary.assign(x.reshape(5, 10, 8), reject=True)
    assert regions.shape == distances.shape == (5, 10)
    assert torch.equal(regions == -1, distances > 0.3)
    assert 0 < int((regions == -1).sum()) < 50
    assert not bool((dictionary.assign(x).regions == -1).any())


def test_the_activation_at_the_centre(x):
    for readout in ("top_k", "top_k_cosine", "one_hot", "projection", "cosine"):
        dictionary = make(readout=readout)
        at_center = dictionary.center[None]
        assert not bool(dictionary.encode(at_center).any())
        assert torch.equal(dictionary(at_center), at_center)
        assert float(dictionary.assign(at_center).distances) == 1.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_membership_ignores_magnitude(seed, scale):
    dictionary = make(seed=seed)
    offset = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed + 1))
    one = dictionary.assign(dictionary.center + offset)
    other = dictionary.assign(dictionary.center + scale * offset)
    assert torch.allclose(one.distances, other.distances, atol=2e-5 * max(1, 1 / scale))
    gap = (
        cosines(dictionary, dictionary.exemplars, dictionary.center + offset)
        .topk(2, dim=1)
        .values.diff(dim=1)
        .abs()[:, 0]
    )
    assert torch.equal(one.regions[gap > 1e-3], other.regions[gap > 1e-3])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 50))
def test_every_point_on_an_exemplars_ray_is_a_fixed_point(seed, radius):
    dictionary = make(seed=seed)
    x = dictionary.center + radius * dictionary.exemplars
    assert torch.allclose(dictionary(x), x, atol=1e-4 * max(1, radius))


def test_activation_function_is_the_hosts_top_k_where_it_is_true():
    assert isinstance(make(k=20).activation_fn, TopK)
    assert not isinstance(make(readout="cosine").activation_fn, TopK)


def test_activation_norm_fold_is_exact(x):
    scale = 2.5
    dictionary = make(metadata={"typical_norm": 5.0})
    before = dictionary(x * scale) / scale
    dictionary.fold_activation_norm_scaling_factor(scale)
    assert torch.allclose(dictionary(x), before, atol=1e-5)
    assert dictionary.cfg.metadata.typical_norm == 2.0
    with pytest.raises(NotImplementedError, match="with_readout"):
        make(readout="cosine").fold_activation_norm_scaling_factor(scale)


def test_with_readout_leaves_the_original(x):
    dictionary = make()
    other = dictionary.with_readout("cosine", basis="mean")
    assert dictionary.cfg.readout == "top_k" and other.cfg.readout == "cosine"
    assert torch.equal(other.means, dictionary.means) and torch.equal(other.exemplars, dictionary.exemplars)
    assert torch.equal(other.W_dec, dictionary.means)
    assert torch.equal(dictionary.W_dec, dictionary.exemplars)


def test_round_trip_keeps_assignments_exactly(x, tmp_path):
    dictionary = make(basis="mean")
    dictionary.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert torch.equal(loaded.assign(x).regions, dictionary.assign(x).regions)
    assert torch.equal(loaded.assign(x).distances, dictionary.assign(x).distances)


@pytest.mark.slow
def test_assign_does_not_copy_a_large_input():
    dictionary = make(k=2000, d=64)
    x = torch.randn(400_000, 64, generator=torch.Generator().manual_seed(1))
    with LiveBytes() as live:
        dictionary.assign(x)
    # Views of the input count as the input does; 400,000 x 2,000 similarities would be 3.2 GB.
    assert x.nbytes < live.most < x.nbytes + 2**26


@pytest.mark.parametrize(
    "change, message",
    [
        ({"threshold": 0.0}, r"threshold must lie in \(0, 2\]"),
        ({"threshold": 2.5}, r"threshold must lie in \(0, 2\]"),
        ({"threshold": float("nan")}, "threshold must be a finite number, got nan"),
        ({"percentile": 100.0}, r"percentile must lie in \(0, 100\)"),
        ({"basis": "median"}, "basis must be one of 'exemplar', 'mean'"),
        ({"readout": "one_hto"}, "Did you mean 'one_hot'"),
        ({"k": 0}, "k must be a whole number"),
        ({"k": 21}, "k must be at most the number of regions, 20"),
        ({"d_in": 0}, "d_in must be a whole number"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input must be True"),
        ({"normalize_activations": "layer_norm"}, "has no meaning here"),
    ],
)
def test_bad_configs_are_clear_errors(change, message):
    with pytest.raises(ValueError, match=message):
        ExemplarPartitionConfig(**({"d_in": 8, "d_sae": 20, "threshold": 0.5} | change))


def test_rows_that_are_not_exemplars_are_refused():
    rows = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    with pytest.raises(ValueError, match="unit directions"):
        ExemplarPartition.from_regions(2 * rows, rows, torch.zeros(4), 0.5)
    with pytest.raises(ValueError, match="non-finite"):
        ExemplarPartition.from_regions(rows, rows * float("nan"), torch.zeros(4), 0.5)
    with pytest.raises(ValueError, match="k of at"):
        ExemplarPartition.from_regions(rows[:0], rows[:0], torch.zeros(4), 0.5)


def test_non_finite_activations_are_refused(x):
    x[3, 2] = float("inf")
    with pytest.raises(ValueError, match="non-finite.*row 3"):
        make().assign(x)


def test_import_twice_and_reload():
    importlib.reload(saelens_ext)
    assert SAE_CLASS_REGISTRY["exemplar_partition"][0].__name__ == "ExemplarPartition"


def test_a_foreign_class_under_our_name_is_an_error(monkeypatch):
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "exemplar_partition", SAE_CLASS_REGISTRY["standard"])
    with pytest.raises(ValueError, match="registered by another package"):
        importlib.reload(saelens_ext)
    with warnings.catch_warnings():
        warnings.simplefilter("error")


def test_the_hosts_uploader_accepts_it(tmp_path, monkeypatch):
    from sae_lens.training import upload_saes_to_huggingface as host

    uploaded = {}

    def upload_folder(self, folder_path, path_in_repo, **options):
        uploaded[path_in_repo] = SAE.load_from_disk(folder_path)
        return CommitInfo("https://huggingface.co/someone/something/commit/0", "", "", "0")

    monkeypatch.setattr(host, "_repo_exists", lambda api, repo: True)
    monkeypatch.setattr(host.HfApi, "upload_folder", upload_folder)
    host.upload_saes_to_huggingface(
        {"layer_1": make()}, "someone/something", add_default_readme=False, show_progress=False
    )
    assert isinstance(uploaded["layer_1"], ExemplarPartition)
