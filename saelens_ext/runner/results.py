"""What a run returns, and the folder it writes for each dictionary."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from saelens_ext import _files
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.runner.config import DictionaryRunnerConfig
from saelens_ext.runner.evaluation import trainer_figures

EVALS_FILENAME = "evals.json"
_SIDECARS = (EVALS_FILENAME, SPARSITY_FILENAME, "profile.json", "profile.safetensors")
# Latents whose firing a profile of regions counts: those that the nearest exemplar alone decides.
_READOUTS_OF_THE_NEAREST = ("top_k", "top_k_cosine", "one_hot")


@dataclass(kw_only=True, eq=False)
class BuiltDictionary:
    """One dictionary of a run."""

    name: str
    """Its name, which is that of its folder: "blocks.6.hook_out_exemplars_p2"."""
    fit: ExemplarFitResult | SNMFFitResult
    """The dictionary with the statistics of its fit."""
    path: Path | None = None
    """Its folder; None if nothing was to be saved."""
    profile: DictionaryProfile | None = None
    """Counts and examples of its latents, once made."""
    evals: dict[str, Any] | None = None
    """SAELens' evaluation, once made."""

    @property
    def folder(self) -> Path:
        """Its folder; a ValueError if nothing was to be saved."""
        if self.path is None:
            raise ValueError(f"{self.name} has no folder: the run's output_path is None.")
        return self.path

    @property
    def dictionary(self) -> SAE[Any]:
        """The dictionary itself."""
        return self.fit.dictionary

    @property
    def hook_name(self) -> str:
        """The hook, as given to the run."""
        return self.fit.hook_name

    def save_fit(self, config: DictionaryRunnerConfig) -> None:
        """Write the dictionary, its statistics and the config into its folder; remove what is of another one."""
        # The profile and evaluation of the very same dictionary stay until there are new ones.
        if not self._is_saved:
            for name in _SIDECARS:
                (self.folder / name).unlink(missing_ok=True)
        self.fit.save(self.folder)
        config.to_json(self.folder / RUNNER_CFG_FILENAME)

    @property
    def _is_saved(self) -> bool:
        """Whether the folder holds a dictionary of the same weights."""
        try:
            held = _files.read_tensors(self.folder / SAE_WEIGHTS_FILENAME)
        except (FileNotFoundError, ValueError):
            return False
        own = self.dictionary.state_dict()
        return held.keys() == own.keys() and all(
            held[name].dtype == tensor.dtype and torch.equal(held[name], tensor.cpu()) for name, tensor in own.items()
        )

    def save_profile(self) -> None:
        """Write the profile, and the log frequencies of firing as SAELens does."""
        if self.profile is None:
            raise ValueError(f"{self.name} has no profile yet.")
        self.profile.save(self.folder)
        sparsity = self.log_sparsity
        if sparsity is not None:
            _files.write_tensors(self.folder / SPARSITY_FILENAME, {"sparsity": sparsity})

    def save_evals(self) -> None:
        """Write the evaluation."""
        _files.write_json(self.folder / EVALS_FILENAME, self.evals or {})

    @property
    def sparsity(self) -> torch.Tensor | None:
        """Fraction of activations on which each latent is not zero, float32 ``(k,)``; None if not profiled."""
        profile = self.profile
        if profile is None or not profile.n_activations:
            return None
        if profile.max_distance is not None:
            config = self.dictionary.cfg
            # Beyond a right angle the nearest exemplar's code is zero though the activation is a member of its region.
            beyond = bool((torch.nan_to_num(profile.max_distance) >= 1).any())
            several = config.readout != "one_hot" and (config.k != 1 or beyond)
            if config.readout not in _READOUTS_OF_THE_NEAREST or several:
                return None
        return (profile.counts.double() / profile.n_activations).float()

    @property
    def log_sparsity(self) -> torch.Tensor | None:
        """The same as log10(fraction + 1e-10), which is what SAELens saves."""
        return None if self.sparsity is None else torch.log10(self.sparsity + 1e-10)

    def figures(self) -> dict[str, float]:
        """Figures of the finished dictionary under SAELens' keys; ours are under ``metrics/``."""
        found = trainer_figures(self.evals or {})
        if isinstance(self.fit, ExemplarFitResult):
            found |= {
                "metrics/n_regions": float(self.fit.n_regions),
                "metrics/threshold": self.fit.threshold.threshold,
                "metrics/unseen_mass": self.fit.unseen_mass,
                "metrics/unseen_mass_upper": self.fit.unseen_mass_upper,
            }
        else:
            found["metrics/relative_squared_error"] = self.fit.loss
            if self.fit.held_out_loss is not None:
                found["metrics/held_out_relative_squared_error"] = self.fit.held_out_loss
        found["details/n_training_samples"] = float(self.fit.n_seen)
        fraction, log_fraction = self.sparsity, self.log_sparsity
        if fraction is not None and log_fraction is not None:
            found |= {
                "metrics/mean_log10_feature_sparsity": float(log_fraction.mean()),
                "sparsity/below_1e-5": float((fraction < 1e-5).sum()),
                "sparsity/below_1e-6": float((fraction < 1e-6).sum()),
                "sparsity/dead_features": float((fraction == 0).sum()),
            }
        return found

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe summary."""
        return {
            "name": self.name,
            "hook_name": self.hook_name,
            "architecture": self.dictionary.cfg.architecture(),
            "d_in": self.dictionary.cfg.d_in,
            "d_sae": self.dictionary.cfg.d_sae,
            "n_seen": self.fit.n_seen,
            "stopped_because": self.fit.stopped_because,
            "path": None if self.path is None else str(self.path),
            "figures": self.figures(),
            "evals": self.evals,
        }

    @property
    def files(self) -> tuple[Path, Path, Path | None]:
        """Its weights, its config and, if there is one, its file of log frequencies."""
        folder, sparsity = self.folder, self.folder / SPARSITY_FILENAME
        return folder / SAE_WEIGHTS_FILENAME, folder / SAE_CFG_FILENAME, sparsity if sparsity.exists() else None


@dataclass(kw_only=True, eq=False)
class RunResult:
    """What a run has built so far; whole once ``DictionaryRunner.run`` returns."""

    run_id: str
    """Name of the run's folder of checkpoints, and start of the ids of its wandb runs."""
    config: DictionaryRunnerConfig
    """The resolved config: what was really read, from which model."""
    output_path: Path | None
    """The folder of the dictionaries' folders."""
    checkpoint_path: Path | None
    """The run's folder of checkpoints, to resume from."""
    n_activations: int = 0
    """Activations read."""
    dictionaries: dict[str, BuiltDictionary] = field(default_factory=dict)
    """Those that are finished, by name."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe summary."""
        return {
            "run_id": self.run_id,
            "output_path": None if self.output_path is None else str(self.output_path),
            "checkpoint_path": None if self.checkpoint_path is None else str(self.checkpoint_path),
            "n_activations": self.n_activations,
            "dictionaries": [built.to_dict() for built in self.dictionaries.values()],
        }
