"""Documents become windows without loss, without a second BOS, and without mixing."""

import logging

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch

from saelens_ext.activations import documents
from saelens_ext.activations.windows import WindowSource
from saelens_ext.host.bos import TextStart
from tests.models_zoo import make_tokenizer

BOS, EOS, PAD = 0, 1, 2


def source(dataset, tokenizer=None, *, context_size=8, bos_id=BOS, **options):
    start = TextStart() if bos_id is None else TextStart((bos_id,), prepends_bos=True)
    return WindowSource(dataset, tokenizer or make_tokenizer(), context_size=context_size, start=start, **options)


def windows(*args, **options):
    return [(w.document_id, w.token_ids) for w in source(*args, **options)]


def plain(text):
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_document_is_cut_into_consecutive_windows(tiny_texts):
    found = windows(tiny_texts)
    for document_id, text in enumerate(tiny_texts):
        own = [ids for d, ids in found if d == document_id]
        assert all(ids[0] == BOS for ids in own)
        assert sum((ids[1:] for ids in own), []) == plain(text)
        assert [len(ids) for ids in own[:-1]] == [8] * (len(own) - 1)
        assert 2 <= len(own[-1]) <= 8
    assert [d for d, _ in found] == sorted(d for d, _ in found)


def test_a_window_says_whether_its_document_ends_there(tiny_texts):
    found = list(source(tiny_texts))
    ends = [a.document_id != b.document_id for a, b in zip(found, found[1:])] + [True]
    assert [window.ends_document for window in found] == ends and not all(ends)


@pytest.mark.parametrize("kind", ["list", "Dataset", "IterableDataset"])
def test_documents_are_shuffled_by_a_seed_and_keep_their_numbers(kind, tiny_texts):
    table = datasets.Dataset.from_dict({"text": tiny_texts})
    rows = {"list": tiny_texts, "Dataset": table, "IterableDataset": table.to_iterable_dataset()}[kind]
    ordered, first, again, other = (windows(rows, shuffle_seed=seed) for seed in (None, 3, 3, 4))
    assert first == again != other and sorted(first) == sorted(ordered) != first
    for document_id in range(len(tiny_texts)):
        assert [w for w in first if w[0] == document_id] == [w for w in ordered if w[0] == document_id]


def test_a_stream_is_shuffled_within_a_buffer(monkeypatch, tiny_texts):
    monkeypatch.setattr(documents, "SHUFFLE_BUFFER", 4)
    rows = datasets.Dataset.from_dict({"text": tiny_texts}).to_iterable_dataset()
    order = [number for number, _ in documents.shuffled(rows, 1)]
    assert sorted(order) == list(range(12)) != order
    # What comes n-th has been seen by then, so it is among the first n + 4.
    assert all(number < place + 5 for place, number in enumerate(order))
    assert [row["text"] for _, row in documents.shuffled(rows, 1)] == [tiny_texts[number] for number in order]


def test_a_conversation_can_end_with_the_prompt_for_an_answer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    rows = [{"messages": [{"role": "user", "content": "So?"}]}]
    (without,), (asked,) = (
        windows(rows, tokenizer, context_size=64, add_generation_prompt=prompt) for prompt in (False, True)
    )
    assert without == (0, [BOS, *plain("[user] So?\n")]) and asked == (0, [BOS, *plain("[user] So?\n[assistant] ")])


def test_without_bos_windows_are_full_of_content(tiny_texts):
    found = windows(tiny_texts, bos_id=None)
    assert sum((ids for d, ids in found if d == 3), []) == plain(tiny_texts[3])
    assert max(len(ids) for _, ids in found) == 8


def test_text_that_holds_bos_gets_no_second():
    assert windows(["<s>one two"]) == windows(["one two"])
    assert windows(["<s>one two"], bos_id=None) == [(0, [BOS, *plain("one two")])]


def test_a_chat_template_gives_one_bos():
    messages = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}]
    chats = datasets.Dataset.from_dict({"messages": [messages, messages]})
    for rows in (
        chats,
        chats.to_iterable_dataset(),
        [{"messages": messages}] * 2,
        chats.rename_column("messages", "chat"),
    ):
        name = "messages" if not isinstance(rows, datasets.Dataset) else rows.column_names[0]
        found = windows(rows, context_size=64, text_column=name)
        assert found == [(i, [BOS, *plain("[user] So?\n[assistant] Yes.\n")]) for i in range(2)]


def test_chat_without_a_template_is_an_error():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        windows([{"messages": [{"role": "user", "content": "So?"}]}], tokenizer)


def test_rows_of_token_ids():
    ids = [[BOS, 5, 6, 7], [8, 9]]
    expected = [(0, [BOS, 5, 6, 7]), (1, [BOS, 8, 9])]
    for column in ("input_ids", "tokens"):
        table = datasets.Dataset.from_dict({column: ids})
        assert windows(table) == windows(table.with_format("torch")) == windows(table.with_format("numpy")) == expected
        assert windows(table.to_iterable_dataset()) == expected
    assert windows(datasets.Dataset.from_dict({"other": ids}), text_column="other") == expected


def test_padding_in_rows_is_dropped_by_their_own_mask():
    table = datasets.Dataset.from_dict({"input_ids": [[PAD, 5, PAD, 6]], "attention_mask": [[0, 1, 1, 1]]})
    assert windows(table) == windows(table.with_format("torch")) == [(0, [BOS, 5, PAD, 6])]


def test_token_ids_of_another_vocabulary_are_an_error():
    for ids in ([5, 320], [5, -100]):
        with pytest.raises(ValueError, match=f"Document 0 holds the token id {ids[1]}"):
            windows([{"tokens": ids}], vocabulary_size=320)


def test_text_comes_first_when_there_are_several_columns():
    table = datasets.Dataset.from_dict({"tokens": [[5, 6]], "text": ["one two"]})
    assert windows(table) == [(0, [BOS, *plain("one two")])]
    assert windows(table, text_column="tokens") == [(0, [BOS, 5, 6])]


def test_every_kind_of_dataset_gives_the_same(tiny_texts):
    table = datasets.Dataset.from_dict({"text": tiny_texts, "n": list(range(len(tiny_texts)))})
    expected = windows(tiny_texts)
    rows = [{"text": text} for text in tiny_texts]
    for dataset in (table, table.to_iterable_dataset(), table["text"], tuple(tiny_texts), rows):
        assert windows(dataset) == expected


def test_a_dataset_by_name_is_streamed(monkeypatch, tiny_texts):
    def load_dataset(name, *, split, streaming):
        assert (name, split, streaming) == ("someone/texts", "train", True)
        return datasets.Dataset.from_dict({"text": tiny_texts}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert windows("someone/texts") == windows(tiny_texts)
    assert source("someone/texts").describe()["dataset_path"] == "someone/texts"


def test_passes_are_equal(tiny_texts):
    twice = source(datasets.Dataset.from_dict({"text": tiny_texts}).to_iterable_dataset())
    assert list(twice) == list(twice)


def test_short_documents_are_skipped_and_counted(caplog):
    with caplog.at_level("INFO", logger="saelens_ext"):
        found = windows(["", "a", "one two", "<s>a"])
    assert {d for d, _ in found} == {2}
    assert "3 of 4 documents skipped" in caplog.text


def test_missing_documents_count_as_empty():
    assert {d for d, _ in windows([{"text": None}, {"text": "one two"}, {"text": []}])} == {1}


def test_a_document_that_the_tokenizer_refuses_is_skipped_and_counted(caplog):
    found = windows(["one two", "a \ud800 b", "four", "\udfff", "a"])
    assert found == [(0, [BOS, *plain("one two")]), (2, [BOS, *plain("four")])]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "2 of 5 documents skipped" in record.message and "Document 1 is refused by the tokenizer" in record.message
    with pytest.raises(ValueError, match="No usable document: 1 of 2 .* 1 cannot be tokenised.*Document 0 is refused"):
        windows(["\ud800", "a"])


def test_refused_documents_are_counted_where_a_pass_ends_early(caplog):
    found = iter(source(["\ud800", "one two", "three four"]))
    assert next(found).document_id == 1
    found.close()
    assert "1 of 2 documents skipped" in caplog.text


def test_a_chat_that_the_template_or_the_tokenizer_refuses_is_skipped(caplog):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    talks = [[{"role": role, "content": text}] for role, text in
             [("user", "one two"), ("system", "one two"), ("user", "\udc80 two")]]  # fmt: skip
    assert [d for d, _ in windows([{"messages": talk} for talk in talks], tokenizer)] == [0]
    assert "2 of 3 documents skipped" in caplog.text and "no system role" in caplog.text


def test_what_is_wrong_with_the_data_itself_still_ends_the_pass():
    with pytest.raises(ValueError, match="Document 1 holds the token id 400"):
        windows([{"tokens": [5, 6]}, {"tokens": [5, 400]}], vocabulary_size=320)


TALK = [("user", "So?"), ("assistant", "Yes.")]


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "human", "value": "So?"}, {"from": "gpt", "value": "Yes."}],
        [{"from": "user", "value": "So?"}, {"from": "assistant", "value": "Yes."}],
        [{"role": "user", "value": "So?"}, {"from": "gpt", "content": "Yes."}],
        [{"from": "human", "value": "So?", "weight": 0}, {"role": "assistant", "content": "Yes."}],
    ],
)
def test_conversations_of_either_spelling_are_one(messages):
    expected = windows([{"messages": [{"role": role, "content": text} for role, text in TALK]}], context_size=64)
    for rows in ([{"conversations": messages}], datasets.Dataset.from_list([{"conversations": messages}])):
        assert windows(rows, context_size=64) == windows(rows, context_size=64, text_column="conversations") == expected


def test_other_roles_keep_their_names():
    messages = [{"from": "system", "value": "Be."}, {"from": "tool", "value": "3"}]
    assert windows([{"messages": messages}], context_size=64) == [(0, [BOS, *plain("[system] Be.\n[tool] 3\n")])]


@pytest.mark.parametrize(
    ("message", "keys"),
    [
        ({"role": "user", "text": "So?"}, "'role', 'text'"),
        ({"speaker": "A", "content": "So?"}, "'speaker', 'content'"),
        ({"from": "human", "value": None}, "'from'"),
        ({}, "nothing"),
    ],
)
def test_a_message_without_role_or_content_is_an_error(message, keys):
    good = [{"role": "user", "content": "So?"}]
    with pytest.raises(ValueError, match=f"Document 1 holds a chat message with {keys}; .*'from' and 'value'"):
        windows([{"messages": good}, {"messages": [*good, message]}])


def test_a_call_of_a_tool_needs_no_content():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] or m['tool_calls'][0] }} {% endfor %}"
    talk = [{"role": "user", "content": "So?"}, {"role": "assistant", "tool_calls": ["look up"]}]
    assert windows([{"messages": talk}], tokenizer, context_size=64) == [(0, [BOS, *plain("So? look up ")])]


def test_long_documents_do_not_make_the_tokenizer_warn(caplog):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 4
    logger = logging.getLogger("transformers")  # which passes nothing on to the root
    logger.addHandler(caplog.handler)
    caplog.set_level("WARNING", logger="transformers")
    try:
        windows(["one two three four five six"], tokenizer)
        assert caplog.text == ""
        tokenizer("one two three four five six")
        assert "longer than" in caplog.text  # and would have been seen
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("dataset", [[], datasets.Dataset.from_dict({"text": []})])
def test_an_empty_dataset_is_an_error(dataset):
    with pytest.raises(ValueError, match="dataset is empty"):
        source(dataset)


def test_an_empty_stream_is_an_error(tiny_texts):
    stream = datasets.Dataset.from_dict({"text": tiny_texts}).to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(ValueError, match="dataset is empty"):
        windows(stream)


def test_only_short_documents_are_an_error():
    with pytest.raises(ValueError, match="No usable document: all 3"):
        windows(["", "a", "b"])


def test_an_unknown_column_lists_the_columns(tiny_texts):
    table = datasets.Dataset.from_dict({"content": tiny_texts, "url": tiny_texts})
    with pytest.raises(ValueError, match="no column 'text'; its columns are 'content', 'url'"):
        source(table)
    with pytest.raises(ValueError, match="no column 'body'; its columns are 'content', 'url'"):
        windows(table.to_iterable_dataset(), text_column="body")
    # A column asked for by name is not silently replaced by another that happens to be there.
    with pytest.raises(ValueError, match="no column 'body'"):
        source(table.rename_column("url", "tokens"), text_column="body")


class _Polars:
    """What polars gives: its frame iterates over columns, and has to_dicts."""

    def __init__(self, columns):
        self.columns = columns

    def __iter__(self):
        return iter(self.columns.values())

    def to_dicts(self):
        return [dict(zip(self.columns, row)) for row in zip(*self.columns.values())]


def test_a_table_is_read_row_by_row(tiny_texts):
    columns = {"source": ["web"] * len(tiny_texts), "text": tiny_texts}
    frame, expected = pandas.DataFrame(columns), windows(tiny_texts)
    tables = [
        frame,
        frame.set_index("source"),
        frame.astype("string"),
        frame.to_dict("list"),
        {"text": np.array(tiny_texts)},
        {"text": frame["text"]},
        pyarrow.table(columns),
        _Polars(columns),
    ]
    for table in tables:
        assert windows(table) == expected
        assert windows(table, text_column="text") == expected
    assert windows(frame.rename(columns={"text": "body"}), text_column="body") == expected
    with pytest.raises(ValueError, match="no column 'body'; its columns are 'source', 'text'"):
        windows(frame, text_column="body")
    ids = [[5, 6, 7], [8, 9]]
    rows = [{"input_ids": ids[0]}, {"input_ids": ids[1]}]
    assert windows(pandas.DataFrame({"input_ids": ids})) == windows({"input_ids": ids}) == windows(rows)


def test_a_column_of_texts_is_a_dataset(tiny_texts):
    for column in (
        pandas.Series(tiny_texts),
        pandas.Series(tiny_texts, index=range(7, 7 + len(tiny_texts))),
        pandas.Series(tiny_texts, dtype="string"),
        np.array(tiny_texts),
        np.array(tiny_texts, dtype=object),
        pyarrow.array(tiny_texts),
        pyarrow.chunked_array([tiny_texts]),
    ):
        assert windows(column) == windows(tiny_texts)


def test_empty_cells_are_skipped(caplog):
    texts = ["one two", None, float("nan"), pandas.NA, "four"]
    for dataset in (texts, pandas.Series(texts), pandas.DataFrame({"text": texts}), {"text": texts}):
        assert [d for d, _ in windows(dataset)] == [0, 4]
    assert [d for d, _ in windows(pandas.DataFrame({"text": ["one two", np.nan]}))] == [0]


@pytest.mark.parametrize(
    ("dataset", "received"),
    [
        ({"one two", "three"}, "got a set"),
        (b"one two", "got a bytes"),
        (np.array("one two"), "got a numpy.ndarray"),
        ({"text": "one two"}, r"got a dict with 'text' \(a str\)"),
        ({"train": pandas.DataFrame({"text": ["one"]})}, r"'train' \(a pandas.DataFrame\).*pick a split"),
        ({"train": datasets.Dataset.from_dict({"text": ["one"]})}, r"'train' \(a datasets.Dataset\)"),
        ({"text": ["one", "two"], "n": [1]}, "of lengths {'text': 2, 'n': 1}"),
        ({}, "got a dict with no key"),
        (pandas.DataFrame({"text": []}), "dataset is empty"),
        (pandas.Series([], dtype=object), "dataset is empty"),
    ],
)
def test_what_holds_no_documents_is_refused_by_what_it_is(dataset, received):
    with pytest.raises(ValueError, match=f"(?i){received}"):
        source(dataset)


def test_numbers_are_no_documents():
    for dataset in (np.ones((3, 4)), torch.ones(3, 4), pandas.Series([1, 2]), pandas.DataFrame({"text": [1, 2]})):
        with pytest.raises(ValueError, match="(must be a string, or a row|Document 0 holds 1, which is not text)"):
            windows(dataset)


def test_what_is_no_dataset_is_an_error(tiny_texts):
    with pytest.raises(ValueError, match="pick a split"):
        source(datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": tiny_texts})))
    with pytest.raises(ValueError, match="read more than once"):
        source(text for text in tiny_texts)
    with pytest.raises(ValueError, match="read more than once"):
        source(7)
    with pytest.raises(ValueError, match="must be a string, or a row"):
        windows([3, 4])
    for document in (3, ["one", "two"], [0.5, 1.5]):
        with pytest.raises(ValueError, match="Document 1 .* text, token ids or chat messages"):
            windows([{"text": "one two"}, {"text": document}])


def test_text_without_a_tokenizer_is_an_error():
    with pytest.raises(ValueError, match="no tokenizer, and the dataset holds text"):
        list(WindowSource(["one two"], None, context_size=8))
    assert [w.token_ids for w in WindowSource([{"tokens": [5, 6]}], None, context_size=8)] == [[5, 6]]


def test_description_tells_datasets_apart(tiny_texts):
    described = source(tiny_texts).describe()
    assert described != source(tiny_texts, shuffle_seed=0).describe()
    assert described == source(list(tiny_texts)).describe() != source(tiny_texts[1:]).describe()
    table = datasets.Dataset.from_dict({"text": tiny_texts})
    assert source(table).describe()["dataset_fingerprint"] == table._fingerprint
    tensors = [{"tokens": torch.tensor([5, 6])}]
    assert isinstance(source(tensors).describe()["dataset_fingerprint"], str)
