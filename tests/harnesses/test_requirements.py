"""What harnesses that run in environments of their own do to a SAE, done to the dictionaries of this package.

Each test names the place in the harness's source. The scripts beside this file run the harnesses themselves.
"""

import json

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopK

from saelens_ext import ExemplarPartition, SNMFDictionary

D_IN, D_SAE = 16, 12


def unit_rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)), dim=1)


def metadata() -> dict:
    return {"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2", "context_size": 8, "prepend_bos": True}


def partition(**options) -> ExemplarPartition:
    return ExemplarPartition.from_regions(
        unit_rows(D_SAE), unit_rows(D_SAE, 1), torch.ones(D_IN), 0.7, metadata=metadata(), **options
    )


def neurons() -> SNMFDictionary:
    features = 3 * torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(5))
    return SNMFDictionary.from_features(features, metadata=metadata())


MAKERS = {"top_k": lambda: partition(k=3), "one_hot": lambda: partition(readout="one_hot"), "snmf": neurons}


@pytest.fixture(params=MAKERS)
def sae(request) -> SAE:
    return MAKERS[request.param]()


@pytest.fixture
def x() -> torch.Tensor:
    return 4 * torch.randn(5, 7, D_IN, generator=torch.Generator().manual_seed(3))


# --- SAEBench 0.6.0 ---


def test_saebench_writes_its_own_fields_onto_the_config_and_saves_it_as_json(sae):
    """sae_bench_utils/general_utils.py, _standardize_sae_cfg; every main.py, sae_cfg_dict=sae.cfg.to_dict()."""
    for name in ("hook_layer", "hook_name", "context_size", "model_name", "hook_head_index", "prepend_bos"):
        setattr(sae.cfg, name, getattr(sae.cfg.metadata, name))
    sae.cfg.architecture_str = sae.cfg.architecture()
    sae.cfg.metadata.hook_layer = 3
    assert json.loads(json.dumps(sae.cfg.to_dict()))["metadata"]["hook_layer"] == 3


def test_saebench_folds_and_then_expects_unit_rows_and_the_same_reconstruction(sae, x):
    """general_utils.py, load_and_format_sae and check_decoder_norms (1e-5 in float32)."""
    before = sae(x)
    sae.fold_W_dec_norm()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)
    assert torch.allclose(sae(x), before, atol=1e-4)


def test_saebench_looks_for_weights_of_an_encoder_and_may_find_no_bias(sae):
    """evals/core/main.py, get_featurewise_weight_based_metrics: W_enc (d_in, d_sae); b_enc and b_mag only if there."""
    assert sae.W_enc.shape == (D_IN, D_SAE)
    assert not hasattr(sae, "b_enc") and not hasattr(sae, "b_mag")
    unit = sae.W_enc / sae.W_enc.norm(dim=0, keepdim=True)
    assert torch.isfinite(unit).all()


def test_codes_may_be_changed_in_place_and_decoded_again(sae, x):
    """evals/scr_and_tpp/main.py, ablated_precomputed_activations; evals/unlearning/utils/intervention.py (negative
    values).
    """
    with torch.no_grad():
        codes = sae.encode(x)
        error = x - sae.decode(codes)
        kept = codes.clone()
        codes[..., [0, 1, 2]] = -20.0
        changed = sae.decode(codes) + error
    expected = x + (codes - kept) @ sae.W_dec
    assert torch.allclose(changed, expected, atol=1e-3)
    assert torch.equal(sae.encode(x), kept)


def test_a_learnt_mask_over_codes_gets_its_gradient_through_decode(sae, x):
    """evals/ravel/mdbm.py, create_intervention_hook: encode without gradient, (n, d_in) as well as (b, t, d_in)."""
    mask = torch.zeros(D_SAE, requires_grad=True)
    with torch.no_grad():
        source, base = sae.encode(x[:, 0]), sae.encode(x[:, 1])
    weight = torch.sigmoid(mask)
    sae.decode((1 - weight) * base + weight * source).square().sum().backward()
    assert mask.grad.abs().max() > 0


def test_masked_positions_are_activations_of_zero(sae, x):
    """sae_bench_utils/activation_collection.py, get_sae_meaned_activations: zeros are encoded, their codes thrown
    away.
    """
    masked = x.clone()
    masked[:, 4:] = 0
    assert torch.isfinite(sae.encode(masked)).all()
    assert torch.allclose(sae.encode(masked)[:, :4], sae.encode(x)[:, :4], atol=1e-5)


def test_absorption_compares_a_direction_of_the_residual_stream_with_decoder_rows(sae, x):
    """evals/absorption/feature_absorption_calculator.py: cosine with W_dec, codes (n, d_sae) of (n, d_in), under
    inference mode.
    """
    with torch.inference_mode():
        cosines = torch.nn.functional.cosine_similarity(torch.ones(D_IN), sae.W_dec, dim=-1)
        assert (sae.encode(x[:, 0]) * cosines).shape == (5, D_SAE)


def test_autointerp_needs_codes_that_differ(x):
    """evals/autointerp/main.py, gather_data: a latent all of whose codes reach its top examples' is dropped."""
    assert len(partition().encode(x)[..., 0].unique()) > 2
    assert len(partition(readout="one_hot").encode(x).unique()) == 2


# --- sae-dashboard 0.8.0 ---


@pytest.mark.parametrize("name", ["top_k", "snmf"])
def test_sae_dashboard_knows_it_as_one_whose_codes_are_of_all_latents(name, x):
    """feature_data_generator.py, get_feature_data: only isinstance(activation_fn, TopK) is encoded whole and then
    sliced.
    """
    sae = MAKERS[name]()
    assert isinstance(sae.activation_fn, TopK)
    pre = sae.hook_sae_acts_pre
    seen = []
    pre.add_hook(lambda codes, hook: seen.append(codes))
    codes = sae.encode(x)
    assert torch.equal(sae.activation_fn(seen[0]), codes)


@pytest.mark.parametrize("readout", ["projection", "cosine", "one_hot"])
def test_sae_dashboard_cannot_cut_the_weights_of_other_readouts(readout):
    """feature_data_generator.py, FeatureMaskingContext assigns W_enc, which is a view here: an error, not wrong
    codes.
    """
    sae = partition(readout=readout)
    assert not isinstance(sae.activation_fn, TopK)
    with pytest.raises((AttributeError, KeyError)):
        sae.W_enc = torch.nn.Parameter(sae.W_enc[:, :3])


def test_codes_of_neuron_features_cut_beforehand_would_be_others(x):
    """Why it has to be encoded whole."""
    sae = neurons()
    part = SNMFDictionary.from_features(sae.features[:4].detach().clone())
    assert not torch.allclose(part.encode(x), sae.encode(x)[..., :4], atol=1e-2)


def test_sae_dashboard_runs_under_inference_mode(sae, x):
    """sae_vis_runner.py, run: fold_W_dec_norm, hook_z_reshaping_mode, W_dec[features], encode."""
    with torch.inference_mode():
        sae.fold_W_dec_norm()
        assert not sae.hook_z_reshaping_mode
        assert sae.W_dec[[0, 2]].shape == (2, D_IN)
        assert sae.encode(x).shape == (5, 7, D_SAE)


# --- sae-probes 0.4.2 ---


def test_sae_probes_encodes_rows_under_inference_mode(sae, x):
    """generate_sae_activations.py: sae.encode(batch).cpu().float() of (n, d_in), then mean differences and columns."""
    with torch.inference_mode():
        codes = sae.encode(x.reshape(-1, D_IN)).cpu().float()
    assert codes.shape == (35, D_SAE) and not codes.is_sparse


# --- delphi (eai-delphi 0.1.3) ---


def test_delphi_caches_whatever_a_callable_makes_of_a_module_s_activations(sae, x):
    """latents/cache.py, LatentCache.run and get_nonzeros: (b, t, d_sae), entries above 1e-5, saved in half
    precision.
    """
    codes = sae.encode(x).detach()
    assert codes.ndim == 3 and codes.shape[2] == D_SAE
    kept = codes.abs() > 1e-5
    assert torch.isfinite(codes[kept].half()).all()
    assert kept.any(dim=(0, 1)).sum() > 1


def test_delphi_wants_windows_without_the_latent(x):
    """latents/constructors.py, random_non_activating_windows: a latent on in every window has none, as dense codes
    have.
    """
    on = (partition(k=1).encode(x) != 0).any(dim=1)
    assert not on.all()
