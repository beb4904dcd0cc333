"""A SAELens SAE trained on the activations that other dictionaries see."""

import pytest
import torch
from sae_lens import SAE, StandardSAE, TopKSAE

from saelens_ext import ActivationStream, fit_sae
from saelens_ext.dictionaries.fit_snmf import reconstruction_loss

HOOK = "blocks.1.mlp.hook_post"


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(8, 16, generator=g), dim=1)
    codes = torch.rand(800, 8, generator=g) * (torch.rand(800, 8, generator=g) < 0.25)
    return 5 * codes @ features


def test_it_learns_and_is_an_inference_sae(x):
    before = torch.get_rng_state()
    short, long = (fit_sae(x, 16, k=3, training_samples=n, batch_size=128, hook_name=HOOK) for n in (256, 100_000))
    assert torch.equal(torch.get_rng_state(), before), "the user's generator stays as it is"
    assert type(long) is TopKSAE and long.cfg.metadata.hook_name == HOOK and not long.training
    losses = [reconstruction_loss(sae, [x])[0] for sae in (short, long)]
    assert losses[1] < 0.2 < losses[0]
    assert int((long.encode(x) > 0).sum(dim=1).max()) <= 3


def test_the_seed_decides(x):
    options = {"k": 3, "training_samples": 512, "batch_size": 128}
    first, again, other = (fit_sae(x, 16, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first.W_dec, again.W_dec) and not torch.equal(first.W_dec, other.W_dec)


def test_on_a_stream(tiny_bridge, tiny_texts, tmp_path):
    stream = ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=16, max_tokens=500)
    options = {"training_samples": 1000, "batch_size": 100, "held_out": 0.25}
    sae = fit_sae(stream, 12, architecture="standard", l1_coefficient=0.1, **options)
    assert type(sae) is StandardSAE and sae.cfg.d_in == stream.d_in[HOOK]
    assert sae.cfg.metadata.hook_name == "blocks.1.mlp.out.hook_in" and sae.cfg.metadata.n_seen < 500
    sae.save_model(tmp_path)
    assert torch.equal(SAE.load_from_disk(tmp_path).W_dec, sae.W_dec)


def test_bad_input(x):
    with pytest.raises(ValueError, match="architecture must be one of.*got 'top_k'"):
        fit_sae(x, 16, architecture="top_k")
    with pytest.raises(ValueError, match="'l1'"):
        fit_sae(x, 16, l1=3)
    with pytest.raises(ValueError, match="at least one batch of 1024"):
        fit_sae(x, 16, training_samples=100)
    with pytest.raises(ValueError, match="d_sae"):
        fit_sae(x, 0)
