"""Choosing a score on some sentences and judging it on others."""

import json

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.concepts.comparison import compare_detection
from saelens_ext.concepts.detection import concept_scores
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.diff_means import diff_means, split_sentences
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


def test_the_choice_is_a_column_and_a_direction_to_steer_along(tiny_bridge):
    detector = directions(12)
    row, means = compare_detection(tiny_bridge, {"random": detector}, UP, DOWN, diff_means_at=HOOK).rows
    assert row.chosen == detector.names[row.column] and torch.equal(row.direction, detector.directions[row.column])
    (first_up, _), (first_down, _) = (split_sentences(s) for s in (UP, DOWN))
    expected = diff_means(tiny_bridge, HOOK, first_up, first_down).direction
    assert means.column == 0 and means.hook_name == HOOK and torch.allclose(means.direction, expected, atol=1e-6)
    sae = StandardSAE(StandardSAEConfig(d_in=models_zoo.D_MODEL, d_sae=5, metadata=SAEMetadata(hook_name=HOOK)))
    codes = Detector.from_dictionary(sae, similarity="code")
    compared = compare_detection(tiny_bridge, {"random": detector, "codes": codes}, UP, DOWN)
    assert compared.rows[1].direction is None and 0 <= compared.rows[1].column < 5
    assert "direction" not in compared.to_dataframe() and "direction" not in compared.to_dict()["rows"][0]
    assert list(compared.to_dataframe()["column"]) == [row["column"] for row in compared.to_dict()["rows"]]


def test_the_model_reads_each_sentence_once_whatever_the_number_of_methods(tiny_bridge):
    def tokens_read(detectors, **options):
        n = []
        with tiny_bridge.hooks(fwd_hooks=[("embed.hook_out", lambda x, hook: n.append(x.shape[:2].numel()))]):
            compare_detection(tiny_bridge, detectors, UP, DOWN, **options)
        return sum(n)

    neurons = Detector.from_directions(torch.eye(models_zoo.D_MLP["llama"])[:3], "blocks.2.mlp.hook_post")
    one = tokens_read({"a": directions(3)})
    longest = max(len(tiny_bridge.to_tokens(s)[0]) for s in UP + DOWN)
    assert 0 < one <= longest * len(UP + DOWN)
    assert tokens_read({"a": directions(3), "b": directions(4), "c": neurons}, diff_means_at=HOOK) == one
    assert tokens_read({}, diff_means_at="blocks.2.hook_resid_post") == one


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_sentences_are_compared_by_another_pooling(tiny_bridge, pooling):
    (row,) = compare_detection(tiny_bridge, {"random": directions(12)}, UP, DOWN, pooling=pooling).rows
    (up, other_up), (down, other_down) = (split_sentences(s) for s in (UP, DOWN))
    chosen, judged = (
        concept_scores(tiny_bridge, directions(12), *part, pooling=pooling)
        for part in ((up, down), (other_up, other_down))
    )
    assert row.chosen_auroc == chosen.auroc[row.column] == chosen.auroc.max()
    assert row.d_prime == judged.d_prime[row.column]


def test_what_is_refused(tiny_bridge):
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_detection(tiny_bridge, {}, UP, DOWN)
    with pytest.raises(ValueError, match="give your detector another one"):
        compare_detection(tiny_bridge, {"difference of means": directions(2)}, UP, DOWN, diff_means_at=HOOK)
    with pytest.raises(ValueError, match="at least 2 different"):
        compare_detection(tiny_bridge, {"random": directions(2)}, UP[:1], DOWN)
