"""Concepts are read strictly, and packaged ones are what they say."""

import importlib.util
import json

import pytest

from saelens_ext.evals.concepts_data import (
    DEFAULT_CONCEPTS,
    Concept,
    normal_form,
    packaged_concepts,
    packaged_texts,
    read_concepts,
)

CAT = {"name": "cat", "positives": ["A cat sat.", "The cat ate."], "negatives": ["A dog ran.", "The sea."]}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_concepts_are_read_from_lines(tmp_path):
    dog = CAT | {"name": "dog", "hard_negatives": ["A hot dog."], "description": "dogs"}
    one, other = read_concepts(write(tmp_path / "c.jsonl", CAT, "", dog))
    assert one == Concept(name="cat", positives=tuple(CAT["positives"]), negatives=tuple(CAT["negatives"]))
    assert (other.hard_negatives, other.description) == (("A hot dog.",), "dogs")


BAD_LINES = {
    "no_object": (["[1]"], "Line 1.*expected an object.*got list"),
    "no_json": ([CAT, "{"], "Line 2 of .*c.jsonl"),
    "misspelt": ([CAT | {"positive": []}], "Line 1.*'positive'. Did you mean 'positives'"),
    "lacking": ([{"name": "cat", "positives": ["A cat."]}], "lacks negatives"),
    "twice": ([CAT, CAT], "the name 'cat' 2 times"),
    "nothing": ([""], "no concept; give at least one"),
    "empty_side": ([CAT | {"negatives": []}], "negatives of the concept 'cat' is empty"),
    "one_text": ([CAT | {"positives": "A cat."}], "positives of the concept 'cat' must be a list.*'A cat.'"),
    "no_text": ([CAT | {"positives": [3]}], r"positives of the concept 'cat'\[0\] must be a text, got 3"),
    "shared": (
        [CAT | {"negatives": ["Rain.", " a CAT sat. "]}],
        "1 sentences both.*'A cat sat.'.*one side",
    ),
    "shared_hard": ([CAT | {"hard_negatives": ["the cat ate."]}], "for example 'The cat ate.'"),
}


def test_a_text_may_hold_what_unicode_calls_a_line_separator(tmp_path):
    text = "one\u2028two\u0085three"
    (tmp_path / "c.jsonl").write_text(json.dumps(CAT | {"positives": [text]}, ensure_ascii=False), encoding="utf-8")
    (one,) = read_concepts(tmp_path / "c.jsonl")
    assert one.positives == (text,)


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_concept_is_named(tmp_path, name):
    lines, message = BAD_LINES[name]
    with pytest.raises(ValueError, match=message):
        read_concepts(write(tmp_path / "c.jsonl", *lines))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_concepts(tmp_path / "none.jsonl")


@pytest.fixture(scope="module")
def packaged():
    return packaged_concepts()


def test_the_packaged_concepts_are_24_balanced_ones(packaged):
    assert len(packaged) == 24 == len({concept.name for concept in packaged})
    for concept in packaged:
        assert len(concept.positives) == len(concept.negatives) == 100 and concept.description
        sentences = [*concept.positives, *concept.negatives]
        assert len({normal_form(sentence) for sentence in sentences}) == 200
        assert all(4 <= len(sentence.split()) <= 60 for sentence in sentences)
    names = {concept.name: concept for concept in packaged}
    assert all("trump" in sentence.lower() for sentence in names["headline_istrump"].positives)
    assert not any("trump" in sentence.lower() for sentence in names["headline_istrump"].negatives)
    assert sum("credit card" in sentence.lower()[-20:] for sentence in names["credit-card"].positives) > 90
    assert not any(sentence.lower().endswith("credit card") for sentence in names["credit-card"].negatives)
    assert sum("how often" in sentence.lower() for sentence in names["temp_cat_Frequency"].positives) > 30


def test_no_two_concepts_share_sentences_much(packaged):
    owners: dict[str, int] = {}
    for concept in packaged:
        for sentence in {*concept.positives, *concept.negatives}:
            owners[normal_form(sentence)] = owners.get(normal_form(sentence), 0) + 1
    assert sum(count > 1 for count in owners.values()) < 0.05 * len(owners)


def test_the_draw_depends_on_the_seed_only(packaged):
    name = next(iter(DEFAULT_CONCEPTS))
    (again,), (other,) = packaged_concepts([name]), packaged_concepts([name], seed=1)
    assert again == packaged[0] and set(other.positives) != set(again.positives)
    (few,) = packaged_concepts(["92_glue_sst2"], n_per_side=5, words=(10, 12))
    assert len(few.positives) == 5 and all(10 <= len(s.split()) <= 12 for s in few.positives + few.negatives)


def test_texts_of_any_set_whatever_its_labels():
    sums = packaged_texts("40_arith_rpn", n=30)
    assert len(set(sums)) == 30 == len(sums) and all(len(text.split()) == 5 for text in sums)
    assert packaged_texts("40_arith_rpn", n=30) == sums != packaged_texts("40_arith_rpn", n=30, seed=1)
    short = packaged_texts("102_twt_emotion", n=10**6, words=(1, 3))
    assert 20 < len(short) < 5000 and max(len(text.split()) for text in short) == 3
    with pytest.raises(ValueError, match="name must be one of .*got '40_arith'"):
        packaged_texts("40_arith")
    with pytest.raises(ValueError, match="n must be a whole number of at least 1, got 0"):
        packaged_texts("40_arith_rpn", n=0)


def test_what_is_refused_of_packaged_concepts(monkeypatch):
    with pytest.raises(ValueError, match=r"names\[1\] must be one of.*'96_spam'.*Did you mean '96_spam_is'"):
        packaged_concepts(["105_click_bait", "96_spam"], n_per_side=3)
    with pytest.raises(ValueError, match="7 in all; a concept needs a set of two labels"):
        packaged_concepts(["103_it_tick"])
    with pytest.raises(ValueError, match="fewer than n_per_side=5000. Lower n_per_side or widen words"):
        packaged_concepts(["96_spam_is"], n_per_side=5000)
    with pytest.raises(ValueError, match="names is empty"):
        packaged_concepts([])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ImportError, match="pip install --no-deps sae-probes==0.4.2"):
        packaged_concepts()
