"""Which methods detect concepts: each chooses a column on half of a concept's sentences and is judged on the others."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

import torch

from saelens_ext import _checks
from saelens_ext.concepts.comparison import DIFF_MEANS
from saelens_ext.concepts.sentence_scores import Pooling, warn_of_bos
from saelens_ext.continuations.subject import Model, Subject
from saelens_ext.evals.attempts import Attempts
from saelens_ext.evals.concepts_data import Concept, check_concepts
from saelens_ext.evals.detection.detection_cells import (
    Reading,
    Split,
    concept_splits,
    difference_cells,
    length_cells,
    method_cells,
    probe_cells,
)
from saelens_ext.evals.evidence import Evidence, OverConcepts
from saelens_ext.evals.fingerprint import fingerprint
from saelens_ext.evals.methods import Method, check_methods
from saelens_ext.evals.over_concepts import over_concepts
from saelens_ext.evals.over_units import Measured
from saelens_ext.evals.sweep_store import SweepStore
from saelens_ext.host.hook_names import one_spelling
from saelens_ext.host.models import HostModel, describe_model
from saelens_ext.ops.modes import standard_modes

RULES = ("auroc", "contrast")
PROBE = "logistic probe"
TWIN = "untrained twin"
LENGTH = "number of tokens"

_Cells = Callable[[Reading], Iterable[dict[str, Any]]]
_Twin = HostModel | Callable[[HostModel], HostModel] | None
_COLUMNS = ["concept", "rule", "method", "metric", "value", "split", "draw", "column", "chosen"]


class DetectionEvidence(OverConcepts, Evidence):
    """Held-out detection of concepts by several methods; a unit is a concept."""

    kind: ClassVar[str] = "detection"
    title: ClassVar[str] = "Detection of concepts"
    question: ClassVar[str] = (
        "Does a method, choosing one of its directions on some sentences, detect a concept in others better than "
        "matched controls do?"
    )
    unit_text: ClassVar[str] = (
        "A unit is a concept. Its sentences are split in halves several times; each method chooses a direction on one "
        "half and is judged on the other, and the results are averaged within the concept. Intervals and tests are "
        "over concepts, so they speak of other concepts of this kind. Under the rule auroc a method chooses the "
        "direction with the highest AUROC on its half, under contrast the one whose scores differ most between the "
        "tokens of sentences with the concept and of those without. What permuted labels choose, and the mean over all "
        "directions, are above 0.5 where the two sides differ in what most directions respond to, such as the length "
        "of sentences; what detects more than length keeps its AUROC between sentences of about equal length."
    )
    groups: ClassVar[tuple[str, ...]] = ("rule",)
    metrics: ClassVar[dict[str, str]] = {
        "auroc": "mean held-out AUROC",
        "chosen_auroc": "AUROC on the sentences that chose",
        "optimism": "optimism (AUROC where chosen - held out)",
        "permuted_auroc": "held-out AUROC of what permuted labels choose",
        "any_auroc": "held-out AUROC, mean over all directions",
        "equal_length_auroc": "held-out AUROC between sentences of about equal length",
        "hard_negative_auroc": "held-out AUROC against hard negatives",
    }
    other_bounds: ClassVar[dict[str, tuple[float, float]]] = dict.fromkeys(metrics, (0.0, 1.0)) | {
        "optimism": (-1.0, 1.0)
    }


@standard_modes(gradients=False)
def evaluate_detection(
    model: Model,
    methods: Iterable[Method],
    concepts: Iterable[Concept],
    *,
    rules: Sequence[str] = RULES,
    n_splits: int = 5,
    pooling: Pooling = "max",
    diff_means: bool = True,
    probe: bool = True,
    length: bool = True,
    untrained_twin: _Twin = None,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    batch_size: int = 16,
    seed: int = 0,
    folder: str | Path | None = None,
    n_workers: int = 1,
    workers: str = "joblib",
    actor_options: dict[str, Any] | None = None,
    progress: bool = False,
) -> DetectionEvidence:
    """Let methods choose a direction for each concept on half of its sentences, and judge it on the other half.

    The model reads each concept's sentences once, at all hooks, whatever the number of methods. Memory: the activations
    and scores of one concept. What fails is recorded in ``failures``, and the rest goes on.

    Args:
        model: any TransformerLens model, or a function without arguments that loads it.
        methods: with different names; see :class:`~saelens_ext.evals.methods.Method` and
            :mod:`~saelens_ext.evals.baselines`. Draws of one control are averaged.
        concepts: at least 1, and 6 or more for a claim, with 4 different sentences a side.
        rules: how a direction is chosen: "auroc", the highest AUROC of the sentences' scores, and "contrast", the
            largest mean score over positive tokens minus that over negative ones. Both are judged by the AUROC of the
            sentences' scores.
        n_splits: halvings of each concept's sentences.
        pooling: what a sentence's score is, over its tokens but special ones: the largest ("max"), the mean ("mean"),
            or that of the last ("last"). The largest of more tokens is larger, so "max" responds to length.
        diff_means: add the difference of means, made from the choosing half, at every hook: the supervised reference.
        probe: add an L2 logistic probe of mean-pooled activations, fitted on the choosing half.
        length: add the number of tokens of a sentence as a score, more or fewer as the choosing half has it: what is
            detected without the model.
        untrained_twin: a model of the same kind with untrained weights, or a function of the model that makes it, such
            as :func:`~saelens_ext.evals.baselines.untrained_twin`; ``diff_means`` and ``probe`` are then made on it
            too, which shows what is to be detected without learning.
        n_permutations: assignments of signs in tests of differences.
        confidence: of the intervals, in (0, 1).
        batch_size: windows in a forward pass.
        seed: of splits, folds and resampling.
        folder: where every concept is kept when it is done; what is there is not computed again, also where concepts
            were added, but for concepts on which something failed.
        n_workers: concepts at a time, each by a worker with a model of its own: ``model`` must then be a function, and
            ``folder``, if any, be on storage that all share. It is called here too, to tell what is measured, and that
            model is let go. Methods travel to the workers. With the same number of threads the results are the same to
            the bit.
        workers: "joblib", processes or what ``joblib.parallel_config`` names; or "ray", actors on the cluster that
            ``ray.init`` was called for, or on this machine.
        actor_options: Ray's resources of an actor, such as ``{"num_gpus": 1}``; one CPU by default.
        progress: show a progress bar.

    Returns:
        The evidence: AUROCs on held-out and on choosing halves, and optimism (their difference). Of held-out AUROCs
        besides: of the direction that permuted labels choose; the mean over all directions, chosen by nothing; of the
        chosen one between sentences whose numbers of tokens differ by at most a tenth (NaN where too few do); and
        against hard negatives where a concept has some. The second and third depart from 0.5 where the two sides differ
        in something that most directions respond to, such as length.

    Raises:
        ValueError: no method or concept, a name used twice, fewer than 4 different sentences a side, an unknown rule,
            nothing that could be computed, a folder of other settings, or several workers and a model or a twin that is
            no function.
        RuntimeError: a worker died; with a folder the same call goes on from what was finished.

    Examples:
        >>> concepts = [
        ...     sx.Concept(
        ...         name=word,
        ...         positives=[f"The {word} is number {n}." for n in range(8)],
        ...         negatives=[f"Nothing is number {n}." for n in range(8)],
        ...     )
        ...     for word in ("cat", "sea", "law", "sun", "car", "oak", "ice", "map")
        ... ]
        >>> methods = [sx.Method.from_dictionary("regions", partition)]
        >>> found = sx.evaluate_detection(model, methods, concepts, rules=["auroc"], n_splits=2, probe=False)
        >>> found.claim().startswith("Over 8 concepts (rule: auroc), regions (mean held-out AUROC ")
        True

    Source: the detection of arXiv 2605.14347 and of AxBench (arXiv 2501.17148), with selection and judging apart.
    """
    _checks.between(confidence, 0, 1, "confidence")
    for number, rule in enumerate(_checks.listed(rules, "rules", "rule")):
        _checks.choice(rule, RULES, f"rules[{number}]")
    _checks.choice(pooling, get_args(Pooling), "pooling")
    given = check_concepts(list(concepts))
    splits = [concept_splits(concept, n_splits, seed) for concept in given]
    chosen, attempts = check_methods(methods), Attempts()
    if n_workers > 1 and isinstance(untrained_twin, torch.nn.Module):
        raise ValueError(
            f"n_workers={n_workers} needs a twin for each worker: give a function of the model that makes it, such as "
            f"untrained_twin=evals.untrained_twin, instead of a {type(untrained_twin).__name__}."
        )
    each = over_concepts(model, given, n_workers, workers, actor_options)

    def look(subject: Subject) -> tuple[_Tries, dict[str, Any]]:
        tries = _Tries.of(subject.model, chosen, attempts, diff_means, probe, length, untrained_twin, pooling, seed)
        return tries, describe_model(subject.model)

    tries, described = each.opened(look)
    settings: dict[str, Any] = {"rules": list(rules), "n_splits": n_splits, "pooling": pooling}
    store = SweepStore.at(
        folder,
        {**each.about, **settings, "hooks": tries.hooks, "batch_size": batch_size, "seed": seed}
        | {"methods": list(map(fingerprint, chosen)), "untrained_twin": fingerprint(untrained_twin)}
        | {"references": [*tries.references, *tries.fixed]},
    )
    measure = partial(_measure, tries, given, splits, untrained_twin, rules, pooling, batch_size)
    for found in each.measured(measure, store, progress):
        attempts.add(found)
    kinds = {method.name: str(method.kind) for method in chosen} | dict.fromkeys(tries.references, "supervised")
    settings |= {"confidence": confidence, "n_permutations": n_permutations}
    sizes = {concept.name: [len(concept.positives), len(concept.negatives)] for concept in given}
    return DetectionEvidence(
        cells=attempts.cells(_COLUMNS, column=-1, chosen=None),
        kinds=kinds | dict.fromkeys([*tries.fixed, *tries.twins], "control"),
        descriptions={method.name: method.description for method in chosen}
        | _explained(tries.references, tries.fixed, tries.twins),
        settings=settings
        | {"seed": seed, "hooks": tries.hooks, "model": described}
        | {"n_sentences": sizes, "n_columns": {method.name: len(method.detector.names) for method in chosen}},
        failures=attempts.summary(len(given)),
    )


@dataclass(frozen=True, kw_only=True)
class _Tries:
    """What is tried on every concept."""

    hooks: list[str]
    methods: list[Method]
    """Those that the model has the hook of."""
    references: dict[str, _Cells]
    """What is fitted to the choosing half at each hook, by name; on the twin too, if there is one."""
    twins: dict[str, _Cells]
    fixed: dict[str, _Cells]

    @classmethod
    def of(
        cls,
        model: HostModel,
        chosen: list[Method],
        attempts: Attempts,
        diff_means: bool,
        probe: bool,
        length: bool,
        untrained_twin: _Twin,
        pooling: Pooling,
        seed: int,
    ) -> "_Tries":
        """What is tried on a model; ValueError for a method with a name that is given here."""
        methods = attempts.usable(model, chosen)
        hooks = list(dict.fromkeys(method.detector.hook_name for method in methods))
        # A hook has several spellings, and what is fitted there is the same.
        places = list(dict.fromkeys(one_spelling(model, hooks).values()))
        references = _references(places, diff_means, probe, pooling, seed)
        twins = {f"{TWIN}: {name}": cells for name, cells in references.items() if untrained_twin is not None}
        fixed: dict[str, _Cells] = {LENGTH: length_cells} if length else {}
        check_methods(chosen, *references, *twins, *fixed)
        warn_of_bos(model, [method.detector for method in methods])
        return cls(hooks=hooks, methods=methods, references=references, twins=twins, fixed=fixed)


def _measure(
    tries: _Tries,
    given: Sequence[Concept],
    splits: Sequence[Sequence[Split]],
    untrained_twin: _Twin,
    rules: Sequence[str],
    pooling: Pooling,
    batch_size: int,
    subject: Subject,
) -> Callable[[int], Measured]:
    """What measures a concept by its number, with a loaded model."""
    given_here = untrained_twin is None or isinstance(untrained_twin, torch.nn.Module)  # modules can be called too
    twin: Any = untrained_twin if given_here else cast(Any, untrained_twin)(subject.model)
    tried: dict[tuple[str, int], _Cells] = {
        (m.name, m.draw): partial(method_cells, method=m, rules=rules, pooling=pooling) for m in tries.methods
    }
    fitted = tries.references | tries.fixed
    tried |= {(name, 0): partial(_by_rule, cells, rules) for name, cells in fitted.items()}
    on_twin = {(name, 0): partial(_by_rule, cells, rules) for name, cells in tries.twins.items()}

    @standard_modes(gradients=False)
    def measured(number: int) -> Measured:
        concept, attempts = given[number], Attempts()
        for host, cells_of in ((subject.model, tried), (twin, on_twin)):
            if host is None or not cells_of:
                continue
            with attempts.of("", concept.name):
                reading = Reading.of(host, tries.hooks, concept, splits[number], batch_size)
                for (method, draw), cells in cells_of.items():
                    where = {"concept": concept.name, "method": method, "draw": draw}
                    with attempts.of(method, concept.name):
                        attempts.rows += [where | row for row in cells(reading)]
        return attempts.packed()

    return measured


def _references(hooks: Sequence[str], diff_means: bool, probe: bool, pooling: Pooling, seed: int) -> dict[str, _Cells]:
    """What is fitted to the choosing half at each hook, by name."""
    made = dict[str, _Cells]()
    for hook in hooks:
        where = f" at {hook}" if len(hooks) > 1 else ""
        if diff_means:
            made[DIFF_MEANS + where] = partial(difference_cells, hook_name=hook, pooling=pooling)
        if probe:
            made[PROBE + where] = partial(probe_cells, hook_name=hook, seed=seed)
    return made


def _by_rule(cells: _Cells, rules: Sequence[str], reading: Reading) -> Iterator[dict[str, Any]]:
    """What knows no rule of choosing stands beside the methods under each."""
    for row in cells(reading):
        yield from ({"rule": rule} | row for rule in rules)


def _explained(*added: Iterable[str]) -> dict[str, str]:
    texts = {
        DIFF_MEANS: "The difference of the mean activations of the choosing half: a direction made with the labels.",
        PROBE: "An L2 logistic regression on the mean activation of a sentence, fitted to the choosing half.",
        TWIN: "The same made on a model with untrained weights: what is detected without learning.",
        LENGTH: "How many tokens a sentence has, more or fewer as the choosing half has it: what is detected without "
        "the model.",
    }
    return {name: texts[next(key for key in texts if name.startswith(key))] for names in added for name in names}
