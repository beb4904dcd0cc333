"""What methods detect of one concept: a column chosen on one half of its sentences, judged on the other.

Symbols
    rows     of a concept's sentences: its positives, then its negatives, then its hard negatives
    columns  of a method's scores
    lengths  tokens of each sentence
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationBatch
from saelens_ext.concepts.comparison import best_column
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.diff_means import SentenceSums, difference_of, sentence_sums, split_sentences
from saelens_ext.concepts.sentence_scores import Pooling, pool_scores
from saelens_ext.concepts.token_activations import token_activations
from saelens_ext.evals.concepts_data import Concept, normal_form
from saelens_ext.evals.detection.probes import fit_probe
from saelens_ext.evals.methods import Method
from saelens_ext.host.models import HostModel
from saelens_ext.ops.detection import auroc, standardised_difference

Rows = tuple[Tensor, Tensor]
"""Numbers of positive and of negative rows."""
Choice = Callable[[Rows], int]
"""The column that rows choose."""
LENGTH_TOLERANCE = 0.1
"""Sentences are of about equal length if their numbers of tokens differ by at most this fraction of the larger."""


class Split(NamedTuple):
    """One way to halve a concept's sentences."""

    choosing: Rows
    judging: Rows
    permuted: Rows
    """The choosing rows under labels that have nothing to do with the true ones."""


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
    choosing = first[0], first[1]
    return Split(choosing, (second[0], second[1]), _permuted(choosing, seed, concept.name))


def _permuted(rows: Rows, seed: int, name: str) -> Rows:
    """Two halves of the rows, each with half of either true side (one of an odd number is left out).

    Labels that were merely shuffled put a few true positives too many on one side, and what separates the true labels
    is then chosen; one permutation for all concepts would even favour the same side in each of them.
    """
    mixed = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)
    generator = torch.Generator().manual_seed(int(mixed[0]))
    shuffled = [side[torch.randperm(len(side), generator=generator)] for side in rows]
    halves = [side[: len(side) // 2 * 2].split(len(side) // 2) for side in shuffled]
    first, second = map(torch.cat, zip(*halves))
    return first, second


@dataclass(frozen=True, eq=False)
class Reading:
    """The activations at the tokens of a concept's sentences, at every hook."""

    concept: Concept
    splits: Sequence[Split]
    batches: list[ActivationBatch]
    places: Tensor
    """Of each sentence, its number in the order in which they were read."""

    @classmethod
    def of(
        cls, model: HostModel, hooks: Sequence[str], concept: Concept, splits: Sequence[Split], batch_size: int
    ) -> "Reading":
        """Read a concept's sentences, each once."""
        sentences = [*concept.positives, *concept.negatives, *concept.hard_negatives]
        # Short ones together, so that little of a batch is padding.
        order = sorted(range(len(sentences)), key=lambda number: len(sentences[number]))
        read = token_activations(model, hooks, [sentences[number] for number in order], batch_size=batch_size)
        return cls(concept, splits, list(read), torch.tensor(order).argsort())

    @property
    def n(self) -> int:
        """Sentences."""
        return sum(map(len, (self.concept.positives, self.concept.negatives, self.concept.hard_negatives)))

    @property
    def hard(self) -> Tensor:
        """Rows of the hard negatives."""
        return torch.arange(self.n - len(self.concept.hard_negatives), self.n)

    def pooled(self, detector: Detector, pooling: Pooling) -> Tensor:
        """Scores of the sentences, ``(n, k)``."""
        return pool_scores(self.batches, {"": detector}, self.n, pooling)[""][self.places]

    def sums(self, hook_name: str, *, equal_norms: bool) -> SentenceSums:
        """Sums of the activations of each sentence at a hook."""
        return sentence_sums(self.batches, hook_name, self.n, equal_norms=equal_norms).of(self.places)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each sentence, float32 ``(n,)``."""
        documents = torch.cat([batch.document_ids for batch in self.batches])
        return torch.bincount(documents, minlength=self.n)[self.places].float()


def method_cells(reading: Reading, method: Method, rules: Sequence[str], pooling: Pooling) -> Iterator[dict[str, Any]]:
    """Choose a column by each rule on each choosing half, and judge it on the other half.

    Rule "auroc" takes the column with the highest AUROC of the sentences' scores; "contrast" the one with the largest
    mean score over positive tokens minus that over negative ones. Both are judged by the sentences' scores.

    Yields:
        One row per split, rule and metric.
    """
    scores, lengths = reading.pooled(method.detector, pooling), reading.lengths
    choices: dict[str, Choice] = {}
    if "auroc" in rules:
        choices["auroc"] = partial(_by_auroc, scores)
    if "contrast" in rules:
        means = scores if pooling == "mean" else reading.pooled(method.detector, "mean")
        choices["contrast"] = partial(_by_contrast, means * lengths[:, None], lengths)
    names = method.detector.names
    for rule in rules:
        for row in _chosen_cells(reading, scores, choices[rule]):
            yield {"rule": rule, "draw": method.draw, "chosen": names[row["column"]]} | row


def length_cells(reading: Reading) -> Iterator[dict[str, Any]]:
    """The same for the number of tokens of a sentence, as it is or negated, whichever the choosing half prefers."""
    lengths = reading.lengths
    scores = torch.stack([lengths, -lengths], dim=1)
    for row in _chosen_cells(reading, scores, partial(_by_auroc, scores)):
        yield row | {"chosen": ("longer", "shorter")[row["column"]]}


def _chosen_cells(reading: Reading, scores: Tensor, choose: Choice) -> Iterator[dict[str, Any]]:
    """Rows for columns of which one is chosen on each choosing half."""
    for number, split in enumerate(reading.splits):
        column, permuted = choose(split.choosing), choose(split.permuted)
        values = _judged(reading, scores[:, [column]], split)
        values["permuted_auroc"] = _area(scores[:, [permuted]], split.judging)
        values["any_auroc"] = float(auroc(*(scores[side] for side in split.judging)).mean())
        where = {"split": number, "column": column}
        yield from ({**where, "metric": metric, "value": value} for metric, value in values.items())


def difference_cells(reading: Reading, hook_name: str, pooling: Pooling) -> Iterator[dict[str, Any]]:
    """The same for the difference of means of each choosing half, at a hook."""
    sums = reading.sums(hook_name, equal_norms=True)
    options: dict[str, Any] = {"weighting": "sentence", "equal_norms": True}
    made = [
        difference_of(sums.of(split.choosing[0]), sums.of(split.choosing[1]), hook_name, **options)
        for split in reading.splits
    ]
    detector = Detector.from_directions(torch.stack([each.direction for each in made]), hook_name)
    yield from _fitted_cells(reading, reading.pooled(detector, pooling))


def probe_cells(reading: Reading, hook_name: str, seed: int) -> Iterator[dict[str, Any]]:
    """The same for an L2 logistic probe of mean-pooled activations, fitted on each choosing half."""
    sums = reading.sums(hook_name, equal_norms=False)
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
        values = _judged(reading, scores[:, [number]], split)
        yield from ({"split": number, "metric": metric, "value": value} for metric, value in values.items())


def _judged(reading: Reading, scores: Tensor, split: Split) -> dict[str, float]:
    values = {"auroc": _area(scores, split.judging), "chosen_auroc": _area(scores, split.choosing)}
    values["optimism"] = values["chosen_auroc"] - values["auroc"]
    values["equal_length_auroc"] = _area_at_equal_length(scores[:, 0], reading.lengths, split.judging)
    if len(reading.hard):
        values["hard_negative_auroc"] = _area(scores, (split.judging[0], reading.hard))
    return values


def _area(scores: Tensor, rows: Rows) -> float:
    return float(auroc(*(scores[side] for side in rows)))


def _area_at_equal_length(scores: Tensor, lengths: Tensor, rows: Rows) -> float:
    """AUROC among pairs of sentences of about equal length; NaN where there are fewer pairs than sentences."""
    (up, down), (first, second) = ([values[side].double() for side in rows] for values in (scores, lengths))
    pairs = (first[:, None] - second).abs() <= LENGTH_TOLERANCE * torch.maximum(first[:, None], second)
    if int(pairs.sum()) < len(up) + len(down):
        return float("nan")
    return float((((up[:, None] - down).sign() + 1) / 2)[pairs].mean())


def _by_auroc(scores: Tensor, rows: Rows) -> int:
    sides = [scores[side] for side in rows]
    return best_column(auroc(*sides), standardised_difference(*sides))


def _by_contrast(sums: Tensor, lengths: Tensor, rows: Rows) -> int:
    up, down = (sums[side].double().sum(0) / lengths[side].sum() for side in rows)
    return int((up - down).argmax())
