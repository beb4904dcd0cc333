"""Labels out of the contexts themselves: class-based TF-IDF over tokens and words, with each latent as a class.

The texts of a class are the examples of a latent, each weighted by its activation. Terms are the token of an
activation, and the words of its context that are no stop words. Random activations are a class of their own.
"""

import re

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.preprocessing import normalize

from saelens_ext.analysis.labels_examples import ExampleRows, Made, Split
from saelens_ext.host.tokens import bare, joined_label
from saelens_ext.ops.class_terms import binary_terms, choose_terms

N_TOKENS, N_WORDS = 3, 4

_WORD = re.compile(r"\w\w+")


class ContextLabels(Made):
    """The labels of all latents, made from the examples that ``splits`` name, and how well each fits an activation.

    With ``is_region`` the values are cosine distances, smaller ones stronger.
    """

    name = "contexts"

    def __init__(self, rows: ExampleRows, splits: list[Split], is_region: bool):
        self._rows = rows
        making = [split.making for split in splits]
        self._tokens, tokens = binary_terms([bare(rows.token(row))] for row in range(len(rows.contexts)))
        texts = (rows.text(row).lower() for row in range(len(rows.contexts)))
        self._words, words = binary_terms(set(_WORD.findall(text)) - ENGLISH_STOP_WORDS for text in texts)
        weights = _weights(rows, [*making, rows.making_pool], is_region)
        parts = [
            choose_terms(matrix, terms, weights, [*map(len, making)], [rows.making_pool], n)
            for matrix, terms, n in ((self._tokens, tokens, N_TOKENS), (self._words, words, N_WORDS))
        ]
        self._matrix = csr_matrix(hstack([self._tokens, self._words]))
        self._scores = csr_matrix(hstack([part[1] for part in parts]))
        self.texts = [joined_label(*pair) for pair in zip(*(part[0] for part in parts))]

    def scores(self, latent: int, rows: np.ndarray) -> np.ndarray:
        """The sum of l_ct over the terms of a latent's label that each row has: ``(len(rows),)``."""
        return (self._matrix[rows] @ self._scores[latent].T).toarray().reshape(-1)


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
