"""A mode's label says what its continuations have in common, and is scored on those that did not make it."""

import numpy as np
import pytest

from saelens_ext.continuations.mode_labels import label_modes

PLACES = ["Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito", "Paris", "Berne", "Accra"]
SADNESS = [
    f" because his dog {verb} on the {day}" for verb in ("died", "vanished") for day in ["one", "two", "three", "four"]
]
TRAVEL = [f" He flew to {place} on a cheap ticket" for place in PLACES[:8]]


def planted(*groups, equal=True):
    texts = [text for group in groups for text in group]
    modes = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    weights = np.ones(len(texts)) if equal else np.linspace(1, 2, len(texts))
    return texts, modes, weights / weights.sum()


@pytest.mark.parametrize("equal", [True, False])
def test_labels_name_how_modes_open_and_what_they_say(equal):
    sad, travel = label_modes(*planted(SADNESS, TRAVEL, equal=equal))
    assert sad.text.startswith("because … ") and "dog" in sad.text
    assert travel.text.startswith("He … ") and {"flew", "ticket"} <= set(travel.text.replace(",", "").split())
    assert "dog" not in travel.text and "Rome" not in travel.text  # what one text alone has describes no other
    for label in (sad, travel):
        assert label.auroc == 1 and label.distinguishes and label.low < 1 and label.n_members == label.n_others == 4


def test_answers_of_one_word_that_are_stop_words_are_labels():
    texts = [
        f" {word}{mark}" for word in ("No", "Yes") for mark in (".", "!", ", never", ", sir", ", indeed", ", I am")
    ]
    no, yes = label_modes(texts, np.repeat([0, 1], 6), np.ones(12) / 12)
    assert (no.text, yes.text) == ("No", "Yes")


@pytest.mark.slow
def test_labels_of_modes_that_do_not_differ_are_not_distinguishable_from_chance():
    generator = np.random.default_rng(0)
    words = [f"word{n}" for n in range(12)]
    passed = total = 0
    for seed in range(60):
        texts = [" ".join(generator.permutation(words)[:4]) for _ in range(40)]
        labels = label_modes(texts, np.arange(40) % 2, np.ones(40), seed=seed)
        passed += sum(label.distinguishes for label in labels)
        total += sum(not np.isnan(label.auroc) for label in labels)
    assert total > 60 and passed <= 0.1 * total


def test_what_a_single_continuation_says_is_no_label():
    texts = [f"the {word}{n} thing" for word in ("left", "right") for n in range(10)]
    for label in label_modes(texts, np.repeat([0, 1], 10), np.ones(20)):
        assert label.text == "" and np.isnan(label.auroc) and label.score_text == "no label"


def test_one_mode_or_one_member_leaves_nothing_to_compare_or_score():
    (only,) = label_modes(SADNESS, np.zeros(8, dtype=int), np.ones(8))
    assert only.text == "" and np.isnan(only.auroc)
    alone, rest = label_modes([" Zanzibar calls", *SADNESS], np.array([0] + [1] * 8), np.ones(9))
    assert "Zanzibar" in alone.text and alone.score_text.startswith("not scored") and not alone.distinguishes
    assert np.isnan(alone.low) and np.isnan(rest.auroc)  # no other mode has one left to score against


def test_texts_without_words_and_hostile_ones_are_labelled():
    hostile = [f"</script>\u202e<b>{n}</b> !!" for n in range(6)]
    empty = ["", " ", "\n", "???", "...", "\x00"]
    first, second = label_modes([*hostile, *empty], np.repeat([0, 1], 6), np.ones(12))
    assert "<" in first.text and "\u202e" not in first.text and "\n" not in second.text


def test_the_same_seed_gives_the_same_labels_in_any_order_of_calls():
    given = planted(SADNESS, TRAVEL)
    assert label_modes(*given, seed=3) == label_modes(*given, seed=3)
