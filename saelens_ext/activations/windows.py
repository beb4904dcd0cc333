"""A dataset as token windows: documents tokenised without special tokens and cut into consecutive pieces.

A document is one row of the dataset. A window is BOS (where the stream prepends it) and the next piece of one
document; windows never mix documents.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from transformers import PreTrainedTokenizerBase

from saelens_ext.activations.documents import as_messages, is_missing, open_dataset, shuffled
from saelens_ext.host.bos import TextStart
from saelens_ext.host.chat_template import starts_with

logger = logging.getLogger(__name__)

MIN_CONTENT = 2
"""Tokens of content, BOS not counted, below which a document is skipped."""

# Where documents are looked for when the dataset has no column of the asked name and none was asked for by name.
_DEFAULT_COLUMN = "text"
_OTHER_COLUMNS = ("input_ids", "tokens", "messages", "conversations")


@dataclass(frozen=True)
class Window:
    """A piece of one document, as the model sees it."""

    token_ids: list[int]
    document_id: int
    ends_document: bool = True


class WindowSource:
    """The windows of a dataset, in its order or one that a seed gives; each pass starts over.

    Args:
        dataset: as for :class:`~saelens_ext.activations.stream.ActivationStream`. A document that the tokenizer or the
            chat template refuses is skipped, counted and logged.
        tokenizer: what turns text into tokens; None when the rows hold token ids.
        context_size: tokens in a whole window, BOS included.
        start: what stands in front of every window. A document that begins with it already gets no second.
        vocabulary_size: token ids at or above it are refused; None checks nothing.
        add_generation_prompt: end conversations with what their chat template writes before an answer.
        shuffle_seed: of the order of the documents; None: the dataset's own.

    Raises:
        ValueError: when the dataset is empty, can be read only once, or has no such column.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        context_size: int,
        start: TextStart = TextStart(),
        text_column: str = _DEFAULT_COLUMN,
        vocabulary_size: int | None = None,
        add_generation_prompt: bool = False,
        shuffle_seed: int | None = None,
    ):
        self.name = dataset if isinstance(dataset, str) else None
        self.fingerprint: str | None = None  # of the dataset, where whoever opened it knows better than its rows
        self.rows = open_dataset(dataset)
        self.tokenizer = tokenizer
        self.context_size = context_size
        self.start = start
        self.text_column = text_column
        self.vocabulary_size = vocabulary_size
        self.add_generation_prompt = add_generation_prompt
        self.shuffle_seed = shuffle_seed
        columns = getattr(self.rows, "column_names", None)
        if isinstance(columns, list):
            self._column(columns)

    def __iter__(self) -> Iterator[Window]:
        """Yield every window. Raises ValueError when there is none."""
        n_documents = n_short = n_refused = 0
        first = ""
        try:
            for document_id, row in shuffled(self.rows, self.shuffle_seed):
                n_documents += 1
                try:
                    content = self._content(row, document_id)
                except _Refused as error:
                    n_refused, first = n_refused + 1, first or f" The first: {error}"
                    continue
                if len(content) < MIN_CONTENT:
                    n_short += 1
                    continue
                pieces = list(self._cut(content))
                for number, piece in enumerate(pieces, start=1):
                    yield Window(piece, document_id, ends_document=number == len(pieces))
        finally:  # also where no more windows are wanted
            if n_short:
                logger.info("%d of %d documents skipped: fewer than %d tokens.", n_short, n_documents, MIN_CONTENT)
            if n_refused:
                logger.warning("%d of %d documents skipped: not to be tokenised.%s", n_refused, n_documents, first)
        if n_documents == 0:
            raise ValueError("The dataset is empty: it has no row to read a document from.")
        if n_short + n_refused == n_documents:
            short = f"{n_short} of {n_documents}" if n_refused else f"all {n_documents}"
            raise ValueError(
                f"No usable document: {short} have fewer than {MIN_CONTENT} tokens of content"
                f"{f', and {n_refused} cannot be tokenised' if n_refused else ''}. "
                f"Is text_column the column that holds the text?{first}"
            )

    def describe(self) -> dict[str, Any]:
        """The dataset's name and fingerprint, as far as it has them, for a record of what was read."""
        info = getattr(self.rows, "info", None)
        return {
            "dataset_path": self.name or getattr(info, "dataset_name", None),
            "dataset_fingerprint": self.fingerprint
            or getattr(self.rows, "_fingerprint", None)
            or _hash_texts(self.rows),
            "add_generation_prompt": self.add_generation_prompt,
            "shuffle_seed": self.shuffle_seed,
        }

    def _cut(self, content: list[int]) -> Iterator[list[int]]:
        start = list(self.start.ids)
        step = self.context_size - len(start)
        for begin in range(0, len(content), step):
            yield start + content[begin : begin + step]

    def _content(self, row: Any, document_id: int) -> list[int]:
        """The document's tokens without the start that its windows will get."""
        document = self._document(row)
        if is_missing(document):
            return []
        if isinstance(document, str):
            return self._tokenise(document, document_id)
        if _is_conversation(document):
            return self._tokenise(self._apply_chat_template(document, document_id), document_id)
        ids, start = self._checked(_unpadded(document, row, document_id), document_id), list(self.start.ids)
        return ids[len(start) :] if start and ids[: len(start)] == start else ids

    def _document(self, row: Any) -> Any:
        return row if isinstance(row, str) or is_missing(row) else row[self._column(list(_fields(row)))]

    def leave_start_to_template(self) -> None:
        """Put nothing in front of conversations that their chat template begins with something else."""
        if not self.start.ids or not getattr(self.tokenizer, "chat_template", None):
            return
        # The first row is looked at only where it matters: a stream may have to fetch it.
        starts = starts_with(self._needed_tokenizer(), self.start.ids)
        if not starts and _is_conversation(self._document(next(iter(self.rows), ""))):
            self.start = TextStart()

    def _tokenise(self, text: str, document_id: int) -> list[int]:
        tokenizer = self._needed_tokenizer()
        with _refusing(document_id, "the tokenizer"):
            return self.start.after(tokenizer, text)

    def _apply_chat_template(self, conversation: Any, document_id: int) -> str:
        tokenizer, messages = self._needed_tokenizer(), as_messages(conversation, document_id)
        if not tokenizer.chat_template:
            raise ValueError(
                "The dataset holds chat messages, and there is no chat template: set tokenizer.chat_template, or "
                "give text."
            )
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": self.add_generation_prompt}
        with _refusing(document_id, "the chat template"):
            return str(tokenizer.apply_chat_template(messages, **options))

    def _needed_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(
                "The model has no tokenizer, and the dataset holds text: load the model with tokenizer=..., or give a "
                "dataset of token ids (a column input_ids or tokens)."
            )
        return self.tokenizer

    def _checked(self, ids: list[int], document_id: int) -> list[int]:
        bad = [i for i in ids if i < 0 or (self.vocabulary_size is not None and i >= self.vocabulary_size)]
        if bad:
            raise ValueError(
                f"Document {document_id} holds the token id {bad[0]}, outside the model's vocabulary of "
                f"{self.vocabulary_size} tokens. Was it tokenised for another model?"
            )
        return ids

    def _column(self, columns: list[str]) -> str:
        if self.text_column in columns:
            return self.text_column
        others = [name for name in _OTHER_COLUMNS if name in columns] if self.text_column == _DEFAULT_COLUMN else []
        if not others:
            raise ValueError(
                f"The dataset has no column {self.text_column!r}; its columns are {', '.join(map(repr, columns))}. "
                "Name the one that holds text, token ids or chat messages with text_column=..."
            )
        return others[0]


class _Refused(Exception):
    """A document that cannot be made into tokens, and why; one such must not end a pass of hours."""


@contextmanager
def _refusing(document_id: int, who: str) -> Iterator[None]:
    try:
        yield
    # Each library has errors of its own here: TypeError for a lone surrogate, TemplateError for roles out of turn.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip():.200}"
        raise _Refused(f"Document {document_id} is refused by {who} ({reason}).") from error


def _is_conversation(document: Any) -> bool:
    return isinstance(document, Sequence) and len(document) > 0 and isinstance(document[0], Mapping)


def _fields(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        allowed = "a string, or a row with a column of text, token ids or chat messages"
        raise ValueError(f"A document must be {allowed}; got a {type(row).__name__}.")
    return row


def _unpadded(document: Any, row: Mapping[str, Any], document_id: int) -> list[int]:
    """Token ids as a list, without what the row's own attention mask says is padding."""
    ids = _as_list(document)
    if ids is None or not all(isinstance(i, Integral) for i in ids):
        raise ValueError(
            f"Document {document_id} holds {document!r:.80}, which is not text, token ids or chat messages. Is "
            "text_column the column that holds the documents?"
        )
    mask = _as_list(row.get("attention_mask"))
    return ids if mask is None else [i for i, real in zip(ids, mask, strict=True) if real]


def _as_list(values: Any) -> list[Any] | None:
    """A list, tensor or array as a list; None for anything else."""
    if isinstance(values, (list, tuple)):
        return list(values)
    return values.tolist() if hasattr(values, "tolist") else None


def _hash_texts(rows: Any) -> str | None:
    """A fingerprint of a plain list; None for what would have to be downloaded to know."""
    if not isinstance(rows, (list, tuple)):
        return None
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode() + b"\0")
    return digest.hexdigest()[:16]
