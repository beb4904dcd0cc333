"""Probes: logistic regressions that say what labelled sentences allow to be read from a representation.

Symbols
    x  representation of n sentences, ``(n, d)``
    y  whether each shows the concept, ``(n,)``
    C  inverse strength of the L2 penalty on standardised columns
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

STRENGTHS = (1e-4, 1e-2, 1.0)
"""Values of C tried; the one with the least log loss on held-out folds is taken."""
_FOLDS = 3


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted probe."""

    mean: np.ndarray
    weights: np.ndarray
    """Of the columns as they are, ``(d,)``."""
    intercept: float

    def decide(self, x: np.ndarray) -> np.ndarray:
        """Log odds of each row, ``(n,)``."""
        return (x - self.mean) @ self.weights + self.intercept


def fit_probe(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> Probe:
    """Fit an L2 logistic regression on standardised columns, its strength chosen by cross-validation.

    Args:
        x: ``(n, d)``.
        y: bool ``(n,)``, both values at least twice.
        seed: of the folds.
    """
    mean, spread = x.mean(axis=0), x.std(axis=0)
    scale = np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0.0)
    z = (x - mean) * scale
    # The solution lies in the span of the rows, which has fewer dimensions than a wide representation.
    basis = np.linalg.svd(z, full_matrices=False)[2] if z.shape[1] > len(z) else None
    z = z if basis is None else z @ basis.T
    strength = STRENGTHS[int(np.argmin([_held_out_loss(z, y, strength, seed) for strength in STRENGTHS]))]
    fitted = _fitted(z, y, strength)
    weights = fitted.coef_[0] if basis is None else fitted.coef_[0] @ basis
    return Probe(mean, weights * scale, float(fitted.intercept_[0]))


def most_different(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """The k columns whose means differ most between the labels, relative to nothing, as in the papers' k-sparse probes.

    Args:
        x: ``(n, d)``.
        y: bool ``(n,)``.
        k: at most d are given.
    """
    differences = np.abs(x[y].mean(axis=0) - x[~y].mean(axis=0))
    return np.argsort(-differences, kind="stable")[:k]


def _held_out_loss(z: np.ndarray, y: np.ndarray, strength: float, seed: int) -> float:
    folds = StratifiedKFold(min(_FOLDS, int(y.sum()), int((~y).sum())), shuffle=True, random_state=seed)
    loss = 0.0
    for train, test in folds.split(z, y):
        odds = _fitted(z[train], y[train], strength).decision_function(z[test])
        loss -= np.log(np.maximum(expit(np.where(y[test], odds, -odds)), 1e-12)).sum()
    return float(loss)


def _fitted(z: np.ndarray, y: np.ndarray, strength: float) -> Any:
    return LogisticRegression(C=strength, max_iter=1000).fit(z, y)
