"""Statistics of what has been seen and of what has not."""

from typing import NamedTuple

from scipy.stats import chi2

from saelens_ext import _checks


class UnseenMass(NamedTuple):
    """How likely the next activation is to found a new region."""

    estimate: float
    """Share of the recent activations that founded one, in [0, 1]."""
    upper: float
    """Upper confidence limit of the probability, in [0, 1]."""


def unseen_mass(n_founders: int, n_recent: int, *, confidence: float = 0.95) -> UnseenMass:
    """Estimate the probability that a further activation founds a region, from how often recent ones did.

    While a clustering grows this probability only falls, if activations are exchangeable. The average over a recent
    stretch of the stream therefore lies above the present value, and so does its limit (exact one-sided Poisson, above
    zero even when nothing was founded). Good and Turing's own estimate, the share of regions with a single member, does
    not fit here: regions overlap, so a region with more members can still hold ground that nothing else covers, and on
    real activations it understates the founding rate several times over. Activations of one document resemble each
    other, so a stream that has not met many documents can still look more complete than it is.

    Args:
        n_founders: recent activations that founded a region.
        n_recent: recent activations.
        confidence: of the upper limit, in (0, 1).

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
