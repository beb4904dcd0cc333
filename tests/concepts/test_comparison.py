"""Choosing a score on some sentences and judging it on others."""

import json

import pytest
import torch

from saelens_ext.concepts.comparison import compare_detection
from saelens_ext.concepts.detection import Detector, concept_scores
from saelens_ext.concepts.diff_means import split_sentences
from tests import models_zoo

HOOK = "blocks.1.hook_resid_post"
UP = [f"The cat sat on mat {n}." for n in range(8)]
DOWN = [f"def f(x): return x + {n}" for n in range(8)]


def directions(k):
    return Detector.from_directions(
        torch.randn(k, models_zoo.D_MODEL, generator=torch.Generator().manual_seed(0)), HOOK
    )


def test_the_score_is_chosen_on_one_half_and_judged_on_the_other(tiny_bridge):
    detector = directions(12)
    compared = compare_detection(
        tiny_bridge, {"random": detector}, UP, DOWN, concept="cats", diff_means_at=HOOK, seed=3
    )
    row, means = compared.rows
    (first_up, other_up), (first_down, other_down) = (split_sentences(s, seed=3) for s in (UP, DOWN))
    chosen = concept_scores(tiny_bridge, detector, first_up, first_down)
    best = detector.names.index(row.chosen)
    assert chosen.auroc[best] == chosen.auroc.max() == row.chosen_auroc and row.n_scores == 12
    judged = concept_scores(tiny_bridge, detector, other_up, other_down)
    assert (
        row.auroc == judged.auroc[best]
        and row.log_ratio == judged.log_ratio[best]
        and row.d_prime == judged.d_prime[best]
    )
    assert means.method == "difference of means" and means.n_scores == 1 and means.auroc == 1
    assert list(compared.to_dataframe()["method"]) == ["random", "difference of means"]
    assert json.loads(json.dumps(compared.to_dict(), allow_nan=False))["rows"][0]["chosen"] == row.chosen


def test_what_is_refused(tiny_bridge):
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_detection(tiny_bridge, {}, UP, DOWN)
    with pytest.raises(ValueError, match="another name"):
        compare_detection(tiny_bridge, {"difference of means": directions(2)}, UP, DOWN, diff_means_at=HOOK)
    with pytest.raises(ValueError, match="at least 2 different"):
        compare_detection(tiny_bridge, {"random": directions(2)}, UP[:1], DOWN)
