"""What of a dictionary is found again when it is built again: replicas from other orders of the data, or other data.

Symbols
    replica    a dictionary built as the others, but for a seed
    cosine     of a latent's direction with the nearest one of another replica
    above      whether that is nearer than ``level`` of chance's best cosines
    N, c       members and coherence of a region; log10(N c^2) is what predicts that it is found again
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from scipy.stats import ortho_group
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.analysis.match import Center, SideMatch, direction_rows, match_dictionaries
from saelens_ext.analysis.match_null import Null
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.evals.evidence import Evidence
from saelens_ext.evals.replicas import all_matches
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import wide
from saelens_ext.ops.statistics import rank_correlation

REPLICAS, TURNED = "replicas", "turned replicas"


@dataclass(kw_only=True, eq=False)
class StabilityEvidence(Evidence):
    """How far replicas of a dictionary agree; a unit is a replica."""

    kind: ClassVar[str] = "stability"
    title: ClassVar[str] = "Stability"
    question: ClassVar[str] = "Are the directions of a dictionary found again when it is built again?"
    unit: ClassVar[str] = "replica"
    unit_text: ClassVar[str] = (
        "A unit is a replica, whose directions are looked for in every other; the figures are means over the others. "
        "Replicas share partners, so intervals over them are somewhat too narrow."
    )
    metrics: ClassVar[dict[str, str]] = {
        "share_above": "share of directions found again beyond chance",
        "share_mutual": "share of directions that are each other's nearest and beyond chance",
        "median_cosine": "median cosine with the nearest direction",
        "predictor_correlation": "rank correlation of log10(N c^2) with the mean cosine",
    }
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    cosines: dict[str, Tensor] = field(default_factory=dict)
    """By replica, the cosine of each of its latents with the nearest direction of every other, in their order: float64
    ``(k, R - 1)``, NaN for a latent without direction.
    """
    cutoffs: dict[str, Tensor] = field(default_factory=dict)
    """The cosine that chance stays within, by replica and other: float64 ``(R - 1,)``."""

    def found_again(self, replica: str) -> Tensor:
        """Share of the other replicas in which each latent is found again beyond chance, in [0, 1]: float64 ``(k,)``.

        Raises:
            ValueError: no such replica.
        """
        name = _checks.choice(replica, tuple(self.cosines), "replica")
        return (self.cosines[name] > self.cutoffs[name]).double().mean(dim=1)


@standard_modes(gradients=False)
def dictionary_stability(
    replicas: Mapping[str, SAE[Any] | ExemplarFitResult | Tensor],
    *,
    null: Null = "directions",
    level: float = 0.99,
    center: Center = "own",
    n_permutations: int = 10_000,
    confidence: float | int = 0.95,
    seed: int = 0,
) -> StabilityEvidence:
    """Look for every direction of each replica in all others, beside the same in others turned at random.

    Args:
        replicas: at least 2 by name, of the same width: dictionaries of any kind, the results of their fits, or
            directions ``(k, d)``. With fits, it is also asked how well members and coherence predict what is found
            again: those of one replica, judged on the others.
        null: what chance is, as for :func:`~saelens_ext.analysis.match.match_dictionaries`, as the two that follow.
        level: fraction of chance's best cosines that the cutoff is above, in (0, 1).
        center: "own" or "shared".
        n_permutations: assignments of signs in the test against turned replicas.
        confidence: of the intervals, in (0, 1).
        seed: of the null and the turns.

    Raises:
        ValueError: fewer than 2 replicas, or as :func:`~saelens_ext.analysis.match.match_dictionaries`.

    Examples:
        >>> fits = {str(seed): sx.fit_exemplar_partition(stream, percentile=20) for seed in range(2)}
        >>> found = sx.dictionary_stability(fits)
        >>> bool((found.found_again("0") == 1).all())  # equal builds are found again
        True

    Source: the predictor is that of arXiv 2605.14347; the cutoff from chance, turned replicas and the test of the
    predictor on other replicas are ours.
    """
    names = list(replicas)
    if len(names) < 2:
        raise ValueError(
            f"replicas must be at least 2 dictionaries by name, got {len(names)}: what is found again takes another."
        )
    parts: dict[str, Any] = {
        name: one.dictionary if isinstance(one, ExemplarFitResult) else one for name, one in replicas.items()
    }
    options: dict[str, Any] = {"null": null, "level": level, "one_to_one": False, "seed": seed}
    generator = np.random.default_rng(seed)
    sides = all_matches(parts, center=center, **options)
    rows = []
    for name, other in permutations(names, 2):
        own, theirs = (direction_rows(parts[each], each).float().cpu() for each in (name, other))
        turn = torch.from_numpy(ortho_group.rvs(theirs.shape[1], random_state=generator)).float()
        turned = match_dictionaries(own, theirs @ turn, **options)
        rows += _figures(name, other, REPLICAS, sides[name, other], sides[other, name])
        rows += _figures(name, other, TURNED, turned.first, turned.second)
    others = {name: [sides[name, other] for other in names if other != name] for name in names}
    cosines = {name: torch.stack([side.cosine for side in found], dim=1) for name, found in others.items()}
    rows += _predicted(replicas, cosines)
    return StabilityEvidence(
        cells=pd.DataFrame(rows),
        kinds={REPLICAS: "unsupervised", TURNED: "control"},
        descriptions={
            REPLICAS: "Each replica's directions, looked for in every other replica.",
            TURNED: "The same with the other replica turned at random: what the space alone gives.",
        },
        settings={
            "null": null, "level": level, "center": center, "confidence": confidence,
            "n_permutations": n_permutations, "seed": seed, "n_latents": {n: len(one) for n, one in cosines.items()},
        },
        cosines=cosines,
        cutoffs={
            name: torch.tensor([side.cutoff for side in found], dtype=torch.float64) for name, found in others.items()
        },
    )  # fmt: skip


def _figures(name: str, other: str, method: str, own: SideMatch, theirs: SideMatch) -> list[dict[str, Any]]:
    """What one replica's directions find in another."""
    both = own.mutual & own.above & theirs.above[own.nearest.clamp_min(0)]
    values = {"share_above": own.share, "share_mutual": float(both.double().mean())}
    values["median_cosine"] = float(own.cosine.nanmedian())
    where = {"replica": name, "method": method, "other": other}
    return [{**where, "metric": metric, "value": value} for metric, value in values.items()]


def _predicted(replicas: Mapping[str, Any], cosines: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """How well the statistics of each fit rank what the other replicas have of it."""
    rows = []
    for name, one in replicas.items():
        if isinstance(one, ExemplarFitResult):
            predictor = wide(one.counts) * wide(one.coherence).square()
            known = predictor.isfinite() & (predictor > 0)
            value = rank_correlation(predictor[known].log10().numpy(), cosines[name].mean(dim=1)[known].numpy())
            if np.isfinite(value):
                metric = {"metric": "predictor_correlation", "value": value}
                rows.append({"replica": name, "method": REPLICAS, "other": "all", **metric})
    return rows
