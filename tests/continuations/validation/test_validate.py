"""Intervention tests of clusters: are held-out members held out, are controls what they say, is the verdict right?"""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import KMeans

from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.continuations.steering.steer import steer_continuations
from saelens_ext.continuations.validation.controls import split_members
from saelens_ext.continuations.validation.methods import METHODS
from saelens_ext.continuations.validation.options import ValidationOptions
from saelens_ext.continuations.validation.results import Validation, combine_validations
from saelens_ext.continuations.validation.validate import validate_clusters
from tests.continuations._dictionaries import make
from tests.models_zoo import make_model

# Strengths are small enough that effects are nearly those that the gradient says.
SMALL = ValidationOptions(strengths=(-0.03, 0, 0.03), top=6, n_bootstrap=300, n_permutations=2000)


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "HookedSAETransformer")


@pytest.fixture(scope="module")
def dictionaries():
    return [make("standard", f"blocks.{i}.hook_mlp_out", seed=i) for i in (0, 1)]


def attributed(model, dictionaries, rows, embeddings, prefix="The assert statement"):
    found = score_continuations(model, prefix, rows)
    found = attribute_continuations(model, dictionaries, found, backend="gradient")
    return found.with_embeddings(torch.nn.functional.normalize(embeddings.float(), dim=1))


def planted(model, dictionaries, prefix="The assert statement", seed=0):
    """Three clusters of one token each, the same in every member; what they say is planted across them."""
    labels = np.repeat([0, 1, 2], 8)
    generator = torch.Generator().manual_seed(seed)
    meanings = torch.eye(3).repeat(8, 1) + 0.05 * torch.randn(24, 3, generator=generator)
    return attributed(model, dictionaries, [[(70, 150, 230)[k]] for k in labels], meanings, prefix), labels


@pytest.fixture(scope="module")
def tested(model, dictionaries):
    found, labels = planted(model, dictionaries)
    return found, labels, validate_clusters(model, dictionaries, found, labels, SMALL)


def test_a_direction_that_works_is_told_from_those_that_do_not(tested):
    _, _, validation = tested
    slopes = validation.summary()
    slopes = slopes[(slopes["measure"] == "demeaned_logit") & (slopes["statistic"] == "slope")].set_index("control")
    for control in ("nothing", "semantic", "random_partition", "global", "wrong_cluster", "random_features"):
        assert slopes.loc[control, "p_holm"] < 0.05 and slopes.loc[control, "low"] > 0, control
    # Members are alike, so that a random one, or a partition by signatures alone, gives the very same directions.
    for control in ("attribution", "single_member"):
        assert slopes.loc[control, "difference"] == 0 and slopes.loc[control, "p"] == 1
    claim = validation.claim()
    assert "joint exceeds modes by meaning alone" in claim and "joint exceeds random features" in claim
    assert "needed in part: not detectably better than modes by mechanism alone and one random member." in claim
    matrix = validation.specificity()
    assert (np.diag(matrix) > 0).all()
    summary = validation.specificity_summary().set_index("measure").loc["demeaned_logit"]
    assert summary["own"] == pytest.approx(np.diag(matrix).mean()) and summary["own"] > summary["others"]
    assert summary["own_is_largest_of_cluster"] == 1


def test_effects_are_those_of_steering_each_member_alone(model, dictionaries, tested):
    found, labels, validation = tested
    members = validation.members
    for planned in validation.directions.itertuples():
        mine = members[(members["method"] == planned.method) & (members["cluster"] == planned.cluster)]
        for row in list(mine["row"].unique())[:1]:
            weights = torch.zeros(len(found.sources))
            weights[planned.columns] = torch.tensor(planned.signs).float()
            steered = steer_continuations(
                model, dictionaries, found, weights, rows=[row], strengths=SMALL.strengths, top=SMALL.top
            )
            for measure, changes in steered.changes.items():
                got = mine[(mine["row"] == row) & (mine["measure"] == measure)].sort_values("strength")["change"]
                np.testing.assert_allclose(got, changes[:, 0], atol=2e-5)


def test_directions_come_from_members_that_are_not_measured(model, dictionaries, tested):
    found, labels, validation = tested
    measured = set(validation.members["row"])
    directions = validation.directions
    assert not measured & set(directions["row"]) and len(measured) == 12
    own = directions[directions["method"] == "joint"].set_index("cluster")
    for cluster, row in own["row"].items():
        assert labels[row] == cluster
        weights = found.signatures[row].abs()
        assert set(own.loc[cluster, "columns"]) == set(
            weights.where(torch.tensor([kind == "latent" for kind in found.sources.kinds]), torch.tensor(0.0))
            .topk(6)
            .indices.tolist()
        )
    # Whatever held-out members are replaced by, the clusters' directions stay.
    signatures, embeddings = found.signatures.clone(), found.embeddings.clone()
    generator = torch.Generator().manual_seed(9)
    rows = sorted(measured)
    signatures[rows] = 100 * torch.randn(len(rows), signatures.shape[1], generator=generator)
    embeddings[rows] = torch.nn.functional.normalize(torch.randn(len(rows), 3, generator=generator), dim=1)
    other = found.with_signatures(signatures, found.sources).with_embeddings(embeddings)
    for kind in ("medoid", "center", "contrast"):
        first, second = (
            validate_clusters(model, dictionaries, given, labels, replace(SMALL, direction=kind)).directions
            for given in (found, other)
        )
        kept = ["joint", "single_member", "wrong_cluster", "global"]
        first, second = (table[table["method"].isin(kept)].reset_index(drop=True) for table in (first, second))
        pd.testing.assert_frame_equal(first, second)
        assert kind != "center" or set(first.loc[first["method"] == "joint", "row"]) == {-1}


def test_every_method_is_what_it_says(tested):
    found, labels, validation = tested
    table = found.sources
    by_method = {name: part.set_index("cluster") for name, part in validation.directions.groupby("method")}
    assert set(by_method) == set(METHODS) == set(validation.members["method"])
    own, random, wrong = by_method["joint"], by_method["random_features"], by_method["wrong_cluster"]
    assert set(map(tuple, wrong["columns"])) == set(map(tuple, own["columns"]))
    for cluster in own.index:
        assert wrong.loc[cluster, "columns"] != own.loc[cluster, "columns"]
        assert not set(random.loc[cluster, "columns"]) & set(own.loc[cluster, "columns"])
        assert random.loc[cluster, "signs"] == own.loc[cluster, "signs"]
        taken = list(own.loc[cluster, "columns"])
        for mine, other in zip(own.loc[cluster, "columns"], random.loc[cluster, "columns"]):
            assert table.kinds[other] == "latent" and table.hooks[mine] == table.hooks[other]
            assert table.positions[mine] == table.positions[other]
            place = [
                j
                for j in range(len(table))
                if (table.kinds[j], table.hooks[j], table.positions[j])
                == ("latent", table.hooks[mine], table.positions[mine])
            ]
            free = [j for j in place if j not in taken]
            free.sort(key=lambda j: abs(np.log(table.activations[j] / table.activations[mine])))
            assert other in free[:5], "of nearly the same activation"
            taken.append(other)
    joint = validation.members[validation.members["method"] == "joint"]
    assert (joint["cluster"] == labels[joint["row"]]).all() and (joint["cluster"] == joint["joint_cluster"]).all()
    sizes = validation.members[validation.members["method"] == "global"]["cluster"].unique()
    assert list(sizes) == [0] and len(by_method["global"]) == 1


def test_results_depend_on_the_seed_alone(model, dictionaries, tested):
    found, labels, validation = tested
    again = validate_clusters(model, dictionaries, found, labels, SMALL, batch_size=5)
    pd.testing.assert_frame_equal(again.members, validation.members, atol=2e-5)
    pd.testing.assert_frame_equal(again.directions, validation.directions)
    other = validate_clusters(model, dictionaries, found, labels, replace(SMALL, seed=1))
    assert list(other.members["row"].unique()) != list(validation.members["row"].unique())


def test_splits_keep_members_of_every_cluster_on_both_sides():
    labels = np.array([0] * 10 + [1] * 2 + [2] + [3] * 5)
    split = split_members(labels, 0.5, 100, np.random.default_rng(0))
    assert sorted([*split.choosing, *split.measured]) == list(range(18))
    assert np.bincount(labels[split.measured], minlength=4).tolist() == [5, 1, 0, 2]
    few = split_members(labels, 0.5, 4, np.random.default_rng(0))
    assert np.bincount(labels[few.measured]).tolist() == [2, 1, 0, 1]
    assert set(few.measured) <= set(split.measured)
    most = split_members(labels, 0.99, 100, np.random.default_rng(0))
    assert np.bincount(labels[most.choosing]).tolist() == [1, 1, 1, 1]


def test_clusters_without_a_second_member_or_a_second_cluster_are_left_out(model, dictionaries):
    found, labels = planted(model, dictionaries)
    single = np.where(np.arange(24) == 23, 7, labels)
    validation = validate_clusters(model, dictionaries, found, single, SMALL)
    assert 7 not in set(validation.members["joint_cluster"]) and 7 in set(validation.directions["cluster"])
    one = validate_clusters(model, dictionaries, found, np.zeros(24, dtype=int), SMALL)
    wrong = one.members[one.members["method"] == "wrong_cluster"]
    assert wrong["change"].isna().all() and one.specificity().shape == (1, 1)
    row = one.summary().set_index(["measure", "statistic", "control"]).loc[("demeaned_logit", "slope", "wrong_cluster")]
    assert row["n_units"] == 0 and row["n_undefined"] == 12 and np.isnan(row["p_holm"])
    assert "another mode: not tested" in one.claim()


@pytest.mark.slow
def test_clusterers_and_further_partitions(model, dictionaries):
    found, labels = planted(model, dictionaries)
    clusterer = JointClusterer(gamma=0.1, random_state=0).fit(found.embeddings.numpy(), found.signatures.numpy())
    meanings = KMeans(3, n_init=1, random_state=0).fit(found.embeddings.numpy())
    validation = validate_clusters(model, dictionaries, found, clusterer, SMALL, partitions={"mine": labels})
    assert "mine" in set(validation.summary()["control"])
    other = validate_clusters(model, dictionaries, found, meanings, SMALL)
    joint = other.members[other.members["method"] == "joint"]
    assert (joint["cluster"] == meanings.labels_[joint["row"]]).all()


@pytest.fixture(scope="module")
def several(model, dictionaries):
    found = []
    for i, prefix in enumerate(("The assert statement", "A test", "An object is", "Names of it", "If a class")):
        given, labels = planted(model, dictionaries, prefix, seed=i)
        found.append(validate_clusters(model, dictionaries, given, labels, replace(SMALL, seed=i)))
    return found


@pytest.mark.slow
def test_several_prefixes_are_the_units_of_the_comparison(several):
    together = combine_validations(several)
    assert together.unit == "prefix" and len(together.prefixes) == 5
    key = ["measure", "statistic", "control"]
    row = together.summary().set_index(key).loc[("demeaned_logit", "slope", "semantic")]
    alone = [one.summary().set_index(key).loc[("demeaned_logit", "slope", "semantic")] for one in several]
    assert row["n_units"] == 5 and row["difference"] == pytest.approx(np.mean([one["difference"] for one in alone]))
    assert row["low"] > 0 and row["p"] == 2 / 2**5
    claim = together.claim()
    assert "With 5 prefix units no corrected p-value can fall below" in claim and "5 prefixes" in claim
    assert len(together.specificity_summary()) == 5 * 3
    assert together.specificity(prefix="A test").shape == (3, 3)
    with pytest.raises(ValueError, match="name one of"):
        together.specificity()


@pytest.mark.slow
def test_a_saved_test_is_the_same(several, tmp_path):
    together = combine_validations(several)
    again = Validation.load(together.save(tmp_path / "validation.json"))
    for name in ("members", "cells", "directions"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(together, name))
    assert again.claim("log_prob", "spearman") == together.claim("log_prob", "spearman")
    whole = json.loads((tmp_path / "validation.json").read_text())
    for name in ("members", "cells", "directions", "settings"):
        lacking = tmp_path / f"without_{name}.json"
        lacking.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        with pytest.raises(ValueError, match=f"{lacking.name} lacks {name}"):
            Validation.load(lacking)


def test_bad_input_is_named(model, dictionaries, tested, several):
    found, labels, validation = tested

    def refused(message, given=found, clusters=labels, partitions=None, **options):
        with pytest.raises(ValueError, match=message):
            validate_clusters(model, dictionaries, given, clusters, ValidationOptions(**options), partitions=partitions)

    refused("None of the 24 clusters has two members", clusters=np.arange(24))
    refused("one whole number per continuation", clusters=labels[:5])
    refused("one whole number per continuation", clusters=labels / 2)
    refused("not fitted", clusters=JointClusterer())
    refused("two strengths or more", strengths=(1,))
    refused("strengths must be one or more", strengths=())
    refused("sign must be one of", sign="both")
    refused("direction must be one of .* Did you mean 'medoid'", direction="mediod")
    refused("held_out must lie in", held_out=1.0)
    refused("max_rows must be a whole number", max_rows=0)
    refused("'global' are taken|cannot be called 'global'", partitions={"global": labels})
    refused("name no sources", given=found.with_signatures(found.signatures))
    errors = attribute_continuations(model, dictionaries, found, kinds=("error",))
    refused("No cluster's direction has a latent to scale", given=errors)
    bare = score_continuations(model, "The assert statement", [[70], [80]])
    bare = attribute_continuations(model, dictionaries, bare)
    refused("no embeddings", given=bare, clusters=np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="is there twice"):
        combine_validations([validation, validation])
    with pytest.raises(ValueError, match="validations is empty"):
        combine_validations([])
    other = replace(several[1], settings={**several[1].settings, "top": 3})
    with pytest.raises(ValueError, match="top is 6 and 3"):
        combine_validations([several[0], other])
    with pytest.raises(ValueError, match="measure must be one of"):
        validation.claim("logit")
