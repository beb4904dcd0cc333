"""The difference of means: the simplest supervised direction of a concept, and the baseline of every other.

Symbols
    x       an activation at a token that is no special token, ``(d,)``
    t       geometric mean of |x| over all tokens of both sets
    m+, m-  mean over the positive and over the neutral sentences of t x / |x|, or of x, ``(d,)``
    u       (m+ - m-) / |m+ - m-|
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationBatch
from saelens_ext.concepts.detection import ConceptScores, concept_scores
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.token_activations import token_activations
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes

Weighting = Literal["sentence", "token"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DiffMeans:
    """The direction from the mean of neutral activations to that of positive ones."""

    direction: Tensor
    """u, a unit vector: float32 ``(d,)`` on the CPU."""
    distance: float
    """|m+ - m-|, in units of the activation: the strength that carries one mean to the other."""
    midpoint: Tensor
    """(m+ + m-) / 2: float32 ``(d,)``."""
    hook_name: str
    """Where the activations were read, as the name was given."""
    weighting: Weighting
    """What counted equally in the means."""
    equal_norms: bool
    """Whether every activation was brought to the same norm first."""

    def detector(self, *, similarity: Literal["cosine", "dot"] = "cosine", center: bool = False) -> Detector:
        """A detector with this direction alone.

        Args:
            similarity: as in :meth:`Detector.from_directions`.
            center: measure activations from the midpoint of the two means rather than from 0 as in the paper.
        """
        origin = self.midpoint if center else None
        return Detector.from_directions(
            self.direction, self.hook_name, similarity=similarity, center=origin, names=["difference of means"]
        )


class HeldOutDiffMeans(NamedTuple):
    """A difference of means, and how well it detects on sentences that did not make it."""

    diff_means: DiffMeans
    """Made from the training sentences."""
    scores: ConceptScores
    """On the test sentences."""
    test_positives: list[str]
    """Row by row of ``scores.activating``."""
    test_neutrals: list[str]
    """Row by row of ``scores.neutral``."""


@standard_modes(gradients=False)
def diff_means(
    model: HostModel,
    hook_name: str,
    positives: Sequence[str],
    neutrals: Sequence[str],
    *,
    weighting: Weighting = "sentence",
    equal_norms: bool = True,
    context_size: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> DiffMeans:
    """Take the difference of the mean activations of two sets of sentences, special tokens excluded.

    Args:
        model: any TransformerLens model.
        hook_name: any hook, in any spelling.
        positives: sentences that show the concept, at least 1.
        neutrals: sentences that do not.
        weighting: "sentence", each sentence counts equally, its tokens sharing its weight, so that the direction does
            not lean on the longest; "token", each token counts equally, as in the paper.
        equal_norms: bring every activation to the norm t first. In some models an ordinary first word is an attention
            sink with an activation a hundred times as long as all others, and it alone would decide the difference.
            False as in the paper.
        context_size: as for :func:`saelens_ext.concepts.detection.concept_scores`.
        batch_size: windows in a forward pass.
        progress: show progress bars.

    Raises:
        ValueError: no sentence, one without tokens, or sets with the same mean.

    Source: the baseline of arXiv 2506.10920, which keeps BOS; here it is left out, because its activation is huge and
    its share in the mean depends on the length of the sentences.
    """
    _checks.choice(weighting, ("sentence", "token"), "weighting")
    options: dict[str, Any] = {"context_size": context_size, "batch_size": batch_size, "progress": progress}
    shown, absent = (
        sentence_sums(token_activations(model, hook_name, s, **options), hook_name, len(s), equal_norms=equal_norms)
        for s in (_checks.texts(positives, "sentences"), _checks.texts(neutrals, "sentences"))
    )
    return difference_of(shown, absent, hook_name, weighting=weighting, equal_norms=equal_norms)


def held_out_diff_means(
    model: HostModel,
    hook_name: str,
    positives: Sequence[str],
    neutrals: Sequence[str],
    *,
    test_fraction: float = 0.5,
    seed: int = 0,
    weighting: Weighting = "sentence",
    equal_norms: bool = True,
    similarity: Literal["cosine", "dot"] = "cosine",
    center: bool = False,
    confidence: float = 0.95,
    context_size: int | None = None,
    batch_size: int = 16,
) -> HeldOutDiffMeans:
    """Make a difference of means from one part of the sentences and score the other part with it.

    Args:
        positives: sentences that show the concept, at least 2 different ones.
        neutrals: sentences that do not, at least 2 different ones, none of them among the positives.
        test_fraction: fraction of each set that is scored, in (0, 1), chosen at random by ``seed``.
        weighting: as for :func:`diff_means`, and likewise ``equal_norms``, ``context_size`` and ``batch_size``.
        similarity: as for :meth:`DiffMeans.detector`, and likewise ``center``.
        confidence: of the limits of the AUROC, in (0, 1).

    Raises:
        ValueError: as :func:`diff_means` and :func:`split_sentences`, or a sentence that is in both sets.
    """
    shared = sorted(set(positives) & set(neutrals))
    if shared:
        raise ValueError(f"{len(shared)} sentences are both positive and neutral: take {shared[0]!r} out of one set.")
    train_up, test_up = split_sentences(positives, test_fraction=test_fraction, seed=seed)
    train_down, test_down = split_sentences(neutrals, test_fraction=test_fraction, seed=seed)
    options: dict[str, Any] = {"context_size": context_size, "batch_size": batch_size}
    made = diff_means(model, hook_name, train_up, train_down, weighting=weighting, equal_norms=equal_norms, **options)
    detector = made.detector(similarity=similarity, center=center)
    scores = concept_scores(model, detector, test_up, test_down, confidence=confidence, **options)
    return HeldOutDiffMeans(made, scores, test_up, test_down)


def split_sentences(
    sentences: Sequence[str], *, test_fraction: float = 0.5, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Split sentences at random into training and test sentences, equal ones never apart, each in the order given.

    Args:
        sentences: at least 2 different ones.
        test_fraction: fraction of the different sentences that goes to the second part, in (0, 1), rounded, at least
            one to either part.

    Raises:
        ValueError: fewer than 2 different sentences, or a fraction out of range.
    """
    _checks.between(test_fraction, 0, 1, "test_fraction")
    sentences = _checks.texts(sentences, "sentences")
    different = list(dict.fromkeys(sentences))
    if len(different) < 2:
        raise ValueError(f"A split needs at least 2 different sentences, got {len(different)}.")
    n_test = min(max(1, math.floor(test_fraction * len(different) + 0.5)), len(different) - 1)
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    test = {different[index] for index in order[:n_test]}
    return [s for s in sentences if s not in test], [s for s in sentences if s in test]


class SentenceSums(NamedTuple):
    """Sums over the tokens of each of n sentences, from which the difference of means of any of them follows."""

    vectors: Tensor
    """Of x, or of x / |x|: float64 ``(n, d)``."""
    counts: Tensor
    """Tokens: float64 ``(n,)``."""
    log_norms: Tensor
    """Of log |x| where x is not 0: float64 ``(n,)``; 0 where norms are left as they are."""
    n_nonzero: Tensor
    """Tokens where x is not 0: float64 ``(n,)``."""

    def of(self, sentences: Any) -> "SentenceSums":
        """Those of some of the sentences; anything that indexes a tensor."""
        return SentenceSums(*(sums[sentences] for sums in self))

    def mean(self, weighting: Weighting) -> Tensor:
        """Mean over sentences, or over all their tokens, ``(d,)``."""
        if weighting == "token":
            return self.vectors.sum(0) / self.counts.sum()
        return (self.vectors / self.counts[:, None]).mean(0)


def sentence_sums(batches: Iterable[ActivationBatch], hook_name: str, n: int, *, equal_norms: bool) -> SentenceSums:
    """Add up the activations of n sentences at one hook, from the batches of a stream whose documents they are.

    With ``equal_norms`` it adds up x / |x|, and log |x| beside it.
    """
    sums = SentenceSums(torch.zeros(n, 0, dtype=torch.float64), *torch.zeros(3, n, dtype=torch.float64))
    for batch in batches:
        # Not every device has float64, so rows are moved before they are widened.
        x, documents = batch.activations[hook_name].cpu().double(), batch.document_ids
        sums = sums if sums.vectors.shape[1] else sums._replace(vectors=sums.vectors.new_zeros(n, x.shape[1]))
        if equal_norms:
            norms = x.norm(dim=1)
            lengths = torch.where(norms > 0, norms, 1)
            x = x / lengths[:, None]
            sums.log_norms.index_add_(0, documents, lengths.log())
            sums.n_nonzero.index_add_(0, documents, (norms > 0).double())
        sums.vectors.index_add_(0, documents, x)
        sums.counts.index_add_(0, documents, torch.ones(len(documents), dtype=torch.float64))
    return sums


def difference_of(
    positives: SentenceSums, neutrals: SentenceSums, hook_name: str, *, weighting: Weighting, equal_norms: bool
) -> DiffMeans:
    """The difference of means of sentences whose sums are known; arguments and errors as :func:`diff_means`."""
    log_norm, n = (float(a.sum() + b.sum()) for a, b in zip(positives[2:], neutrals[2:]))
    scale = math.exp(log_norm / max(1, n))
    up, down = (scale * sums.mean(weighting) for sums in (positives, neutrals))
    difference = up - down
    distance = float(difference.norm())
    # Below float32 rounding of the activations a difference is noise; equal sets are the usual cause.
    if distance <= 1e-6 * float(up.norm() + down.norm()):
        raise ValueError(
            f"The positive and the neutral sentences have the same mean activation at {hook_name} (distance "
            f"{distance:.3g}), so there is no direction between them. Do the two sets differ?"
        )
    return DiffMeans(
        direction=(difference / distance).float(),
        distance=distance,
        midpoint=((up + down) / 2).float(),
        hook_name=hook_name,
        weighting=weighting,
        equal_norms=equal_norms,
    )
