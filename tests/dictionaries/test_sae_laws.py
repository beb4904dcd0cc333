"""Laws that SAELens holds every SAE to, for every dictionary of this package: one table, one suite."""

import json
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import CommitInfo
from sae_lens import SAE, ActivationsStore, run_evals
from sae_lens.evals import get_eval_everything_config
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training import upload_saes_to_huggingface as uploader
from sae_lens.training.activation_scaler import ActivationScaler

from saelens_ext import ExemplarPartition, SNMFDictionary, retarget
from saelens_ext.dictionaries.decoder_only import DecoderOnlySAE

D_IN, D_SAE = 32, 24
HOOK_POINTS = [
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_output",
    "hook_sae_error",
]


def unit_rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def partition(**options) -> Callable[..., ExemplarPartition]:
    def make(d_in: int = D_IN, **metadata) -> ExemplarPartition:
        center = torch.randn(d_in, generator=torch.Generator().manual_seed(2))
        return ExemplarPartition.from_regions(
            unit_rows(D_SAE, d_in, 0),
            unit_rows(D_SAE, d_in, 1),
            center,
            0.7,
            percentile=8.0,
            metadata=metadata,
            **options,
        )

    return make


def snmf(**options) -> Callable[..., SNMFDictionary]:
    def make(d_in: int = D_IN, **metadata) -> SNMFDictionary:
        generator = torch.Generator().manual_seed(5)
        features = (
            3 * torch.randn(D_SAE, d_in, generator=generator) * (torch.rand(D_SAE, d_in, generator=generator) < 0.3)
        )
        if options.get("dead"):
            features[7] = 0
        dictionary = SNMFDictionary.from_features(features, metadata=metadata)
        if options.get("origin"):
            dictionary.b_dec.data.normal_(generator=generator)
        return dictionary

    return make


PARTITIONS = {
    "top_k": partition(),
    "top_k=3": partition(k=3),
    "top_k_mean": partition(basis="mean"),
    "top_k_cosine": partition(readout="top_k_cosine", k=2),
    "one_hot": partition(readout="one_hot"),
    "projection": partition(readout="projection"),
    "projection_mean": partition(readout="projection", basis="mean"),
    "cosine": partition(readout="cosine"),
}
DICTIONARIES = PARTITIONS | {"snmf": snmf(), "snmf_dead": snmf(dead=True), "snmf_about_an_origin": snmf(origin=True)}
# A field of each config that a saved one always holds.
OWN_KEY = {"exemplar_partition": ("readout", "readuot"), "snmf": ("sparsity", "sparstiy")}


@pytest.fixture(params=DICTIONARIES)
def make(request) -> Callable[..., DecoderOnlySAE]:
    return DICTIONARIES[request.param]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 7, D_IN, generator=torch.Generator().manual_seed(3))


def test_forward_is_decode_of_encode(make, x):
    sae = make()
    assert sae.encode(x).shape == (5, 7, D_SAE)
    assert torch.equal(sae(x), sae.decode(sae.encode(x)))
    assert sae(x).shape == x.shape


def test_encode_does_not_depend_on_leading_shape(make, x):
    sae = make()
    assert torch.allclose(sae.encode(x).reshape(-1, D_SAE), sae.encode(x.reshape(-1, D_IN)), atol=1e-6)


def test_all_hook_points_fire(make, x):
    sae = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        sae.use_error_term = True
    _, cache = sae.run_with_cache(x)
    assert set(HOOK_POINTS) <= set(cache.keys())
    assert torch.equal(cache["hook_sae_acts_post"], sae.encode(x))


def test_error_term_makes_the_output_the_input(make, x):
    sae = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        sae.use_error_term = True
    assert torch.allclose(sae(x), x, atol=1e-5)


def test_an_intervention_on_a_code_reaches_the_output(make, x):
    sae = make()
    changed = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda code, hook: torch.zeros_like(code))])
    assert torch.allclose(changed, sae.b_dec.expand_as(x))


def test_encoder_is_a_view_of_the_decoder(make):
    sae = make()
    assert sae.W_enc.shape == (D_IN, D_SAE)
    assert sae.W_enc.data_ptr() == sae.W_dec.data_ptr()
    assert "W_enc" not in sae.state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_through_the_host_loader(make, x, tmp_path, dtype):
    sae = make(hook_name="blocks.1.hook_out").to(getattr(torch, dtype))
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sae)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and loaded.state_dict()[name].dtype == getattr(
            torch, dtype
        )
    assert torch.equal(loaded.encode(x), sae.encode(x))


def test_load_in_another_dtype(make, x, tmp_path):
    sae = make()
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert loaded.cfg.dtype == "bfloat16" and loaded.W_dec.dtype == torch.bfloat16
    assert loaded(x).dtype == torch.bfloat16


def test_from_dict_gives_our_class(make):
    sae = make()
    assert type(SAE.from_dict(sae.cfg.to_dict())) is type(sae)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casts_update_the_config(make, x, cast):
    sae = getattr(make(), cast)()
    assert sae.cfg.dtype == str(sae.W_dec.dtype).removeprefix("torch.")
    assert sae(x).dtype == sae.W_dec.dtype


def test_config_is_json_and_takes_further_attributes(make):
    sae = make(context_size=128)
    sae.cfg.model_name = "written here by an evaluation harness"
    assert json.loads(json.dumps(sae.cfg.to_dict()))["architecture"] == sae.cfg.architecture()


def test_folding_decoder_norms_leaves_the_reconstruction(make, x):
    sae = make()
    codes, reconstruction, rows = sae.encode(x), sae(x), sae.W_dec.detach().clone()
    norms = sae.fold_and_get_W_dec_norm()
    alive = rows.any(dim=1)
    assert torch.allclose(sae.W_dec.norm(dim=1)[alive], torch.ones(int(alive.sum())), atol=1e-5)
    assert torch.equal(sae.W_dec[~alive], rows[~alive])
    assert torch.allclose(sae.W_dec * norms[:, None], rows, atol=1e-5)
    assert torch.allclose(sae(x), reconstruction, atol=1e-4)
    # A code in units of its feature grows by the feature's norm; one that is no multiple of it has unit features
    # anyway. Both are optimal to the tolerance of the solver, which leaves codes a few 1e-4 of freedom.
    assert torch.allclose(sae.encode(x), codes * norms, atol=1e-3)
    sae.fold_W_dec_norm()
    assert torch.allclose(sae(x), reconstruction, atol=1e-4)


@pytest.mark.parametrize("name", PARTITIONS)
def test_folding_the_norms_of_unit_rows_changes_no_bit(name, x):
    sae = PARTITIONS[name]()
    before = sae.encode(x), sae(x)
    sae.fold_W_dec_norm()
    assert torch.equal(sae.encode(x), before[0]) and torch.equal(sae(x), before[1])


@pytest.mark.parametrize("name", ["top_k", "projection", "snmf", "snmf_about_an_origin"])
def test_folding_the_activation_scale_is_exact(name, x):
    scale = 2.5
    sae = DICTIONARIES[name](typical_norm=5.0)
    sae.cfg.normalize_activations = "expected_average_only_in"
    before = sae(x * scale) / scale
    sae.fold_activation_norm_scaling_factor(scale)
    assert torch.allclose(sae(x), before, atol=1e-4)
    assert sae.cfg.metadata.typical_norm == 2.0 and sae.cfg.normalize_activations == "none"


def test_whitening_fold_is_refused(make):
    with pytest.raises(NotImplementedError, match="not linear"):
        make().fold_activation_whitening(torch.zeros(D_IN), torch.eye(D_IN), torch.eye(D_IN))


def test_gradients_reach_the_activation(make, x):
    sae = make()
    if getattr(sae.cfg, "readout", None) == "one_hot":
        pytest.skip("a one-hot code is piecewise constant")
    x = x.clone().requires_grad_()
    sae(x).square().sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_hook_z_reshaping(make):
    sae = make(hook_name="blocks.1.attn.hook_z")
    z = torch.randn(2, 3, 4, D_IN // 4, generator=torch.Generator().manual_seed(4))
    flat = sae(z.flatten(-2))
    sae.turn_on_forward_pass_hook_z_reshaping()
    assert sae.encode(z).shape == (2, 3, D_SAE)
    assert torch.allclose(sae(z).flatten(-2), flat, atol=1e-6)


def test_wrong_width_is_a_clear_error(make):
    with pytest.raises(ValueError, match="last dimension must be 32"):
        make().encode(torch.randn(4, D_IN + 1))
    with pytest.raises(ValueError, match="last dimension must be 24"):
        make().decode(torch.randn(4, D_SAE + 1))


@pytest.mark.parametrize("host", ["tiny_hooked", "tiny_bridge"])
def test_attached_with_error_term_the_model_is_unchanged(make, host, request):
    model = request.getfixturevalue(host)
    sae = retarget(make(hook_name="blocks.1.hook_out"), model)
    tokens = torch.arange(3, 15).reshape(2, 6)
    plain = model(tokens)
    with model.saes([sae], use_error_term=True):
        assert torch.allclose(model(tokens), plain, atol=1e-4)
    with model.saes([sae]):
        assert not torch.allclose(model(tokens), plain, atol=1e-2)
    assert torch.equal(model(tokens), plain)


@pytest.mark.parametrize("host", ["tiny_hooked", "tiny_bridge"])
def test_codes_are_cached_inside_a_forward_pass(make, host, request):
    model = request.getfixturevalue(host)
    sae = retarget(make(hook_name="blocks.1.hook_out"), model)
    name = sae.cfg.metadata.hook_name
    tokens = torch.arange(3, 15).reshape(2, 6)
    _, plain = model.run_with_cache(tokens, names_filter=[name])
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    assert torch.allclose(cache[f"{name}.hook_sae_acts_post"], sae.encode(plain[name]), atol=1e-5)


def evaluate(sae: SAE, model, texts: list[str]) -> dict:
    store = ActivationsStore.from_sae(
        model,
        sae,
        Dataset.from_dict({"text": texts}),
        streaming=False,
        store_batch_size_prompts=4,
        train_batch_size_tokens=16,
        n_batches_in_buffer=2,
        total_tokens=16,
        device="cpu",
    )
    config = get_eval_everything_config(batch_size_prompts=4, n_eval_reconstruction_batches=2)
    metrics, features = run_evals(sae, store, model, ActivationScaler(), config)
    return {f"{group}/{name}": value for group, values in metrics.items() for name, value in values.items()} | {
        name: torch.tensor(values).nan_to_num().sum().item() for name, values in features.items()
    }


@pytest.mark.parametrize("name", ["top_k", "projection", "snmf"])
def test_the_hosts_own_evals_agree_on_both_model_classes(name, tiny_hooked, tiny_bridge, tiny_texts):
    metadata = {"hook_name": "blocks.1.hook_out", "context_size": 16, "prepend_bos": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = [
            evaluate(retarget(DICTIONARIES[name](**metadata), model), model, tiny_texts)
            for model in (tiny_hooked, tiny_bridge)
        ]
    assert figures[0].keys() == figures[1].keys()
    for key, value in figures[0].items():
        assert value == pytest.approx(figures[1][key], rel=1e-3, abs=1e-4), key


def test_an_interrupted_save_leaves_the_previous_file_whole(make, x, tmp_path, monkeypatch):
    sae = make()
    sae.save_model(tmp_path)
    expected = sae.encode(x)

    def fail(*args, **kwargs):
        args[1].write_bytes(b"half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr("saelens_ext._files.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        sae.save_model(tmp_path)
    assert torch.equal(SAE.load_from_disk(tmp_path).encode(x), expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_a_config_that_cannot_be_written_changes_no_file(make, x, tmp_path):
    sae = make()
    sae.save_model(tmp_path)
    expected = sae.encode(x)
    other = make()
    other.W_dec.data = other.W_dec.data.flip(0)
    other.cfg.metadata.note = object()
    with pytest.raises(ValueError, match=r"\['metadata'\]\['note'\] is <object .* cannot be written into a JSON file"):
        other.save_model(tmp_path)
    assert torch.equal(SAE.load_from_disk(tmp_path).encode(x), expected)


def test_a_config_takes_the_numbers_paths_and_dtypes_of_libraries(make, tmp_path):
    sae = make()
    given = sae.cfg.to_dict() | {
        "d_in": np.int64(sae.cfg.d_in),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "metadata": {"dataset_path": tmp_path, "share": np.float32(0.5), "ids": torch.tensor([1, 2])},
    }
    config = type(sae.cfg).from_dict(given)
    assert (config.dtype, config.device) == ("float32", "cpu") and type(config.d_in) is int
    assert config.metadata.dataset_path == str(tmp_path) and config.metadata.ids == [1, 2]
    sae.cfg.metadata.model_dtype, sae.cfg.metadata.note = torch.bfloat16, tmp_path  # set later
    sae.save_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path).cfg.metadata
    assert (saved.model_dtype, saved.note) == ("bfloat16", str(tmp_path))
    for name, value in {"d_in": "wide", "dtype": None, "metadata": {"x": {1, object()}}}.items():
        with pytest.raises(ValueError, match=name):
            type(sae.cfg).from_dict(given | {name: value})


def test_truncated_and_foreign_files(make, tmp_path):
    sae = make()
    weights, config = sae.save_model(tmp_path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or not ours"):
        type(sae).load_from_disk(tmp_path)
    weights.write_bytes(whole)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architecture": "standard"}))
    with pytest.raises(ValueError, match="architecture 'standard'"):
        type(sae).load_from_disk(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        type(sae).load_from_disk(tmp_path)
    with pytest.raises(FileNotFoundError):
        type(sae).load_from_disk(tmp_path / "nowhere")


def test_a_misspelt_key_is_an_error_on_every_path(make, tmp_path):
    sae = make()
    misspelt = sae.cfg.to_dict()
    key, wrong = OWN_KEY[sae.cfg.architecture()]
    misspelt[wrong] = misspelt.pop(key)
    with pytest.raises(ValueError, match=f"Did you mean '{key}'"):
        type(sae.cfg).from_dict(misspelt)
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        SAE.from_dict(misspelt)


def test_a_newer_format_is_an_error(make):
    with pytest.raises(ValueError, match="upgrade"):
        SAE.from_dict(make().cfg.to_dict() | {"format_version": 99})


def test_weights_of_another_shape_are_an_error(make, tmp_path):
    sae = make()
    _, config = sae.save_model(tmp_path)
    config.write_text(config.read_text().replace(f'"d_sae": {D_SAE}', f'"d_sae": {D_SAE + 1}'))
    with pytest.raises(ValueError, match="The weights of .* have shapes"):
        SAE.load_from_disk(tmp_path)


def test_the_hosts_uploader_accepts_it(make, monkeypatch):
    uploaded = {}

    def upload_folder(self, folder_path, path_in_repo, **options):
        uploaded[path_in_repo] = SAE.load_from_disk(folder_path)
        return CommitInfo("https://huggingface.co/someone/something/commit/0", "", "", "0")

    monkeypatch.setattr(uploader, "_repo_exists", lambda api, repo: True)
    monkeypatch.setattr(uploader.HfApi, "upload_folder", upload_folder)
    sae = make()
    uploader.upload_saes_to_huggingface(
        {"layer_1": sae}, "someone/something", add_default_readme=False, show_progress=False
    )
    assert type(uploaded["layer_1"]) is type(sae) and torch.equal(uploaded["layer_1"].W_dec, sae.W_dec)


def test_metadata_survives(make, tmp_path):
    sae = make(model_name="tiny", typical_norm=3.5)
    sae.save_model(tmp_path)
    assert SAE.load_from_disk(tmp_path).cfg.metadata == SAEMetadata(**sae.cfg.metadata.to_dict())
