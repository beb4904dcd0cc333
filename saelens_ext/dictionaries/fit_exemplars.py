"""Build ExemplarPartitions from a stream of activations: calibrate, then grow, in one pass over the model.

Every (hook, percentile) grows from the same forward passes; see :mod:`saelens_ext.dictionaries.grow_exemplars`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from saelens_ext import _checks
from saelens_ext._modes import standard_modes
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.grow_exemplars import ExemplarBuild, ExemplarFitConfig, OnMetrics

__all__ = ["ExemplarFitConfig", "ExemplarFitResult", "OnMetrics", "fit_exemplar_partition", "fit_exemplar_partitions"]


@standard_modes()
def fit_exemplar_partition(
    stream: ActivationStream,
    *,
    percentile: float | int = 10.0,
    threshold: float | int | None = None,
    on_metrics: OnMetrics | None = None,
    **options: Any,
) -> ExemplarFitResult:
    """Build one ExemplarPartition from a stream over one hook.

    Args:
        stream: activations of one hook; its ``max_tokens`` is the budget.
        percentile: percentile of the pairwise distances between activations of different documents, in (0, 100),
            within which an activation joins a region. Higher means fewer, wider regions.
        threshold: a cosine distance in (0, 2] to use instead.
        on_metrics: as for :func:`fit_exemplar_partitions`.
        **options: fields of :class:`ExemplarFitConfig`.

    Returns:
        The dictionary with its statistics and the reason why it stopped growing.

    Raises:
        ValueError: as for :func:`fit_exemplar_partitions`, and for a stream over several hooks.

    Examples:
        >>> fit = sx.fit_exemplar_partition(stream, percentile=20)
        >>> fit.dictionary.encode(activations).shape == (len(activations), fit.dictionary.cfg.d_sae)
        True
        >>> fit.threshold.low <= fit.threshold.threshold <= fit.threshold.high
        True
    """
    if len(stream.hook_names) != 1:
        raise ValueError(
            f"The stream has {len(stream.hook_names)} hooks; fit_exemplar_partitions fits several dictionaries."
        )
    _checks.between(percentile, 0, 100, "percentile")
    if threshold is None:
        (result,) = _fit(stream, (percentile,), None, ExemplarFitConfig.of(options), on_metrics)
    else:
        _checks.between(threshold, 0, 2, "threshold", closed_high=True)
        (result,) = _fit(stream, (), threshold, ExemplarFitConfig.of(options), on_metrics)
    return result


@standard_modes()
def fit_exemplar_partitions(
    stream: ActivationStream,
    percentiles: Sequence[float | int] = (1, 2, 4, 8, 10),
    *,
    on_metrics: OnMetrics | None = None,
    **options: Any,
) -> dict[tuple[str, float | int], ExemplarFitResult]:
    """Build an ExemplarPartition for every (hook, percentile), in one pass over the model.

    Args:
        stream: activations of one or several hooks; its ``max_tokens`` is the budget.
        percentiles: resolutions, each in (0, 100); higher means fewer, wider regions.
        on_metrics: called after each batch for each growing dictionary with ((hook, percentile), activations seen,
            figures).
        **options: fields of :class:`ExemplarFitConfig`.

    Returns:
        An ExemplarFitResult per (hook name as given to the stream, percentile).

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
    if len(percentiles) == 0 or len(set(percentiles)) != len(percentiles):
        raise ValueError(f"percentiles must be at least one number and all different, got {tuple(percentiles)}.")
    results = _fit(stream, tuple(percentiles), None, ExemplarFitConfig.of(options), on_metrics)
    return {(result.hook_name, percentile): result for result, percentile in zip(results, itertools.cycle(percentiles))}


def _fit(
    stream: ActivationStream,
    percentiles: Sequence[float | int],
    threshold: float | int | None,
    config: ExemplarFitConfig,
    on_metrics: OnMetrics | None,
) -> list[ExemplarFitResult]:
    percentiles = [float(_checks.between(percentile, 0, 100, "percentile")) for percentile in percentiles]
    build = ExemplarBuild(stream.requested_hook_names, percentiles, threshold, config, on_metrics)
    for batch in stream:
        build.take(batch)
        if build.done:
            break
    return build.finish(stream)
