"""One dictionary's directions as sums of a few of another's: what a broad feature splits into.

Symbols
    t  a direction of the target, of unit length;  B  unit directions of the basis, (m, d)
    w  non-negative weights, at most ``max_terms`` of them positive
    explained = 1 - |t - w B|^2, in [0, 1]: the share of t that the terms account for
    null  the same with the basis turned at random: terms that share nothing with the target but the space
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from scipy.optimize import nnls as exact_nnls
from scipy.stats import ortho_group
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.analysis.match import direction_rows
from saelens_ext.evals.evidence import Evidence, evidence_table
from saelens_ext.evals.verdicts import LEVEL
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.nnls.solve import nnls
from saelens_ext.ops.resampling import monte_carlo_p
from saelens_ext.report.evidence_section import EvidenceTable

BASIS, TURNED = "basis", "turned basis"
_ROUNDING = 1e-9
"""Weights of unit directions below this are rounding."""
_ROWS_SHOWN = 40


@dataclass(kw_only=True, eq=False)
class Decomposition(Evidence):
    """The directions of a target in those of a basis; tensors on the CPU, one row per latent of the target."""

    kind: ClassVar[str] = "decomposition"
    title: ClassVar[str] = "Decomposition"
    question: ClassVar[str] = "Are the directions of one dictionary sums of a few directions of the other?"
    unit: ClassVar[str] = "latent"
    unit_text: ClassVar[str] = (
        "A unit is a latent with a direction. All are written in one basis, so the test turns the whole basis instead "
        "of taking latents for independent, as the intervals do."
    )
    metrics: ClassVar[dict[str, str]] = {
        "explained": "share of a direction that its terms explain",
        "above_null": "share of directions that are explained better than by every turned basis",
        "n_terms": "terms of a direction",
    }
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    other_bounds: ClassVar[Mapping[str, tuple[float, float]]] = {"above_null": (0.0, 1.0)}

    terms: Tensor
    """Latents of the basis, the largest weight first: int64 ``(k, max_terms)``, -1 where there are fewer."""
    weights: Tensor
    """Their weights: float64 ``(k, max_terms)``, 0 where there are fewer."""
    explained: Tensor
    """Share of each direction that its terms explain, in [0, 1]: float64 ``(k,)``, NaN for a dead latent."""
    null: Tensor
    """The same with the basis turned at random: float64 ``(n_null, k)``."""

    @property
    def p_value(self) -> Tensor:
        """How often, per latent, a turned basis explains as much: (1 + #) / (n_null + 1), float64 ``(k,)``."""
        at_least = (self.null >= self.explained - 1e-12).sum(dim=0).double()
        return torch.where(self.explained.isnan(), torch.nan, (1 + at_least) / (len(self.null) + 1))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per latent of the target and term."""
        rows, places = (self.terms >= 0).nonzero(as_tuple=True)
        columns = {"latent": rows, "term": self.terms[rows, places], "weight": self.weights[rows, places]}
        columns |= {"explained": self.explained[rows], "p": self.p_value[rows]}
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})

    def comparisons(self, reference: str | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """The mean share explained against that of turned bases, one-sided: how often a turned one explains as much.

        Args:
            reference: "basis", the only method whose merit is asked.
            metric: "explained", the only one that is tested.
        """
        self._subjects(reference)
        _checks.choice(metric or self.headline, (self.headline,), "metric")
        mean, null = float(self.explained.nanmean()), self.null.nanmean(dim=1).numpy()
        p = monte_carlo_p(mean - 1e-12, null, side="greater")
        row = {"method": BASIS, "other": TURNED, "difference": mean - null.mean(), "low": np.nan, "high": np.nan}
        n = int((~self.explained.isnan()).sum())
        return pd.DataFrame([{**row, "p": p, "n_units": n, "n_undefined": len(self.explained) - n, "p_holm": p}])

    def verdict(self, reference: str | None = None) -> str:
        """How much of the directions the terms explain, and whether turned bases explain as much.

        Args:
            reference: as for :meth:`comparisons`.
        """
        found = self.comparisons(reference).iloc[0]
        means = self.summary().set_index(["metric", "method"])["estimate"]
        chance, p = 1 / (len(self.null) + 1), float(found["p"])
        start = (
            f"On average {means['n_terms', BASIS]:.1f} directions of the basis explain {means['explained', BASIS]:.0%} "
            f"of each of {found['n_units']} directions, turned bases {means['explained', TURNED]:.0%}"
        )
        above = (
            f"{means['above_null', BASIS]:.0%} are explained better than by every one of them ({chance:.0%} expected)"
        )
        if chance >= LEVEL:
            told = f"too few turns for any claim: the smallest p-value possible is {chance:.2g}"
        else:
            told = (
                f"{'more than' if p < LEVEL else 'which cannot be told from'} what the space alone gives (p = {p:.2g})"
            )
        return f"{start}; {told}. {above}."

    def _tables(self, *standard: EvidenceTable) -> tuple[EvidenceTable, ...]:
        """Behind the terms of the latents that are explained best."""
        table = self.to_dataframe()
        shown = table.sort_values("explained", ascending=False, kind="stable").head(_ROWS_SHOWN)
        note = f"Of the latents that are explained best, {_ROWS_SHOWN} terms of {len(table)}."
        return evidence_table("Terms", shown, note), *standard


@standard_modes(gradients=False)
def decompose_dictionary(
    target: SAE[Any] | Tensor,
    basis: SAE[Any] | Tensor,
    *,
    max_terms: int = 5,
    n_null: int = 20,
    n_bootstrap: int = 2000,
    confidence: float | int = 0.95,
    seed: int = 0,
) -> Decomposition:
    """Write every direction of a dictionary as a non-negative sum of a few directions of another.

    All weights are found together by exact non-negative least squares, the largest ``max_terms`` are kept, and these
    are fitted again. The null does the same with the basis turned by random rotations.

    Args:
        target: a SAELens SAE, ours or not, or directions ``(k, d)``.
        basis: the other, of the same width.
        max_terms: at most so many terms, at least 1.
        n_null: rotations, at least 1; 20 allow a p-value of 1/21.
        n_bootstrap: redraws of latents, for intervals.
        confidence: of the intervals, in (0, 1).
        seed: of the rotations and redraws.

    Raises:
        ValueError: other widths, no directions, entries that are not finite, or a number below 1.

    Examples:
        >>> found = sx.decompose_dictionary(partition, partition, n_null=2)
        >>> bool((found.explained > 0.999).all())  # every direction is a term of itself
        True

    Source: meta-SAEs (arXiv 2502.04878) decompose decoder directions by training; here the weights are exact.
    """
    _checks.positive(max_terms, "max_terms")
    _checks.positive(n_bootstrap, "n_bootstrap")
    _checks.between(confidence, 0, 1, "confidence")
    found = direction_rows(target, "target"), direction_rows(basis, "basis")
    rows = [torch.nn.functional.normalize(part.cpu().double(), dim=1) for part in found]
    if rows[0].shape[1] != rows[1].shape[1]:
        raise ValueError(
            f"target has directions of width {rows[0].shape[1]} and basis of {rows[1].shape[1]}; give dictionaries of "
            "the same width."
        )
    generator = np.random.default_rng(seed)
    alive = rows[0].any(dim=1)
    terms, weights, explained = _decomposed(rows[0], rows[1], max_terms)
    null = []
    for _ in range(_checks.positive(n_null, "n_null")):
        turn = torch.from_numpy(ortho_group.rvs(rows[1].shape[1], random_state=generator))
        null.append(_decomposed(rows[0], rows[1] @ turn, max_terms)[2])
    explained, null = (torch.where(alive, values, torch.nan) for values in (explained, torch.stack(null)))
    values = {
        ("explained", BASIS): explained,
        ("explained", TURNED): null.mean(dim=0),
        ("above_null", BASIS): (explained > null.amax(dim=0)).double(),
        ("n_terms", BASIS): (terms >= 0).sum(dim=1).double(),
    }
    latents = alive.nonzero()[:, 0].numpy()
    cells = [
        pd.DataFrame({"latent": latents, "method": method, "metric": metric, "value": one[alive].numpy()})
        for (metric, method), one in values.items()
    ]
    return Decomposition(
        cells=pd.concat(cells, ignore_index=True),
        kinds={BASIS: "unsupervised", TURNED: "control"},
        descriptions={
            BASIS: f"At most {max_terms} directions of the other dictionary, with weights that are not negative.",
            TURNED: f"The same with that dictionary turned at random, the mean of {n_null} turns.",
        },
        settings={
            "max_terms": max_terms, "n_null": n_null, "n_bootstrap": n_bootstrap, "confidence": confidence,
            "seed": seed, "n_target": len(terms), "n_basis": len(rows[1]),
        },
        terms=terms, weights=weights, explained=explained, null=null,
    )  # fmt: skip


def _decomposed(target: Tensor, basis: Tensor, max_terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, weights and the explained share of every row."""
    n = min(max_terms, len(basis))
    largest = nnls(target, basis).topk(n, dim=1)
    terms = torch.full((len(target), max_terms), -1)
    weights, explained = target.new_zeros(len(target), max_terms), target.new_zeros(len(target))
    for row, (t, chosen) in enumerate(zip(target, largest.indices)):
        fitted, residual = exact_nnls(basis[chosen].T.numpy(), t.numpy())
        order = np.argsort(-fitted, kind="stable")[: int((fitted > _ROUNDING).sum())]
        terms[row, : len(order)] = chosen[order.copy()]
        weights[row, : len(order)] = torch.from_numpy(fitted[order])
        explained[row] = max(0.0, 1 - residual**2)
    return terms, weights, explained
