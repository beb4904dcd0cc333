"""Audits of continuations that were brought along: the same as of samples, from lists, mappings and files."""

import json
from itertools import product

import pandas as pd
import pytest
import torch

from saelens_ext.audit.audit import audit_continuations
from saelens_ext.continuations.answers import mark_answers
from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.audit_stages import stages as stages_module
from saelens_ext.continuations.audit_stages.questions import questions
from tests.audit.test_audit import OPTIONS, PREFIX
from tests.continuations._dictionaries import make
from tests.models_zoo import make_model

FEW = OPTIONS | {"validate": False}


@pytest.fixture(scope="module")
def setting():
    model = make_model("llama", "SAETransformerBridge")
    return model, [make("standard", "blocks.1.hook_out", model.cfg.d_model, d_sae=32)]


@pytest.fixture(scope="module")
def sampled(setting):
    return audit_continuations(setting[0], PREFIX, setting[1], **FEW).prefixes[0]


@pytest.mark.slow
def test_the_sampled_ids_give_the_audit_of_the_samples(setting, sampled, tmp_path, monkeypatch):
    monkeypatch.setattr(stages_module, "sample_continuations", None)
    rows = sampled.continuations
    ids = [rows.ids_of(row) for row in range(len(rows))]
    options = {"folder": tmp_path / "audit", **FEW}
    (found,) = audit_continuations(setting[0], PREFIX, setting[1], continuations=ids, **options).prefixes
    assert found.continuations.texts == rows.texts and torch.equal(found.continuations.token_ids, rows.token_ids)
    assert torch.allclose(found.continuations.signatures, rows.signatures, atol=1e-5)
    assert found.labels.tolist() == sampled.labels.tolist()
    lines = [{"prompt": PREFIX, "token_ids": one} for one in ids]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    log = {"continuations": tmp_path / "log.jsonl", **options}
    (again,) = audit_continuations(setting[0], PREFIX, setting[1], **log).prefixes
    pd.testing.assert_frame_equal(again.to_dataframe(), found.to_dataframe())
    with pytest.raises(ValueError, match="holds an audit with another continuations"):
        audit_continuations(setting[0], PREFIX, setting[1], continuations=ids[:-1], **options)


def test_equal_ones_are_one_with_their_count(setting):
    texts = [" is", " was", " is", " has", " is"]
    options = FEW | {"weights": "frequency"}
    (found,) = audit_continuations(setting[0], PREFIX, setting[1], continuations=texts, **options).prefixes
    rows = found.continuations
    assert rows.texts == (" is", " was", " has") and rows.columns["count"].tolist() == [3, 1, 1]
    assert rows.weights.tolist() == pytest.approx([0.6, 0.2, 0.2])


def test_two_continuations_are_enough_and_one_is_not(setting):
    (found,) = audit_continuations(setting[0], PREFIX, setting[1], continuations=[" is", " was"], **FEW).prefixes
    assert len(found.continuations) == 2
    with pytest.raises(ValueError, match="gave 1 continuation.* to cluster; .*at least two. Give more that differ"):
        audit_continuations(setting[0], PREFIX, setting[1], continuations=[" is", " is"], **FEW)
    with pytest.raises(ValueError, match="n must be at least 2"):
        audit_continuations(setting[0], PREFIX, setting[1], n=1)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"model": lambda: "gpt2"}, "model must be a HookedSAETransformer .* got 'gpt2': saelens_ext.load_model"),
        ({"model": lambda: None}, "model must be .* got a NoneType"),
        ({"dictionaries": lambda model: "folder"}, "dictionaries must be a SAE or trans.* got 'folder'. SAE.load_from"),
        ({"dictionaries": lambda model: ["folder"]}, "dictionaries must be a SAE .* got 'folder'"),
        ({"sampler": lambda: "http://localhost"}, "sampler must be an EndpointSampler.* got 'http://localhost"),
        ({"sampler": lambda: 5}, "sampler must be an EndpointSampler.* got 5"),
    ],
)
def test_what_is_no_subject_is_told_what_to_be(setting, replaced, message):
    given = {"model": setting[0], "dictionaries": setting[1]} | replaced
    with pytest.raises(ValueError, match=message):
        audit_continuations(prefixes=PREFIX, **given, **FEW)


def test_options_of_a_template_that_writes_nothing_are_refused(setting):
    with pytest.raises(ValueError, match="chat_template_options do nothing for texts; set chat_template=True"):
        audit_continuations(setting[0], PREFIX, setting[1], chat_template_options={"thinking": False}, **FEW)


@pytest.mark.slow
def test_the_answers_alone_are_audited(setting, caplog):
    words = ("is", "was", "has", "had", "can", "will")
    given = [f" so{' so' * (n % 3)} = {a} {b}" for n, (a, b) in enumerate(product(words, words[:3]))]
    options = FEW | {"answer_after": " ="}
    (found,) = audit_continuations(setting[0], PREFIX, setting[1], continuations=[*given, " so"], **options).prefixes
    rows = found.continuations
    assert len(rows) == len(given) and "1 of 19 continuations have no text behind ' ='" in caplog.text
    assert rows.answers == tuple(text.partition(" =")[2] for text in given)
    expected = attribute_continuations(setting[0], setting[1], mark_answers(setting[0], rows, after=" ="))
    assert torch.equal(expected.columns["target"], rows.columns["target"])


def test_whose_they_are(tmp_path):
    found = questions(["a", "b"], {"b": [" x"], "a": [[1, 2], " y"]})
    assert [(one.prompt, one.given) for one in found] == [("a", ((1, 2), " y")), ("b", (" x",))]
    assert len({one.digest for one in found}) == 2 and questions("a", None)[0].digest is None
    talk = [{"role": "user", "content": "Why?"}]
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"prompt": talk, "continuation": " So."}))
    path.write_text("\ufeff" + path.read_text())  # the mark that some editors put in front
    assert questions([talk], path)[0].given == questions([talk], str(path))[0].given == (" So.",)


@pytest.mark.parametrize(
    ("prefixes", "given", "message"),
    [
        (["a", "b"], [" x"], "continuations is one list, and there are 2 prefixes; give a mapping"),
        (["a", "b"], {"a": [" x"]}, "has none of the prefix 'b'"),
        ("a", {"a": [" x"], "c": [" x"]}, "of 'c', which is no prefix"),
        ("a", [], "continuations of 'a' is empty"),
        ("a", " so it is", "there is no file ' so it is'; continuations themselves are given as a list"),
    ],
)
def test_what_does_not_fit(prefixes, given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        questions(prefixes, given)


def test_files_without_a_line_or_in_another_encoding_are_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="log.jsonl is empty; a line is .*prompt"):
        questions("a", path)
    path.write_bytes('\n{"prompt": "a", "continuation": " é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="Line 2 of .*log.jsonl: 'utf-8' codec can't decode"):
        questions("a", path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"continuation": " x"}, r"Line 2 of .*got \['continuation'\]"),
        ({"prompt": "a"}, r"Line 2 of .*got \['prompt'\]"),
        ([1], r"Line 2 of .*got \[1\]"),
        ({"prompt": "a", "continuation": 5}, "Line 2 of .*continuation must be a text, got 5"),
        ({"prompt": "a", "token_ids": "x"}, "Line 2 of .*token_ids must be a list of whole numbers, got 'x'"),
        (
            {"prompt": "a", "token_ids": [1, "x"]},
            "Number 1 of the continuations of 'a' must be a text or a list of token ids, got",
        ),
        ({"prompt": [{"role": "user"}], "continuation": " x"}, "Line 2 of .*role and content alone"),
    ],
)
def test_a_log_without_its_prompts_is_named(line, message, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"prompt": "a", "continuation": " x"}) + "\n" + json.dumps(line))
    with pytest.raises(ValueError, match=message):
        questions("a", path)
