"""Representations of sentences, and what probes read from them, for one concept.

A sentence is the mean over its tokens: of the activations, of a dictionary's codes, or of one-hot vectors that say
which latent is largest, which makes it a histogram of latents.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from torch import Tensor

from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.token_activations import token_activations
from saelens_ext.evals.concepts_data import Concept
from saelens_ext.evals.detection.detection_cells import Reading, Split
from saelens_ext.evals.detection.probes import fit_probe, most_different
from saelens_ext.host.flat_sae import hooks_of
from saelens_ext.host.models import HostModel
from saelens_ext.ops.detection import auroc

ALL, ONE_HOT = "all", "one-hot"
"""Probes on all coordinates of the activations, and on all K entries of the histogram."""
MIN_RAW = 0.6
"""Below this accuracy of the raw probe, what is retained above chance has no meaning."""


def one_hot(detector: Detector) -> Detector:
    """Whether each score of a detector is its largest; all 0 where every score is 0."""
    score = partial(_largest, detector.score)
    return Detector(hook_name=detector.hook_name, names=detector.names, score=score, row_cost=2 * detector.row_cost)


def _largest(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    scores = score(x)
    largest = torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0)
    return largest * (scores != 0).any(dim=1, keepdim=True)


def assigned(sae: SAE[Any]) -> Detector:
    """One-hot codes of a dictionary: the region an activation belongs to, or else the latent with the largest code."""
    codes = Detector.from_dictionary(sae, similarity="code", hook_name=hooks_of(sae)[0])
    return one_hot(Detector.from_dictionary(sae, basis="exemplar")) if hasattr(sae, "assign") else one_hot(codes)


def some_activations(model: HostModel, hook_name: str, sentences: Sequence[str], n: int, seed: int) -> Tensor:
    """Activations at the tokens of sentences in random order, at least n if there are so many, ``(m, d)``."""
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed)).tolist()
    rows, total = list[Tensor](), 0
    for batch in token_activations(model, hook_name, [str(sentences[i]) for i in order]):
        rows.append(batch.activations[hook_name])
        total += len(rows[-1])
        if total >= n:
            break
    return torch.cat(rows)


def pooled(reading: Reading, detector: Detector) -> np.ndarray:
    """Mean scores of the sentences, float64 ``(n, k)``."""
    return reading.pooled(detector, "mean").double().numpy()


def raw(hook_name: str, d: int) -> Detector:
    """The activations themselves as scores."""
    names = tuple(f"coordinate {number}" for number in range(d))
    return Detector(hook_name=hook_name, names=names, score=lambda x: x, row_cost=d)


def probe_values(x: np.ndarray, split: Split, *, seed: int, k: int | None = None) -> dict[str, Any]:
    """Accuracy (the mean over both labels) and AUROC on judging rows of a probe fitted to choosing rows.

    Args:
        x: representation of all sentences, ``(n, d)``.
        split: rows.
        seed: of the probe's folds.
        k: fit to the k columns whose means differ most, rather than to all.
    """
    rows = torch.cat(split.choosing).numpy()
    y = np.arange(len(rows)) < len(split.choosing[0])
    columns = np.arange(x.shape[1]) if k is None else most_different(x[rows], y, k)
    probe = fit_probe(x[np.ix_(rows, columns)], y, seed=seed)
    up, down = (torch.from_numpy(probe.decide(x[np.ix_(side.numpy(), columns)])) for side in split.judging)
    accuracy = float((up > 0).double().mean() + (down <= 0).double().mean()) / 2
    return {"accuracy": accuracy, "auroc": float(auroc(up[:, None], down[:, None])), "column": int(columns[0])}


def with_retention(values: dict[str, Any], raw_accuracy: float) -> Iterator[dict[str, Any]]:
    """One row per metric, with what is retained of the raw probe's accuracy."""
    above = (values["accuracy"] - 0.5) / (raw_accuracy - 0.5) if raw_accuracy >= MIN_RAW else np.nan
    metrics = {name: values[name] for name in ("accuracy", "auroc")}
    metrics |= {"retention": values["accuracy"] / raw_accuracy if raw_accuracy > 0 else np.nan}
    metrics |= {"retention_above_chance": above}
    yield from ({"column": values["column"], "metric": name, "value": value} for name, value in metrics.items())


def training_sentences(concepts: Sequence[Concept], splits: Sequence[Sequence[Split]]) -> list[str]:
    """Different sentences that no split of their concept judges on."""
    found = dict[str, None]()
    for concept, own in zip(concepts, splits):
        sentences = [*concept.positives, *concept.negatives]
        judged = {int(row) for split in own for side in split.judging for row in side}
        found |= dict.fromkeys(s for row, s in enumerate(sentences) if row not in judged)
    return list(found)
