"""What is audited, and with what: a model, dictionaries, a sentence model, a sampler; given or to be loaded."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch
from sae_lens import SAE

from saelens_ext import _files
from saelens_ext.continuations.samplers.sampler import Sampler
from saelens_ext.host.flat_sae import dictionaries_of
from saelens_ext.host.models import HostModel, check_model
from saelens_ext.host.sentence_model import load_sentence_model
from saelens_ext.host.weights_fingerprint import identify_model, weights_fingerprint

Model = HostModel | Callable[[], HostModel]
"""A model, or a function without arguments that loads it."""
Dictionaries = SAE[Any] | Sequence[SAE[Any]] | Callable[[HostModel], SAE[Any] | Sequence[SAE[Any]]]
"""One dictionary or several, or a function that loads them for the model."""
Sampling = Sampler | Callable[[], Sampler] | None
"""Where continuations come from if not from the model, or a function without arguments that makes it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is audited, loaded."""

    model: HostModel
    saes: list[SAE[Any]]
    embedder: Any
    sampler: Sampler | None = None

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """What it is, enough to know it again; JSON-safe."""
        sampler = {} if self.sampler is None else {"sampler": dict(self.sampler.describe())}
        return _describe(self.model, self.saes, self.embedder) | sampler


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The same as it was given; it travels to workers, where functions are called."""

    model: Model
    dictionaries: Dictionaries
    embedder: Any
    sampler: Sampling = None
    embeds: bool = True
    """Whether a sentence model is needed."""

    def check_workers(self, n_workers: int) -> None:
        """ValueError for several workers and a model that they could not load."""
        if n_workers > 1 and isinstance(self.model, torch.nn.Module):
            raise ValueError(
                f"n_workers={n_workers} needs a model for each worker: give a function without arguments that loads "
                f"it, such as lambda: load_model(name), instead of a {type(self.model).__name__}."
            )

    def load_as(self, about: Mapping[str, Any]) -> Subject:
        """The same in a worker; ValueError if it is not what it is elsewhere."""
        subject = self.load()
        if (own := _files.json_safe(subject.about)) != _files.json_safe(about):
            raise ValueError(f"A worker audits another model, dictionary or embedder, {own}, than {about} here.")
        return subject

    def load(self) -> Subject:
        """Load what is to be loaded."""
        model: Any = self.model() if _is_function(self.model) else self.model
        check_model(model, proxy=False)
        found: Any = self.dictionaries(model) if _is_function(self.dictionaries) else self.dictionaries
        saes = dictionaries_of([] if found is None else found)
        sampler = self.sampler() if _is_function(self.sampler) else self.sampler
        if sampler is not None and not isinstance(sampler, Sampler):
            raise ValueError(
                f"sampler must be an EndpointSampler, a HuggingFaceSampler or another Sampler, with draw and describe; "
                f"got {sampler!r:.100}."
            )
        embedder = load_sentence_model(self.embedder) if self.embeds else None
        return Subject(model=model, saes=saes, embedder=embedder, sampler=sampler)


def _is_function(given: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether something is to be called for what is meant; modules, and samplers, can be called too."""
    return callable(given) and not isinstance(given, torch.nn.Module | Sampler)


def let_go() -> None:
    """Give back the memory of a model that nothing refers to, before workers load their own: hooks refer to themselves,
    and CUDA's allocator keeps what it had.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _describe(model: HostModel, dictionaries: list[SAE[Any]], embedder: Any) -> dict[str, Any]:
    """What an audit is of, enough to know it again; JSON-safe."""
    return {
        "model": identify_model(model),
        "dictionaries": [_describe_dictionary(sae) for sae in dictionaries],
        "embedder": describe_embedder(embedder),
    }


def describe_embedder(embedder: Any) -> dict[str, Any]:
    """What a sentence model is; empty for None."""
    weights = {"weights": weights_fingerprint(embedder)} if isinstance(embedder, torch.nn.Module) else {}
    return {} if embedder is None else {"name": _name_of(embedder)} | weights


def _describe_dictionary(sae: SAE[Any]) -> dict[str, Any]:
    metadata = sae.cfg.metadata
    written = {"hook_name_out": metadata.hook_name_out} if metadata.hook_name_out is not None else {}
    return {
        "architecture": sae.cfg.architecture(),
        "hook_name": metadata.hook_name,
        **written,
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "weights": weights_fingerprint(sae),
    }


def _name_of(embedder: Any) -> str:
    card = getattr(embedder, "model_card_data", None)
    first = next(iter(embedder), None) if isinstance(embedder, torch.nn.Sequential) else None
    config = getattr(getattr(first, "auto_model", None), "config", None)
    found = getattr(card, "base_model", None) or getattr(config, "_name_or_path", None) or type(embedder).__name__
    return "/".join(Path(str(found)).parts[-2:])
