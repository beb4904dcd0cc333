"""Tokens are shown as the text they are, whatever way the tokenizer writes them."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from saelens_ext.host.tokens import special_token_ids, token_strings
from tests.models_zoo import VOCABULARY, make_tokenizer

TEXT = "Assert that this works:\n  a\tb == [1, 2]  # ¿naïve? — yes…"


def test_byte_level_tokens_join_to_the_text(tiny_tokenizer, tiny_texts):
    for text in [*tiny_texts, "a  b\n\n\tc ", " leading"]:
        ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
        strings = token_strings(tiny_tokenizer, ids)
        assert len(strings) == len(ids)
        assert "".join(strings) == text


def test_a_leading_space_is_a_space(tiny_tokenizer):
    ids = tiny_tokenizer(" the", add_special_tokens=False).input_ids
    assert token_strings(tiny_tokenizer, ids)[0][0] == " "


def test_bytes_of_a_character_that_tokens_share_are_spelt_out(tiny_tokenizer):
    # The tokenizer saw no such character, so each byte is a token.
    assert token_strings(tiny_tokenizer, tiny_tokenizer("é", add_special_tokens=False).input_ids) == [r"\xc3", r"\xa9"]
    assert token_strings(tiny_tokenizer, tiny_tokenizer("€", add_special_tokens=False).input_ids) == [
        r"\xe2",
        r"\x82",
        r"\xac",
    ]


def test_every_byte_has_a_reading(tiny_tokenizer):
    """The 256 single-byte tokens read as the character they are in UTF-8, or as their escaped value."""
    alphabet = [tiny_tokenizer.convert_tokens_to_ids(c) for c in pre_tokenizers.ByteLevel.alphabet()]
    assert len(set(alphabet)) == 256
    ascii_characters = {chr(i) for i in range(128)}
    assert set(token_strings(tiny_tokenizer, alphabet)) == ascii_characters | {rf"\x{i:02x}" for i in range(128, 256)}


def test_whole_characters_of_several_bytes_stay_whole():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["日本 日本 日本 été été"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert token_strings(fast, fast("日本 été").input_ids) == ["日本", " été"]


def test_special_and_unknown_ids(tiny_tokenizer):
    assert token_strings(tiny_tokenizer, [0, 1, 2]) == ["<s>", "</s>", "<pad>"]
    assert token_strings(tiny_tokenizer, [VOCABULARY + 5]) == [f"<id {VOCABULARY + 5}>"]
    assert token_strings(tiny_tokenizer, []) == []


def test_an_added_token_reads_as_it_is():
    tokenizer = make_tokenizer()
    # All these characters also stand for bytes, read as which they would be another text.
    tokenizer.add_tokens(["«naïve»", "an end"])
    for text in ("«naïve»", "an end"):
        assert token_strings(tokenizer, tokenizer(text, add_special_tokens=False).input_ids) == [text]


def test_sentence_piece_style_tokens():
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581the", "\u2581", "cat", "\u2581\u2581"]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    ids = tokenizer.convert_tokens_to_ids(["\u2581the", "cat", "<0x0A>", "<0xC3>", "\u2581\u2581"])
    assert token_strings(tokenizer, ids) == [" the", "cat", "\n", r"\xc3", "  "]


def test_a_slow_tokenizer():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    assert token_strings(tokenizer, tokenizer("a b\n").input_ids) == ["a", " ", "b", "\n", "</s>"]


def test_tensors_of_ids_are_welcome(tiny_tokenizer):
    ids = tiny_tokenizer("one two", return_tensors="pt").input_ids[0]
    assert token_strings(tiny_tokenizer, ids) == token_strings(tiny_tokenizer, ids.tolist())


@pytest.mark.parametrize(("pad", "expected"), [("<pad>", [0, 1, 2]), ("</s>", [0, 1]), ("<s>", [0, 1])])
def test_special_token_ids(pad, expected):
    assert special_token_ids(make_tokenizer(pad=pad)) == expected
