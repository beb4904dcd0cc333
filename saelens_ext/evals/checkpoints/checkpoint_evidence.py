"""What :func:`compare_checkpoints` gives: states of latents, how far two sides drifted, and whether labels matter."""

import math
from dataclasses import dataclass, field
from itertools import combinations
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.evals.evidence import Evidence, evidence_table
from saelens_ext.evals.verdicts import LEVEL
from saelens_ext.ops.resampling import monte_carlo_p
from saelens_ext.report.evidence_section import EvidenceTable

SIDES = ("first", "second")
CHANGED = {"first": "dropped", "second": "introduced"}
ACROSS, WITHIN = "across", "within"
MIN_REPLICAS = 3
"""Per side, for a test of drift: with fewer, too few labellings differ."""
_PAIRS_SHOWN = 30


class Drift(NamedTuple):
    """How much farther apart the two sides are than replicas of one side."""

    difference: float
    """Mean over pairs of replicas within a side, minus the mean over pairs across."""
    p: float
    """Share of all labellings of replicas with sides that give as large a difference; NaN below 3 + 3 replicas."""
    smallest_p: float
    """What p can be at the least."""
    n_labellings: int


@dataclass(kw_only=True, eq=False)
class CheckpointEvidence(Evidence):
    """Which latents of two models' dictionaries persist, are dropped or are introduced; a unit is a replica."""

    kind: ClassVar[str] = "checkpoints"
    title: ClassVar[str] = "Checkpoints"
    question: ClassVar[str] = "Are two models' dictionaries farther apart than dictionaries of one of them?"
    unit: ClassVar[str] = "replica"
    unit_text: ClassVar[str] = (
        "A unit is a replica: a dictionary built as the others of its side, but for a seed. Replicas share partners, "
        "so intervals over them are somewhat too narrow; the test permutes whole replicas over the sides."
    )
    groups: ClassVar[tuple[str, ...]] = ("side",)
    metrics: ClassVar[dict[str, str]] = {
        "median_cosine": "median cosine with the nearest direction",
        "share_changed": "share of latents that are reproducible and farther from the other side",
        "share_persisted": "share of latents that are reproducible and found on the other side",
        "share_reproducible": "share of latents found in every other replica of their side beyond chance",
        "agreement": "adjusted mutual information of the regions of the same tokens",
    }
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    latents: pd.DataFrame = field(default_factory=pd.DataFrame)
    """One row per latent of every replica: "side", "replica", "latent", "quintile" (1 to 5; 1 for all without fits),
    "state", "own" (mean cosine with the nearest in other replicas of its side), "across" (median cosine with the
    nearest of the other side), and the nearest latent of all, "nearest" of replica "other".
    """
    replicas: tuple[tuple[str, str], ...] = ()
    """Side and name of each replica."""
    pairs: dict[str, Tensor] = field(default_factory=dict)
    """What each replica finds in each other, ``(R, R)``: "median_cosine", and "agreement" where texts were read."""

    def drift(self, metric: str = "median_cosine") -> Drift:
        """How much more alike replicas of one side are than replicas of two.

        Args:
            metric: "median_cosine", or "agreement" where models and texts were given.

        Raises:
            ValueError: no such metric.
        """
        values = self.pairs[_checks.choice(metric, tuple(self.pairs), "metric")].numpy()
        is_first = np.array([side == SIDES[0] for side, _ in self.replicas])
        observed = _difference(values, is_first)
        n, n_first = len(is_first), int(is_first.sum())
        n_labellings = math.comb(n, n_first)
        # With as many replicas on either side, exchanging the sides is another labelling of the same difference.
        smallest = (2 if 2 * n_first == n else 1) / n_labellings
        if min(n_first, n - n_first) < MIN_REPLICAS:
            return Drift(observed, math.nan, smallest, n_labellings)
        n_permutations = int(self.settings["n_permutations"])
        if n_labellings <= n_permutations:
            labellings = (np.isin(np.arange(n), chosen) for chosen in combinations(range(n), n_first))
            null = np.array([_difference(values, labels) for labels in labellings])
            return Drift(observed, float((null >= observed - 1e-12).mean()), smallest, n_labellings)
        generator = np.random.default_rng(self.settings["seed"])
        null = np.array([_difference(values, generator.permutation(is_first)) for _ in range(n_permutations)])
        p = monte_carlo_p(observed - 1e-12, null, side="greater")
        return Drift(observed, p, 1 / (n_permutations + 1), n_labellings)

    def by_quintile(self) -> pd.DataFrame:
        """Latents per state, for each side and quintile of log10(N c^2)."""
        counts = self.latents.groupby(["side", "quintile", "state"]).size().unstack("state", fill_value=0)
        states = ["persisted", *CHANGED.values(), "undecided"]
        return counts.reindex(columns=states, fill_value=0).rename_axis(columns=None).reset_index()

    def matched_pairs(self) -> pd.DataFrame:
        """The persisted latents of the first side with the nearest latent of the second, the nearest first."""
        rows = self.latents[(self.latents["side"] == SIDES[0]) & (self.latents["state"] == "persisted")]
        columns = ["replica", "latent", "other", "nearest", "own", "across"]
        return rows.sort_values("across", ascending=False, kind="stable")[columns].reset_index(drop=True)

    def comparisons(self, reference: str | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """Across against within, over both sides; the p-value permutes replicas over the sides.

        Args:
            reference: "across", the only method whose merit is asked.
            metric: one of those with a value per pair of replicas, "median_cosine" by default.
        """
        self._subjects(reference)
        found = self.drift(metric or self.headline)
        row = {
            "method": ACROSS, "other": WITHIN, "difference": -found.difference, "low": np.nan, "high": np.nan,
            "p": found.p, "n_units": len(self.replicas), "n_undefined": 0, "p_holm": found.p,
        }  # fmt: skip
        return pd.DataFrame([row])

    def verdict(self, reference: str | None = None) -> str:
        """Whether the sides are told apart, and how many latents are in each state.

        Args:
            reference: as for :meth:`comparisons`.
        """
        self._subjects(reference)
        lines = [self._drift_text(metric) for metric in self.pairs]
        means = self.summary().set_index(["side", "metric", "method"])["estimate"]
        for side in SIDES:
            shares = {name: means[side, f"share_{name}", ACROSS] for name in ("reproducible", "persisted", "changed")}
            line = (
                f"Of the latents of the {side} side, {shares['reproducible']:.0%} are reproducible; "
                f"{shares['persisted']:.0%} persist and {shares['changed']:.0%} are {CHANGED[side]}"
            )
            control = means.get((side, "share_changed", WITHIN))
            if control is not None:
                line += f" ({control:.0%} with one replica of the side itself in the place of the other side)"
            lines.append(f"{line}.")
        return "\n".join(lines)

    def _drift_text(self, metric: str) -> str:
        found, words = self.drift(metric), self.metrics[metric]
        sizes = " + ".join(str(sum(own == side for own, _ in self.replicas)) for side in SIDES)
        start = f"The {words} is {found.difference:+.3f} higher within a side than across"
        if math.isnan(found.p):
            return f"{start}; a test needs at least {MIN_REPLICAS} + {MIN_REPLICAS} replicas, got {sizes}."
        if found.smallest_p >= LEVEL:
            return (
                f"{start} (p = {found.p:.2g}). Too few replicas for any claim: with {sizes} the smallest p-value "
                f"possible is {found.smallest_p:.2g}, and a claim needs one below {LEVEL:g}; 3 + 4 can give one."
            )
        if found.p < LEVEL:
            return f"{start}, more than relabelling the replicas gives (p = {found.p:.2g}): the sides differ."
        return f"{start}, which cannot be told from relabelling the replicas (p = {found.p:.2g})."

    def _tables(self, *standard: EvidenceTable) -> tuple[EvidenceTable, ...]:
        """With the latents by state, and the nearest pairs."""
        states = evidence_table("States", self.by_quintile(), "Latents of all replicas; quintiles of log10(N c^2).")
        nearest = f"The {_PAIRS_SHOWN} nearest pairs of persisted latents"
        note = f"{nearest}: mean cosine in replicas of its side, and median across."
        return *standard, states, evidence_table("Matched pairs", self.matched_pairs().head(_PAIRS_SHOWN), note)


def _difference(values: np.ndarray, is_first: np.ndarray) -> float:
    """Mean within a side minus mean across."""
    same = is_first[:, None] == is_first[None]
    np.fill_diagonal(off := np.ones_like(same), False)
    return float(values[same & off].mean() - values[~same].mean())
