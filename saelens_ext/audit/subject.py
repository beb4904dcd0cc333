"""What is audited: a model, dictionaries and a sentence model, given or to be loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from sae_lens import SAE

from saelens_ext.audit.stages import describe
from saelens_ext.host.models import HostModel
from saelens_ext.host.sentence_model import load_sentence_model

Model = HostModel | Callable[[], HostModel]
"""A model, or a function without arguments that loads it."""
Dictionaries = SAE[Any] | Sequence[SAE[Any]] | Callable[[HostModel], SAE[Any] | Sequence[SAE[Any]]]
"""One dictionary or several, or a function that loads them for the model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is audited, loaded."""

    model: HostModel
    saes: list[SAE[Any]]
    embedder: Any

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """What it is, enough to know it again; JSON-safe."""
        return describe(self.model, self.saes, self.embedder)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The same as it was given; it travels to workers, where functions are called."""

    model: Model
    dictionaries: Dictionaries
    embedder: Any

    def load(self) -> Subject:
        """Load what is to be loaded."""
        # Modules can be called too.
        model: Any = self.model if isinstance(self.model, torch.nn.Module) else self.model()
        given = self.dictionaries
        found: Any = given if isinstance(given, torch.nn.Module | Sequence) else given(model)
        saes = [found] if isinstance(found, SAE) else list(found)
        return Subject(model=model, saes=saes, embedder=load_sentence_model(self.embedder))
