"""Build ExemplarPartitions from activations: calibrate, then grow, in one pass over the model.

Every (hook, percentile) grows from the same forward passes; see :mod:`saelens_ext.dictionaries.grow_exemplars`.
"""

import itertools
from collections.abc import Sequence

from torch import Tensor
from typing_extensions import Unpack

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.dictionaries.activation_matrix import ActivationSource
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.grow_exemplars import (
    ExemplarBuild,
    ExemplarFitConfig,
    ExemplarFitOptions,
    ExemplarGrowthOptions,
    OnMetrics,
)
from saelens_ext.ops.modes import standard_modes

__all__ = ["ExemplarFitConfig", "ExemplarFitResult", "OnMetrics", "fit_exemplar_partition", "fit_exemplar_partitions"]

_ROWS = 4096
"""Rows of a matrix that are clustered at once."""


@_checks.names_options(ExemplarFitConfig)
@standard_modes()
def fit_exemplar_partition(
    source: ActivationStream | Tensor,
    *,
    percentile: float | int = 10.0,
    neighbour_factor: float | int = 1.0,
    threshold: float | int | None = None,
    calibration: str | ExemplarFitResult = "across_documents",
    document_ids: Tensor | None = None,
    hook_name: str | None = None,
    on_metrics: OnMetrics | None = None,
    **options: Unpack[ExemplarGrowthOptions],
) -> ExemplarFitResult:
    """Build one ExemplarPartition from a stream over one hook, or from a matrix of activations.

    Args:
        source: activations of one hook, whose ``max_tokens`` is the budget; or activations ``(n, d)``, in an order.
        percentile: percentile of the pairwise distances between activations of different documents, in (0, 100),
            within which an activation joins a region. Higher means fewer, wider regions.
        neighbour_factor: under ``threshold_rule="nearest_neighbour"`` used instead of the percentile: the threshold is
            so many times the median distance to the nearest neighbour. Higher means fewer, wider regions.
        threshold: a cosine distance in (0, 2] to use instead of either; the centre is still calibrated.
        calibration: how to calibrate, as in :class:`ExemplarFitConfig`; or another fit, whose centre and threshold are
            used as they are, so that the two partitions can be compared.
        document_ids: the document of each row of a matrix, integers ``(n,)``; None: each is one of its own.
        hook_name: where a matrix was read; kept in the metadata.
        on_metrics: as for :func:`fit_exemplar_partitions`.
        **options: further fields of :class:`ExemplarFitConfig`.

    Returns:
        The dictionary with its statistics and the reason why it stopped growing.

    Raises:
        ValueError: as for :func:`fit_exemplar_partitions`; a stream over several hooks; a matrix that is not floating
            point; a threshold beside another fit, or a fit of activations of another width.

    Examples:
        >>> fit = sx.fit_exemplar_partition(stream, percentile=20)
        >>> fit.dictionary.encode(activations).shape == (len(activations), fit.dictionary.cfg.d_sae)
        True
        >>> fit.threshold.low <= fit.threshold.threshold <= fit.threshold.high
        True
        >>> again = sx.fit_exemplar_partition(activations, calibration=fit)
        >>> again.threshold == fit.threshold
        True
    """
    if isinstance(source, ActivationStream) and len(source.hook_names) != 1:
        raise ValueError(f"The stream has {len(source.hook_names)} hooks: use fit_exemplar_partitions.")
    given = ActivationSource.of(source, hook_name, document_ids=document_ids, batch_size=_ROWS)
    _checks.between(percentile, 0, 100, "percentile")
    if threshold is not None:
        _checks.between(threshold, 0, 2, "threshold", closed_high=True)
    like = calibration if isinstance(calibration, ExemplarFitResult) else None
    if like is not None:
        if threshold is not None:
            raise ValueError("calibration is a fit, whose threshold is used: leave out threshold, or calibrate anew.")
        d_in = given.stream.d_in[given.hook_name]
        if d_in != like.dictionary.cfg.d_in:
            raise ValueError(f"calibration is a fit of {like.dictionary.cfg.d_in} numbers per activation, got {d_in}.")
    fields = options if like is not None else {**options, "calibration": calibration}
    config = _checks.from_options(ExemplarFitConfig, fields, "The fit")
    resolution = percentile if config.threshold_rule == "percentile" else neighbour_factor
    (result,) = _fit(given.stream, () if threshold is not None else (resolution,), threshold, config, on_metrics, like)
    return result


@_checks.names_options(ExemplarFitConfig)
@standard_modes()
def fit_exemplar_partitions(
    stream: ActivationStream,
    percentiles: Sequence[float | int] = (1, 2, 4, 8, 10),
    *,
    neighbour_factors: Sequence[float | int] = (1, 1.5, 2, 2.5),
    on_metrics: OnMetrics | None = None,
    **options: Unpack[ExemplarFitOptions],
) -> dict[tuple[str, float | int], ExemplarFitResult]:
    """Build an ExemplarPartition for every (hook, percentile), or factor, in one pass over the model.

    Args:
        stream: activations of one or several hooks; its ``max_tokens`` is the budget.
        percentiles: resolutions, each in (0, 100); higher means fewer, wider regions.
        neighbour_factors: used instead under ``threshold_rule="nearest_neighbour"``, see
            :func:`fit_exemplar_partition`; each above 0.
        on_metrics: called after each batch for each growing dictionary with ((hook, percentile or factor), activations
            seen, figures).
        **options: fields of :class:`ExemplarFitConfig`.

    Returns:
        An ExemplarFitResult per (hook name as given to the stream, percentile or factor).

    Raises:
        ValueError: no usable activation, fewer than ``calibration_activations``, only one document, an option out of
            range or unknown, or activations that are all alike.

    Examples:
        >>> fits = sx.fit_exemplar_partitions(stream, percentiles=(20, 40))
        >>> sorted(fits)
        [('blocks.1.hook_out', 20), ('blocks.1.hook_out', 40)]
        >>> len(fits["blocks.1.hook_out", 20].counts) >= len(fits["blocks.1.hook_out", 40].counts)
        True

    Source: arXiv 2605.14347, construction. Percentiles across documents, their intervals and the unseen-mass rule are
    ours: the paper's thresholds move with the batch size, and its rule waits for one lucky batch.
    """
    config = _checks.from_options(ExemplarFitConfig, options, "The fit")
    by_percentile = config.threshold_rule == "percentile"
    name, given = ("percentiles", percentiles) if by_percentile else ("neighbour_factors", neighbour_factors)
    if len(given) == 0 or len(set(given)) != len(given):
        raise ValueError(f"{name} must be at least one number and all different, got {tuple(given)}.")
    results = _fit(stream, tuple(given), None, config, on_metrics)
    return {(result.hook_name, resolution): result for result, resolution in zip(results, itertools.cycle(given))}


def _fit(
    stream: ActivationStream,
    resolutions: Sequence[float | int],
    threshold: float | int | None,
    config: ExemplarFitConfig,
    on_metrics: OnMetrics | None,
    like: ExemplarFitResult | None = None,
) -> list[ExemplarFitResult]:
    name, most = ("percentile", 100) if config.threshold_rule == "percentile" else ("neighbour_factor", float("inf"))
    resolutions = [float(_checks.between(value, 0, most, name)) for value in resolutions]
    names = stream.requested_hook_names
    build = ExemplarBuild(names, resolutions, threshold, config, on_metrics, like=like, device=stream.device)
    for batch in stream:
        build.take(batch)
        if build.done:
            break
    return build.finish(stream)
