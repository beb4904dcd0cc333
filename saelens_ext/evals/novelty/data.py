"""What a novelty evaluation reads: a sample of the reference, and sets of documents cut to equal budgets.

Every set is read as the reference was (hook, context size, BOS, special tokens), from token ids, so that sets differ in
nothing but their documents.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.stream import NO_TOKEN, ActivationBatch, ActivationStream
from saelens_ext.host.bos import text_start
from saelens_ext.host.models import HostModel
from saelens_ext.host.tokens import special_token_ids

BUILT_IN = ("random_tokens", "shuffled_words", "reversed_tokens")
MIN_DOCUMENTS = 20
"""Fewer documents in a set say too little about others of its kind."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """The activations that novelty is measured against."""

    activations: Float[Tensor, "n d"]
    """A uniform sample of what the stream read, in its order."""
    n_read: int
    """Activations of the stream."""
    openings: frozenset[str]
    """How each of its documents begins, without case and spacing."""


def read_reference(
    stream: ActivationStream, n_activations: int, max_per_document: int, generator: torch.Generator
) -> Reference:
    """Read a stream over one hook once, keeping at most ``n_activations`` of its rows, each as likely as any other.

    Args:
        stream: what the dictionaries were fitted to.
        n_activations: rows to keep.
        max_per_document: tokens of a document in the other sets, which it is compared with as far as they go.
        generator: of the sample.
    """
    (hook,), n_start = stream.requested_hook_names, n_start_tokens(stream)
    length = _opening_length(stream, n_start, max_per_document)
    kept: list[Tensor] = []
    keys: list[Tensor] = []
    openings: set[str] = set()
    last, n_read = -1, 0
    for batch in stream:
        first = batch.document_ids != torch.cat([torch.tensor([last]), batch.document_ids[:-1]])
        openings |= {_opening(stream, window, length) for window in batch.context(first)[:, n_start:].tolist()}
        last, n_read = int(batch.document_ids[-1]), n_read + len(batch)
        kept.append(batch.activations[hook])
        keys.append(torch.rand(len(batch), dtype=torch.float64, generator=generator))
        if sum(map(len, keys)) > 2 * n_activations:
            kept, keys = _smallest(kept, keys, n_activations)
    kept, keys = _smallest(kept, keys, n_activations)
    rows = kept[0].to(torch.promote_types(kept[0].dtype, torch.float32))
    return Reference(activations=rows, n_read=n_read, openings=frozenset(openings))


def _smallest(kept: list[Tensor], keys: list[Tensor], n: int) -> tuple[list[Tensor], list[Tensor]]:
    """The rows with the n smallest keys, in order: a uniform sample of all that came so far."""
    rows, key = torch.cat(kept), torch.cat(keys)
    chosen = key.topk(min(n, len(key)), largest=False).indices.sort().values
    return [rows[chosen.to(rows.device)]], [key[chosen]]


def documents_of(
    model: HostModel, reference: ActivationStream, documents: Any, *, n_tokens: int, max_per_document: int
) -> list[list[int]]:
    """The first documents of a set as token ids without BOS, each cut to ``max_per_document`` tokens and none twice,
    until there are ``n_tokens``.

    Args:
        model: whose tokens they are.
        reference: the stream that they are read like.
        documents: anything that an `ActivationStream` takes, or one.
        n_tokens: tokens after which no further document is taken.
        max_per_document: tokens of one document.

    Raises:
        ValueError: as `ActivationStream`.
    """
    given = documents if isinstance(documents, ActivationStream) else stream_like(model, reference, documents)
    found: dict[tuple[int, ...], None] = {}
    total = 0
    for content in _contents(given.token_windows(), n_start_tokens(given)):
        ids = tuple(content[:max_per_document])
        if ids not in found:
            found[ids] = None
            total += len(ids)
        if total >= n_tokens:
            break
    return [list(ids) for ids in found]


def _contents(windows: Iterable[tuple[int, list[int]]], n_start: int) -> Iterator[list[int]]:
    """The windows of each document joined, without the BOS in front of each."""
    current, content = None, list[int]()
    for document, ids in windows:
        if document != current and current is not None:
            yield content
            content = []
        current = document
        content = content + ids[n_start:]
    if current is not None:
        yield content


def stream_like(
    model: HostModel, reference: ActivationStream, documents: Any, *, max_tokens: int | None = None
) -> ActivationStream:
    """A stream over other documents with the settings of a reference."""
    return ActivationStream(
        model,
        documents,
        reference.requested_hook_names,
        context_size=reference.context_size,
        batch_size=reference.batch_size,
        exclude_special_tokens=reference.exclude_special_tokens,
        prepend_bos=reference.prepend_bos,
        seqpos_slice=reference.seqpos_slice,
        last_token_only=reference.last_token_only,
        add_generation_prompt=bool(reference.describe().get("add_generation_prompt", False)),
        max_tokens=max_tokens,
    )


def read_ids(
    model: HostModel, reference: ActivationStream, documents: Sequence[list[int]], n_activations: int
) -> Iterator[ActivationBatch]:
    """The activations of documents of token ids, at most so many, read as the reference was."""
    yield from stream_like(model, reference, {"input_ids": list(documents)}, max_tokens=n_activations)


# --- sets that need no data ---


def built_in_set(
    name: str, model: HostModel, reference: ActivationStream, inside: Sequence[list[int]], seed: int
) -> list[list[int]]:
    """A set made from the inside documents, of as many documents of about the same lengths.

    Args:
        name: "random_tokens": tokens drawn uniformly from the vocabulary without special ones; "shuffled_words": the
            words of each document in random order; "reversed_tokens": its tokens from last to first.
        model: whose vocabulary it is.
        reference: the stream that they are read like.
        inside: token ids of the inside documents.
        seed: of what is drawn.

    Raises:
        ValueError: another name, or words to shuffle without a tokenizer.
    """
    generator = np.random.default_rng(seed)
    if _checks.choice(name, BUILT_IN, "built_in") == "reversed_tokens":
        return [ids[::-1] for ids in inside]
    if name == "random_tokens":
        tokenizer = reference.tokenizer
        size = min([int(model.cfg.d_vocab)] + ([len(tokenizer)] if tokenizer is not None else []))
        special = special_token_ids(tokenizer) if tokenizer is not None else []
        allowed = np.setdiff1d(np.arange(size), np.array([*special, *reference.excluded_ids], dtype=int))
        return [generator.choice(allowed, size=len(ids)).tolist() for ids in inside]
    if reference.tokenizer is None:
        raise ValueError(
            "shuffled_words needs a tokenizer, and the model has none: leave it out of built_in, or load the model "
            "with tokenizer=..."
        )
    texts = [" ".join(generator.permutation(str(reference.tokenizer.decode(ids)).split())) for ids in inside]
    encoded = reference.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [ids[: len(before)] for ids, before in zip(encoded, inside, strict=True)]


# --- documents that are in two sets ---


def refuse_overlap(
    reference: ActivationStream,
    openings: frozenset[str],
    documents: Sequence[list[int]],
    name: str,
    max_per_document: int,
) -> None:
    """Raise ValueError if a document begins as one of the reference does, case and spacing aside."""
    length = _opening_length(reference, n_start_tokens(reference), max_per_document)
    for number, ids in enumerate(documents):
        begins = _opening(reference, ids, length)
        if begins in openings:
            raise ValueError(
                f"Document {number} of {name} is in the reference too: {begins[:80]!r}. What the reference has seen is "
                "not new; give documents that the dictionaries were not fitted to."
            )


def _opening(stream: ActivationStream, content: Sequence[int], length: int) -> str:
    """The beginning of a text without case and spacing, or the numbers of its tokens where there is no tokenizer.

    Other case and spacing make other tokens, so that the text of equally many tokens may end elsewhere: of a long
    document, two characters per token are compared.
    """
    excluded, tokenizer = {NO_TOKEN, *stream.excluded_ids}, stream.tokenizer
    ids = [i for i in content if i not in excluded]
    if tokenizer is None:
        return " ".join(map(str, ids[:length]))
    while ids and not str(tokenizer.decode(ids[:1])).strip():
        ids = ids[1:]
    return " ".join(str(tokenizer.decode(ids[:length])).lower().split())[: 2 * length]


def _opening_length(stream: ActivationStream, n_start: int, max_per_document: int) -> int:
    """The tokens of a document that both its first window and its cut show."""
    return min(stream.context_size - n_start, max_per_document)


def n_start_tokens(stream: ActivationStream) -> int:
    """How many tokens stand in front of every window."""
    return len(text_start(stream.model, stream.prepend_bos).ids)


def refuse_few(n_documents: int, name: str) -> None:
    """Raise ValueError for a set of fewer than `MIN_DOCUMENTS` documents."""
    if n_documents < MIN_DOCUMENTS:
        raise ValueError(
            f"{name} has {n_documents} different documents with tokens to read; at least {MIN_DOCUMENTS} are needed, "
            "as they are the units. Give more documents, or shorter pieces of those there are."
        )
