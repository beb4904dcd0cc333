"""What the modes of continuations could be called: class-based TF-IDF over the continuations, each mode a class.

Half of a mode's continuations, drawn at random, make its label: how they open, and behind an ellipsis the words in
them, that they have in common and the other modes' have not. The other halves score it.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.preprocessing import normalize

from saelens_ext.host.tokens import bare, joined_label
from saelens_ext.ops.class_terms import binary_terms, choose_terms
from saelens_ext.ops.detection import auroc_interval
from saelens_ext.ops.label_score import Label, Scorer

N_OPENINGS, N_WORDS = 3, 4
N_NULL = 1000
"""Shuffles behind the null."""

_OPENING, _WORD = re.compile(r"\w+|[^\w\s]"), re.compile(r"\w\w+")


def label_modes(texts: Sequence[str], modes: np.ndarray, weights: np.ndarray, *, seed: int = 0) -> tuple[Label, ...]:
    """One label for each mode, scored on continuations that did not make it; none where there is one mode only.

    Args:
        texts: the continuations.
        modes: of each the number of its mode, from 0 on.
        weights: of each.
        seed: of the halves and of the shuffles.
    """
    k = int(modes.max()) + 1
    order = np.random.default_rng(seed).permutation(len(texts))
    members = [order[modes[order] == mode] for mode in range(k)]
    making = [rows[: (len(rows) + 1) // 2] for rows in members]
    scored = [rows[(len(rows) + 1) // 2 :] for rows in members]
    openings, terms = binary_terms([bare(m[0])] if (m := _OPENING.search(text)) else [] for text in texts)
    words, vocabulary = binary_terms(set(_WORD.findall(text.lower())) - ENGLISH_STOP_WORDS for text in texts)
    shares = _class_weights(making, weights)
    elsewhere = [np.concatenate([making[other] for other in range(k) if other != mode] or [[]]) for mode in range(k)]
    pools = [rows.astype(np.int64) for rows in elsewhere]
    sizes = [len(rows) for rows in making]
    parts = [
        choose_terms(matrix, names, shares, sizes, pools, n)
        for matrix, names, n in ((openings, terms, N_OPENINGS), (words, vocabulary, N_WORDS))
    ]
    matrix, scores = csr_matrix(hstack([openings, words])), csr_matrix(hstack([scores for _, scores in parts]))
    fits = (matrix @ scores.T).toarray()
    scorer, found = Scorer(N_NULL, seed), []
    for mode in range(k):
        text = joined_label(*(names[mode] for names, _ in parts)) if k > 1 else ""
        rest = np.concatenate([scored[other] for other in range(k) if other != mode] or [making[mode][:0]])
        found.append(_scored(text, fits[scored[mode], mode], fits[rest, mode], scorer))
    return tuple(found)


def _scored(text: str, members: np.ndarray, others: np.ndarray, scorer: Scorer) -> Label:
    """The label with its score, NaN where there is no label or nothing to score it on."""
    figures = scorer.score(members, others) if text else scorer.score(members[:0], others[:0])
    low = high = np.nan
    if not np.isnan(figures["auroc"]):
        u = torch.tensor([figures["auroc"]], dtype=torch.float64)
        low, high = (float(limit) for limit in auroc_interval(u, len(members), len(others)))
    return Label(text=text, low=low, high=high, **figures)


def _class_weights(classes: Sequence[np.ndarray], weights: np.ndarray) -> csr_matrix:
    """The weight of every continuation in every class, ``(k, n)``; those of a class sum to 1."""
    ends = np.cumsum([0, *map(len, classes)])
    rows = np.concatenate(classes)
    return csr_matrix(normalize(csr_matrix((weights[rows], rows, ends), shape=(len(classes), len(weights))), norm="l1"))
