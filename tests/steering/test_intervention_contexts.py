"""Contexts that are entered again, inside themselves, and on a model that has changed since they were made."""

import warnings

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.host.models import resolve_hook
from saelens_ext.steering.interventions import ablate_directions, add_direction, clamp_latent, scale_latent
from tests import models_zoo
from tests.steering.steered import along_latent

HOOK = "blocks.1.hook_resid_post"
MIDDLE = "blocks.1.hook_resid_mid"
TOKENS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=("tiny_hooked", "tiny_bridge"))
def model(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens)


def vector(seed: int = 1) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(seed)), dim=0)


def sae(hook: str = HOOK, **metadata) -> StandardSAE:
    torch.manual_seed(0)
    made = SAEMetadata(hook_name=hook, typical_norm=2.0, **metadata)
    return StandardSAE(StandardSAEConfig(d_in=32, d_sae=40, metadata=made))


def transcoder() -> Transcoder:
    torch.manual_seed(0)
    metadata = SAEMetadata(hook_name=MIDDLE, hook_name_out="blocks.1.hook_mlp_out", typical_norm=1.0)
    return Transcoder(TranscoderConfig(d_in=32, d_out=32, d_sae=40, apply_b_dec_to_input=False, metadata=metadata))


CONTEXTS = {
    "add": lambda m: add_direction(m, HOOK, vector(), 4.0),
    "add at positions": lambda m: add_direction(m, HOOK, vector(), 4.0, positions=[1, 3]),
    "add in the middle": lambda m: add_direction(m, MIDDLE, vector(), 4.0),
    "ablate": lambda m: ablate_directions(m, HOOK, vector()),
    "scale": lambda m: scale_latent(m, sae(), [1, 2], -3.0),
    "clamp a transcoder": lambda m: clamp_latent(m, transcoder(), 4, 5.0),
    "steer": lambda m: along_latent(m, sae(), 3, 2.0),
}


@pytest.mark.parametrize("kind", CONTEXTS)
def test_a_context_can_be_entered_again(model, kind):
    plain, context = logits(model), CONTEXTS[kind](model)
    found = []
    for _ in range(2):
        with context as inside:
            assert inside is model
            # Of several passes only the first can tell a prompt from a step of generation.
            found.append(logits(model))
        assert torch.equal(logits(model), plain)
    assert torch.equal(*found) and not torch.equal(found[0], plain)


@pytest.mark.parametrize("hook", [HOOK, MIDDLE])
def test_inside_itself_a_context_acts_twice(model, hook):
    once, twice = add_direction(model, hook, vector(), 2.0), add_direction(model, hook, vector(), 4.0)
    with twice:
        expected = logits(model)
    with once, once:
        assert torch.allclose(logits(model), expected, atol=1e-4)
    with pytest.raises(RuntimeError, match="inside"), once, once:
        raise RuntimeError("inside")
    with once:
        single = logits(model)
    assert not torch.allclose(single, expected, atol=1e-2)


def test_a_prompt_of_one_token_is_a_prompt_each_time(model):
    context = add_direction(model, HOOK, vector(), 4.0, positions=[0])
    with context:
        logits(model)
    with context:
        assert not torch.equal(logits(model, TOKENS[:, :1]), logits(model, TOKENS)[:, :1])
        first = logits(model, TOKENS[:, :1])
    assert torch.equal(first, logits(model, TOKENS[:, :1])), "a step of generation was changed"


def test_a_sae_attached_after_the_context_was_made(model):
    attached = sae()
    attached.cfg.metadata.hook_name = resolve_hook(model, HOOK)
    context = add_direction(model, HOOK, vector(), 2.0)
    with model.saes([attached]):
        with pytest.raises(ValueError, match="attached .*hook_sae_output"), context:
            pass
        behind = add_direction(model, f"{attached.cfg.metadata.hook_name}.hook_sae_output", vector(), 2.0)
        with behind:
            changed = logits(model)
        assert not torch.equal(changed, logits(model))
    with pytest.raises(ValueError, match="no hook"), behind:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with context:
            assert not torch.equal(logits(model), changed)


def test_a_sae_elsewhere_does_not_matter(model):
    attached = sae("blocks.2.hook_resid_post")
    attached.cfg.metadata.hook_name = resolve_hook(model, "blocks.2.hook_resid_post")
    context = clamp_latent(model, sae(), 3, 4.0)
    with model.saes([attached], use_error_term=True):
        plain = logits(model)
        with context:
            assert not torch.equal(logits(model), plain)


def test_a_dictionary_that_is_renamed_acts_under_its_new_name(model):
    dictionary = sae()
    context, other = along_latent(model, dictionary, 3, 2.0), sae("blocks.0.hook_resid_post")
    with clamp_latent(model, other, 3, 4.0):
        expected = logits(model)
    moved = clamp_latent(model, dictionary, 3, 4.0)
    dictionary.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    with moved:
        assert torch.equal(logits(model), expected)
    with context:
        pass


def test_arguments_are_checked_before_entering(model):
    for attempt in (
        lambda: add_direction(model, "blocks.1.hook_resid_pots", vector(), 1.0),
        lambda: ablate_directions(model, HOOK, torch.zeros(32)),
        lambda: add_direction(model, HOOK, vector(), 0.0, positions=[-1]),
        lambda: scale_latent(model, sae("blocks.7.hook_resid_post"), 1, 0.0),
    ):
        with pytest.raises(ValueError):
            attempt()


def test_a_hook_that_only_shows_is_refused_when_the_context_is_made():
    model = models_zoo.make_model("gptj", "SAETransformerBridge")
    with pytest.raises(ValueError, match="only shows"):
        add_direction(model, "blocks.1.attn.hook_pattern", torch.ones(9), 1.0)
