"""Supernodes: scores of role against name in closed form, planted groups, a model that copies names."""

import importlib
from dataclasses import replace
from itertools import permutations

import joblib
import numpy as np
import pytest
import torch

from saelens_ext.continuations.answers import mark_answers
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.sample import sample_continuations
from saelens_ext.continuations.samplers.sampler import Draw
from saelens_ext.continuations.source_table import SourceTable
from saelens_ext.evals.continuations.supernodes import (
    EntitySwap,
    SupernodeEvidence,
    evaluate_supernodes,
    name_spans,
    read_swaps,
    role_score,
    supernodes,
    tables,
)
from saelens_ext.evals.evidence import Evidence
from tests.continuations._dictionaries import make
from tests.evals.continuation_sets import planted_set
from tests.evals.continuations.test_steps import copier, latents  # noqa: F401
from tests.models_zoo import make_model

module = importlib.import_module("saelens_ext.evals.continuations.supernodes")
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


def test_a_feature_between_two_groups_joins_the_weaker():
    """Moving a feature costs its length, so the one that bends less of the whole is bent."""
    ways = np.array([[np.cos(a), np.sin(a)] for a in np.deg2rad([0, 40, 80])])
    for sizes, together in (([1, 9, 9], [0, 1]), ([9, 9, 1], [1, 2])):
        found = supernodes(ways * np.array(sizes)[:, None], 2)
        assert found[together[0]] == found[together[1]] and len(set(found)) == 2


def test_effects_are_weighted_means_of_the_columns_at_the_names():
    keys = [("latent", 3, 7), ("latent", 4, 7), ("latent", 5, 7), ("latent", 6, 7), ("latent", 3, 8), ("error", 3, -1)]
    kinds, positions, numbers = zip(*keys)
    m = len(keys)
    sources = SourceTable(kinds, ("a",) * m, positions, numbers, (1.0,) * m, ("t",) * m, (0,) * m)
    signatures, weights = RNG.normal(size=(4, m)), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    rows = replace(planted_set(0, np.zeros(4, int), np.zeros(4, int)), weights=weights)
    found = module._effects(rows.with_signatures(signatures, sources), [(3, 5), (6, 7)])
    mean = [sum(float(w) * row[j] for w, row in zip(weights, signatures)) for j in range(m)]
    assert set(found) == {("a", 7), ("a", 8)}
    np.testing.assert_allclose(found["a", 7], [mean[0] + mean[1], mean[3], sum(mean[:4])], rtol=1e-5)
    np.testing.assert_allclose(found["a", 8], [mean[4], 0, mean[4]], rtol=1e-5)


def test_groups_are_those_of_the_prompts_as_they_are_and_scores_those_of_loops(monkeypatch):
    """Anywhere in the prompts latents 0 to 2 rise together; at the first name, and in the twins, others do."""
    rng = np.random.default_rng(1)
    rise, other = np.eye(2, 6)[[0, 0, 0, 1, 1]], np.eye(2, 6)[[0, 1, 0, 1, 0]]
    names, twins = rng.normal(size=(5, 6, 2)), rng.normal(size=(5, 6, 2))
    names[:, :, 0] += 9 * other
    own, twin = (np.concatenate([at, anywhere[:, :, None]], axis=2) for at, anywhere in ((names, rise), (twins, other)))
    packed = {swap.prompt: number for number, swap in enumerate(SWAPS)}

    def both(subject, swap, config):
        p = packed[swap.prompt]
        return {side: [["a", f, *all_[f, p]] for f in range(5)] for side, all_ in (("own", own), ("twin", twin))}

    monkeypatch.setattr(module, "_both", both)
    model = make_model("llama", "HookedSAETransformer")
    dictionary = make("standard", "blocks.1.hook_mlp_out", d_sae=24)
    found = evaluate_supernodes(model, SWAPS, dictionary, n_supernodes=2, n_shuffles=300, n_permutations=10)
    labels = found.members["supernode"].to_numpy()
    assert found.members["latent"].tolist() == [0, 1, 2, 3, 4]
    assert labels.tolist() in ([0, 0, 0, 1, 1], [1, 1, 1, 0, 0])
    np.testing.assert_allclose(found.members["effect"], np.abs(rise).mean(axis=1))

    def score(prompt, groups):
        top = whole = 0.0
        for group in set(groups):
            inside = [f for f in range(5) if groups[f] == group]
            for role in (0, 1):
                e_role, e_name = (sum(own[f, prompt, side] for f in inside) for side in (role, 1 - role))
                half = (e_role - e_name) / 2
                top += (sum(twin[f, prompt, role] for f in inside) - (e_role + e_name) / 2) * half
                whole += half**2
        return top / whole

    table = found.per_unit()
    each = sorted(set(permutations(labels.tolist())))  # as many ways to deal out groups of these sizes
    for p, swap in enumerate(SWAPS):
        row = table.loc[swap.prompt]
        assert row["supernodes"] == pytest.approx(score(p, labels))
        assert row["single latents"] == pytest.approx(score(p, range(5)))
        shuffled = [score(p, groups) for groups in each]
        assert len(each) == 10 and row["shuffled"] == pytest.approx(
            np.mean(shuffled), abs=4 * np.std(shuffled) / 300**0.5
        )


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
def test_on_a_model(tmp_path, monkeypatch):
    model = make_model("llama", "HookedSAETransformer")
    dictionary = make("standard", "blocks.1.hook_mlp_out", d_sae=24)
    config = AuditConfig(n=4, max_new_tokens=3, backend="gradient")
    options = {"n_supernodes": 3, "n_shuffles": 4, "audit": config, "n_permutations": 200, "folder": tmp_path / "kept"}
    found = evaluate_supernodes(model, SWAPS, dictionary, **options)
    table = found.per_unit()
    assert set(table.columns) == {"supernodes", "shuffled", "single latents", "half way"} and len(table) == 6
    assert (table["half way"] == 0).all() and found.members["supernode"].nunique() == 3
    assert "supernodes (" in found.verdict() or "Too few prompts" in found.verdict()
    read = Evidence.load(found.save(tmp_path))
    assert isinstance(read, SupernodeEvidence) and read.members.equals(found.members)
    assert found.section().tables[-1].title == "Strongest latents of each"
    # What is kept of a prompt does not depend on which others there are.
    computed, attribute = [], module.attribute_continuations

    def counted(model, dictionaries, rows, **options):
        computed.append(rows.prompt)
        return attribute(model, dictionaries, rows, **options)

    monkeypatch.setattr(module, "attribute_continuations", counted)
    one_more = EntitySwap("v A then B:", "A", "B")
    wider = evaluate_supernodes(model, [one_more, *SWAPS], dictionary, **options)
    assert computed == [one_more.prompt, one_more.swapped] and wider.per_unit().shape[0] == 7
    again = evaluate_supernodes(model, SWAPS, dictionary, **options)
    assert again.cells.equals(found.cells) and again.members.equals(found.members) and len(computed) == 2
    with pytest.raises(ValueError, match="differs in audit"):
        evaluate_supernodes(model, SWAPS, dictionary, **options | {"audit": replace(config, n=5)})


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["joblib", "ray"])
def test_over_workers_it_is_the_same_to_the_bit(workers, tmp_path, request):
    config = AuditConfig(n=3, max_new_tokens=2, backend="gradient")
    options = {"n_supernodes": 2, "n_shuffles": 2, "audit": config, "n_permutations": 20, "n_bootstrap": 20}
    load = lambda: make_model("llama", "HookedSAETransformer")  # noqa: E731
    dictionary = make("standard", "blocks.1.hook_mlp_out", d_sae=24)
    swaps = [*SWAPS, EntitySwap("A A?", "A A", "?")]  # whose names are of different lengths
    alone = evaluate_supernodes(load, swaps, dictionary, **options)
    assert [failure.unit for failure in alone.failures] == ["A A?"]
    if workers == "ray":
        request.getfixturevalue("cluster")
        spread = evaluate_supernodes(load, swaps, dictionary, n_workers=2, workers=workers, **options)
    else:
        options["folder"] = tmp_path
        with joblib.parallel_config(backend="sequential"):
            spread = evaluate_supernodes(load, swaps, dictionary, n_workers=2, **options)
        assert len(list(tmp_path.glob("prompt *.json"))) == 6
    assert spread.cells.equals(alone.cells) and spread.members.equals(alone.members)
    assert spread.failures == alone.failures and spread.settings == alone.settings


class Answers:
    """A sampler of texts of which most have an answer behind a marker."""

    def describe(self):
        return {"kind": "answers"}

    def draw(self, prefix, prefix_ids, numbers, options, stop):
        words = ("is", "was", "has", "had", "can", "will", "may")
        return [Draw(text=f" so{' =' * (n % 3 > 0)} {words[n % 7]}") for n in numbers]


@pytest.mark.parametrize("sampler", [pytest.param(None, marks=pytest.mark.slow), Answers()])
def test_continuations_are_drawn_as_an_audit_draws_them(sampler, monkeypatch):
    model, seen = make_model("llama", "SAETransformerBridge"), []
    monkeypatch.setattr(module, "attribute_continuations", lambda model, saes, rows, **_: seen.append(rows) or rows)
    monkeypatch.setattr(module, "_effects", lambda rows, spans: {})
    options = {"chat_template": True, "weights": "path", "max_new_tokens": 3, "temperature": 0.7, "seed": 3}
    config = AuditConfig(n=6, answer_after="=" if sampler else "", **options)
    dictionary = make("standard", "blocks.1.hook_out", model.cfg.d_model, d_sae=24)
    with pytest.raises(ValueError, match="No latent has an effect"):
        evaluate_supernodes(model, SWAPS, dictionary, audit=config, sampler=sampler)
    assert [rows.prompt for rows in seen] == [text for swap in SWAPS for text in (swap.prompt, swap.swapped)]
    own, twin = seen[:2]
    expected = sample_continuations(model, SWAPS[0].prompt, 6, sampler=sampler, **options)
    if sampler is not None:
        expected = mark_answers(model, expected, after="=", missing="exclude")
        assert 0 < len(expected) < 6
    assert own.prefix == expected.prefix != SWAPS[0].prompt and own.texts == expected.texts
    assert torch.equal(own.weights, expected.weights) and own.answers == expected.answers
    # Behind the twin stand the same continuations, as much weighted and marked.
    assert twin.prefix == own.prefix.replace(SWAPS[0].prompt, SWAPS[0].swapped) != own.prefix
    assert torch.equal(twin.token_ids, own.token_ids) and torch.equal(twin.weights, own.weights)
    assert twin.answers == own.answers and {*twin.columns} == {*own.columns}
    assert not torch.equal(twin.log_probs, own.log_probs)


def test_bad_input():
    no_model = make_model("llama", "HookedSAETransformer")
    with pytest.raises(ValueError, match="swaps must be of at least 6 prefixes, got 5"):
        evaluate_supernodes(no_model, SWAPS[:5], [])
    with pytest.raises(ValueError, match="must hold 'B' once and then 'A' once; it has them 1 and 1 times"):
        EntitySwap("A and B", "B", "A").check()
    assert EntitySwap("A and B.", "A", "B").swapped == "B and A."


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "swaps.jsonl"
    path.write_text('{"prompt": "A and B", "first": "A", "second": "B"}\n\n')
    assert read_swaps(path) == [EntitySwap("A and B", "A", "B")]
    for line, message in (
        ('["A and B", "A", "B"]', r"Line 1 of .*: .* is an object with prompt, first, second, got \['A and B'"),
        ('{"prompt": "A", "name": "A"}', "got the keys prompt, name"),
        ('{"prompt": "A and B", "first": "A", "second": 3}', "second must be a text, got 3"),
        ("", "has no prompt; write"),
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match=message):
            read_swaps(path)
