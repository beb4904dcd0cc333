"""How well a label tells members of a latent or a mode from others, and what shuffled labels would.

Symbols
    p, q  members and others scored, none of which made the label
    U     AUROC: the probability that a member scores above another, ties counting half
    null  U with the p + q scores dealt out at random, the distribution of U for a label that says nothing
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import rankdata

LEVEL = 0.05
"""Probability at most with which a label that says nothing is taken for one that says something."""
FIGURES = ("auroc", "auroc_low", "auroc_high", "null_high", "p_value")


@dataclass(frozen=True, kw_only=True)
class Label:
    """The label of one latent or one mode with its held-out score."""

    text: str
    """The label; empty where there is none."""
    output: str = ""
    """What the latent makes the model say, where a labeller described it; else empty."""
    auroc: float
    """U, in [0, 1]; NaN where nothing was left to score it on."""
    low: float
    """Lower limit of its 95 % interval."""
    high: float
    """Upper limit."""
    null_high: float
    """95 % quantile of U with shuffled labels."""
    p_value: float
    """Probability of a U as high with shuffled labels."""
    n_members: int
    """Members that it was scored on."""
    n_others: int
    """Random activations, or continuations of other modes, that it was scored on."""

    @property
    def distinguishes(self) -> bool:
        """Whether the label detects members better than shuffled labels do, at the 5 % level."""
        return self.p_value <= LEVEL

    @property
    def score_text(self) -> str:
        """The held-out score in words."""
        if not self.text:
            return "no label"
        if np.isnan(self.auroc):
            return "not scored: no example was set aside for it"
        figures = f"AUROC {self.auroc:.2f} [{self.low:.2f}, {self.high:.2f}]"
        chance = f"up to {self.null_high:.2f} by chance"
        return f"{figures}, {chance}" if self.distinguishes else f"not distinguishable from chance: {figures}, {chance}"


class Scorer:
    """Scores labels one by one, against ``n_null`` shuffles from a seed."""

    def __init__(self, n_null: int, seed: int):
        self._n_null = n_null
        # The first columns of a row are a random choice among so many, without replacement.
        self._choices = cache(
            lambda n: np.random.default_rng(seed).random((n_null, n)).argsort(axis=1).astype(np.int32)
        )

    def score(self, members: np.ndarray, others: np.ndarray) -> dict[str, Any]:
        """U, the 95 % quantile of the null, the probability of a U as high there, p and q.

        Scores that are NaN, which a labeller did not give, are left out; the figures are NaN where no member or no
        other has a score.
        """
        members, others = members[~np.isnan(members)], others[~np.isnan(others)]
        p, q = len(members), len(others)
        found = dict.fromkeys(("auroc", "null_high", "p_value"), np.nan) | {"n_members": p, "n_others": q}
        if min(p, q) == 0:
            return found
        ranks = rankdata(np.concatenate([members, others]))
        null = _auroc(ranks[self._choices(p + q)[:, :p]].sum(axis=1), p, q)
        u = float(_auroc(ranks[:p].sum(), p, q))
        reached = int((null >= u - 1e-12).sum())
        p_value = (1 + reached) / (1 + self._n_null)
        return found | {"auroc": u, "null_high": float(np.quantile(null, 1 - LEVEL)), "p_value": p_value}


def _auroc(rank_sum: Any, p: int, q: int) -> Any:
    return (rank_sum - p * (p + 1) / 2) / (p * q)
