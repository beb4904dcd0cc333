"""How much of what a probe reads from activations can be read from a dictionary's codes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from sae_lens import SAE
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.sentence_scores import warn_of_bos
from saelens_ext.continuations.subject import Model, Subject
from saelens_ext.evals.attempts import Attempts
from saelens_ext.evals.baselines import random_activations
from saelens_ext.evals.concepts_data import Concept, check_concepts
from saelens_ext.evals.detection import probing_cells as cells
from saelens_ext.evals.detection.detection_cells import Reading, Split, concept_splits
from saelens_ext.evals.evidence import Evidence, OverConcepts
from saelens_ext.evals.fingerprint import fingerprint
from saelens_ext.evals.over_concepts import over_concepts
from saelens_ext.evals.over_units import Measured
from saelens_ext.evals.sweep_store import SweepStore
from saelens_ext.host.flat_sae import dictionaries_by_name, hooks_of
from saelens_ext.host.hook_names import one_spelling
from saelens_ext.host.models import HostModel, describe_model, resolve_hook
from saelens_ext.ops.modes import standard_modes

RAW, CORESET = "raw activations", "coreset"

_COLUMNS = ["concept", "probe", "method", "metric", "value", "split", "column"]


class ProbeEvidence(OverConcepts, Evidence):
    """Held-out probes on the codes of dictionaries; a unit is a concept."""

    kind: ClassVar[str] = "probes"
    title: ClassVar[str] = "Probes on codes"
    question: ClassVar[str] = (
        "How much of what a linear probe reads from the activations is left in a few codes of a dictionary, or in a "
        "histogram of its latents, and is it more than in as many random activations?"
    )
    unit_text: ClassVar[str] = (
        "A unit is a concept. Probes are fitted to part of its sentences and judged on the others; results of several "
        "splits are averaged within the concept. Intervals and tests are over concepts."
    )
    groups: ClassVar[tuple[str, ...]] = ("probe",)
    metrics: ClassVar[dict[str, str]] = {
        "accuracy": "mean held-out accuracy",
        "auroc": "held-out AUROC",
        "retention": "accuracy / accuracy of the raw probe",
        "retention_above_chance": "(accuracy - 0.5) / (raw accuracy - 0.5), where the raw probe has 0.6 or more",
    }
    other_bounds: ClassVar[dict[str, tuple[float, float]]] = {"auroc": (0.0, 1.0), "retention": (0.0, float("inf"))}


@standard_modes(gradients=False)
def evaluate_probes(
    model: Model,
    dictionaries: Mapping[str, SAE[Any]],
    concepts: Iterable[Concept],
    *,
    ks: Sequence[int] = (1, 2, 5),
    test_fraction: float | int = 0.3,
    n_splits: int = 3,
    controls: Sequence[str] = (CORESET,),
    activations: Mapping[str, Tensor] | None = None,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    batch_size: int = 16,
    seed: int = 0,
    folder: str | Path | None = None,
    n_workers: int = 1,
    workers: str = "joblib",
    actor_options: dict[str, Any] | None = None,
    progress: bool = False,
) -> ProbeEvidence:
    """Fit probes to mean-pooled codes of dictionaries and compare them with probes of the activations.

    Each probe is an L2 logistic regression: on all coordinates of the activations ("all"); on the k coordinates or
    latents whose means differ most between the labels of the training sentences ("k=1", …); and on the histogram over
    all K latents of which one is largest at each token ("one-hot"). The model reads each sentence once. What fails is
    recorded in ``failures``, and the rest goes on.

    Args:
        model: any TransformerLens model, or a function without arguments that loads it.
        dictionaries: any SAELens SAEs or transcoders by name, read at their input hooks.
        concepts: at least 1, and 6 or more for a claim, with 4 different sentences a side.
        ks: sizes of the sparse probes, each at most the smallest dictionary's number of latents.
        test_fraction: fraction of either side's sentences that is judged on, in (0, 1).
        n_splits: random splits of each concept's sentences.
        controls: "coreset" adds, for each dictionary, the histogram over as many random activations.
        activations: what coresets are drawn from, ``(n, d)`` by hook name, best what the dictionaries were fitted to;
            for a hook that is not given, sentences that no split judges on are read once more.
        n_permutations: assignments of signs in tests of differences.
        confidence: of the intervals, in (0, 1).
        batch_size: windows in a forward pass.
        seed: of splits, folds, coresets and resampling.
        folder: where every concept is kept when it is done; what is there is not computed again, but for concepts on
            which something failed. Concepts may be added where ``activations`` are given at every hook; otherwise they
            take part in the coresets.
        n_workers: concepts at a time, each by a worker with a model of its own: ``model`` must then be a function, and
            ``folder``, if any, be on storage that all share. It is called here too, to tell what is measured and to
            draw coresets, and that model is let go. Dictionaries travel to the workers. With the same number of threads
            the results are the same to the bit.
        workers: "joblib", processes or what ``joblib.parallel_config`` names; or "ray", actors on the cluster that
            ``ray.init`` was called for, or on this machine.
        actor_options: Ray's resources of an actor, such as ``{"num_gpus": 1}``; one CPU by default.
        progress: show a progress bar.

    Returns:
        The evidence: accuracy (the mean over both labels) and AUROC on held-out sentences, ``retention``, the ratio to
        the accuracy of the probe on all coordinates, and ``retention_above_chance``, the same of what is above 0.5,
        NaN where that probe has less than 0.6.

    Raises:
        ValueError: no dictionary or concept, a name that is taken, fewer than 4 different sentences a side, a number or
            a control out of range, nothing that could be computed, a folder of other settings, or several workers and a
            model that is no function.
        RuntimeError: a worker died; with a folder the same call goes on from what was finished.

    Examples:
        >>> concepts = [
        ...     sx.Concept(
        ...         name=word,
        ...         positives=[f"The {word} is number {n}." for n in range(8)],
        ...         negatives=[f"Nothing is number {n}." for n in range(8)],
        ...     )
        ...     for word in ("cat", "sea")
        ... ]
        >>> found = sx.evaluate_probes(model, {"regions": partition}, concepts, ks=(1,), n_splits=1)
        >>> sorted(found.kinds)
        ['random activations for regions', 'raw activations', 'regions']

    Source: the probe retention of arXiv 2605.14347; k-sparse probes as in SAEBench.
    """
    for number, k in enumerate(_checks.listed(ks, "ks", "number")):
        _checks.positive(k, f"ks[{number}]")
    for number, control in enumerate(controls):
        _checks.choice(control, (CORESET,), f"controls[{number}]")
    _checks.between(test_fraction, 0, 1, "test_fraction")
    _checks.between(confidence, 0, 1, "confidence")
    listed = check_concepts(list(concepts))
    splits = [concept_splits(each, n_splits, seed, test_fraction=float(test_fraction)) for each in listed]
    named, attempts = _named(dictionaries, ks), Attempts()
    each = over_concepts(model, listed, n_workers, workers, actor_options)

    def look(subject: Subject) -> tuple[list[_Tried], str, dict[str, Any]]:
        tried, drawn_from = _tried(subject.model, named, attempts), ""
        if CORESET in controls:
            spare = cells.training_sentences(listed, splits)
            given = _by_hook(subject.model, activations or {}, tried)
            drawn_from = fingerprint([given, [] if {one.hook_name for one in tried} <= set(given) else spare])
            tried += _coresets(subject.model, tried, given, spare, seed, attempts)
        warn_of_bos(subject.model, [detector for one in tried for detector in one.representations.values()])
        return tried, drawn_from, describe_model(subject.model)

    tried, drawn_from, described = each.opened(look)
    hooks = list(dict.fromkeys(one.hook_name for one in tried))
    settings: dict[str, Any] = {"ks": list(ks), "test_fraction": test_fraction, "n_splits": n_splits}
    settings |= {"controls": list(controls)}
    known = {"dictionaries": {name: fingerprint(sae) for name, sae in named.items()}, "activations": drawn_from}
    asked = {**each.about, **settings, **known, "batch_size": batch_size, "seed": seed}
    store = SweepStore.at(folder, asked)
    measure = partial(_measure, tried, hooks, listed, splits, ks, seed, batch_size)
    for found in each.measured(measure, store, progress) if hooks else ():
        attempts.add(found)
    raw_names = [_raw_name(hook, hooks) for hook in hooks]
    settings |= {"n_permutations": n_permutations, "confidence": confidence, "seed": seed}
    return ProbeEvidence(
        cells=attempts.cells(_COLUMNS),
        kinds={one.name: one.kind for one in tried} | dict.fromkeys(raw_names, "supervised"),
        descriptions={one.name: one.description for one in tried}
        | dict.fromkeys(raw_names, "The activations: all coordinates of them, or single ones."),
        settings=settings | {"hooks": hooks, "model": described},
        failures=attempts.summary(len(listed)),
    )


def _measure(
    tried: "Sequence[_Tried]",
    hooks: Sequence[str],
    listed: Sequence[Concept],
    splits: Sequence[Sequence[Split]],
    ks: Sequence[int],
    seed: int,
    batch_size: int,
    subject: Subject,
) -> Callable[[int], Measured]:
    """What measures a concept by its number, with a loaded model."""

    @standard_modes(gradients=False)
    def measured(number: int) -> Measured:
        concept, attempts = listed[number], Attempts()
        with attempts.of("", concept.name):
            reading = Reading.of(subject.model, hooks, concept, splits[number], batch_size)
            for hook in hooks:
                at_hook = [one for one in tried if one.hook_name == hook]
                _probe(attempts, reading, hook, _raw_name(hook, hooks), at_hook, ks, seed)
        return attempts.packed()

    return measured


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A dictionary or a control, as representations of sentences by the kind of probe."""

    name: str
    kind: str
    hook_name: str
    sae: SAE[Any]
    representations: Mapping[str, Detector]
    """``"codes"``, of which k are probed, and `ONE_HOT`."""
    description: str

    def at(self, hook_name: str) -> "_Tried":
        """The same, read by another spelling of its hook."""
        read = {kind: replace(detector, hook_name=hook_name) for kind, detector in self.representations.items()}
        return replace(self, hook_name=hook_name, representations=read)


def _named(dictionaries: Mapping[str, SAE[Any]], ks: Sequence[int]) -> dict[str, SAE[Any]]:
    named = dictionaries_by_name(dictionaries)
    for name, sae in named.items():
        if name.startswith(RAW) or _control_name("") in name:
            raise ValueError(f"A dictionary is called {name!r}, as what the evaluation adds; give it another name.")
        if max(ks) > sae.cfg.d_sae:
            raise ValueError(
                f"ks has {max(ks)}, and {name!r} has {sae.cfg.d_sae} latents; a k-sparse probe needs k or more. Leave "
                "that k out."
            )
    return named


def _tried(model: HostModel, named: Mapping[str, SAE[Any]], attempts: Attempts) -> list[_Tried]:
    found = []
    for name, sae in named.items():
        with attempts.of(name, ""):
            read = hooks_of(sae)[0]
            resolve_hook(model, read)
            codes = Detector.from_dictionary(sae, similarity="code", hook_name=read)
            found.append(
                _Tried(
                    name=name,
                    kind="unsupervised",
                    hook_name=read,
                    sae=sae,
                    representations={"codes": codes, cells.ONE_HOT: cells.assigned(sae)},
                    description=f"A {sae.cfg.architecture()} of {sae.cfg.d_sae} latents.",
                )
            )
    spelling = one_spelling(model, [each.hook_name for each in found])
    return [each.at(spelling[each.hook_name]) for each in found]


def _by_hook(model: HostModel, activations: Mapping[str, Tensor], tried: Sequence[_Tried]) -> dict[str, Tensor]:
    """The activations by the hook's name in the dictionaries, however it is spelt where they are given."""
    given = {resolve_hook(model, name): x for name, x in activations.items()}
    read = {each.hook_name: resolve_hook(model, each.hook_name) for each in tried}
    unread = [name for name in activations if resolve_hook(model, name) not in read.values()]
    if unread and read:
        raise ValueError(
            f"activations are given at {unread[0]!r}, where no dictionary reads; they read at {', '.join(read)}."
        )
    return {name: given[place] for name, place in read.items() if place in given}


def _coresets(
    model: HostModel,
    tried: Sequence[_Tried],
    activations: Mapping[str, Tensor],
    spare: Sequence[str],
    seed: int,
    attempts: Attempts,
) -> list[_Tried]:
    """As many random activations as each dictionary has latents."""
    found = []
    for each in tried:
        name, k = _control_name(each.name), each.sae.cfg.d_sae
        with attempts.of(name, ""):
            x = activations.get(each.hook_name)
            if x is None:
                # Four times as many as are needed, so that they are of many sentences.
                x = cells.some_activations(model, each.hook_name, spare, 4 * k, seed)
            center = each.sae.b_dec.detach() if hasattr(each.sae, "assign") else None
            coreset = random_activations(x, k, each.hook_name, center=center, seed=seed)
            representations = {cells.ONE_HOT: cells.one_hot(coreset.detector)}
            text = f"{k} activations drawn at random; a token counts for the nearest of them."
            found.append(replace(each, name=name, kind="control", representations=representations, description=text))
    return found


def _probe(
    attempts: Attempts,
    reading: Reading,
    hook_name: str,
    raw_name: str,
    tried: Sequence[_Tried],
    ks: Sequence[int],
    seed: int,
) -> None:
    """Add the rows of one concept at one hook."""
    concept, accuracies = reading.concept.name, list[float]()
    with attempts.of(raw_name, concept):
        x = cells.pooled(reading, cells.raw(hook_name, reading.batches[0].activations[hook_name].shape[1]))
        rows = []
        for number, split in enumerate(reading.splits):
            every = cells.probe_values(x, split, seed=seed)
            accuracies.append(every["accuracy"])
            values = {cells.ALL: every} | {f"k={k}": cells.probe_values(x, split, seed=seed, k=k) for k in ks}
            rows += _rows(values, concept, raw_name, number, accuracies[-1])
        attempts.rows += rows
    for each in tried:
        with attempts.of(each.name, concept):
            tables = {kind: cells.pooled(reading, detector) for kind, detector in each.representations.items()}
            rows = []
            for number, (split, accuracy) in enumerate(zip(reading.splits, accuracies)):
                values = {cells.ONE_HOT: cells.probe_values(tables[cells.ONE_HOT], split, seed=seed)}
                if "codes" in tables:
                    values |= {f"k={k}": cells.probe_values(tables["codes"], split, seed=seed, k=k) for k in ks}
                rows += _rows(values, concept, each.name, number, accuracy)
            attempts.rows += rows


def _rows(
    values: Mapping[str, Any], concept: str, method: str, split: int, raw_accuracy: float
) -> list[dict[str, Any]]:
    where = {"concept": concept, "method": method, "split": split}
    return [
        where | {"probe": probe} | row
        for probe, found in values.items()
        for row in cells.with_retention(found, raw_accuracy)
    ]


def _control_name(name: str) -> str:
    return f"random activations for {name}"


def _raw_name(hook: str, hooks: Sequence[str]) -> str:
    return RAW if len(hooks) == 1 else f"{RAW} at {hook}"
