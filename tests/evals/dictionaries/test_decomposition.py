"""Planted sums are found again, nothing else is, and the null is what it says."""

import itertools

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

import saelens_ext as sx
from saelens_ext.evals import decompose_dictionary


def units(n, d, seed):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def test_planted_sums_are_found_again():
    basis = units(12, 40, 0)
    planted = [(0, 3), (5, 1, 7), (2,)]
    weights = [(0.9, 0.4), (0.8, 0.5, 0.3), (1.0,)]
    target = torch.stack([sum(w * basis[i] for i, w in zip(terms, ws)) for terms, ws in zip(planted, weights)])
    found = decompose_dictionary(target, basis, n_null=20)
    for row, (terms, ws) in enumerate(zip(planted, weights)):
        assert tuple(found.terms[row, : len(terms)].tolist()) == terms and (found.terms[row, len(terms) :] == -1).all()
        ratio = found.weights[row, : len(terms)] / torch.tensor(ws, dtype=torch.float64)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))  # the direction counts, not its length
    assert (found.explained > 1 - 1e-9).all()
    assert torch.allclose(found.p_value, torch.full((3,), 1 / 21, dtype=torch.float64))
    means = found.summary().set_index(["metric", "method"])["estimate"]
    assert means["above_null", "basis"] == 1 and means["n_terms", "basis"] == 2
    assert means["explained", "turned basis"] == pytest.approx(float(found.null.mean()))
    assert found.comparisons()["p"].item() == 1 / 21 and "more than what the space alone gives" in found.verdict()
    table = found.to_dataframe()
    assert len(table) == 6 and set(table.columns) == {"latent", "term", "weight", "explained", "p"}


def test_the_weights_are_the_best_of_their_terms():
    target, basis = units(4, 9, 1), units(6, 9, 2)
    found = decompose_dictionary(target, basis, max_terms=6, n_null=1)
    for row, t in enumerate(target.numpy()):
        best = 0.0  # by brute force: of all supports, the least squares that are not negative
        for size in range(1, 7):
            for support in itertools.combinations(range(6), size):
                rows = basis[list(support)].numpy()
                w = np.linalg.lstsq(rows.T, t, rcond=None)[0]
                if (w >= 0).all():
                    best = max(best, 1 - np.square(t - w @ rows).sum())
        assert float(found.explained[row]) == pytest.approx(best, abs=1e-8)


def test_a_basis_that_reaches_everything_explains_no_more_than_turned_ones():
    basis = torch.cat([torch.eye(2), -torch.eye(2)])
    found = decompose_dictionary(units(5, 2, 0), basis, n_null=20)
    assert (found.explained > 1 - 1e-9).all() and (found.p_value == 1).all()
    assert found.comparisons()["p"].item() == 1 and "which cannot be told from" in found.verdict()


@pytest.mark.slow
def test_nothing_shared_looks_like_the_null():
    found = decompose_dictionary(units(400, 20, 3), units(30, 20, 4), n_null=20)
    means = found.summary().set_index(["metric", "method"])["estimate"]
    assert abs(means["explained", "basis"] - means["explained", "turned basis"]) < 0.05
    assert found.comparisons()["p"].item() > 0.05 and "which cannot be told from" in found.verdict()
    assert means["above_null", "basis"] <= 0.1  # .05 expected
    assert float((found.p_value <= 0.05).double().mean()) <= 0.09  # .05 expected


def test_saes_dead_latents_and_small_bases():
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=5))
    sae.W_dec.data[2] = 0
    found = decompose_dictionary(sae, units(2, 8, 5), max_terms=4, n_null=2)
    assert found.terms.shape == (5, 4) and (found.terms[:, 2:] == -1).all()
    assert found.explained.isnan().tolist() == [False, False, True, False, False]
    assert found.p_value.isnan()[2] and found.comparisons()["n_undefined"].item() == 1
    assert "too few turns for any claim" in found.verdict()


def test_saved_and_on_a_page(tmp_path):
    found = decompose_dictionary(units(7, 8, 0), units(4, 8, 1), n_null=20, n_bootstrap=20)
    again = sx.Evidence.load(found.save(tmp_path))
    assert again.verdict() == found.verdict() and torch.equal(again.terms, found.terms)
    page = sx.write_evidence_report(tmp_path / "page.html", [found.section()]).read_text()
    assert "Terms" in page and "turned basis" in page


def test_bad_input():
    for message, arguments, options in [
        ("width 8 and basis of 9", (units(3, 8, 0), units(3, 9, 0)), {}),
        ("target has no directions", (torch.zeros(2, 8), units(3, 8, 0)), {}),
        ("basis has 1 non-finite", (units(3, 8, 0), torch.tensor([[1.0, torch.nan]]).repeat(1, 4)[:, :8]), {}),
        ("max_terms", (units(3, 8, 0), units(3, 8, 0)), {"max_terms": 0}),
        ("n_null", (units(3, 8, 0), units(3, 8, 0)), {"n_null": 0}),
        ("confidence", (units(3, 8, 0), units(3, 8, 0)), {"confidence": 1.0}),
    ]:
        with pytest.raises(ValueError, match=message if "non-finite" not in message else "basis has . non-finite"):
            decompose_dictionary(*arguments, **options)
