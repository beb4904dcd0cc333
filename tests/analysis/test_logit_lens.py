"""The logit lens against the formulas of the norms, on both model classes."""

import warnings

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from saelens_ext.analysis import logit_lens as lens_module
from saelens_ext.analysis.logit_lens import logit_lens
from tests import models_zoo

DIRECTIONS = torch.randn(11, 32, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 12)[:, None]


@torch.no_grad()
def by_hand(model, u: torch.Tensor, kind: str) -> torch.Tensor:
    u = u / u.norm(dim=1, keepdim=True)
    if kind == "LN":
        u = u - u.mean(dim=1, keepdim=True)
    u = u / (u.pow(2).mean(dim=1, keepdim=True) + model.cfg.eps).sqrt() * model.ln_final.w
    if kind == "LN":
        u = u + model.ln_final.b
    return u @ model.W_U + model.b_U


CASES = [("tiny_hooked", "RMS"), ("tiny_bridge", "RMS"), ("tiny_gpt2_hooked", "LN"), ("tiny_gpt2_bridge", "LN")]


@pytest.fixture
def unlike_one(request):
    """Make the weights of the final norm and of the unembedding's bias matter, and put them back."""
    changed = []

    def change(model):
        for tensor in (model.ln_final.w, getattr(model.ln_final, "b", None)):
            if tensor is not None:
                changed.append((tensor, tensor.data.clone()))
                tensor.data.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(changed))))
        return model

    yield change
    for tensor, kept in changed:
        tensor.data.copy_(kept)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("n", [1, 5])
def test_formula(name, kind, n, request, unlike_one, monkeypatch):
    model = unlike_one(request.getfixturevalue(name))
    monkeypatch.setattr(lens_module, "_LOGITS_PER_CHUNK", 3 * model.W_U.shape[1])
    result = logit_lens(model, DIRECTIONS, top_n=n)
    logits = by_hand(model, DIRECTIONS, kind).sort(dim=1, descending=True)
    assert torch.allclose(result.promoted_logits, logits.values[:, :n], atol=1e-5)
    assert torch.equal(result.promoted_ids, logits.indices[:, :n])
    assert torch.allclose(result.suppressed_logits, logits.values.flip(1)[:, :n], atol=1e-5)
    assert torch.equal(result.suppressed_ids, logits.indices.flip(1)[:, :n])
    assert result.promoted_ids.dtype == torch.int64 and result.promoted_logits.dtype == torch.float32


@pytest.mark.parametrize("pair", [("tiny_hooked", "tiny_bridge"), ("tiny_gpt2_hooked", "tiny_gpt2_bridge")])
def test_both_model_classes_give_the_same_figures(pair, request):
    hooked, bridged = (logit_lens(request.getfixturevalue(name), DIRECTIONS) for name in pair)
    assert torch.equal(hooked.promoted_ids, bridged.promoted_ids) and torch.equal(
        hooked.suppressed_ids, bridged.suppressed_ids
    )
    assert torch.allclose(hooked.promoted_logits, bridged.promoted_logits, atol=1e-5)
    assert torch.allclose(hooked.suppressed_logits, bridged.suppressed_logits, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny_hooked", "tiny_bridge"])
def test_it_is_what_the_model_says_of_a_residual_stream_that_is_the_direction(name, request):
    model = request.getfixturevalue(name)
    u = DIRECTIONS[3] / DIRECTIONS[3].norm()
    point = next(
        hook for hook in ("blocks.2.hook_out", "blocks.2.hook_resid_post") if hook in dict(model.named_modules())
    )
    with torch.no_grad():
        logits = model.run_with_hooks(
            torch.tensor([[5, 6]]), fwd_hooks=[(point, lambda x, hook: u.expand_as(x).clone())]
        )[0, -1]
    result = logit_lens(model, DIRECTIONS[3:4])
    assert torch.allclose(result.promoted_logits[0], logits.topk(10).values, atol=1e-5)
    assert torch.equal(result.promoted_ids[0], logits.topk(10).indices)


@pytest.mark.parametrize("name", ["tiny_hooked", "tiny_gpt2_hooked"])
def test_folded_norms_keep_the_order(name, request, unlike_one):
    model = unlike_one(request.getfixturevalue(name))
    plain = logit_lens(model, DIRECTIONS)
    folded = folded_copy(model)
    assert folded.cfg.normalization_type in ("LNPre", "RMSPre")
    result = logit_lens(folded, DIRECTIONS)
    # The final norm ignores the mean under LN, and centring the unembedding shifts all logits of a direction alike.
    shift = (result.promoted_logits - plain.promoted_logits)[:, :1]
    assert torch.equal(result.promoted_ids, plain.promoted_ids) and torch.equal(
        result.suppressed_ids, plain.suppressed_ids
    )
    assert torch.allclose(result.promoted_logits, plain.promoted_logits + shift, atol=1e-4)
    assert torch.allclose(result.suppressed_logits, plain.suppressed_logits + shift, atol=1e-4)


def folded_copy(model):
    copy = type(model)(
        model.cfg.__class__.from_dict(model.cfg.to_dict() | {"tokenizer_name": None}), tokenizer=model.tokenizer
    )
    copy.load_and_process_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        fold_ln=True,
        center_writing_weights=False,
        center_unembed=model.cfg.normalization_type == "LN",
        fold_value_biases=False,
    )
    return copy.eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_bridge_in_compatibility_mode_keeps_the_order(architecture):
    model = models_zoo.make_model(architecture, "SAETransformerBridge")
    plain = logit_lens(model, DIRECTIONS)
    model.enable_compatibility_mode()
    result = logit_lens(model, DIRECTIONS)
    assert torch.equal(result.promoted_ids, plain.promoted_ids) and torch.equal(
        result.suppressed_ids, plain.suppressed_ids
    )


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_hooks_neither_run_nor_are_lost(name, kind, request):
    model = request.getfixturevalue(name)
    expected, calls = logit_lens(model, DIRECTIONS), []
    points = [part for part in [*model.ln_final.modules(), *model.unembed.modules()] if isinstance(part, HookPoint)]
    for point in points:
        point.add_hook(lambda x, hook: calls.append(1) or x * 3)
    try:
        assert torch.equal(logit_lens(model, DIRECTIONS).promoted_logits, expected.promoted_logits) and not calls
        with pytest.raises(ValueError), torch.no_grad():
            logit_lens(model, DIRECTIONS, top_n=10**6)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bridge warns when hooks of its norms are put to use
            model(torch.tensor([[5, 6]]))
        assert calls
    finally:
        for point in points:
            point.remove_hooks("fwd")


def test_only_the_direction_counts(tiny_bridge):
    assert torch.equal(
        logit_lens(tiny_bridge, DIRECTIONS).promoted_ids, logit_lens(tiny_bridge, 4 * DIRECTIONS).promoted_ids
    )


def test_of_no_direction(tiny_bridge):
    result = logit_lens(tiny_bridge, torch.zeros(0, 32), top_n=3)
    assert result.promoted_ids.shape == result.suppressed_logits.shape == (0, 3)


@pytest.mark.parametrize(
    ("directions", "top_n", "message"),
    [
        (torch.ones(3, 64), 10, "64 wide"),
        (torch.ones(32), 10, r"shape \(k, d_model\)"),
        (torch.stack([torch.ones(32), torch.zeros(32)]), 10, "Direction 1 is zero"),
        (torch.full((2, 32), torch.nan), 10, "non-finite"),
        (torch.ones(3, 32), 0, "top_n"),
        (torch.ones(3, 32), 10**6, "vocabulary"),
    ],
)
def test_bad_input(tiny_bridge, directions, top_n, message):
    with pytest.raises(ValueError, match=message):
        logit_lens(tiny_bridge, directions, top_n=top_n)
