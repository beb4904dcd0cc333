"""Interventions act on the residual stream as their formulas say, on every architecture, and are gone afterwards.

What arrives is never read at the hook that is acted on: it follows from what is read elsewhere, since a block adds what
its attention and its MLP write, and nothing else, to the stream.
"""

import pytest
import torch

from saelens_ext import ExemplarPartition
from saelens_ext.steering.interventions import ablate_directions, add_direction, clamp_latent, scale_latent
from tests.architectures._hosts import LAYER, normal, run
from tests.models_zoo import D_MODEL
from tests.steering.steered import along_latent

BLOCK = f"blocks.{LAYER}"
PRE, ATTENTION, MLP, POST = (f"{BLOCK}.hook_{end}" for end in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
MIDDLE, NEXT = f"{BLOCK}.hook_resid_mid", f"blocks.{LAYER + 1}.hook_resid_pre"
PARTS = [PRE, ATTENTION, MLP, POST, NEXT]


def arrived(seen):
    """What the stream carries on from each place, without a look at the place itself."""
    pre, attention, mlp, post, later = (seen[name] for name in PARTS)
    return {
        PRE: post - attention - mlp,
        ATTENTION: post - pre - mlp,
        MLP: post - pre - attention,
        MIDDLE: post - mlp,
        POST: later,
    }


def acted(host, place, context):
    """What arrives from a place inside a context that must show; leaving it must undo it."""
    plain, before = run(host.model, PARTS)
    with context:
        logits, seen = run(host.model, PARTS)
        assert not torch.equal(logits, plain)
    again, after = run(host.model, PARTS)
    assert torch.equal(again, plain) and all(torch.equal(after[name], before[name]) for name in PARTS)
    return arrived(seen)[place]


def acts_at(host, place):
    """Whether there is such a place; a block whose attention and MLP read the same stream has no middle."""
    if place == MIDDLE and host.row.parallel:
        with pytest.raises(ValueError, match="hook"):
            add_direction(host.model, place, torch.ones(D_MODEL), 1.0).__enter__()
        return False
    return True


PLACES = [PRE, ATTENTION, MIDDLE, MLP, POST]
ids = {"ids": lambda place: place.split("hook_")[1]}


@pytest.mark.parametrize("place", PLACES, **ids)
def test_a_direction_is_added(host, place):
    if not acts_at(host, place):
        return
    v, before = normal(D_MODEL), arrived(host.plain[1])[place]
    after = acted(host, place, add_direction(host.model, place, v, -1.5))
    torch.testing.assert_close(after, before - 1.5 * v / v.norm(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", PLACES, **ids)
def test_a_direction_is_ablated_about_a_centre(host, place):
    if not acts_at(host, place):
        return
    rows, center = normal(2, D_MODEL), normal(D_MODEL, seed=2)
    before = arrived(host.plain[1])[place]
    after = acted(host, place, ablate_directions(host.model, place, rows, center=center))
    unit = torch.linalg.qr(rows.T).Q
    torch.testing.assert_close((after - center) @ unit, torch.zeros(*after.shape[:2], 2), rtol=0, atol=1e-4)
    along = (before - center) @ unit @ unit.T
    torch.testing.assert_close(after, before - along, rtol=1e-4, atol=1e-4)


def partition(place, center):
    rows = torch.nn.functional.normalize(normal(24, D_MODEL), dim=1)
    metadata = {"hook_name": place, "typical_norm": 2.0}
    return ExemplarPartition.from_regions(rows, rows, center, 0.9, k=3, metadata=metadata)


@pytest.mark.parametrize("place", PLACES, **ids)
def test_a_latent_is_scaled_clamped_and_added(host, place):
    if not acts_at(host, place):
        return
    x = arrived(host.plain[1])[place]
    sae = partition(place, x.mean(dim=(0, 1)))
    with torch.no_grad():
        codes = sae.encode(x)
        latent = int((codes != 0).float().sum(dim=(0, 1)).argmax())
        scaled, clamped = codes.clone(), codes.clone()
        scaled[..., latent] *= 3
        clamped[..., latent] = 1.5
        expected = [x + sae.decode(changed) - sae.decode(codes) for changed in (scaled, clamped)]
        expected.append(x + 0.7 * 2.0 * sae.W_dec[latent])
    contexts = [
        scale_latent(host.model, sae, latent, 3.0),
        clamp_latent(host.model, sae, latent, 1.5),
        along_latent(host.model, sae, latent, 0.7),
    ]
    for context, there in zip(contexts, expected, strict=True):
        torch.testing.assert_close(acted(host, place, context), there, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("place", [ATTENTION, POST], **ids)
def test_an_error_inside_undoes_it_too(host, place):
    plain, _ = run(host.model, [])
    with pytest.raises(KeyError), add_direction(host.model, place, normal(D_MODEL), 2.0):
        raise KeyError
    assert torch.equal(run(host.model, [])[0], plain)
