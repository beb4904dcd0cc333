"""Methods score and act at their own hooks, and baselines are what they are called."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.concepts.detector import Detector
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.evals import baselines
from saelens_ext.evals.methods import Method, check_methods
from tests import models_zoo
from tests.continuations._dictionaries import make

HOOK = "blocks.1.hook_resid_post"
D = models_zoo.D_MODEL


def draws(n=60, d=D, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + torch.arange(d) / d


def partition():
    x = torch.nn.functional.normalize(draws(12), dim=1)
    return ExemplarPartition.from_regions(x[:6], x[6:], draws(1, seed=3)[0], 0.6, metadata={"hook_name": HOOK})


def methods():
    transcoder = make("transcoder", "blocks.0.ln2.hook_normalized", write="blocks.0.hook_mlp_out", d_sae=7)
    read = Method.from_dictionary("transcoder codes", transcoder, similarity="code")
    return {
        "partition": (Method.from_dictionary("regions", partition()), HOOK, HOOK),
        "means": (Method.from_dictionary("means", partition(), basis="mean"), HOOK, HOOK),
        "sae": (Method.from_dictionary("sae", make("topk", HOOK, k=3), similarity="code", latents=[2, 5]), HOOK, HOOK),
        "transcoder": (
            Method.from_dictionary("transcoder", transcoder),
            "blocks.0.hook_mlp_out",
            "blocks.0.hook_mlp_out",
        ),
        "transcoder_codes": (read, "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"),
        "directions": (Method.from_directions("three", draws(3), HOOK, both_signs=True), HOOK, HOOK),
        "neurons": (
            baselines.single_neurons(draws(d=models_zoo.D_MLP["llama"]), 4, "blocks.2.mlp.hook_post"),
            "blocks.2.mlp.hook_post",
            "blocks.2.mlp.hook_post",
        ),
    }


@pytest.mark.parametrize("name", methods())
def test_a_method_acts_at_its_own_hook(tiny_hooked, name):
    method, reads_at, acts_at = methods()[name]
    assert (method.detector.hook_name, method.acts_at) == (reads_at, acts_at)
    k = len(method.detector.names)
    assert method.directions.shape[0] == len(method.latents) == len(method.signs) == k
    torch.testing.assert_close(method.directions.norm(dim=1), torch.ones(k))
    tokens, seen = torch.tensor([[0, 5, 9, 4]]), []

    def look(x, hook=None):
        seen.append(x.clone())

    tiny_hooked.run_with_hooks(tokens, fwd_hooks=[(acts_at, look)])
    with method.intervention(tiny_hooked, k - 1, -2.5) as model:
        model.run_with_hooks(tokens, fwd_hooks=[(acts_at, look)])
    added = seen[1] - seen[0]
    torch.testing.assert_close(added, (-2.5 * method.directions[-1]).expand_as(added), atol=1e-4, rtol=1e-4)
    tiny_hooked.run_with_hooks(tokens, fwd_hooks=[(acts_at, look)])
    assert torch.equal(seen[2], seen[0])


def test_opposites_are_offered_with_their_signs():
    method, x = Method.from_directions("two", draws(2), HOOK, both_signs=True), draws(9, seed=1)
    assert (method.latents, method.signs) == ((0, 1, 0, 1), (1, 1, -1, -1))
    scores = method.detector.score(x)
    torch.testing.assert_close(scores[:, 2:], -scores[:, :2])


def test_a_basis_of_its_own_for_exemplars_and_means():
    regions = partition()
    exemplars, means = (Method.from_dictionary("m", regions, basis=basis) for basis in ("exemplar", "mean"))
    torch.testing.assert_close(exemplars.directions, regions.exemplars)
    torch.testing.assert_close(means.directions, regions.means)
    torch.testing.assert_close(means.origin, regions.b_dec)
    x = draws(5, seed=7)
    cosines = torch.nn.functional.cosine_similarity((x - regions.b_dec)[:, None], regions.means[None], dim=2)
    torch.testing.assert_close(means.detector.score(x), cosines)


def test_what_scores_alone_cannot_act(tiny_hooked):
    method = Method(name="norm", detector=Detector(hook_name=HOOK, names=("norm",), score=lambda x: x, row_cost=1))
    with pytest.raises(ValueError, match="'norm' only scores.*from_dictionary or from_directions"):
        method.intervention(tiny_hooked, 0, 1.0)
    with pytest.raises(ValueError, match="column must be one of 0 to 2, got 3"):
        Method.from_directions("three", draws(3), HOOK).intervention(tiny_hooked, 3, 1.0)


def test_names_are_unique_but_for_draws():
    one, other = (baselines.random_activations(draws(), 3, HOOK, draw=draw) for draw in range(2))
    assert check_methods(iter([one, other])) == [one, other]
    with pytest.raises(ValueError, match=r"Two methods are called 'random activations \(K=3\)'; give each its own"):
        check_methods([one, other, one])
    with pytest.raises(ValueError, match="called 'random activations.*the evaluation adds"):
        check_methods([one], one.name)
    with pytest.raises(ValueError, match="methods is empty"):
        check_methods([])
    with pytest.raises(ValueError, match="has 3 columns, got {'signs': 2}"):
        Method(name="three", detector=one.detector, signs=(1, 1))


def test_a_coreset_is_of_activations_and_each_draw_another():
    x, center = draws(), draws(1, seed=4)[0]
    made = [baselines.random_activations(x, 20, HOOK, center=center, seed=3, draw=draw) for draw in range(3)]
    units = torch.nn.functional.normalize(x - center, dim=1)
    chosen = []
    for method in made:
        rows = (method.directions @ units.T).argmax(dim=1)
        torch.testing.assert_close(method.directions, units[rows])
        assert len(set(rows.tolist())) == 20 and method.kind == "control"
        chosen.append(set(rows.tolist()))
    assert chosen[0] != chosen[1] != chosen[2]
    again = baselines.random_activations(x, 20, HOOK, center=center, seed=3, draw=2)
    assert torch.equal(again.directions, made[2].directions)
    assert torch.equal(made[0].origin, center)
    # The centre itself points nowhere and is never drawn.
    holed = torch.cat([center.expand(5, -1), x[:10]])
    assert len(baselines.random_activations(holed, 10, HOOK, center=center).directions) == 10


def test_principal_components_are_sklearns():
    x = draws() @ torch.diag(torch.linspace(1, 3, D))
    method = baselines.principal_directions(x, 5, HOOK)
    expected = PCA(5).fit(x.double().numpy()).components_
    cosines = np.abs((method.directions[:5].double().numpy() * expected).sum(axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    assert torch.equal(method.directions[5:], -method.directions[:5])


def test_kmeans_finds_separate_directions():
    axes = torch.eye(D)[:4]
    x = (5 * axes.repeat_interleave(15, 0) + 0.1 * draws()) + 2
    method = baselines.kmeans_directions(x, 4, HOOK, center=torch.full((D,), 2.0))
    assert sorted((method.directions @ axes.T).argmax(dim=1).tolist()) == [0, 1, 2, 3]
    assert bool(((method.directions @ axes.T).max(dim=1).values > 0.95).all())


def test_single_neurons_are_the_coordinates_that_vary_most():
    scale = torch.ones(D)
    scale[[3, 7]] = torch.tensor([5.0, 9.0])
    method = baselines.single_neurons(draws() * scale, 2, HOOK)
    assert method.directions[:2].argmax(dim=1).tolist() == [7, 3] and method.signs == (1, 1, -1, -1)


def test_gaussian_directions_know_nothing_but_the_width():
    method = baselines.gaussian_directions(draws(), 3 * D, HOOK, seed=2)
    assert method.directions.shape == (6 * D, D)
    assert float(method.directions[: 3 * D].mean(dim=0).norm()) < 0.25
    other = baselines.gaussian_directions(draws(seed=5), 3 * D, HOOK, seed=2)
    assert torch.equal(other.directions, method.directions)


def test_the_controls_of_a_dictionary_have_its_size_and_centre():
    regions = partition()
    made = baselines.matched_controls(regions, draws(), n_draws=3)
    assert [method.draw for method in made] == [0, 1, 2, 0]
    assert [len(method.directions) for method in made] == [6, 6, 6, 12]
    assert all(torch.equal(method.origin, regions.b_dec) for method in made)
    check_methods(made)
    transcoder = make("transcoder", "blocks.0.ln2.hook_normalized", write="blocks.0.hook_mlp_out")
    with pytest.raises(ValueError, match="reads at blocks.0.ln2.hook_normalized and writes at blocks.0.hook_mlp_out"):
        baselines.matched_controls(transcoder, draws())


def test_a_sae_of_equal_width_is_trained():
    method = baselines.trained_sae(draws(300), 8, HOOK, training_samples=512)
    assert len(method.detector.names) == 8 and method.detector.directions is None
    assert (method.acts_at, method.kind) == (HOOK, "unsupervised")
    assert method.detector.score(draws(4)).shape == (4, 8)


@pytest.mark.parametrize("make_baseline", [
    baselines.random_activations, baselines.principal_directions, baselines.kmeans_directions, baselines.single_neurons,
])  # fmt: skip
def test_more_directions_than_there_are_is_refused(make_baseline):
    with pytest.raises(ValueError, match=r"k must lie in 1 to \d+, the number of.*got 1000. Give more activations"):
        make_baseline(draws(), 1000, HOOK)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="non-finite"):
        baselines.random_activations(torch.full((3, D), torch.nan), 2, HOOK)
    with pytest.raises(ValueError, match=r"of shape \(n, d\), got.*\(24,\)"):
        baselines.single_neurons(torch.ones(24), 2, HOOK)
    with pytest.raises(ValueError, match="center has shape"):
        baselines.gaussian_directions(draws(), 2, HOOK, center=torch.ones(D + 1))


@pytest.mark.parametrize("model_class", models_zoo.MODEL_CLASSES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_untrained_twin_has_the_shape_and_not_the_weights(model_class, architecture):
    model = models_zoo.make_model(architecture, model_class)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    twin, again, other = (baselines.untrained_twin(model, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in twin.named_parameters()} == shapes and type(twin) is type(model)
    tokens = torch.tensor([[0, 5, 9, 4]])
    logits = [m(tokens) for m in (model, twin, again, other)]
    assert torch.equal(logits[1], logits[2])
    assert not torch.allclose(logits[1], logits[0]) and not torch.allclose(logits[1], logits[3])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    (batch,) = ActivationStream(twin, ["The cat sat on the mat."], "blocks.1.hook_resid_post", context_size=16)
    assert bool(batch.activations["blocks.1.hook_resid_post"].isfinite().all())
