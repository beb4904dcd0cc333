"""One pass over the activations, from which every dictionary of a run is built.

ExemplarPartitions grow batch by batch. Factorisations need their activations together, so these are gathered while they
fit into the memory limit; those that do not fit are read again, in passes of their own.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.dictionaries.activation_matrix import ActivationSource
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.fit_snmf import SNMFFitConfig, fit_snmf_rows
from saelens_ext.dictionaries.grow_exemplars import ExemplarBuild
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.ops.semi_nmf.updates import sum_of_squares
from saelens_ext.runner.checkpoints import SNMF_FOLDER, Checkpoint, numbered
from saelens_ext.runner.config import DictionaryRunnerConfig
from saelens_ext.runner.dictionary_configs import ExemplarBuildConfig

logger = logging.getLogger(__name__)

KEPT_BYTES = 2**30
"""Bytes of activations that are held for the profile, which else reads the stream once more."""

OnMetrics = Callable[[str, int, dict[str, float]], None]


@dataclass(eq=False)
class _Gathered:
    """Activations of one hook, held in memory up to a limit; those of held-out documents apart."""

    source: ActivationSource
    limit: int
    rows: list[Tensor] = field(default_factory=list)
    held_out: list[Tensor] = field(default_factory=list)
    size: int = 0
    overflowed: bool = False

    def take(self, batch: ActivationBatch) -> None:
        """Add a batch; beyond the limit everything is let go."""
        if self.overflowed:
            return
        for parts, held_out in ((self.rows, False), (self.held_out, True)):
            rows = self.source.rows_of(batch, held_out=held_out)
            if len(rows):
                parts.append(rows)
                self.size += rows.numel() * rows.element_size()
        if self.size > self.limit:
            self.overflowed = True
            self.let_go()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything needed to go on: JSON-safe content, and tensors."""
        tensors = {name: torch.cat(parts) for name, parts in self._parts.items() if parts}
        return {"overflowed": self.overflowed, "n_rows": {n: [*map(len, p)] for n, p in self._parts.items()}}, tensors

    def load_state(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on, on a device, where the one was that gave a state."""
        self.overflowed = content["overflowed"]
        for name, tensor in tensors.items():
            self._parts[name][:] = tensor.to(device).split(content["n_rows"][name])
        self.size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def _parts(self) -> dict[str, list[Tensor]]:
        return {"rows": self.rows, "held_out": self.held_out}

    def let_go(self) -> None:
        """Free the memory."""
        self.rows.clear()
        self.held_out.clear()

    def matrix(self) -> Tensor | None:
        """The activations to fit; None if there were too many."""
        if self.overflowed:
            return None
        if not self.rows:
            raise ValueError("There are no activations to fit: all documents were held out, or the stream is empty.")
        if len(self.rows) > 1:
            self.rows[:] = [torch.cat(self.rows)]
        if not bool(self.rows[0].any()):
            raise ValueError(f"All {len(self.rows[0])} activations are zero: is the hook the right one?")
        return self.rows[0]


@dataclass
class _Factorisation:
    """One SNMFDictionary to fit once the pass is over."""

    name: str
    gathered: _Gathered
    n_components: int
    config: SNMFFitConfig


class BuildPass:
    """The dictionaries of a run while they are built; finished factorisations are kept in ``folder``, if there is one.

    ``on_metrics`` is called with the name of a dictionary, a step and figures.
    """

    def __init__(
        self, config: DictionaryRunnerConfig, stream: ActivationStream, folder: Path | None, on_metrics: OnMetrics
    ) -> None:
        self._config, self._stream, self._on_metrics = config, stream, on_metrics
        self._snmf_folder = None if folder is None else folder / SNMF_FOLDER
        self.names: list[str] = []
        """The names of all dictionaries, in the order of the config."""
        self._builds: list[tuple[list[str], ExemplarBuild]] = []
        self._factorisations: list[_Factorisation] = []
        self._finished: dict[str, SNMFFitResult] = {}
        self._n_grown = 0
        self.n_windows = self.n_activations = 0
        self.last_document = -1
        self.complete = False
        self._kept: list[ActivationBatch] | None = None
        self._kept_bytes = 0
        gathered: dict[tuple[str, float], _Gathered] = {}
        for build, hook_name, names in config.dictionary_names():
            self.names += names
            if isinstance(build, ExemplarBuildConfig):
                name_of = dict(zip(build.resolutions or (None,), names))
                report = lambda key, *rest, name_of=name_of: on_metrics(name_of[key[1]], *rest)  # noqa: E731
                options = build.fit_config(config.seed)
                growing = ExemplarBuild([hook_name], build.resolutions, build.threshold, options, report)
                self._builds.append((names, growing))
                continue
            for name, (n_components, options) in zip(names, build.settings(config.seed)):
                source = ActivationSource(stream=stream, hook_name=hook_name, held_out=float(options.held_out))
                key = (hook_name, float(options.held_out))
                shared = gathered.setdefault(key, _Gathered(source, options.memory_limit))
                shared.limit = max(shared.limit, options.memory_limit)
                self._factorisations.append(_Factorisation(name, shared, n_components, options))
        self._gathered = list(gathered.values())

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Take up what a checkpoint of this run holds, if there is one, and the factorisations that were finished."""
        for one in self._factorisations:
            folder = None if self._snmf_folder is None else self._snmf_folder / one.name
            if folder is not None and (folder / "fit.json").exists():
                self._finished[one.name] = SNMFFitResult.load(folder, device=str(self._stream.device))
        if checkpoint is None:
            return
        for number, (_, build) in enumerate(self._builds):
            build.load_state(checkpoint.builds[number], checkpoint.tensors_of(number), self._stream.device)
        self._n_grown, self.last_document = checkpoint.n_windows, checkpoint.last_document
        numbers = [number for number, gathered in enumerate(self._gathered) if gathered in self._gathering]
        held = {number: checkpoint.gathered[number] for number in numbers if checkpoint.gathered[number]}
        for number, content in held.items():
            self._gathered[number].load_state(content, checkpoint.tensors_of(number, "gathered/"), self._stream.device)
        # Activations that a checkpoint does not hold are read again, from the first.
        if len(held) == len(numbers):
            self.n_windows, self.n_activations = checkpoint.n_windows, checkpoint.n_activations
            self.complete = checkpoint.complete

    def batches(self) -> Iterator[ActivationBatch]:
        """Read the batches that are still needed, take each, and yield it when all have."""
        if self.complete:
            return
        self._kept = [] if self._config.profile and self.n_windows == 0 else None
        for batch in self._stream.batches(self.n_windows, self.n_activations):
            n_windows = batch.first_sequence_id + len(batch.windows)
            if n_windows > self._n_grown:
                for _, build in self._builds:
                    build.take(batch)
                self._n_grown = n_windows
            for gathered in self._gathering:
                gathered.take(batch)
            self.n_windows, self.n_activations = n_windows, self.n_activations + len(batch)
            self.last_document = max(self.last_document, int(batch.document_ids.max()))
            self._keep_batch(batch)
            yield batch
            # A factorisation takes the whole stream, and a resumed run must have read as much as the run it goes on
            # with.
            if not self._factorisations and self._builds and all(build.done for _, build in self._builds):
                self._kept = None
                break
        self.complete = True

    def _keep_batch(self, batch: ActivationBatch) -> None:
        if self._kept is None:
            return
        self._kept.append(batch)
        self._kept_bytes += sum(rows.numel() * rows.element_size() for rows in batch.activations.values())
        if self._kept_bytes > KEPT_BYTES:
            self._kept = None

    def take_kept(self) -> list[ActivationBatch] | None:
        """Every batch of the stream, once, if this pass read them all and they fit into KEPT_BYTES."""
        kept, self._kept = self._kept, None
        return kept if self.complete else None

    @property
    def has_state(self) -> bool:
        """Whether there is something that a checkpoint could hold and the run's start could not give as cheaply."""
        return self._n_grown == self.n_windows > 0

    @property
    def gathers(self) -> bool:
        """Whether checkpoints hold the activations of factorisations, which may be many."""
        return bool(self._gathering)

    def checkpoint(self) -> Checkpoint:
        """The state after the last batch."""
        builds = [build.state() for _, build in self._builds]
        gathered = [one.state() if one in self._gathering else ({}, {}) for one in self._gathered]
        return Checkpoint(
            n_windows=self.n_windows,
            n_activations=self.n_activations,
            last_document=self.last_document,
            complete=self.complete,
            builds=[content for content, _ in builds],
            gathered=[content for content, _ in gathered],
            tensors=numbered([tensors for _, tensors in builds])
            | numbered([tensors for _, tensors in gathered], "gathered/"),
        )

    def results(self) -> Iterator[tuple[str, ExemplarFitResult | SNMFFitResult]]:
        """The fits by name, each as soon as it is finished."""
        for names, build in self._builds:
            for name, fit in zip(names, build.finish(self._stream)):
                yield name, replace(fit, dictionary=self._finish(fit.dictionary))
        for one in self._factorisations:
            fit = self._finished.get(one.name)
            if fit is None:
                fit = self._fit(one)
                fit = replace(fit, dictionary=self._finish(fit.dictionary))
                self._keep(one.name, fit)
                self._finished[one.name] = fit
                if all(one.gathered is not other for other in self._gathering):
                    one.gathered.let_go()
            yield one.name, fit

    @property
    def _gathering(self) -> list[_Gathered]:
        """Where activations are gathered for factorisations that are not finished."""
        wanted = {id(one.gathered): one.gathered for one in self._factorisations if one.name not in self._finished}
        return list(wanted.values())

    def _fit(self, one: _Factorisation) -> SNMFFitResult:
        logger.info("Factorising %s", one.name)
        x, source = one.gathered.matrix(), one.gathered.source
        options = {"held_out": one.gathered.held_out if x is not None else None, "progress": self._config.progress}
        figures = _Figures(one.name, x, one.config.penalty, self._on_metrics)
        return fit_snmf_rows(source, x, one.n_components, one.config, on_metrics=figures, **options)

    def _finish(self, dictionary: Any) -> Any:
        """The dictionary in the dtype asked for, with what is known of how the model was loaded."""
        metadata = dictionary.cfg.metadata
        if self._config.model_from_pretrained_kwargs:
            metadata.model_from_pretrained_kwargs = dict(self._config.model_from_pretrained_kwargs)
        return dictionary.to(self._config.torch_dtype)

    def _keep(self, name: str, fit: SNMFFitResult) -> None:
        """Put a finished factorisation where a resumed run finds it; a full disk must not cost the fit."""
        try:
            if self._snmf_folder is not None:
                fit.save(self._snmf_folder / name)
        except OSError as error:
            logger.warning("%s could not be kept for resuming (%s); the run goes on.", name, error)


class _Figures:
    """The progress of a factorisation under SAELens' names: losses are squared errors per activation, as its own.

    With an L1 penalty there are none before the fit has ended: meanwhile all activations weigh the same whatever their
    norm, and its errors are in no units of theirs.
    """

    def __init__(self, name: str, x: Tensor | None, l1: float, on_metrics: OnMetrics) -> None:
        self._name, self._on_metrics, self._step = name, on_metrics, 0
        self._n = 0 if x is None else len(x)
        self._scale = None if x is None or l1 else sum_of_squares(x) / len(x)

    def __call__(self, figures: Mapping[str, float | int]) -> None:
        self._step = int(figures.get("iteration", self._step + 1))
        found = {
            "metrics/objective": figures["objective"],
            "metrics/n_revived": float(figures["n_revived"]),
            "sparsity/dead_features": float(figures["n_dead"]),
        }
        if self._n:
            found["details/n_training_samples"] = float(self._n)
        if self._scale is not None:
            found |= {
                "losses/overall_loss": figures["objective"] * self._scale,
                "losses/mse_loss": figures["loss"] * self._scale,
                "metrics/relative_squared_error": figures["loss"],
            }
        self._on_metrics(self._name, self._step, found)
