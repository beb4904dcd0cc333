"""Evaluations of many concepts: one after the other or spread over workers, and kept one by one."""

from collections.abc import Sequence
from typing import Any

from saelens_ext.continuations.subject import Inputs, Model
from saelens_ext.evals.concepts_data import Concept
from saelens_ext.evals.over_units import OverUnits, whole


def over_concepts(
    model: Model,
    concepts: Sequence[Concept],
    n_workers: int,
    workers: str,
    actor_options: dict[str, Any] | None,
    keys: Sequence[Any] = (),
) -> OverUnits:
    """What is measured of each concept; ``failures`` of a result are no errors, and are tried again by the next call.

    ``keys``: what tells each concept from others beside what it says itself, JSON-safe.
    """
    return OverUnits(
        inputs=Inputs(model=model, dictionaries=(), embedder=None, embeds=False),
        keys=[[*concept_key(concept), *more] for concept, more in zip(concepts, keys or [()] * len(concepts))],
        kind="concept",
        n_workers=n_workers,
        workers=workers,
        actor_options=actor_options,
        lasting=whole,
    )


def concept_key(concept: Concept) -> list[Any]:
    """What tells a concept from others, JSON-safe."""
    sides = concept.positives, concept.negatives, concept.hard_negatives
    return [concept.name, concept.description, *map(list, sides)]
