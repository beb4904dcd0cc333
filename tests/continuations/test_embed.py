"""The semantic view: exactly the continuation's tokens, whatever surrounds them."""

from dataclasses import replace

import pytest
import torch

from saelens_ext.continuations.embed import continuation_tokens, embed_continuations, embed_visible, visible_rows
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.host.sentence_model import load_sentence_model, packaged_sentence_model
from tests.continuations.static_embedder import UNSEEN, static_embedder
from tests.models_zoo import make_model

PROMPT = "The bank of the"
TEXTS = [" river was flooded.", " city lends money to everyone who asks", "ing", "  spaced   out "]


@pytest.fixture(scope="module")
def embedder():
    return load_sentence_model()


@pytest.fixture(scope="module")
def found():
    return score_continuations(make_model("llama", "HookedSAETransformer"), PROMPT, TEXTS)


def test_a_model_is_loaded_by_the_name_of_its_folder(embedder, found):
    named = embed_continuations(found, str(packaged_sentence_model())).embeddings
    assert torch.equal(named, embed_continuations(found, embedder).embeddings)
    assert load_sentence_model(embedder) is embedder


def by_hand(embedder, text):
    """One text at a time: the word pieces of the prompt are counted off, the rest is averaged."""
    pieces = embedder.tokenizer([PROMPT + text], return_tensors="pt", return_offsets_mapping=True)
    offsets = pieces.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        states = embedder[0](dict(pieces))["token_embeddings"][0]
    chosen = [i for i, (first, last) in enumerate(offsets) if last > first and last > len(PROMPT)]
    mean = states[chosen].mean(dim=0)
    return mean / mean.norm(), [
        embedder.tokenizer.convert_ids_to_tokens(int(pieces["input_ids"][0, i])) for i in chosen
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_row_is_the_mean_over_its_own_tokens(embedder, found, batch_size):
    embedded = embed_continuations(found, embedder, batch_size=batch_size).embeddings
    torch.testing.assert_close(
        embedded, torch.stack([by_hand(embedder, text)[0] for text in TEXTS]), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(len(TEXTS)))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side_moves_nothing(embedder, side):
    encoded = embedder.tokenizer(
        [PROMPT + text for text in TEXTS],
        padding=True,
        padding_side=side,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    inside = continuation_tokens(encoded["offset_mapping"], encoded["attention_mask"], len(PROMPT))
    for row, text in enumerate(TEXTS):
        assert (
            embedder.tokenizer.convert_ids_to_tokens(encoded["input_ids"][row][inside[row]])
            == by_hand(embedder, text)[1]
        )


def test_the_tokens_are_those_of_the_continuation(embedder):
    assert by_hand(embedder, TEXTS[0])[1] == ["river", "was", "flooded", "."]
    # "theing" is split across the boundary: the piece that ends in the continuation counts.
    assert "".join(by_hand(embedder, TEXTS[2])[1]).endswith("ing")


def test_tokens_by_offsets():
    # [CLS] the | ban king [SEP] pad, the continuation starting at character 7 (inside "king").
    offsets = torch.tensor([[[0, 0], [0, 3], [4, 7], [6, 10], [0, 0], [0, 0]]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    assert continuation_tokens(offsets, mask, 7).tolist() == [[False, False, False, True, False, False]]
    padded = torch.tensor([[[4, 9]]])
    assert not continuation_tokens(padded, torch.tensor([[0]]), 0).any()


def test_context_matters_and_the_plain_embedding_is_the_models_own(embedder, found):
    contextual = embed_continuations(found, embedder).embeddings
    other = embed_continuations(replace(found, prompt="A huge flood of", prefix="A huge flood of"), embedder).embeddings
    assert (contextual - other).abs().max() > 1e-2
    plain = embed_continuations(found, embedder, mode="sentence").embeddings
    own = torch.tensor(embedder.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False))
    torch.testing.assert_close(plain, own, rtol=1e-5, atol=1e-5)


def test_the_beginning_of_an_answer_is_read_before_its_continuation(embedder, found):
    begun = [{"role": "user", "content": "Which bank?"}, {"role": "assistant", "content": "A huge flood of"}]
    talk = replace(found, prompt="Which bank?", prefix="<user>Which bank?<model>A huge flood of")
    plain = replace(found, prompt="Which bank?\nA huge flood of", prefix="Which bank?\nA huge flood of")
    wanted = embed_continuations(plain, embedder).embeddings
    given = embed_continuations(replace(talk, metadata={"messages": begun}), embedder).embeddings
    torch.testing.assert_close(given, wanted)
    asked = embed_continuations(replace(talk, metadata={"messages": begun[:1]}), embedder).embeddings
    assert (asked - wanted).abs().max() > 1e-2


def test_what_cannot_be_embedded(embedder, found):
    with pytest.raises(ValueError, match="mode must be one of"):
        embed_continuations(found, embedder, mode="pooled")
    with pytest.raises(ValueError, match="sees no token in '  '"):
        embed_continuations(replace(found, texts=(" a", "  ", " b", " c")), embedder)
    with pytest.raises(ValueError, match="reads 256"):
        embed_continuations(replace(found, texts=(" word" * 300, " a", " b", " c")), embedder)

    class Slow:
        tokenizer = object()

        def encode(self):
            raise AssertionError

    with pytest.raises(ValueError, match="mode='sentence'"):
        embed_continuations(found, Slow())


@pytest.mark.parametrize("kind", ["packaged", "static", "of no tokenizer"])
def test_rows_without_text_that_is_seen(kind, embedder, found):
    texts = [" river", *(UNSEEN if kind != "of no tokenizer" else UNSEEN[:3]), "\u200bbank"]
    rows = replace(found, **one_row_for_each(texts))
    model = {"packaged": embedder, "static": static_embedder(), "of no tokenizer": WithoutTokenizer()}[kind]
    assert visible_rows(rows, model).tolist() == [True, *[False] * (len(texts) - 2), True]
    for mode in ("sentence",) if kind == "static" else ("sentence", "contextual") if kind == "packaged" else ():
        made = embed_visible(rows, model, mode=mode)
        assert made.texts == (texts[0], texts[-1]) and torch.isfinite(made.embeddings).all()
    assert embed_visible(rows.select(range(1, len(texts) - 1)), model) is None


class WithoutTokenizer:
    """A sentence model of the user's own."""

    def encode(self, texts, **options):
        raise AssertionError("nothing was to be embedded")


def one_row_for_each(texts):
    n = len(texts)
    return {
        "texts": tuple(texts), "token_ids": torch.full((n, 1), 3), "lengths": torch.ones(n, dtype=torch.int64),
        "log_probs": torch.full((n, 1), -1.0), "weights": torch.full((n,), 1 / n, dtype=torch.float64),
    }  # fmt: skip


def test_a_chat_prompt_is_read_without_its_template(embedder):
    model = make_model("llama", "HookedSAETransformer")
    chat = score_continuations(model, "Which bank?", [" A river's."], chat_template=True)
    plain = replace(chat, prompt="Which bank?\n", prefix="Which bank?\n")
    torch.testing.assert_close(
        embed_continuations(chat, embedder).embeddings, embed_continuations(plain, embedder).embeddings
    )
