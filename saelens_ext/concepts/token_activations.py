"""Activations at the tokens of sentences, which detectors score and differences of means are made of."""

from collections.abc import Iterator, Sequence

import torch

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.host.models import HostModel

_CONTEXT_SIZE = 128


def token_activations(
    model: HostModel,
    hook_names: str | Sequence[str],
    sentences: Sequence[str],
    *,
    context_size: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Iterator[ActivationBatch]:
    """Activations at the tokens of sentences, special tokens excluded, at all hooks in one pass, batch by batch.

    Yields:
        Batches whose ``document_ids``, which ascend, number the sentences.

    Raises:
        ValueError: no sentence, one that is no text, or one that gives no activation; the latter at the end of the
            pass.
    """
    sentences = _checks.texts(sentences, "sentences")
    size = context_size or min(_CONTEXT_SIZE, getattr(model.cfg, "n_ctx", None) or _CONTEXT_SIZE)
    stream = ActivationStream(model, sentences, hook_names, context_size=size, batch_size=batch_size, progress=progress)
    seen = torch.zeros(len(sentences), dtype=torch.bool)
    for batch in stream:
        seen[batch.document_ids] = True
        yield batch
    silent = (~seen).nonzero().flatten().tolist()
    if silent:
        examples = ", ".join(repr(sentences[index]) for index in silent[:3])
        raise ValueError(
            f"{len(silent)} of {len(sentences)} sentences have fewer than two tokens that are not special, so they "
            f"have no score, for example {examples}. Leave them out or make them longer."
        )
