"""Where fine regions go is what a double loop counts; planted nests are whole, and permuted labels give chance."""

from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import torch

import saelens_ext as sx
from saelens_ext.evals import NestingEvidence, partition_nesting
from saelens_ext.evals.baselines import random_activations


def directions(*angles):
    return torch.stack([torch.tensor([np.cos(a), np.sin(a)]) for a in np.deg2rad(angles)]).float()


def partition(rows):
    return sx.ExemplarPartition.from_regions(rows, rows, torch.zeros(rows.shape[1]), 0.5)


@pytest.fixture(scope="module")
def planted():
    """Four fine regions, of which two lie in each of two coarse ones; documents of 8 activations."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([10.0, 60.0, 190.0, 240.0])
    angles = centers[torch.randint(4, (240,), generator=generator)] + 8 * torch.randn(240, generator=generator)
    partitions = {"coarse": partition(directions(35, 215)), "fine": partition(directions(10, 60, 190, 240))}
    return partitions, directions(*angles.tolist()), torch.arange(240) // 8


@pytest.fixture(scope="module")
def fitted():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=generator).repeat_interleave(10, 0) + torch.randn(300, 6, generator=generator)
    fits = {f"p{p}": sx.fit_exemplar_partition(x, percentile=p) for p in (5, 15, 40)}
    return fits, x, partition_nesting(fits, x, document_ids=torch.arange(300) // 10, n_shuffles=19, n_bootstrap=50)


def test_nests_that_were_planted_are_whole(planted):
    partitions, x, documents = planted
    found = partition_nesting(partitions, x, document_ids=documents)
    assert found.settings["partitions"] == ["fine", "coarse"]  # by their regions, however they were given
    assert found.regions["majority"].tolist() == [0, 0, 1, 1] and (found.regions["share"] == 1).all()
    assert found.regions["expected"].between(0.5, 0.62).all() and (found.regions["p"] == 0.01).all()
    chain = found.chain()
    assert chain["members"].is_monotonic_decreasing and (chain["share of coarse"] == 1).all()
    assert "is above random activations" in found.claim()
    assert "coarse: 100% of a document's activations" in found.verdict()


def test_shares_are_those_of_a_double_loop(fitted):
    fits, x, found = fitted
    labels = {name: fit.dictionary.assign(x).regions.tolist() for name, fit in fits.items()}
    rows = {(row["fine"], row["coarse"], row["region"]): row for row in found.regions.to_dict("records")}
    assert {(fine, coarse) for fine, coarse, _ in rows} == set(combinations(fits, 2))
    for (fine, coarse), region in product(combinations(fits, 2), range(fits["p5"].n_regions)):
        held = [c for f, c in zip(labels[fine], labels[coarse]) if f == region]
        if not held:
            assert (fine, coarse, region) not in rows
            continue
        counts = [held.count(c) for c in range(fits[coarse].n_regions)]
        row = rows[fine, coarse, region]
        assert (row["members"], row["majority"]) == (len(held), counts.index(max(counts)))
        assert row["share"] == pytest.approx(max(counts) / len(held))
    values = found.per_unit("share").loc["p5 in p40"]["coarser partition"]
    for document in range(30):
        kept = [
            rows["p5", "p40", labels["p5"][i]]["majority"] == labels["p40"][i]
            for i in range(document * 10, document * 10 + 10)
        ]
        assert values[document] == pytest.approx(np.mean(kept))
    chain = found.chain()
    for row in chain.to_dict("records"):
        step = rows["p15", "p40", rows["p5", "p15", row["region"]]["majority"]]["majority"]
        assert row["stepwise"] == (step == row["p40"]) and row["p40"] == rows["p5", "p40", row["region"]]["majority"]
    assert 0 < chain["stepwise"].mean() < 1 and "go the same way step by step" in found.verdict()


def test_controls_are_as_many_random_activations_around_the_same_centre_and_permuted_labels(fitted):
    fits, x, found = fitted
    cells = found.cells.set_index(["pair", "method", "metric", "document"])["value"].sort_index()
    fine, coarse = (fits[name].dictionary.assign(x).regions for name in ("p5", "p40"))
    own = found.regions[(found.regions["fine"] == "p5") & (found.regions["coarse"] == "p40")].set_index("region")
    permuted = own["expected"].loc[fine.numpy()].to_numpy().reshape(30, 10).mean(axis=1)
    np.testing.assert_allclose(cells["p5 in p40", "permuted labels", "share"], permuted)
    above = cells["p5 in p40", "coarser partition", "share"] - permuted
    np.testing.assert_allclose(cells["p5 in p40", "coarser partition", "above_chance"], above)
    center, rng = fits["p40"].dictionary.center.detach(), np.random.default_rng(0)
    shares, chances = [], []
    for draw in range(3):
        rows = random_activations(x, len(set(coarse.tolist())), "", center=center, draw=draw).directions
        nearest = (torch.nn.functional.normalize(x - center, dim=1) @ rows.T).argmax(dim=1)
        counts = np.histogram2d(fine, nearest, bins=(range(fine.max() + 2), range(nearest.max() + 2)))[0]
        shares.append(counts.argmax(axis=1)[fine] == nearest.numpy())
        sizes, members = np.bincount(nearest), np.bincount(fine)
        most = [rng.multivariate_hypergeometric(sizes, n, size=300).max(axis=1).mean() / n for n in members if n]
        chances.append(np.average(most, weights=members[members > 0]))
    by_document = np.mean(shares, axis=0).reshape(30, 10).mean(axis=1)
    np.testing.assert_allclose(cells["p5 in p40", "random activations", "share"], by_document)
    control = cells["p5 in p40", "random activations"].groupby("metric").mean()
    assert control["share"] - control["above_chance"] == pytest.approx(np.mean(chances), abs=0.01)


def test_labels_without_relation_nest_as_permuted_ones_do():
    """The fine labels are of one plane, the coarse ones of another; expected shares are those of a hypergeometric."""
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(2))
    first = torch.nn.functional.pad(directions(0, 60, 120, 180, 240, 300), (0, 2))
    second = torch.nn.functional.pad(directions(0, 120, 240), (2, 0))
    found = partition_nesting({"fine": partition(first), "coarse": partition(second)}, x, n_shuffles=199)
    assert found.per_unit()["coarser partition"].mean() == pytest.approx(0, abs=0.05)
    assert found.regions["p"].min() > 0.01
    sizes = np.bincount(partition(second).assign(x).regions.numpy())
    row = found.regions.iloc[0]
    draws = np.random.default_rng(0).multivariate_hypergeometric(sizes, row["members"], size=4000).max(axis=1)
    assert row["expected"] == pytest.approx(draws.mean() / row["members"], abs=0.01)


def test_one_coarse_region_says_nothing(planted):
    partitions, x, documents = planted
    single = {"fine": partitions["fine"], "one": partition(directions(35))}
    found = partition_nesting(single, x, document_ids=documents, n_shuffles=5)
    assert (found.regions["share"] == 1).all() and (found.regions["expected"] == 1).all()
    assert (found.per_unit() == 0).all(axis=None) and (found.regions["p"] == 1).all()


def test_streams_any_dictionary_saving_and_the_page(tiny_bridge, tiny_texts, tmp_path):
    stream = sx.ActivationStream(tiny_bridge, tiny_texts, "blocks.1.hook_out", context_size=16, max_tokens=300)
    fits = sx.fit_exemplar_partitions(stream, percentiles=(5, 30))
    given = {"fine": fits["blocks.1.hook_out", 5], "coarse": fits["blocks.1.hook_out", 30].dictionary}
    found = partition_nesting(given, stream, n_shuffles=5, n_bootstrap=20)
    assert found.settings["n_activations"] == 300
    again = sx.Evidence.load(found.save(tmp_path))
    assert isinstance(again, NestingEvidence) and again.verdict() == found.verdict()
    pd.testing.assert_frame_equal(again.chain(), found.chain())
    page = sx.write_evidence_report(tmp_path / "page.html", [found.section()]).read_text()
    assert "Where fine regions go" in page and "From partition to partition" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partitions": {"a": partition(directions(0, 90))}}, "at least 2 by name, got 1"),
        ({"source": torch.randn(10, 3)}, "Partition fine"),
        ({"n_shuffles": 0}, "n_shuffles"),
        ({"n_random": 0}, "n_random"),
        ({"confidence": 1}, "confidence"),
        ({"document_ids": torch.arange(3)}, "document_ids"),
    ],
)
def test_bad_input(planted, change, message):
    partitions, x, _ = planted
    with pytest.raises(ValueError, match=message):
        partition_nesting(**{"partitions": partitions, "source": x} | change)
