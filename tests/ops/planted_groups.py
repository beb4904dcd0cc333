"""Activations made of known groups of neurons, to be found again."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Planted:
    """A kind of planted data."""

    k: int = 24
    d: int = 300
    n: int = 1200
    sparsity: float = 0.05
    noise: float = 0.3
    active: float = 0.15
    """Fraction of the activations that a group is in, on average over groups."""
    spread: float = 1.0
    """How many times as frequent the first group is as the last; frequencies fall geometrically."""
    correlation: float = 0.0
    """Of the normal variables, in blocks of four groups, that decide which groups are in an activation."""

    def make(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Activations ``(n, d)``, features ``(k, d)`` and codes ``(n, k)``, gamma-distributed where not zero."""
        rng, size = np.random.default_rng(seed), int(np.ceil(self.sparsity * self.d - 1e-9))
        features = np.zeros((self.k, self.d))
        for row in features:
            row[rng.permutation(self.d)[:size]] = 3 * rng.normal(size=size)
        rates = np.geomspace(self.spread, 1, self.k)
        shared = np.repeat(rng.normal(size=(self.n, -(-self.k // 4))), 4, axis=1)[:, : self.k]
        drive = self.correlation**0.5 * shared + (1 - self.correlation) ** 0.5 * rng.normal(size=(self.n, self.k))
        thresholds = np.quantile(drive, 1 - self.active * rates / rates.mean(), axis=0).diagonal()
        codes = (drive > thresholds) * rng.gamma(2.0, size=drive.shape)
        x = codes @ features + self.noise * rng.normal(size=(self.n, self.d))
        return tuple(torch.from_numpy(part).float() for part in (x, features, codes))


SHAPES = {
    "24 groups of 15 of 300": Planted(),
    "10 of 20 of 200": Planted(k=10, d=200, n=800, sparsity=0.1),
    "10 of 2 of 200": Planted(k=10, d=200, n=800, sparsity=0.01),
    "no noise": Planted(noise=0.0),
    "noise 0.5, unequal": Planted(noise=0.5, spread=10),
    "correlated": Planted(correlation=0.5),
    "40 of 12 of 600": Planted(k=40, d=600, n=2000, sparsity=0.02),
    "60 of 10 of 1000": Planted(k=60, d=1000, n=3000, sparsity=0.01),
    "60 of 50 of 1000, unequal, correlated": Planted(k=60, d=1000, n=3000, spread=10, correlation=0.5),
    "60 of 40 of 400": Planted(k=60, d=400, n=3000, sparsity=0.1),
}
SMALL = ("10 of 20 of 200", "10 of 2 of 200", "24 groups of 15 of 300", "correlated")


def recovered(planted: torch.Tensor, found: torch.Tensor) -> float:
    """Fraction of the planted features that one of the found ones, matched one to one, has a cosine above 0.9 with."""
    cosines = (normalize(planted, dim=1) @ normalize(found, dim=1).T).numpy()
    rows, columns = linear_sum_assignment(-cosines)
    return float((cosines[rows, columns] > 0.9).mean())
