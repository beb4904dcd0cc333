"""Statistics of what has been seen and of what has not."""

from typing import NamedTuple

from scipy.stats import chi2

from saelens_ext import _checks


class UnseenMass(NamedTuple):
    """How likely the next activation is to found a new region."""

    estimate: float
    """Good-Turing estimate, in [0, 1]: the share of activations that are alone in their region."""
    upper: float
    """Upper confidence limit of it, in [0, 1]."""


def unseen_mass(n_singletons: int, n_seen: int, *, confidence: float = 0.95) -> UnseenMass:
    """Estimate the probability mass of regions that no activation has founded yet.

    Good and Turing estimate it by the share of observations whose kind was observed once. The limit takes the number
    of singletons as Poisson (exact one-sided limit), so it stays above zero when there is none. Both treat activations
    as exchangeable; those of one document resemble each other, so a stream that has not met many documents yet can
    look more complete than it is.

    Args:
        n_singletons: regions with exactly one member.
        n_seen: activations seen.
        confidence: of the upper limit, in (0, 1).

    Returns:
        The estimate and its limit; both 1 before anything was seen.

    Source: Good, "The population frequencies of species and the estimation of population parameters", Biometrika 1953.
    """
    _checks.between(confidence, 0, 1, "confidence")
    if n_seen == 0:
        return UnseenMass(1.0, 1.0)
    limit = chi2.ppf(confidence, 2 * (n_singletons + 1)) / 2
    return UnseenMass(n_singletons / n_seen, min(1.0, float(limit) / n_seen))
