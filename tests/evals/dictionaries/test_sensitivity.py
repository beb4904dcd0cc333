"""Outcomes by threshold are those of loops over activations, and planted clusters are found whatever the order."""

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

import saelens_ext as sx
from saelens_ext.evals import ThresholdSensitivity, threshold_sensitivity

RESOLUTIONS = {"percentiles": (5, 30), "neighbour_factors": (1, 2)}


@pytest.fixture(scope="module")
def activations():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(25, 6, generator=generator).repeat_interleave(8, 0) + torch.randn(200, 6, generator=generator)


@pytest.fixture(scope="module")
def kept():
    """Every fit that an outcome was asked of."""
    return []


@pytest.fixture(scope="module")
def found(activations, kept):
    documents = torch.arange(200) // 8
    outcomes = {"largest": lambda fit: kept.append(fit) or float(fit.counts.max())}
    return threshold_sensitivity(activations, document_ids=documents, outcomes=outcomes, n_orders=3, **RESOLUTIONS)


def test_outcomes_are_those_of_loops(found, kept, activations):
    assert found.settings["n_held_out"] == 40 and found.settings["n_fitted"] == 160 and len(kept) == 12
    judged = activations[np.isin(np.arange(200) // 8, judging())]
    cells = found.cells.set_index(["rule", "resolution", "order", "outcome"])["value"]
    keys = [(rule, float(r), o) for rule, name in RULES.items() for r in RESOLUTIONS[name] for o in range(3)]
    labels = {}
    for key, fit in zip(keys, kept, strict=True):
        center = fit.dictionary.center.detach()
        units = torch.nn.functional.normalize(judged - center, dim=1).double()
        distances = torch.stack([1 - fit.dictionary.exemplars.detach().double() @ unit for unit in units])
        labels[key] = distances.argmin(dim=1)
        assert cells[(*key, "n_regions")] == fit.n_regions and cells[(*key, "largest")] == int(fit.counts.max())
        assert cells[(*key, "held_out_distance")] == pytest.approx(float(distances.amin(dim=1).mean()), abs=1e-5)
        rest = sum(float((row - fit.dictionary(row[None])[0].detach()).square().sum()) for row in judged)
        whole = float((judged - judged.mean(dim=0)).square().sum())
        assert cells[(*key, "held_out_error")] == pytest.approx(rest / whole, rel=1e-4)
    for rule, resolution, _ in keys[::3]:
        pairs = {
            (i, j): adjusted_mutual_info_score(labels[rule, resolution, i], labels[rule, resolution, j])
            for i, j in combinations(range(3), 2)
        }
        by_hand = np.mean([value for pair, value in pairs.items() if 1 in pair])
        assert cells[rule, resolution, 1, "agreement"] == pytest.approx(by_hand)


RULES = {"percentile": "percentiles", "nearest_neighbour": "neighbour_factors"}


def judging(n_documents=25):
    """The documents that judge, drawn as the evaluation draws them."""
    return np.random.default_rng([0, 1]).permutation(n_documents)[:5]


def test_orders_share_a_threshold_and_the_table_shows_their_spread(found, kept):
    for first in range(0, 12, 3):
        assert len({fit.threshold for fit in kept[first : first + 3]}) == 1
    table = found.table()
    assert isinstance(found, ThresholdSensitivity) and len(table) == 4
    assert table["threshold"].groupby(table["rule"]).is_monotonic_increasing.all()
    assert table["n_regions"].groupby(table["rule"]).is_monotonic_decreasing.all()
    sizes = [fit.n_regions for fit in kept[:3]]
    row = table[(table["rule"] == "percentile") & (table["resolution"] == 5)].iloc[0]
    assert row["n_regions"] == pytest.approx(np.mean(sizes)) and row["n_regions spread"] == max(sizes) - min(sizes)
    assert "From percentile 5 to 30 the threshold goes from" in found.verdict()
    assert "From factor 1 to 2" in found.verdict()


def test_planted_clusters_are_found_in_any_order():
    generator = torch.Generator().manual_seed(1)
    x = 5 * torch.eye(4).repeat(40, 1) + 0.05 * torch.randn(160, 4, generator=generator)
    found = threshold_sensitivity(x, percentiles=(), neighbour_factors=(300, 500), n_orders=2)
    table = found.table()
    assert (
        (table["n_regions"] == 4).all() and (table["agreement"] == 1).all() and (table["agreement spread"] == 0).all()
    )


def test_the_page_and_one_rule_alone(found, activations, tmp_path):
    page = sx.write_evidence_report(tmp_path / "page.html", [found.section()]).read_text()
    assert "Sensitivity to the threshold" in page and "Outcomes by resolution" in page
    one = threshold_sensitivity(activations, percentiles=(), neighbour_factors=(2,), n_orders=2)
    assert set(one.cells["rule"]) == {"nearest_neighbour"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"percentiles": (), "neighbour_factors": ()}, "both empty"),
        ({"percentiles": (5, 5)}, "all different"),
        ({"percentiles": (0,)}, "percentile must lie in"),
        ({"neighbour_factors": (0,)}, "neighbour_factor must lie in"),
        ({"outcomes": {"agreement": float}}, "names other than .* got 'agreement'"),
        ({"n_orders": 1}, "n_orders must be at least 2, got 1"),
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": 0.001}, "200 documents leaves 200 to fit and 0 to judge"),
        ({"document_ids": torch.arange(3)}, "document_ids"),
    ],
)
def test_bad_input(activations, change, message):
    with pytest.raises(ValueError, match=message):
        threshold_sensitivity(activations, **RESOLUTIONS | change)
