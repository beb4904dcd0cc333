"""The SNMF dictionary: exact codes against scipy's, gradients, folds, its neurons, and its use on a running model."""

import copy

import pytest
import torch
from sae_lens import SAE
from scipy.optimize import nnls as scipy_nnls

from saelens_ext import ActivationStream, SNMFDictionary, SNMFDictionaryConfig, profile_dictionary
from saelens_ext.analysis.logit_lens import logit_lens
from saelens_ext.host.models import load_model, resolve_hook, retarget
from saelens_ext.steering.interventions import clamp_latent, scale_latent
from tests import models_zoo
from tests.live_bytes import LiveBytes
from tests.steering.steered import along_latent

K, D = 20, 48
NEURONS = "blocks.1.mlp.hook_post"
D_MLP = models_zoo.D_MLP["llama"]


def sparse_features(k: int = K, d: int = D, seed: int = 0, share: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(k, d, generator=generator) * (torch.rand(k, d, generator=generator) < share)


def make(k: int = K, d: int = D, seed: int = 0, **options) -> SNMFDictionary:
    return SNMFDictionary.from_features(sparse_features(k, d, seed), **options)


def neuron_dictionary(**metadata) -> SNMFDictionary:
    return make(12, D_MLP, metadata={"hook_name": NEURONS, "typical_norm": 2.0, **metadata})


@pytest.fixture
def x() -> torch.Tensor:
    return 3 * torch.randn(60, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["tiny_hooked", "tiny_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


def kkt_residual(x: torch.Tensor, codes: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """By how much the conditions of optimality are violated, relative to the largest product with a unit feature."""
    units = torch.nn.functional.normalize(features.double(), dim=1)
    slope = (x.double() - codes.double() @ features.double()) @ units.T
    violation = torch.where(codes > 0, slope.abs(), slope.clamp(min=0)).amax(dim=1)
    return violation / (x.double() @ units.T).abs().amax(dim=1)


# --- codes ---


@pytest.mark.parametrize("k", [5, 20, 60, 90])
def test_codes_are_those_of_scipy(x, k):
    dictionary = make(k)
    codes = dictionary.encode(x).detach()
    assert float(kkt_residual(x, codes, dictionary.W_dec.detach()).max()) < 1e-4
    rows = dictionary.W_dec.detach().double()
    exact = torch.stack([torch.from_numpy(scipy_nnls(rows.T.numpy(), one.double().numpy())[0]) for one in x])
    # With more features than neurons codes need not be unique; reconstructions are.
    assert torch.allclose(codes.double() @ rows, exact @ rows, atol=1e-3)
    if k < D:
        assert torch.allclose(codes.double(), exact, atol=1e-3)


def test_an_l1_penalty_is_saved_and_used(x, tmp_path):
    center = torch.linspace(-1, 1, D)
    dictionary = make(l1=0.2, center=center)
    codes = dictionary.encode(x).detach()
    units = torch.nn.functional.normalize(dictionary.W_dec.detach(), dim=1)
    rows = x - center
    slope = (rows - codes @ dictionary.W_dec.detach()) @ units.T - 0.2 * rows.norm(dim=1)[:, None]
    off = torch.where(codes > 0, slope.abs(), slope.clamp(min=0)).amax(dim=1) / (rows @ units.T).abs().amax(dim=1)
    assert float(off.max()) <= 2e-5 and float((codes > 0).float().mean()) < 0.7 * float(
        (make(center=center).encode(x) > 0).float().mean()
    )
    dictionary.save_model(tmp_path)
    again = SAE.load_from_disk(tmp_path)
    assert again.cfg.l1 == 0.2 and torch.equal(again.b_dec, center) and torch.equal(again.encode(x), codes)
    before = dictionary(x).detach()
    dictionary.fold_W_dec_norm()
    torch.testing.assert_close(dictionary(x).detach(), before, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(dictionary.encode(center + 5 * rows), 5 * dictionary.encode(x), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"l1 must lie in \[0, 1\)"):
        make(l1=1)


@pytest.mark.parametrize("shape", [(D,), (0, D), (3, 0, D), (2, 3, 5, D)])
def test_any_leading_shape(shape):
    codes = make().encode(torch.randn(shape))
    assert codes.shape == (*shape[:-1], K) and bool((codes >= 0).all())


def test_the_same_input_gives_the_same_bits_with_and_without_gradient(x):
    dictionary = make()
    with torch.no_grad():
        first, again = dictionary.encode(x), dictionary.encode(x)
    assert torch.equal(first, again) and torch.equal(first, dictionary.encode(x))
    assert not first.requires_grad and dictionary.encode(x).requires_grad


def test_an_activation_that_no_feature_points_to_has_zero_codes():
    features = sparse_features()
    features[:, :10] = 0
    orthogonal, opposite = torch.zeros(D), -10 * features[0]
    orthogonal[:10] = 5.0
    dictionary = SNMFDictionary.from_features(features[:1])
    codes = dictionary.encode(torch.stack([orthogonal, opposite, torch.zeros(D)]))
    assert torch.equal(codes, torch.zeros(3, 1))
    assert torch.equal(SNMFDictionary.from_features(features).encode(orthogonal), torch.zeros(K))


def test_a_combination_of_features_is_reproduced():
    dictionary = make()
    weights = torch.rand(7, K, generator=torch.Generator().manual_seed(2))
    mixed = (weights @ dictionary.W_dec).detach()
    assert torch.allclose(dictionary.encode(mixed), weights, atol=1e-3)
    assert torch.allclose(dictionary(mixed), mixed, atol=1e-3)


def test_an_origin_is_taken_off_and_put_back(x):
    dictionary, about = make(), make()
    about.b_dec.data.fill_(1.5)
    assert torch.allclose(about.encode(x + 1.5), dictionary.encode(x), atol=1e-4)
    assert torch.allclose(about(x + 1.5), dictionary(x) + 1.5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_in_other_dtypes(x, dtype):
    dictionary = make().to(getattr(torch, dtype))
    codes = dictionary.encode(x)
    assert codes.dtype == dictionary(x).dtype == getattr(torch, dtype)
    # What is solved is the problem in the rounded features and activations, as exactly as that dtype can say it.
    expected = SNMFDictionary.from_features(dictionary.W_dec.detach().float()).encode(x.to(codes.dtype).float())
    assert torch.allclose(codes.float(), expected, rtol=2 * torch.finfo(codes.dtype).eps, atol=1e-3)


@pytest.mark.slow
def test_gradients():
    # Independent features: codes of dependent ones are not unique, and have no derivative.
    dictionary = SNMFDictionary.from_features(sparse_features(5, 7, share=0.8).double())
    x = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)

    def encode(activation: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(dictionary, {"W_dec": features, "b_dec": origin}, (activation,))

    origin = torch.zeros(7, dtype=torch.float64)
    features = dictionary.W_dec.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(dictionary.encode, (x,))
    assert torch.autograd.gradcheck(encode, (x, features))
    assert torch.autograd.grad(dictionary.encode(x).sum(), dictionary.W_dec)[0].abs().sum() > 0


def test_features_that_are_changed_in_place_are_seen(x):
    dictionary = make()
    with torch.no_grad():
        before = dictionary.encode(x)
        dictionary.W_dec.data[:, 5:] *= 2  # neither address nor version counter of the parameter changes
        assert torch.equal(dictionary.encode(x), SNMFDictionary.from_features(dictionary.W_dec.detach()).encode(x))
        assert not torch.allclose(dictionary.encode(x), before, atol=1e-2)
        dictionary.W_dec.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="W_dec has 1 non-finite"):
            dictionary.encode(x)


def test_what_the_solver_keeps_is_neither_saved_nor_shared(x, tmp_path):
    dictionary = make()
    with torch.no_grad():
        dictionary.encode(x)
        other = copy.deepcopy(dictionary)
        other.W_dec.data *= 2
        assert torch.allclose(other.encode(x) * 2, dictionary.encode(x), atol=1e-4)
    assert set(dictionary.state_dict()) == {"W_dec", "b_dec"}


def test_a_hook_before_the_relu_acts_on_the_codes(x):
    dictionary = make()
    _, cache = dictionary.run_with_cache(x)
    assert torch.equal(cache["hook_sae_acts_pre"], cache["hook_sae_acts_post"])
    changed = dictionary.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pre", lambda codes, hook: codes - 1)])
    assert torch.allclose(changed, dictionary.decode((dictionary.encode(x) - 1).clamp(min=0)), atol=1e-5)


@pytest.mark.slow
def test_memory_is_bounded():
    dictionary = SNMFDictionary.from_features(torch.eye(64))
    x = torch.randn(150_000, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), LiveBytes() as live:
        codes = dictionary.encode(x)
    # The input less the origin, codes before and after the ReLU, and a chunk's work; all at once would be twelve times
    # the codes.
    assert codes.nbytes < live.most < 3 * codes.nbytes + 2**24
    assert torch.allclose(codes, x.relu(), atol=1e-4)


# --- features ---


def test_neurons_by_weight():
    features = torch.zeros(2, 6)
    features[0, [1, 2, 4]] = torch.tensor([0.5, -2.0, 0.5])
    dictionary = SNMFDictionary.from_features(features)
    assert dictionary.neurons(0).indices.tolist() == [2, 1, 4]
    assert dictionary.neurons(0).weights.tolist() == [-2.0, 0.5, 0.5]
    assert dictionary.neurons(0, n=1).indices.tolist() == [2] and dictionary.neurons(0, 99).indices.tolist() == [
        2,
        1,
        4,
    ]
    assert len(dictionary.neurons(1).indices) == 0
    assert torch.equal(dictionary.support, features != 0) and dictionary.features is dictionary.W_dec
    assert (dictionary.n_neurons_used, dictionary.n_dead, dictionary.cfg.sparsity) == (3, 1, 0.5)
    for arguments in [(2,), (-1,), (0, 0)]:
        with pytest.raises(ValueError, match="feature must be one of 0 to 1|n must be a whole number"):
            dictionary.neurons(*arguments)


def test_a_dead_feature_has_zero_codes(x):
    features = sparse_features()
    features[3] = 0
    dictionary = SNMFDictionary.from_features(features)
    assert dictionary.n_dead == 1 and not dictionary.encode(x)[:, 3].any()
    norms = dictionary.fold_and_get_W_dec_norm()
    assert norms[3] == 1 and not dictionary.W_dec[3].any() and not dictionary.encode(x)[:, 3].any()


def test_sparsity_is_the_one_given_or_measured():
    features = sparse_features(share=1.0)
    features[:, 7:] = 0
    assert SNMFDictionary.from_features(features).cfg.sparsity == 7 / D
    assert SNMFDictionary.from_features(features, sparsity=0.5).cfg.sparsity == 0.5
    seven = torch.zeros(1, 100)
    seven[0, :7] = 1
    assert SNMFDictionary.from_features(seven, sparsity=0.07).cfg.sparsity == 0.07
    with pytest.raises(ValueError, match=r"uses 7 of 48 neurons, more than the 5 that sparsity=0.1"):
        SNMFDictionary.from_features(features, sparsity=0.1)
    assert SNMFDictionaryConfig(d_in=4, d_sae=2).sparsity == 1.0


@pytest.mark.parametrize(
    "make_wrong, message",
    [
        (lambda: SNMFDictionary.from_features(torch.zeros(3, 4)), "at least one row that is not zero"),
        (lambda: SNMFDictionary.from_features(torch.zeros(0, 4)), "at least one row that is not zero"),
        (lambda: SNMFDictionary.from_features(torch.full((3, 4), torch.nan)), "non-finite"),
        (lambda: make(sparsity=0.0), r"sparsity must lie in \(0, 1\]"),
        (lambda: make(sparsity=1.5), r"sparsity must lie in \(0, 1\]"),
        (lambda: SNMFDictionaryConfig(d_in=4, d_sae=2, sparsity=-1), r"sparsity must lie in \(0, 1\]"),
        (
            lambda: SNMFDictionaryConfig(d_in=4, d_sae=2, apply_b_dec_to_input=False),
            "apply_b_dec_to_input must be True",
        ),
        (lambda: make().fold_activation_norm_scaling_factor(0.0), "scaling_factor must lie in"),
        (lambda: make().encode(torch.full((2, D), torch.inf)), "The activation has 96 non-finite"),
        (lambda: make().encode(torch.zeros(2, D + 1)), "last dimension must be 48"),
    ],
)
def test_bad_input_is_a_clear_error(make_wrong, message):
    with pytest.raises(ValueError, match=message):
        make_wrong()


def test_the_activation_scale_fold_keeps_the_codes(x):
    dictionary = make()
    codes = dictionary.encode(4 * x)
    dictionary.fold_activation_norm_scaling_factor(4.0)
    assert torch.allclose(dictionary.encode(x), codes, atol=1e-3)


# --- on a model ---


def test_interventions_on_codes(model):
    dictionary = retarget(neuron_dictionary(), model)
    tokens, name = torch.tensor([[0, 5, 6, 9]]), dictionary.cfg.metadata.hook_name
    seen: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda x, hook: seen.append(x.clone()))]):
            model(tokens)
        return seen.pop()

    plain = run()
    codes = dictionary.encode(plain).detach()
    latent = int(codes.sum(dim=(0, 1)).argmax())
    unit = torch.nn.functional.normalize(dictionary.W_dec[latent].detach(), dim=0)
    with scale_latent(model, dictionary, latent, 3.0):
        assert torch.allclose(run() - plain, 2 * codes[..., latent, None] * dictionary.W_dec[latent], atol=1e-4)
    with clamp_latent(model, dictionary, latent, 5.0):
        assert torch.allclose(run() - plain, (5 - codes[..., latent, None]) * dictionary.W_dec[latent], atol=1e-4)
    with along_latent(model, dictionary, latent, 1.5):
        assert torch.allclose(run() - plain, (1.5 * 2.0 * unit).expand_as(plain), atol=1e-5)
    assert torch.equal(run(), plain)


def test_a_profile_counts_the_codes(model, tiny_texts):
    dictionary = neuron_dictionary()
    stream = ActivationStream(model, tiny_texts[:3], NEURONS, context_size=32)
    profile = profile_dictionary(dictionary, stream, n_examples=3)
    x = torch.cat([batch.activations[NEURONS] for batch in stream])
    codes = dictionary.encode(x).detach()
    assert profile.n_activations == len(x) and profile.coherence is None
    # Whether a code is a hair above zero may depend on what it was solved with.
    assert torch.all((profile.counts - (codes > 0).sum(dim=0)).abs() <= 1)
    assert torch.allclose(profile.max_activation, codes.amax(dim=0), atol=1e-4)


def test_residual_directions_can_be_read_through_the_lens(model):
    dictionary = neuron_dictionary()
    directions = dictionary.residual_directions(model)
    assert directions.shape == (12, models_zoo.D_MODEL) and not directions.requires_grad
    expected = dictionary.W_dec.detach() @ model.blocks[1].mlp.W_out
    assert torch.allclose(directions, expected, atol=1e-5)
    assert logit_lens(model, directions, top_n=3).promoted_ids.shape == (12, 3)


def test_attached_to_a_model_in_half_precision(tmp_path):
    hf_model = models_zoo.make_hf_model("llama").bfloat16()
    model = load_model("tiny", hf_model=hf_model, tokenizer=models_zoo.make_tokenizer(), device="cpu")
    dictionary = retarget(neuron_dictionary().to(torch.bfloat16), model)
    dictionary.save_model(tmp_path)
    loaded, tokens = SAE.load_from_disk(tmp_path), torch.tensor([[0, 5, 6, 9]])
    assert loaded.cfg.metadata.hook_name == resolve_hook(model, NEURONS) and loaded.W_dec.dtype == torch.bfloat16
    with torch.no_grad():
        plain, (_, cache) = model(tokens), model.run_with_cache_with_saes(tokens, saes=[loaded])
        codes = cache[f"{loaded.cfg.metadata.hook_name}.hook_sae_acts_post"]
        assert codes.dtype == torch.bfloat16 and bool(codes.isfinite().all()) and bool((codes > 0).any())
        with model.saes([loaded], use_error_term=True):
            assert torch.allclose(model(tokens).float(), plain.float(), atol=0.15)
    assert loaded.residual_directions(model).dtype == torch.float32
