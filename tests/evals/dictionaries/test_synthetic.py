"""Dictionaries on synthetic models: what is planted is found, what is not is not, and measures are SAELens' own."""

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens.synthetic import ConstantFiringProbabilityConfig, SyntheticModel, SyntheticModelConfig
from sae_lens.synthetic import mean_correlation_coefficient as mcc
from sklearn.metrics import roc_auc_score

from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.evals import Evidence
from saelens_ext.evals.dictionaries import synthetic
from saelens_ext.evals.dictionaries.synthetic import evaluate_on_synthetic
from tests.continuations._dictionaries import make

SMALL = SyntheticModelConfig(
    num_features=12, hidden_dim=16, firing_probability=ConstantFiringProbabilityConfig(0.1), std_firing_magnitudes=0.1
)
FAST = {"n_activations": 400, "n_judged": 400, "min_positives": 5, "n_bootstrap": 50}


def oracle(x, k, seed):
    """The true features of the model that is being drawn, which only a test can know."""
    units = oracle.directions / oracle.directions.norm(dim=1, keepdim=True)
    return ExemplarPartition.from_regions(units, units, torch.zeros(16), 1.0)


@pytest.fixture
def seen(monkeypatch):
    """Lets ``oracle`` know the features."""
    original = synthetic._Drawn.judge

    class Watched(synthetic._Drawn):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            oracle.directions = self.directions

    monkeypatch.setattr(synthetic, "_Drawn", Watched)
    assert Watched.judge is original


@pytest.fixture(scope="module")
def found():
    return evaluate_on_synthetic(SMALL, ("EP",), n_seeds=6, **FAST)


def values(evidence, metric, method):
    table = evidence.summary().set_index(["metric", "method"])["estimate"]
    return float(table[metric, method])


def test_planted_features_are_recovered_and_random_directions_are_not(seen):
    found = evaluate_on_synthetic(SMALL, (), others={"oracle": oracle}, n_seeds=6, **FAST)
    assert values(found, "mcc", "oracle") == pytest.approx(1, abs=1e-5)
    assert values(found, "matched_cosine", "oracle") == pytest.approx(1, abs=1e-5)
    assert values(found, "probe_auroc", "oracle") > 0.97
    assert values(found, "mcc", "Gaussian directions") < 0.6
    assert values(found, "probe_auroc", "Gaussian directions") < values(found, "probe_auroc", "oracle")
    table = found.comparisons().set_index("other")
    assert table.loc["Gaussian directions", "difference"] > 0.3 and (table["n_units"] == 6).all()
    assert table.loc["Gaussian directions", "p"] == pytest.approx(2**-5)


@pytest.mark.slow
def test_recovery_is_saelens_own(found, monkeypatch):
    made = {}
    original = synthetic._Drawn.judge
    monkeypatch.setattr(
        synthetic._Drawn, "judge", lambda self, sae: made.setdefault(id(self), (self, sae)) and original(self, sae)
    )
    again = evaluate_on_synthetic(SMALL, ("EP",), n_seeds=6, **FAST)
    cells = again.cells.query("metric == 'mcc' and method == 'EP'").set_index("seed")["value"]
    for number, (drawn, sae) in enumerate(made.values()):
        assert cells[number] == pytest.approx(mcc(sae.W_dec.detach(), drawn.directions))
        assert isinstance(drawn.model, SyntheticModel)
    pd.testing.assert_frame_equal(again.cells, found.cells)  # the same seed, the same numbers


def test_every_method_has_the_same_width_and_sees_the_same(found):
    assert list(found.kinds) == ["EP", "coreset", "Gaussian directions", "true features"]
    widths = {}

    def watched(x, k, seed):
        widths[float(x.sum())] = k
        return make("standard", "synthetic", 16, d_sae=k)

    two = evaluate_on_synthetic(SMALL, ("EP",), others={"random SAE": watched}, n_seeds=2, **FAST)
    assert len(widths) == 2 and all(k != 12 for k in widths.values())
    for method in found.kinds:  # nothing of a method depends on which others are tried
        first, second = (each[each["method"] == method].reset_index(drop=True) for each in (found.cells, two.cells))
        pd.testing.assert_frame_equal(first[first["seed"] < 2], second)


def test_probing_chooses_on_one_half_and_judges_on_the_other():
    generator = np.random.default_rng(0)
    scores = torch.from_numpy(np.round(generator.normal(size=(300, 40)), 1))
    fires = torch.from_numpy(generator.random((300, 5)) < 0.3)
    scores[:, 7] += 2 * fires[:, 2]
    found = synthetic.probe_aurocs(scores, fires, 10)
    for feature in range(5):
        truth = fires[:, feature].numpy()
        first = [roc_auc_score(truth[:150], scores[:150, column]) for column in range(40)]
        assert found[feature] == pytest.approx(roc_auc_score(truth[150:], scores[150:, int(np.argmax(first))]))
    assert found[2] > 0.85 and np.delete(found, 2).mean() == pytest.approx(0.5, abs=0.1)
    rare = fires.clone()
    rare[:150, 1], rare[5, 1] = False, True
    assert np.isnan(synthetic.probe_aurocs(scores, rare, 10)[1])


def test_cells_of_features_and_the_figures(found, tmp_path):
    own = found.cells.query("metric == 'matched_cosine' and method == 'EP' and seed == 0")
    assert own["feature"].tolist() == list(range(12)) and (own["firing_rate"] - 0.1).abs().max() < 0.08
    section = found.section()
    assert [len(figure.lines) for figure in section.figures] == [4, 4]
    for figure in section.figures:
        assert all(len(line.x) == len(line.y) >= 2 and np.isfinite(line.y).all() for line in figure.lines)
    again = Evidence.load(found.save(tmp_path))
    pd.testing.assert_frame_equal(again.summary(), found.summary())
    assert again.section().verdict == found.verdict() and again.settings["config"]["num_features"] == 12


def test_a_method_that_fails_loses_nothing_else():
    def fails(x, k, seed):
        raise RuntimeError("no memory")

    found = evaluate_on_synthetic(SMALL, ("EP",), others={"mine": fails}, n_seeds=2, **FAST)
    assert [str(failure) for failure in found.failures] == ["mine on seed 0: no memory", "mine on seed 1: no memory"]
    assert set(found.summary()["method"]) == set(found.kinds) - {"mine"}
    assert "Too few seeds" in found.verdict()


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    evaluate_on_synthetic(SMALL, ("EP",), n_seeds=1, **FAST)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.slow
def test_the_default_methods_on_the_default_model():
    found = evaluate_on_synthetic(n_seeds=2, n_activations=3000, n_judged=1500, n_bootstrap=50)
    assert not found.failures and {"EP", "SNMF", "SAE"} < set(found.summary()["method"])
    for method in ("EP", "SNMF", "SAE"):
        assert values(found, "probe_auroc", method) > values(found, "probe_auroc", "coreset") - 0.1
    assert values(found, "mcc", "true features") > values(found, "mcc", "SAE") > 0.3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": ("EPs",)}, "methods must be one of 'EP', 'SNMF', 'SAE', got 'EPs'"),
        ({"methods": ()}, "methods and others are empty"),
        ({"others": {"coreset": oracle}}, "others has the name 'coreset'"),
        ({"n_seeds": 0}, "n_seeds must be a whole number of at least 1, got 0"),
        ({"n_judged": 10, "min_positives": 5}, r"n_judged must be at least 4 \* min_positives = 20, got 10"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_on_synthetic(SMALL, **options)
