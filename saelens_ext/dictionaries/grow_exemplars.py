"""ExemplarPartitions while they grow: batch by batch, with a state that can be put away and taken up again.

The first activations of the stream calibrate the centre and the thresholds and are then clustered like all others, so
nothing is read twice and none is skipped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from typing_extensions import TypedDict

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.dictionaries.activation_matrix import ActivationSource
from saelens_ext.dictionaries.calibrate import (
    Calibration,
    CalibrationMode,
    ThresholdRule,
    calibrate,
    held_batches,
    held_tensors,
)
from saelens_ext.dictionaries.exemplar_partition import Basis, ExemplarPartition, Readout
from saelens_ext.dictionaries.fit_result import ExemplarFitResult, Provenance
from saelens_ext.ops.calibration import ThresholdEstimate
from saelens_ext.ops.leader_clustering import LeaderClustering
from saelens_ext.ops.statistics import UnseenMass, unseen_mass

Stop = Literal["budget", "unseen_mass", "paper"]
OnMetrics = Callable[[tuple[str, float | None], int, dict[str, float]], None]

DEFAULT_CALIBRATION = 20_000
CHECK_EVERY = 1024


@_checks.normalising
@dataclass(kw_only=True, frozen=True)
class ExemplarFitConfig:
    """Options of a fit."""

    calibration_activations: int | None = None
    """How many of the stream's first activations calibrate; by default 20,000, or all there are."""
    calibration: str = "across_documents"
    """"across_documents": percentiles over pairs from different documents, whatever the batch size; "within_batch":
    the paper's mean of within-batch percentiles, which moves with the batch size."""
    threshold_rule: str = "percentile"
    """What the threshold is. "percentile": that percentile of the pairwise distances; "nearest_neighbour": the median
    distance of the calibration activations to their nearest neighbour in another document, times ``neighbour_factor``,
    which can be stated before the data are seen."""
    stop: str = "budget"
    """When a dictionary stops growing, other than at the end of the stream. "budget": only there. "unseen_mass": once
    the upper 0.95 limit of the unseen mass, judged by the last half of the stream, is at most
    ``unseen_mass_tolerance``, checked every 1,024 activations.
    "paper": after ``saturation_window`` batches in a row that started no region."""
    unseen_mass_tolerance: float = 0.01
    """Fraction of further activations that may start a region, in (0, 1)."""
    saturation_window: int = 1
    """Batches."""
    basis: str = "exemplar"
    """Rows that the dictionaries encode and decode with: "exemplar" or "mean"."""
    readout: str = "top_k"
    """How they turn activations into codes, see :class:`ExemplarPartitionConfig`."""
    k: int = 1
    """Latents that the top-k readouts keep."""
    seed: int = 0
    """Of the sampling of calibration pairs and of the bootstrap of the threshold's interval."""

    def __post_init__(self) -> None:
        _checks.normalise_fields(self)
        for name, allowed in (
            ("calibration", CalibrationMode), ("threshold_rule", ThresholdRule), ("stop", Stop), ("basis", Basis),
            ("readout", Readout),
        ):  # fmt: skip
            _checks.choice(getattr(self, name), get_args(allowed), name)
        if self.threshold_rule == "nearest_neighbour" and self.calibration == "within_batch":
            raise ValueError(
                "threshold_rule='nearest_neighbour' looks for neighbours in other documents; got "
                "calibration='within_batch'. Leave calibration at 'across_documents', or use the rule 'percentile'."
            )
        _checks.between(self.unseen_mass_tolerance, 0, 1, "unseen_mass_tolerance")
        _checks.positive(self.saturation_window, "saturation_window")
        _checks.positive(self.k, "k")
        if (
            self.calibration_activations is not None
            and _checks.positive(self.calibration_activations, "calibration_activations") < 2
        ):
            raise ValueError("calibration_activations must be at least 2, the fewest that have a distance.")


class ExemplarGrowthOptions(TypedDict, total=False):
    """Fields of :class:`ExemplarFitConfig`, as keywords, without ``calibration``."""

    calibration_activations: int | None
    threshold_rule: ThresholdRule
    stop: Stop
    unseen_mass_tolerance: float
    saturation_window: int
    basis: Basis
    readout: Readout
    k: int
    seed: int


class ExemplarFitOptions(ExemplarGrowthOptions, total=False):
    """Fields of :class:`ExemplarFitConfig`, as keywords."""

    calibration: CalibrationMode


@dataclass(kw_only=True)
class _Growth:
    """One dictionary while it grows."""

    hook_name: str
    threshold: ThresholdEstimate
    calibration: Calibration
    clustering: LeaderClustering
    calibration_given: bool = False
    stopped_because: str = ""
    quiet_batches: int = 0
    founders: list[Provenance] = field(default_factory=list)

    @classmethod
    def like(cls, fit: ExemplarFitResult, hook_name: str, device: torch.device) -> "_Growth":
        """One with the centre and the threshold of a fit."""
        center = fit.dictionary.center.detach().to(device)
        n = int(fit.dictionary.cfg.metadata.get("calibration_activations") or 0)
        return cls(
            hook_name=hook_name,
            threshold=fit.threshold,
            calibration=Calibration(center=center, typical_norm=fit.typical_norm, thresholds=(), n_activations=n),
            clustering=LeaderClustering(center, fit.threshold.threshold),
            calibration_given=True,
        )

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
                self.founders.append(
                    Provenance.of(batch, self.clustering.exemplar_indices[known:].cpu() - seen + start)
                )
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

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything needed to grow on: JSON-safe content, and tensors."""
        content = {
            "hook_name": self.hook_name,
            "threshold": asdict(self.threshold),
            "typical_norm": self.calibration.typical_norm,
            "n_activations": self.calibration.n_activations,
            "stopped_because": self.stopped_because,
            "quiet_batches": self.quiet_batches,
        }
        tensors = {f"clustering.{name}": tensor for name, tensor in self.clustering.state_dict().items()}
        if self.founders:
            founders = Provenance.join(self.founders)
            tensors |= {f"founders.{column.name}": getattr(founders, column.name) for column in fields(Provenance)}
        return content, tensors

    @classmethod
    def of_state(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> "_Growth":
        """The growth that gave a state, on a device."""
        clustering_state, founders = _under("clustering.", tensors), _under("founders.", tensors)
        center, estimate = clustering_state["center"].to(device), ThresholdEstimate(**content["threshold"])
        clustering = LeaderClustering(center, estimate.threshold)
        clustering.load_state_dict(clustering_state)
        calibration = Calibration(
            center=center, typical_norm=content["typical_norm"], thresholds=(), n_activations=content["n_activations"]
        )
        return cls(
            hook_name=content["hook_name"],
            threshold=estimate,
            calibration=calibration,
            clustering=clustering,
            stopped_because=content["stopped_because"],
            quiet_batches=content["quiet_batches"],
            founders=[Provenance(**founders)] if founders else [],
        )

    def finish(self, stream: ActivationStream, config: ExemplarFitConfig) -> ExemplarFitResult:
        """The dictionary, on the device of the activations, and its statistics, on the CPU."""
        if self.clustering.n_regions == 0:
            raise ValueError("No activation has a direction: all equal the centre. Is this hook's output constant?")
        result = {
            "stopped_because": self.stopped_because or "end_of_stream",
            "n_seen": self.clustering.n_seen,
            "unseen_mass": self.unseen_mass.estimate,
            "unseen_mass_upper": self.unseen_mass.upper,
            "typical_norm": self.calibration.typical_norm,
        }
        source = ActivationSource(stream=stream, hook_name=self.hook_name)
        metadata = (
            source.metadata()
            | result
            | {
                "calibration": "given" if self.calibration_given else config.calibration,
                "calibration_activations": self.calibration.n_activations,
                "threshold_interval": [self.threshold.low, self.threshold.high],
            }
            | ({} if self.threshold.factor is None else {"neighbour_factor": self.threshold.factor})
        )
        dictionary = ExemplarPartition.from_regions(
            self.clustering.exemplars.to(self.calibration.center.device),
            self.clustering.member_means.to(self.calibration.center.device),
            self.calibration.center,
            self.threshold.threshold,
            percentile=self.threshold.percentile,
            basis=cast(Basis, config.basis),
            readout=cast(Readout, config.readout),
            k=min(config.k, self.clustering.n_regions),
            metadata=metadata,
            reshape_activations=source.reshaping,
        )
        return ExemplarFitResult(
            dictionary=dictionary,
            hook_name=self.hook_name,
            percentile=self.threshold.percentile,
            threshold=self.threshold,
            n_undirected=self.clustering.n_undirected,
            counts=self.clustering.counts.cpu(),
            coherence=self.clustering.coherence.cpu(),
            exemplar_indices=self.clustering.exemplar_indices.cpu(),
            provenance=Provenance.join(self.founders),
            **result,
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


class ExemplarBuild:
    """Dictionaries of one config, at every hook and resolution, growing from one sequence of batches.

    Args:
        hook_names: keys of ``batch.activations`` to build at.
        resolutions: percentiles in (0, 100), or factors, as the config's rule takes; empty with a ``threshold``, a
            cosine distance in (0, 2].
        on_metrics: called after each batch for each growing dictionary with ((hook, resolution), activations seen,
            figures).
        like: a fit whose centre and threshold to use instead, at one hook, of activations on ``device``.
    """

    def __init__(
        self,
        hook_names: Sequence[str],
        resolutions: Sequence[float],
        threshold: float | int | None,
        config: ExemplarFitConfig,
        on_metrics: OnMetrics | None = None,
        *,
        like: ExemplarFitResult | None = None,
        device: torch.device = torch.device("cpu"),
    ) -> None:
        self._hook_names, self._config, self._on_metrics = tuple(hook_names), config, on_metrics
        self._resolutions, self._threshold = tuple(resolutions), threshold
        self._held: list[ActivationBatch] = []
        self._n_held = 0
        self._growths = [] if like is None else [_Growth.like(like, name, device) for name in hook_names]

    @property
    def calibrated(self) -> bool:
        """Whether the thresholds are known; before, batches are only held."""
        return bool(self._growths)

    @property
    def done(self) -> bool:
        """Whether every dictionary has stopped growing, so that no more batches are needed."""
        return self.calibrated and all(growth.stopped_because for growth in self._growths)

    def take(self, batch: ActivationBatch) -> None:
        """Add a batch: hold it until there are enough to calibrate, then cluster it."""
        if self.calibrated:
            self._grow(batch)
            return
        self._held.append(batch)
        self._n_held += len(batch)
        if self._n_held >= (self._config.calibration_activations or DEFAULT_CALIBRATION):
            self._calibrate()

    def finish(self, stream: ActivationStream) -> list[ExemplarFitResult]:
        """The results, hook by hook and in the order of the resolutions; ``stream`` is where the batches came from.

        ValueError: fewer activations than calibration takes, one document only, or activations that are all alike.
        """
        if not self.calibrated:
            self._calibrate()
        return [growth.finish(stream, self._config) for growth in self._growths]

    def state(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Everything needed to continue after the last batch taken: JSON-safe content, and tensors. Before the
        calibration there is no content, and the tensors are the activations held for it.
        """
        if not self.calibrated:
            held = held_tensors(self._held, self._hook_names)
            return [], {f"held.{name}": tensor for name, tensor in held.items()}
        states = [growth.state() for growth in self._growths]
        tensors = {f"{number}.{name}": tensor for number, (_, own) in enumerate(states) for name, tensor in own.items()}
        return [content for content, _ in states], tensors

    def load_state(
        self, content: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Continue, on a device, where the build of the same arguments was that gave a state."""
        self._held = held_batches(_under("held.", tensors), self._hook_names, device)
        self._n_held = sum(map(len, self._held))
        self._growths = [
            _Growth.of_state(own, _under(f"{number}.", tensors), device) for number, own in enumerate(content)
        ]

    def _calibrate(self) -> None:
        held, n, wanted = self._held, self._n_held, self._config.calibration_activations
        if n < (wanted or 2):
            raise ValueError(
                f"The stream holds {n} activations, fewer than the {wanted or 2} that calibration takes. Give it more "
                f"text, raise its max_tokens, or pass calibration_activations={max(n, 2)} or fewer."
            )
        options = {
            "n_activations": min(n, wanted or DEFAULT_CALIBRATION),
            "calibration": self._config.calibration,
            "threshold_rule": self._config.threshold_rule,
            "seed": self._config.seed,
        }
        for hook_name in self._hook_names:
            calibration = calibrate(held, hook_name, self._resolutions, **options)
            fixed = () if self._threshold is None else (ThresholdEstimate.given(float(self._threshold)),)
            for estimate in fixed or calibration.thresholds:
                clustering = LeaderClustering(calibration.center, estimate.threshold)
                self._growths.append(
                    _Growth(hook_name=hook_name, threshold=estimate, calibration=calibration, clustering=clustering)
                )
        held.reverse()
        # Each batch is let go of, so that the calibration activations are freed as they are clustered.
        while held:
            self._grow(held.pop())

    def _grow(self, batch: ActivationBatch) -> None:
        for growth in self._growths:
            if growth.stopped_because:
                continue
            growth.take(batch, self._config)
            if self._on_metrics is not None:
                self._on_metrics(
                    (growth.hook_name, growth.threshold.resolution), growth.clustering.n_seen, growth.metrics
                )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
