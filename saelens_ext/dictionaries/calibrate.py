"""Calibrate a partition on the first activations of a stream: its centre, its thresholds, its unit of strength."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saelens_ext.activations.stream import ActivationBatch
from saelens_ext.ops.calibration import ThresholdEstimate, pairwise_distance_percentiles
from saelens_ext.ops.spherical import SphericalCenter, unit_directions

CalibrationMode = Literal["across_documents", "within_batch"]


@dataclass(kw_only=True, frozen=True)
class Calibration:
    """What the first activations of a stream say about one hook."""

    center: Tensor
    """Origin of all directions, ``(d,)`` float32."""
    typical_norm: float
    """Median of |x - centre|, in units of the activation: the natural unit of steering strength."""
    thresholds: tuple[ThresholdEstimate, ...]
    """One per percentile asked for, with its interval."""
    n_activations: int
    """How many activations were used."""


def calibrate(
    batches: Sequence[ActivationBatch],
    hook_name: str,
    percentiles: Sequence[float],
    *,
    n_activations: int,
    calibration: CalibrationMode = "across_documents",
    seed: int = 0,
) -> Calibration:
    """Calibrate one hook on the first ``n_activations`` of some batches.

    Args:
        batches: the first batches of a stream, together at least ``n_activations`` long.
        hook_name: key of ``batch.activations``.
        percentiles: each in (0, 100).
        n_activations: how many to use.
        calibration: pairs "across_documents", or the paper's "within_batch".
        seed: of the sampling of rows and of the bootstrap.

    Raises:
        ValueError: only one document under "across_documents".

    Source: arXiv 2605.14347, centre and threshold.
    """
    ends = torch.tensor([len(batch) for batch in batches]).cumsum(0)
    x = torch.cat([batch.activations[hook_name] for batch in batches])[:n_activations]
    documents = torch.cat([batch.document_ids for batch in batches])[:n_activations]
    center = SphericalCenter(x.shape[1]).update(x).center
    units, norms = unit_directions(x, center)
    batch_ids = torch.searchsorted(ends, torch.arange(len(x)), right=True)
    options = {"calibration": calibration, "batch_ids": batch_ids, "seed": seed}
    thresholds = pairwise_distance_percentiles(units, documents, percentiles, **options) if percentiles else []
    return Calibration(
        center=center, typical_norm=float(norms.median()), thresholds=tuple(thresholds), n_activations=len(x)
    )
