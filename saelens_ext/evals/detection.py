"""Which methods detect concepts: each chooses a column on half of a concept's sentences and is judged on the others."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from tqdm.auto import tqdm

from saelens_ext import _checks
from saelens_ext._modes import standard_modes
from saelens_ext.concepts.comparison import DIFF_MEANS
from saelens_ext.concepts.sentence_scores import Pooling, warn_of_bos
from saelens_ext.evals.attempts import Attempts
from saelens_ext.evals.concepts_data import Concept, check_concepts
from saelens_ext.evals.detection_cells import (
    Reading,
    concept_splits,
    difference_cells,
    length_cells,
    method_cells,
    probe_cells,
)
from saelens_ext.evals.evidence import Evidence, OverConcepts
from saelens_ext.evals.methods import Method, check_methods
from saelens_ext.host.hook_names import one_spelling
from saelens_ext.host.models import HostModel, describe_model

RULES = ("auroc", "contrast")
PROBE = "logistic probe"
TWIN = "untrained twin"
LENGTH = "number of tokens"

_Cells = Callable[[Reading], Iterable[dict[str, Any]]]
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


@standard_modes()
@torch.no_grad()
def evaluate_detection(
    model: HostModel,
    methods: Iterable[Method],
    concepts: Iterable[Concept],
    *,
    rules: Sequence[str] = RULES,
    n_splits: int = 5,
    pooling: Pooling = "max",
    diff_means: bool = True,
    probe: bool = True,
    length: bool = True,
    untrained_twin: HostModel | None = None,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> DetectionEvidence:
    """Let methods choose a direction for each concept on half of its sentences, and judge it on the other half.

    The model reads each concept's sentences once, at all hooks, whatever the number of methods. Memory: the activations
    and scores of one concept. What fails is recorded in ``failures``, and the rest goes on.

    Args:
        model: any TransformerLens model.
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
        untrained_twin: a model of the same kind with untrained weights, such as
            :func:`~saelens_ext.evals.baselines.untrained_twin` gives; ``diff_means`` and ``probe`` are then made on it
            too, which shows what is to be detected without learning.
        n_permutations: assignments of signs in tests of differences.
        confidence: of the intervals, in (0, 1).
        batch_size: windows in a forward pass.
        seed: of splits, folds and resampling.
        progress: show a progress bar.

    Returns:
        The evidence: AUROCs on held-out and on choosing halves, and optimism (their difference). Of held-out AUROCs
        besides: of the direction that permuted labels choose; the mean over all directions, chosen by nothing; of the
        chosen one between sentences whose numbers of tokens differ by at most a tenth (NaN where too few do); and
        against hard negatives where a concept has some. The second and third depart from 0.5 where the two sides differ
        in something that most directions respond to, such as length.

    Raises:
        ValueError: no method or concept, a name used twice, fewer than 4 different sentences a side, an unknown rule,
            or nothing that could be computed.

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
    plan = {c.name: (c, concept_splits(c, n_splits, seed)) for c in check_concepts(list(concepts))}
    chosen, attempts = check_methods(methods), Attempts()
    hooks = list(dict.fromkeys(method.detector.hook_name for method in attempts.usable(model, chosen)))
    # A hook has several spellings, and what is fitted there is the same.
    places = list(dict.fromkeys(one_spelling(model, hooks).values()))
    references = _references(places, diff_means, probe, pooling, seed)
    twins = {f"{TWIN}: {name}": cells for name, cells in references.items() if untrained_twin is not None}
    fixed: dict[str, _Cells] = {LENGTH: length_cells} if length else {}
    named = check_methods(chosen, *references, *twins, *fixed)
    usable = [method for method in named if method.detector.hook_name in hooks]
    warn_of_bos(model, [method.detector for method in usable])
    for name, (concept, splits) in tqdm(plan.items(), desc="concepts", disable=not progress):
        for host, methods, fitted in ((model, usable, references | fixed), (untrained_twin, [], twins)):
            if host is None or not (methods or fitted):
                continue
            with attempts.of("", name):
                reading = Reading.of(host, hooks, concept, splits, batch_size)
                tried = {
                    (m.name, m.draw): partial(method_cells, method=m, rules=rules, pooling=pooling) for m in methods
                }
                tried |= {(reference, 0): partial(_by_rule, cells, rules) for reference, cells in fitted.items()}
                for (method, draw), cells in tried.items():
                    with attempts.of(method, name):
                        made = [{"concept": name, "method": method, "draw": draw} | row for row in cells(reading)]
                        attempts.rows += made
    kinds = {method.name: str(method.kind) for method in chosen} | dict.fromkeys(references, "supervised")
    settings = {"rules": list(rules), "n_splits": n_splits, "pooling": pooling}
    settings |= {"confidence": confidence, "n_permutations": n_permutations}
    sizes = {name: [len(concept.positives), len(concept.negatives)] for name, (concept, _) in plan.items()}
    return DetectionEvidence(
        cells=attempts.cells(_COLUMNS, column=-1, chosen=None),
        kinds=kinds | dict.fromkeys([*fixed, *twins], "control"),
        descriptions={method.name: method.description for method in chosen} | _explained(references, fixed, twins),
        settings=settings
        | {"seed": seed, "hooks": hooks, "model": describe_model(model)}
        | {"n_sentences": sizes, "n_columns": {method.name: len(method.detector.names) for method in chosen}},
        failures=attempts.summary(len(plan)),
    )


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
