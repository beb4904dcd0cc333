"""Sampled and given continuations: the same whatever the batch, and as likely as the model says."""

import pytest
import torch

from saelens_ext.continuations.sample import sample_continuations, score_continuations
from saelens_ext.host.hook_edits import hooked
from saelens_ext.steering.sampling import SamplingOptions, _choose, _choose_among
from tests.models_zoo import MODEL_CLASSES, N_CTX, make_model

PREFIX = "The assert statement"


@pytest.fixture(scope="module", params=MODEL_CLASSES)
def model(request):
    return make_model("llama", request.param)


def true_log_probs(model, found, row):
    ids = [*found.prefix_ids, *found.ids_of(row)]
    with torch.no_grad():
        scores = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    start = len(found.prefix_ids)
    return [float(scores[t - 1, ids[t]]) for t in range(start, len(ids))]


def test_the_batch_size_does_not_show(model):
    sets = [sample_continuations(model, PREFIX, 9, max_new_tokens=5, seed=3, batch_size=b) for b in (1, 4, 32)]
    assert sets[0].texts == sets[1].texts == sets[2].texts
    assert torch.equal(sets[0].token_ids, sets[2].token_ids)
    assert sets[0].metadata["sampling"]["n_draws"] == sets[2].metadata["sampling"]["n_draws"]
    other = sample_continuations(model, PREFIX, 9, max_new_tokens=5, seed=4)
    assert other.texts != sets[0].texts


def test_log_probs_are_those_of_the_whole_distribution(model):
    found = sample_continuations(model, PREFIX, 4, temperature=0.7, top_p=0.5, max_new_tokens=6)
    for row in range(len(found)):
        scores = found.log_probs[row, : int(found.lengths[row])].tolist()
        assert scores == pytest.approx(true_log_probs(model, found, row), abs=1e-4)
    given = score_continuations(model, PREFIX, [found.ids_of(row) for row in range(len(found))], batch_size=3)
    torch.testing.assert_close(given.log_probs, found.log_probs, rtol=1e-4, atol=1e-4)
    assert given.texts == found.texts and given.prefix_ids == found.prefix_ids


def test_texts_are_the_tokens_untrimmed(model):
    found = sample_continuations(model, PREFIX, 6, max_new_tokens=4, seed=1)
    tokenizer = model.tokenizer
    for row, text in enumerate(found.texts):
        assert tokenizer.decode([*found.prefix_ids, *found.ids_of(row)], skip_special_tokens=True) == PREFIX + text
    assert found.prefix_ids[0] == tokenizer.bos_token_id and found.prefix_ids.count(0) == 1


def test_duplicates_make_one_row_and_are_counted(model):
    narrow = {"temperature": 0.4, "top_p": 0.3, "max_new_tokens": 1, "seed": 0}
    every = sample_continuations(model, PREFIX, 30, deduplicate=False, **narrow)
    assert len(every) == 30 > len(set(every.texts))
    single = sample_continuations(model, PREFIX, 30, max_draws=30, weights="frequency", **narrow)
    assert list(single.texts) == list(dict.fromkeys(every.texts))
    assert single.columns["count"].tolist() == [every.texts.count(text) for text in single.texts]
    assert single.weights.tolist() == pytest.approx([every.texts.count(text) / 30 for text in single.texts])


class Favours:
    """A hook that makes a few tokens equally likely and all others impossible."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, x, hook):
        return torch.full_like(x, -1e4).index_fill(-1, torch.tensor(self.tokens), 0.0)


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        # Parts of characters, which all read as the replacement character.
        (["\u00c3", "\u00e2", "\u00f0"], {"\ufffd" * 3}),
        # One text, cut in two ways among others.
        (["h", "e", "he"], None),
        # Special tokens have no text.
        (["x", "<pad>"], {"xxx", "xx", "x"}),
    ],
)
def test_other_tokens_are_another_row_though_the_text_is_the_same(model, pieces, texts):
    allowed = model.tokenizer.convert_tokens_to_ids(pieces)
    assert None not in allowed
    draws = {"max_new_tokens": 3, "top_p": 1.0}
    with hooked(model, [("unembed.hook_out", Favours(allowed))]):
        every = sample_continuations(model, PREFIX, 200, deduplicate=False, **draws)
        found = sample_continuations(model, PREFIX, 200, max_draws=every.metadata["sampling"]["n_draws"], **draws)
    drawn = [tuple(every.ids_of(row)) for row in range(len(every))]
    assert [tuple(found.ids_of(row)) for row in range(len(found))] == list(dict.fromkeys(drawn))
    assert len(set(found.texts)) < len(found) and (texts is None or set(found.texts) == texts)
    assert found.columns["count"].tolist() == [drawn.count(ids) for ids in dict.fromkeys(drawn)]
    for row in range(len(found)):
        own = drawn.index(tuple(found.ids_of(row)))
        assert torch.equal(found.log_probs[row, : found.lengths[row]], every.log_probs[own, : every.lengths[own]])


def test_too_few_different_ones_is_said(model, caplog):
    found = sample_continuations(model, PREFIX, 5, temperature=0, max_new_tokens=3)
    assert len(found) == 1 and found.columns["count"].tolist() == [50]
    assert "1 different continuations of the 5" in caplog.text


def test_a_stop_text_ends_a_continuation_and_stays(model):
    free = sample_continuations(model, PREFIX, 12, max_new_tokens=8, seed=0, deduplicate=False)
    stopped = sample_continuations(model, PREFIX, 12, max_new_tokens=8, seed=0, deduplicate=False, stop="e")
    shorter = 0
    for long, short in zip(free.texts, stopped.texts, strict=True):
        assert long.startswith(short)
        if "e" in long:
            shorter += long != short
            assert "e" in short
    assert shorter and stopped.metadata["sampling"]["ended_by"]["stop"]


class Ends:
    """A hook that makes EOS certain from some step of the continuation on."""

    def __init__(self, after):
        self.after, self.step = after, 0

    def __call__(self, x, hook):
        self.step += 1
        if self.step > self.after:
            x = torch.full_like(x, -1e4)
            x[..., 1] = 0
        return x


def test_eos_is_neither_in_tokens_nor_in_text():
    model = make_model("llama", "SAETransformerBridge")
    model.add_hook("unembed.hook_out", Ends(2))
    found = sample_continuations(model, PREFIX, 1, max_new_tokens=6)
    assert found.lengths.tolist() == [2] and 1 not in found.ids_of(0)
    assert found.metadata["sampling"]["ended_by"] == {"eos": 1}
    with pytest.raises(ValueError, match="None of 10 draws has visible text"):
        sample_continuations(model, PREFIX, 1, max_new_tokens=6)


def test_a_chat_template_is_used_once_and_kept_apart_from_the_prompt(model):
    found = sample_continuations(model, "Why?", 2, max_new_tokens=3, chat_template=True)
    assert found.prompt == "Why?" and found.prefix == "<s>[user] Why?\n"
    assert found.prefix_ids.count(0) == 1, "the template has written BOS already"
    given = score_continuations(model, "Why?", [" x"], chat_template=True)
    assert given.prefix_ids == found.prefix_ids


def test_given_texts(model):
    found = score_continuations(model, PREFIX, [" is one", " x"], weights=[3, 1])
    assert found.texts == (" is one", " x") and found.weights.tolist() == [0.75, 0.25]
    assert found.ids_of(0) == model.tokenizer(" is one", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("continuations", "message"),
    [
        ([], "continuations is empty"),
        ([" a", ""], r"\[1\] are empty"),
        ([[5, 320]], "token id 320"),
        ([[5] * N_CTX], "context"),
    ],
)
def test_given_continuations_that_cannot_be_used(model, continuations, message):
    with pytest.raises(ValueError, match=message):
        score_continuations(model, PREFIX, continuations)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": N_CTX}, "context"),
        ({"weights": "even"}, "weights must be one of"),
        ({"stop": [""]}, "empty text"),
        ({"max_draws": 0}, "max_draws"),
    ],
)
def test_options_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        sample_continuations(model, PREFIX, **{"n": 2, **options})


@pytest.mark.parametrize(("temperature", "top_p"), [(1, 0.9), (1, 1), (0.7, 0.95), (2, 0.9), (1, 0.5)])
@pytest.mark.parametrize("spread", [1, 3, 6])
def test_a_short_list_chooses_what_the_whole_vocabulary_would(temperature, top_p, spread):
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(100, 3000, generator=generator)
    draws = torch.rand(100, generator=generator, dtype=torch.float64)
    options = SamplingOptions(temperature=temperature, top_p=top_p, top_k=None)
    assert torch.equal(_choose(logits, draws, options), _choose_among(logits, 3000, draws, options, None)[0])
    total = (logits.double() / temperature).logsumexp(dim=-1, keepdim=True)
    short, known = _choose_among(logits, 1024, draws, options, total)
    assert torch.equal(short[known], _choose(logits, draws, options)[known])
    assert bool(known.any()) or spread < 6
