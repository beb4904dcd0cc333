"""What to build: the options of each kind of dictionary, with one value or several where several make sense."""
# ruff: noqa: RUF009  `parsed` makes a field.

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Union

from saelens_ext import _checks
from saelens_ext.dictionaries.fit_exemplars import ExemplarFitConfig
from saelens_ext.dictionaries.fit_snmf import SNMFFitConfig
from saelens_ext.runner.parsing import number, one_or_several, parsed, text_or_none, whole_number

Number = Union[float, int]


@_checks.normalising
@dataclass(kw_only=True, frozen=True)
class ExemplarBuildConfig(ExemplarFitConfig):
    """ExemplarPartitions to build: one for every hook and percentile, all grown in the same pass over the model."""

    percentile: Number | Sequence[Number] = parsed(10.0, one_or_several(number), "P[,P…]")
    """Percentile or percentiles of the pairwise distances, each in (0, 100); higher means fewer, wider regions."""
    neighbour_factor: Number | Sequence[Number] = parsed(1.0, one_or_several(number), "X[,X…]")
    """Used instead of percentiles under threshold_rule=nearest_neighbour: so many times the median distance to the
    nearest neighbour, each above 0."""
    threshold: Number | None = None
    """A cosine distance in (0, 2] to use instead of either."""
    hook_name: str | Sequence[str] | None = parsed(None, one_or_several(text_or_none), "HOOK[,HOOK…]")
    """Those of the run's hooks to build at; by default all."""
    seed: int | None = None
    """Of everything random in these fits; by default the run's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("percentile", 100), ("neighbour_factor", float("inf"))):
            values = several(getattr(self, name))
            for value in values:
                _checks.between(value, 0, most, name)
            _different(values, name)
        if self.threshold is not None:
            _checks.between(self.threshold, 0, 2, "threshold", closed_high=True)

    @property
    def resolutions(self) -> tuple[float, ...]:
        """The percentiles, or factors, asked for; none where the threshold is given."""
        values = self.percentile if self.threshold_rule == "percentile" else self.neighbour_factor
        return () if self.threshold is not None else tuple(map(float, several(values)))

    def fit_config(self, seed: int) -> ExemplarFitConfig:
        """The options shared by all dictionaries of this config."""
        return ExemplarFitConfig(**_shared(self, ExemplarFitConfig, seed))

    @property
    def setting_names(self) -> list[str]:
        """A short name for each setting, in the order they are built."""
        letters = "p" if self.threshold_rule == "percentile" else "nn"
        names = [f"exemplars_{letters}{resolution:g}" for resolution in self.resolutions]
        return names if self.threshold is None else [f"exemplars_t{self.threshold:g}"]


@_checks.normalising
@dataclass(kw_only=True, frozen=True)
class SNMFBuildConfig(SNMFFitConfig):
    """SNMFDictionaries to build, one for every hook, number of components and sparsity, from a single pass."""

    n_components: int | Sequence[int] = parsed(100, one_or_several(whole_number), "K[,K…]")
    """Number or numbers of features."""
    sparsity: Number | Sequence[Number] = parsed(0.01, one_or_several(number), "S[,S…]")
    """Fraction or fractions of the neurons that a feature may use, each in (0, 1]."""
    hook_name: str | Sequence[str] | None = parsed(None, one_or_several(text_or_none), "HOOK[,HOOK…]")
    """Those of the run's hooks to build at, meant to be MLP neurons; by default all."""
    memory_limit: int = SNMFFitConfig.memory_limit
    """Bytes of activations to hold for each hook (and of those held out); a fit needs about three times its hook's on
    top of those of the hooks that are still to be fitted. Activations of a hook are let go with its last fit."""
    seed: int | None = None
    """Of everything random in these fits; by default the run's."""

    def __post_init__(self) -> None:
        _checks.normalise_fields(self)
        _different(several(self.n_components), "n_components")
        _different(several(self.sparsity), "sparsity")
        if not 0 <= self.held_out <= 0.5:
            raise ValueError(f"held_out, a fraction of the documents, must lie in [0, 0.5], got {self.held_out!r}.")
        self.settings(seed=0)

    def settings(self, seed: int) -> list[tuple[int, SNMFFitConfig]]:
        """Every number of components with the options of its fit, in the order they are built."""
        shared = _shared(self, SNMFFitConfig, seed)
        pairs = itertools.product(several(self.n_components), several(self.sparsity))
        return [(_checks.positive(k, "n_components"), SNMFFitConfig(**shared | {"sparsity": s})) for k, s in pairs]

    @property
    def setting_names(self) -> list[str]:
        """A short name for each setting, in the order they are built."""
        ending = "_paper" if self.method == "paper" else ""
        return [f"snmf_k{k}_s{config.sparsity:g}{ending}" for k, config in self.settings(seed=0)]


BuildConfig = Union[ExemplarBuildConfig, SNMFBuildConfig]
_ARCHITECTURES: dict[str, type] = {"exemplar_partition": ExemplarBuildConfig, "snmf": SNMFBuildConfig}


def several(values: Any) -> tuple[Any, ...]:
    """One value or a sequence of them as a tuple; None is empty."""
    if values is None:
        return ()
    return tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)


def build_to_dict(config: BuildConfig) -> dict[str, Any]:
    """The config as JSON-safe content, with its architecture as SAELens calls it."""
    (architecture,) = [name for name, kind in _ARCHITECTURES.items() if type(config) is kind]
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return {"architecture": architecture, **listed}


def build_from_dict(content: Mapping[str, Any]) -> BuildConfig:
    """The config that :func:`build_to_dict` gave; ValueError for an architecture or option that is not known."""
    options = dict(content)
    architecture = options.pop("architecture", None)
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"dictionary.architecture must be one of {', '.join(map(repr, _ARCHITECTURES))}, got {architecture!r}."
        )
    kind = _ARCHITECTURES[architecture]
    _checks.known_keys(options, [field.name for field in fields(kind)], f"The {architecture} dictionary")
    return kind(**options)


def _shared(config: BuildConfig, kind: type, seed: int) -> dict[str, Any]:
    """The fields of a config that ``kind`` has too, with the run's seed where it has none."""
    shared = {field.name: getattr(config, field.name) for field in fields(kind)}
    return shared | {"seed": seed if config.seed is None else config.seed}


def _different(values: Sequence[Any], name: str) -> None:
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name} must be at least one value and all different, got {tuple(values)}.")
