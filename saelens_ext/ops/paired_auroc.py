"""AUROCs of scores whose units are documents, and differences between two scores of the same documents.

Symbols
    i, j    an outside and an inside document; D_out and D_in of them
    n, m    activations of each, ``(D_out,)`` and ``(D_in,)``
    W       ``(D_out, D_in)``: pairs of an activation of i and one of j in which i's scores higher, ties counting half
    U       the AUROC, sum W / (sum n sum m)
    v, w    how often each inside and outside document was drawn in a bootstrap resample
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from saelens_ext import _checks

_ENTRIES_PER_BLOCK = 2**21  # of float64: 16 MB


@dataclass(frozen=True, eq=False)
class ScoredDocuments:
    """Scores of the activations of a set of documents, documents in a row."""

    scores: Float[np.ndarray, " t"]
    """One per activation, larger where it looks more novel."""
    sizes: Int[np.ndarray, " d"]
    """Activations of each document, each at least 1; t of them together."""

    def __post_init__(self) -> None:
        if len(self.scores) == 0 or int(self.sizes.sum()) != len(self.scores) or int(self.sizes.min()) < 1:
            raise ValueError(
                f"sizes must be at least 1 each and add up to the {len(self.scores)} scores, at least one, got "
                f"{len(self.sizes)} sizes that add up to {int(self.sizes.sum())}."
            )
        if not np.isfinite(self.scores).all():
            raise ValueError(f"{int((~np.isfinite(self.scores)).sum())} of {len(self.scores)} scores are not finite.")

    @property
    def starts(self) -> Int[np.ndarray, " d"]:
        """The row at which each document begins."""
        return np.cumsum(self.sizes) - self.sizes

    def means(self) -> "ScoredDocuments":
        """One score per document, the mean of its activations'."""
        return ScoredDocuments(np.add.reduceat(self.scores, self.starts) / self.sizes, np.ones_like(self.sizes))


def document_wins(outside: ScoredDocuments, inside: ScoredDocuments) -> Float[np.ndarray, "d_out d_in"]:
    """W, in time proportional to D_in times the outside activations, and memory of W and a block of 16 MB."""
    order = np.sort(outside.scores)
    rank = np.empty(len(order), dtype=np.int64)
    rank[np.argsort(outside.scores, kind="stable")] = np.arange(len(order))
    # An inside score loses against the outside ones at or behind its place in their order; ties are half on each side.
    places = [np.searchsorted(order, inside.scores, side=side) for side in ("left", "right")]
    document = np.repeat(np.arange(len(inside.sizes)), inside.sizes)
    wins = np.empty((len(outside.sizes), len(inside.sizes)))
    n_block = max(1, _ENTRIES_PER_BLOCK // (len(order) + 1))
    for first in range(0, len(inside.sizes), n_block):
        last = min(first + n_block, len(inside.sizes))
        own = (document >= first) & (document < last)
        flat = [(document[own] - first) * (len(order) + 1) + place[own] for place in places]
        counts = np.bincount(np.concatenate(flat), minlength=(last - first) * (len(order) + 1)) / 2
        beaten = np.cumsum(counts.reshape(last - first, -1), axis=1)[:, rank]
        wins[:, first:last] = np.add.reduceat(beaten, outside.starts, axis=1).T
    return wins


def exchange_contributions(
    first: tuple[ScoredDocuments, ScoredDocuments], second: tuple[ScoredDocuments, ScoredDocuments]
) -> Float[np.ndarray, " d_out_plus_d_in"]:
    """What each document contributes to the difference between two scores' AUROCs, so that exchanging the two scores of
    a document changes the sign of its contribution and of no other.

    Scores become ranks among all activations of both sets, which changes no AUROC and puts the two on one scale. Let
    A_ij be the wins of document i over j by the first score minus those by the second, and B_ij those of i by the first
    over j by the second minus those of i by the second over j by the first. With the scores of some documents
    exchanged, sigma_i and tau_j being -1 for those and 1 for others, pair i, j gives
    sigma_i (A_ij + B_ij) / 2 + tau_j (A_ij - B_ij) / 2. Summed, each document has one contribution with one sign, and
    the permutation test of Venkatraman is one of flipped signs.

    Each argument holds the outside and the inside documents under one score.

    Returns:
        Contributions of the outside documents, then of the inside ones; their sum is U of the first minus U of the
        second.

    Source: Venkatraman, "A permutation test to compare receiver operating characteristic curves", Biometrics 2000, with
    documents in the place of single cases.
    """
    for one, other in zip(first, second):
        if not np.array_equal(one.sizes, other.sizes):
            raise ValueError(
                f"The two scores must be of the same documents; got {len(one.sizes)} and {len(other.sizes)} documents, "
                "or other numbers of activations of some."
            )
    (out_1, in_1), (out_2, in_2) = (_ranks(*pair) for pair in (first, second))
    # Of an outside activation by the two ranks: the fraction of inside activations, ranked by either, below each.
    gained = _fraction_below(in_1, out_1) + _fraction_below(in_2, out_1)
    gained -= _fraction_below(in_1, out_2) + _fraction_below(in_2, out_2)
    # An inside activation's gain is a loss: the fraction of outside ones above.
    lost = _fraction_below(out_1, in_2) + _fraction_below(out_2, in_2)
    lost -= _fraction_below(out_1, in_1) + _fraction_below(out_2, in_1)
    outside, inside = first
    parts = [
        np.add.reduceat(values, documents.starts) / (2 * len(values))
        for values, documents in ((gained, outside), (lost, inside))
    ]
    return np.concatenate(parts)


def _ranks(outside: ScoredDocuments, inside: ScoredDocuments) -> tuple[np.ndarray, np.ndarray]:
    ranks = rankdata(np.concatenate([outside.scores, inside.scores]))
    return ranks[: len(outside.scores)], ranks[len(outside.scores) :]


def _fraction_below(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of each entry of ``at``, the fraction of ``values`` below it, ties counting half."""
    order = np.sort(values)
    both = np.searchsorted(order, at, side="left") + np.searchsorted(order, at, side="right")
    return both / (2 * len(order))


def bootstrap_weights(n: int, n_bootstrap: int, generator: np.random.Generator) -> Float[np.ndarray, "b n"]:
    """How often each of n documents is drawn in each resample of n."""
    return generator.multinomial(n, np.full(n, 1 / n), size=_checks.positive(n_bootstrap, "n_bootstrap")).astype(float)


def resampled_auroc(
    wins: Float[np.ndarray, "d_out d_in"],
    sizes: tuple[np.ndarray, np.ndarray],
    weights: tuple[np.ndarray, np.ndarray],
) -> Float[np.ndarray, " b"]:
    """U in each resample.

    Args:
        wins: W; also a difference or a mean of several, of which U is the same difference or mean.
        sizes: n and m.
        weights: w and v, ``(b, D_out)`` and ``(b, D_in)``; the same ones for two scores pair them.
    """
    (n, m), (w, v) = sizes, weights
    return ((w @ wins) * v).sum(axis=1) / ((w @ n) * (v @ m))


def sign_flip_p_values(
    contributions: Float[np.ndarray, "m n"], n_permutations: int, generator: np.random.Generator
) -> Float[np.ndarray, " m"]:
    """Two-sided p-values of m sums of n contributions (:func:`exchange_contributions`).

    (1 + assignments with as large a sum) / (1 + R), from the same R random flips of signs for all of them.
    """
    n = contributions.shape[1]
    scale = np.abs(contributions).sum(axis=1)
    # Sums that are equal but for rounding count as equal.
    units = contributions / np.where(scale == 0, 1.0, scale)[:, None]
    observed = np.abs(units.sum(axis=1)).round(9)
    n_as_large = np.zeros(len(units), dtype=int)
    n_block = max(1, _ENTRIES_PER_BLOCK // n)
    for first in range(0, _checks.positive(n_permutations, "n_permutations"), n_block):
        signs = 2.0 * generator.integers(2, size=(min(n_block, n_permutations - first), n)) - 1
        n_as_large += (np.abs(signs @ units.T).round(9) >= observed).sum(axis=0)
    return (1 + n_as_large) / (1 + n_permutations)


def resampled_thresholds(
    inside: ScoredDocuments, rate: float, weights: Float[np.ndarray, "b d_in"]
) -> Float[np.ndarray, " b"]:
    """The lowest score that at most a fraction ``rate`` of the inside activations exceed, by resample (weights v)."""
    order = np.argsort(-inside.scores, kind="stable")
    scores, document = inside.scores[order], np.repeat(np.arange(len(inside.sizes)), inside.sizes)[order]
    first_equal = np.searchsorted(-scores, -scores, side="left")  # of equal scores, none exceeds another
    allowed = rate * (weights @ inside.sizes) * (1 + 1e-12)
    thresholds = np.empty(len(weights))
    open_rows, n_looked = np.arange(len(weights)), min(len(scores), math.ceil(4 * rate * len(scores)) + 100)
    while len(open_rows):  # thresholds lie among the highest scores, which are looked at first
        n_block = max(1, _ENTRIES_PER_BLOCK // n_looked)
        for rows in np.split(open_rows, range(n_block, len(open_rows), n_block)):
            above = np.zeros((len(rows), n_looked + 1))
            np.cumsum(weights[rows][:, document[:n_looked]], axis=1, out=above[:, 1:])
            last = (above[:, first_equal[:n_looked]] <= allowed[rows, None]).sum(axis=1) - 1
            thresholds[rows] = np.where((last < n_looked - 1) | (n_looked == len(scores)), scores[last], np.nan)
        open_rows = open_rows[np.isnan(thresholds[open_rows])]
        n_looked = min(len(scores), 4 * n_looked)
    return thresholds


def resampled_fraction_above(
    outside: ScoredDocuments, thresholds: Float[np.ndarray, " b"], weights: Float[np.ndarray, "b d_out"]
) -> Float[np.ndarray, " b"]:
    """The fraction of the outside activations above the threshold, by resample (weights w)."""
    levels, which = np.unique(thresholds, return_inverse=True)
    n_levels, n_documents = len(levels), len(outside.sizes)
    below = np.searchsorted(levels, outside.scores, side="left")  # levels that each activation is above
    flat = np.repeat(np.arange(n_documents), outside.sizes) + below * n_documents
    counts = np.bincount(flat, minlength=(n_levels + 1) * n_documents).reshape(n_levels + 1, n_documents)
    above = outside.sizes - np.cumsum(counts, axis=0)[:-1]
    return (weights * above[which]).sum(axis=1) / (weights @ outside.sizes)
