"""Curves count what a loop over the activations founds; planted sources saturate at what they hold."""

import numpy as np
import pandas as pd
import pytest
import torch

import saelens_ext as sx
from saelens_ext.evals import Saturation, saturation_curves


def planted(k, n, seed):
    """Activations of k directions, a little noisy."""
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.eye(12)[torch.randint(k, (n,), generator=generator)] + 0.05 * torch.randn(
        n, 12, generator=generator
    )


@pytest.fixture(scope="module")
def found():
    sources = {"few": planted(3, 300, 0), "many": planted(12, 120, 1)}
    fit = sx.fit_exemplar_partition(sources["many"], threshold=0.3)
    return sources, saturation_curves(sources, calibration=fit, n_orders=4)


def test_planted_sources_saturate_at_what_they_hold(found):
    table = found[1].table().set_index("source")
    assert table.loc["few", "regions"] == table.loc["few", "regions_at"] == 3
    assert table.loc["many", "regions"] == 12 and table.loc["many", ["low", "high"]].tolist() == [12, 12]
    assert table.loc["few", "n_seen"] == 300 and found[1].settings["n_common"] == 120
    assert (table["unseen_mass_upper"] > table["unseen_mass"]).all() and table["unseen_mass"].max() == 0
    assert "few: 3 regions (3 to 3 over orders)" in found[1].verdict() and "calibrated on a fit" in found[1].verdict()


def test_curves_are_those_of_a_loop_over_activations():
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(3))
    documents = torch.arange(80) // 4
    fit = sx.fit_exemplar_partition(x[:40], percentile=20)
    found = saturation_curves(
        {"own": x}, calibration=fit, document_ids={"own": documents}, n_orders=2, n_points=20, seed=5
    )
    units = torch.nn.functional.normalize(x - fit.dictionary.center.detach(), dim=1)
    generator = np.random.default_rng([5])
    for order in range(2):
        places = generator.permutation(20)
        rows = sorted(range(80), key=lambda row: (places[row // 4], row))
        exemplars, counts = [], [0]
        for row in rows:
            if all(1 - float(units[row] @ other) > fit.threshold.threshold for other in exemplars):
                exemplars.append(units[row])
            counts.append(len(exemplars))
        curve = found.curves[found.curves["order"] == order]
        assert curve["regions"].tolist() == [counts[seen] for seen in curve["seen"]]
        assert curve["seen"].iloc[0] == 0 and curve["seen"].iloc[-1] == 80 and len(curve) > 10


def test_the_table_holds_means_the_least_and_the_most_over_orders():
    """Sources of 4 and 6 activations in two orders each, made up."""
    seen = {"short": [0, 2, 4], "long": [0, 2, 4, 6]}
    regions = {("short", 0): [0, 1, 2], ("short", 1): [0, 2, 3], ("long", 0): [0, 2, 4, 5], ("long", 1): [0, 1, 1, 6]}
    curves = [
        pd.DataFrame({"source": source, "order": order, "seen": seen[source], "regions": counts})
        for (source, order), counts in regions.items()
    ]
    ends = pd.DataFrame(
        {
            "source": source,
            "order": order,
            "n_seen": seen[source][-1],
            "regions": counts[-1],
            "unseen_mass": 0.1 * order,
        }
        for (source, order), counts in regions.items()
    ).assign(unseen_mass_upper=0.5)
    made = Saturation(curves=pd.concat(curves), ends=ends, settings={"n_common": 4})
    table = made.table().set_index("source")
    assert table[["n_seen", "regions", "regions_at", "low", "high"]].to_numpy().tolist() == [
        [4, 2.5, 2.5, 2, 3], [6, 5.5, 2.5, 1, 4],
    ]  # fmt: skip
    assert table["unseen_mass"].tolist() == pytest.approx([0.05, 0.05])


def test_one_centre_and_threshold_for_sources_and_models(tiny_bridge, tiny_texts, tmp_path):
    hooks = {"first": "blocks.0.hook_out", "second": "blocks.1.hook_out"}
    streams = {
        name: sx.ActivationStream(tiny_bridge, tiny_texts, hook, context_size=16, max_tokens=200)
        for name, hook in hooks.items()
    }
    found = saturation_curves(streams, percentile=20, n_orders=1)
    assert isinstance(found, Saturation) and found.settings["calibrated_on"] == "first"
    own = saturation_curves({"second": streams["second"]}, percentile=20, n_orders=1)
    same = saturation_curves({"second": streams["second"]}, calibration=own_fit(streams["first"]), n_orders=1)
    shared = found.curves[found.curves["source"] == "second"]["regions"].tolist()
    assert shared == same.curves["regions"].tolist() != own.curves["regions"].tolist()
    page = sx.write_evidence_report(tmp_path / "page.html", [found.section()]).read_text()
    assert "Regions against activations seen" in page


def own_fit(stream):
    return sx.fit_exemplar_partition(stream, percentile=20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": {}}, "sources is empty"),
        ({"calibration": "other"}, "calibration must be one of 'a'"),
        ({"document_ids": {"b": torch.zeros(20)}}, "document_ids"),
        ({"sources": {"a": torch.randn(20, 3), "b": torch.randn(20, 4)}}, "3 numbers per activation, got 4"),
        ({"n_orders": 0}, "n_orders"),
        ({"n_points": 3}, "n_points must be at least 4, got 3"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        saturation_curves(**{"sources": {"a": torch.randn(20, 3)}} | change)
