"""Whether texts and prompts lie in the regions that training introduced or dropped, with either model.

Symbols
    share   fraction of a document's positions in some regions, averaged over the replicas of a side
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.evals.checkpoints.checkpoint_evidence import CHANGED, SIDES, CheckpointEvidence
from saelens_ext.evals.evidence import Evidence, corrected, evidence_table
from saelens_ext.ops.resampling import paired_units
from saelens_ext.report.evidence_section import EvidenceTable

TEXTS = "texts"
"""The group of the texts that the partitions were built from."""
BASE, TUNED = "base", "tuned"
_ROWS_SHOWN = 40
_SHOWN = (SIDES[1], "0")
"""The replica whose regions are shown one by one."""


class Reading(NamedTuple):
    """What one model has at the hook."""

    x: Tensor
    """Activations ``(n, d)``."""
    token_ids: Tensor
    documents: Tensor
    """Document, or prompt, of each: int64 ``(n,)``."""


@dataclass(kw_only=True, eq=False)
class PromptShift(Evidence):
    """How far prompts move into regions that training introduced; a unit is a prompt, or a document of the texts."""

    kind: ClassVar[str] = "prompt_shift"
    title: ClassVar[str] = "Shift of prompts"
    question: ClassVar[str] = "Do prompts lie in the regions that training introduced more than with the base model?"
    unit: ClassVar[str] = "prompt"
    unit_text: ClassVar[str] = 'A unit is a prompt, or, in the group "texts", a document that partitions were made of.'
    groups: ClassVar[tuple[str, ...]] = ("group",)
    metrics: ClassVar[dict[str, str]] = {
        "share_introduced": "share of positions in introduced regions of the tuned model",
        "share_dropped": "share of positions in dropped regions of the base model",
    }
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    regions: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Per group and region of the tuned model's replica "0" that any position lies in: its "state", the mean share of
    positions with the "base" and the "tuned" model, their "difference" with "low", "high", "p" (sign flips over
    prompts) and "p_holm" (over all rows).
    """

    def _tables(self, *standard: EvidenceTable) -> tuple[EvidenceTable, ...]:
        """With the shares of regions."""
        order = self.regions.sort_values("p_holm", kind="stable").head(_ROWS_SHOWN)
        note = f"The {_ROWS_SHOWN} regions with the smallest p-values of {len(self.regions)}, corrected over all."
        return *standard, evidence_table("Shares of regions", order, note)


def prompt_shift(
    fits: Mapping[str, Mapping[str, ExemplarFitResult]],
    checkpoints: CheckpointEvidence,
    readings: Mapping[str, Sequence[Reading]],
    *,
    confidence: float | int,
    seed: int,
) -> PromptShift:
    """Shares of positions by state of the region they lie in.

    Args:
        fits: replicas by side.
        checkpoints: their states.
        readings: by group, what the base and the tuned model have of the same prompts.
        confidence: of the intervals.
        seed: of the resampling.
    """
    rows: list[dict[str, Any]] = []
    tables = []
    states = {key: part["state"].to_numpy() for key, part in checkpoints.latents.groupby(["side", "replica"])}
    for group, both in readings.items():
        # Regions of the base and the tuned model's activations, by the partition that assigns them.
        found = {
            (side, name): [fit.dictionary.assign(read.x).regions.cpu() for read in both]
            for side in SIDES
            for name, fit in fits[side].items()
        }
        for number, (model, read) in enumerate(zip((BASE, TUNED), both)):
            for side, metric in zip(SIDES, ("share_dropped", "share_introduced")):
                for name in fits[side]:
                    regions = found[side, name][number].numpy()
                    inside = (regions >= 0) & (states[side, name][regions] == CHANGED[side])
                    shares = pd.Series(inside.astype(float)).groupby(read.documents.numpy()).mean()
                    where = {"group": group, "method": model, "replica": name, "metric": metric}
                    rows += [{**where, "prompt": f"{unit:06d}", "value": value} for unit, value in shares.items()]
        if group != TEXTS:
            tables.append(_regions(group, found[_SHOWN], states[_SHOWN], both, confidence, seed))
    regions = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"p": np.zeros(0)})
    return PromptShift(
        cells=pd.DataFrame(rows),
        kinds={TUNED: "unsupervised", BASE: "control"},
        descriptions={
            TUNED: "Activations of the tuned model.",
            BASE: "Activations of the base model on the same tokens, assigned to the same regions.",
        },
        settings={"confidence": confidence, "seed": seed},
        regions=corrected(regions),
    )


def _regions(
    group: str,
    found: Sequence[Tensor],
    states: np.ndarray,
    both: Sequence[Reading],
    confidence: float | int,
    seed: int,
) -> pd.DataFrame:
    """How the share of each region differs between the models, over prompts."""
    shares = []
    for regions, read in zip(found, both, strict=True):
        # Column 0 is for activations of no region, which equal the centre.
        taken = torch.nn.functional.one_hot(regions + 1, len(states) + 1)[:, 1:].double()
        n = torch.bincount(read.documents).double()
        sums = torch.zeros(len(n), len(states), dtype=torch.float64).index_add(0, read.documents, taken)
        shares.append((sums / n[:, None])[n > 0].numpy())
    base, tuned = shares
    rows = []
    for region in np.flatnonzero((base + tuned).any(axis=0)):
        generator = np.random.default_rng([seed, int(region)])
        paired = paired_units(tuned[:, region], base[:, region], generator=generator, confidence=confidence)
        where = {"group": group, "region": int(region), "state": states[region]}
        rows.append(
            where
            | {BASE: base[:, region].mean(), TUNED: tuned[:, region].mean()}
            | {name: getattr(paired, name) for name in ("difference", "low", "high", "p")}
        )
    return pd.DataFrame(rows)
