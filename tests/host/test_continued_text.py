"""Text behind a prompt and its tokens: each is what it would be there, whatever the family of the tokenizer."""

from functools import cache
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from saelens_ext.continuations.sample import sample_continuations, score_continuations
from saelens_ext.host.continued_text import ids_after, text_after
from saelens_ext.host.prompt_passes import prompt_ids
from saelens_ext.steering.sampling import mean_log_likelihoods
from tests.models_zoo import MODEL_CLASSES, VOCABULARY, make_model, make_tokenizer

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]
# Every text has tokens that read as the text.
LOSSLESS = ("byte_level", "sentence_piece", "sentence_piece_legacy")
FAMILIES = (*LOSSLESS, "word_piece", "unigram")
PROMPTS = ("", "The value", "The value ", "A list (", "x\n", "é")
TEXT = st.text(alphabet="aest (,.'\n0é\u4e16\U0001f600T-", max_size=8)


@cache
def model_with(family):
    tokenizer = make_tokenizer(family=family) if family in LOSSLESS[:2] else _MADE[family]()
    return make_model("llama", "SAETransformerBridge", tokenizer)


def _wrapped(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _legacy():
    """Llama 2's first form, which puts the dummy space in front of whatever follows a special token, too."""
    tokenizer = Tokenizer.from_str(make_tokenizer(family="sentence_piece").backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    return _wrapped(tokenizer)


def _unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    return _wrapped(tokenizer)


_MADE = {"sentence_piece_legacy": _legacy, "word_piece": _word_piece, "unigram": _unigram}


@pytest.mark.parametrize("family", LOSSLESS)
@given(prompt=st.sampled_from(PROMPTS[1:]), text=TEXT)
@settings(deadline=None, max_examples=150)
def test_a_text_behind_a_prompt_reads_as_that_text(family, prompt, text):
    model = model_with(family)
    (ids,) = ids_after(model, prompt, [text])
    assert text_after(model, prompt_ids(model, prompt).tolist(), ids) == text


@pytest.mark.parametrize("family", FAMILIES)
@given(prompt=st.sampled_from(PROMPTS), text=TEXT)
@settings(deadline=None, max_examples=150)
def test_the_tokens_are_those_of_the_whole_where_it_begins_with_the_prompt(family, prompt, text):
    model = model_with(family)
    start, whole = (prompt_ids(model, t).tolist() for t in (prompt, prompt + text))
    assume(whole[: len(start)] == start)
    rest = whole[len(start) :]
    if text_after(model, start, rest) == text:
        assert ids_after(model, prompt, [text]) == [rest]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@given(prompt=st.sampled_from(PROMPTS), tokens=st.lists(st.integers(4, VOCABULARY - 1), min_size=1, max_size=3))
@settings(deadline=None, max_examples=150)
def test_tokens_come_back_from_their_text_where_it_is_cut_that_way(family, prompt, tokens):
    model = model_with(family)
    start = prompt_ids(model, prompt).tolist()
    text = text_after(model, start, tokens)
    assume(prompt_ids(model, prompt + text).tolist() == [*start, *tokens])
    assert ids_after(model, prompt, [text]) == [tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampled_text_scores_what_it_was_sampled_with(family):
    model = model_with(family)
    found = sample_continuations(model, "The value", 150, max_new_tokens=2, temperature=1.5, top_p=1.0)
    start = list(found.prefix_ids)
    whole = [prompt_ids(model, "The value" + text).tolist() for text in found.texts]
    rows = [row for row in range(len(found)) if whole[row] == [*start, *found.ids_of(row)]]
    assert len(rows) > 10, "most ways to cut a text are not the tokenizer's own, but not all"
    kept = found.select(rows)
    again = score_continuations(model, "The value", list(kept.texts))
    assert again.prefix_ids == kept.prefix_ids and again.texts == kept.texts
    assert torch.equal(again.lengths, kept.lengths)
    torch.testing.assert_close(again.log_probs, kept.log_probs, rtol=1e-4, atol=1e-4)
    likely = mean_log_likelihoods(model, "The value", list(kept.texts))
    torch.testing.assert_close(likely, kept.mean_log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_a_text_in_a_chat_scores_what_it_was_sampled_with(model_class):
    model = make_model("mistral", model_class)
    model.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    found = sample_continuations(model, "So?", 200, max_new_tokens=2, temperature=2.0, top_p=1.0, chat_template=True)
    again = score_continuations(model, "So?", list(found.texts), chat_template=True)
    same = [row for row in range(len(found)) if found.ids_of(row) == again.ids_of(row)]
    assert any(found.texts[row].startswith(" ") for row in same)
    pieces = model.tokenizer.convert_ids_to_tokens(range(VOCABULARY))
    for row in set(range(len(found))) - set(same):
        # Cut otherwise by the tokenizer: into fewer pieces, or these held bytes or a special token.
        read = [pieces[i] for i in found.ids_of(row)]
        assert len(again.ids_of(row)) < len(read) or any(piece.startswith("<") for piece in read), (
            read,
            found.texts[row],
        )


@pytest.mark.parametrize(
    ("family", "prompt", "text", "pieces"),
    [
        ("byte_level", "Of th", "e (x", ["e", "\u0120", "(", "x"]),
        ("byte_level", "Of ", "the", ["t", "he"]),
        ("sentence_piece", "Of th", "e, (x", ["e", ",", "\u2581", "(", "x"]),
        ("sentence_piece", "Of ", "the x", ["t", "he", "\u2581", "x"]),
        ("sentence_piece_legacy", "Of th", "e x", ["e", "\u2581", "x"]),
        ("word_piece", "of th", "e x", ["##e", "x"]),
        ("unigram", "Of th", "e x", None),
    ],
)
def test_a_text_that_would_merge_leaves_the_prompt_as_it_is(family, prompt, text, pieces):
    model = model_with(family)
    start = prompt_ids(model, prompt).tolist()
    (ids,) = ids_after(model, prompt, [text])
    assert prompt_ids(model, prompt + text).tolist()[: len(start)] != start, "nothing merges"
    assert text_after(model, start, ids) == text
    assert pieces is None or model.tokenizer.convert_ids_to_tokens(ids) == pieces


def test_special_tokens_have_no_text_and_bos_is_none_of_the_prompt():
    model = model_with("sentence_piece")
    prompt = prompt_ids(model, "The value").tolist()
    (content,) = ids_after(model, "The value", [" and"])
    assert text_after(model, prompt, [0, content[0], 2, *content[1:], 1]) == " and"
    assert text_after(model, [0], prompt[1:]) == "The value"
    assert ids_after(model, "The value", ["", " and"]) == [[], content]
