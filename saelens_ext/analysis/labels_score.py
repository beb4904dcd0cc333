"""How well a label tells members of a latent from random activations, and what shuffled labels would.

Symbols
    p, q  members and random activations scored, none of which made the label
    U     AUROC: the probability that a member scores above a random activation, ties counting half
    null  U with the p + q scores dealt out at random, the distribution of U for a label that says nothing
"""

from functools import cache
from typing import Any

import numpy as np
from scipy.stats import rankdata

LEVEL = 0.05
"""Probability at most with which a label that says nothing is taken for one that says something."""
FIGURES = ("auroc", "auroc_low", "auroc_high", "null_high", "p_value")


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
        random activation has a score.
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
