"""What a comparison of steering does for one concept, whoever does it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saelens_ext.continuations.subject import Subject
from saelens_ext.evals.attempts import Attempts
from saelens_ext.evals.concepts_data import Concept
from saelens_ext.evals.fingerprint import fingerprint
from saelens_ext.evals.methods import Method
from saelens_ext.evals.over_concepts import concept_key
from saelens_ext.evals.over_units import Measured
from saelens_ext.evals.steering.arms import arms_of, cells_of, resolved, shared_baselines
from saelens_ext.evals.steering.texts import Asked, said_texts
from saelens_ext.evals.sweep_store import SweepStore
from saelens_ext.host.chat_template import Prompt
from saelens_ext.host.models import describe_model
from saelens_ext.ops.modes import standard_modes
from saelens_ext.steering.sampling import SamplingOptions, sample_texts


@dataclass(frozen=True, kw_only=True)
class SteeringHow:
    """How every concept is steered towards; the fields are those arguments of ``compare_steering``."""

    prompts: list[Prompt]
    calibration_prompts: list[Prompt]
    targets: Sequence[float | int]
    signs: Sequence[int]
    n: int
    baselines: Sequence[str]
    prompting: str
    options: SamplingOptions
    chat_template_options: Mapping[str, Any] | None
    batch_size: int
    seed: int

    @property
    def sampling(self) -> dict[str, Any]:
        """How texts are sampled, as keywords."""
        names = ("n", "options", "chat_template_options", "batch_size")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """What all concepts share, made once."""

    methods: list[Method]
    """Those that can steer the model."""
    baselines: list[Method]
    """Those that are fitted to all concepts' sentences."""
    plain: list[list[str]]
    """Unsteered continuations of each prompt."""
    model: dict[str, Any]
    """What it is, in words."""


def prepared(
    how: SteeringHow,
    methods: Sequence[Method],
    concepts: Sequence[Concept],
    folder: str | Path | None,
    attempts: Attempts,
    subject: Subject,
) -> tuple[Shared, SweepStore]:
    """What all concepts share, and where each is kept; ValueError for a folder of other settings."""
    known: dict[str, Any] = {"methods": list(map(fingerprint, methods)), "concepts": ""}
    if {"pca", "kmeans"} & set(how.baselines):  # of which the sentences of all concepts are part
        known["concepts"] = fingerprint(list(map(concept_key, concepts)))
    store = SweepStore.at(folder, {**subject.about, **known, **asdict(how)})
    usable = resolved(subject.model, methods, attempts)
    fitted = shared_baselines(
        subject.model, usable, concepts, how.baselines, attempts, batch_size=how.batch_size, seed=how.seed
    )
    plain = store.named("unsteered", lambda: {"texts": sample_texts(subject.model, how.prompts, **how.sampling)})
    shared = Shared(methods=usable, baselines=fitted, plain=plain["texts"], model=describe_model(subject.model))
    return shared, store


def measure(
    how: SteeringHow,
    shared: Shared,
    concepts: Sequence[Concept],
    columns: Mapping[str, Mapping[str, int]],
    subject: Subject,
) -> Callable[[int], Measured]:
    """What finds the texts of a concept by its number, with a loaded model: ``texts``, rows of them; ``asked``, its
    cells as `Asked`; and ``failures``.
    """
    model, template = subject.model, {"chat_template_options": how.chat_template_options}

    @standard_modes(gradients=False)
    def measured(number: int) -> Measured:
        concept, attempts = concepts[number], Attempts()
        arms = arms_of(
            model, shared.methods, shared.baselines, concept, number, own_columns(columns, concept), how.baselines,
            attempts, batch_size=how.batch_size, seed=how.seed,
        )  # fmt: skip
        cells = cells_of(
            model, arms, attempts, targets=how.targets, signs=how.signs, prompts=how.calibration_prompts,
            batch_size=how.batch_size, **template,
        )  # fmt: skip
        prompting = how.prompting if "prompting" in how.baselines else None
        said = said_texts(
            model, cells, concept, how.prompts, shared.plain, attempts, prompting=prompting, **how.sampling
        )
        asked = [Asked(cell.arm.concept, cell.arm.method, cell.arm.draw, cell.strength.reached) for cell in cells]
        return {"texts": said, "asked": list(map(list, asked))} | attempts.packed()

    return measured


def own_columns(columns: Mapping[str, Mapping[str, int]], concept: Concept) -> dict[str, int]:
    """The columns that are given for a concept, by method."""
    return {method: int(chosen[concept.name]) for method, chosen in columns.items() if concept.name in chosen}
