"""Build ExemplarPartitions from a stream of activations: calibrate, then grow, in one pass over the model.

The first activations of the stream calibrate the centre and the thresholds and are then clustered like all others, so
nothing is read twice and none is skipped. Every (hook, percentile) grows from the same forward passes.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from transformer_lens import HookedTransformer

from saelens_ext import _checks
from saelens_ext.activations import ActivationBatch, ActivationStream
from saelens_ext.dictionaries.calibrate import Calibration, CalibrationMode, calibrate
from saelens_ext.dictionaries.exemplar_partition import Basis, ExemplarPartition, Readout
from saelens_ext.dictionaries.fit_result import FitResult, Provenance
from saelens_ext.models import resolve_hook
from saelens_ext.ops.calibration import ThresholdEstimate
from saelens_ext.ops.leader_clustering import LeaderClustering
from saelens_ext.ops.statistics import UnseenMass, unseen_mass

logger = logging.getLogger(__name__)

Stop = Literal["budget", "unseen_mass", "paper"]
OnMetrics = Callable[[tuple[str, float | None], int, dict[str, float]], None]

DEFAULT_CALIBRATION = 20_000
CHECK_EVERY = 1024


@dataclass(kw_only=True, frozen=True)
class ExemplarFitConfig:
    """Options of a fit."""

    calibration_activations: int | None = None
    """How many of the stream's first activations calibrate; by default 20,000, or all there are."""
    calibration: str = "across_documents"
    """"across_documents": percentiles over pairs from different documents, whatever the batch size; "within_batch":
    the paper's mean of within-batch percentiles, which moves with the batch size."""
    stop: str = "budget"
    """When a dictionary stops growing, other than at the end of the stream. "budget": only there. "unseen_mass": once
    the 95% limit of the unseen mass, judged by the last half of the stream, is at most ``unseen_mass_tolerance``, checked every 1,024 activations.
    "paper": after ``saturation_window`` batches in a row that founded no region."""
    unseen_mass_tolerance: float = 0.01
    """Share of further activations that may found a region, in (0, 1)."""
    saturation_window: int = 1
    """Batches."""
    basis: str = "exemplar"
    """Rows that the dictionaries encode and decode with."""
    readout: str = "top_k"
    """How they turn activations into codes."""
    k: int = 1
    """Latents that the top-k readouts keep."""
    seed: int = 0
    """Of the sampling of calibration pairs and of the bootstrap of the threshold's interval."""

    def __post_init__(self) -> None:
        for name, allowed in (("calibration", CalibrationMode), ("stop", Stop), ("basis", Basis), ("readout", Readout)):
            _checks.choice(getattr(self, name), get_args(allowed), name)
        _checks.between(self.unseen_mass_tolerance, 0, 1, "unseen_mass_tolerance")
        _checks.positive(self.saturation_window, "saturation_window")
        _checks.positive(self.k, "k")
        if self.calibration_activations is not None and _checks.positive(self.calibration_activations, "calibration_activations") < 2:
            raise ValueError("calibration_activations must be at least 2, the fewest that have a distance.")

    @classmethod
    def of(cls, options: dict[str, Any]) -> "ExemplarFitConfig":
        """The config from keyword options; an option it does not know is a ValueError with near matches."""
        _checks.known_keys(options, [field.name for field in fields(cls)], "The fit")
        return cls(**options)


def fit_exemplar_partition(
    stream: ActivationStream,
    *,
    percentile: float | int = 10.0,
    threshold: float | int | None = None,
    on_metrics: OnMetrics | None = None,
    **options: Any,
) -> FitResult:
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
    """
    if len(stream.hook_names) != 1:
        raise ValueError(f"The stream has {len(stream.hook_names)} hooks; fit_exemplar_partitions fits several dictionaries.")
    _checks.between(percentile, 0, 100, "percentile")
    if threshold is None:
        (result,) = _fit(stream, (percentile,), None, ExemplarFitConfig.of(options), on_metrics)
    else:
        _checks.between(threshold, 0, 2, "threshold", closed_high=True)
        (result,) = _fit(stream, (), threshold, ExemplarFitConfig.of(options), on_metrics)
    return result


def fit_exemplar_partitions(
    stream: ActivationStream,
    percentiles: Sequence[float | int] = (1, 2, 4, 8, 10),
    *,
    on_metrics: OnMetrics | None = None,
    **options: Any,
) -> dict[tuple[str, float | int], FitResult]:
    """Build an ExemplarPartition for every (hook, percentile), in one pass over the model.

    Args:
        stream: activations of one or several hooks; its ``max_tokens`` is the budget.
        percentiles: resolutions, each in (0, 100); higher means fewer, wider regions.
        on_metrics: called after each batch for each growing dictionary with ((hook, percentile), activations seen, figures).
        **options: fields of :class:`ExemplarFitConfig`.

    Returns:
        A FitResult per (hook name as given to the stream, percentile).

    Raises:
        ValueError: no usable activation, fewer than ``calibration_activations``, only one document, an option out of
            range or unknown, or activations that are all alike.

    Source: arXiv 2605.14347, construction. Percentiles across documents, their intervals and the unseen-mass rule are
    ours: the paper's thresholds move with the batch size, and its rule waits for one lucky batch.
    """
    if len(percentiles) == 0 or len(set(percentiles)) != len(percentiles):
        raise ValueError(f"percentiles must be at least one number and all different, got {tuple(percentiles)}.")
    results = _fit(stream, tuple(percentiles), None, ExemplarFitConfig.of(options), on_metrics)
    return {(result.hook_name, percentile): result for result, percentile in zip(results, itertools.cycle(percentiles))}


@dataclass(kw_only=True)
class _Growth:
    """One dictionary while it grows."""

    hook_name: str
    threshold: ThresholdEstimate
    calibration: Calibration
    clustering: LeaderClustering
    stopped_because: str = ""
    quiet_batches: int = 0
    founders: list[Provenance] = field(default_factory=list)

    def take(self, batch: ActivationBatch, config: ExemplarFitConfig) -> None:
        """Cluster a batch; stop at the first check that the rule passes."""
        x = batch.activations[self.hook_name]
        founded = False
        slices = _aligned_slices(self.clustering.n_seen, len(x)) if config.stop == "unseen_mass" else [(0, len(x))]
        for start, stop in slices:
            known, seen = self.clustering.n_regions, self.clustering.n_seen
            self.clustering.partial_fit(x[start:stop])
            if self.clustering.n_regions > known:
                founded = True
                self.founders.append(Provenance.of(batch, self.clustering.exemplar_indices[known:].cpu() - seen + start))
            at_check = self.clustering.n_seen % CHECK_EVERY == 0
            if config.stop == "unseen_mass" and at_check and self.unseen_mass.upper <= config.unseen_mass_tolerance:
                self.stopped_because = "unseen_mass"
                return
        self.quiet_batches = 0 if founded else self.quiet_batches + 1
        if config.stop == "paper" and self.quiet_batches >= config.saturation_window:
            self.stopped_because = "paper"

    @property
    def unseen_mass(self) -> UnseenMass:
        """Estimate and limit of the share of further activations that would found a region."""
        half = self.clustering.n_seen // 2
        return unseen_mass(self.clustering.n_founders_since(half), self.clustering.n_seen - half)

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of progress, under keys in SAELens' style."""
        return {
            "details/n_training_samples": float(self.clustering.n_seen),
            "metrics/n_regions": float(self.clustering.n_regions),
            "metrics/unseen_mass": self.unseen_mass.estimate,
            "metrics/unseen_mass_upper": self.unseen_mass.upper,
        }

    def finish(self, stream: ActivationStream, config: ExemplarFitConfig) -> FitResult:
        """The dictionary, on the device of the activations, and its statistics, on the CPU."""
        if self.clustering.n_regions == 0:
            raise ValueError("No activation has a direction: all of them equal the centre. Is this hook's output constant?")
        result = {
            "stopped_because": self.stopped_because or "end_of_stream",
            "n_seen": self.clustering.n_seen,
            "unseen_mass": self.unseen_mass.estimate,
            "unseen_mass_upper": self.unseen_mass.upper,
            "typical_norm": self.calibration.typical_norm,
        }
        metadata = stream.describe() | result | {
            "hook_name": resolve_hook(stream.model, self.hook_name),
            "calibration": config.calibration,
            "calibration_activations": self.calibration.n_activations,
            "threshold_interval": [self.threshold.low, self.threshold.high],
        }
        # Only this host class keeps the heads of hook_z apart; a bridge gives them joined.
        has_heads = isinstance(stream.model, HookedTransformer) and metadata["hook_name"].endswith("hook_z")
        dictionary = ExemplarPartition.from_regions(
            self.clustering.exemplars, self.clustering.member_means, self.calibration.center,
            self.threshold.threshold, percentile=self.threshold.percentile,
            basis=config.basis, readout=config.readout, k=min(config.k, self.clustering.n_regions), metadata=metadata,
            reshape_activations="hook_z" if has_heads else "none",
        )
        return FitResult(
            dictionary=dictionary, hook_name=self.hook_name, percentile=self.threshold.percentile, threshold=self.threshold,
            n_undirected=self.clustering.n_undirected, counts=self.clustering.counts.cpu(),
            coherence=self.clustering.coherence.cpu(), exemplar_indices=self.clustering.exemplar_indices.cpu(),
            provenance=Provenance.join(self.founders), **result,
        )


def _aligned_slices(n_seen: int, n: int) -> Iterator[tuple[int, int]]:
    """Cut ``n`` new rows where the stream position is a multiple of CHECK_EVERY.

    Checks then fall on fixed stream positions, so that where a fit stops does not depend on how the stream is batched.
    """
    start = 0
    while start < n:
        stop = min(n, start + CHECK_EVERY - (n_seen + start) % CHECK_EVERY)
        yield start, stop
        start = stop


def _fit(
    stream: ActivationStream,
    percentiles: Sequence[float | int],
    threshold: float | int | None,
    config: ExemplarFitConfig,
    on_metrics: OnMetrics | None,
) -> list[FitResult]:
    percentiles = [float(_checks.between(percentile, 0, 100, "percentile")) for percentile in percentiles]
    batches = iter(stream)
    held, n_calibration = _hold(batches, config.calibration_activations)
    growths = []
    for hook_name in held[0].activations:
        calibration = calibrate(
            held, hook_name, percentiles, n_activations=n_calibration, mode=config.calibration, seed=config.seed
        )
        estimates = calibration.thresholds or (ThresholdEstimate.given(float(threshold)),)
        for estimate in estimates:
            clustering = LeaderClustering(calibration.center, estimate.threshold)
            growths.append(_Growth(hook_name=hook_name, threshold=estimate, calibration=calibration, clustering=clustering))
    for batch in itertools.chain(_drain(held), batches):
        growing = [growth for growth in growths if not growth.stopped_because]
        if not growing:
            break
        for growth in growing:
            growth.take(batch, config)
            if on_metrics is not None:
                on_metrics((growth.hook_name, growth.threshold.percentile), growth.clustering.n_seen, growth.metrics)
    return [growth.finish(stream, config) for growth in growths]


def _hold(batches: Iterator[ActivationBatch], wanted: int | None) -> tuple[list[ActivationBatch], int]:
    """Take batches until they hold the calibration activations; return them and how many calibrate."""
    held: list[ActivationBatch] = []
    n = 0
    while n < (wanted or DEFAULT_CALIBRATION) and (batch := next(batches, None)) is not None:
        held.append(batch)
        n += len(batch)
    if n < (wanted or 2):
        raise ValueError(
            f"The stream holds {n} activations, fewer than the {wanted or 2} that calibration takes. Give it more text, "
            f"raise its max_tokens, or pass calibration_activations={max(n, 2)} or fewer."
        )
    return held, min(n, wanted or DEFAULT_CALIBRATION)


def _drain(held: list[ActivationBatch]) -> Iterator[ActivationBatch]:
    """Yield the batches and let go of each, so that the calibration activations are freed as they are clustered."""
    held.reverse()
    while held:
        yield held.pop()
