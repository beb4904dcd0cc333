"""Class-based TF-IDF: the terms that the texts of a class have in common and those of other classes have not.

Symbols
    k     classes that are labelled; others only count in f_t
    e     a text of a class, of weight w_e; the weights of a class sum to 1
    t     a term
    p_ct  sum of w_e over the texts of class c that have t, in [0, 1]
    b_t   fraction of texts of no matter which class that have t, or of those of other classes
    f_t   sum of p_ct over all classes
    A     mean over classes of their sum of p_ct over terms
    s_ct  = p_ct log(1 + A / f_t), by which terms are chosen
    l_ct  = log(p_ct / b_t) with half a count added to either, by which a label scores a text
"""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.preprocessing import MultiLabelBinarizer

MIN_FRACTION = 0.25
"""p_ct of a term at least: what only a few of the texts have describes none of the others."""
MIN_LIFT = 2.0
"""p_ct / b_t at least: what every second text has tells nothing."""


def binary_terms(sets: Iterable[Iterable[str]]) -> tuple[csr_matrix, list[str]]:
    """Which of all terms each row has: ``(m, terms)``."""
    binarizer = MultiLabelBinarizer(sparse_output=True)
    return csr_matrix(binarizer.fit_transform(list(sets)), dtype=np.float64), list(binarizer.classes_)


def choose_terms(
    matrix: csr_matrix,
    terms: list[str],
    weights: csr_matrix,
    sizes: Sequence[int],
    pools: Sequence[np.ndarray],
    n: int,
) -> tuple[list[list[str]], csr_matrix]:
    """The terms of each of the first k classes, at most ``n``, the best first, and their l_ct ``(k, terms)``.

    Args:
        matrix: which of the terms each text has, ``(m, terms)``.
        terms: their names.
        weights: w_e of every text in every class, ``(classes, m)``.
        sizes: texts of each of the k classes.
        pools: for each of the k classes the texts that b_t is counted over, or one for all.
        n: terms of a class.
    """
    p = csr_matrix(weights @ matrix)
    ones = csr_matrix((np.ones_like(weights.data), weights.indices, weights.indptr), shape=weights.shape)
    having = csr_matrix(ones @ matrix)  # how many examples have a term
    backgrounds = [(np.asarray(matrix[pool].sum(axis=0)).reshape(-1) + 0.5) / (len(pool) + 1) for pool in pools]
    idf = np.log1p(p.sum(axis=1).mean() / np.maximum(np.asarray(p.sum(axis=0)).reshape(-1), 1e-12))
    chosen: list[list[str]] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for number, size in enumerate(sizes):
        background = backgrounds[number if len(backgrounds) > 1 else 0]
        part = slice(p.indptr[number], p.indptr[number + 1])
        here, fraction = p.indices[part], p.data[part]
        good = (having.data[part] >= min(2, size)) & (fraction >= MIN_FRACTION)
        good &= fraction / background[here] >= MIN_LIFT
        best = np.argsort(-1 * fraction * idf[here], kind="stable")
        best = best[good[best]][:n]
        chosen.append([terms[int(column)] for column in here[best]])
        columns.append(here[best])
        values.append(np.log((size * fraction[best] + 0.5) / (size + 1) / background[here[best]]).clip(0))
    ends = np.cumsum([0, *map(len, columns)])
    shape = len(sizes), len(terms)
    return chosen, csr_matrix((np.concatenate(values), np.concatenate(columns), ends), shape=shape)
