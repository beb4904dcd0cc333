"""Steering along the clusters of many prefixes: planted directions, made-up slopes, matched lengths, fresh draws."""

from dataclasses import replace

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.audit_stages.questions import Question
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer
from saelens_ext.continuations.subject import Subject
from saelens_ext.continuations.validation.methods import EXTRA, METHODS
from saelens_ext.continuations.validation.results import Validation
from saelens_ext.evals.continuations import cluster_cells
from saelens_ext.evals.continuations.cluster_cells import agreement, fit, matched_by_length
from saelens_ext.evals.continuations.clusters import ClusterEvidence, evaluate_clusters
from saelens_ext.evals.evidence import Evidence
from saelens_ext.host.sentence_model import packaged_sentence_model
from saelens_ext.report.evidence_report import write_evidence_report
from tests.continuations._dictionaries import make
from tests.continuations.static_embedder import UNSEEN, static_embedder
from tests.continuations.validation.test_validate import dictionaries, model, planted  # noqa: F401
from tests.evals.continuation_sets import two_view_set
from tests.models_zoo import make_model

PREFIXES = ["The assert statement", "A test", "An object is", "Names of it", "If a class", "One more"]
CONFIG = AuditConfig(n=24, min_cluster_size=4, strengths=(-0.03, 0.03), top=6, max_rows=8)
OPTIONS = {"cells": ((2.0, 0.1),), "audit": CONFIG, "n_bootstrap": 200, "n_permutations": 2000}


@pytest.fixture(scope="module")
def steered(model, dictionaries, tmp_path_factory):  # noqa: F811
    """Three clusters of one token each, whose meanings are planted across them, on six prefixes; and its folder."""
    asked, folder = [], tmp_path_factory.mktemp("clusters")

    def rows(subject, question, config, stages):
        asked.append(question.words)
        found, _ = planted(model, dictionaries, question.words, seed=len(asked))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_cells, "attributed", rows)
        found = evaluate_clusters(model, PREFIXES, dictionaries, folder=folder, **OPTIONS)
        again = evaluate_clusters(model, PREFIXES, dictionaries, folder=folder, **OPTIONS)
        assert asked == PREFIXES  # the second call reads what is there
        pd.testing.assert_frame_equal(again.cells, found.cells, check_exact=True)
        # What is kept of a prefix does not depend on which others there are, nor on their order.
        wider = evaluate_clusters(model, ["In front", *PREFIXES[::-1]], dictionaries, folder=folder, **OPTIONS)
        assert asked == [*PREFIXES, "In front"]
        for prefix, values in found.cells.groupby("prefix"):
            own = wider.cells[wider.cells["prefix"] == prefix]
            pd.testing.assert_frame_equal(own.reset_index(drop=True), values.reset_index(drop=True), check_exact=True)
        assert len(wider.cells) > len(found.cells) and wider.settings["n_prefixes"] == 7
        for path in folder.glob("prefix *.json"):
            path.unlink()
        evaluate_clusters(model, PREFIXES, dictionaries, folder=folder, **OPTIONS)
        assert asked[7:] == PREFIXES
        with pytest.raises(ValueError, match="differs in cells"):
            evaluate_clusters(model, PREFIXES, dictionaries, folder=folder, **OPTIONS | {"cells": ((1.0, 0.1),)})
    return found


@pytest.mark.slow
def test_planted_directions_move_more_than_what_does_not_know_them(steered, tmp_path):
    assert set(steered.kinds) == {*METHODS, *EXTRA, "nothing"}
    table = steered.comparisons().set_index("other")
    for control in ("nothing", "semantic", "random_partition", "wrong_cluster", "random_features"):
        assert table.loc[control, "low"] > 0 and table.loc[control, "p"] == 2 / 2**6
    for control in ("attribution", "single_member", "coherent_attribution"):  # all members of a mode are alike
        assert abs(table.loc[control, "difference"]) < 1e-4
    wins = steered.wins().set_index("other")
    assert wins.loc["semantic", "estimate"] == 1 and wins.loc["nothing", "low"] == pytest.approx(0.610, abs=1e-3)
    assert steered.verdict().startswith("Too few prefixes for any claim: with 6 of them and 12 comparisons")
    assert "is needed" not in steered.verdict()
    assert (steered.by_cell().set_index("method").loc["joint", "own_is_largest"]) == 1
    # All are of one token, so each is matched, and by length they are one group.
    counts = steered.by_cell().set_index("method")["n_clusters"]
    assert counts["length"] == 1 and counts["joint"] == counts["semantic"] == counts["coherent_semantic"] == 3
    assert "(length in 6 of 6 prefixes), its direction is that of all" in steered.verdict()
    cells = steered.cells.set_index(["prefix", "row", "method", "metric"])["value"].unstack("metric")
    cells = cells[cells["slope"].notna()]
    assert (cells["slope"] == cells["matched_slope"]).all() and len(cells) > 6 * 8 * 10
    read = Evidence.load(steered.save(tmp_path / "saved"))
    assert isinstance(read, ClusterEvidence) and read.verdict() == steered.verdict()
    page = write_evidence_report(tmp_path / "page.html", [steered.section()]).read_text()
    assert "Comparisons at matched lengths" in page and "most active latents" in page


def made(n_prefixes, gains, *, seed=0, more=()):
    """Evidence of made-up slopes of 10 continuations a prefix: what a control lacks of the joint ones' by its name."""
    rng, cells = np.random.default_rng(seed), []
    for number in range(n_prefixes):
        where = {"prefix": f"p{number}", "beta": 1.0, "gamma": 0.5, "direction": "medoid", "sign": "all"}
        for row in range(10):
            own = 1.0 + row + 0.1 * rng.normal()
            values = {"joint": own, **{name: own - gain - 0.1 * rng.normal() for name, gain in gains.items()}}
            if "coherent_semantic" in values and row > 4:
                del values["coherent_semantic"]
            cells += [where | {"row": row, "method": m, "metric": "slope", "value": v} for m, v in values.items()]
            matched = {m: values[m] for m in ("joint", "nothing") if m in values and row % 2}
            cells += [
                where | {"row": row, "method": m, "metric": "matched_slope", "value": v} for m, v in matched.items()
            ]
        cells += [where | {"row": -1, "method": "joint", "metric": m, "value": v + 0.01 * number} for m, v in more]
    kinds = {name: "unsupervised" if name == "joint" else "control" for name in ("joint", *gains)}
    return ClusterEvidence(cells=pd.DataFrame(cells), kinds=kinds, settings={"controls": ["coherent_semantic"]})


SIMPLER = ("semantic", "attribution", "random_partition", "global", "single_member", "coherent_semantic")


def test_a_cell_counts_every_prefix_once():
    found = made(8, {"nothing": 0.0})
    cells = found.cells[(found.cells["prefix"] != "p0") | (found.cells["row"] < 2)]
    own = cells[(cells["method"] == "joint") & (cells["metric"] == "slope")]
    row = replace(found, cells=cells).by_cell().set_index("method").loc["joint"]
    by_prefix = [np.mean([one.value for one in own.itertuples() if one.prefix == f"p{number}"]) for number in range(8)]
    assert row["slope"] == pytest.approx(np.mean(by_prefix)) != pytest.approx(own["value"].mean())


def test_what_a_control_has_no_direction_for_is_left_out_of_both():
    """The tight groups have the first five continuations alone, whose slopes are lower by themselves."""
    found = made(8, {"nothing": 5.5, "coherent_semantic": 0.5})
    table = found.comparisons().set_index("other")
    assert table.loc["coherent_semantic", "difference"] == pytest.approx(0.5, abs=0.05)
    means = found.per_unit().mean()
    assert means["joint"] - means["coherent_semantic"] == pytest.approx(3.0, abs=0.05)
    assert found.wins().set_index("other").loc["coherent_semantic", "estimate"] == 1


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (0.5, "The joint clustering is needed: every simpler way to choose directions moves them less."),
        (0.0, "The joint clustering is not shown to be needed: not detectably better than modes by meaning alone, "),
        (
            -0.5,
            "The joint clustering is not shown to be needed: worse than modes by meaning alone, modes by mechanism ",
        ),
    ],
)
def test_the_verdict_goes_either_way(gain, words):
    found = made(12, {"nothing": 5.5, **dict.fromkeys(SIMPLER, gain)}, more=[("fresh_ari", 0.3)])
    said = found.claim()
    assert words in said and "Over 12 prefixs" not in said
    assert "on fresh draws, with the clusters that these make by themselves: 0.35 (95%" in said
    assert ("is above" in said) and (("is below" in said) == (gain < 0))
    assert "matched by length, in logits" in said


@pytest.mark.slow
def test_a_control_that_is_one_group_is_said_to_be():
    found = made(12, {"nothing": 5.5, **dict.fromkeys((*SIMPLER, "length"), 0.0)})
    assert "one group" not in found.verdict()
    where = {"beta": 1.0, "gamma": 0.5, "direction": "medoid", "sign": "all", "row": -1, "metric": "n_clusters"}
    sizes = [
        where | {"prefix": f"p{number}", "method": method, "value": 1.0 + number % 4 * (method == "joint")}
        for number in range(12)
        for method in ("joint", "length")
    ]
    found = replace(found, cells=pd.concat([found.cells, pd.DataFrame(sizes)], ignore_index=True))
    assert "Where a control is one group (length in 9 of 9 prefixes), its direction is that of all" in found.verdict()
    assert found.comparisons().set_index("other")["note"]["length"] == "length is one cluster in 9 of 9 prefixes"
    assert found.wins().set_index("other")["note"]["global"] == ""


def test_too_few_prefixes_leave_the_joint_clustering_undecided():
    said = made(8, {"nothing": 5.5, **dict.fromkeys(SIMPLER, 0.5)}).verdict()
    assert "Too few" in said and "The joint clustering" not in said


def test_matching_by_length_pairs_as_many_as_can_be():
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels, lengths = rng.integers(3, size=25), rng.integers(1, 4, size=25)
        found = matched_by_length(labels, lengths, seed=1)
        for length in set(lengths):
            counts = np.bincount(labels[lengths == length], minlength=3)
            taken = np.bincount(labels[found & (lengths == length)], minlength=3)
            assert taken.sum() == 2 * min(counts.sum() // 2, counts.sum() - counts.max())
            assert (taken <= counts).all() and taken.max() <= taken.sum() - taken.max()
    assert not matched_by_length(np.array([0, 0, 1]), np.array([3, 3, 4])).any()


def made_up_test(rows, *, slopes, change=(), cells=()):
    """A test by steering at -1 and 1 whose effects are those of given slopes, by method, row and measure."""
    joint = np.arange(len(rows)) % 2
    members = [
        ("p", method, row, 7, int(joint[row]), strength, measure, strength * slope)
        for (method, row, measure), slope in slopes.items()
        for strength in (-1.0, 0.0, 1.0)
    ]
    keys = ["prefix", "method", "row", "cluster", "joint_cluster", "strength", "measure", "change"]
    matrix = [("p", "demeaned_logit", d, c, value, 2) for d, row in enumerate(cells) for c, value in enumerate(row)]
    return Validation(
        members=pd.DataFrame(members, columns=keys),
        cells=pd.DataFrame(matrix, columns=["prefix", "measure", "direction", "cluster", "change", "n_members"]),
        directions=pd.DataFrame(
            {"method": ["joint"] * 3 + ["length"] * 2 + ["wrong_cluster"], "cluster": [0, 1, 2, 0, 1, 0]}
        ),
        generations=pd.DataFrame(change, columns=["method", "cluster", "share", "unsteered"]),
        settings={"specificity_strength": 1.0},
    )


def test_slopes_of_members_and_of_those_with_a_partner_as_long():
    """Rows 2, 3 and 5 are measured; 2 and 3, of different clusters, are the only two of one length."""
    rows = two_view_set(3).select(range(6))
    rows = replace(rows, lengths=torch.tensor([4, 1, 4, 4, 4, 2]))
    slopes = {
        (method, row, measure): row + 10 * (method == "length") + 100 * (measure == "mean_log_prob")
        for method in ("joint", "length")
        for row in (2, 3, 5)
        for measure in ("demeaned_logit", "mean_log_prob", "log_prob")
    }
    found = cluster_cells._of_members(made_up_test(rows, slopes=slopes), rows, 0)
    values = {(one["method"], one["row"], one["metric"]): one["value"] for one in found}
    expected = {}
    for row in (2, 3, 5):
        for method, slope in (("joint", row), ("length", row + 10)):
            expected |= {(method, row, "slope"): slope, (method, row, "log_prob_slope"): slope + 100}
        expected |= {("nothing", row, metric): 0 for metric in ("slope", "log_prob_slope")}
    matched = {(method, row, "matched_slope"): value for (method, row, m), value in expected.items() if m == "slope"}
    expected |= {key: value for key, value in matched.items() if key[1] != 5}
    assert len(found) == len(values) and values == pytest.approx(expected)


def test_values_of_a_whole_prefix():
    """Of two clusters one is moved most by its own direction; both directions move the first most."""
    rows = two_view_set(3).select(range(6))
    change = [("joint", 0, 0.5, 0.25), ("joint", 1, 0.5, 0.0), ("length", 0, 0.0, 0.25)]
    slopes = {("joint", 2, "demeaned_logit"): 1.0}
    cells = [(3.0, 2.0), (4.0, 1.0)]
    tested = made_up_test(rows, slopes=slopes, change=change, cells=cells)
    tested = replace(tested, cells=tested.cells.assign(change=[3.0, 0.0, 4.0, 1.0]))
    found = {
        (one["method"], one["metric"]): one["value"] for one in cluster_cells._of_prefix(tested, {"n_clusters": 4.0})
    }
    assert found == {
        ("joint", "n_clusters"): 4.0, ("length", "n_clusters"): 2.0, ("joint", "own_is_largest"): 0.5,
        ("joint", "generation_change"): 0.375, ("length", "generation_change"): -0.25,
        ("nothing", "generation_change"): 0.0,
    }  # fmt: skip
    tested = replace(tested, cells=tested.cells.assign(change=[3.0, 4.0, 1.0, 5.0]))
    found = cluster_cells._of_prefix(tested, {"n_clusters": 4.0})
    assert {one["value"] for one in found if one["metric"] == "own_is_largest"} == {1.0}


def test_fresh_draws_are_others_and_have_the_same_sources(monkeypatch):
    rows = two_view_set(3, lengths=np.full(48, 3))
    rows = replace(rows, token_ids=torch.arange(len(rows))[:, None].expand(rows.token_ids.shape).clone())
    other = replace(rows, token_ids=rows.token_ids + 40)  # the first eight are among the first draws
    asked = []

    def sampled(subject, question, config, *, n, seed, progress=False):
        asked.append((n, seed))
        return other.select(range(n))

    def attribute(_, saes, continuations, **options):
        asked.append(options["sources"])
        signatures = continuations.signatures.clone()
        signatures[0] = 0  # which nothing of the prefix is said to have caused
        return continuations.with_signatures(signatures)

    monkeypatch.setattr(cluster_cells, "sampled", sampled)
    monkeypatch.setattr(cluster_cells, "embed_visible", lambda rows, embedder, mode: rows)
    monkeypatch.setattr(cluster_cells, "attribute_continuations", attribute)
    plan = cluster_cells.ClusterPlan(
        cells=(), directions=(), signs=(), generate=0, controls=(), second_embedder=None, fresh_draws=24,
        audit=AuditConfig(seed=5),
    )  # fmt: skip
    subject = Subject(model=make_model("llama", "SAETransformerBridge"), saes=[], embedder=None)
    question = Question(prompt=rows.prompt)
    fresh = cluster_cells._fresh(subject, question, rows, plan)
    # The first draws have the seed itself, and open-ended samples the next.
    assert asked == [(24, 7), rows.sources]
    assert fresh.token_ids[:, 0].tolist() == list(range(49, 64))
    with pytest.raises(ValueError, match="of 16 fresh draws fewer than 8 are new"):
        cluster_cells._fresh(subject, question, rows, replace(plan, fresh_draws=16))


@pytest.mark.slow
def test_fresh_draws_of_the_same_modes_fall_into_the_same_clusters():
    first, other = (two_view_set(3, n=n) for n in (48, 64))
    clusterer = fit(JointClusterer(2.0, 0.5, min_cluster_size=4, random_state=0), first)
    assert clusterer.n_clusters_ == 4 and agreement(clusterer, first) == 1
    noise = two_view_set(4)
    own = fit(JointClusterer(2.0, 0.5, min_cluster_size=4, random_state=0), noise).labels_
    expected = adjusted_rand_score(clusterer.predict(*noise.both_views()), own)
    assert agreement(clusterer, noise) == expected
    assert agreement(clusterer, other) <= 1


def test_a_second_embedder_sees_nothing_in_some_rows():
    rows = two_view_set(3)
    rows = replace(rows, texts=("river", *UNSEEN, *rows.texts[1 + len(UNSEEN) :]))
    audit = AuditConfig(embedding="sentence")
    plan = cluster_cells.ClusterPlan(
        cells=(), directions=(), signs=(), generate=0, controls=(), second_embedder=static_embedder(), fresh_draws=0,
        audit=audit,
    )  # fmt: skip
    embedded, seen = cluster_cells._second(rows, plan)
    assert seen.tolist() == [True, *[False] * len(UNSEEN), *[True] * (47 - len(UNSEEN))]
    assert len(embedded) == 48 - len(UNSEEN) and embedded.signatures is not None
    with pytest.raises(ValueError, match="What the second embedder sees of 'Prefix 3' has 5 continuations"):
        cluster_cells._second(rows.select(range(5 + len(UNSEEN))), plan)


@pytest.mark.slow
def test_what_each_cell_is_steered_with(monkeypatch):
    """The clusters of the second embedder are its own, and every direction and sign is tried with all controls."""
    rows, asked = two_view_set(3), []
    other = two_view_set(4).select(range(44)).with_signatures(rows.signatures[:44])
    seen = np.arange(48) < 44

    def tested(_, saes, continuations, clusterer, options, *, partitions, **more):
        asked.append((options.direction, options.sign, options.controls, partitions))
        raise ValueError("seen")

    monkeypatch.setattr(cluster_cells, "validate_clusters", tested)
    plan = cluster_cells.ClusterPlan(
        cells=(), directions=("medoid", "center"), signs=("positive", "all"), generate=0, controls=("length",),
        second_embedder=None, fresh_draws=0, audit=AuditConfig(min_cluster_size=4),
    )  # fmt: skip
    model = make_model("llama", "SAETransformerBridge")  # noqa: F811
    saes = [make("standard", "blocks.1.hook_out", model.cfg.d_model, d_sae=8)]
    subject = Subject(model=model, saes=saes, embedder=None)
    ways = [(direction, sign) for direction in plan.directions for sign in plan.signs]
    for direction, sign in ways:
        only = replace(plan, directions=(direction,), signs=(sign,))
        with pytest.raises(ValueError, match="seen"):
            cluster_cells._cell(subject, rows, (other, seen), None, 2.0, 0.5, only)
    assert [one[:3] for one in asked] == [(*way, ("length",)) for way in ways]
    clusters = fit(JointClusterer(2.0, 0.5, min_cluster_size=4, random_state=0), rows)
    own = fit(JointClusterer(2.0, 0.5, min_cluster_size=4, random_state=0), other).labels_
    partition = asked[0][3]["second_embedder"]
    assert partition[:44].tolist() == own.tolist() and set(partition[44:]) == {-1}
    assert adjusted_rand_score(own, clusters.labels_[:44]) < 0.9


@pytest.mark.slow
def test_a_second_embedder_and_fresh_draws_from_a_model():
    model = make_model("llama", "SAETransformerBridge")  # noqa: F811
    dictionary = make("standard", "blocks.1.hook_out", model.cfg.d_model, d_sae=32)
    config = AuditConfig(
        n=16, max_new_tokens=4, min_cluster_size=2, embedding="sentence", strengths=(-0.5, 0.5), max_rows=6
    )
    second = str(packaged_sentence_model())
    found = evaluate_clusters(
        model, PREFIXES, dictionary, cells=((2.0, 0.5), (2.0, 0.2)), second_embedder=second, fresh_draws=16,
        generate=2, controls=("length",), signs=("all", "positive"), audit=config, n_permutations=100,
    )  # fmt: skip
    table = found.by_cell()
    assert {"second_embedder", "length"} < set(found.kinds) and not {"top_activation"} & set(found.kinds)
    assert set(table["sign"]) == {"all", "positive"} and {"embedder_ari", "fresh_ari"} < set(table.columns)
    assert (table["embedder_ari"].dropna() == 1).all()  # the same model by its folder
    assert "generation_change" in table and table["n_clusters"].max() >= 2
    assert all("fresh" in str(one) or "one cluster" in str(one) or "latent" in str(one) for one in found.failures)


@pytest.mark.slow
def test_over_workers_it_is_the_same_to_the_bit(tmp_path):
    load = lambda: make_model("llama", "SAETransformerBridge")  # noqa: E731
    dictionary = make("standard", "blocks.1.hook_out", 32, d_sae=32)
    config = AuditConfig(n=10, max_new_tokens=3, min_cluster_size=2, strengths=(-0.5, 0.5), max_rows=4)
    options = {"cells": ((2.0, 0.2),), "controls": (), "audit": config, "n_permutations": 50, "n_bootstrap": 50}
    alone = evaluate_clusters(load, PREFIXES, dictionary, **options)
    with joblib.parallel_config(backend="sequential"):
        spread = evaluate_clusters(load, PREFIXES, dictionary, folder=tmp_path, n_workers=2, **options)
    pd.testing.assert_frame_equal(spread.cells, alone.cells, check_exact=True)
    assert spread.failures == alone.failures and len(list(tmp_path.glob("prefix *.json"))) == len(PREFIXES)
    with pytest.raises(ValueError, match="n_workers=2 needs a model for each worker"):
        evaluate_clusters(load(), PREFIXES, dictionary, n_workers=2, **options)


def no_model():
    raise AssertionError("A model was loaded before the input was checked.")


def test_bad_input():
    with pytest.raises(ValueError, match="prefixes must be of at least 6 prefixes, got 5"):
        evaluate_clusters(no_model, PREFIXES[:5], [])
    with pytest.raises(ValueError, match="'a test ' is given twice"):
        evaluate_clusters(no_model, [*PREFIXES, "a test "], [])
    with pytest.raises(ValueError, match="n=7 has 7 continuations: 3 to cluster and 4 to judge on"):
        evaluate_clusters(no_model, PREFIXES, [], audit=AuditConfig(n=7))
    for wrong, message in (
        ({"cells": ((1.0, 2.0),)}, "gamma must lie in"),
        ({"cells": ((1.0,),)}, "pairs of beta and gamma"),
        ({"cells": ((1.0, 0.5), (1, 0.5))}, "cells must be different"),
        ({"directions": ("mean",)}, "directions must be one of"),
        ({"signs": ()}, "must not be empty"),
        ({"controls": ("random",)}, "controls must be one of"),
        ({"fresh_draws": 5}, "fresh_draws must be 0, or at least 8"),
        ({"generate": -1}, "generate must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_clusters(no_model, PREFIXES, [], **wrong)
