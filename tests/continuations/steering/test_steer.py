"""Steering: is exactly what was asked for changed, and is what it does measured where tokens are predicted?"""

import pytest
import torch

from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.continuations.steering.latents import LatentScaler, Setting, choose_latents
from saelens_ext.continuations.steering.steer import PAPER_STRENGTHS, steer_continuations
from saelens_ext.host.models import resolve_hook
from saelens_ext.steering.interventions import add_direction
from tests.continuations._dictionaries import cases, make
from tests.models_zoo import MODEL_CLASSES, make_model

TEXTS = [" is a test of it", " x", " of one", " assertions are the most"]
HOSTS = [
    ("llama", MODEL_CLASSES[0]),
    ("llama", MODEL_CLASSES[1]),
    ("gpt2", MODEL_CLASSES[1]),
    ("gemma2", MODEL_CLASSES[1]),
]
OPTIONS = {"backend": "gradient", "max_sources": 10**6}


@pytest.fixture(scope="module", params=HOSTS, ids=lambda host: f"{host[0]}-{host[1][:6]}")
def host(request):
    architecture, model_class = request.param
    model = make_model(architecture, model_class)
    return architecture, model, score_continuations(model, "The assert statement", TEXTS)


@pytest.fixture(scope="module")
def llama():
    model = make_model("llama", "SAETransformerBridge")
    dictionaries = cases("llama")["several"]
    found = score_continuations(model, "The assert statement", TEXTS)
    return model, dictionaries, attribute_continuations(model, dictionaries, found, **OPTIONS)


def brute_force(model, found, row, hooks):
    """All measures of one continuation, token by token, from the whole sequence's logits under hand-made hooks."""
    ids = [*found.prefix_ids, *found.ids_of(row)]
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)[0].double()
    columns = range(len(found.prefix_ids), len(ids))
    log_probs = [float(logits[t - 1].log_softmax(dim=0)[ids[t]]) for t in columns]
    cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
    raw = cap * torch.atanh(logits / cap) if cap > 0 else logits
    demeaned = [float(raw[t - 1, ids[t]] - raw[t - 1].mean()) for t in columns]
    return {
        "demeaned_logit": sum(demeaned) / len(columns),
        "mean_log_prob": sum(log_probs) / len(columns),
        "log_prob": sum(log_probs),
    }


def by_hand(dictionaries, direction, strength, hooks):
    """Hooks that turn plain SAEs' latents one by one, each read off the stream as it is before any of its hook is
    turned.
    """
    found = []
    for index, sae in enumerate(dictionaries):
        mine = [j for j, d in enumerate(direction.sources.dictionaries) if d == index]

        def turn(x, hook, sae=sae, mine=mine):
            changed = x.clone()
            for j in mine:
                p, latent = direction.sources.positions[j], direction.sources.latents[j]
                h = sae.encode(x[0, p])[latent]
                changed[0, p] += strength * direction.signs[j] * h * sae.W_dec[latent].detach()
            return changed

        if mine:
            found.append((hooks[index], turn))
    return found


@pytest.mark.parametrize(("top", "sign"), [(1, "all"), (10, "all"), (6, "negative")])
def test_effects_are_those_of_hand_made_edits_measured_one_by_one(host, top, sign):
    architecture, model, found = host
    dictionaries = cases(architecture)["several"]
    attributed = attribute_continuations(model, dictionaries, found, **OPTIONS)
    strengths = (-1.0, 0.5)
    steered = steer_continuations(
        model, dictionaries, attributed, attributed.signatures[0], top=top, sign=sign, strengths=strengths
    )
    if top == 10:
        assert len(set(steered.direction.sources.hooks)) > 1 and len(set(steered.direction.sources.positions)) > 1
    assert all((changes.abs() > 1e-4).all() for changes in steered.changes.values())
    hooks = [resolve_hook(model, sae.cfg.metadata.hook_name) for sae in dictionaries]
    for row in range(len(found)):
        before = brute_force(model, found, row, [])
        for s, strength in enumerate(strengths):
            after = brute_force(model, found, row, by_hand(dictionaries, steered.direction, strength, hooks))
            for measure in before:
                assert float(steered.baseline[measure][row]) == pytest.approx(before[measure], rel=1e-4, abs=1e-5)
                change = float(steered.changes[measure][s, row])
                assert change == pytest.approx(after[measure] - before[measure], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["several", "transcoders", "skip", "normalising", "neurons", "heads", "own"])
def test_small_strengths_do_what_the_gradient_says(host, name):
    architecture, model, found = host
    dictionaries = cases(architecture)[name]
    attributed = attribute_continuations(model, dictionaries, found, **OPTIONS)
    step = 3e-3
    steered = steer_continuations(
        model, dictionaries, attributed, attributed.signatures[0], top=5, strengths=(-step, step), rows=[2, 0, 3]
    )
    changes = steered.changes["demeaned_logit"]
    signed = attributed.signatures[:, list(steered.direction.columns)] * torch.tensor(steered.direction.signs)
    expected = signed.sum(dim=1)[[2, 0, 3]].double()
    torch.testing.assert_close(
        (changes[1] - changes[0]) / (2 * step), expected, rtol=0.02, atol=0.01 * float(expected.abs().max())
    )


def test_strength_zero_changes_nothing_at_all(llama):
    model, dictionaries, found = llama
    steered = steer_continuations(model, dictionaries, found, found.signatures[1])
    zero = PAPER_STRENGTHS.index(0.0)
    for measure, changes in steered.changes.items():
        assert (changes[zero] == 0).all()
        assert (changes[[i for i in range(len(PAPER_STRENGTHS)) if i != zero]] != 0).all(), measure
    scaler = LatentScaler(model, dictionaries, found.sources)
    assert scaler.hooks([Setting(steered.direction, 0.0)]) == []
    (_, hook), *_ = scaler.hooks([Setting(steered.direction, strength) for strength in (0.0, 1.0)])
    x = torch.randn(2, len(found.prefix_ids), 32, generator=torch.Generator().manual_seed(0))
    changed = hook(x)
    assert torch.equal(changed[0], x[0]) and not torch.equal(changed[1], x[1])
    assert torch.allclose(steered.baseline["mean_log_prob"], found.mean_log_probs, atol=1e-5)


def test_results_do_not_depend_on_batches_rows_or_the_cache(llama, monkeypatch):
    model, dictionaries, found = llama
    whole = steer_continuations(model, dictionaries, found, found.signatures[0], top=5, strengths=(-1, 1))

    def same(other, rows=(0, 1, 2, 3)):
        for measure, changes in whole.changes.items():
            torch.testing.assert_close(other.changes[measure], changes[:, list(rows)], rtol=1e-4, atol=2e-5)

    options = {"top": 5, "strengths": (-1, 1)}
    same(steer_continuations(model, dictionaries, found, found.signatures[0], batch_size=1, **options))
    same(
        steer_continuations(model, dictionaries, found, found.signatures[0], batch_size=3, rows=[3, 1], **options),
        (3, 1),
    )
    same(steer_continuations(model, dictionaries, found, whole.direction, strengths=(-1, 1)))
    monkeypatch.setattr("saelens_ext.continuations.steering.passes.SteeredPasses._cached", False)
    same(steer_continuations(model, dictionaries, found, found.signatures[0], batch_size=3, **options))


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_hooks_of_the_user_act_and_survive(model_class):
    model = make_model("llama", model_class)
    dictionaries = [make("standard", "blocks.1.hook_resid_post")]
    found = score_continuations(model, "The assert statement", TEXTS)
    found = attribute_continuations(model, dictionaries, found, **OPTIONS)
    plain = steer_continuations(model, dictionaries, found, found.signatures[0], strengths=(1,))
    seen = []
    point = model.hook_dict[resolve_hook(model, "blocks.2.hook_resid_post")]
    point.add_hook(lambda x, hook: seen.append(x.shape[1]))
    push = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with add_direction(model, "blocks.0.hook_resid_post", push, 30.0, positions=[2]):
        pushed = steer_continuations(model, dictionaries, found, found.signatures[0], strengths=(1,))
        expected = score_continuations(model, "The assert statement", TEXTS).mean_log_probs
    torch.testing.assert_close(pushed.baseline["mean_log_prob"], expected, rtol=1e-4, atol=1e-4)
    assert (pushed.baseline["mean_log_prob"] - plain.baseline["mean_log_prob"]).abs().min() > 1e-3
    assert len(point.fwd_hooks) == 1 and seen and min(seen) > len(found.prefix_ids)
    point.remove_hooks()
    again = steer_continuations(model, dictionaries, found, found.signatures[0], strengths=(1,))
    assert torch.equal(again.changes["log_prob"], plain.changes["log_prob"])


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_one_token_of_prefix_and_one_of_continuation(model_class):
    model = make_model("llama", model_class)
    dictionaries = [make("standard", "blocks.1.hook_mlp_out")]
    found = score_continuations(model, "", [[65], [66, 67]])
    found = attribute_continuations(model, dictionaries, found, **OPTIONS)
    steered = steer_continuations(model, dictionaries, found, found.signatures[0], strengths=(1,))
    assert set(steered.direction.sources.positions) == {0}
    hooks = by_hand(dictionaries, steered.direction, 1.0, [resolve_hook(model, "blocks.1.hook_mlp_out")])
    for row in range(2):
        change = brute_force(model, found, row, hooks)["log_prob"] - brute_force(model, found, row, [])["log_prob"]
        assert float(steered.changes["log_prob"][0, row]) == pytest.approx(change, abs=1e-4)


def test_only_latents_are_turned_and_their_share_is_told(llama):
    _, _, found = llama
    weights = found.signatures[0]
    latent = torch.tensor([kind == "latent" for kind in found.sources.kinds])
    chosen = choose_latents(found.sources, weights, top=4)
    best = torch.where(latent, weights.abs(), 0).topk(4)
    assert list(chosen.columns) == best.indices.tolist()
    assert chosen.steered_share == pytest.approx(float(best.values.sum() / weights.abs().sum()), rel=1e-5)
    assert chosen.steerable_share == pytest.approx(float(weights[latent].abs().sum() / weights.abs().sum()), rel=1e-5)
    assert chosen.steerable_share < 0.99
    for sign, factor in (("positive", 1), ("negative", -1)):
        chosen = choose_latents(found.sources, weights, top=4, sign=sign)
        best = torch.where(latent, factor * weights, -1).topk(4)
        assert list(chosen.columns) == best.indices.tolist() and chosen.signs == (factor,) * 4
    frame = chosen.to_dataframe()
    assert (frame["weight"] < 0).all() and frame["column"].tolist() == list(chosen.columns)


def test_the_table_has_a_row_for_every_number(llama):
    model, dictionaries, found = llama
    steered = steer_continuations(model, dictionaries, found, found.signatures[0], strengths=(-1, 0, 1), rows=[2, 0])
    frame = steered.to_dataframe()
    assert len(frame) == 3 * 3 * 2
    one = frame[(frame["row"] == 0) & (frame["strength"] == 1) & (frame["measure"] == "log_prob")]
    assert one["change"].item() == float(steered.changes["log_prob"][2, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": ()}, "strengths must be one or more"),
        ({"strengths": (1, float("nan"))}, "strengths must be one or more"),
        ({"strengths": (1, 1.0)}, "different"),
        ({"sign": "postive"}, "Did you mean 'positive'"),
        ({"top": 0}, "top must be a whole number"),
        ({"rows": []}, "rows must be one or more of 0 to 3"),
        ({"rows": [4]}, "rows must be one or more of 0 to 3"),
        ({"direction": torch.ones(3)}, "3 weights"),
        ({"direction": torch.full((10**4,), torch.nan)}, "weights"),
        ({"dictionaries": []}, "0 dictionaries were given"),
        ({"dictionaries": cases("llama")["several"][::-1]}, "in the order of the attribution"),
    ],
)
def test_bad_input_is_named(llama, change, message):
    model, dictionaries, found = llama
    arguments = {"dictionaries": dictionaries, "direction": found.signatures[0]} | change
    dictionaries, direction = arguments.pop("dictionaries"), arguments.pop("direction")
    with pytest.raises(ValueError, match=message):
        steer_continuations(model, dictionaries, found, direction, **arguments)


def test_directions_without_anything_to_turn_say_so(llama):
    model, dictionaries, found = llama
    errors = attribute_continuations(model, dictionaries, found, kinds=("error",), **OPTIONS)
    with pytest.raises(ValueError, match="no source that can be scaled.*'error'"):
        steer_continuations(model, dictionaries, errors, errors.signatures[0])
    with pytest.raises(ValueError, match="No latent has a negative weight"):
        steer_continuations(model, dictionaries, found, found.signatures[0].abs(), sign="negative")
    with pytest.raises(ValueError, match="name no sources"):
        steer_continuations(model, dictionaries, found.with_signatures(found.signatures), found.signatures[0])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "olmo2"])
def test_in_the_middle_of_a_block_both_hosts_steer_alike(architecture):
    results = []
    for model_class in MODEL_CLASSES:
        model, sae = make_model(architecture, model_class), make("standard", "blocks.1.hook_resid_mid")
        found = score_continuations(model, "The assert statement", TEXTS)
        found = attribute_continuations(model, sae, found, **OPTIONS)
        results.append(
            steer_continuations(model, sae, found, found.signatures[0], top=3, strengths=(-1, 1), generate=2)
        )
    one, other = results
    assert one.generations == other.generations
    for measure, changes in one.changes.items():
        torch.testing.assert_close(other.changes[measure], changes, rtol=1e-3, atol=1e-4)
        assert (changes.abs() > 1e-3).any()


def test_a_place_that_cannot_be_changed_is_refused():
    model = make_model("gptj", "SAETransformerBridge")
    sae = make("standard", "blocks.1.ln1.hook_in")
    found = score_continuations(model, "The assert statement", TEXTS)
    found = attribute_continuations(model, sae, found, backend="gradient", max_sources=10**6)
    with pytest.raises(ValueError, match="on a branch"):
        steer_continuations(model, sae, found, found.signatures[0])
