"""What dictionaries made from observed activations share as SAELens SAEs.

They are decoders first: a matrix ``W_dec`` of ``d_sae`` directions in activation space and an origin
``b_dec``. The encoder is derived from them, never stored, so ``W_enc`` is a view of ``W_dec``.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
from sae_lens import SAE, SAEConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import dtype_to_str
from torch import nn

from saelens_ext import _checks, _files
from saelens_ext.dictionaries.architecture_names import plain_name, written_name
from saelens_ext.ops.modes import standard_modes, without_autocast

# SAELens' loader writes these into every config it reads, whatever the architecture.
_KEYS_OF_THE_HOST = {"finetuning_scaling_factor"}

T = TypeVar("T", bound="DecoderOnlySAE")
C = TypeVar("C", bound="DecoderOnlyConfig")
FORMAT_VERSION = 1
if TYPE_CHECKING:

    class Metadata(SAEMetadata):
        """SAELens' metadata, whose entries (``hook_name``, ``model_name``, …) SAELens declares to be None."""

        def __getattr__(self, name: str) -> Any: ...

else:
    Metadata = SAEMetadata

UNSET: Any = None
"""The default of a config field that ``__post_init__`` fills, so that no reader of the config ever sees it."""


@_checks.normalising
@dataclass(kw_only=True)
class DecoderOnlyConfig(SAEConfig):
    """Config fields and checks that the dictionaries of this package share."""

    metadata: Metadata = field(default_factory=Metadata)
    """SAELens' metadata; a mapping is converted."""
    format_version: int = UNSET
    """Version of the saved form. A config that is given it must give every field of its class: SAELens silently drops
    keys it does not know, so a misspelt key shows only as a missing one."""

    @classmethod
    def from_dict(cls: type[C], config_dict: dict[str, Any]) -> C:
        """Build the config from a saved one; unlike SAELens', a key it does not know is a ValueError."""
        options = dict(config_dict)
        architecture = plain_name(options.pop("architecture", cls.architecture()))
        if architecture != cls.architecture():
            raise ValueError(
                f"The config is of architecture {architecture!r}; {cls.__name__} takes {cls.architecture()!r}."
            )
        names = [config_field.name for config_field in fields(cls)]
        for name in _KEYS_OF_THE_HOST.difference(names):
            options.pop(name, None)
        _checks.known_keys(options, names, cls.__name__)
        return cls(**options)

    def __post_init__(self) -> None:
        self._fill_unset()
        if isinstance(self.metadata, Mapping):
            self.metadata = Metadata(**_checks.plain(self.metadata, "metadata"))
        _checks.normalise_fields(self)
        super().__post_init__()
        for name, value in self.metadata.to_dict().items():
            self.metadata[name] = _checks.plain(value, f"metadata.{name}")
        _checks.positive(self.d_in, "d_in")
        _checks.positive(self.d_sae, "d_sae")
        if not self.apply_b_dec_to_input:
            raise ValueError("apply_b_dec_to_input must be True: activations are measured from the origin b_dec.")
        if self.normalize_activations not in ("none", "expected_average_only_in"):
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} has no meaning here: the dictionary was made "
                "from raw activations. Use 'none', or 'expected_average_only_in' for one built from scaled activations."
            )

    def to_dict(self) -> dict[str, Any]:
        """SAELens' own, JSON-safe whatever the metadata was given since."""
        return _checks.plain(super().to_dict(), type(self).__name__)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Values of the fields that a config made by hand may leave out; None for one that it may not."""
        return {}

    def _fill_unset(self) -> None:
        """Put the defaults where a config made by hand has no value; refuse a saved one with a gap."""
        is_saved = not _checks.is_none(self.format_version)
        if is_saved:
            _files.check_format_version(self.format_version, FORMAT_VERSION, f"The {self.architecture()} config")
        unset_fields = {name: value for name, value in self.defaults().items() if _checks.is_none(getattr(self, name))}
        missing = [name for name, value in unset_fields.items() if is_saved or value is None]
        if missing:
            raise ValueError(
                f"The {self.architecture()} config lacks {', '.join(map(repr, missing))}: "
                "is a key of cfg.json misspelt?"
            )
        for name, value in unset_fields.items():
            setattr(self, name, value)
        self.format_version = FORMAT_VERSION


class DecoderOnlySAE(SAE[DecoderOnlyConfig]):
    """Base of the dictionaries whose encoder is derived from their decoder."""

    _said_that_it_moves = False
    extra_rows: tuple[str, ...] = ()
    """Names of further ``(d_sae, d_in)`` buffers in the state dict."""

    def __init__(self, cfg: DecoderOnlyConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        if cfg.metadata.model_from_pretrained_kwargs is None:
            # SAELens' multiple_evals unpacks it, given or not. The config cannot set it: the host replaces its
            # metadata.
            cfg.metadata.model_from_pretrained_kwargs = {}

    @property
    def W_enc(self) -> torch.Tensor:  # type: ignore[override]
        """The tied encoder, a view of ``W_dec`` of shape ``(d_in, d_sae)``."""
        return self.W_dec.T

    def initialize_weights(self) -> None:
        """Allocate the state: unit rows along the axes, to be replaced by real ones."""
        options = {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_in, **options))
        # Deterministic and of unit norm, so that an object made by SAE.from_dict can be run before it is filled.
        rows = torch.zeros(self.cfg.d_sae, self.cfg.d_in, **options)
        index = torch.arange(self.cfg.d_sae, device=self.device)
        if self.device.type != "meta":
            rows[index, index % self.cfg.d_in] = 1
        self.W_dec = nn.Parameter(rows)
        for name in self.extra_rows:
            self.register_buffer(name, rows.clone())

    def here(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor on the dictionary's device; that it had to be moved is said once."""
        if x.device != self.W_dec.device and not self._said_that_it_moves:
            self._said_that_it_moves = True
            warnings.warn(
                f"The dictionary is on {self.W_dec.device} and is given tensors on {x.device}: they are moved "
                f"there and the results back, at every call. dictionary.to({str(x.device)!r}) spares that.",
                UserWarning,
                stacklevel=3,
            )
        return x.to(self.W_dec.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """SAELens' own, on the dictionary's device; the result is where ``x`` is."""
        return super().forward(self.here(x)).to(x.device)

    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """Move, cast, reshape, hook and centre an activation as SAELens does, after a check of its width."""
        width = (
            sae_in.shape[-2] * sae_in.shape[-1] if self.hook_z_reshaping_mode and sae_in.ndim > 1 else sae_in.shape[-1]
        )
        if width != self.cfg.d_in:
            _checks.width(sae_in, self.cfg.d_in, "The activation")
        return super().process_sae_in(self.here(sae_in))

    @without_autocast()
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Map codes ``(…, d_sae)`` back to activations ``(…, d_in)``: ``codes @ W_dec + b_dec``."""
        _checks.width(feature_acts, self.cfg.d_sae, "The code")
        out = self.hook_sae_recons(self.here(feature_acts) @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head).to(feature_acts.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The host reads self.dtype and cfg.dtype but updates them only in .to(); .bfloat16(), .half() and .cuda() pass
        # here too.
        result = super()._apply(fn, recurse)
        self.dtype, self.device = self.W_dec.dtype, self.W_dec.device
        self.cfg.dtype, self.cfg.device = dtype_to_str(self.dtype), str(self.device)
        return result

    def _take_unscaled(self, scaling_factor: float) -> None:
        """Put the origin, and the record of a typical norm, into units of raw activations."""
        self.b_dec.data /= scaling_factor
        if self.cfg.metadata.typical_norm is not None:
            self.cfg.metadata.typical_norm /= scaling_factor
        self.cfg.normalize_activations = "none"

    def fold_activation_whitening(
        self, mean: torch.Tensor, whitening_matrix: torch.Tensor, unwhitening_matrix: torch.Tensor
    ) -> NoReturn:
        """Refused with a NotImplementedError: whitening cannot be folded."""
        raise NotImplementedError(
            f"Whitening cannot be folded into {type(self).__name__}: its encoder is not linear in the activation, and "
            "distances between activations are not the same before and after. Build the dictionary from unwhitened "
            "activations."
        )

    # --- files ---

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write ``sae_weights.safetensors`` and ``cfg.json`` into the directory ``path``, and return their paths.

        Both are whole before either takes the place of an old one, so an interrupted save leaves the old dictionary.
        """
        files = self.files_to_save(path)
        _files.write_together(files)
        weights, config = files
        return weights, config

    def files_to_save(self, path: str | Path) -> dict[Path, _files.Writer]:
        """The weights and the config, each with its writer, in that order."""
        state_dict = self.state_dict()
        self.process_state_dict_for_saving(state_dict)
        config = self.cfg.to_dict()
        # A dictionary is saved to be loaded elsewhere, where this machine's device may not exist.
        config["device"] = "cpu"
        config["architecture"] = written_name(config["architecture"])
        return {
            Path(path) / SAE_WEIGHTS_FILENAME: _files.tensors_writer(state_dict),
            Path(path) / SAE_CFG_FILENAME: _files.json_writer(config),
        }

    @classmethod
    @standard_modes()
    def load_from_disk(
        cls: type[T], path: str | Path, device: str = "cpu", dtype: str | None = None, **kwargs: Any
    ) -> T:
        """Load a saved dictionary; as SAELens' own, with a clear error for a truncated or foreign file.

        ``dtype`` is for example "bfloat16"; by default that it was saved in.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, of another kind, or of another architecture.
        """
        architecture = plain_name(_files.read_json(Path(path) / SAE_CFG_FILENAME).get("architecture"))
        if architecture != cls.get_own_architecture():
            raise ValueError(f"{path} is of architecture {architecture!r}, not {cls.get_own_architecture()!r}.")
        _files.read_tensors(Path(path) / SAE_WEIGHTS_FILENAME)
        return super().load_from_disk(path, device=device, dtype=dtype, **kwargs)

    @classmethod
    def get_sae_class_for_architecture(cls: type[T], architecture: str) -> type[T]:
        """The class to load; called by SAELens. A reloaded class stands for the one of the same name before it."""
        registered, _ = get_sae_class(architecture)
        if (registered.__module__, registered.__qualname__) == (cls.__module__, cls.__qualname__):
            return cast(type[T], registered)
        return super().get_sae_class_for_architecture(architecture)

    @classmethod
    def get_own_architecture(cls) -> str:
        """The name under which SAELens knows this class."""
        return cls.get_sae_config_class_for_architecture("").architecture()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Check what a file holds before it becomes this dictionary's state.

        ValueError: unknown or missing tensors, wrong shapes, or non-finite entries.
        """
        rows = (self.cfg.d_sae, self.cfg.d_in)
        expected = {"b_dec": (self.cfg.d_in,), "W_dec": rows, **dict.fromkeys(self.extra_rows, rows)}
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        if shapes != expected:
            raise ValueError(f"The weights of {self.cfg.architecture()} have shapes {shapes}, its config {expected}.")
        for name, tensor in state_dict.items():
            _checks.finite(tensor, name)
