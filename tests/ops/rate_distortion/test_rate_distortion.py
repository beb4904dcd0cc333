"""The rate-distortion objective and its descent, against slow and obvious twins."""

import tracemalloc

import numpy as np
import pytest

from saelens_ext.ops.rate_distortion.descent import Search
from saelens_ext.ops.rate_distortion.objective import PairedViews, assignment_costs, members_by_label, partition_cost
from saelens_ext.ops.rate_distortion.proposals import Sketch, _merged, _two_means, sketch_partition, split_proposals
from saelens_ext.ops.weighted_median import Sorted, weighted_median


def random_views(seed: int, n: int, d_e: int = 3, d_a: int = 8, share: float = 0.5):
    rng = np.random.default_rng(seed)
    attribution = rng.standard_t(2, size=(n, d_a)) * (rng.random((n, d_a)) < share)
    return rng.normal(size=(n, d_e)), attribution, np.exp(rng.normal(size=n))


def slow_median(values, weights):
    """The value of least weighted absolute deviation, the lowest among equals."""
    costs = [weights @ np.abs(values - value) for value in values]
    return min(value for value, cost in zip(values, costs) if cost <= min(costs) * (1 + 1e-12))


def slow_cost(e, a, w, members, b_e, b_a, metric="l1", center="mean"):
    """A cluster's share of the objective, from its definition."""
    w = w / w.sum()
    e, a, v = e[members], a[members], w[members]
    mean = v @ e / v.sum()
    mean = mean / np.linalg.norm(mean) if center == "unit" else mean
    d_e = sum(v_i * ((row - mean) ** 2).sum() for v_i, row in zip(v, e))
    if metric == "l1":
        middle = np.array([slow_median(column, v) for column in a.T])
        d_a = sum(v_i * np.abs(row - middle).sum() for v_i, row in zip(v, a))
    else:
        d_a = sum(v_i * ((row - v @ a / v.sum()) ** 2).sum() for v_i, row in zip(v, a))
    return -v.sum() * np.log(v.sum()) + b_e * d_e + b_a * d_a


def lowest_of_all_partitions(cost_of, n):
    """Exact minimum over every partition: the part that holds the first item left, times the best of the rest."""
    cost = [0.0] + [cost_of(np.array([i for i in range(n) if s >> i & 1])) for s in range(1, 1 << n)]
    best = [0.0] * (1 << n)
    for s in range(1, 1 << n):
        rest = s & (s - 1)
        first, t, best[s] = s ^ rest, rest, np.inf
        while True:
            best[s] = min(best[s], cost[t | first] + best[rest ^ t])
            if t == 0:
                break
            t = (t - 1) & rest
    return best[-1]


@pytest.mark.parametrize("seed", range(5))
def test_weighted_median_is_the_least_cost_value(seed):
    rng = np.random.default_rng(seed)
    values, weights = np.round(rng.normal(size=(6, 7)), 1), rng.integers(1, 5, size=7).astype(float)
    assert weighted_median(values, weights).tolist() == [slow_median(row, weights) for row in values]


@pytest.mark.parametrize("m", [129, 200, 256, 300])
def test_medians_by_rank_equal_medians_by_value(m):
    e, a, w = random_views(m, 300, d_a=50, share=1.0)
    a[:, ::5] = np.round(a[:, ::5])
    w = np.ones(300) if m == 200 else w
    views, members = PairedViews(e, a, w), np.sort(np.random.default_rng(0).permutation(300)[:m])
    assert np.array_equal(views.attribution_center(views.cluster(members)), weighted_median(a[members].T, w[members]))


def test_sparse_medians_are_not_zero_where_most_members_are_not():
    e, a, w = random_views(2, 200, d_a=300, share=0.1)
    a[:, ::6] = np.where(np.arange(200)[:, None] % 100 < np.arange(50) + 30, 1 + np.abs(a[:, ::6]), 0)
    views = PairedViews(e, a, w)
    members = np.arange(0, 200, 2)
    expected = weighted_median(a[members].T, w[members])
    assert 10 < np.count_nonzero(expected) < 50
    assert np.array_equal(views.attribution_center(views.cluster(members)), expected)


@pytest.mark.parametrize("share", [0.15, 1.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("center", ["mean", "unit"])
def test_objective_and_distances_follow_the_definition(share, metric, center):
    e, a, w = random_views(1, 30, share=share)
    views = PairedViews(e, a, w, metric, center)
    labels = np.arange(30) % 4
    clusters = views.clusters(labels)
    expected = sum(slow_cost(e, a, w, np.flatnonzero(labels == k), 1.3, 0.7, metric, center) for k in range(4))
    assert partition_cost(clusters, 1.3, 0.7) == pytest.approx(expected, rel=1e-12)
    for cluster in clusters:
        d_e, d_a = views.distances(cluster)
        assert d_e == pytest.approx(((e - views.semantic_mean(cluster)) ** 2).sum(axis=1), rel=1e-9)
        gaps = np.abs(a - views.attribution_center(cluster))
        assert d_a == pytest.approx((gaps if metric == "l1" else gaps**2).sum(axis=1), rel=1e-9)
        assert d_e[cluster.members] @ views.weights[cluster.members] == pytest.approx(cluster.v_e, rel=1e-9)
        assert d_a[cluster.members] @ views.weights[cluster.members] == pytest.approx(cluster.v_a, rel=1e-9)


@pytest.mark.parametrize("center", ["mean", "unit"])
def test_reassignment_never_raises_the_objective(center):
    for seed in range(20):
        e, a, w = random_views(seed, 40)
        views = PairedViews(e, a, w, "l1", center)
        before = views.clusters(np.unique(np.random.default_rng(seed).integers(6, size=40), return_inverse=True)[1])
        costs = assignment_costs(views, before, 2.0, 1.0, every=True)
        after = views.clusters(np.unique(costs.argmin(axis=1), return_inverse=True)[1])
        assert partition_cost(after, 2.0, 1.0) <= partition_cost(before, 2.0, 1.0) + 1e-12
        pruned = assignment_costs(views, before, 2.0, 1.0)
        assert np.array_equal(pruned.argmin(axis=1), costs.argmin(axis=1))


@pytest.mark.slow
def test_descent_equals_brute_force_over_all_partitions():
    excesses = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(4, 8)) if seed % 50 else 9
        e, a, w = random_views(seed, n, int(rng.integers(1, 5)), int(rng.integers(1, 12)))
        metric, center = ["l1", "l1", "l1", "l2"][seed % 4], ["mean", "unit"][seed % 5 == 4]
        views, twin = PairedViews(e, a, w, metric, center), PairedViews(e, a, w, metric, center)
        one = views.cluster(np.arange(n))
        worth = -float(views.weights @ np.log(views.weights)) * rng.choice([0.5, 0.75, 1, 1.25, 2])
        gamma = rng.choice([0.1, 0.3, 0.5, 0.7, 0.9])
        prices = float(worth * gamma / one.v_e), float(worth * (1 - gamma) / max(one.v_a, 1e-9))
        search = Search(views, np.random.RandomState(0))
        found = search.best(search.starts(*prices), *prices)
        assert found.converged
        assert (np.diff(found.history) <= 0).all()
        assert found.cost == pytest.approx(partition_cost(twin.clusters(found.labels), *prices), rel=1e-12)
        lowest = lowest_of_all_partitions(lambda members: twin.cluster(members).cost(*prices), n)
        assert found.cost >= lowest - 1e-9
        excesses.append(found.cost / lowest - 1)
    assert np.mean(np.array(excesses) < 1e-9) >= 0.9
    assert max(excesses) < 0.01


def test_peels_find_the_mode_that_halves_miss():
    """Eight modes with sparse signatures: the first split that gains takes off one of them."""
    rng = np.random.default_rng(0)
    mode = np.arange(160) % 8
    centers = (rng.random((8, 400)) < 0.05) * 3.0
    a = centers[mode] + (rng.random((160, 400)) < 0.02) * rng.standard_t(2, size=(160, 400))
    views = PairedViews(np.ones((160, 1)), a, np.ones(160))
    z = Sketch(views, np.random.RandomState(0)).joint(0.0, 5 / views.cluster(np.arange(160)).v_a)
    parts = split_proposals(z, views.weights, np.random.RandomState(0))
    counts = [sorted(np.bincount(mode[part], minlength=8)) for part in parts]
    assert [0] * 7 + [20] in counts or [0] + [20] * 7 in counts
    assert len(np.unique(sketch_partition(10 * z, views.weights, 32, np.random.RandomState(0)))) >= 8


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_a_sketch_costs_as_much_as_what_it_stands_for(metric):
    e, a, w = random_views(3, 20)
    views = PairedViews(e, a, w, metric)
    z = Sketch(views, np.random.RandomState(0)).joint(2.0, 0.3)
    whole = views.cluster(np.arange(20))
    assert scatter(z, views.weights, range(20)) == pytest.approx(2.0 * whole.v_e + 0.3 * whole.v_a)
    alone = Sketch(views, np.random.RandomState(0)).joint(2.0, 0.0)
    for i, j in ((0, 1), (3, 17)):
        distance = 2.0 * ((e[i] - e[j]) ** 2).sum()
        assert ((alone[i] - alone[j]) ** 2).sum() == pytest.approx(distance)
        if metric == "l2":
            assert ((z[i] - z[j]) ** 2).sum() == pytest.approx(distance + 0.3 * ((a[i] - a[j]) ** 2).sum())


def scatter(z, w, members):
    members = list(members)
    mean = np.average(z[members], axis=0, weights=w[members])
    return sum(w[i] * ((z[i] - mean) ** 2).sum() for i in members)


def sketch_cost(z, w, *parts):
    """Scatter within parts and the entropy of dealing items out to them, as shares of all weight that is given."""
    return sum(scatter(z, w, part) - w[part].sum() * np.log(w[part].sum()) for part in map(list, parts))


@pytest.mark.parametrize("seed", range(3))
def test_proposals_come_by_what_they_save_and_no_worse_than_the_best_straight_cut(seed):
    """The weights are those of one cluster among several."""
    rng = np.random.default_rng(seed)
    z, w = rng.normal(size=(24, 3)) * [3, 1, 1], 0.4 * rng.dirichlet(np.full(24, 2.0))
    z[:9] += 4
    parts = split_proposals(z, w, np.random.RandomState(0))
    rows, one = np.arange(24), sketch_cost(z, w, range(24))
    saved = [one - sketch_cost(z, w, rows[part], rows[~part]) for part in parts]
    assert len(saved) > 1 and saved == sorted(saved, reverse=True)
    centered = z - w @ z / w.sum()
    along = centered @ np.linalg.svd(np.sqrt(w)[:, None] * centered)[2][0]
    order = np.argsort(along)
    straight = [one - sketch_cost(z, w, order[:n], order[n:]) for n in range(1, 24)]
    assert saved[0] >= max(straight) - 1e-12
    # None is improved by giving one item to the other side at the means that there are.
    best = parts[0]
    means = [np.average(z[side], axis=0, weights=w[side]) for side in (best, ~best)]
    costs = np.stack([((z - m) ** 2).sum(axis=1) - np.log(w[s].sum()) for m, s in zip(means, (best, ~best))])
    assert np.array_equal(costs[0] < costs[1], best)


@pytest.mark.parametrize("seed", range(3))
def test_no_merge_of_a_partition_of_the_sketch_saves_anything(seed):
    rng = np.random.default_rng(seed)
    mode = np.arange(60) % 5
    z, w = 4 * rng.normal(size=(5, 3))[mode] + rng.normal(size=(60, 3)), rng.dirichlet(np.full(60, 2.0))
    labels = sketch_partition(z, w, 12, np.random.RandomState(seed))
    groups = [np.flatnonzero(labels == k) for k in range(labels.max() + 1)]
    assert 2 <= len(groups) <= 12 and all(map(len, groups))
    for i in range(len(groups)):
        for j in range(i):
            apart = sketch_cost(z, w, groups[i], groups[j])
            assert sketch_cost(z, w, [*groups[i], *groups[j]]) >= apart - 1e-9
    assert sketch_cost(z, w, *groups) <= sketch_cost(z, w, *(np.flatnonzero(mode == k) for k in range(5))) + 0.1


@pytest.mark.parametrize("seed", range(4))
def test_two_means_end_where_every_item_is_in_the_cheaper_part(seed):
    """Two overlapping parts of unequal weight, whose entropy moves the border between them."""
    rng = np.random.default_rng(seed)
    z, w = np.concatenate([rng.normal(size=30), rng.normal(size=6) + 3])[:, None], rng.dirichlet(np.full(36, 4.0))
    part = _two_means(z - w @ z, w, z[:, 0] > 1.5)
    costs = [
        ((z - np.average(z[side], axis=0, weights=w[side])) ** 2).sum(axis=1) - np.log(w[side].sum())
        for side in (part, ~part)
    ]
    assert 0 < part.sum() < 18 and np.array_equal(costs[0] < costs[1], part)


def test_merges_are_those_that_save_most_one_after_the_other():
    rng = np.random.default_rng(0)
    for _ in range(5):
        z, w = rng.normal(size=(9, 2)), rng.dirichlet(np.full(9, 0.7))
        groups = [[i] for i in range(9)]
        while len(groups) > 1:
            change, a, b = min(
                (sketch_cost(z, w, [*groups[a], *groups[b]]) - sketch_cost(z, w, groups[a], groups[b]), a, b)
                for b in range(len(groups)) for a in range(b)
            )  # fmt: skip
            if change >= 0:
                break
            groups[a] += groups.pop(b)
        found = _merged(np.arange(9), w, z)
        assert {frozenset(np.flatnonzero(found == k)) for k in set(found)} == set(map(frozenset, groups))
        assert 1 < len(groups) < 8


def test_dense_views_are_scouted_on_a_sample_and_judged_in_full():
    rng = np.random.default_rng(0)
    mode = np.arange(120) % 6
    a = rng.normal(size=(6, 600))[mode] * 2 + rng.normal(size=(120, 600))
    views = PairedViews(rng.normal(size=(120, 4)), a, np.exp(rng.normal(size=120)))
    search = Search(views, np.random.RandomState(0))
    assert search.coarse is not views
    prices = 0.01, 6 / search.one.v_a
    found = search.best(search.starts(*prices), *prices)
    assert found.cost <= min(partition_cost(views.clusters(mode), *prices), search.one.cost(*prices)) + 1e-9
    assert found.cost == pytest.approx(
        partition_cost(PairedViews(views.semantic, a, views.weights).clusters(found.labels), *prices)
    )


@pytest.mark.slow
def test_searches_at_other_weights_share_what_they_looked_at_and_find_the_same():
    rng = np.random.default_rng(1)
    semantic, sources = rng.normal(size=(60, 4)), rng.standard_t(2, size=(60, 600)) + 3 * (np.arange(60) % 3)[:, None]
    views = PairedViews(semantic, sources, np.ones(60))
    sketch, found = Sketch(views, np.random.RandomState(0)), []
    for weights in ((0.1, 2 / 600), (0.2, 1 / 600)):
        fresh = PairedViews(semantic, sources, np.ones(60))
        both = [Search(each, np.random.RandomState(0), sketch=sketch) for each in (views, fresh)]
        ends = [search.best(search.starts(*weights), *weights) for search in both]
        np.testing.assert_array_equal(ends[0].labels, ends[1].labels)
        assert ends[0].cost == ends[1].cost
        found.append(both[0].coarse)
    assert found[0] is found[1] is not views
    assert found[0].cluster(np.arange(60)) is found[1].cluster(np.arange(60))


def test_memory_does_not_hold_items_by_clusters_by_sources():
    n, d, k = 300, 2000, 20
    rng = np.random.default_rng(0)
    a = rng.normal(size=(n, d))
    tracemalloc.start()
    views = PairedViews(rng.normal(size=(n, 4)), a, np.ones(n))
    assignment_costs(views, views.clusters(np.arange(n) % k), 1.0, 1.0, every=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * n * d * 4 < 8 * n * k * d


@pytest.mark.parametrize("n", [5, 48, 63, 64, 65, 100, 131])
def test_medians_by_a_known_order_are_those_of_the_members(n):
    rng = np.random.default_rng(n)
    values, weights = rng.integers(-4, 5, size=(30, n)) + 0.25 * rng.integers(2, size=(30, 1)), rng.random(n) + 0.01
    known = Sorted(values.astype(np.float64))
    for size in {1, 2, n // 2, n - 1, n}:
        members = np.sort(rng.permutation(n)[:size])
        spread = np.zeros(n)
        spread[members] = weights[members]
        expected = weighted_median(values[:, members].astype(np.float64), weights[members])
        assert known.medians(spread).tolist() == expected.tolist()


def test_members_of_the_labels_in_use():
    parts = members_by_label(np.array([3, 0, 3, 5, 0]))
    assert [part.tolist() for part in parts] == [[1, 4], [0, 2], [3]]


def test_a_descent_ends_where_one_ended_before():
    rng = np.random.default_rng(3)
    views = PairedViews(rng.normal(size=(40, 3)), rng.normal(size=(40, 6)), np.ones(40))
    search = Search(views, np.random.RandomState(0))
    first = search.descend(rng.integers(5, size=40), 2.0, 1.0)
    again = search.descend(first.labels.max() - first.labels, 2.0, 1.0)
    assert first.converged and again.converged and again.n_iter == 0 and len(again.history) == 1
    assert again.cost == pytest.approx(first.cost, abs=1e-12)
    # At other weights it may go on.
    assert search.descend(first.labels, 4.0, 1.0).n_iter > 0
    # Nor is it lower for a search that knows no end.
    assert Search(views, np.random.RandomState(0)).descend(first.labels, 2.0, 1.0).cost == again.cost
