"""Activations at the tokens of texts, which detectors score and differences of means are made of."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.host.chat_template import Prompt, asked, in_words, listed_prompts
from saelens_ext.host.hook_pass import limits_of
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import text_ids
from saelens_ext.ops.modes import standard_modes

_CONTEXT_SIZE = 128
_NO_LIMIT = 2**16

Positions = Literal["content", "all", "last"]


@standard_modes()
def read_texts(
    model: HostModel,
    hook_names: str | Sequence[str],
    texts: Prompt | Sequence[Prompt],
    *,
    positions: Positions = "content",
    chat_template: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> ActivationBatch:
    """Read the activations of texts at all hooks in one pass, each text in a window of its own.

    Memory: all activations read.

    Args:
        model: any TransformerLens model.
        hook_names: the hook to read, or several, in any spelling.
        texts: one or several, each a text, or a conversation: messages with "role" and "content", which the tokenizer's
            chat template writes up to where the answer begins, or to the end of the answer that it begins itself.
        positions: "content": every token but special ones; "all": every token, BOS included; "last": the last token of
            each text, one activation per text.
        chat_template: make each text a user's message; "last" then reads the token that the answer follows.
        chat_template_options: passed to the chat template.
        batch_size: texts in a forward pass.
        progress: show a progress bar.

    Returns:
        The activations by hook, with the token and place of each; ``document_ids`` number the texts and ascend.

    Raises:
        ValueError: no text, one with fewer than two tokens or, for "content", none that is not special; for "last", one
            that is longer than the model's limit (for the others it is cut into windows); and as
            :class:`~saelens_ext.activations.stream.ActivationStream`.

    Examples:
        >>> read = sx.read_texts(model, "blocks.1.hook_out", ["On Monday we met.", "We met at noon."], positions="last")
        >>> read.activations["blocks.1.hook_out"].shape == (2, model.cfg.d_model), read.document_ids.tolist()
        (True, [0, 1])
    """
    _checks.choice(positions, get_args(Positions), "positions")
    prompts, tokenizer = listed_prompts(texts, "texts"), tokenizer_of(model)
    words = list(map(in_words, prompts))
    how: dict[str, Any] = {"chat_template": chat_template, "options": chat_template_options}
    given = [asked(tokenizer, one, **how, name=f"texts[{number}]") for number, one in enumerate(prompts)]
    # A stream puts one and the same start before all documents; a chat template says itself whether BOS comes first.
    templated = any(one.templated for one in given)
    rows = [
        {"input_ids": text_ids(model, one.text, templated=one.templated).tolist()} if templated else one.text
        for one in given
    ]
    limit = limits_of(model)[0] or _NO_LIMIT

    def stream(context_size: int) -> ActivationStream:
        return ActivationStream(
            model,
            rows,
            hook_names,
            context_size=context_size,
            batch_size=batch_size,
            exclude_special_tokens=positions == "content",
            last_token_only=positions == "last",
            prepend_bos=False if templated else None,
            progress=progress,
        )

    windows = list(stream(limit).token_windows())
    documents = [document for document, _ in windows]
    _refuse_unread(documents, words, "texts")
    cut = next((document for document, following in pairwise(documents) if document == following), None)
    if positions == "last" and cut is not None:
        raise ValueError(
            f"Text {cut} ({words[cut]!r:.60}) is longer than the model's limit of {limit} tokens, so its last token "
            "cannot be read together with all others. Shorten it."
        )
    read = ActivationBatch.join(list(stream(max(len(ids) for _, ids in windows))))
    _refuse_unread(read.document_ids.tolist(), words, "texts")
    return read


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
    size = context_size or min(_CONTEXT_SIZE, limits_of(model)[0] or _CONTEXT_SIZE)
    stream = ActivationStream(model, sentences, hook_names, context_size=size, batch_size=batch_size, progress=progress)
    seen: set[int] = set()
    for batch in stream:
        seen.update(batch.document_ids.tolist())
        yield batch
    _refuse_unread(seen, sentences, "sentences")


def _refuse_unread(read: Collection[int], texts: Sequence[str], what: str) -> None:
    unread = sorted(set(range(len(texts))).difference(read))
    if unread:
        examples = ", ".join(repr(texts[number]) for number in unread[:3])
        raise ValueError(
            f"{len(unread)} of {len(texts)} {what} have fewer than two tokens that are not special, so they have no "
            f"activation to read, for example {examples}. Leave them out or make them longer."
        )
