"""How sure a statistic over units is: intervals and tests that redraw, flip or compare whole units.

A unit is what was drawn independently: a concept, a document, a prompt. Rows of one unit (the tokens of a document)
resemble each other, and an interval over rows is too narrow.

Symbols
    n   units;  R  draws of a null distribution
    t   threshold of a score: what lies above it is called outside
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from saelens_ext import _checks
from saelens_ext.ops.statistics import bootstrap_interval, sign_flip_p_value

SMALL_SAMPLE = 30
"""Below so many units the arms of an interval are stretched by Student's t."""
MIN_UNITS = 3
"""Fewer units give no interval."""


class Interval(NamedTuple):
    """An estimate and its confidence limits."""

    estimate: float
    low: float
    """Lower limit; NaN below `MIN_UNITS` units."""
    high: float
    """Upper limit."""
    n_units: int


class Paired(NamedTuple):
    """How two methods differ over the same units."""

    difference: float
    """Mean of first - second; NaN without a pair."""
    low: float
    high: float
    p: float
    """Two-sided, from flipping the signs of the differences; NaN without a pair."""
    n_units: int
    """Pairs of which both values are known."""
    n_undefined: int
    """Pairs left out, because a value is NaN."""


class OperatingPoint(NamedTuple):
    """What a threshold of a score does."""

    tpr: float
    """Fraction of the outside scores above the threshold."""
    fpr: float
    """Fraction of the inside scores above it, at most what was asked for; less where scores are tied."""
    threshold: float


def unit_bootstrap(
    statistic: Callable[[np.ndarray], Any],
    units: Sequence[Any] | np.ndarray,
    *,
    n_bootstrap: int = 2000,
    generator: np.random.Generator,
    strata: Sequence[object] | np.ndarray | None = None,
    confidence: float | int = 0.95,
    bounds: tuple[float | int, float | int] = (-np.inf, np.inf),
) -> Interval:
    """Percentile interval of a statistic, by redrawing whole units with replacement.

    Below `SMALL_SAMPLE` units, the distance of each limit from the estimate is multiplied by Student's quantile over
    the normal one and by sqrt(n / (n - 1)), which for a mean of normal units gives the t interval.

    Args:
        statistic: maps rows to a number: the values of the units, or the rows of all units one after the other.
        units: one value or one row per unit, or a list with the rows ``(m_i, ...)`` of each unit; finite.
        strata: a group per unit; each group is redrawn within itself and keeps its number of units.
        confidence: in (0, 1).
        bounds: of the statistic; limits are kept within.

    Returns:
        The statistic of all units and its limits, which are NaN for fewer than `MIN_UNITS` units.

    Raises:
        ValueError: no unit, a value that is not finite, or strata of another number than the units.
    """
    _checks.between(confidence, 0, 1, "confidence")
    _checks.positive(n_bootstrap, "n_bootstrap")
    parts = [np.asarray(unit, dtype=np.float64) for unit in units]
    if not parts:
        raise ValueError("units is empty; give at least one unit, and for an interval 3.")
    _finite(np.concatenate([part.reshape(-1) for part in parts]), "units")
    groups = np.zeros(len(parts)) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
    if len(groups) != len(parts):
        raise ValueError(f"There are {len(parts)} units and {len(groups)} strata; give one stratum per unit.")
    rows = np.stack if all(part.ndim == 0 for part in parts) else np.concatenate
    estimate, n = float(statistic(rows(parts))), len(parts)
    if n < MIN_UNITS:
        return Interval(estimate, np.nan, np.nan, n)
    if statistic is np.mean and rows is np.stack:
        limits = bootstrap_interval(rows(parts), n_bootstrap, generator, strata=groups, confidence=confidence)
    else:
        draws = _redraws(groups, n_bootstrap, generator)
        values = [statistic(rows([parts[unit] for unit in draw])) for draw in draws]
        limits = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    stretch = student_stretch(n, confidence)
    low, high = (float(np.clip(estimate + stretch * (limit - estimate), *bounds)) for limit in limits)
    return Interval(estimate, low, high, n)


def paired_units(
    first: np.ndarray,
    second: np.ndarray,
    *,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    generator: np.random.Generator,
    confidence: float | int = 0.95,
) -> Paired:
    """Compare two methods that were tried on the same units, ``(n,)`` in the same order, NaN where not known.

    The interval is :func:`unit_bootstrap`'s, the p-value that of :func:`~saelens_ext.ops.statistics.sign_flip_p_value`.

    Raises:
        ValueError: different numbers of units, or an infinite value.
    """
    if np.shape(first) != np.shape(second) or np.ndim(first) != 1:
        raise ValueError(
            f"first and second have shapes {np.shape(first)} and {np.shape(second)}; give one value per unit, for the "
            "same units in the same order, with NaN where a value is missing."
        )
    both = np.stack([np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)])
    known = ~np.isnan(both).any(axis=0)
    differences = _finite(both[0, known] - both[1, known], "first - second")
    n, undefined = len(differences), int((~known).sum())
    if n == 0:
        return Paired(np.nan, np.nan, np.nan, np.nan, 0, undefined)
    options = {"n_bootstrap": n_bootstrap, "generator": generator, "confidence": confidence}
    interval = unit_bootstrap(np.mean, differences, **options)
    p = sign_flip_p_value(differences, n_permutations, generator)
    return Paired(interval.estimate, interval.low, interval.high, p, n, undefined)


def smallest_p(n_units: int, n_permutations: int, family: int = 1) -> float:
    """The smallest p-value that flipping signs can give, Holm-corrected over ``family`` tests."""
    exact = 2.0 ** (1 - n_units)
    return min(1.0, family * max(exact, 1 / (n_permutations + 1) if 2.0**n_units > n_permutations else 0.0))


def wilson_interval(k: int, n: int, *, confidence: float | int = 0.95) -> Interval:
    """Wilson's score interval of a probability, from k successes of n independent trials; NaN for n = 0.

    Source: Wilson, Journal of the American Statistical Association 1927.
    """
    _checks.between(confidence, 0, 1, "confidence")
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in 0 to n, got k={k} of n={n}; k counts successes among n trials.")
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    limits = stats.binomtest(int(k), int(n)).proportion_ci(confidence, method="wilson")
    return Interval(k / n, float(limits.low), float(limits.high), int(n))


def monte_carlo_p(observed: float | int, null: Float[np.ndarray, " R"], *, side: str = "two") -> float:
    """p-value of a statistic from draws of its null distribution: (1 + draws as extreme) / (1 + R).

    Side "greater" or "less" counts draws on one side; "two" doubles the smaller tail, up to 1.

    Raises:
        ValueError: no draw, a value that is not finite, or another side.
    """
    _checks.choice(side, ("two", "greater", "less"), "side")
    draws = _finite(np.asarray(null, dtype=np.float64), "null")
    value = float(_finite(np.asarray([observed], dtype=np.float64), "observed")[0])
    if draws.size == 0:
        raise ValueError("null is empty; draw the statistic at least once under the null hypothesis, better 999 times.")
    tails = {"greater": (draws >= value), "less": (draws <= value)}
    p = {name: (1 + int(tail.sum())) / (1 + draws.size) for name, tail in tails.items()}
    return min(1.0, 2 * min(p.values())) if side == "two" else p[side]


def tpr_at_fpr(outside: Float[np.ndarray, " m"], inside: Float[np.ndarray, " n"], rate: float | int) -> OperatingPoint:
    """The lowest threshold above which at most a fraction ``rate`` of the inside scores lies, and what it finds.

    Raises:
        ValueError: an empty set, a score that is not finite, or a rate that n scores cannot show (1 / n to 1).
    """
    found, kept = (
        _finite(np.asarray(scores, dtype=np.float64), name)
        for scores, name in ((outside, "outside"), (inside, "inside"))
    )
    if not len(found) or not len(kept):
        raise ValueError(f"outside and inside need a score each, got {len(found)} and {len(kept)}.")
    allowed = int(np.floor(rate * len(kept) + 1e-9))
    if not 1 <= allowed < len(kept):
        raise ValueError(
            f"A false positive rate of {rate:g} cannot be read off {len(kept)} inside scores: it must be at least "
            f"{1 / len(kept):.3g} and below 1. Raise the rate or give more inside scores."
        )
    threshold = np.partition(kept, len(kept) - 1 - allowed)[len(kept) - 1 - allowed]
    return OperatingPoint(float((found > threshold).mean()), float((kept > threshold).mean()), float(threshold))


def _redraws(groups: np.ndarray, n_bootstrap: int, generator: np.random.Generator) -> np.ndarray:
    """Numbers of units ``(n_bootstrap, n)``, drawn with replacement within each group."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    return np.concatenate([own[generator.integers(len(own), size=(n_bootstrap, len(own)))] for own in members], axis=1)


def student_stretch(n: int, confidence: float) -> float:
    """What the arms of a percentile interval over n units are multiplied by: 1 from `SMALL_SAMPLE` on."""
    if n >= SMALL_SAMPLE:
        return 1.0
    level = (1 + confidence) / 2
    return float(stats.t.ppf(level, n - 1) / stats.norm.ppf(level) * np.sqrt(n / (n - 1)))


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        wrong = np.flatnonzero(~np.isfinite(values))
        raise ValueError(
            f"{name} has {len(wrong)} values that are NaN or infinite, the first at place {wrong[0]}; all must be "
            "finite. Leave such units out and say how many."
        )
    return values
