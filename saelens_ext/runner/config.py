"""The config of a run: a model, a dataset, and the dictionaries to build from them, in the field names of SAELens."""
# ruff: noqa: RUF009  `parsed` makes a field.

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, Union

from sae_lens import LoggingConfig
from sae_lens.constants import DTYPE_MAP

from saelens_ext import _checks, _files
from saelens_ext.runner.dictionary_configs import (
    BuildConfig,
    ExemplarBuildConfig,
    SNMFBuildConfig,
    build_from_dict,
    build_to_dict,
    several,
)
from saelens_ext.runner.parsing import (
    mapping_or_none,
    one_or_several,
    parsed,
    positions,
    switch_or_ids,
    switch_or_none,
    text_or_none,
)

MODEL_CLASSES = ("SAETransformerBridge", "HookedTransformer", "AutoModelForCausalLM")
"""How a model is loaded, in SAELens' names; any other is an error."""
DTYPES = ("float32", "float64", "bfloat16", "float16")
# SAELens' logger has switches for what a build by observation has not.
_UNUSED_LOGGING = {
    "log_optimizer_state_to_wandb": "there is no optimizer",
    "log_activations_store_to_wandb": "there is no store of activations",
    "eval_every_n_wandb_logs": "dictionaries are evaluated once, when they are finished",
}

AnyConfig = TypeVar("AnyConfig", bound="DictionaryRunnerConfig")


def quiet_logger() -> LoggingConfig:
    """SAELens' logging config with wandb off."""
    return LoggingConfig(log_to_wandb=False, wandb_project="saelens_ext")


@_checks.normalising
@dataclass(kw_only=True)
class DictionaryRunnerConfig:
    """A run: which model, which data, which dictionaries, and what to do with them."""

    dictionary: Union[BuildConfig, Sequence[BuildConfig]] = field(default_factory=ExemplarBuildConfig)
    """What to build: one config or several, each of which may ask for several dictionaries."""

    model_name: str = ""
    """Hugging Face name of the model, or the directory of a saved one."""
    model_class_name: str = "SAETransformerBridge"
    """How to load it: SAETransformerBridge, HookedTransformer or AutoModelForCausalLM (SAELens' HookedProxyLM)."""
    model_from_pretrained_kwargs: dict[str, Any] | None = parsed(None, mapping_or_none, "JSON")
    """Passed to the model's loader, as JSON on the command line: {"dtype": "bfloat16"}."""
    hook_name: str | Sequence[str] = parsed("", one_or_several(str), "HOOK[,HOOK…]")
    """Hook or hooks to read, in any host's spelling; all are read in the same forward passes."""

    dataset_path: str = ""
    """Hugging Face name, folder of data files, or folder of Dataset.save_to_disk; its train split is read."""
    streaming: bool = True
    """Read a named dataset as it arrives instead of downloading it first."""
    text_column: str = "text"
    """Column of the documents; token ids (input_ids, tokens) and chat messages are found by themselves."""
    cached_activations_path: str | None = parsed(None, text_or_none, "PATH")
    """Folder written by SAELens' CacheActivationsRunner, to be read instead of running the model over a dataset."""
    context_size: int = 128
    """Tokens in a window, BOS included. With cached activations, that of the cache."""
    prepend_bos: bool | None = parsed(None, switch_or_none, "true|false|none")
    """Whether every window starts with BOS; by default as the model's texts do."""
    training_tokens: int = 2_000_000
    """Activations to build from, exactly."""
    store_batch_size_prompts: int = 32
    """Windows in a forward pass."""
    seqpos_slice: Sequence[int | None] = parsed((None,), positions, "STOP|START,STOP[,STEP]")
    """Positions of a window that are read, as a slice: (stop,), (start, stop) or (start, stop, step)."""
    exclude_special_tokens: bool | Sequence[int] = parsed(True, switch_or_ids, "true|false|ID[,ID…]")
    """Leave out activations at BOS, EOS, padding and separators (True), at the listed token ids, or at none (False)."""

    seed: int = 42
    """Of everything random in the run."""
    device: str = "auto"
    """Where the model is loaded and the dictionaries are built: CUDA where there is one, else MPS, else the CPU
    ("auto"), or a device of torch. A model that is handed over stays where it is.
    """
    dtype: str = "float32"
    """Of the saved dictionaries. Fits compute in float32 or wider, and the model keeps its own dtype."""

    n_eval_batches: int | None = None
    """Batches of SAELens' evaluation of each finished dictionary; 0 for none. By default as many as hold a twentieth of
    the tokens of the build, divided among its dictionaries, at most ten: less work than the build.
    """
    eval_batch_size_prompts: int | None = None
    """Windows in such a batch; by default store_batch_size_prompts."""
    profile: bool = True
    """Go over the activations once more for exact counts and examples of every latent; up to 1 GiB of them is held
    in memory for that, more is read again.
    """

    logger: LoggingConfig = field(default_factory=quiet_logger)
    """SAELens' logging config; log_to_wandb is off by default. Each dictionary has a wandb run of its own."""

    n_checkpoints: int = 0
    """Checkpoints during the pass, evenly spread over training_tokens. One more is made on Ctrl-C. They hold what is
    gathered for a calibration or a factorisation, too; of a run with factorisations only the last one is kept.
    """
    checkpoint_path: str | None = parsed("checkpoints", text_or_none, "PATH")
    """Where checkpoints go, in a folder named by the run's id; none disables them."""
    resume_from_checkpoint: str | None = parsed(None, text_or_none, "PATH")
    """A checkpoint, or the folder of a run's checkpoints, of which the last is taken. On the same kind of device and
    with the same number of threads the result is that of a run that was never interrupted, to the last bit; elsewhere
    activations are rounded otherwise, and an activation at a threshold may fall on the other side of it."""
    output_path: str | None = parsed("output", text_or_none, "PATH")
    """Where dictionaries go, each in a folder of its own; none keeps them in memory."""
    progress: bool = False
    """Show progress bars."""

    def __post_init__(self) -> None:
        self.logger = copy(self.logger)
        _checks.normalise_fields(self)
        _checks.normalise_fields(self.logger, "logger.")
        _checks.choice(self.model_class_name, MODEL_CLASSES, "model_class_name")
        _checks.choice(self.dtype.removeprefix("torch."), DTYPES, "dtype")
        for name in ("context_size", "training_tokens", "store_batch_size_prompts"):
            _checks.positive(getattr(self, name), name)
        if self.eval_batch_size_prompts is not None:
            _checks.positive(self.eval_batch_size_prompts, "eval_batch_size_prompts")
        for name in ("n_checkpoints", "n_eval_batches"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        self.seqpos_slice = tuple(self.seqpos_slice)
        self._check_hooks()
        self._check_checkpoints()
        self._check_logger()

    def _check_hooks(self) -> None:
        if not self.hook_names or not all(self.hook_names):
            raise ValueError('hook_name must name at least one hook of the model, "blocks.6.hook_resid_post" say.')
        if len(set(self.hook_names)) != len(self.hook_names):
            raise ValueError(f"hook_name lists a hook twice: {', '.join(self.hook_names)}.")
        if not self.dictionaries:
            raise ValueError("dictionary is an empty list: give at least one config of what to build.")
        for config in self.dictionaries:
            unknown = [name for name in several(config.hook_name) if name not in self.hook_names]
            if unknown:
                raise ValueError(
                    f"dictionary.hook_name {unknown[0]!r} is not among the run's hooks, {', '.join(self.hook_names)}: "
                    "add it to hook_name."
                )

    def _check_checkpoints(self) -> None:
        if self.n_checkpoints and self.checkpoint_path is None:
            raise ValueError(f"n_checkpoints={self.n_checkpoints} needs a checkpoint_path, got None.")
        if self.n_checkpoints > self.training_tokens:
            raise ValueError(f"n_checkpoints={self.n_checkpoints} exceeds the {self.training_tokens} training_tokens.")

    def _check_logger(self) -> None:
        defaults = LoggingConfig()
        for name, reason in _UNUSED_LOGGING.items():
            if getattr(self.logger, name) != getattr(defaults, name):
                raise ValueError(
                    f"logger.{name} must stay at {getattr(defaults, name)!r}: {reason}. Got "
                    f"{getattr(self.logger, name)!r}."
                )
        _checks.positive(self.logger.wandb_log_frequency, "logger.wandb_log_frequency")

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hooks to read."""
        return several(self.hook_name)

    @property
    def dictionaries(self) -> tuple[BuildConfig, ...]:
        """The configs of what to build."""
        return several(self.dictionary)

    @property
    def torch_dtype(self) -> Any:
        """The torch dtype of the saved dictionaries."""
        return DTYPE_MAP[self.dtype]

    def dictionary_names(self) -> list[tuple[BuildConfig, str, list[str]]]:
        """For each config and each of its hooks, the names of its dictionaries, in the order they are built.

        A name is that of the dictionary's folder, as "blocks.6.hook_out_exemplars_p2"; names are all different.
        """
        taken: dict[str, int] = {}
        found = []
        for config in self.dictionaries:
            for hook_name in several(config.hook_name) or self.hook_names:
                names = [f"{hook_name}_{setting}".replace("/", "_") for setting in config.setting_names]
                for name in names:
                    taken[name] = taken.get(name, 0) + 1
                numbered = [name if taken[name] == 1 else f"{name}_{taken[name]}" for name in names]
                found.append((config, hook_name, numbered))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-safe content."""
        content = {own.name: getattr(self, own.name) for own in fields(self)}
        content = {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}
        builds = [build_to_dict(config) for config in self.dictionaries]
        single = isinstance(self.dictionary, ExemplarBuildConfig | SNMFBuildConfig)
        return content | {"dictionary": builds[0] if single else builds, "logger": asdict(self.logger)}

    @classmethod
    def from_dict(cls: type[AnyConfig], content: Mapping[str, Any]) -> AnyConfig:
        """The config that :meth:`to_dict` gave; a key it does not know is a ValueError with near matches."""
        options = dict(content)
        _checks.known_keys(options, [own.name for own in fields(cls)], cls.__name__)
        if "dictionary" in options:
            given = options["dictionary"]
            single = isinstance(given, Mapping)
            options["dictionary"] = build_from_dict(given) if single else list(map(build_from_dict, given))
        if "logger" in options:
            _checks.known_keys(options["logger"], [own.name for own in fields(LoggingConfig)], "logger")
            options["logger"] = LoggingConfig(**options["logger"])
        return cls(**options)

    def to_json(self, path: str | Path) -> Path:
        """Write the config as JSON."""
        return _files.write_json(path, self.to_dict())

    @classmethod
    def from_json(cls: type[AnyConfig], path: str | Path) -> AnyConfig:
        """Read what :meth:`to_json` wrote."""
        return cls.from_dict(_files.read_json(path))


@_checks.normalising
@dataclass(kw_only=True)
class ExemplarRunnerConfig(DictionaryRunnerConfig):
    """Build ExemplarPartitions: every hook and percentile from the same forward passes."""

    dictionary: ExemplarBuildConfig = field(default_factory=ExemplarBuildConfig)
    """What to build."""


@_checks.normalising
@dataclass(kw_only=True)
class SNMFRunnerConfig(DictionaryRunnerConfig):
    """Build SNMFDictionaries: every hook, number of components and sparsity from the same forward passes."""

    dictionary: SNMFBuildConfig = field(default_factory=SNMFBuildConfig)
    """What to build."""
