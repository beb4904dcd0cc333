"""How the number of regions grew with the activations seen: the curves of the first plot."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saelens_ext.dictionaries.fit_result import ExemplarFitResult

N_POINTS = 160
"""Points of a curve: enough that its steps are finer than the pixels between them."""


def growth_points(longest: int, n: int = N_POINTS) -> np.ndarray:
    """Numbers of activations, up to ``longest``, at which a curve is drawn."""
    # Regions come fast at first: even steps alone would draw the start as one straight line.
    return np.unique(np.concatenate([np.linspace(0, longest, n), np.geomspace(1, longest, n // 4)]).astype(np.int64))


def growth_data(fits: Sequence[ExemplarFitResult], chosen: ExemplarFitResult) -> list[dict[str, Any]]:
    """One curve per fit, in order of their thresholds, JSON-safe.

    Each has ``seen``, numbers of activations t, and ``regions``, how many regions the first t activations had started:
    the number of exemplar indices below t. All curves share their points as far as they go and end at ``n_seen``.
    """
    grid = growth_points(max(fit.n_seen for fit in fits))
    several_hooks = len({fit.hook_name for fit in fits}) > 1
    curves = []
    for fit in sorted(fits, key=lambda fit: fit.threshold.threshold):
        seen = np.unique(np.append(grid[grid < fit.n_seen], fit.n_seen))
        curves.append(
            {
                "label": fit_label(fit, several_hooks),
                "chosen": fit is chosen,
                "seen": seen.tolist(),
                "regions": fit.regions_after(seen).tolist(),
            }
        )
    return curves


def fit_label(fit: ExemplarFitResult, with_hook: bool = False) -> str:
    """How one of several fits is called: by its percentile or factor, or by its threshold where that was given."""
    theta = fit.threshold
    if theta.factor is not None:
        label = f"{theta.factor:g} × nearest"
    else:
        label = f"{fit.percentile:g}%" if fit.percentile is not None else f"θ = {theta.threshold:.3f}"
    return f"{fit.hook_name} {label}" if with_hook else label
