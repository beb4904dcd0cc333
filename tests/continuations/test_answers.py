"""Answers behind a marker or at a span: what is theirs is attributed, embedded and measured, and nothing else."""

from dataclasses import replace

import pytest
import torch

import saelens_ext.continuations.attribution.attribute as attribute_module
from saelens_ext.continuations.answers import mark_answers
from saelens_ext.continuations.attribution.attribute import attribute_continuations, attribution_completeness
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.embed import embed_continuations, visible_rows
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.continuations.steering.steer import steer_continuations
from saelens_ext.host import prompt_passes
from saelens_ext.host.continued_text import text_after
from tests.continuations._dictionaries import make
from tests.models_zoo import make_model

PREFIX = "The assert statement"
TEXTS = [" it is = a test of it", " x = one", " of one is = assertions", " so = 5 = the most"]
ANSWERS = (" a test of it", " one", " assertions", " the most")
MANY = {"max_sources": 10**6, "verify": False}


@pytest.fixture(scope="module")
def setting():
    model = make_model("llama", "SAETransformerBridge")
    dictionary = make("standard", "blocks.1.mlp.hook_out", model.cfg.d_model, d_sae=32)
    return model, dictionary, score_continuations(model, PREFIX, TEXTS)


def logits_of_tokens(model, found, row):
    """The demeaned logit and the log-probability of every token of a continuation."""
    ids, start = [*found.prefix_ids, *found.ids_of(row)], len(found.prefix_ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    demeaned = [logits[t - 1, ids[t]] - logits[t - 1].mean() for t in range(start, len(ids))]
    return torch.stack(demeaned), torch.stack([logits[t - 1].log_softmax(-1)[ids[t]] for t in range(start, len(ids))])


def test_where_answers_are(setting, tmp_path):
    model, _, found = setting
    marked = mark_answers(model, found, after=" =")
    assert marked.answers == ANSWERS and marked.texts == found.texts and found.answers == found.texts
    for row in range(len(marked)):
        inside = marked.answer_mask[row, : marked.lengths[row]].tolist()
        first = inside.index(True)
        assert all(inside[first:])
        before, with_first = (text_after(model, found.prefix_ids, found.ids_of(row)[:n]) for n in (first, first + 1))
        assert before.rstrip().endswith("=") and not with_first.rstrip().endswith("=")
    again = ContinuationSet.load(marked.select([3, 0]).save(tmp_path))
    assert again.answers == (ANSWERS[3], ANSWERS[0])
    assert torch.equal(again.answer_mask, marked.answer_mask[[3, 0]])


def test_the_marker_may_be_a_token_without_text(setting):
    model, _, found = setting
    ids = [[*found.ids_of(0)[:3], 2, *found.ids_of(1)], found.ids_of(2)]
    marked = mark_answers(model, score_continuations(model, PREFIX, ids), after="<pad>", missing="exclude")
    start = int(marked.columns["answer_start"][0])
    assert len(marked) == 1 and not model.tokenizer.decode(ids[0][4:start]).strip()
    assert start in (4, 5) and model.tokenizer.decode(ids[0][start]).strip()
    assert marked.answers[0] == TEXTS[1]


@pytest.mark.parametrize("span", [(0, 2), (1, None), (-2, None), (0, -1)])
def test_spans(setting, span):
    model, _, found = setting
    marked = mark_answers(model, found, span=span, missing="exclude")
    for row in range(len(marked)):
        ids = marked.ids_of(row)
        inside = [token for token, yes in zip(ids, marked.answer_mask[row].tolist()) if yes]
        assert inside == ids[slice(*span)] and model.tokenizer.decode(inside) == marked.answers[row]


def test_answers_that_are_missing(setting, caplog):
    model, _, found = setting
    given = score_continuations(model, PREFIX, [*TEXTS, " is so", " so ="])
    with pytest.raises(ValueError, match="2 of 6 continuations have no text behind ' ='.* such as ' is so'.*exclude"):
        mark_answers(model, given, after=" =")
    assert mark_answers(model, given, after=" =", missing="exclude").answers == ANSWERS
    assert "2 of 6 continuations" in caplog.text and "left out" in caplog.text
    with pytest.raises(ValueError, match="4 of 4 .* cut off before. Is 'nowhere' what the model writes\\?$"):
        mark_answers(model, found, after="nowhere", missing="exclude")
    with pytest.raises(ValueError, match=r"no text at the tokens \(50, 60\).* Give other tokens.$"):
        mark_answers(model, found, span=(50, 60), missing="exclude")
    for wrong in ({}, {"after": " =", "span": (0, 1)}):
        with pytest.raises(ValueError, match="either after, a text, or span"):
            mark_answers(model, found, **wrong)
    with pytest.raises(ValueError, match="missing must be one of"):
        mark_answers(model, found, after=" =", missing="drop")


@pytest.mark.parametrize("backend", ["linear", "gradient", "relp"])
def test_parts_add_up_to_the_whole(setting, backend):
    model, dictionary, found = setting
    whole, first, rest = (
        attribute_continuations(model, dictionary, one, target="sum", backend=backend, **MANY)
        for one in (found, *(mark_answers(model, found, span=span) for span in ((0, 2), (2, None))))
    )
    assert whole.sources.keys == first.sources.keys
    torch.testing.assert_close(first.signatures + rest.signatures, whole.signatures, rtol=1e-4, atol=1e-5)
    assert float(first.signatures.abs().max()) > 1e-3


def test_the_target_is_the_answers(setting):
    model, dictionary, found = setting
    marked = mark_answers(model, found, after=" =")
    for target in ("mean", "first"):
        attributed = attribute_continuations(model, dictionary, marked, target=target, batch_size=3)
        for row in range(len(marked)):
            own = logits_of_tokens(model, marked, row)[0][marked.answer_mask[row, : marked.lengths[row]]]
            expected = own.mean() if target == "mean" else own[0]
            assert float(attributed.columns["target"][row]) == pytest.approx(float(expected), abs=1e-4)
    gap = attribution_completeness(model, dictionary, marked).relative_gap
    assert float(gap.max()) < 1e-3 and attributed.answers == ANSWERS


def test_steering_is_measured_on_the_answers(setting):
    model, dictionary, found = setting
    marked = attribute_continuations(model, dictionary, mark_answers(model, found, after=" ="), backend="gradient")
    direction = marked.signatures[:2].mean(dim=0) - marked.signatures[2:].mean(dim=0)
    measured = steer_continuations(model, dictionary, marked, direction, strengths=(0.0, 1.0))
    for row in range(len(marked)):
        demeaned, log_probs = (
            one[marked.answer_mask[row, : marked.lengths[row]]] for one in logits_of_tokens(model, marked, row)
        )
        assert float(measured.baseline["demeaned_logit"][row]) == pytest.approx(float(demeaned.mean()), abs=1e-4)
        assert float(measured.baseline["log_prob"][row]) == pytest.approx(float(log_probs.sum()), abs=1e-4)


def test_answers_are_embedded_alone(setting):
    model, _, found = setting
    marked = mark_answers(model, found, after=" =")
    alone = replace(found, texts=ANSWERS)
    for mode in ("contextual", "sentence"):
        pairs = (embed_continuations(one, mode=mode).embeddings for one in (marked, alone))
        torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-6)
    assert bool(visible_rows(marked).all())


@pytest.mark.parametrize("n", [6, 24])
def test_the_largest_pass_does_not_depend_on_the_number_of_continuations(setting, n, monkeypatch):
    model, dictionary, found = setting
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 18, (n,), generator=generator).tolist()
    rows = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]
    expected = score_continuations(model, PREFIX, rows)
    alone = attribute_continuations(model, dictionary, expected, batch_size=1, **MANY)
    sizes = []

    def seen(module, inputs, output):
        sizes.append(output.shape[:2].numel())

    monkeypatch.setattr(prompt_passes, "_MAX_BATCH_TOKENS", 70)
    handle = model.original_model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: seen(module, inputs, output[0] if isinstance(output, tuple) else output)
    )
    try:
        again = score_continuations(model, PREFIX, rows, batch_size=100)
        few = attribute_continuations(model, dictionary, expected, batch_size=100, **MANY)
    finally:
        handle.remove()
    assert 35 < max(sizes) <= 70 and len(sizes) >= n / 3
    torch.testing.assert_close(again.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(few.signatures, alone.signatures, rtol=1e-4, atol=1e-5)
    assert attribute_module.length_batches([5, 90, 7, 3], 2) == [[1], [2, 0], [3]]
