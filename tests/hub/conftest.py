"""A Hub on the loopback interface, the real client turned to it, and one dictionary of each kind."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from sae_lens import StandardSAE, StandardSAEConfig

from saelens_ext import ActivationStream, fit_exemplar_partition, fit_hierarchical_snmf, fit_snmf, profile_dictionary
from tests.hub.server import TOKEN, Hub


@pytest.fixture(scope="session")
def running_hub():
    with Hub().running() as hub:
        yield hub


@pytest.fixture
def hub(running_hub, tmp_path, monkeypatch):
    """A Hub without repositories, and a client that knows no other, signed in, with a cache of its own."""
    running_hub.reset()
    monkeypatch.setattr(constants, "ENDPOINT", running_hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", running_hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The client waits for seconds between its attempts.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return running_hub


@pytest.fixture(scope="session")
def made(tiny_bridge, tiny_texts):
    """A fit of each kind, a profile, and a SAE of SAELens' own."""
    residual = ActivationStream(tiny_bridge, tiny_texts, "blocks.1.hook_out", context_size=32, max_tokens=400)
    neurons = ActivationStream(tiny_bridge, tiny_texts, "blocks.1.mlp.out.hook_in", context_size=32, max_tokens=300)
    partition = fit_exemplar_partition(residual, percentile=20)
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=16))
    torch.nn.init.normal_(sae.W_enc, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(
        partition=partition,
        profile=profile_dictionary(partition.dictionary, residual, n_examples=2),
        snmf=fit_snmf(neurons, 6, max_iter=20),
        hierarchy=fit_hierarchical_snmf(neurons, ranks=(6, 3), max_iter=20),
        standard=sae,
    )
