"""Activations made of groups of neuron groups, to be found again as trees."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from torch.nn.functional import normalize, one_hot

from saelens_ext import HierarchicalSNMF


@dataclass(frozen=True)
class PlantedTree:
    """A kind of planted tree: ``parents`` of ``children`` leaves each."""

    parents: int = 4
    children: int = 4
    own: int = 6
    """Neurons of a leaf alone."""
    core: int = 4
    """Neurons that the leaves of a parent share, with the same weights."""
    share: float = 0.5
    """Of a leaf's squared length, what is on the core: the cosine of two siblings."""
    d: int = 200
    n: int = 1500
    together: float = 0.15
    """Fraction of the activations that a parent is in, on average."""
    given: float = 0.4
    """Fraction of those that each of its leaves is in."""
    spread: float = 1.0
    """How many times as frequent the first parent is as the last."""
    noise: float = 0.1
    """Standard deviation of the noise in each neuron, for leaves of length 1 and codes of mean 2."""
    offset: float = 0.0
    """Length of a constant that all activations share, on neurons at random."""

    @property
    def leaves(self) -> int:
        return self.parents * self.children

    @property
    def sparsity(self) -> float:
        """What a leaf needs."""
        return (self.own + self.core) / self.d

    def make(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations ``(n, d)`` and leaves ``(parents * children, d)``, of length 1, siblings in succession."""
        rng = np.random.default_rng(seed)
        features = np.zeros((self.leaves, self.d))
        for parent in range(self.parents):
            shared = rng.permutation(self.d)[: self.core]
            weights = rng.normal(size=self.core)
            weights *= (self.share / (weights @ weights)) ** 0.5 if self.core else 1
            for leaf in range(self.children):
                row = features[parent * self.children + leaf]
                free = np.setdiff1d(np.arange(self.d), shared)
                mine, own = rng.choice(free, self.own, replace=False), rng.normal(size=self.own)
                row[shared], row[mine] = weights, own * ((1 - self.share) / (own @ own)) ** 0.5
        rates = np.geomspace(self.spread, 1, self.parents)
        parents = rng.random((self.n, self.parents)) < self.together * rates / rates.mean()
        on = np.repeat(parents, self.children, axis=1) & (rng.random((self.n, self.leaves)) < self.given)
        constant = rng.normal(size=self.d)
        x = (on * rng.gamma(2.0, size=on.shape)) @ features + self.noise * rng.normal(size=(self.n, self.d))
        x += self.offset * constant / np.linalg.norm(constant)
        return torch.from_numpy(x).float(), torch.from_numpy(features).float()


SHAPES = {
    "4 parents of 4": PlantedTree(),
    "unequal frequencies": PlantedTree(spread=5),
    "noise 0.3": PlantedTree(noise=0.3),
    "active on a third": PlantedTree(together=0.4, given=0.8),
    "children all at once": PlantedTree(together=0.2, given=1.0),
    "6 parents of 3, far from zero": PlantedTree(parents=6, children=3, offset=3.0),
}


def ancestors(tree: HierarchicalSNMF, level: int = 1) -> np.ndarray:
    """Of each feature of the finest level the ancestor at another, by the largest links; one that leads nowhere is a
    group of its own.
    """
    reached = torch.eye(tree.ranks[0])
    for links in tree.links[:level]:
        largest = one_hot(links.argmax(dim=1), links.shape[1]) * (links.amax(dim=1, keepdim=True) > 0)
        reached = reached @ largest.float()
    own = reached.shape[1] + torch.arange(len(reached))
    return torch.where(reached.amax(dim=1) > 0, reached.argmax(dim=1), own).numpy()


def agreement(shape: PlantedTree, planted: torch.Tensor, tree: HierarchicalSNMF) -> float:
    """How well the found parents group the planted leaves, matched one to one with the found ones by cosine: the
    adjusted Rand index, 0 by chance and 1 at best.
    """
    features = tree.dictionaries[0].features.detach()
    rows, columns = linear_sum_assignment(-(planted @ normalize(features, dim=1).T).numpy())
    return float(adjusted_rand_score(rows // shape.children, ancestors(tree)[columns]))
