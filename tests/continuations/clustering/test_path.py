"""Sweeps of the joint clusterer, stability, the choice of a cell, and single-view baselines."""

import pickle
from itertools import combinations

import joblib
import numpy as np
import pytest

from saelens_ext.continuations.clustering.baselines import single_view_kmeans
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer, rate_distortion_path
from saelens_ext.continuations.clustering.stability import choose_point, stability_score


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    mode = np.arange(90) % 6
    X = np.eye(6)[mode // 2] + 0.15 * rng.normal(size=(90, 6))
    y = np.eye(40)[mode % 2 * 7] * 5 + (rng.random((90, 40)) < 0.1) * rng.standard_t(2, size=(90, 40)) + 0.01
    return X, y, np.exp(rng.normal(size=90)), mode


@pytest.fixture(scope="module")
def path(data):
    X, y, w, _ = data
    return rate_distortion_path(X, y, [1.25, 0.5, 0.9], [0.2, 0.6], sample_weight=w, random_state=0)


def test_cells_come_in_order_and_make_estimators(data, path):
    X, y, w, _ = data
    cells = [(point.gamma, point.beta) for point in path.points]
    assert cells == [(0.2, 1.25), (0.2, 0.5), (0.2, 0.9), (0.6, 1.25), (0.6, 0.5), (0.6, 0.9)]
    assert list(path.to_dataframe()["n_clusters"]) == [point.n_clusters for point in path.points]
    point = path.at(0.9, 0.6)
    model = JointClusterer(0.9, 0.6, init=point.labels).fit(X, y, sample_weight=w)
    assert np.array_equal(model.labels_, point.labels)
    assert model.objective_ == pytest.approx(point.objective)
    assert model.n_iter_ == 1
    with pytest.raises(ValueError, match="No cell"):
        path.at(0.7, 0.6)


def test_no_cell_prefers_the_partition_of_another(path):
    for point in path.points:
        for other in path.points:
            clusters = path.problem.views.clusters(other.labels)
            assert point.objective <= path.problem.place(clusters, point.beta, point.gamma).objective + 1e-9


def test_dearer_distortion_buys_rate(path):
    for gamma in (0.2, 0.6):
        rates = [path.at(beta, gamma).rate for beta in (0.5, 0.9, 1.25)]
        assert rates == sorted(rates)


@pytest.mark.slow
def test_path_does_not_depend_on_jobs_and_beats_single_fits(data, path):
    X, y, w, _ = data
    settings = JointClusterer(random_state=0)
    with joblib.parallel_config(backend="threading"):
        spread = settings.rate_distortion_path(X, y, [1.25, 0.5, 0.9], [0.2, 0.6], sample_weight=w, n_jobs=2)
    for point, other in zip(path.points, spread.points):
        assert np.array_equal(point.labels, other.labels)
        alone = JointClusterer(point.beta, point.gamma, random_state=0).fit(X, y, sample_weight=w)
        assert point.objective <= alone.objective_ + 1e-9
    with pytest.raises(ValueError, match="must not be empty"):
        settings.rate_distortion_path(X, y, [], [0.5])
    with pytest.raises(ValueError, match="gamma"):
        settings.rate_distortion_path(X, y, [1.0], [2.0])


def test_a_problem_travels_to_other_processes(path):
    point = path.points[0]
    problem = pickle.loads(pickle.dumps(path.problem))
    place = problem.place(problem.views.clusters(point.labels), point.beta, point.gamma)
    assert place.objective == pytest.approx(point.objective, rel=1e-12)


@pytest.mark.slow
def test_stability_tells_structure_from_noise(data, path):
    X, y, w, _ = data
    point = path.at(0.9, 0.6)
    good = stability_score(path.problem, point.labels, 0.9, 0.6, n_resamples=5, random_state=0)
    assert good.scores.shape == (5,) and good.mean > 0.8
    shuffled = np.random.default_rng(0).permutation(point.labels)
    assert stability_score(path.problem, shuffled, 0.9, 0.6, n_resamples=5, random_state=0).mean < 0.2
    with pytest.raises(ValueError, match="n_resamples"):
        stability_score(path.problem, point.labels, 0.9, 0.6, n_resamples=1)


@pytest.mark.slow
def test_choice_is_eligible_and_nearly_the_most_stable(path):
    choice = choose_point(path, n_resamples=4, random_state=0)
    assert 2 <= choice.point.n_clusters <= 10
    most = max(stability.mean for _, stability in choice.table)
    assert choice.stability.mean >= most - max(stability.standard_error for _, stability in choice.table) - 1e-12
    with pytest.raises(ValueError, match="No cell has 50 to 60"):
        choose_point(path, clusters=(50, 60))


@pytest.mark.slow
def test_clusters_have_the_members_asked_for():
    rng = np.random.default_rng(0)
    X, y = 0.3 * rng.normal(size=(60, 8)), 0.3 * rng.normal(size=(60, 300))
    X[:20, 0] += 1
    y[:20, :30] += 0.4
    y[-3:] *= 10
    w = np.exp(rng.normal(size=60))
    alone = rate_distortion_path(X, y, [1.0, 2.0, 4.0], [0.2, 0.6], sample_weight=w, random_state=0)
    assert max(point.n_clusters for point in alone.points) == 60  # every row its own code
    path = rate_distortion_path(X, y, [1.0, 2.0, 4.0], [0.2, 0.6], sample_weight=w, random_state=0, min_cluster_size=6)
    assert all(np.bincount(point.labels).min() >= 6 for point in path.points)
    assert max(point.n_clusters for point in path.points) > 2
    for point in path.points:
        # The constraint costs, and what is left is a descent: it is never above one cluster.
        assert point.objective >= alone.at(point.beta, point.gamma).objective - 1e-9
        whole = path.problem.place([path.problem.views.cluster(np.arange(60))], point.beta, point.gamma).objective
        assert point.objective <= whole + 1e-9
    point = path.at(2.0, 0.2)
    model = JointClusterer(2.0, 0.2, min_cluster_size=6, init=alone.at(2.0, 0.2).labels).fit(X, y, sample_weight=w)
    assert np.bincount(model.labels_).min() >= 6 and (np.diff(model.history_) <= 1e-9).all()
    with pytest.raises(ValueError, match="min_cluster_size"):
        JointClusterer(min_cluster_size=0).fit(X, y)


@pytest.mark.slow
def test_constrained_descent_meets_brute_force():
    partitions = np.array(
        [[0] * 8, *([int(i in part) for i in range(8)] for size in (3, 4) for part in combinations(range(8), size))]
    )
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        X, y = rng.normal(size=(8, 2)), rng.normal(size=(8, 3))
        model = JointClusterer(3.0, 0.5, min_cluster_size=3, random_state=0).fit(X, y)
        ratios.append(
            model.objective_ / min(model.partition_objective(X, y, labels).objective for labels in partitions)
        )
    assert min(ratios) > 1 - 1e-9 and max(ratios) < 1.05 and sum(ratio < 1 + 1e-9 for ratio in ratios) >= 17


def test_baselines_match_clusters_or_rate(data):
    X, y, w, mode = data
    assert single_view_kmeans(X, n_clusters=3, sample_weight=w, random_state=0).n_clusters == 3
    shares = np.bincount(mode, w) / w.sum()
    rate = -(shares @ np.log(shares))
    matched = single_view_kmeans(y, rate=rate, sample_weight=w, random_state=0)
    assert matched.rate == pytest.approx(rate, abs=0.3)
    assert single_view_kmeans(y, rate=0, random_state=0).n_clusters == 1
    for arguments, message in [
        ({}, "Give one"),
        ({"n_clusters": 3, "rate": 1.0}, "Give one"),
        ({"n_clusters": 91}, "n_clusters"),
        ({"rate": -1}, "rate"),
    ]:
        with pytest.raises(ValueError, match=message):
            single_view_kmeans(X, **arguments)


@pytest.mark.parametrize("n", [2, 3])
def test_two_or_three_items_are_clustered_and_judged(n):
    """A bootstrap of so few often draws one of them alone, which has one cluster."""
    rng = np.random.default_rng(0)
    path = rate_distortion_path(rng.normal(size=(n, 3)), rng.normal(size=(n, 4)), (1.0, 4.0), (0.5,), random_state=0)
    assert [point.n_clusters for point in path.points] == [1, n]
    choice = choose_point(path, clusters=(1, n), n_resamples=20, random_state=0)
    assert choice.point.n_clusters in (1, n)
