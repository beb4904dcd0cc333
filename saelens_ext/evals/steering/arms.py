"""What is to be steered with: for every concept a direction of each method and baseline, at its own hook, at matched
strengths.

Symbols
    arm  one direction for one concept: a method's, or a baseline's
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationBatch
from saelens_ext.concepts.comparison import DIFF_MEANS, best_column
from saelens_ext.concepts.diff_means import difference_of, sentence_sums
from saelens_ext.concepts.sentence_scores import pool_scores
from saelens_ext.concepts.token_activations import token_activations
from saelens_ext.evals import baselines
from saelens_ext.evals.attempts import Attempts
from saelens_ext.evals.concepts_data import Concept
from saelens_ext.evals.methods import Kind, Method
from saelens_ext.host.chat_template import Prompt
from saelens_ext.host.hook_names import one_spelling, resolve_hook
from saelens_ext.host.models import HostModel
from saelens_ext.ops.detection import auroc, standardised_difference
from saelens_ext.steering.divergence_search import DivergenceMeter, MatchedStrength
from saelens_ext.steering.interventions import unit_rows
from saelens_ext.steering.strength import match_strengths

RANDOM, PCA, KMEANS, PROMPTING = "random direction", "principal components", "k-means", "prompting"
BASELINES = {"diff_means": DIFF_MEANS, "random": RANDOM, "pca": PCA, "kmeans": KMEANS, "prompting": PROMPTING}
MAX_COLUMNS = 100
"""Principal components and means that a concept may choose among."""
NO_COLUMN = -1
_MAX_ROWS = 10_000

EXPLAINED = {
    DIFF_MEANS: "The difference of the mean activations of a concept's sentences: a direction made with the labels.",
    RANDOM: "One direction drawn from a Gaussian for each concept.",
    PCA: "The principal component of the sentences' activations, with either sign, that detects the concept best.",
    KMEANS: "The mean of a k-means clustering of the sentences' activations that detects the concept best.",
    PROMPTING: "The unsteered model, told in the prompt what to write about.",
}
KINDS: dict[str, Kind] = {
    DIFF_MEANS: "supervised", RANDOM: "control", PCA: "control", KMEANS: "control", PROMPTING: "supervised",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """A direction for a concept."""

    method: str
    draw: int
    concept: str
    column: int
    """Of the method; -1 for a direction that was made for the concept."""
    hook_name: str
    direction: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """An arm at one strength."""

    arm: Arm
    strength: MatchedStrength
    kl_everywhere: float
    """Divergence over all positions of the calibration prompts, in nats; NaN where the target was not reached."""


def arms_of(
    model: HostModel,
    methods: Sequence[Method],
    shared: Sequence[Method],
    concept: Concept,
    number: int,
    columns: Mapping[str, int],
    named: Sequence[str],
    attempts: Attempts,
    *,
    batch_size: int,
    seed: int,
) -> list[Arm]:
    """The directions of methods and baselines for a concept.

    A method's column is the one given, or of those with a direction the one whose sentence maximum has the highest
    AUROC on the concept's sentences. The sentences choose what to steer with and judge nothing, so none is kept apart.

    Args:
        model: any TransformerLens model.
        methods: as :func:`resolved` gives them.
        shared: baselines of :func:`shared_baselines`.
        concept: what is steered towards.
        number: of the concept, on which its random direction depends.
        columns: which column to steer with, by method.
        named: the baselines that are wanted.
        attempts: where failures are recorded.
        batch_size: sentences in a forward pass.
        seed: of random directions.
    """
    arms: list[Arm] = []
    hooks = _hooks(methods)
    read_at = list(dict.fromkeys([*(method.detector.hook_name for method in methods), *hooks]))
    with attempts.of("", concept.name):
        batches = _read(model, read_at, concept, batch_size)
        for method in (*methods, *shared):
            with attempts.of(method.name, concept.name):
                column = columns.get(method.name)
                arms.append(_arm(method, concept, _best(method, batches, concept) if column is None else column))
        for hook in hooks:
            where = _where(hook, hooks)
            if "diff_means" in named:
                with attempts.of(DIFF_MEANS + where, concept.name):
                    arms.append(_made(DIFF_MEANS + where, concept, hook, _difference(batches, concept, hook)))
            if "random" in named:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
                direction = torch.randn(batches[0].activations[hook].shape[-1], generator=generator)
                arms.append(_made(RANDOM + where, concept, hook, direction))
    return arms


def cells_of(
    model: HostModel,
    arms: Sequence[Arm],
    attempts: Attempts,
    *,
    targets: Sequence[float | int],
    signs: Sequence[int],
    prompts: Sequence[Prompt],
    chat_template_options: Mapping[str, Any] | None,
    batch_size: int,
) -> list[Cell]:
    """Every arm of a concept at every target and sign; all directions at one hook are searched together."""
    cells = []
    for hook in dict.fromkeys(arm.hook_name for arm in arms):
        here = [arm for arm in arms if arm.hook_name == hook]
        with attempts.of("", here[0].concept):
            rows = torch.stack([arm.direction.detach().cpu().float() for arm in here])
            searches = match_strengths(
                model, hook, rows, targets, prompts=prompts, signs=signs, batch_size=batch_size,
                chat_template_options=chat_template_options,
            )  # fmt: skip
            strengths = [(number, one) for number, search in enumerate(searches) for one in search.strengths]
            how: dict[str, Any] = {"average_over": "all", "chat_template_options": chat_template_options}
            meter = DivergenceMeter(model, hook, unit_rows(rows), list(prompts), batch_size, **how)
            reached = [(number, one.coefficient) for number, one in strengths if one.reached]
            everywhere = dict(zip(reached, meter.divergences(reached), strict=True))
            cells += [
                Cell(arm=here[n], strength=one, kl_everywhere=everywhere.get((n, one.coefficient), float("nan")))
                for n, one in strengths
            ]
    return cells


def check_columns(
    columns: Mapping[str, Mapping[str, int]] | None, methods: Sequence[Method], concepts: Sequence[Concept]
) -> Mapping[str, Mapping[str, int]]:
    """Columns given for methods and concepts by name; ValueError for a name or a column that is none."""
    by_name = {method.name: method for method in methods}
    names = [concept.name for concept in concepts]
    for method, chosen in (columns or {}).items():
        _checks.choice(method, list(by_name), "a key of columns")
        for concept, column in chosen.items():
            _checks.choice(concept, names, f"a key of columns[{method!r}]")
            k = len(by_name[method].detector.names)
            if not 0 <= column < k:
                raise ValueError(f"columns[{method!r}][{concept!r}] must be one of 0 to {k - 1}, got {column!r}.")
    return columns or {}


def _arm(method: Method, concept: Concept, column: int) -> Arm:
    hook_name, directions = method.acting()
    direction = directions[column].detach().cpu()
    if not bool(direction.any()):
        raise ValueError(f"Column {column} of {method.name!r} is a dead latent, without a direction.")
    return _made(method.name, concept, hook_name, direction, method.draw, column)


def _made(name: str, concept: Concept, hook: str, direction: Tensor, draw: int = 0, column: int = NO_COLUMN) -> Arm:
    return Arm(method=name, draw=draw, concept=concept.name, column=column, hook_name=hook, direction=direction)


def _best(method: Method, batches: Sequence[ActivationBatch], concept: Concept) -> int:
    n = len(concept.positives)
    scores = pool_scores(batches, {"": method.detector}, n + len(concept.negatives), "max")[""]
    sides = scores[:n], scores[n:]
    alive = method.acting()[1].any(dim=1).to(scores.device)
    return best_column(torch.where(alive, auroc(*sides), -1.0), standardised_difference(*sides))


def _difference(batches: Sequence[ActivationBatch], concept: Concept, hook: str) -> Tensor:
    sizes = [len(concept.positives), len(concept.negatives)]
    sums = sentence_sums(batches, hook, sum(sizes), equal_norms=True)
    up, down = (sums.of(rows) for rows in torch.arange(sum(sizes)).split(sizes))
    return difference_of(up, down, hook, weighting="sentence", equal_norms=True).direction


def shared_baselines(
    model: HostModel,
    methods: Sequence[Method],
    concepts: Sequence[Concept],
    named: Sequence[str],
    attempts: Attempts,
    *,
    batch_size: int,
    seed: int,
) -> list[Method]:
    """Principal components and k-means of the activations at all concepts' sentences, as many as the methods have
    columns; they are the same for every concept.
    """
    made: list[Method] = []
    hooks, read = _hooks(methods), list[ActivationBatch]()
    for concept in concepts if {"pca", "kmeans"} & set(named) and hooks else []:
        with attempts.of("", concept.name):
            read += _read(model, hooks, concept, batch_size)
    for hook in hooks if read else []:
        x = torch.cat([batch.activations[hook] for batch in read])
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:_MAX_ROWS].to(x.device)]
        most = max(len(method.detector.names) for method in methods if method.acts_at == hook)
        k = min(most, MAX_COLUMNS, max(1, len(x) // 2), x.shape[1])
        if "pca" in named:
            made.append(baselines.principal_directions(x, k, hook, name=PCA + _where(hook, hooks)))
        if "kmeans" in named:
            made.append(baselines.kmeans_directions(x, k, hook, seed=seed, name=KMEANS + _where(hook, hooks)))
    return made


def _hooks(methods: Sequence[Method]) -> list[str]:
    return list(dict.fromkeys(str(method.acts_at) for method in methods))


def _read(model: HostModel, hooks: Sequence[str], concept: Concept, batch_size: int) -> list[ActivationBatch]:
    sentences = [*concept.positives, *concept.negatives]
    return list(token_activations(model, hooks, sentences, batch_size=batch_size))


def _where(hook: str, hooks: Sequence[str]) -> str:
    return f" at {hook}" if len(hooks) > 1 else ""


def resolved(model: HostModel, methods: Sequence[Method], attempts: Attempts) -> list[Method]:
    """The methods that can steer this model."""
    found = []
    for method in attempts.usable(model, methods):
        with attempts.of(method.name, ""):
            resolve_hook(model, method.acting()[0])
            found.append(method)
    spelling = one_spelling(model, [str(method.acts_at) for method in found])
    return [replace(method, acts_at=spelling[str(method.acts_at)]) for method in found]
