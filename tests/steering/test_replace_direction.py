"""Patching a direction in: its size stays, its direction is the one given, and only where it should be."""

import pytest
import torch

import saelens_ext as sx
from saelens_ext.host.models import resolve_hook

RESIDUAL = "blocks.1.hook_resid_post"
TOKENS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["tiny_hooked", "tiny_bridge", "tiny_gpt2_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


def read(model):
    seen = {}
    name = resolve_hook(model, "blocks.2.hook_resid_pre")
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda x, hook: seen.update(x=x.clone()) or x)]):
        logits = model(TOKENS)
    return seen["x"], logits


def test_activations_point_where_they_are_told(model):
    generator = torch.Generator().manual_seed(1)
    direction, center = (torch.randn(model.cfg.d_model, generator=generator) for _ in range(2))
    before, _ = read(model)
    with sx.replace_direction(model, RESIDUAL, direction, positions=[2, 5], center=center):
        after, _ = read(model)
    kept = [position for position in range(9) if position not in (2, 5)]
    assert torch.equal(before[:, kept], after[:, kept])
    moved = after[:, [2, 5]] - center
    torch.testing.assert_close(moved.norm(dim=-1), (before[:, [2, 5]] - center).norm(dim=-1), rtol=1e-4, atol=1e-4)
    cosines = torch.nn.functional.cosine_similarity(moved, direction.expand_as(moved), dim=-1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-4, atol=1e-4)
    assert torch.equal(read(model)[0], before)


def test_an_activation_replaced_by_itself_changes_nothing(model):
    before, logits = read(model)
    with sx.replace_direction(model, RESIDUAL, before[0, 4], positions=[4]):
        after, again = read(model)
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again[0], logits[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(after[1, 4], before[1, 4], atol=1e-2)


def test_bad_input(model):
    with pytest.raises(ValueError, match=r"direction must have shape \(d,\)"):
        sx.replace_direction(model, RESIDUAL, torch.ones(2, 32))
    with pytest.raises(ValueError, match="is zero"):
        sx.replace_direction(model, RESIDUAL, torch.zeros(32))
    with pytest.raises(ValueError, match=r"center must have shape \(32,\), got \(3,\)"):
        sx.replace_direction(model, RESIDUAL, torch.ones(32), center=torch.ones(3))
