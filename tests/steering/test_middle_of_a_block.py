"""Interventions in the middle of a block act on the whole stream on a bridge, as on a HookedTransformer."""

from functools import cache

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.host.hook_edits import edit_point
from saelens_ext.host.models import resolve_hook, retarget
from saelens_ext.steering.interventions import ablate_directions, add_direction, clamp_latent
from saelens_ext.steering.strength import match_strength
from tests import models_zoo
from tests.models_zoo import ZOO
from tests.steering.steered import along_latent, sample_steered

MIDDLE = "blocks.1.hook_resid_mid"
TOKENS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
SEQUENTIAL = [name for name, row in ZOO.items() if len(row.model_classes) == 2 and not row.parallel]


@cache
def pair(architecture: str):
    return tuple(models_zoo.make_model(architecture, name) for name in models_zoo.MODEL_CLASSES)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sae(hook: str = MIDDLE) -> StandardSAE:
    torch.manual_seed(0)
    return StandardSAE(StandardSAEConfig(d_in=32, d_sae=40, metadata=SAEMetadata(hook_name=hook, typical_norm=2.0)))


INTERVENTIONS = {
    "add": lambda m: add_direction(m, MIDDLE, normal(32), 5.0),
    "add at positions": lambda m: add_direction(m, MIDDLE, normal(32), 5.0, positions=[0, 4]),
    "ablate": lambda m: ablate_directions(m, MIDDLE, normal(3, 32), center=normal(32, seed=2)),
    "clamp": lambda m: clamp_latent(m, sae(), [3, 4], 6.0),
    "steer": lambda m: along_latent(m, sae(), 5, 3.0),
}


@torch.no_grad()
def run(model, *contexts):
    kept = []
    output = resolve_hook(model, "blocks.1.hook_resid_post")
    for context in contexts:
        context.__enter__()
    with model.hooks(fwd_hooks=[(output, lambda x, hook: kept.append(x.clone()))]):
        logits = model(TOKENS)
    for context in reversed(contexts):
        context.__exit__(None, None, None)
    return logits, kept[0]


@pytest.mark.parametrize("architecture", SEQUENTIAL)
@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_both_hosts_give_the_same(architecture, kind):
    hooked, bridge = pair(architecture)
    expected, found, plain = (
        run(hooked, INTERVENTIONS[kind](hooked)),
        run(bridge, INTERVENTIONS[kind](bridge)),
        run(bridge),
    )
    for one, other, unchanged in zip(expected, found, plain):
        assert torch.allclose(one, other, atol=1e-3) and not torch.allclose(other, unchanged, atol=1e-2)


def test_the_output_is_changed_before_anything_acts_there(tiny_hooked, tiny_bridge):
    """Whatever is at the block's output acts on the changed stream, also when it was there first."""
    results = []
    for model in (tiny_hooked, tiny_bridge):
        outer = ablate_directions(model, "blocks.1.hook_resid_post", normal(2, 32, seed=4))
        logits, after = run(model, outer, add_direction(model, MIDDLE, normal(32), 5.0), INTERVENTIONS["clamp"](model))
        assert float((after @ normal(2, 32, seed=4).T).abs().max()) < 1e-3
        results.append(logits)
    assert torch.allclose(*results, atol=1e-4)


@pytest.mark.parametrize("use_error_term", [True, False])
def test_a_sae_at_the_output_sees_the_change(tiny_hooked, tiny_bridge, use_error_term):
    results = []
    for model in (tiny_hooked, tiny_bridge):
        attached = sae(resolve_hook(model, "blocks.1.hook_resid_post"))
        with model.saes([attached], use_error_term=use_error_term), INTERVENTIONS["add"](model), torch.no_grad():
            results.append(model(TOKENS))
    assert torch.allclose(*results, atol=1e-4)


def test_strengths_agree(tiny_hooked, tiny_bridge):
    found = [match_strength(m, MIDDLE, normal(32), (0.1, 0.3)).strengths for m in (tiny_hooked, tiny_bridge)]
    for one, other in zip(*found):
        assert one.reached and other.coefficient == pytest.approx(one.coefficient, rel=1e-3)


def test_generation_agrees_with_and_without_a_cache(tiny_hooked, tiny_bridge):
    options = {"n": 2, "max_new_tokens": 6, "seed": 3}
    one, other = (sample_steered(m, "I think", MIDDLE, normal(32), 8.0, **options) for m in (tiny_hooked, tiny_bridge))
    assert one == other != sample_steered(tiny_bridge, "I think", MIDDLE, normal(32), 0.0, **options)
    same = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    with INTERVENTIONS["add"](tiny_bridge):
        cached, whole = (tiny_bridge.generate(TOKENS, use_past_kv_cache=cache, **same) for cache in (True, False))
    assert torch.equal(cached, whole)


def test_gradients_pass_through_the_skip_connection(tiny_hooked, tiny_bridge):
    found = []
    for model in (tiny_hooked, tiny_bridge):
        v = normal(32).requires_grad_()
        with add_direction(model, MIDDLE, v, 2.0):
            model(TOKENS)[..., 5].sum().backward()
        found.append(v.grad)
    assert torch.allclose(*found, rtol=1e-3, atol=1e-3) and float(found[0].norm()) > 0


def test_half_precision_follows_float32():
    model = models_zoo.make_model("llama", "SAETransformerBridge")
    _, expected = run(model, INTERVENTIONS["add"](model))
    _, plain = run(model)
    _, found = run(model.to(torch.bfloat16), INTERVENTIONS["add"](model))
    assert found.dtype == torch.bfloat16
    assert float((found - expected).norm() / (expected - plain).norm()) < 0.1


def test_attached_in_the_middle_a_sae_replaces_less(tiny_hooked, tiny_bridge):
    """With its error term it changes nothing, on either host; without, a bridge hands its output to the MLP alone."""
    with pytest.warns(UserWarning, match="to the MLP alone"):
        attached = retarget(sae(), tiny_bridge)
    name = attached.cfg.metadata.hook_name
    with tiny_bridge.saes([attached], use_error_term=True), torch.no_grad():
        assert torch.allclose(tiny_bridge(TOKENS), run(tiny_bridge)[0], atol=1e-4)
        # What is added behind it still acts on the whole stream.
        with add_direction(tiny_bridge, f"{name}.hook_sae_output", normal(32), 5.0):
            moved = tiny_bridge(TOKENS)
        for sub_hook in ("hook_sae_acts_post", "hook_sae_input"):
            with pytest.raises(ValueError, match="in the middle of a block"):
                edit_point(tiny_bridge, f"{name}.{sub_hook}")
    assert torch.allclose(moved, run(tiny_hooked, INTERVENTIONS["add"](tiny_hooked))[0], atol=1e-4)
    with tiny_hooked.saes([retarget(sae(), tiny_hooked)]), tiny_bridge.saes([attached]), torch.no_grad():
        assert not torch.allclose(tiny_hooked(TOKENS), tiny_bridge(TOKENS), atol=1e-2)


def test_a_sae_attached_at_the_output_inside_the_context_is_a_warning(tiny_bridge):
    attached = sae("blocks.1.hook_out")
    with pytest.warns(UserWarning, match="at blocks.1.hook_out inside"), INTERVENTIONS["add"](tiny_bridge):
        with tiny_bridge.saes([attached]):
            pass
