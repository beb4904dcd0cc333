"""Calibrate a partition on the first activations of a stream: its centre, its thresholds, its unit of strength."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saelens_ext.activations.batch import COLUMNS, ActivationBatch
from saelens_ext.ops.calibration import ThresholdEstimate, nearest_neighbour_thresholds, pairwise_distance_percentiles
from saelens_ext.ops.spherical import SphericalCenter, unit_directions

CalibrationMode = Literal["across_documents", "within_batch"]
ThresholdRule = Literal["percentile", "nearest_neighbour"]


@dataclass(kw_only=True, frozen=True)
class Calibration:
    """What the first activations of a stream say about one hook."""

    center: Tensor
    """Origin of all directions, ``(d,)`` float32."""
    typical_norm: float
    """Median of |x - centre|, in units of the activation: the natural unit of steering strength."""
    thresholds: tuple[ThresholdEstimate, ...]
    """One per resolution asked for, with its interval."""
    n_activations: int
    """How many activations were used."""


def calibrate(
    batches: Sequence[ActivationBatch],
    hook_name: str,
    resolutions: Sequence[float],
    *,
    n_activations: int,
    calibration: CalibrationMode = "across_documents",
    threshold_rule: ThresholdRule = "percentile",
    seed: int = 0,
) -> Calibration:
    """Calibrate one hook on the first ``n_activations`` of some batches, which are together at least as long.

    Resolutions are percentiles in (0, 100), or factors of the median distance to the nearest neighbour; ``seed`` is of
    the sampling of rows and of the bootstrap.

    Raises:
        ValueError: only one document under "across_documents", or a factor whose threshold is above 2.

    Source: arXiv 2605.14347, centre and threshold.
    """
    ends = torch.tensor([len(batch) for batch in batches]).cumsum(0)
    x = torch.cat([batch.activations[hook_name] for batch in batches])[:n_activations]
    documents = torch.cat([batch.document_ids for batch in batches])[:n_activations]
    center = SphericalCenter(x.shape[1]).update(x).center.to(x.device)
    units, norms = unit_directions(x, center)
    thresholds: list[ThresholdEstimate] = []
    if resolutions and threshold_rule == "nearest_neighbour":
        thresholds = nearest_neighbour_thresholds(units, documents, resolutions, seed=seed)
    elif resolutions:
        batch_ids = torch.searchsorted(ends, torch.arange(len(x)), right=True)
        options = {"calibration": calibration, "batch_ids": batch_ids, "seed": seed}
        thresholds = pairwise_distance_percentiles(units, documents, resolutions, **options)
    return Calibration(
        center=center, typical_norm=float(norms.median()), thresholds=tuple(thresholds), n_activations=len(x)
    )


def held_tensors(batches: Sequence[ActivationBatch], hook_names: Sequence[str]) -> dict[str, Tensor]:
    """Batches that are held for a calibration, as tensors that can be saved; of the activations those of some hooks."""
    if not batches:
        return {}
    joined = ActivationBatch.join(batches)
    tensors = {column: getattr(joined, column) for column in (*COLUMNS, "windows")}
    tensors |= {f"activations.{name}": joined.activations[name] for name in hook_names}
    return tensors | {
        "n_rows": torch.tensor([len(batch) for batch in batches]),
        "n_windows": torch.tensor([len(batch.windows) for batch in batches]),
        "first_sequence_ids": torch.tensor([batch.first_sequence_id for batch in batches]),
    }


def held_batches(
    tensors: Mapping[str, Tensor], hook_names: Sequence[str], device: torch.device
) -> list[ActivationBatch]:
    """The batches that :func:`held_tensors` was given, with the activations on a device."""
    if not tensors:
        return []
    rows, windows = tensors["n_rows"].tolist(), tensors["n_windows"].tolist()
    columns = {name: tensors[name].split(rows) for name in COLUMNS}
    columns["windows"] = tensors["windows"].split(windows)
    activations = {name: tensors[f"activations.{name}"].to(device).split(rows) for name in hook_names}
    return [
        ActivationBatch(
            activations={name: parts[number] for name, parts in activations.items()},
            first_sequence_id=first,
            **{name: parts[number] for name, parts in columns.items()},
        )
        for number, first in enumerate(tensors["first_sequence_ids"].tolist())
    ]
