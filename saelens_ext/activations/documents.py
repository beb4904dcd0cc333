"""What users hand over as a dataset, as rows that can be read again and again, and chat messages in one form."""

import random
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import islice
from math import isnan
from typing import Any

import datasets

# How pyarrow, polars, pandas and numpy call it.
_TO_LIST = ("to_pylist", "to_dicts", "to_list", "tolist")
SHUFFLE_BUFFER = 10_000
"""Documents among which rows that cannot be indexed are shuffled."""
_ROLES = {"human": "user", "gpt": "assistant"}


def open_dataset(dataset: Any) -> Any:
    """An object whose iteration starts over each time and gives one document, or one row of columns, at a time.

    ValueError: it holds no documents, or can be read only once.
    """
    if isinstance(dataset, str):
        return datasets.load_dataset(dataset, split="train", streaming=True)
    rows = _columns_as_rows(dataset) if isinstance(dataset, Mapping) else _table_as_rows(dataset)
    if isinstance(rows, (Iterator, Set, bytes, bytearray)) or not hasattr(rows, "__iter__"):
        raise ValueError(
            "dataset must be documents in an order, which can be read more than once, got a "
            f"{_type_name(dataset)}. Give a datasets.Dataset or IterableDataset, a list of strings, a table with a "
            "column of text (pandas, polars, pyarrow or a dict of lists), or the name of a dataset."
        )
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise ValueError("The dataset is empty: it has no row to read a document from.")
    return rows


def shuffled(rows: Any, seed: int | None) -> Iterator[tuple[int, Any]]:
    """The rows with their numbers, in an order that the seed gives (None: theirs), the same on every call.

    Rows that cannot be indexed go through a buffer, in which each waits for its place.
    """
    if seed is None:
        yield from enumerate(rows)
        return
    generator = random.Random(seed)
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        for number in generator.sample(range(len(rows)), len(rows)):
            yield number, rows[number]
        return
    numbered = enumerate(rows)
    held = list(islice(numbered, SHUFFLE_BUFFER))
    for row in numbered:
        place = generator.randrange(len(held))
        yield held[place]
        held[place] = row
    generator.shuffle(held)
    yield from held


def _columns_as_rows(columns: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    """A dict of columns of equal length as rows."""
    lists = {name: _as_column(values) for name, values in columns.items()}
    wrong = [f"{name!r} (a {_type_name(columns[name])})" for name, values in lists.items() if values is None]
    lengths = {name: len(values) for name, values in lists.items() if values is not None}
    if wrong or not lists or len(set(lengths.values())) != 1:
        what = f"lists of lengths {lengths}" if not wrong and lists else ", ".join(wrong) or "no key"
        raise ValueError(
            f"dataset must be one table of documents; a dict is one where every value is a list, all of the same "
            f"length. Got a {_type_name(columns)} with {what}. If its values are the splits of a dataset, pick a "
            "split: dataset['train'] for instance."
        )
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _as_column(values: Any) -> list[Any] | None:
    """A column of a table as a list; None for what is none, such as a text or another table."""
    if isinstance(values, (list, tuple)):
        return list(values)
    is_other = isinstance(values, (str, bytes, Mapping, Set, datasets.Dataset, datasets.IterableDataset))
    found = None if is_other or hasattr(values, "columns") else _called(values, _TO_LIST)
    return found if isinstance(found, list) else None


def _table_as_rows(dataset: Any) -> Any:
    """A table or column of pandas, polars, pyarrow or numpy as a list of rows; others as they are."""
    if isinstance(dataset, (list, tuple, datasets.Dataset, datasets.IterableDataset)):
        return dataset
    if hasattr(dataset, "iloc") and hasattr(dataset, "columns"):  # pandas, whose iteration gives column names
        return dataset.to_dict(orient="records")
    found = _called(dataset, _TO_LIST)
    return dataset if found is None else found if isinstance(found, list) else None


def _called(values: Any, methods: Sequence[str]) -> Any:
    """What the first of an object's methods gives; None if it has none of them."""
    for name in methods:
        if callable(method := getattr(values, name, None)):
            return method()
    return None


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def is_missing(document: Any) -> bool:
    """Whether a cell of a table is empty: None, or what pandas writes there (NaN, NA)."""
    return document is None or type(document).__name__ == "NAType" or (isinstance(document, float) and isnan(document))


def as_messages(conversation: Sequence[Mapping[str, Any]], document_id: int) -> list[dict[str, Any]]:
    """Chat messages as templates read them, with ``role`` and ``content``.

    ShareGPT's ``from`` and ``value`` are renamed, as are its roles "human" and "gpt". Other keys stay.

    Raises:
        ValueError: a message without one of them; many templates would write an empty turn.
    """
    messages = []
    for message in conversation:
        # A table fills a key that only other messages have with None.
        given = {key: value for key, value in message.items() if value is not None}
        keys = ", ".join(map(repr, given)) or "nothing"
        role, content = given.pop("from", None), given.pop("value", None)
        given = {"role": _ROLES.get(role, role), "content": content} | given
        if given["role"] is None or (given["content"] is None and "tool_calls" not in given):
            raise ValueError(
                f"Document {document_id} holds a chat message with {keys}; a message needs 'role' and 'content', or "
                "'from' and 'value' as in ShareGPT. Rename them, or name a column of text with text_column=..."
            )
        messages.append(given)
    return messages
