"""Concept detection: which directions or latents tell sentences about a concept from neutral ones.

One interface for whatever scores an activation: the features of a factorisation, the latents of any SAELens SAE, the
regions of an exemplar partition, and single directions such as a difference of means.

Symbols
    x       an activation, ``(d,)``, at a token that is no special token
    w       a direction, ``(d,)``; c the origin that activations are measured from
    score   of a token: cosine of x - c and w, projection <x - c, w / |w|>, or code; of a sentence: the largest over its
            tokens, or as ``pooling`` says
    A, B    mean score of the activating and of the neutral sentences
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
from torch import Tensor

from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.sentence_scores import Pooling, sentence_scores
from saelens_ext.host.models import HostModel
from saelens_ext.ops.detection import LOG_RATIO_LIMIT, auroc, auroc_interval, log_ratio, standardised_difference
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import wide


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptScores:
    """How well each of k scores detects a concept; CPU tensors, one entry per score, float64 unless said otherwise."""

    names: tuple[str, ...]
    """What each score is of."""
    activating: Tensor
    """Score of every activating sentence, float32 ``(p, k)``."""
    neutral: Tensor
    """Score of every neutral sentence, float32 ``(q, k)``."""
    mean_activating: Tensor
    """A, in units of the score."""
    mean_neutral: Tensor
    """B, in units of the score."""
    log_ratio: Tensor
    """S = log(A / B) in nats, continued to other means as :func:`saelens_ext.ops.detection.log_ratio` says."""
    has_positive_means: Tensor
    """Whether A and B are positive, so that S is the published score; bool."""
    d_prime: Tensor
    """A - B in standard deviations over sentences."""
    auroc: Tensor
    """Probability that an activating sentence scores above a neutral one, ties counting half; in [0, 1]."""
    auroc_low: Tensor
    """Lower confidence limit of it, for each score by itself: the best of many scores is optimistic."""
    auroc_high: Tensor
    """Upper confidence limit of it."""
    confidence: float
    """Of the limits, in (0, 1)."""

    @property
    def difference(self) -> Tensor:
        """A - B, in units of the score."""
        return self.mean_activating - self.mean_neutral

    def to_dataframe(self) -> pd.DataFrame:
        """One row per score."""
        columns = (
            "mean_activating",
            "mean_neutral",
            "log_ratio",
            "has_positive_means",
            "difference",
            "d_prime",
            "auroc",
            "auroc_low",
            "auroc_high",
        )
        return pd.DataFrame({"name": list(self.names)} | {name: getattr(self, name).numpy() for name in columns})


@standard_modes()
def concept_scores(
    model: HostModel,
    detector: Detector,
    activating: Sequence[str],
    neutral: Sequence[str],
    *,
    pooling: Pooling = "max",
    limit: float | int = LOG_RATIO_LIMIT,
    confidence: float = 0.95,
    context_size: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> ConceptScores:
    """Score sentences that should and that should not activate a concept, by all latents of a detector at once.

    Choosing the best latent and trusting its score takes other sentences for the second than for the first, see
    :func:`saelens_ext.concepts.diff_means.split_sentences`.

    Args:
        model: any TransformerLens model.
        detector: what scores.
        activating: p sentences, at least 1, of which each is one document however long.
        neutral: q sentences.
        pooling: as for :func:`~saelens_ext.concepts.sentence_scores.sentence_scores`.
        limit: largest size of the log ratio, in nats.
        confidence: of the limits of the AUROC, in (0, 1).
        context_size: tokens in a window, BOS included; a longer sentence is cut into windows. By default 128, or the
            model's own limit if that is less.
        batch_size: windows in a forward pass.
        progress: show progress bars.

    Raises:
        ValueError: no sentence, one without tokens to score, or as :class:`ActivationStream`.

    Source: arXiv 2506.10920, concept detection. Special tokens are left out for every method alike.
    """
    score = partial(sentence_scores, model, detector, pooling=pooling, context_size=context_size, progress=progress)
    tables = [score(sentences, batch_size=batch_size) for sentences in (activating, neutral)]
    return compare_sentences(*tables, names=detector.names, limit=limit, confidence=confidence)


def compare_sentences(
    activating: Tensor,
    neutral: Tensor,
    *,
    names: Sequence[str],
    limit: float | int = LOG_RATIO_LIMIT,
    confidence: float = 0.95,
) -> ConceptScores:
    """Compare two tables of :func:`sentence_scores`, ``(p, k)`` and ``(q, k)``, of one detector with k names.

    Args:
        limit: largest size of the log ratio, in nats.
        confidence: of the limits of the AUROC, in (0, 1).

    Raises:
        ValueError: tables of other shapes, without rows, or not finite.
    """
    if activating.ndim != 2 or neutral.ndim != 2 or not activating.shape[1] == neutral.shape[1] == len(names):
        raise ValueError(
            f"The tables must have shapes (p, {len(names)}) and (q, {len(names)}), one column per name, got "
            f"{tuple(activating.shape)} and {tuple(neutral.shape)}."
        )
    area = auroc(activating, neutral)
    low, high = auroc_interval(area, len(activating), len(neutral), confidence=confidence)
    a, b = wide(activating).mean(0), wide(neutral).mean(0)
    return ConceptScores(
        names=tuple(names),
        activating=activating,
        neutral=neutral,
        mean_activating=a,
        mean_neutral=b,
        log_ratio=log_ratio(a, b, limit=limit),
        has_positive_means=(a > 0) & (b > 0),
        d_prime=standardised_difference(activating, neutral),
        auroc=area,
        auroc_low=low,
        auroc_high=high,
        confidence=confidence,
    )
