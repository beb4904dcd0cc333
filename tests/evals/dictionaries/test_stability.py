"""Equal dictionaries agree, unrelated ones do by chance alone, and planted replacements are what is not found again."""

import pandas as pd
import pytest
import torch

import saelens_ext as sx
from saelens_ext.evals import StabilityEvidence, dictionary_stability


def rows(k, d=40, seed=0):
    return torch.nn.functional.normalize(torch.randn(k, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def noisy(x, seed, size=0.05):
    return x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def test_equal_replicas_are_found_again_whatever_their_order():
    x = rows(60)
    found = dictionary_stability({"a": x, "b": x[torch.randperm(60)], "c": 3 * x})
    assert all((found.found_again(name) == 1).all() for name in "abc")
    means = found.summary().set_index(["metric", "method"])["estimate"]
    assert means["share_above", "replicas"] == 1 and means["share_mutual", "replicas"] == 1
    assert means["median_cosine", "replicas"] == pytest.approx(1, abs=1e-5)
    assert means["share_above", "turned replicas"] < 0.05


def test_unrelated_replicas_agree_by_chance_alone():
    found = dictionary_stability({name: rows(300, seed=number) for number, name in enumerate("abcdef")}, level=0.95)
    share = found.summary(metric="share_above").set_index("method")["estimate"]
    assert share["replicas"] == pytest.approx(0.05, abs=0.02)
    assert "cannot be told from turned replicas" in found.claim()


def test_what_was_replaced_is_not_found_again():
    shared, own = rows(80, seed=1), {name: rows(20, seed=10 + number) for number, name in enumerate("abc")}
    found = dictionary_stability(
        {name: torch.cat([noisy(shared, number), part]) for number, (name, part) in enumerate(own.items())}
    )
    for name in own:
        again = found.found_again(name)
        assert (again[:80] == 1).double().mean() >= 0.9 and (again[80:] > 0.5).double().mean() <= 0.1


@pytest.mark.slow
def test_fits_predict_what_is_found_again(tiny_bridge, tiny_texts):
    fits = {
        str(seed): sx.fit_exemplar_partition(
            sx.ActivationStream(tiny_bridge, tiny_texts, "blocks.1.hook_out", context_size=32, shuffle_seed=seed),
            percentile=10,
        )
        for seed in range(3)
    }
    found = dictionary_stability(fits)
    correlation = found.cells[found.cells["metric"] == "predictor_correlation"]
    assert len(correlation) == 3 and correlation["value"].between(-1, 1).all()
    fit = fits["1"]
    predictor = pd.Series((fit.counts.double() * fit.coherence.double() ** 2).log10().numpy())
    mean = pd.Series(found.cosines["1"].mean(dim=1).numpy())
    by_hand = predictor.rank().corr(mean.rank())
    assert correlation.set_index("replica").loc["1", "value"] == pytest.approx(by_hand)


def test_saved_and_read(tmp_path):
    found = dictionary_stability({"a": rows(30), "b": noisy(rows(30), 1)})
    again = sx.Evidence.load(found.save(tmp_path))
    assert isinstance(again, StabilityEvidence)
    pd.testing.assert_frame_equal(again.summary(), found.summary())
    assert torch.equal(again.found_again("b"), found.found_again("b"))
    assert "Too few replicas" in again.verdict()
    with pytest.raises(ValueError, match="replica must be"):
        again.found_again("z")


def test_bad_input():
    with pytest.raises(ValueError, match="at least 2 dictionaries by name, got 1"):
        dictionary_stability({"a": rows(5)})
    with pytest.raises(ValueError, match="width"):
        dictionary_stability({"a": rows(5), "b": rows(5, d=8)})
    with pytest.raises(ValueError, match="level"):
        dictionary_stability({"a": rows(5), "b": rows(5)}, level=1.0)
