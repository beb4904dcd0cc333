"""Labels out of the contexts themselves: class-based TF-IDF over tokens and words, with each latent as a class.

Symbols
    e     an example, of weight w_e: its activation over the sum of those of its latent
    t     a term: the token of an activation, or a word of its context that is no stop word
    p_ct  sum of w_e over the examples of latent c that have t, in [0, 1]
    b_t   fraction of random activations that have t
    f_t   sum of p_ct over the latents and the random activations, which are a class of their own
    A     mean over classes of their sum of p_ct over terms
    s_ct  = p_ct log(1 + A / f_t), by which terms are chosen
    l_ct  = log(p_ct / b_t) with half a count added to either, by which a label scores an activation
"""

import re
from collections.abc import Iterable

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.preprocessing import MultiLabelBinarizer, normalize

from saelens_ext.analysis.labels_examples import ExampleRows, Made, Split, bare, one_line

N_TOKENS, N_WORDS = 3, 4
MIN_FRACTION = 0.25
"""p_ct of a term at least: what only a few of the examples have describes none of the others."""
MIN_LIFT = 2.0
"""p_ct / b_t at least: what every second text has tells nothing."""

_WORD = re.compile(r"\w\w+")


class ContextLabels(Made):
    """The labels of all latents, made from the examples that ``splits`` name, and how well each fits an activation.

    With ``is_region`` the values are cosine distances, smaller ones stronger.
    """

    name = "contexts"

    def __init__(self, rows: ExampleRows, splits: list[Split], is_region: bool):
        self._rows = rows
        making = [split.making for split in splits]
        self._tokens, tokens = _binary([bare(rows.token(row))] for row in range(len(rows.contexts)))
        texts = (rows.text(row).lower() for row in range(len(rows.contexts)))
        self._words, words = _binary(set(_WORD.findall(text)) - ENGLISH_STOP_WORDS for text in texts)
        weights = _weights(rows, [*making, rows.making_pool], is_region)
        parts = [
            _choose(matrix, terms, weights, [*map(len, making)], rows.making_pool, n)
            for matrix, terms, n in ((self._tokens, tokens, N_TOKENS), (self._words, words, N_WORDS))
        ]
        self._matrix = csr_matrix(hstack([self._tokens, self._words]))
        self._scores = csr_matrix(hstack([part[1] for part in parts]))
        self.texts = [_joined(*pair) for pair in zip(*(part[0] for part in parts))]

    def scores(self, latent: int, rows: np.ndarray) -> np.ndarray:
        """The sum of l_ct over the terms of a latent's label that each row has: ``(len(rows),)``."""
        return (self._matrix[rows] @ self._scores[latent].T).toarray().reshape(-1)


def _binary(sets: Iterable[Iterable[str]]) -> tuple[csr_matrix, list[str]]:
    """Which of all terms each row has: ``(m, terms)``."""
    binarizer = MultiLabelBinarizer(sparse_output=True)
    return csr_matrix(binarizer.fit_transform(list(sets)), dtype=np.float64), list(binarizer.classes_)


def _weights(rows: ExampleRows, classes: list[np.ndarray], is_region: bool) -> csr_matrix:
    """The weight of every row in every class, ``(classes, m)``; the last class is that of random activations."""
    strength = np.clip(1 - rows.values if is_region else rows.values, 0, None)
    values = [strength[members] for members in classes[:-1]] + [np.ones(len(classes[-1]))]
    # None is 0, so that what counts examples has entries in the same places as what weighs them.
    values = [np.maximum(part, 1e-6 * part.max()) if part.any() else np.ones(len(part)) for part in values]
    ends = np.cumsum([0, *map(len, classes)])
    shape = len(classes), len(rows.contexts)
    matrix = csr_matrix((np.concatenate(values), np.concatenate(classes), ends), shape=shape)
    return csr_matrix(normalize(matrix, norm="l1"))


def _choose(
    matrix: csr_matrix, terms: list[str], weights: csr_matrix, sizes: list[int], pool: np.ndarray, n: int
) -> tuple[list[list[str]], csr_matrix]:
    """The terms of every label, at most ``n``, the best first, and their l_ct ``(k, terms)``."""
    p = csr_matrix(weights @ matrix)
    ones = csr_matrix((np.ones_like(weights.data), weights.indices, weights.indptr), shape=weights.shape)
    having = csr_matrix(ones @ matrix)  # how many examples have a term
    background = (np.asarray(matrix[pool].sum(axis=0)).reshape(-1) + 0.5) / (len(pool) + 1)
    idf = np.log1p(p.sum(axis=1).mean() / np.maximum(np.asarray(p.sum(axis=0)).reshape(-1), 1e-12))
    chosen: list[list[str]] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for latent, size in enumerate(sizes):
        part = slice(p.indptr[latent], p.indptr[latent + 1])
        here, fraction = p.indices[part], p.data[part]
        good = (having.data[part] >= min(2, size)) & (fraction >= MIN_FRACTION)
        good &= fraction / background[here] >= MIN_LIFT
        best = np.argsort(-1 * fraction * idf[here], kind="stable")
        best = best[good[best]][:n]
        chosen.append([terms[column] for column in here[best]])
        columns.append(here[best])
        values.append(np.log((size * fraction[best] + 0.5) / (size + 1) / background[here[best]]).clip(0))
    ends = np.cumsum([0, *map(len, columns)])
    shape = len(sizes), len(terms)
    return chosen, csr_matrix((np.concatenate(values), np.concatenate(columns), ends), shape=shape)


def _joined(tokens: list[str], words: list[str]) -> str:
    """A label: tokens, and after an ellipsis the words around them that say more than they."""
    bare = {token.lower() for token in tokens}
    parts = [" / ".join(tokens), ", ".join(word for word in words if word not in bare)]
    return one_line(" … ".join(parts) if parts[1] else parts[0])
