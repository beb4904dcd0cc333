"""Supernodes: scores of role against name in closed form, planted groups, a model that copies names."""

import numpy as np
import pytest

from saelens_ext.audit.config import AuditConfig
from saelens_ext.evals.evidence import Evidence
from saelens_ext.evals.supernodes import (
    EntitySwap,
    SupernodeEvidence,
    evaluate_supernodes,
    name_spans,
    role_score,
    supernodes,
    tables,
)
from tests.continuations._dictionaries import make
from tests.evals.test_steps import copier, latents  # noqa: F401
from tests.models_zoo import make_model

RNG = np.random.default_rng(0)


def test_scores_of_role_and_name():
    e, groups = RNG.normal(size=(12, 2)), np.arange(12) % 4
    assert role_score(e, e, groups) == pytest.approx(1)
    assert role_score(e, e[:, ::-1], groups) == pytest.approx(-1)
    assert role_score(e, np.repeat(e.mean(axis=1, keepdims=True), 2, axis=1), groups) == pytest.approx(0)
    # Within a group names may trade: each latent follows its name, and the two together follow the role.
    first = np.array([[1.0, 0.0], [0.0, 0.0]])
    other = np.array([[0.0, 0.0], [1.0, 0.0]])
    assert role_score(first, other, np.array([0, 0])) == pytest.approx(1)
    assert role_score(first, other, np.array([0, 1])) == pytest.approx(0)
    assert np.isnan(role_score(np.ones((2, 2)), e[:2], np.array([0, 1])))


def test_score_is_the_nearer_of_the_two_by_squares():
    e, after, groups = RNG.normal(size=(6, 2)), RNG.normal(size=(6, 2)), np.array([0, 0, 1, 1, 2, 2])
    top = whole = 0.0
    for group in range(3):
        sums, twin = e[groups == group].sum(axis=0), after[groups == group].sum(axis=0)
        for role in (0, 1):
            top += (twin[role] - sums[1 - role]) ** 2 - (twin[role] - sums[role]) ** 2
            whole += (sums[role] - sums[1 - role]) ** 2
    assert role_score(e, after, groups) == pytest.approx(top / whole)


def test_features_that_rise_and_fall_together_are_one_supernode():
    ways = np.eye(3, 10)
    labels = np.repeat([0, 1, 2], 5)
    profiles = ways[labels] * RNG.uniform(0.1, 9, size=(15, 1)) + 1e-3 * RNG.normal(size=(15, 10))
    found = supernodes(profiles, 3)
    assert all(len(set(found[labels == k])) == 1 for k in range(3)) and len(set(found)) == 3
    assert supernodes(profiles[:1], 8).tolist() == [0]


def test_tables_hold_every_feature_of_every_prompt():
    own = {("a", 0): np.array([1.0, 0, 2]), ("a", 1): np.array([0.0, 0, 0])}
    twin = {("b", 2): np.array([0.0, 3, 3])}
    features, first, second = tables([(own, twin), (twin, own)])
    assert features == [("a", 0), ("b", 2)]
    assert first[:, :, 2].tolist() == [[2, 0], [0, 3]] and second[:, :, 1].tolist() == [[0, 0], [3, 0]]


def test_where_names_stand():
    assert name_spans([0, 5, 6, 7, 8, 9], [0, 8, 6, 7, 5, 9]) == [(1, 2), (4, 5)]
    assert name_spans([0, 5, 1, 7, 8, 2], [0, 8, 2, 7, 5, 1]) == [(1, 3), (4, 6)]
    for other, message in (
        ([0, 8, 6, 7, 5], "5 tokens instead of 6"),
        ([0, 5, 6, 7, 8, 9], "differs in 0 places"),
        ([0, 5, 7, 6, 8, 9], "differs in 1 places"),
    ):
        with pytest.raises(ValueError, match=message):
            name_spans([0, 5, 6, 7, 8, 9], other)


SWAPS = [EntitySwap(f"{start}A{middle}B:", "A", "B") for start, middle in ("Q ", "P ", "x ", "y ", "z ", "w ")]


@pytest.mark.slow
def test_latents_of_a_model_that_copies_names_follow_the_name(copier, latents):  # noqa: F811
    """Its last layer copies from A (to x) and from B (to y), wherever they stand."""
    config = AuditConfig(n=6, max_new_tokens=2, temperature=1.0, top_p=1.0)
    found = evaluate_supernodes(copier, SWAPS, latents, n_supernodes=2, n_shuffles=2, audit=config, n_permutations=200)
    assert found.per_unit()["single latents"].max() < -0.8


@pytest.mark.slow
def test_on_a_model(tmp_path):
    model = make_model("llama", "HookedSAETransformer")
    dictionary = make("standard", "blocks.1.hook_mlp_out", d_sae=24)
    config = AuditConfig(n=4, max_new_tokens=3, backend="gradient")
    found = evaluate_supernodes(
        model, SWAPS, dictionary, n_supernodes=3, n_shuffles=4, audit=config, n_permutations=200
    )
    table = found.per_unit()
    assert set(table.columns) == {"supernodes", "shuffled", "single latents", "half way"} and len(table) == 6
    assert (table["half way"] == 0).all() and found.members["supernode"].nunique() == 3
    assert "supernodes (" in found.verdict() or "Too few prompts" in found.verdict()
    read = Evidence.load(found.save(tmp_path))
    assert isinstance(read, SupernodeEvidence) and read.members.equals(found.members)
    assert found.section().tables[-1].title == "Strongest latents of each"


def test_bad_input():
    no_model = make_model("llama", "HookedSAETransformer")
    with pytest.raises(ValueError, match="swaps must be of at least 6 prefixes, got 5"):
        evaluate_supernodes(no_model, SWAPS[:5], [])
    with pytest.raises(ValueError, match="must hold 'B' once and then 'A' once; it has them 1 and 1 times"):
        EntitySwap("A and B", "B", "A").check()
    assert EntitySwap("A and B.", "A", "B").swapped == "B and A."
