"""Figures and files of dictionaries on Weights & Biases, one run per dictionary, under SAELens' keys and names."""

import inspect
import os
import uuid
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from sae_lens import LoggingConfig
from torch import Tensor

_WITHOUT_LOGIN = ("offline", "disabled", "dryrun")


def check_login() -> None:
    """Raise RuntimeError, with what to do, unless wandb can log: it is logged in, or works offline."""
    if (os.environ.get("WANDB_MODE") or wandb.setup().settings.mode) in _WITHOUT_LOGIN:
        return
    if not _logged_in():
        raise RuntimeError(
            "wandb is not logged in, so nothing can be logged: run `wandb login`, set WANDB_API_KEY, set "
            "WANDB_MODE=offline to log to files, or set logger.log_to_wandb=false."
        )


def _logged_in() -> bool:
    """Whether wandb has credentials; never asks for them, and asks no server."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # before wandb 0.31


class WandbTracker:
    """A wandb run for each dictionary of a build.

    :meth:`on_metrics` can be given to ``fit_exemplar_partitions``, and :meth:`reporter` to ``fit_snmf``; a run is
    opened at the first figures of its dictionary. Call :meth:`finish` at the end, or use the tracker as a context
    manager.

    Args:
        logger: project, entity, name and frequency. ``run_name`` and ``wandb_id`` are those of a single run, and the
            beginning of those of several.
        config: recorded with every run.
        resume: continue runs of the same ids, where there are any.

    Raises:
        RuntimeError: wandb is not logged in and not offline.
    """

    def __init__(self, logger: LoggingConfig, config: Mapping[str, Any] | None = None, *, resume: bool = False) -> None:
        check_login()
        self._logger, self._config, self._resume = logger, dict(config or {}), resume
        self._runs: dict[Hashable, Any] = {}
        self._calls: dict[Hashable, int] = {}
        self._last_step: dict[Hashable, int] = {}

    def open(self, names: Sequence[str], default_names: Sequence[str] | None = None) -> None:
        """Open the runs of several dictionaries, by the keys of :meth:`on_metrics`.

        ``default_names`` are the runs' names where the logger gives none; by default ``names``.
        """
        for name, default in zip(names, default_names or names):
            self._open(name, default, alone=len(names) == 1)

    def on_metrics(self, key: Hashable, step: int, figures: Mapping[str, float | int]) -> None:
        """Log figures of a dictionary, by SAELens' keys, every ``wandb_log_frequency`` calls.

        The dictionary's key is a name or a (hook, percentile); wandb's steps increase for each.
        """
        self._calls[key] = self._calls.get(key, 0) + 1
        run = self._runs.get(key) or self._open(key, _name_of(key), alone=False)
        if self._calls[key] % self._logger.wandb_log_frequency == 0:
            run.log(dict(figures), step=step)
            self._last_step[key] = step

    def reporter(self, name: str) -> Callable[[Mapping[str, float | int]], None]:
        """An ``on_metrics`` for the fit of one dictionary; figures without a group go under ``metrics/``."""

        def report(figures: Mapping[str, float | int]) -> None:
            grouped = {key if "/" in key else f"metrics/{key}": value for key, value in figures.items()}
            self.on_metrics(name, self._calls.get(name, 0) + 1, grouped)

        return report

    def log_result(self, key: Hashable, figures: Mapping[str, Any], log_sparsity: Tensor | None = None) -> None:
        """Log the figures of a finished dictionary, by SAELens' keys, its groups of evaluation figures among them.

        ``log_sparsity`` is log10 of each latent's fraction of activations, for SAELens' chart of densities.
        """
        found = dict(figures)
        if log_sparsity is not None:
            found["plots/feature_density_line_chart"] = wandb.Histogram(log_sparsity.tolist())
        run = self._runs.get(key) or self._open(key, _name_of(key), alone=False)
        # Without a step of its own the result would be merged into the last figures of progress.
        # A continued run drops what lies before the last step that it had logged when it was stopped.
        run.log(found, step=max(self._last_step.get(key, 0) + 1, run.starting_step))

    def log_files(
        self,
        key: Hashable,
        sae_name: str,
        weights: Path,
        config: Path,
        sparsity: Path | None,
        aliases: Sequence[str] = ("final_model",),
    ) -> None:
        """Log the files of a dictionary as artifacts, named and typed as SAELens' trainer does.

        ``sae_name`` is ``dictionary.get_name()``; ``weights`` are left out where the logger says so, ``sparsity`` is
        its file of log frequencies, if any, and ``aliases`` are the model artifact's.
        """
        run, name = self._runs[key], sae_name.replace("/", "__")
        model = wandb.Artifact(name, type="model", metadata=self._config)
        if self._logger.log_weights_to_wandb:
            model.add_file(str(weights))
        model.add_file(str(config))
        run.log_artifact(model, aliases=list(aliases))
        if sparsity is not None:
            kind = "log_feature_sparsity"
            frequencies = wandb.Artifact(f"{name}_{kind}", type=kind, metadata=self._config)
            frequencies.add_file(str(sparsity))
            run.log_artifact(frequencies)

    def finish(self, exit_code: int = 0) -> None:
        """End all runs; an exit code other than 0 marks them as failed.

        Raises what wandb raised for the first run that could not be ended; the others are ended all the same.
        """
        runs, self._runs = self._runs, {}
        errors: list[Exception] = []
        for run in runs.values():
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> "WandbTracker":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def _open(self, key: Hashable, name: str, *, alone: bool) -> Any:
        logger = self._logger
        first = not self._runs
        # Under an agent the sweep has given the run its id; the first dictionary is the one that the sweep sees.
        swept = os.environ.get("WANDB_RUN_ID") if first and "WANDB_SWEEP_ID" in os.environ else None
        slug = _name_of(key).replace("/", "_")
        own = None if logger.wandb_id is None else (logger.wandb_id if alone else f"{logger.wandb_id}-{slug}")
        run_id = swept or own or uuid.uuid4().hex[:8]
        shown = name if logger.run_name is None else (logger.run_name if alone else f"{logger.run_name}-{name}")
        self._runs[key] = wandb.init(
            project=logger.wandb_project,
            entity=logger.wandb_entity,
            name=shown,
            id=run_id,
            config=self._config | {"dictionary_name": _name_of(key)},
            group=None if alone else logger.wandb_id,
            resume="allow" if self._resume else None,
            reinit="create_new",
        )
        return self._runs[key]


def _name_of(key: Hashable) -> str:
    """A name for a dictionary known by its hook and percentile."""
    parts = key if isinstance(key, tuple) else (key,)
    return "_".join(f"p{part:g}" if isinstance(part, float | int) else str(part) for part in parts)
