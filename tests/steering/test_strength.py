"""Matched strength and sampling: the search against functions of known shape and against the model itself."""

import math

import pytest
import torch

from saelens_ext.host.continued_text import text_after
from saelens_ext.host.hook_edits import hooked
from saelens_ext.steering import strength as steering_strength
from saelens_ext.steering.divergence_search import DivergenceSearch
from saelens_ext.steering.interventions import add_direction
from saelens_ext.steering.sampling import (
    SamplingOptions,
    _choose,
    mean_log_likelihoods,
    sample_texts,
)
from saelens_ext.steering.strength import match_strength, match_strengths
from tests.steering.steered import sample_steered

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ["I think that", "The value of an expression"]


@pytest.fixture(params=["tiny_bridge", "tiny_hooked", "tiny_gpt2_bridge", "tiny_gpt2_hooked"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def direction():
    return torch.randn(32, generator=torch.Generator().manual_seed(0))


def ids_of(model, text):
    return [0] + model.tokenizer(text, add_special_tokens=False)["input_ids"]


def divergences(model, prompt, direction, coefficient, hook=HOOK):
    """At every position of one prompt, one plain pass each."""
    ids = torch.tensor([ids_of(model, prompt)])
    with torch.no_grad():
        base = model(ids)[0].double().log_softmax(-1)
        with add_direction(model, hook, direction, coefficient):
            steered = model(ids)[0].double().log_softmax(-1)
    return torch.nn.functional.kl_div(steered, base, reduction="none", log_target=True).sum(-1)


def test_several_directions_are_searched_together_as_each_alone(model, direction):
    rows = torch.stack([direction, -3 * direction.flip(0), direction.roll(5)])
    targets = (0.02, 0.1)
    together = match_strengths(model, HOOK, rows, targets, prompts=PROMPTS, tolerance=1e-3, batch_size=8)
    assert len(together) == 3
    for row, found in zip(rows, together):
        alone = match_strength(model, HOOK, row, targets, prompts=PROMPTS, tolerance=1e-3)
        assert found.typical_norm == pytest.approx(alone.typical_norm) and set(found.curves) == {1, -1}
        for one, other in zip(found.strengths, alone.strengths, strict=True):
            assert (one.sign, one.target, one.status) == (other.sign, other.target, other.status)
            assert one.coefficient == pytest.approx(other.coefficient, rel=5e-3)
            assert math.copysign(1, one.coefficient) == one.sign
            assert (one.coefficient, one.kl) in found.curves[one.sign]


# --- the search on functions of known shape ---


def search(function, targets, *, limit=100.0, tolerance=0.01, batch_size=8, signs=(1,)):
    calls = []

    def evaluate(points):
        coefficients = [signs[row] * a for row, a in points]
        calls.extend(coefficients)
        return [function(a) for a in coefficients]

    found = DivergenceSearch(evaluate, signs).run(targets, tolerance, norm=1.0, limit=limit, batch_size=batch_size)
    return found, calls


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_roots_of_a_parabola_are_found_however_small(scale):
    targets = [1e-6, 0.025, 0.5]
    found, calls = search(lambda a: (a / scale) ** 2, targets, tolerance=1e-3)
    for strength, target in zip(found, targets):
        assert strength.reached and strength.monotone
        assert strength.coefficient == pytest.approx(scale * math.sqrt(target), rel=1e-3)
    assert len(calls) == len(set(calls)) == found[0].n_evaluations


def test_a_saturating_function_reports_its_largest_value_and_the_limit_is_kept():
    found, calls = search(lambda a: 0.3 * (1 - math.exp(-a)), [0.1, 0.4], limit=50.0)
    assert [s.status for s in found] == ["reached", "saturated"]
    assert found[1].kl == pytest.approx(0.3) and found[1].coefficient == 50.0
    assert max(calls) == 50.0


def test_of_several_roots_the_smallest_is_taken_and_it_is_said():
    # Rises to 1 at a = 3, falls, and rises again far beyond: 0.5 has three roots.
    def hill(a):
        return math.exp(-((a - 3) ** 2) / 4) * (a > 0) + (a / 60) ** 2

    (found,), _ = search(hill, [0.5])
    assert found.reached and not found.monotone
    assert 0 < found.coefficient < 3


def test_a_crossing_that_another_target_uncovers_is_followed():
    # The grid sees 0.15 at 4 and 0.64 at 8. On the way to the root of 0.6 lies a spike above 0.3's own root.
    def spiked(a):
        return 0.01 * a**2 + max(0.0, 0.4 - 2 * abs(a - 5.0))

    alone, _ = search(spiked, [0.3], tolerance=1e-3)
    found, calls = search(spiked, [0.3, 0.6], tolerance=1e-3)
    # Whatever was evaluated, nothing known lies above the target before the root that is given.
    for strength in [*alone, *found]:
        assert strength.reached
        assert all(spiked(a) < strength.target * 1.001 for a in calls if a < strength.coefficient)


def test_a_jump_over_the_target_ends_and_is_reported():
    (found,), calls = search(lambda a: 0.0 if a < 1.3 else 1.0, [0.5])
    assert found.status == "unresolved" and not found.reached
    assert found.coefficient == pytest.approx(1.3, rel=1e-5)
    assert len(calls) < 80


def test_overflow_ends_the_scan():
    found, _ = search(lambda a: a if a < 10 else math.nan, [5.0, 50.0])
    assert found[0].reached and found[1].status == "saturated" and found[1].kl < 10


def test_a_target_between_the_grid_and_an_overflow_is_reached():
    # The grid sees 8 and then an overflow.
    for overflow in (math.nan, math.inf):
        (found,), _ = search(lambda a: a if a < 12 else overflow, [9.0])
        assert found.reached and found.coefficient == pytest.approx(9, rel=0.01)


def test_signs_have_curves_of_their_own():
    found, _ = search(lambda a: a**2 if a > 0 else a**2 / 4, [0.25], signs=(1, -1))
    assert found[0].coefficient == pytest.approx(0.5, rel=0.01)
    assert found[1].coefficient == pytest.approx(-1.0, rel=0.01)


# --- the search on a model ---


def test_targets_are_attained_on_both_sides(model, direction):
    search = match_strength(model, HOOK, direction, (0.001, 0.1, 0.5), tolerance=0.002)
    for strength in search.strengths:
        assert strength.reached and math.copysign(1, strength.coefficient) == strength.sign
        actual = float(divergences(model, "I think that", direction, strength.coefficient)[-1])
        assert actual == pytest.approx(strength.target, rel=0.003)
        assert actual == pytest.approx(strength.kl, rel=1e-3)
    plus, minus = search.at(1, 0.5), search.at(-1, 0.5)
    assert abs(plus.coefficient) != pytest.approx(abs(minus.coefficient), rel=0.01)


def test_mlp_neurons_can_be_steered(tiny_bridge, tiny_hooked):
    neurons = torch.randn(64, generator=torch.Generator().manual_seed(1))
    found = [
        match_strength(model, "blocks.1.mlp.hook_post", neurons, (0.05,)).strengths
        for model in (tiny_bridge, tiny_hooked)
    ]
    for one, other in zip(*found):
        assert one.reached and one.coefficient == pytest.approx(other.coefficient, rel=1e-3)


def test_prompts_and_positions_are_averaged(tiny_bridge, direction):
    for average_over, pick in (("last", lambda kl: kl[-1]), ("all", lambda kl: kl[1:].mean())):
        search = match_strength(tiny_bridge, HOOK, direction, (0.2,), prompts=PROMPTS, average_over=average_over)
        for strength in search.strengths:
            each = [float(pick(divergences(tiny_bridge, p, direction, strength.coefficient))) for p in PROMPTS]
            assert sum(each) / 2 == pytest.approx(strength.kl, rel=1e-3)


def test_what_cannot_be_reached_is_reported(tiny_hooked, direction):
    search = match_strength(tiny_hooked, HOOK, direction, (0.1, 1000.0))
    for sign in (1, -1):
        assert search.at(sign, 0.1).reached
        missed = search.at(sign, 1000.0)
        assert missed.status == "saturated"
        assert missed.kl == max(kl for _, kl in search.curves[sign])
        assert abs(missed.coefficient) <= search.max_coefficient
    assert set(search.to_dataframe()["reached"]) == {True, False}


def test_the_limit_is_in_units_of_the_typical_norm(tiny_bridge, direction):
    free = match_strength(tiny_bridge, HOOK, direction, (0.1,))
    _, cache = tiny_bridge.run_with_cache(torch.tensor([ids_of(tiny_bridge, "I think that")]))
    norms = cache["blocks.1.hook_out"][0, 1:].norm(dim=-1)
    assert free.typical_norm == pytest.approx(float(norms.median()), rel=1e-5)
    held = match_strength(tiny_bridge, HOOK, direction, (0.1,), max_strength=1e-3)
    assert [s.status for s in held.strengths] == ["saturated"] * 2
    assert max(abs(a) for a, _ in held.curves[1]) == pytest.approx(1e-3 * free.typical_norm)


def test_batching_changes_nothing(model, direction):
    one, many = (match_strength(model, HOOK, direction, (0.05, 0.3), batch_size=b, tolerance=1e-3) for b in (1, 16))
    for single, batched in zip(one.strengths, many.strengths):
        assert batched.coefficient == pytest.approx(single.coefficient, rel=2e-3)
    shared = set(dict(one.curves[1])) & set(dict(many.curves[1]))
    assert len(shared) > 5
    for a in shared:
        assert dict(one.curves[1])[a] == pytest.approx(dict(many.curves[1])[a], rel=1e-3, abs=1e-9)


def test_targets_share_evaluations(tiny_hooked, direction, monkeypatch):
    asked = []
    original = steering_strength.DivergenceMeter.divergences
    monkeypatch.setattr(
        steering_strength.DivergenceMeter,
        "divergences",
        lambda self, points: asked.extend(points) or original(self, points),
    )
    together = match_strength(tiny_hooked, HOOK, direction, steering_strength.PAPER_TARGETS)
    assert len(asked) == len(set(asked)) == sum(together.at(sign, 0.5).n_evaluations for sign in (1, -1))
    n_together = len(asked)
    asked.clear()
    for target in steering_strength.PAPER_TARGETS:
        match_strength(tiny_hooked, HOOK, direction, (target,))
    assert n_together < 0.5 * len(asked)
    for sign in (1, -1):
        sizes = [abs(a) for a, _ in together.curves[sign]]
        assert sizes == sorted(sizes) and together.curves[sign][0] == (0.0, 0.0)


def test_only_the_direction_counts(tiny_bridge, direction):
    short, long = (match_strength(tiny_bridge, HOOK, scale * direction, (0.1,)) for scale in (1e-3, 1e3))
    for one, other in zip(short.strengths, long.strengths):
        assert one.coefficient == pytest.approx(other.coefficient, rel=1e-3)


def test_the_model_is_left_as_it_was(tiny_hooked, direction):
    seen = []
    tiny_hooked.add_hook(HOOK, lambda x, hook: seen.append(x.shape))
    tiny_hooked.train()
    state = torch.get_rng_state()
    try:
        with pytest.raises(ValueError):
            match_strength(tiny_hooked, HOOK, direction[:5], (0.1,))
        match_strength(tiny_hooked, HOOK, direction, (0.1,))
        sample_steered(tiny_hooked, "a", HOOK, direction, 1.0, n=1, max_new_tokens=2)
        assert tiny_hooked.training and all(m.training for m in tiny_hooked.blocks)
        assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
        seen.clear()
        tiny_hooked(torch.tensor([[0, 5]]))
        assert len(seen) == 1
        assert len(tiny_hooked.hook_dict[HOOK].fwd_hooks) == 1
    finally:
        tiny_hooked.eval()
        tiny_hooked.hook_dict[HOOK].remove_hooks("fwd", including_permanent=False)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"direction": torch.zeros(32)}, "zero"),
        ({"direction": torch.full((32,), math.nan)}, "non-finite"),
        ({"direction": torch.ones(2, 32)}, r"shape \(d,\)"),
        ({"direction": torch.ones(31)}, "width 31"),
        ({"hook_name": "blocks.1.hook_resid_pots"}, "hook_resid_post"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": (0.1, 0.0)}, "targets"),
        ({"signs": (2,)}, "signs"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_strength": -1.0}, "max_strength"),
        ({"typical_norm": 0.0}, "typical_norm"),
        ({"prompts": []}, "prompts is empty"),
    ],
)
def test_bad_input_is_refused(tiny_bridge, direction, changed, message):
    arguments = {"hook_name": HOOK, "direction": direction, "targets": (0.1,)} | changed
    with pytest.raises(ValueError, match=message):
        match_strength(tiny_bridge, **arguments)


def test_a_strength_that_was_not_asked_for(tiny_bridge, direction):
    with pytest.raises(ValueError, match="0.1"):
        match_strength(tiny_bridge, HOOK, direction, (0.1,)).at(1, 0.2)


# --- sampling ---


@pytest.mark.parametrize("hook", [HOOK, "hook_embed"])
def test_cached_sampling_is_that_of_whole_passes(model, direction, hook):
    ids = ids_of(model, "I think that")
    n_prompt = len(ids)
    with torch.no_grad(), add_direction(model, hook, direction, 9.0):
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    ((text,),) = sample_steered(model, "I think that", hook, direction, 9.0, n=1, max_new_tokens=6, temperature=0)
    assert text == text_after(model, ids[:n_prompt], ids[n_prompt:])
    ((plain,),) = sample_steered(model, "I think that", hook, direction, 0.0, n=1, max_new_tokens=6, temperature=0)
    assert plain != text


def test_a_continuation_depends_on_seed_prompt_and_number_alone(tiny_bridge, direction):
    def sample(prompts, n=4, seed=0, batch_size=32):
        return sample_steered(
            tiny_bridge, prompts, HOOK, direction, 2.0, n=n, seed=seed, max_new_tokens=8, batch_size=batch_size
        )

    first, second = sample(PROMPTS)
    torch.manual_seed(5)
    assert sample(PROMPTS[::-1]) == [second, first]
    assert sample(PROMPTS[0], n=2) == [first[:2]]
    assert sample(PROMPTS[0], batch_size=1) == [first]
    assert sample(PROMPTS[0], seed=1) != [first]
    assert len(set(first)) > 1


def test_prompts_of_equal_length_share_passes_and_give_the_texts_of_each_alone(model, direction):
    prompts = ["The value of an expression", "call 1", "call 2", "A cat sat here", "call 3"]
    lengths = [len(ids_of(model, prompt)) for prompt in prompts]
    assert lengths[1] == lengths[2] == lengths[4] and len(set(lengths)) == 3
    options = SamplingOptions(max_new_tokens=5, seed=2)
    sizes = []
    with add_direction(model, HOOK, direction, 3.0):
        alone = [sample_texts(model, prompt, n=4, options=options)[0] for prompt in prompts]
        with hooked(model, [("unembed.hook_out", lambda x, hook: sizes.append(len(x)))]):
            together = sample_texts(model, prompts, n=4, options=options, batch_size=8)
    assert together == alone and len({tuple(texts) for texts in together}) == 5
    assert set(sizes) == {4, 8} and sizes.count(8) == 5 and sizes.count(4) == 15


def test_both_hosts_sample_the_same(tiny_bridge, tiny_hooked, direction):
    one, other = (
        sample_steered(m, PROMPTS, HOOK, direction, 4.0, n=3, max_new_tokens=6) for m in (tiny_bridge, tiny_hooked)
    )
    assert one == other


def test_steering_by_zero_is_no_steering(tiny_hooked, direction):
    options = SamplingOptions(max_new_tokens=6, seed=3)
    assert sample_steered(tiny_hooked, "I", HOOK, direction, 0, n=3, max_new_tokens=6, seed=3) == sample_texts(
        tiny_hooked, "I", n=3, options=options
    )


def test_texts_hold_neither_prompt_nor_special_tokens(tiny_bridge):
    content = ids_of(tiny_bridge, " and more")[1:]
    prompt = ids_of(tiny_bridge, "I think")
    assert text_after(tiny_bridge, prompt, [*content, 1]) == " and more"
    assert text_after(tiny_bridge, prompt, [0, *content]) == " and more"
    assert text_after(tiny_bridge, prompt, [1]) == ""


def test_generation_ends_at_the_end_token(tiny_hooked):
    passes = []

    def always_end(logits, hook):
        passes.append(logits.shape)
        return torch.full_like(logits, -1e9).index_fill(-1, torch.tensor([1]), 0.0)

    with hooked(tiny_hooked, [("unembed.hook_out", always_end)]):
        assert sample_texts(tiny_hooked, "I", n=2, options=SamplingOptions(max_new_tokens=9)) == [["", ""]]
    assert len(passes) == 1


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    rows = logits.expand(10_000, -1)

    def shares(**options):
        tokens = _choose(rows, draws, SamplingOptions(**({"top_k": None} | options)))
        return torch.bincount(tokens, minlength=5).double() / 10_000

    assert torch.allclose(shares(), logits.double().softmax(0), atol=2e-4)
    assert torch.allclose(shares(temperature=2.0), (logits.double() / 2).softmax(0), atol=2e-4)
    two = logits.double().softmax(0) * torch.tensor([1, 0, 1, 0, 0])
    assert torch.allclose(shares(top_k=2), two / two.sum(), atol=2e-4)
    # 0.56 + 0.21 first holds three quarters of the mass.
    assert torch.allclose(shares(top_p=0.7), two / two.sum(), atol=2e-4)
    assert shares(top_p=0.3)[0] == 1 and shares(temperature=0)[0] == 1 and shares(top_k=99).sum() == 1
    assert int(_choose(logits[None], torch.tensor([1.0], dtype=torch.float64), SamplingOptions(top_k=2))) == 2


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": 0}, {"max_new_tokens": 0}]
)
def test_bad_sampling_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingOptions(**options)


def test_likelihoods_are_those_of_single_passes(model):
    texts = [" that is", "", " a much longer text than the others are", " x"]
    means = mean_log_likelihoods(model, "I think", texts, batch_size=2)
    assert math.isnan(means[1])
    prompt = ids_of(model, "I think")
    for text, mean in zip(texts, means.tolist()):
        if text:
            ids = prompt + ids_of(model, text)[1:]
            with torch.no_grad():
                scores = model(torch.tensor([ids]))[0].log_softmax(-1)
            each = [float(scores[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]
            assert mean == pytest.approx(sum(each) / len(each), rel=1e-4)
