"""Whether the distance to the nearest exemplar finds unfamiliar text, beside as many random activations and other
measures of novelty.
"""

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext import _checks
from saelens_ext.activations.stream import NO_TOKEN, ActivationStream
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.evals.evidence import Failure
from saelens_ext.evals.novelty import data
from saelens_ext.evals.novelty import scores as scoring
from saelens_ext.evals.novelty.evidence import INSIDE, NoveltyEvidence, Series
from saelens_ext.host.flat_sae import dictionaries_of
from saelens_ext.host.models import HostModel, resolve_hook
from saelens_ext.ops.modes import standard_modes

logger = logging.getLogger(__name__)

BASELINES = ("coreset", "knn", "mahalanobis", "norm", "entropy")
LEVELS = ("token", "document")

_WHAT = {
    "knn": "Mean cosine distance to the k nearest of at most 10,000 reference activations.",
    "mahalanobis": "Mahalanobis distance to the reference, its covariance shrunk by the rule of Ledoit and Wolf.",
    "norm": "How far the norm of the centred activation lies from its median over the reference, on either side.",
    "entropy": "Entropy of the model's prediction of the next token; uses no activation of the reference.",
}


@dataclass
class _Method:
    """A score to be tried, or the failure to make it."""

    name: str
    kind: str
    description: str
    scores: list[scoring.NoveltyScore] = field(default_factory=list)
    """One per draw; none for the entropy, which is of tokens."""


@standard_modes()
def evaluate_novelty(
    model: HostModel,
    partitions: SAE[Any] | Sequence[SAE[Any]] | Mapping[str, SAE[Any]],
    reference: ActivationStream,
    inside: Any,
    outside: Mapping[str, Any] | None = None,
    *,
    built_in: Sequence[str] = data.BUILT_IN,
    baselines: Sequence[str] = BASELINES,
    level: str = "token",
    rates: Sequence[float | int] = (0.01, 0.05),
    n_activations: int = 20_000,
    max_per_document: int = 200,
    n_coresets: int = 5,
    k: int = 10,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> NoveltyEvidence:
    """Compare how well scores of novelty find the activations of outside documents among those of inside ones.

    Args:
        model: any TransformerLens model, the one that ``reference`` reads.
        partitions: what is judged, one or several, with names or without: an `ExemplarPartition` scores by the distance
            to its nearest exemplar, any other SAELens SAE by its relative squared error.
        reference: the stream over one hook that the partitions were fitted to. Read once.
        inside: documents of the same kind that they were not fitted to: anything that an `ActivationStream` takes, or a
            stream.
        outside: documents of other kinds by name, likewise.
        built_in: sets made from the inside documents, of as many documents of the same lengths: "random_tokens",
            "shuffled_words", "reversed_tokens".
        baselines: "coreset" (for each partition, as many directions of random reference activations), "knn",
            "mahalanobis", "norm", "entropy" (the only one that runs the model to its end).
        level: score "token" by token, or each "document" by the mean over its tokens.
        rates: false positive rates at which the fraction found is reported, in (0, 1).
        n_activations: activations kept of the reference, and read of each set at most.
        max_per_document: tokens read of a document at most, so that a budget buys many documents, which are the units.
        n_coresets: draws of each coreset, at least 2.
        k: neighbours of "knn".
        n_bootstrap: resamples of the documents, for intervals.
        n_permutations: exchanges of scores of documents, for p-values.
        confidence: of the intervals, in (0, 1).
        seed: of everything random.
        progress: show a progress bar.

    Returns:
        The evidence. A score or an outside set that fails is in its ``failures``, and the rest is complete.

    Raises:
        ValueError: no partition, two of one name or one of another hook than ``reference``; documents that are in the
            reference; fewer than 20 documents in a set; a rate below one over the inside activations (or documents); an
            unknown baseline, set or level; an option out of range.

    Examples:
        >>> inside, news = [f"{i} {text}" for i in range(5) for text in texts], [f"{i} is new!" for i in range(20)]
        >>> found = sx.evaluate_novelty(model, partition, stream, inside, {"news": news}, rates=(0.1,), n_bootstrap=50)
        >>> sorted(found.summary()["metric"].unique())
        ['auroc', 'tpr_at_0.1']

    Source: the coverage experiment of arXiv 2605.14347, which has no AUROC and no control.
    """
    named = named_partitions(partitions)
    _check(model, named, reference, built_in, baselines, level, rates)
    for value, name in ((n_activations, "n_activations"), (max_per_document, "max_per_document"), (k, "k")):
        _checks.positive(value, name)
    if "coreset" in baselines and n_coresets < 2:
        raise ValueError(
            f"n_coresets must be at least 2, got {n_coresets}: what one lucky draw does shows only beside others."
        )
    given = _given_sets(model, reference, inside, outside or {}, n_activations, max_per_document)
    refuse_rates(rates, _n_scores(reference, given[INSIDE], n_activations, level), f"inside {level}s")
    read = data.read_reference(reference, n_activations, max_per_document, _generator(seed, "reference"))
    for name, documents in given.items():
        data.refuse_overlap(reference, read.openings, documents, name, max_per_document)
    for name in built_in:
        given[name] = data.built_in_set(name, model, reference, given[INSIDE], seed)
    methods, failures = _methods(named, read.activations, baselines, n_coresets, k, seed)
    collected = _Collected(methods)
    for name, documents in tqdm(given.items(), desc="sets", disable=not progress):
        try:
            collected.read(name, model, reference, documents, n_activations)
        except Exception as error:  # the sets that were read are complete
            if name == INSIDE:
                raise
            failures.append(Failure("", name, str(error)))
            logger.warning("The set %s failed: %s", name, error)
    settings = {
        "model": str(model.cfg.model_name),
        "hook_name": reference.hook_names[0],
        "level": level,
        "rates": [float(rate) for rate in rates],
        "n_activations": n_activations,
        "max_per_document": max_per_document,
        "n_reference": len(read.activations),
        "n_reference_read": read.n_read,
        "n_coresets": n_coresets,
        "k": k,
        "n_bootstrap": n_bootstrap,
        "n_permutations": n_permutations,
        "confidence": confidence,
        "seed": seed,
    }
    return collected.evidence(named, settings, failures)


def named_partitions(partitions: SAE[Any] | Sequence[SAE[Any]] | Mapping[str, SAE[Any]]) -> dict[str, SAE[Any]]:
    """Dictionaries by name; those without one are called by their percentile or architecture."""
    if isinstance(partitions, Mapping):
        named = dict(partitions)
    else:
        given = dictionaries_of(partitions, "partitions")
        names = [_name(sae) for sae in given]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(
                f"Two of the {len(given)} dictionaries would be called {repeated!r}; name them: {{'name': dictionary}}."
            )
        named = dict(zip(names, given))
    if not named:
        raise ValueError("partitions is empty; give at least one ExemplarPartition or other SAE.")
    taken = [name for name in named if name in BASELINES or name.startswith("coreset of ")]
    if taken:
        raise ValueError(f"A dictionary is called {taken[0]!r}, as a baseline is; give it another name.")
    return named


def _name(sae: SAE[Any]) -> str:
    if not isinstance(sae, ExemplarPartition):
        return f"{sae.cfg.architecture()} SAE"
    at = sae.cfg.percentile
    return f"EP p{at:g}" if at is not None else f"EP θ={sae.cfg.threshold:.3g}"


def _check(
    model: HostModel,
    named: Mapping[str, SAE[Any]],
    reference: ActivationStream,
    built_in: Sequence[str],
    baselines: Sequence[str],
    level: str,
    rates: Sequence[float | int],
) -> None:
    for values, allowed, what in ((built_in, data.BUILT_IN, "built_in"), (baselines, BASELINES, "baselines")):
        for value in [values] if isinstance(values, str) else values:
            _checks.choice(value, allowed, what)
    _checks.choice(level, LEVELS, "level")
    for rate in rates:
        _checks.between(rate, 0, 1, "rates")
    if not isinstance(reference, ActivationStream) or len(reference.hook_names) != 1:
        hooks = getattr(reference, "requested_hook_names", None)
        raise ValueError(
            f"reference must be an ActivationStream over one hook, got {type(reference).__name__} over {hooks}. A "
            "KeptStream gives one with only(hook_name)."
        )
    for name, sae in named.items():
        hook = sae.cfg.metadata.hook_name
        if hook and resolve_hook(model, hook) != resolve_hook(model, reference.hook_names[0]):
            raise ValueError(
                f"{name} is of the hook {hook!r}, and reference reads {reference.hook_names[0]!r}; give a stream of "
                "the same hook."
            )
        _checks.width(torch.empty(0, reference.d_in[reference.requested_hook_names[0]]), sae.cfg.d_in, name)


def _given_sets(
    model: HostModel,
    reference: ActivationStream,
    inside: Any,
    outside: Mapping[str, Any],
    n_activations: int,
    max_per_document: int,
) -> dict[str, list[list[int]]]:
    """The documents of each set as token ids."""
    wrong = [name for name in outside if name == INSIDE or name in data.BUILT_IN]
    if wrong:
        raise ValueError(f"An outside set is called {wrong[0]!r}, which another set is called; rename it.")
    found = {}
    for name, documents in {INSIDE: inside, **outside}.items():
        limits = {"n_tokens": n_activations, "max_per_document": max_per_document}
        found[name] = data.documents_of(model, reference, documents, **limits)
        data.refuse_few(len(found[name]), name)
    return found


def _n_scores(reference: ActivationStream, documents: list[list[int]], n_activations: int, level: str) -> int:
    """Scores that a set will have, at most."""
    excluded = set(reference.excluded_ids)
    sizes = [sum(i not in excluded for i in ids) for ids in documents]
    return min(n_activations, sum(sizes)) if level == "token" else sum(size > 0 for size in sizes)


def refuse_rates(rates: Sequence[float | int], n: int, what: str) -> None:
    """Raise ValueError for a false positive rate that n scores cannot show."""
    for rate in rates:
        if rate * n < 1 - 1e-9:
            raise ValueError(
                f"A false positive rate of {rate:g} cannot be read off {n} {what}: it must be at least {1 / n:.3g}. "
                "Raise the rate in rates, or give more inside documents."
            )


# --- scores ---


def _methods(
    named: Mapping[str, SAE[Any]],
    reference: Tensor,
    baselines: Sequence[str],
    n_coresets: int,
    k: int,
    seed: int,
) -> tuple[list[_Method], list[Failure]]:
    """What scores, and what could not be made to."""
    center = scoring.reference_center(reference)
    found: list[_Method] = []
    failures: list[Failure] = []

    def add(name: str, kind: str, description: str, make: Callable[[], list[scoring.NoveltyScore]]) -> None:
        try:
            found.append(_Method(name, kind, description, make()))
        except Exception as error:  # the others are complete
            failures.append(Failure(name, "", str(error)))
            logger.warning("The score %s failed: %s", name, error)

    for name, sae in named.items():
        if isinstance(sae, ExemplarPartition):
            what, partition = f"Cosine distance to the nearest of {sae.cfg.d_sae} exemplars.", sae
            add(name, "unsupervised", what, lambda: [scoring.exemplar_distance(name, partition)])
        else:
            what = f"Squared error of the reconstruction by {sae.cfg.d_sae} latents over the square of the activation."
            add(name, "unsupervised", what, lambda: [scoring.reconstruction_error(name, sae)])
    for name, sae in named.items():
        if "coreset" in baselines and isinstance(sae, ExemplarPartition):
            own, n, origin = f"coreset of {name}", sae.cfg.d_sae, sae.b_dec
            draws = [_generator(seed, f"{own} {draw}") for draw in range(n_coresets)]
            what = f"Cosine distance to the nearest of {n} random reference activations; {n_coresets} draws."
            add(
                own,
                "control",
                what,
                lambda: [scoring.coreset_distance(own, reference, n, origin, draw) for draw in draws],
            )
    makers: dict[str, Callable[[], list[scoring.NoveltyScore]]] = {
        "knn": lambda: [scoring.neighbour_distance("knn", reference, k, center, _generator(seed, "knn"))],
        "mahalanobis": lambda: [scoring.mahalanobis_distance("mahalanobis", reference)],
        "norm": lambda: [scoring.norm_distance("norm", reference, center)],
        "entropy": list,
    }
    for name, make in makers.items():
        if name in baselines:
            add(name, "control", _WHAT[name], make)
    return found, failures


def _generator(seed: int, name: str) -> torch.Generator:
    """One for each thing that is random, so that none depends on what else is asked for."""
    mixed = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0] >> np.uint64(1)))


class _Collected:
    """The scores of all activations, set by set."""

    def __init__(self, methods: Sequence[_Method]):
        self.methods = list(methods)
        self.series = [Series(m.name, draw) for m in methods for draw in range(max(1, len(m.scores)))]
        self.values: list[Tensor] = []
        self.sizes: dict[str, list[int]] = {}
        self.failures: list[Failure] = []

    def read(
        self, name: str, model: HostModel, reference: ActivationStream, documents: list[list[int]], n_activations: int
    ) -> None:
        """Score a set."""
        parts: list[list[Tensor]] = [[] for _ in self.series]
        ids: list[Tensor] = []
        broken: dict[str, str] = {}
        for batch in data.read_ids(model, reference, documents, n_activations):
            (x,) = batch.activations.values()
            ids.append(batch.document_ids)
            rows = iter(parts)
            for method in self.methods:
                for score in method.scores or [None]:
                    values = torch.full((len(batch),), torch.nan, dtype=torch.float64)
                    if method.name not in broken:
                        try:
                            values = score(x) if score is not None else _entropies(model, batch)
                        except Exception as error:  # the other scores are complete
                            broken[method.name] = str(error)
                    next(rows).append(values)
        _, sizes = torch.cat(ids).unique_consecutive(return_counts=True)
        data.refuse_few(len(sizes), name)
        self.values.append(torch.stack([torch.cat(part) for part in parts]))
        self.sizes[name] = sizes.tolist()
        self.failures += [Failure(method, name, error) for method, error in broken.items()]

    def evidence(
        self, named: Mapping[str, SAE[Any]], settings: dict[str, Any], failures: Sequence[Failure]
    ) -> NoveltyEvidence:
        """The evidence, with the cells that it is made from."""
        sizes, values = dict(self.sizes), list(self.values)
        if settings["level"] == "document":
            values = [_document_means(part, own) for part, own in zip(values, sizes.values())]
            sizes = {name: [1] * len(own) for name, own in sizes.items()}
        names = [method.name for method in self.methods]
        common = [name for name in names if name in ("knn", "mahalanobis", "norm", "entropy")]
        baselines = {
            name: [other for other in names if other == f"coreset of {name}"] + common
            for name in named
            if name in names
        }
        evidence = NoveltyEvidence(
            cells=pd.DataFrame(columns=["set", "document", "method", "metric", "value"]),  # made from the rest
            kinds={method.name: method.kind for method in self.methods},
            descriptions={method.name: method.description for method in self.methods},
            settings=settings,
            failures=(*failures, *self.failures),
            scores=torch.cat(values, dim=1).float(),
            series=tuple(self.series),
            sizes=sizes,
            baselines=baselines,
            partitions={
                name: {"threshold": sae.cfg.threshold, "percentile": sae.cfg.percentile, "n_regions": sae.cfg.d_sae}
                for name, sae in named.items()
                if isinstance(sae, ExemplarPartition)
            },
        )
        return replace(evidence, cells=evidence.document_cells())


def _document_means(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Means over the activations of each document, ``(series, documents)``."""
    return torch.stack([part.mean(dim=1) for part in values.split(list(sizes), dim=1)], dim=1)


def _entropies(model: HostModel, batch: Any) -> Tensor:
    windows, mask = batch.windows.clamp(min=0), batch.windows != NO_TOKEN
    width = int(mask.any(dim=0).sum())
    found = scoring.next_token_entropy(model, windows[:, :width], mask[:, :width])
    return found[batch.sequence_ids - batch.first_sequence_id, batch.positions]
