"""The joint clusterer: its contract with scikit-learn, its objective, and what it finds in planted data."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from saelens_ext.continuations.clustering.baselines import single_view_kmeans
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer, rate_distortion_path
from saelens_ext.continuations.clustering.path import BETAS, GAMMAS


def joint_modes(n=240, seed=0):
    """Nine modes: each view alone shows three groups of three of them."""
    rng = np.random.default_rng(seed)
    mode = np.arange(n) % 9
    X = np.eye(16)[mode % 3] * 3 + 0.1 * rng.normal(size=(n, 16))
    y = (rng.random((3, 200)) < 0.1)[mode // 3] * 2.0 + (rng.random((n, 200)) < 0.02) * rng.standard_t(2, size=(n, 200))
    y[:, 0] += 0.1
    return X, y, np.exp(0.5 * rng.normal(size=n)), mode


def planted(n, d, seed, noise):
    """Eight modes distinct in both views; sparse, heavy-tailed sources."""
    rng = np.random.default_rng(seed)
    mode = rng.permutation(np.arange(n) % 8)
    X = rng.normal(size=(8, 32))[mode] + noise * rng.normal(size=(n, 32))
    pattern = (rng.random((8, d)) < 0.03) * rng.standard_t(2, size=(8, d))
    y = pattern[mode] * np.exp(0.5 * rng.normal(size=(n, d))) * (rng.random((n, d)) < 0.8)
    y += (rng.random((n, d)) < 0.03) * rng.standard_t(1.5, size=(n, d)) * noise
    return X / np.linalg.norm(X, axis=1, keepdims=True), y, np.exp(rng.normal(size=n)), mode


# --- scikit-learn ---


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_checks_pass_but_for_zero_weights():
    results = check_estimator(JointClusterer(random_state=0), on_fail=None)
    failed = {result["check_name"] for result in results if result["status"] == "failed"}
    # The check gives rows a weight of zero, which is refused here: a continuation of no probability is not in the
    # sample.
    assert failed <= {"check_sample_weight_equivalence_on_dense_data"}


def test_clone_parameters_pipeline_and_not_fitted():
    estimator = JointClusterer(beta=0.7, gamma=0.2, random_state=3)
    assert clone(estimator).get_params() == estimator.get_params()
    assert estimator.set_params(beta=0.9).beta == 0.9
    X, y, _, _ = joint_modes()
    pipeline = make_pipeline(StandardScaler(), JointClusterer(random_state=0)).fit(X)
    assert np.array_equal(pipeline.predict(X), pipeline[-1].labels_)
    with pytest.raises(NotFittedError):
        estimator.predict(X)
    with pytest.warns(UserWarning, match="taken for labels"):
        JointClusterer().fit(X, np.arange(len(X)))


# --- the objective ---


@pytest.mark.parametrize("scaling", ["balanced", "paper"])
@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("center", ["mean", "unit"])
def test_attributes_belong_together(scaling, metric, center):
    X, y, w, _ = joint_modes(90)
    model = JointClusterer(1.0, 0.4, metric, scaling, center, random_state=0).fit(X, y, sample_weight=w)
    assert np.array_equal(np.unique(model.labels_), np.arange(model.n_clusters_))
    shares = np.bincount(model.labels_, w) / w.sum()
    assert model.cluster_weights_ == pytest.approx(shares)
    assert (np.diff(shares) <= 1e-12).all()
    assert model.rate_ == pytest.approx(-(shares @ np.log(shares)))
    gaps = np.abs(y - model.attribution_centers_[model.labels_])
    d_a = w @ (gaps if metric == "l1" else gaps**2).sum(axis=1) / w.sum()
    d_e = w @ ((X - model.semantic_centers_[model.labels_]) ** 2).sum(axis=1) / w.sum()
    assert model.attribution_distortion_ * model.attribution_scale_ == pytest.approx(d_a)
    assert model.semantic_distortion_ * model.semantic_scale_ == pytest.approx(d_e)
    expected = model.rate_ + 1.0 * (0.4 * model.semantic_distortion_ + 0.6 * model.attribution_distortion_)
    assert model.objective_ == pytest.approx(expected) == pytest.approx(model.history_[-1])
    assert (np.diff(model.history_) <= 0).all()
    assert np.array_equal(model.predict(X, y), model.labels_)
    again = model.partition_objective(X, y, model.labels_, sample_weight=w)
    assert again.objective == pytest.approx(model.objective_)
    if center == "unit":
        assert np.linalg.norm(model.semantic_centers_, axis=1) == pytest.approx(1)


def test_prediction_weighs_the_clusters_as_the_fit_does():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(180, 1)), 3 + rng.normal(size=(20, 1))])
    model = JointClusterer(0.5, random_state=0).fit(X)
    assert model.n_clusters_ > 1
    assert np.array_equal(model.predict(X), model.labels_)
    nearest = np.abs(X - model.semantic_centers_.T).argmin(axis=1)
    assert not np.array_equal(nearest, model.labels_)


def test_balanced_scaling_ignores_units_and_prices_both_views_alike():
    X, y, w, _ = joint_modes()
    first = JointClusterer(random_state=0).fit(X, y, sample_weight=w)
    second = JointClusterer(random_state=0).fit(1000 * X, y / 50, sample_weight=3 * w)
    assert np.array_equal(first.labels_, second.labels_)
    one = first.partition_objective(X, y, np.zeros(len(X)), sample_weight=w)
    each = first.partition_objective(X, y, np.arange(len(X)), sample_weight=w)
    assert one.semantic_distortion == pytest.approx(one.attribution_distortion) == pytest.approx(0.75 * each.rate)


def test_paper_scaling_is_the_published_preprocessing():
    X, y, w, _ = joint_modes()
    order = np.argsort(y, axis=0)
    reached = np.cumsum(w[order], axis=0) >= w.sum() / 2
    origin = np.take_along_axis(y, np.take_along_axis(order, reached.argmax(axis=0)[None], axis=0), axis=0)
    published = (y - origin) / np.sqrt(((y - origin) ** 2).sum(axis=1).mean())
    one = JointClusterer(scaling="paper").partition_objective(X, y, np.zeros(len(X)), sample_weight=w)
    assert one.attribution_distortion == pytest.approx(w @ np.abs(published).sum(axis=1) / w.sum())
    assert one.semantic_distortion == pytest.approx(w @ ((X - w @ X / w.sum()) ** 2).sum(axis=1) / w.sum())


def test_medoids_use_the_priced_weighted_distance():
    X, y, w, _ = joint_modes()
    model = JointClusterer(0.9, 0.3, random_state=0).fit(X, y, sample_weight=w)
    for k, medoid in enumerate(model.medoid_indices_):
        members = np.flatnonzero(model.labels_ == k)
        apart = 0.3 / model.semantic_scale_ * cdist(X[members], X[members], "sqeuclidean")
        apart += 0.7 / model.attribution_scale_ * cdist(y[members], y[members], "cityblock")
        assert medoid == members[np.argmin(apart @ w[members])]


# --- what it finds ---


def test_joint_modes_that_each_view_misses_are_recovered():
    X, y, w, mode = joint_modes()
    model = JointClusterer(random_state=0).fit(X, y, sample_weight=w)
    assert adjusted_rand_score(mode, model.labels_) > 0.95
    for view in (X, y):
        baseline = single_view_kmeans(view, n_clusters=model.n_clusters_, sample_weight=w, random_state=0)
        assert adjusted_rand_score(mode, baseline.labels) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["balanced", "paper"])
@pytest.mark.parametrize("n, d, noise", [(300, 400, 1.2), pytest.param(400, 1000, 0.6, marks=pytest.mark.slow)])
def test_never_above_the_planted_partition_or_one_cluster(scaling, n, d, noise):
    X, y, w, mode = planted(n, d, n + d, noise)
    path = rate_distortion_path(X, y, sample_weight=w, scaling=scaling, random_state=0)
    views = path.problem.views
    assert {(point.beta, point.gamma) for point in path.points} == {(beta, gamma) for beta in BETAS for gamma in GAMMAS}
    for point in path.points:
        for labels in (mode, np.zeros(n, dtype=int)):
            assert (
                point.objective <= path.problem.place(views.clusters(labels), point.beta, point.gamma).objective + 1e-9
            )


def test_a_fit_of_its_own_is_as_good_as_planted():
    X, y, w, mode = planted(300, 600, 0, 0.4)
    for beta in BETAS:
        model = JointClusterer(beta, 0.5, random_state=0).fit(X, y, sample_weight=w)
        for labels in (mode, np.zeros(300)):
            assert model.objective_ <= model.partition_objective(X, y, labels, sample_weight=w).objective + 1e-9


# --- bad input ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": -1}, "beta"),
        ({"beta": np.nan}, "beta"),
        ({"beta": np.inf}, "beta"),
        ({"gamma": 1.5}, "gamma"),
        ({"gamma": np.nan}, "gamma"),
        ({"attribution_metric": "l3"}, "attribution_metric"),
        ({"scaling": "balance"}, "Did you mean 'balanced'"),
        ({"semantic_center": "x"}, "semantic_center"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"init": np.zeros(3)}, "labels must have shape"),
    ],
)
def test_parameters_out_of_range(change, message):
    X, y, _, _ = joint_modes(30)
    with pytest.raises(ValueError, match=message):
        JointClusterer(**change).fit(X, y)


def test_bad_views_and_weights():
    X, y, w, _ = joint_modes(30)
    fit = JointClusterer(random_state=0).fit
    silent, holed = y.copy(), y.copy()
    silent[4] = 0
    holed[3, 2] = np.nan
    for arguments, message in [
        ((X[:1], y[:1]), "minimum of 2"),
        ((X, y[:-1]), "30 rows and y has 29"),
        ((X, silent), "zero throughout, the first in row 4"),
        ((X, holed), "NaN"),
        ((np.full_like(X, np.inf), y), "infinity"),
        ((np.ones((4, 2)), np.ones((4, 3))), "identical"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(*arguments)
    for value in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="row 2"):
            fit(X, y, sample_weight=np.where(np.arange(30) == 2, value, w))
    with pytest.raises(ValueError, match="sample_weight must have shape"):
        fit(X, y, sample_weight=w[:-1])
    fitted = fit(X, y)
    with pytest.raises(ValueError, match="pass y"):
        fitted.predict(X)
    with pytest.raises(ValueError, match="sources"):
        fitted.predict(X, y[:, :-1])


@pytest.mark.slow
def test_corner_cases():
    X, y, _, _ = joint_modes(30)
    two = JointClusterer().fit(X[:2], y[:2])
    assert two.n_clusters_ in (1, 2)
    assert JointClusterer(gamma=1.0).fit(np.ones_like(X), y).n_clusters_ == 1
    sparse = JointClusterer(random_state=0).fit(X, csr_array(y))
    assert np.array_equal(sparse.labels_, JointClusterer(random_state=0).fit_predict(X, y))
    alone = JointClusterer(random_state=0).fit(X)
    assert alone.attribution_centers_.shape == (alone.n_clusters_, 0) and alone.attribution_distortion_ == 0
    assert alone.objective_ == pytest.approx(alone.rate_ + alone.semantic_distortion_)
    with pytest.warns(ConvergenceWarning):
        JointClusterer(beta=1.2, max_iter=1, random_state=0, init=np.zeros(90)).fit(*joint_modes(90)[:2])
