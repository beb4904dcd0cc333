"""Scores of sentences from the scores of their tokens, for many detectors in one pass over the model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationBatch
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.token_activations import token_activations
from saelens_ext.host.bos import text_start, warn_of_other_bos
from saelens_ext.host.models import HostModel

Pooling = Literal["max", "mean", "last"]

# Scores held at once: 16 MB in float32, whatever the number of latents.
_SCORES_PER_BLOCK = 2**22


class SentencePool:
    """One detector's scores of n sentences, gathered batch by batch; memory: the table and one block of scores.

    A sentence's score is the largest of its tokens' ("max"), their mean ("mean"), or that of its last token ("last");
    special tokens do not count.
    """

    def __init__(self, detector: Detector, n: int, pooling: Pooling = "max"):
        _checks.choice(pooling, get_args(Pooling), "pooling")
        self._detector, self._pooling = detector, pooling
        self._table = torch.full((n, len(detector.names)), -torch.inf if pooling == "max" else 0.0)
        self._n_tokens = torch.zeros(n, 1, dtype=torch.int64)

    def take(self, batch: ActivationBatch) -> None:
        """Add the next batch of a stream whose documents are the sentences, in their order."""
        rows = max(1, _SCORES_PER_BLOCK // self._detector.row_cost)
        x = batch.activations[self._detector.hook_name]
        for part, documents in zip(x.split(rows), batch.document_ids.split(rows), strict=True):
            # A stream goes through its documents in order, so the sentences of a block lie side by side.
            first, last = int(documents[0]), int(documents[-1]) + 1
            scores = _checks.finite(self._detector.score(part), "A score").to(torch.float32)
            self._add(scores, (documents - first).to(scores.device), slice(first, last))

    def _add(self, scores: Tensor, documents: Tensor, sentences: slice) -> None:
        table, counts = self._table[sentences], torch.bincount(documents)
        if self._pooling == "last":
            table[:] = scores[counts.cumsum(0) - 1].cpu()
            return
        # On the device of the scores, which are many more than the sentences.
        new = table.to(scores.device)
        if self._pooling == "max":
            new = new.scatter_reduce(0, documents[:, None].expand_as(scores), scores, "amax")
        else:
            new = new.index_add(0, documents, scores)
            self._n_tokens[sentences] += counts[:, None].cpu()
        table[:] = new.cpu()

    def table(self) -> Tensor:
        """The scores ``(n, k)``, float32 on the CPU, once every sentence was taken."""
        return self._table / self._n_tokens if self._pooling == "mean" else self._table


def pool_scores(
    batches: Iterable[ActivationBatch], detectors: Mapping[str, Detector], n: int, pooling: Pooling = "max"
) -> dict[str, Tensor]:
    """The tables ``(n, k)`` of several detectors, from the batches of a stream whose documents are n sentences."""
    pools = {name: SentencePool(detector, n, pooling) for name, detector in detectors.items()}
    for batch in batches:
        for pool in pools.values():
            pool.take(batch)
    return {name: pool.table() for name, pool in pools.items()}


def warn_of_bos(model: HostModel, detectors: Iterable[Detector]) -> None:
    """Warn of detectors that were built on texts that start otherwise than this model's."""
    for built in dict.fromkeys(detector.prepend_bos for detector in detectors):
        warn_of_other_bos(built, text_start(model).prepends_bos, "this model's sentences")


@overload
def sentence_scores(
    model: HostModel,
    detectors: Detector,
    sentences: Sequence[str],
    *,
    pooling: Pooling = ...,
    context_size: int | None = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> Tensor: ...


@overload
def sentence_scores(
    model: HostModel,
    detectors: Mapping[str, Detector],
    sentences: Sequence[str],
    *,
    pooling: Pooling = ...,
    context_size: int | None = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> dict[str, Tensor]: ...


@torch.no_grad()
def sentence_scores(
    model: HostModel,
    detectors: Detector | Mapping[str, Detector],
    sentences: Sequence[str],
    *,
    pooling: Pooling = "max",
    context_size: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Score sentences by one detector or by several, reading each sentence once, at all their hooks.

    Memory: the results, and a block of scores of tens of megabytes.

    Args:
        detectors: what scores, or several by name.
        sentences: at least 1, of which each is one document however long.
        pooling: what a sentence's score is, over its tokens but special ones: the largest ("max"), the mean
            ("mean"), or that of the last ("last").
        context_size: tokens in a window, BOS included; a longer sentence is cut into windows. By default 128, or
            the model's own limit if that is less.

    Returns:
        ``(len(sentences), k)``, float32 on the CPU; for several detectors one such tensor by name.

    Raises:
        ValueError: no sentence, one without tokens to score, no detector, or as
            :class:`~saelens_ext.activations.stream.ActivationStream`.
    """
    several = {"": detectors} if isinstance(detectors, Detector) else dict(detectors)
    if not several:
        raise ValueError("detectors is empty; give at least one.")
    warn_of_bos(model, several.values())
    sentences = _checks.texts(sentences, "sentences")
    hooks = [detector.hook_name for detector in several.values()]
    batches = token_activations(
        model, hooks, sentences, context_size=context_size, batch_size=batch_size, progress=progress
    )
    tables = pool_scores(batches, several, len(sentences), pooling)
    return tables[""] if isinstance(detectors, Detector) else tables
