"""Joint clustering against single views on held-out continuations."""

from dataclasses import replace

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import entropy

import saelens_ext as sx
from saelens_ext.continuations.clustering.baselines import SingleView
from saelens_ext.evals.continuations import clusterings
from saelens_ext.evals.continuations.clusterings import ClusteringEvidence, compare_clusterings, one_cluster
from saelens_ext.report.evidence_report import write_evidence_report
from tests.evals.continuation_sets import one_view_set, planted_set, two_view_set

CELL = {"betas": (2.0,), "gammas": (0.5,), "min_cluster_size": 4}


@pytest.fixture(scope="module")
def two_views():
    return compare_clusterings([two_view_set(number) for number in range(8)], **CELL)


@pytest.mark.slow
def test_modes_of_two_views_are_found_by_both_together_alone(two_views):
    table = two_views.comparisons().set_index("other")
    assert set(table.index) == {"semantic", "attribution", "random", "length"}
    assert (table["difference"] < 0).all() and (table["p_holm"] < 0.05).all()
    wins = two_views.wins().set_index("other")
    assert (wins["estimate"] == 1).all() and wins.loc["semantic", "low"] == pytest.approx(0.676, abs=0.001)
    assert "joint" in two_views.claim() and "is below" in two_views.claim()


@pytest.mark.slow
@pytest.mark.parametrize("view", ["semantic", "attribution"])
def test_no_win_over_the_only_view_with_modes(view):
    found = compare_clusterings([one_view_set(number, view) for number in range(8)], **CELL)
    table = found.comparisons().set_index("other")
    assert not (table.loc[view, "p_holm"] < 0.05 and table.loc[view, "difference"] < 0)
    other = "attribution" if view == "semantic" else "semantic"
    assert table.loc[other, "difference"] < 0 and table.loc[other, "p_holm"] < 0.05


@pytest.mark.slow
def test_noise_alone_gives_no_claim():
    found = compare_clusterings([planted_set(n, np.zeros(40, int), np.zeros(40, int)) for n in range(8)], **CELL)
    table = found.comparisons().set_index("other")
    assert not ((table["p_holm"] < 0.05) & (table["difference"] < 0)).any()


def test_a_control_that_is_one_cluster_for_all_is_said_to_be_none(two_views):
    cells = two_views.cells.copy()
    where = (cells["metric"] == "n_clusters") & cells["prefix"].isin([f"Prefix {n}" for n in range(5)])
    assert (cells.loc[where & (cells["method"] == "joint"), "value"] > 1).all()
    cells.loc[where & (cells["method"] == "length"), "value"] = 1.0
    found = replace(two_views, cells=cells)
    notes = found.comparisons().set_index("other")["note"]
    assert notes["length"] == "length is one cluster in 5 of 8 prefixes" and set(notes.drop("length")) == {""}
    assert found.wins().set_index("other")["note"].equals(notes[found.wins()["other"]])
    assert "; length is one cluster in 5 of 8 prefixes)" in found.verdict()
    assert "is one cluster for all (length in 5 of 8 prefixes), nothing is clustered" in found.verdict()
    # Where the joint clustering is one cluster as well, the two are the same.
    cells.loc[where & (cells["method"] == "joint") & (cells["prefix"] != "Prefix 0"), "value"] = 1.0
    assert "length in 1 of 4 prefixes" in replace(two_views, cells=cells).verdict()
    assert "one cluster" not in two_views.verdict() and "note" not in two_views.comparisons()


@pytest.mark.slow
def test_continuations_of_one_length_are_one_cluster_by_length():
    sets = [two_view_set(number, lengths=np.full(48, 3)) for number in range(6)]
    found = compare_clusterings(sets, **CELL)
    assert "(length in 6 of 6 prefixes), nothing is clustered" in found.verdict()


def test_figures_are_those_of_loops(two_views):
    """Rates match, and one prefix is worked out by hand from the labels of a clusterer fitted to the same half."""
    cells = two_views.cells.pivot_table(index=["prefix", "beta", "gamma", "method"], columns="metric", values="value")
    rates = cells["fitted_rate"].unstack("method")
    assert (rates["random"] - rates["joint"]).abs().max() < 1e-12
    gamma, beta = cells.index.get_level_values("gamma"), cells.index.get_level_values("beta")
    parts = gamma * cells["semantic_distortion"] + (1 - gamma) * cells["attribution_distortion"]
    np.testing.assert_allclose(cells["objective"], cells["rate"] + beta * parts)
    one = two_view_set(0)
    order = np.random.default_rng([0, 0]).permutation(48)
    judged, chosen = np.sort(order[:24]), np.sort(order[24:])
    e, a = one.both_views()
    path = sx.rate_distortion_path(
        e[chosen], a[chosen], CELL["betas"], CELL["gammas"], min_cluster_size=4, random_state=0
    )
    point = path.at(2.0, 0.5)
    masses = np.bincount(point.labels) / 24
    total = 0.0
    for row in judged:
        costs = []
        for k, mass in enumerate(masses):
            members = chosen[point.labels == k]
            d_e = ((e[row] - e[members].mean(axis=0)) ** 2).sum() / path.problem.semantic_scale
            d_a = np.abs(a[row] - _lower_median(a[members])).sum() / path.problem.attribution_scale
            costs.append(-np.log(mass) + 2.0 * (0.5 * d_e + 0.5 * d_a))
        total += min(costs) / 24
    own = cells.loc["Prefix 0", 2.0, 0.5, "joint"]
    assert own["objective"] == pytest.approx(total) and own["n_clusters"] == len(masses)
    assert own["fitted_rate"] == pytest.approx(entropy(masses))
    # Each control is made from its own view alone, at the rate of the joint clusters.
    for name, view in {"semantic": e, "attribution": a, "length": one.lengths.double().numpy()[:, None]}.items():
        control = SingleView(view[chosen], random_state=0).with_rate(point.rate)
        found = cells.loc["Prefix 0", 2.0, 0.5, name]
        assert found["fitted_rate"] == pytest.approx(control.rate) and found["n_clusters"] == control.n_clusters


@pytest.mark.slow
def test_weights_count_on_both_sides():
    """One prefix of continuations of unequal weight, by loops; every control is clustered with the weights too."""
    rng, one = np.random.default_rng(7), two_view_set(1)
    weights = rng.dirichlet(np.full(48, 0.5))
    one = replace(one, weights=torch.as_tensor(weights))
    order = rng.permutation(48)
    chosen, judged = np.sort(order[:30]), np.sort(order[30:])
    options = {"scaling": "balanced", "min_cluster_size": 3, "random_state": 0}
    rows = clusterings._judged(one, chosen, judged, (2.0,), (0.3,), options)
    found = pd.DataFrame(rows).pivot_table(index="method", columns="metric", values="value")
    (e, a), lengths = one.both_views(), one.lengths.double().numpy()[:, None]
    w = weights[chosen] / weights[chosen].sum()
    path = sx.rate_distortion_path(e[chosen], a[chosen], (2.0,), (0.3,), sample_weight=w, **options)
    labels = {"joint": path.at(2.0, 0.3).labels}
    rate = entropy(np.bincount(labels["joint"], w))
    for name, view in {"semantic": e, "attribution": a, "length": lengths}.items():
        labels[name] = SingleView(view[chosen], sample_weight=w, random_state=0).with_rate(rate).labels
    for name, own in labels.items():
        masses = np.bincount(own, w)
        centers = [
            (np.average(e[chosen][own == k], axis=0, weights=w[own == k]), _median(a[chosen][own == k], w[own == k]))
            for k in range(len(masses))
        ]
        total = 0.0
        for row in judged:
            parts = [
                (((e[row] - c_e) ** 2).sum() / path.problem.semantic_scale,
                 np.abs(a[row] - c_a).sum() / path.problem.attribution_scale)
                for c_e, c_a in centers
            ]  # fmt: skip
            costs = [-np.log(mass) + 2.0 * (0.3 * d_e + 0.7 * d_a) for mass, (d_e, d_a) in zip(masses, parts)]
            total += min(costs) * weights[row] / weights[judged].sum()
        assert found.loc[name, "objective"] == pytest.approx(total), name
        assert found.loc[name, "fitted_rate"] == pytest.approx(entropy(masses))
    sizes = sorted(np.bincount(labels["joint"]))
    assert found.loc["random", "n_clusters"] == len(sizes)
    assert found.loc["random", "objective"] > found.loc["joint", "objective"]


def _median(values, weights):
    order = np.argsort(values, axis=0)
    reached = np.take(weights, order).cumsum(axis=0) >= weights.sum() / 2 - 1e-12
    return np.take_along_axis(values, np.take_along_axis(order, reached.argmax(axis=0)[None], 0), 0)[0]


def made_cells(values):
    keys = ["prefix", "beta", "gamma", "method", "metric", "value"]
    return pd.DataFrame([dict(zip(keys, row)) for row in values])


def test_one_cell_in_which_a_control_is_one_cluster_is_enough():
    counts = {("p", 1.0): (3, 2), ("p", 2.0): (4, 1), ("q", 1.0): (1, 1), ("q", 2.0): (5, 2)}
    rows = [
        (prefix, beta, 0.5, method, "n_clusters", float(n))
        for (prefix, beta), sizes in counts.items()
        for method, n in zip(("joint", "length"), sizes)
    ]
    assert one_cluster(made_cells(rows)) == {"length": (1, 2)}


def test_the_map_shows_what_the_better_single_view_lacks():
    objectives = {"joint": (1.0, 2.0), "semantic": (1.5, 5.0), "attribution": (4.0, 1.75)}
    rows = [
        (prefix, beta, 0.5, method, "objective", value + shift)
        for prefix, shift in (("p", -0.25), ("q", 0.25))
        for method, pair in objectives.items()
        for beta, value in zip((1.0, 2.0), pair)
    ]
    evidence = ClusteringEvidence(cells=made_cells(rows), kinds=dict.fromkeys(objectives, "control"))
    shown = evidence._margins(evidence.by_cell())
    assert shown.values == ((0.5, -0.25),) and shown.columns == ("1", "2") and (shown.low, shown.high) == (-0.5, 0.5)


def _lower_median(values):
    return np.sort(values, axis=0)[(len(values) - 1) // 2]


@pytest.mark.slow
def test_order_jobs_and_files_change_nothing(two_views, tmp_path):
    sets = [two_view_set(number) for number in range(6)]
    with joblib.parallel_config("threading"):
        again = compare_clusterings(sets, **CELL, n_jobs=2)
    pd.testing.assert_frame_equal(again.cells, two_views.cells[: len(again.cells)])
    read = sx.Evidence.load(two_views.save(tmp_path))
    assert isinstance(read, ClusteringEvidence)
    pd.testing.assert_frame_equal(read.wins(), two_views.wins())
    text = write_evidence_report(tmp_path / "page.html", [two_views.section()]).read_text()
    assert "Joint clustering" in text and "better single view" in text


def test_bad_input():
    sets = [two_view_set(number, n=12) for number in range(6)]
    with pytest.raises(ValueError, match="at least 6 prefixes, got 5"):
        compare_clusterings(sets[:5])
    with pytest.raises(ValueError, match="'Prefix 0 ' is given twice"):
        compare_clusterings([*sets, replace(sets[0], prefix="Prefix 0 ")])
    with pytest.raises(ValueError, match="3 to cluster and 4 to judge on, and either part needs 4"):
        compare_clusterings([*sets[:5], sets[5].select(range(7))])
    with pytest.raises(ValueError, match="no signatures"):
        compare_clusterings([*sets[:5], replace(sets[5], signatures=None)])
    with pytest.raises(ValueError, match="held_out must lie"):
        compare_clusterings(sets, held_out=1.0)
