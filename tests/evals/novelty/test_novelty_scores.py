"""Each novelty score against a slow twin, or against what theory says of it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import entropy, norm
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

import saelens_ext as sx
from saelens_ext.evals.novelty import scores
from saelens_ext.ops.spherical import unit_directions
from tests import models_zoo
from tests.continuations._dictionaries import make

HOOK = "blocks.1.hook_out"


def normal(n, d, seed, shift=0.0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += shift
    return x


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def reference():
    return normal(300, 12, 0) * torch.linspace(0.5, 3, 12) + 2.0


@pytest.fixture
def x():
    return normal(90, 12, 1) * 2 + 1.0


@pytest.fixture
def center(reference):
    return scores.reference_center(reference)


def partition_of(reference, center, k):
    units = unit_directions(reference[:k], center)[0]
    return sx.ExemplarPartition.from_regions(units, units, center, 0.3)


def cosine_distances(x, rows, center):
    return cdist((x - center).double().numpy(), (rows - center).double().numpy(), metric="cosine")


def test_exemplar_distance_is_to_the_nearest_exemplar(reference, x, center):
    found = scores.exemplar_distance("p1", partition_of(reference, center, 40))(x)
    assert found.dtype == torch.float64
    assert np.allclose(found, cosine_distances(x, reference[:40], center).min(axis=1), atol=1e-6)


def test_a_coreset_is_of_reference_rows_and_equal_to_the_exemplars_gives_the_same_bits(reference, x, center):
    drawn = scores.coreset_distance("coreset", reference, 40, center, generator())(x)
    everything = cosine_distances(x, reference, center)
    assert (np.abs(everything - drawn.numpy()[:, None]).min(axis=1) < 1e-6).all()
    assert (drawn.numpy() >= everything.min(axis=1) - 1e-6).all()
    assert not torch.equal(drawn, scores.coreset_distance("coreset", reference, 40, center, generator(1))(x))
    whole = scores.coreset_distance("coreset", reference[:40], 40, center, generator())
    assert torch.equal(whole(x), scores.exemplar_distance("p1", partition_of(reference, center, 40))(x))
    with pytest.raises(ValueError, match=r"coreset of 301 .* got 300"):
        scores.coreset_distance("coreset", reference, 301, center, generator())


def test_rows_at_the_centre_are_no_directions(reference, center):
    at_center = torch.cat([center.expand(5, -1), reference[:8]])
    assert scores.coreset_distance("c", at_center, 8, center, generator())(reference[:8]).max() < 1e-6
    with pytest.raises(ValueError, match="got 8 that differ"):
        scores.coreset_distance("c", at_center, 9, center, generator())
    assert scores.neighbour_distance("knn", reference, 3, center, generator())(center[None]).item() == 1


@pytest.mark.parametrize("k", [1, 10])
def test_neighbour_distance_is_the_mean_of_the_nearest(reference, x, center, k):
    found = scores.neighbour_distance("knn", reference, k, center, generator())(x)
    expected = np.sort(cosine_distances(x, reference, center), axis=1)[:, :k].mean(axis=1)
    assert np.allclose(found, expected, atol=1e-6)
    few = scores.neighbour_distance("knn", reference, k, center, generator(), max_rows=20)(x)
    assert (few >= found - 1e-6).all() and few.mean() > found.mean()
    with pytest.raises(ValueError, match="between 1 and the 300"):
        scores.neighbour_distance("knn", reference, 301, center, generator())


def test_mahalanobis_is_scikit_learns(reference, x):
    found = scores.mahalanobis_distance("mahalanobis", reference)(x)
    expected = LedoitWolf().fit(reference.double().numpy()).mahalanobis(x.double().numpy())
    assert np.allclose(found.numpy() ** 2, expected)
    with pytest.raises(ValueError, match="do not vary"):
        scores.mahalanobis_distance("mahalanobis", torch.ones(50, 4))
    with pytest.raises(ValueError, match="width 8193"):
        scores.mahalanobis_distance("mahalanobis", torch.ones(2, 8193))


def test_norm_has_two_sides(reference, center):
    score = scores.norm_distance("norm", reference, center)
    norms = (reference - center).double().norm(dim=1)
    low, middle, high = torch.quantile(norms, torch.tensor([0.16, 0.5, 0.84]).double()).tolist()
    direction = (reference[0] - center) / norms[0]
    at = [center + direction * length for length in (low, middle, high, 2 * high - middle, 0.0)]
    found = score(torch.stack(at).float())
    assert torch.allclose(found, torch.tensor([1, 0, 1, 2, middle / (middle - low)]).double(), atol=1e-4)
    with pytest.raises(ValueError, match="do not vary"):
        scores.norm_distance("norm", torch.ones(50, 4), torch.zeros(4))


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_reconstruction_error_is_of_any_sae(x, architecture):
    sae = make(architecture, HOOK, 12, d_sae=128)
    rebuilt = sae.decode(sae.encode(x)).double()
    expected = (rebuilt - x.double()).square().sum(1) / x.double().square().sum(1)
    assert torch.allclose(scores.reconstruction_error("sae", sae)(x), expected.detach())


def test_a_transcoder_has_no_error_on_what_it_reads():
    with pytest.raises(ValueError, match="mlp is a transcoder"):
        scores.reconstruction_error("mlp", make("transcoder", HOOK, 12, d_sae=16, write="blocks.1.hook_mlp_out"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("model_class", models_zoo.MODEL_CLASSES)
def test_entropy_is_that_of_each_next_token(name, model_class, monkeypatch):
    model = models_zoo.make_model(name, model_class)
    ids = torch.tensor([[0, 5, 6, 7, 8], [0, 9, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    found = scores.next_token_entropy(model, ids, mask)
    for row, length in ((0, 5), (1, 3)):
        logits = model(ids[row : row + 1, :length], return_type="logits")[0].double()
        expected = entropy(logits.softmax(dim=-1).detach().numpy(), axis=-1)
        assert np.allclose(found[row, :length], expected, atol=1e-5)
    monkeypatch.setattr(scores, "_LOGITS_PER_BLOCK", 1)  # a window at a time
    assert torch.allclose(scores.next_token_entropy(model, ids, mask)[mask], found[mask], atol=1e-5)


@pytest.mark.parametrize("delta", [0.5, 1.5])
def test_a_shift_of_gaussians_has_the_auroc_that_theory_gives(delta):
    """In one dimension the distance from the mean of the reference is |x|; far from it, on the side of the shift, the
    order is that of x, whose AUROC is Phi(delta / sqrt 2)."""
    reference, n = normal(4000, 1, 0, shift=-8.0), 8000
    inside, outside = normal(n, 1, 1), normal(n, 1, 2, shift=delta)
    truth = np.r_[np.ones(n), np.zeros(n)]
    score = scores.mahalanobis_distance("mahalanobis", reference)
    area = roc_auc_score(truth, torch.cat([score(outside), score(inside)]))
    assert area == pytest.approx(norm.cdf(delta / math.sqrt(2)), abs=0.02)


def test_turning_directions_by_an_angle_orders_by_the_angle():
    """About a centre at 0, with one exemplar, the distance is 1 - cos of the angle to it."""
    exemplar = torch.tensor([[1.0, 0.0]])
    partition = sx.ExemplarPartition.from_regions(exemplar, exemplar, torch.zeros(2), 0.3)
    angles = torch.linspace(0, math.pi, 50)
    turned = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.linspace(1, 9, 50)[:, None]
    assert torch.allclose(scores.exemplar_distance("p", partition)(turned), 1 - angles.cos().double(), atol=1e-6)


def test_scores_do_not_depend_on_what_is_scored_beside_them(reference, x, center, monkeypatch):
    made = [
        scores.exemplar_distance("p1", partition_of(reference, center, 40)),
        scores.neighbour_distance("knn", reference, 5, center, generator()),
        scores.mahalanobis_distance("mahalanobis", reference),
        scores.norm_distance("norm", reference, center),
    ]
    whole = [score(x) for score in made]
    monkeypatch.setattr(scores, "_ENTRIES_PER_BLOCK", 1)  # a row at a time
    for score, expected in zip(made, whole):
        assert torch.allclose(score(x), expected, atol=1e-6), score.name


def test_neighbours_of_many_activations_are_looked_for_block_by_block():
    reference, x, seen = normal(4000, 8, 0), normal(20_000, 8, 1), []
    score = scores.neighbour_distance("knn", reference, 10, torch.zeros(8), generator())
    watched = dataclasses.replace(score, function=lambda part: seen.append(len(part)) or score.function(part))
    assert torch.equal(watched(x), score(x)) and sum(seen) == len(x)
    assert max(seen) * len(reference) <= 2**22
