"""Overlap of supports against loops and scipy, and the effect of neuron groups against hooks by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom

from saelens_ext.analysis.neuron_effect import _Change, neuron_group_effect
from saelens_ext.analysis.neuron_overlap import core_and_exclusive_neurons, neuron_overlap
from saelens_ext.host.models import load_model, resolve_hook
from tests import models_zoo

NEURONS = "blocks.1.mlp.hook_post"
D_MLP = models_zoo.D_MLP["llama"]
MODELS = ("tiny_hooked", "tiny_bridge", "tiny_gpt2_hooked", "tiny_gpt2_bridge")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_features(k: int, d: int, size: int, seed: int = 0) -> torch.Tensor:
    """Signed features on supports that chance chose."""
    features, source = torch.zeros(k, d), generator(seed)
    for row in features:
        row[torch.randperm(d, generator=source)[:size]] = torch.randn(size, generator=source)
    return features


# --- overlap ---


@pytest.mark.parametrize("population", ["used", "all", 50])
def test_overlaps_and_their_probabilities_are_those_of_a_loop(population):
    features = random_features(7, 60, 5)
    features[2, :40] = 1.0
    features[3] = 0
    features[6] = features[5] * torch.where(torch.arange(60) % 2 == 0, 1.0, -2.0)
    found = neuron_overlap(features, population=population)
    sets = [set(row.nonzero().flatten().tolist()) for row in features]
    size = {"used": len(set().union(*sets)), "all": 60, 50: 50}[population]
    assert found.population == size and found.sizes.tolist() == [len(s) for s in sets]
    for i in range(7):
        for j in range(7):
            shared = sets[i] & sets[j]
            union = sets[i] | sets[j]
            assert found.overlap[i, j] == len(shared)
            assert found.jaccard[i, j] == pytest.approx(len(shared) / len(union) if union else 0)
            assert found.same_sign[i, j] == sum(bool(features[i, n] * features[j, n] > 0) for n in shared)
            assert found.expected[i, j] == pytest.approx(len(sets[i]) * len(sets[j]) / size)
            if i == j:
                assert math.isnan(found.p_value[i, j]) and math.isnan(found.p_adjusted[i, j])
                continue
            chances = hypergeom(size, len(sets[i]), len(sets[j]))
            assert found.p_value[i, j] == pytest.approx(sum(chances.pmf(x) for x in range(len(shared), 61)), abs=1e-12)


@pytest.mark.parametrize("correction", ["bh", "by"])
def test_the_correction_is_for_the_number_of_pairs(correction):
    found = neuron_overlap(random_features(9, 40, 8), correction=correction)
    i, j = np.triu_indices(9, 1)
    p = found.p_value.numpy()[i, j]
    n = len(p)
    harmonic = sum(1 / r for r in range(1, n + 1)) if correction == "by" else 1
    order = np.argsort(p)
    expected = np.empty(n)
    for place, index in enumerate(order):
        expected[index] = min(1, min(p[order[later]] * n * harmonic / (later + 1) for later in range(place, n)))
    assert np.allclose(found.p_adjusted.numpy()[i, j], expected)
    assert torch.equal(found.p_adjusted.nan_to_num(), found.p_adjusted.T.nan_to_num())


def test_supports_that_chance_chose_are_rarely_found_and_a_shared_core_is():
    features = random_features(120, 400, 20, seed=1)
    i, j = torch.triu_indices(120, 120, offset=1)
    assert (neuron_overlap(features).p_value[i, j] <= 0.05).double().mean() < 0.05
    assert (neuron_overlap(features).p_adjusted[i, j] <= 0.05).double().mean() < 0.001
    features[:4, :14] = 1.0
    found = neuron_overlap(features)
    assert (found.p_adjusted[:4, :4].nan_to_num(0) < 0.01).all()
    assert (found.p_adjusted[i, j] <= 0.05).sum() == 6


def test_scale_and_overall_sign_of_a_feature_change_nothing_but_the_agreement():
    features = random_features(5, 30, 6)
    other = features * torch.tensor([1e-20, -1e20, 3, -4, 5])[:, None]
    one, two = neuron_overlap(features), neuron_overlap(other)
    assert torch.equal(one.overlap, two.overlap) and torch.equal(one.p_value.nan_to_num(), two.p_value.nan_to_num())
    assert torch.equal(two.same_sign[0, 1], one.overlap[0, 1] - one.same_sign[0, 1])


def test_the_table_lists_every_pair_once_the_least_likely_first():
    features = random_features(6, 50, 5)
    features[4] = features[1]
    found = neuron_overlap(features)
    table = found.to_dataframe()
    assert str(found).startswith(f"6 features over {found.population} neurons, the most surprising of 15 pairs\n")
    assert len(str(found).splitlines()) == 12 and str(found).splitlines()[2].split()[:2] == ["1", "4"]
    assert len(table) == 15 and (table["i"] < table["j"]).all()
    assert table.loc[0, ["i", "j", "overlap"]].tolist() == [1, 4, 5]
    assert table["p_value"].is_monotonic_increasing


# --- core and exclusive neurons ---


def test_core_and_exclusive_neurons_are_those_of_sets():
    features = random_features(8, 30, 12, seed=3)
    group = [6, 1, 4]
    sets = {row: set(features[row].nonzero().flatten().tolist()) for row in group}
    found = core_and_exclusive_neurons(features, group)
    assert set(found.core.indices.tolist()) == sets[6] & sets[1] & sets[4] != set()
    units = torch.nn.functional.normalize(features, dim=1)
    assert torch.allclose(found.core.weights, units[group].mean(0)[found.core.indices])
    assert list(found.exclusive) == group
    for row, neurons in found.exclusive.items():
        others = set().union(*(sets[other] for other in group if other != row))
        assert set(neurons.indices.tolist()) == sets[row] - others != set()
        assert torch.allclose(neurons.weights, units[row, neurons.indices])
    two = core_and_exclusive_neurons(features, group, shared_by=2)
    expected = {n for n in range(30) if sum(n in s for s in sets.values()) >= 2}
    assert set(two.core.indices.tolist()) == expected and two.shared_by == 2
    assert len(two.core) == len(expected) > len(found.core)


# --- effects of neuron groups ---

PROMPTS = ["The value of x", "A statement may be"]
GROUP, WEIGHTS = [3, 40, 17], [2.0, -1.0, 0.5]


@torch.no_grad()
def by_hand(model, prompt: str, neurons, weights, mode: str, positions: str) -> torch.Tensor:
    """Logits at the last position, changed minus unchanged."""
    ids = torch.tensor([[0, *model.tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    columns = [ids.shape[1] - 1] if positions == "last" else list(range(1, ids.shape[1]))

    def edit(x, hook):
        x = x.clone()
        for column in columns:
            for neuron, weight in zip(neurons, weights):
                x[0, column, neuron] = weight + (x[0, column, neuron] if mode == "add" else 0)
        return x

    with model.hooks(fwd_hooks=[(resolve_hook(model, NEURONS), edit)]):
        changed = model(ids)
    return (changed - model(ids))[0, -1]


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("mode", ["add", "set"])
@pytest.mark.parametrize("name", MODELS)
def test_the_effect_is_that_of_a_hook_by_hand(request, name, mode, positions):
    model = request.getfixturevalue(name)
    found = neuron_group_effect(
        model, NEURONS, GROUP, WEIGHTS, [5, 77, 200], PROMPTS, mode=mode, positions=positions, n_random=2
    )
    expected = torch.stack([by_hand(model, p, GROUP, WEIGHTS, mode, positions)[[5, 77, 200]] for p in PROMPTS])
    assert expected.abs().max() > 0.01
    assert torch.allclose(found.by_prompt, expected.double(), atol=1e-4)
    assert torch.allclose(found.effect, expected.double().mean(0), atol=1e-4)
    assert not any(handle for point in model.hook_dict.values() for handle in getattr(point, "fwd_hooks", ())), (
        "a hook stayed"
    )


def test_log_probabilities_change_as_those_of_the_logits(tiny_bridge):
    found = neuron_group_effect(
        tiny_bridge, NEURONS, GROUP, WEIGHTS, [5], PROMPTS[0], measure="log_probability", n_random=1
    )
    ids = torch.tensor([[0, *tiny_bridge.tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        before = tiny_bridge(ids)[0, -1]
    after = before + by_hand(tiny_bridge, PROMPTS[0], GROUP, WEIGHTS, "add", "last")
    assert found.effect[0] == pytest.approx(float(after.log_softmax(0)[5] - before.log_softmax(0)[5]), abs=1e-4)


@pytest.mark.parametrize("model_class", models_zoo.MODEL_CLASSES)
def test_neurons_that_write_a_token_are_told_from_random_ones(model_class):
    hf_model = models_zoo.make_hf_model("llama")
    group = torch.tensor([5, 21, 33, 60])
    with torch.no_grad():
        hf_model.model.layers[2].mlp.down_proj.weight[:, group] = hf_model.lm_head.weight[[123]].T
    model = load_model(
        "tiny", model_class=model_class, hf_model=hf_model, tokenizer=models_zoo.make_tokenizer(), device="cpu"
    )
    found = neuron_group_effect(
        model, "blocks.2.mlp.hook_post", group, torch.full((4,), 3.0), [123, 50], PROMPTS, n_random=99, confidence=0.9
    )
    assert found.effect[0] > found.control_high[0] and found.p_value[0] == pytest.approx(0.02)
    assert found.p_value[1] > 0.02
    assert found.control.shape == (99, 2)
    assert (found.control_low < found.control.median(0).values).all() and (
        found.control.median(0).values < found.control_high
    ).all()
    inside = ((found.control >= found.control_low) & (found.control <= found.control_high)).double().mean(0)
    assert torch.allclose(inside, torch.full((2,), 0.9, dtype=torch.float64), atol=0.02)
    table = found.to_dataframe()
    assert table["token_id"].tolist() == [123, 50] and table["effect"].tolist() == found.effect.tolist()
    heading, columns, *lines = str(found).splitlines()
    assert heading.startswith("Change of the logit over ") and heading.endswith(" beside 99 random groups")
    assert "p_value" in columns and len(lines) == 2 and f"{float(found.effect[0]):.6f}" in lines[0]


def test_a_group_that_is_random_itself_is_not_remarkable(tiny_hooked):
    p_values = []
    for seed in range(10):
        group = torch.randperm(D_MLP, generator=generator(seed))[:6]
        found = neuron_group_effect(
            tiny_hooked, NEURONS, group, torch.ones(6), list(range(3, 23)), "x y", n_random=19, seed=seed
        )
        p_values.append(found.p_value)
    p = torch.cat(p_values)
    # Tokens of one draw go together, so 200 p-values are worth far fewer.
    assert (p <= 0.1).double().mean() < 0.25 and 0.35 < p.mean() < 0.75 and len(p.unique()) == 10


@pytest.mark.parametrize("is_set", [True, False])
def test_random_groups_change_the_activation_by_the_same_norm(is_set):
    activation = torch.randn(1, 5, D_MLP, generator=generator(1)).expand(3, -1, -1)
    indices = torch.tensor([[3, 40, 17], [1, 2, 63], [9, 8, 7]])
    values = torch.tensor([[2.0, -1.0, 0.5], [0.5, 2.0, -1.0], [-1.0, 2.0, 0.5]])
    change = _Change(indices, values, is_set, "somewhere")
    columns = torch.tensor([1, 4])
    delta = change.hook(slice(0, 3), columns)(activation) - activation
    assert (delta[:, [0, 2, 3]] == 0).all()
    norms = delta[:, columns].norm(dim=2)
    assert (norms > 0.5).all() and torch.allclose(norms, norms[:1].expand(3, -1), rtol=1e-5)
    for row in range(3):
        assert set(delta[row, 1].nonzero().flatten().tolist()) == set(indices[row].tolist())


def test_random_groups_come_from_the_pool_and_the_seed(tiny_bridge, monkeypatch):
    seen = []
    real = _Change.hook
    monkeypatch.setattr(
        _Change, "hook", lambda self, ways, columns: (seen.append(self.indices), real(self, ways, columns))[1]
    )
    options = {"control_pool": [3, 4, 5, 6, 7, 8, 9], "n_random": 20}
    one = neuron_group_effect(tiny_bridge, NEURONS, GROUP, WEIGHTS, [5], PROMPTS, seed=1, batch_size=4, **options)
    assert seen[0].shape == (21, 3) and seen[0][0].tolist() == GROUP
    assert set(seen[0][1:].flatten().tolist()) == {4, 5, 6, 7, 8, 9}
    assert all(len(set(row)) == 3 for row in seen[0].tolist())
    again = neuron_group_effect(tiny_bridge, NEURONS, GROUP, WEIGHTS, [5], PROMPTS, seed=1, batch_size=32, **options)
    other = neuron_group_effect(tiny_bridge, NEURONS, GROUP, WEIGHTS, [5], PROMPTS, seed=2, **options)
    assert torch.allclose(one.control, again.control, atol=1e-5)
    assert not torch.allclose(one.control, other.control, atol=1e-3)


def test_tokens_may_be_named(tiny_bridge):
    ids = tiny_bridge.tokenizer(" the", add_special_tokens=False)["input_ids"]
    named = neuron_group_effect(tiny_bridge, NEURONS, GROUP, WEIGHTS, [" the", 5], PROMPTS, n_random=1)
    assert named.token_ids.tolist() == [*ids, 5] and named.tokens[0] == " the"


def test_the_model_keeps_its_mode_and_its_hooks(tiny_hooked):
    calls = []
    tiny_hooked.train()
    try:
        with tiny_hooked.hooks(fwd_hooks=[(NEURONS, lambda x, hook: calls.append(len(x)))]):
            neuron_group_effect(tiny_hooked, NEURONS, GROUP, WEIGHTS, [5], PROMPTS, n_random=3)
            n = len(calls)
            tiny_hooked(torch.tensor([[0, 5, 6]]))
        assert n > 0 and len(calls) == n + 1 and tiny_hooked.training
    finally:
        tiny_hooked.eval()


# --- bad input ---


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: neuron_overlap(torch.ones(1, 5)), "k of at least 2"),
        (lambda: neuron_overlap(torch.full((2, 5), math.inf)), "non-finite"),
        (lambda: neuron_overlap(torch.ones(2, 5), population=4), "from 5, .* to 5"),
        (lambda: neuron_overlap(torch.ones(2, 5), population=6), "got 6"),
        (lambda: core_and_exclusive_neurons(torch.ones(3, 5), [1]), "at least two"),
        (lambda: core_and_exclusive_neurons(torch.ones(3, 5), [1, 1]), "different"),
        (lambda: core_and_exclusive_neurons(torch.ones(3, 5), [1, 3]), "0 to 2"),
        (lambda: core_and_exclusive_neurons(torch.ones(3, 5), [1, 2], shared_by=3), "from 2 to 2"),
    ],
)
def test_features_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"neurons": []}, "one or more different"),
        ({"neurons": [1, 1, 2]}, "one or more different"),
        ({"neurons": [1, 2, D_MLP]}, "neurons must lie from 0 to 63"),
        ({"weights": [1.0]}, "3 neurons, shape"),
        ({"weights": [1.0, math.nan, 0.0]}, "non-finite"),
        ({"tokens_of_interest": []}, "at least one token"),
        ({"tokens_of_interest": "Monday"}, "at least one token"),
        ({"tokens_of_interest": [" Wednesday"]}, "not one token but"),
        ({"tokens_of_interest": [models_zoo.VOCABULARY]}, "0 to 319"),
        ({"prompts": []}, "at least one prompt"),
        ({"hook_name": "blocks.7.mlp.hook_post"}, "has no hook"),
        ({"control_pool": [3, 40, 1, 2]}, "got 2: widen it"),
        ({"control_pool": [64]}, "control_pool must lie"),
        ({"n_random": 0}, "n_random"),
        ({"confidence": 1.0}, "confidence"),
        ({"prompts": ["</s>"], "positions": "all"}, "special tokens only"),
    ],
)
def test_an_experiment_that_makes_no_sense_is_refused(tiny_bridge, changed, message):
    arguments = {
        "hook_name": NEURONS,
        "neurons": GROUP,
        "weights": WEIGHTS,
        "tokens_of_interest": [5],
        "prompts": PROMPTS,
        "n_random": 2,
    }
    with pytest.raises(ValueError, match=message):
        neuron_group_effect(tiny_bridge, **(arguments | changed))
