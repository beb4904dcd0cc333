"""How effects follow the strength, and how methods compare: numbers from tables, no model.

Symbols
    eps     strengths, S of them
    f       effect at each strength: the change of a measure
    unit    what is paired and resampled: a member of one prefix, or a prefix of several

Statistics of f over eps, ascending; each is NaN, never 0, where it has no meaning:

``"slope"``         least-squares slope, in units of the measure per unit of strength
``"pearson"``       correlation of f and eps; NaN where f is constant
``"spearman"``      the same of ranks, ties averaged
``"monotonicity"``  sum of the steps of f over the sum of their magnitudes, in [-1, 1]: 1 where f never falls; NaN where
                    f is constant
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata

from saelens_ext.continuations.validation.methods import NOTHING
from saelens_ext.ops.statistics import bootstrap_interval, holm, sign_flip_p_value

STATISTICS = ("slope", "pearson", "spearman", "monotonicity")

RESOLUTION = 2e-5
"""Logits or nats: effects that differ by less are float32 rounding, and count as constant."""

SHARE = "generation_share"

_SAME_CLUSTERS = ("global", "single_member", "wrong_cluster", "random_features", "top_activation")
"""Controls tried on the clusters under test; all others, the user's partitions too, have their own clusters."""


def dose_response(
    strengths: Sequence[float | int] | np.ndarray, effects: Float[np.ndarray, "S n"]
) -> dict[str, Float[np.ndarray, " n"]]:
    """`STATISTICS` of each column of effects f, one row per strength eps ``(S,)``, all different; NaN for a NaN."""
    order = np.argsort(strengths)
    eps, f = np.asarray(strengths, dtype=np.float64)[order], np.asarray(effects, dtype=np.float64)[order]
    nothing = np.full(f.shape[1], np.nan)
    if len(eps) < 2:
        return dict.fromkeys(STATISTICS, nothing)
    # NaN stays NaN: it is not below the resolution.
    constant = np.ptp(f, axis=0) < RESOLUTION
    centred = eps - eps.mean()
    slope = centred @ (f - f.mean(axis=0)) / (centred @ centred)
    ranks = np.where(np.isnan(f).any(axis=0), np.nan, rankdata(f, axis=0))
    steps = np.diff(f, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        monotonicity = steps.sum(axis=0) / np.abs(steps).sum(axis=0)
    return {
        "slope": slope,
        "pearson": np.where(constant, np.nan, _correlation(eps, f)),
        "spearman": np.where(constant, np.nan, _correlation(rankdata(eps), ranks)),
        "monotonicity": np.where(constant, np.nan, monotonicity),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of ``(S,)`` with each column of ``(S, n)``."""
    x, y = x - x.mean(), y - y.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(x @ y / np.sqrt((x @ x) * (y * y).sum(axis=0)), -1, 1)


def member_statistics(members: pd.DataFrame) -> pd.DataFrame:
    """One row per prefix, method, member and measure, with a column for each of `STATISTICS`."""
    return _statistics(members, ["prefix", "method", "row", "cluster", "joint_cluster", "measure"])


def cluster_statistics(members: pd.DataFrame) -> pd.DataFrame:
    """The same of cluster means: a row per prefix, method, cluster of that method and measure; without NaN members."""
    keys = ["prefix", "method", "cluster", "measure"]
    means = members.groupby([*keys, "strength"], dropna=False, sort=False)["change"].mean().reset_index()
    found = _statistics(means, keys)
    first = members[members["strength"] == members["strength"].iloc[0]]
    counts = first.groupby(keys, dropna=False, sort=False)["change"].count().rename("n_members").reset_index()
    return found.merge(counts, on=keys)


def _statistics(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    effects = table.set_index([*keys, "strength"])["change"].unstack("strength")
    found = dose_response(effects.columns.to_numpy(), effects.to_numpy().T)
    return pd.DataFrame(found, index=effects.index).reset_index()


def mean_effects(members: pd.DataFrame, n_bootstrap: int, seed: int) -> pd.DataFrame:
    """Mean effect per prefix, method, cluster, strength and measure, with a bootstrap interval over members."""
    keys = ["prefix", "method", "cluster", "strength", "measure"]
    generator, found = np.random.default_rng(seed), []
    for key, part in members.groupby(keys, dropna=False, sort=False)["change"]:
        values = part.dropna().to_numpy()
        mean = values.mean() if len(values) else np.nan
        low, high = bootstrap_interval(values, n_bootstrap, generator)
        found.append((*key, mean, low, high, len(values)))
    return pd.DataFrame(found, columns=[*keys, "change", "low", "high", "n_members"])


def compare_methods(
    members: pd.DataFrame,
    reference: str,
    controls: Sequence[str],
    *,
    n_bootstrap: int,
    n_permutations: int,
    seed: int,
) -> pd.DataFrame:
    """The reference method against each control (`NOTHING` among them, if named), by every measure and statistic.

    Units are paired: with one prefix, the members that both methods steered; with several, prefixes, each the mean over
    such members. Intervals are percentile bootstraps of the mean difference (members are resampled within their
    clusters), p-values come from flipping signs, corrected by Holm's method over the controls of a measure and
    statistic.

    Returns:
        One row per measure, statistic and control: ``reference``, ``control_value`` and ``difference`` (means over
        units), ``low``, ``high``, ``p``, ``p_holm``, ``unit``, ``n_units``, and ``n_undefined``, the members left out
        because a statistic of theirs has no meaning or they had no direction.
    """
    table = member_statistics(members)
    unit = "prefix" if table["prefix"].nunique() > 1 else "member"
    generator, found = np.random.default_rng(seed), []
    for measure in table["measure"].unique():
        own = table[table["measure"] == measure]
        for statistic in STATISTICS:
            wide = own.pivot(index=["prefix", "row", "joint_cluster"], columns="method", values=statistic)
            pairs = [_paired(wide, reference, one, unit, generator, n_bootstrap, n_permutations) for one in controls]
            found.append(_compared(pairs, measure, statistic, controls, unit))
    return pd.concat(found, ignore_index=True)


def _compared(
    pairs: list[dict[str, float | int]], measure: str, statistic: str, controls: Sequence[str], unit: str
) -> pd.DataFrame:
    """The rows of one measure and statistic, whose p-values are corrected together."""
    names = {"measure": measure, "statistic": statistic, "control": list(controls), "unit": unit}
    adjusted = holm(np.array([pair["p"] for pair in pairs], dtype=np.float64))
    return pd.concat([pd.DataFrame(names), pd.DataFrame(pairs)], axis=1).assign(p_holm=adjusted)


def compare_generations(
    generations: pd.DataFrame,
    reference: str,
    controls: Sequence[str],
    *,
    n_bootstrap: int,
    n_permutations: int,
    seed: int,
) -> pd.DataFrame:
    """The same for the change in the fraction of generations in a cluster (measure `SHARE`, statistic ``"change"``).

    ``generations`` are as ``generations.generation_shares`` gives them, of one prefix or several. With one prefix the
    units are clusters, and a control with clusters of its own has none to be paired with.
    """
    changes = generations.assign(change=generations["share"] - generations["unsteered"])
    unit = "prefix" if generations["prefix"].nunique() > 1 else "cluster"
    if unit == "cluster":
        changes = changes[changes["method"].isin((reference, *_SAME_CLUSTERS))]
    keys = ["prefix", "cluster", "method"]
    wide = changes.set_index(keys)["change"].unstack("method").reindex(columns=[reference, *controls])
    if unit == "prefix":
        # Clusters of different partitions do not belong together; their means over a prefix do.
        wide = wide.groupby(level="prefix").mean()
    generator = np.random.default_rng(seed)
    pairs = [_paired(wide, reference, one, unit, generator, n_bootstrap, n_permutations) for one in controls]
    return _compared(pairs, SHARE, "change", controls, unit)


def _paired(
    wide: pd.DataFrame,
    reference: str,
    control: str,
    unit: str,
    generator: np.random.Generator,
    n_bootstrap: int,
    n_permutations: int,
) -> dict[str, float | int]:
    own = wide.assign(**{NOTHING: 0.0}) if control == NOTHING else wide
    pairs = own[[reference, control]].dropna()
    undefined = len(wide) - len(pairs)
    strata = pairs.index.get_level_values("joint_cluster").to_numpy() if unit == "member" else None
    if unit == "prefix":
        pairs = pairs.groupby(level="prefix").mean()
    differences = (pairs[reference] - pairs[control]).to_numpy()
    low, high = bootstrap_interval(differences, n_bootstrap, generator, strata=strata)
    return {
        "reference": pairs[reference].mean(),
        "control_value": pairs[control].mean(),
        "difference": differences.mean() if len(differences) else np.nan,
        "low": low,
        "high": high,
        "p": sign_flip_p_value(differences, n_permutations, generator),
        "n_units": len(differences),
        "n_undefined": undefined,
    }


def specificity_summary(cells: pd.DataFrame, sign: int = 1) -> pd.DataFrame:
    """How much of a direction's effect is its own cluster's.

    Args:
        cells: the specificity matrix in long form, with columns prefix, measure, direction, cluster, change.
        sign: of the strength that the effects are of; against a direction the lowest effect is the largest.

    Returns:
        One row per prefix and measure: ``own`` and ``others``, the mean effect on members of the direction's own
        cluster and of each other; ``own_is_largest_of_cluster``: fraction of clusters on which their own direction has
        a larger effect than any other, and ``own_is_largest_of_direction``: fraction of directions with a larger effect
        on their own cluster than on any other; both NaN for one cluster.
    """
    found = []
    for (prefix, measure), part in cells.groupby(["prefix", "measure"], sort=False):
        matrix = part.pivot(index="direction", columns="cluster", values="change")
        names = [name for name in matrix.index if name in matrix.columns]
        square = matrix.loc[names, names].to_numpy()
        diagonal = np.eye(len(square), dtype=bool)
        own, others = np.diag(square), square[~diagonal]
        # Directions over the same latents have equal effects on every cluster, and are specific to none.
        rivals = np.where(diagonal, -np.inf, sign * square)
        least = sign * own - RESOLUTION
        several = len(square) > 1
        found.append(
            {
                "prefix": prefix,
                "measure": measure,
                "n_clusters": len(square),
                "own": own.mean(),
                "others": others.mean() if several else np.nan,
                "own_is_largest_of_cluster": float((least > rivals.max(axis=0)).mean()) if several else np.nan,
                "own_is_largest_of_direction": float((least > rivals.max(axis=1)).mean()) if several else np.nan,
            }
        )
    return pd.DataFrame(found)
