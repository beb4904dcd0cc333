"""Statistics of what has been seen and of what has not, and of how sure a comparison is."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest, chi2, permutation_test, rankdata

from saelens_ext import _checks

_BATCH = 1000  # assignments of signs held at once


class UnseenMass(NamedTuple):
    """How likely the next activation is to found a new region."""

    estimate: float
    """Share of the recent activations that founded one, in [0, 1]."""
    upper: float
    """Upper confidence limit of the probability, in [0, 1]."""


def unseen_mass(n_founders: int, n_recent: int, *, confidence: float = 0.95) -> UnseenMass:
    """Estimate the probability that a further activation starts a region, from how many of ``n_recent`` ones did.

    While a clustering grows this probability only falls, if activations are exchangeable. The average over a recent
    stretch of the stream therefore lies above the present value, and so does its limit (exact one-sided Poisson at
    ``confidence`` in (0, 1), above zero even when nothing was started). Good and Turing's own estimate, the fraction of
    regions with a single member, does not fit here: regions overlap, so a region with more members can still hold
    ground that nothing else covers, and on real activations it understates the rate several times over. Activations of
    one document resemble each other, so a stream that has not met many documents can still look more complete than it
    is.

    Returns:
        The estimate and its limit; both 1 before anything was seen.

    Source: the idea of a mass not yet seen is that of Good, "The population frequencies of species and the estimation
    of population parameters", Biometrika 1953.
    """
    _checks.between(confidence, 0, 1, "confidence")
    if n_recent == 0:
        return UnseenMass(1.0, 1.0)
    limit = chi2.ppf(confidence, 2 * (n_founders + 1)) / 2
    return UnseenMass(n_founders / n_recent, min(1.0, float(limit) / n_recent))


def holm(p_values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Adjusted p-values of a family of tests, so that the chance of one false rejection or more stays below the level.

    NaN, where a test could not be made, stays NaN and does not count as one of the family.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    adjusted = np.full(len(p_values), np.nan)
    made = np.flatnonzero(~np.isnan(p_values))
    order = made[np.argsort(p_values[made], kind="stable")]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def bootstrap_interval(
    values: Float[np.ndarray, " n"],
    n_bootstrap: int,
    generator: np.random.Generator,
    *,
    strata: np.ndarray | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a mean, by resampling its finite values with replacement.

    Args:
        strata: ``(n,)``, a group per value; each group is resampled within itself and keeps its size.
        confidence: in (0, 1).

    Returns:
        Lower and upper limit; both NaN for fewer than two values.
    """
    _checks.between(confidence, 0, 1, "confidence")
    if len(values) < 2:
        return float("nan"), float("nan")
    groups = np.zeros(len(values)) if strata is None else np.asarray(strata)
    totals = np.zeros(n_bootstrap)
    for group in np.unique(groups):
        own = values[groups == group]
        totals += own[generator.integers(len(own), size=(n_bootstrap, len(own)))].sum(axis=1)
    low, high = np.quantile(totals / len(values), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def sign_flip_p_value(
    differences: Float[np.ndarray, " n"], n_permutations: int, generator: np.random.Generator
) -> float:
    """Two-sided p-value of paired differences: how often flipping signs at random gives as large a mean.

    Exact, over all 2^n assignments of signs, where these are not more than ``n_permutations``, else from that many
    drawn.

    Returns:
        In (0, 1], at least 2^(1 - n); NaN without a difference.

    Source: Fisher, "The Design of Experiments", 1935, section 21.
    """
    if len(differences) < 2:  # both signs of a single difference are as large; scipy refuses one
        return 1.0 if len(differences) else float("nan")
    scale = float(np.abs(differences).sum()) or 1.0

    def size(flipped: np.ndarray, axis: int) -> Any:
        # Sums that are equal but for rounding count as equal.
        return np.abs(flipped.sum(axis=axis) / scale).round(9)

    options: dict[str, Any] = {"permutation_type": "samples", "alternative": "greater", "vectorized": True}
    options |= {"n_resamples": n_permutations, "batch": _BATCH, "rng": generator}
    return float(permutation_test((differences,), size, **options).pvalue)


def one_size_sign_flip_p_value(differences: Float[np.ndarray, " n"]) -> float:
    """:func:`sign_flip_p_value` exactly, whatever n is, where all differences but zeros are of one size; else NaN.

    Those of yes and no are: it is then a binomial test of the signs (McNemar's exact test).

    Args:
        differences: finite.
    """
    moved = differences[differences != 0]
    if len(differences) and not len(moved):
        return 1.0
    if not len(moved) or np.abs(moved).min() != np.abs(moved).max():
        return float("nan")
    return float(binomtest(int((moved > 0).sum()), len(moved)).pvalue)


def rank_correlation(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> float:
    """Spearman's correlation, equal values sharing their ranks; NaN where either is constant or n is below 2."""
    ranks = [rankdata(values) for values in (first, second)]
    if any(len(rank) < 2 or bool((rank == rank[0]).all()) for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])
