"""Which members and which weights directions are made from, without a model: every method beside loops over members."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer
from saelens_ext.continuations.source_table import SourceTable
from saelens_ext.continuations.validation.controls import Representatives, control_partitions, make_plan, split_members
from saelens_ext.continuations.validation.further import coherent_clusters, further_partitions
from saelens_ext.continuations.validation.options import ValidationOptions
from tests.evals.continuation_sets import planted_set

N, M = 30, 12
LABELS = np.repeat([0, 1, 2], 10)


@pytest.fixture(scope="module")
def rows():
    """Three clusters of continuations that are not alike, of which few weigh much."""
    rng = np.random.default_rng(0)
    weights = torch.as_tensor(rng.dirichlet(np.full(N, 0.6)))
    sources = SourceTable(
        ("latent",) * M, ("a",) * M, tuple(j % 3 for j in range(M)), tuple(range(M)), tuple(rng.uniform(1, 9, M)),
        ("t",) * M, (0,) * M,
    )  # fmt: skip
    made = replace(planted_set(1, LABELS, LABELS, noise=2.0, n_sources=M), weights=weights)
    assert made.signatures is not None
    return made.with_signatures(made.signatures, sources)


def lower_weighted_median(values, weights):
    """By column, the smallest value up to which half of the weight lies."""
    found = []
    for column in values.T:
        order = np.argsort(column)
        found.append(column[order[np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2 - 1e-12)]])
    return np.array(found)


def medoid(rows, members, choosing, beta, gamma):
    """The member nearest to the others, distances scaled so that those of all choosing rows weigh as much by either."""
    e, a = rows.both_views()
    w = rows.weights.numpy()
    mean, median = np.average(e[choosing], axis=0, weights=w[choosing]), lower_weighted_median(a[choosing], w[choosing])
    s_e = np.average(((e[choosing] - mean) ** 2).sum(axis=1), weights=w[choosing])
    s_a = np.average(np.abs(a[choosing] - median).sum(axis=1), weights=w[choosing])
    totals = [
        sum(
            w[j] * (gamma * ((e[i] - e[j]) ** 2).sum() / s_e + (1 - gamma) * np.abs(a[i] - a[j]).sum() / s_a)
            for j in members
        )
        for i in members
    ]
    return int(members[np.argmin(totals)])


@pytest.mark.parametrize("gamma", [0.05, 0.95])
def test_what_stands_for_members_is_weighted_as_they_are(rows, gamma):
    choosing = np.sort(np.random.default_rng(3).permutation(N)[:22])
    clusterer = JointClusterer(2.0, gamma, random_state=0)
    a, w = rows.both_views()[1], rows.weights.numpy()
    by_kind = {kind: Representatives(rows, clusterer, choosing, kind) for kind in ("medoid", "center", "contrast")}
    for name in range(3):
        members = choosing[LABELS[choosing] == name]
        expected = medoid(rows, members, choosing, 2.0, gamma)
        direction, row = by_kind["medoid"].of(members)
        assert row == expected and (direction == a[expected]).all()
        direction, row = by_kind["contrast"].of(members)
        np.testing.assert_allclose(direction, a[expected] - lower_weighted_median(a[choosing], w[choosing]))
        assert row == expected and (by_kind["contrast"].signature(expected) == direction).all()
        direction, row = by_kind["center"].of(members)
        np.testing.assert_allclose(direction, lower_weighted_median(a[members], w[members]))
        assert row == -1


@pytest.fixture(scope="module")
def plan(rows):
    clusterer = JointClusterer(2.0, 0.5, random_state=0)
    split = split_members(LABELS, 0.5, 100, np.random.default_rng(0))
    options = ValidationOptions(top=3, controls=("length", "coherent_semantic"))
    return make_plan(rows, clusterer, LABELS, split, {"mine": LABELS % 2}, options, np.random.default_rng(0))


def test_every_direction_is_chosen_from_the_choosing_members_of_its_group(rows, plan):
    choosing = set(plan.split.choosing.tolist())
    assert len(choosing) == 15 and not choosing & set(plan.split.measured.tolist())
    for planned in plan.directions:
        if planned.method in ("random_features", "wrong_cluster"):
            continue
        inside = {row for row in choosing if plan.labels[planned.method][row] == planned.cluster}
        assert planned.row in inside, planned.method
        if planned.method == "single_member":
            own = plan.directions[plan.index("joint", planned.cluster)]
            assert planned.n_choosing == 1 and planned.row != own.row
        else:
            assert planned.n_choosing == len(inside)
            assert planned.row == medoid(rows, np.array(sorted(inside)), plan.split.choosing, 2.0, 0.5)
        weights = rows.signatures[planned.row]
        assert list(planned.direction.columns) == weights.abs().topk(3).indices.tolist()
    assert len(plan.of("single_member")) == 3


def test_random_latents_are_active_ones(rows):
    """Of the sources given some are inactive in this prefix, and without any effect."""
    off = np.arange(M) % 3 == 0
    signatures = rows.signatures.clone()
    signatures[:, off] = 0
    sources = replace(rows.sources, activations=tuple(np.where(off, 0.0, rows.sources.activations)))
    given = rows.with_signatures(signatures, replace(sources, positions=(0,) * M))
    clusterer = JointClusterer(2.0, 0.5, random_state=0)
    split = split_members(LABELS, 0.5, 100, np.random.default_rng(0))
    for seed in range(5):
        options = ValidationOptions(top=4, seed=seed)
        plan = make_plan(given, clusterer, LABELS, split, {}, options, np.random.default_rng(seed))
        drawn = {column for one in plan.of("random_features") for column in one.direction.columns}
        assert drawn and not off[list(drawn)].any()


def inertia(view, weights, labels):
    means = {k: np.average(view[labels == k], axis=0, weights=weights[labels == k]) for k in set(labels)}
    return sum(w * ((row - means[k]) ** 2).sum() for w, row, k in zip(weights, view, labels))


def test_partitions_of_one_view_are_weighted_and_those_of_lengths_are_ranges_of_lengths():
    weights = np.random.default_rng(1).dirichlet(np.full(N, 0.1)) + 1e-9
    rows = replace(planted_set(2, 0 * LABELS, 0 * LABELS, noise=3.0), weights=torch.as_tensor(weights))
    found = control_partitions(rows, LABELS, np.random.default_rng(0))
    for name, view in zip(("semantic", "attribution"), rows.both_views()):
        equal = KMeans(3, n_init=50, random_state=1).fit(view).labels_
        best = KMeans(3, n_init=50, random_state=1).fit(view, sample_weight=weights).inertia_
        assert inertia(view, weights, found[name]) < min(1.05 * best, 0.95 * inertia(view, weights, equal))
    assert sorted(found["random_partition"]) == sorted(LABELS) and (found["random_partition"] != LABELS).any()
    lengths = rows.lengths.numpy()
    by_length = further_partitions(rows, LABELS, ("length",), 0)["length"]
    ranges = sorted((lengths[by_length == k].min(), lengths[by_length == k].max()) for k in range(3))
    assert set(by_length) == {0, 1, 2} and ranges[0][1] < ranges[1][0] and ranges[1][1] < ranges[2][0]


def test_tight_groups_are_weighted(rows):
    names, views = ("coherent_semantic", "coherent_attribution"), rows.both_views()
    found = further_partitions(rows, LABELS, names, 4)
    for name, view in zip(names, views):
        own = coherent_clusters(view, LABELS, weights=rows.weights.numpy(), seed=4)
        assert (found[name] == own).all()
        assert (own != coherent_clusters(view, LABELS, seed=4)).any()
