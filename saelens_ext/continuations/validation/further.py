"""Partitions of one view, or of the lengths, that clusters of both views are compared with where it is asked for.

Symbols
    K    clusters under test
    v_c  mean squared distance of the members of candidate c from their mean, as a fraction of that of all rows
    n_c  its members; n_j those of cluster j under test
"""

from collections.abc import Collection

import numpy as np
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment

from saelens_ext.continuations.clustering.baselines import SingleView
from saelens_ext.continuations.continuation_set import ContinuationSet

LEFT_OUT = -1
"""Label of rows that are in no cluster."""
_VIEWS = {"coherent_semantic": 0, "coherent_attribution": 1}


def further_partitions(
    continuations: ContinuationSet, labels: Int[np.ndarray, " n"], names: Collection[str], seed: int
) -> dict[str, Int[np.ndarray, " n"]]:
    """Those partitions among ``names`` for clusters under test ``labels``, rows in none of them `LEFT_OUT`.

    ``"length"`` is k-means of the number of tokens, with K clusters or as many as there are different numbers;
    ``"coherent_semantic"`` and ``"coherent_attribution"`` are :func:`coherent_clusters` of one view.
    """
    weights, views = continuations.weights.numpy(), continuations.both_views()
    found = {
        name: coherent_clusters(views[view], labels, weights=weights, seed=seed)
        for name, view in _VIEWS.items()
        if name in names
    }
    if "length" in names:
        lengths = continuations.lengths.double().numpy()[:, None]
        k = len(np.unique(labels))
        found["length"] = SingleView(lengths, sample_weight=weights, random_state=seed).with_clusters(k).labels
    return {name: found[name] for name in names if name in found}


def coherent_clusters(
    view: np.ndarray, labels: Int[np.ndarray, " n"], *, weights: np.ndarray | None = None, seed: int = 0
) -> Int[np.ndarray, " n"]:
    """The tight clusters of one view ``(n, d)`` whose sizes are those of the clusters under test.

    k-means makes 2 K candidates. Each cluster under test is given one of them, so that the sum of |log n_c / n_j| + v_c
    is least: a candidate that is e times too large or small costs as much as one that is as wide as all rows. A
    candidate of one member, whose direction could not be tried on another, is taken only if there are no others left.

    Returns:
        0 to K - 1; `LEFT_OUT` for rows of the candidates that were not taken.
    """
    sizes = np.unique(labels, return_counts=True)[1]
    rows = np.asarray(view, dtype=np.float64)
    w = np.ones(len(rows)) if weights is None else weights
    partition = SingleView(rows, sample_weight=w, random_state=seed).with_clusters(min(2 * len(sizes), len(rows)))
    members = np.bincount(partition.labels)
    spread = np.array([_spread(rows, w, partition.labels == c) for c in range(len(members))])
    whole = _spread(rows, w, np.ones(len(rows), dtype=bool))
    cost = np.abs(np.log(members[None, :] / sizes[:, None])) + spread / (whole or 1.0)
    # More than any sum of the others.
    cost += np.where(members == 1, 1 + 2 * len(sizes) * (1 + np.log(len(rows))), 0.0)
    _, taken = linear_sum_assignment(cost)
    found = np.full(len(rows), LEFT_OUT)
    for number, candidate in enumerate(taken):
        found[partition.labels == candidate] = number
    return found


def _spread(rows: np.ndarray, weights: np.ndarray, inside: np.ndarray) -> float:
    mean = np.average(rows[inside], axis=0, weights=weights[inside])
    return float(np.average(((rows[inside] - mean) ** 2).sum(axis=1), weights=weights[inside]))
