"""Documents become windows without loss, without a second BOS, and without mixing."""

import logging

import datasets
import pytest
import torch

from saelens_ext.activations.windows import WindowSource
from tests.models_zoo import make_tokenizer

BOS, EOS, PAD = 0, 1, 2


def source(dataset, tokenizer=None, *, context_size=8, bos_id=BOS, **options):
    return WindowSource(dataset, tokenizer or make_tokenizer(), context_size=context_size, bos_id=bos_id, **options)


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
        list(WindowSource(["one two"], None, context_size=8, bos_id=None))
    assert [w.token_ids for w in WindowSource([{"tokens": [5, 6]}], None, context_size=8, bos_id=None)] == [[5, 6]]


def test_description_tells_datasets_apart(tiny_texts):
    described = source(tiny_texts).describe()
    assert described == source(list(tiny_texts)).describe() != source(tiny_texts[1:]).describe()
    table = datasets.Dataset.from_dict({"text": tiny_texts})
    assert source(table).describe()["dataset_fingerprint"] == table._fingerprint
    tensors = [{"tokens": torch.tensor([5, 6])}]
    assert isinstance(source(tensors).describe()["dataset_fingerprint"], str)
