"""What methods detect of one concept: a column chosen on one half of its sentences, judged on the other.

Symbols
    rows     of a concept's sentences: its positives, then its negatives, then its hard negatives
    columns  of a method's scores
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationBatch
from saelens_ext.concepts.comparison import best_column
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.diff_means import difference_of, sentence_sums, split_sentences
from saelens_ext.concepts.sentence_scores import pool_scores
from saelens_ext.concepts.token_activations import token_activations
from saelens_ext.evals.concepts_data import Concept, normal_form
from saelens_ext.evals.methods import Method
from saelens_ext.evals.probes import fit_probe
from saelens_ext.host.models import HostModel
from saelens_ext.ops.detection import auroc, standardised_difference

Rows = tuple[Tensor, Tensor]
"""Numbers of positive and of negative rows."""


class Split(NamedTuple):
    """One way to halve a concept's sentences."""

    choosing: Rows
    judging: Rows
    permuted: Rows
    """The choosing rows under labels permuted at random."""


MIN_SENTENCES = 4
"""Different sentences of either side: two to choose and two to judge."""


def concept_splits(concept: Concept, n_splits: int, seed: int, *, test_fraction: float = 0.5) -> list[Split]:
    """Split a concept's sentences several times, equal ones (but for case and outer spaces) never apart.

    The first split is that of :func:`~saelens_ext.concepts.comparison.compare_detection` with the same seed.

    Raises:
        ValueError: fewer than `MIN_SENTENCES` different sentences a side.
    """
    for side in ("positives", "negatives"):
        n = len(set(map(normal_form, getattr(concept, side))))
        if n < MIN_SENTENCES:
            raise ValueError(
                f"The concept {concept.name!r} has {n} different {side}; at least {MIN_SENTENCES} are needed, 2 to "
                "choose a direction and 2 to judge it, and better 40. Add sentences or leave it out."
            )
    seeds = [seed, *np.random.SeedSequence(seed).generate_state(_checks.positive(n_splits, "n_splits") - 1).tolist()]
    return [_split(concept, each, test_fraction) for each in seeds]


def _split(concept: Concept, seed: int, test_fraction: float) -> Split:
    sides = [list(map(normal_form, side)) for side in (concept.positives, concept.negatives)]
    first, second = list[Tensor](), list[Tensor]()
    for start, side in zip((0, len(sides[0])), sides):
        judging = set(split_sentences(side, test_fraction=test_fraction, seed=seed)[1])
        is_judging = torch.tensor([sentence in judging for sentence in side])
        first.append(start + (~is_judging).nonzero().flatten())
        second.append(start + is_judging.nonzero().flatten())
    order = torch.randperm(sum(map(len, first)), generator=torch.Generator().manual_seed(seed))
    permuted = torch.cat(first)[order]
    return Split((first[0], first[1]), (second[0], second[1]), (permuted[: len(first[0])], permuted[len(first[0]) :]))


@dataclass(frozen=True, eq=False)
class Reading:
    """The activations at the tokens of a concept's sentences, at every hook."""

    concept: Concept
    splits: Sequence[Split]
    batches: list[ActivationBatch]

    @classmethod
    def of(
        cls, model: HostModel, hooks: Sequence[str], concept: Concept, splits: Sequence[Split], batch_size: int
    ) -> "Reading":
        """Read a concept's sentences, each once."""
        sentences = [*concept.positives, *concept.negatives, *concept.hard_negatives]
        return cls(concept, splits, list(token_activations(model, hooks, sentences, batch_size=batch_size)))

    @property
    def n(self) -> int:
        """Sentences."""
        return sum(map(len, (self.concept.positives, self.concept.negatives, self.concept.hard_negatives)))

    @property
    def hard(self) -> Tensor:
        """Rows of the hard negatives."""
        return torch.arange(self.n - len(self.concept.hard_negatives), self.n)

    def pooled(self, detector: Detector, pooling: Any) -> Tensor:
        """Scores of the sentences, ``(n, k)``."""
        return pool_scores(self.batches, {"": detector}, self.n, pooling)[""]

    def counts(self) -> Tensor:
        """Tokens of each sentence, float32 ``(n, 1)``."""
        documents = torch.cat([batch.document_ids for batch in self.batches])
        return torch.bincount(documents, minlength=self.n)[:, None].float()


def method_cells(reading: Reading, method: Method, rules: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Choose a column by each rule on each choosing half, and judge it on the other half.

    Rule "auroc" takes the column with the highest AUROC of the sentence maximum; "contrast" the one with the largest
    mean score over positive tokens minus that over negative ones. Both are judged by the sentence maximum.

    Yields:
        One row per split, rule and metric.
    """
    largest = reading.pooled(method.detector, "max")
    sums, counts = None, reading.counts()
    if "contrast" in rules:
        sums = reading.pooled(method.detector, "mean") * counts
    for number, split in enumerate(reading.splits):
        for rule in rules:
            columns = [
                _by_auroc(largest, rows) if sums is None or rule == "auroc" else _by_contrast(sums, counts, rows)
                for rows in (split.choosing, split.permuted)
            ]
            chosen, permuted = (largest[:, [column]] for column in columns)
            values = _judged(chosen, split, reading.hard)
            values["permuted_auroc"] = _area(permuted, split.judging)
            where = {"rule": rule, "method": method.name, "draw": method.draw, "split": number}
            where |= {"column": columns[0], "chosen": method.detector.names[columns[0]]}
            yield from ({**where, "metric": metric, "value": value} for metric, value in values.items())


def difference_cells(reading: Reading, hook_name: str) -> Iterator[dict[str, Any]]:
    """The same for the difference of means of each choosing half, at a hook."""
    sums = sentence_sums(reading.batches, hook_name, reading.n, equal_norms=True)
    options: dict[str, Any] = {"weighting": "sentence", "equal_norms": True}
    made = [
        difference_of(sums.of(split.choosing[0]), sums.of(split.choosing[1]), hook_name, **options)
        for split in reading.splits
    ]
    detector = Detector.from_directions(torch.stack([each.direction for each in made]), hook_name)
    scores = reading.pooled(detector, "max")
    yield from _fitted_cells(reading, scores)


def probe_cells(reading: Reading, hook_name: str, seed: int) -> Iterator[dict[str, Any]]:
    """The same for an L2 logistic probe of mean-pooled activations, fitted on each choosing half."""
    sums = sentence_sums(reading.batches, hook_name, reading.n, equal_norms=False)
    x = (sums.vectors / sums.counts[:, None]).numpy()
    scores = []
    for split in reading.splits:
        rows = torch.cat(split.choosing).numpy()
        y = np.arange(len(rows)) < len(split.choosing[0])
        scores.append(torch.from_numpy(fit_probe(x[rows], y, seed=seed).decide(x)))
    yield from _fitted_cells(reading, torch.stack(scores, dim=1))


def _fitted_cells(reading: Reading, scores: Tensor) -> Iterator[dict[str, Any]]:
    """Rows for what was fitted on each choosing half: one column of scores per split."""
    for number, split in enumerate(reading.splits):
        values = _judged(scores[:, [number]], split, reading.hard)
        yield from ({"split": number, "metric": metric, "value": value} for metric, value in values.items())


def _judged(scores: Tensor, split: Split, hard: Tensor) -> dict[str, float]:
    values = {"auroc": _area(scores, split.judging), "chosen_auroc": _area(scores, split.choosing)}
    values["optimism"] = values["chosen_auroc"] - values["auroc"]
    if len(hard):
        values["hard_negative_auroc"] = _area(scores, (split.judging[0], hard))
    return values


def _area(scores: Tensor, rows: Rows) -> float:
    return float(auroc(*(scores[side] for side in rows)))


def _by_auroc(largest: Tensor, rows: Rows) -> int:
    sides = [largest[side] for side in rows]
    return best_column(auroc(*sides), standardised_difference(*sides))


def _by_contrast(sums: Tensor, counts: Tensor, rows: Rows) -> int:
    up, down = (sums[side].double().sum(0) / counts[side].sum() for side in rows)
    return int((up - down).argmax())
