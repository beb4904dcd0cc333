"""Parts of a direction: what adds up, what has no effect, and what is flagged."""

import math

import pytest
import torch

import saelens_ext as sx
from saelens_ext.evals import pathway_check
from tests.architectures._hosts import shared_model

RESIDUAL, NEURONS = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"
PROMPTS = ["The assert statement", "A list of names", "When the loop ends"]


@pytest.fixture(scope="module", params=["tiny_hooked", "tiny_gpt2_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def texts(tiny_texts):
    return list(tiny_texts)


def activations(model, texts, hook_name=RESIDUAL):
    return next(iter(sx.read_texts(model, hook_name, texts).activations.values())).double()


def principal(model, texts):
    """Principal directions, the largest variance first, by singular values."""
    x = activations(model, texts)
    return torch.linalg.svd(x - x.mean(0), full_matrices=False)


def check(model, texts, direction, **options):
    arguments = {"coefficient": 3.0, "prompts": PROMPTS, "variance": 0.9} | options
    return pathway_check(model, arguments.pop("hook_name", RESIDUAL), direction, texts, **arguments)


def test_a_direction_that_activations_use_is_not_flagged(model, texts):
    _, values, vectors = principal(model, texts)
    found = check(model, texts, vectors[0])
    held = (values**2).cumsum(0) / (values**2).sum()
    assert found.n_components == int((held < 0.9).sum()) + 1
    assert found.shares["active"] == pytest.approx(1) and found.dormant_effect == pytest.approx(0, abs=1e-3)
    assert not found.flagged and "not flagged" not in found.verdict() and "real text" in found.verdict()


def test_a_constructed_dormant_direction_is_flagged(model, texts):
    """A part that data use and that does nothing, and a part that they do not use and that does all."""
    _, _, vectors = principal(model, texts)
    unused = vectors[-1]
    found = check(model, texts, unused)
    assert found.shares["dormant"] == pytest.approx(1) and found.dormant_effect == pytest.approx(1)
    assert found.flagged and "dormant pathway" in found.verdict()
    weights = model.W_U.detach().double()
    gains = torch.stack([(v @ weights - (v @ weights).mean()).abs().max() for v in vectors])
    active, dormant = vectors[:5][gains[:5].argmin()], vectors[-5:][gains[-5:].argmax()]
    mixed = check(model, texts, 0.8 * active + 0.6 * dormant)
    assert mixed.shares["active"] == pytest.approx(0.64, abs=1e-6)
    assert sum(mixed.shares[part] for part in ("active", "dormant")) == pytest.approx(1)
    assert mixed.flagged and mixed.dormant_effect > 0.5 and mixed.shares["dormant"] < 0.4


def test_effects_are_those_of_plain_interventions(model, texts):
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    found = check(model, texts, direction, token=7)
    with torch.no_grad():
        for prompt, rows in found.cells.groupby("prompt"):
            base = model(prompt)[0, -1].double()
            with sx.add_direction(model, RESIDUAL, direction, 3.0):
                steered = model(prompt)[0, -1].double()
            whole = rows[rows["part"] == "whole"].iloc[0]
            change = steered - base
            assert whole["shift"] == pytest.approx(float(change[7] - change.mean()), abs=1e-4)
            kl = torch.nn.functional.kl_div(steered.log_softmax(-1), base.softmax(-1), reduction="sum")
            assert whole["kl"] == pytest.approx(float(kl), abs=1e-5)
    summary = found.summary().set_index("part")
    assert list(summary.index) == ["whole", "active", "dormant"] and set(summary["n_prompts"]) == {3}
    assert summary.loc["whole", "share"] == 1
    assert ((summary["kl_low"] <= summary["kl"]) & (summary["kl"] <= summary["kl_high"])).all()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_what_the_output_matrix_maps_to_zero_does_nothing(architecture, texts):
    model = shared_model(architecture, "SAETransformerBridge")
    weights = model.blocks[1].mlp.W_out.detach().double()
    null = torch.linalg.svd(weights, full_matrices=True)[0][:, -1]
    direction = 0.6 * weights[:, 0] / weights[:, 0].norm() + 0.8 * null
    found = check(model, texts, direction, hook_name=NEURONS)
    assert found.shares["unwritten"] == pytest.approx(0.64, abs=1e-4)
    effects = found.cells.groupby("part")[["shift", "kl"]].mean()
    assert abs(effects.loc["unwritten", "shift"]) < 1e-3 and effects.loc["unwritten", "kl"] < 1e-6
    assert effects.loc["written", "shift"] == pytest.approx(effects.loc["whole", "shift"], abs=1e-3)
    assert found.shares.keys() == {"active", "dormant", "written", "unwritten"}


def test_bad_input(model, texts):
    direction = torch.ones(model.cfg.d_model)
    for message, options in [
        (r"variance must be in \(0, 1\), got 1\.5", {"variance": 1.5}),
        ("coefficient must be finite and not 0, got 0", {"coefficient": 0}),
        ("coefficient must be finite and not 0, got nan", {"coefficient": math.nan}),
        ("token must be one of 0 to", {"token": -1}),
    ]:
        with pytest.raises(ValueError, match=message):
            check(model, texts, direction, **options)
    with pytest.raises(ValueError, match="as wide as the hook"):
        check(model, texts, torch.ones(3))
    with pytest.raises(ValueError, match="is zero"):
        check(model, texts, torch.zeros(model.cfg.d_model))
    with pytest.raises(ValueError, match="Give more texts"):
        check(model, texts[:1], direction)
