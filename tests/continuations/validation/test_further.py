"""Further controls: tight clusters of one view with the sizes asked for, groups by length, the most active latents."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from saelens_ext.continuations.validation.further import LEFT_OUT, coherent_clusters, further_partitions
from saelens_ext.continuations.validation.methods import EXTRA, METHODS
from saelens_ext.continuations.validation.options import ValidationOptions
from saelens_ext.continuations.validation.validate import validate_clusters
from tests.continuations.validation.test_validate import SMALL, dictionaries, model, planted  # noqa: F401
from tests.evals.continuation_sets import planted_set


def test_where_views_agree_tight_clusters_of_one_are_the_joint_ones():
    labels = np.repeat([0, 1, 2], [10, 7, 5])
    agreeing = planted_set(0, labels, labels, noise=0.0)
    found = further_partitions(agreeing, labels, ("coherent_attribution", "coherent_semantic"), 0)
    assert list(found) == ["coherent_attribution", "coherent_semantic"]
    assert all(adjusted_rand_score(labels, one) == 1 and one.min() == 0 for one in found.values())
    noisy = further_partitions(planted_set(0, labels, labels), labels, ("coherent_semantic",), 0)["coherent_semantic"]
    taken = noisy[noisy != LEFT_OUT]
    assert len(set(taken)) == 3 and all(len(set(labels[noisy == k])) == 1 for k in set(taken))


@pytest.mark.parametrize("seed", [3, 4, 5, 7])  # with no candidate of one row
def test_the_choice_among_candidates_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    rows, labels = rng.normal(size=(30, 3)), np.repeat([0, 1, 2], [14, 9, 7])
    candidates = KMeans(6, n_init=10, random_state=0).fit_predict(rows, sample_weight=np.ones(30))
    whole = ((rows - rows.mean(axis=0)) ** 2).sum(axis=1).mean()

    def cost(candidate, size):
        own = rows[candidates == candidate]
        spread = ((own - own.mean(axis=0)) ** 2).sum(axis=1).mean() / whole
        return abs(np.log(len(own) / size)) + spread

    best = min(permutations(range(6), 3), key=lambda taken: sum(map(cost, taken, (14, 9, 7))))
    assert np.bincount(candidates).min() > 1
    found = coherent_clusters(rows, labels)
    # Which of them goes to which cluster can make no difference.
    taken = {frozenset(np.flatnonzero(found == number)) for number in range(3)}
    assert taken == {frozenset(np.flatnonzero(candidates == candidate)) for candidate in best}


def test_a_single_row_is_taken_last():
    rows = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2], [100.0]])
    found = coherent_clusters(rows, np.array([0, 0, 0, 1, 1, 1, 1]))
    assert found[-1] == LEFT_OUT and set(found[:-1]) >= {0, 1}


def test_steering_by_the_further_controls(model, dictionaries):  # noqa: F811
    given, labels = planted(model, dictionaries)
    tested = validate_clusters(model, dictionaries, given, labels, replace(SMALL, controls=EXTRA))
    plain = validate_clusters(model, dictionaries, given, labels, SMALL)
    # The others are what they are without.
    shared = tested.members[tested.members["method"].isin(METHODS)].reset_index(drop=True)
    key = ["method", "row", "strength", "measure"]
    np.testing.assert_allclose(
        shared.set_index(key)["change"].sort_index(), plain.members.set_index(key)["change"].sort_index(), atol=2e-5
    )
    assert set(tested.summary()["control"]) == {*METHODS, *EXTRA, "nothing"} - {"joint"}
    members = tested.members[tested.members["measure"] == "demeaned_logit"]
    left_out = members[(members["method"] == "coherent_semantic") & (members["cluster"] == LEFT_OUT)]
    assert left_out["change"].isna().all()
    # All members of a mode have one signature, so a tight group by mechanism has its direction.
    wide = members[members["strength"] == 0.03].pivot(index="row", columns="method", values="change")
    assert (wide["coherent_attribution"] - wide["joint"]).dropna().abs().max() < 2e-5
    assert set(members.loc[members["method"] == "length", "cluster"]) == {0}  # of one token each
    by_method = {name: part.set_index("cluster") for name, part in tested.directions.groupby("method")}
    activations = np.array(given.sources.activations) * [kind == "latent" for kind in given.sources.kinds]
    for cluster, own in by_method["joint"].iterrows():
        weights = given.signatures[own["row"]].numpy()
        active = by_method["top_activation"].loc[cluster]
        strongest = np.argsort(-np.abs(activations) * (weights != 0), kind="stable")[: SMALL.top]
        assert active["columns"] == strongest.tolist()
        assert active["signs"] == np.sign(weights[strongest]).astype(int).tolist()


def test_names_of_controls_are_checked():
    with pytest.raises(ValueError, match="controls must be one of .* got 'lengths'. Did you mean 'length'"):
        ValidationOptions(controls=("lengths",))
    with pytest.raises(ValueError, match="controls must name each control once"):
        ValidationOptions(controls=("length", "length"))
