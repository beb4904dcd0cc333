"""Continuations from logs of Inspect, in the shape that it writes them."""

import json
import zipfile

import pytest

from saelens_ext.continuations.audit_stages.questions import questions, read_continuations

SYSTEM, USER = {"role": "system", "content": "Be short."}, {"role": "user", "content": "6*7?"}
SKY = {"role": "user", "content": "Why is the sky blue?"}


def sample(name, epoch, before, answer, **more):
    last = {"role": "assistant", "content": answer, "source": "generate", "model": "m"}
    messages = [{**one, "id": f"{name}{epoch}", "source": "input"} for one in before]
    return {"id": name, "epoch": epoch, "input": before, "messages": [*messages, last], "error": None, **more}


SAMPLES = [
    sample("sky", 2, [SKY], " It is not."),
    sample(7, 1, [SYSTEM, USER], "42"),
    sample("sky", 1, [SKY], "Scattering."),
    sample(7, 2, [SYSTEM, USER], "forty-two"),
    sample("sky", 3, [SKY], ""),
]


def written(path, samples, compression=zipfile.ZIP_DEFLATED):
    head = {"version": 2, "status": "success", "eval": {"model": "m"}}
    if path.suffix == ".json":
        path.write_text(json.dumps({**head, "samples": samples}))
        return path
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("header.json", json.dumps(head))
        archive.writestr("_journal/start.json", json.dumps(head))
        for one in samples:
            archive.writestr(f"samples/{one['id']}_epoch_{one['epoch']}.json", json.dumps(one))
        archive.writestr("summaries.json", "[]")
    return path


@pytest.mark.parametrize("name", ["log.eval", "log.json"])
def test_epochs_are_the_continuations_of_one_prompt(tmp_path, name, caplog):
    path = written(tmp_path / name, SAMPLES)
    prefixes, found = read_continuations(path)
    assert prefixes == [[SYSTEM, USER], [SKY]]
    assert list(found.values()) == [["42", "forty-two"], ["Scattering.", " It is not."]]
    assert "1 samples of log" in caplog.text
    prefixes, found = read_continuations(path, samples=["sky"])
    (question,) = questions(prefixes, found)
    assert question.prompt == [SKY] and question.given == ("Scattering.", " It is not.")
    assert [one.given for one in questions([[SKY], [SYSTEM, USER]], path)] == [question.given, ("42", "forty-two")]


def test_logs_compressed_with_zstandard(tmp_path):
    pytest.importorskip("zipfile_zstd", reason="zipfile-zstd is not installed")
    path = written(tmp_path / "log.eval", SAMPLES, compression=93)
    assert len(read_continuations(path)[0]) == 2


def test_zstandard_is_an_extra(tmp_path, monkeypatch):
    path = written(tmp_path / "log.eval", SAMPLES)

    def cannot(self, name):
        raise NotImplementedError

    monkeypatch.setattr(zipfile.ZipFile, "read", cannot)
    monkeypatch.setitem(__import__("sys").modules, "zipfile_zstd", None)
    with pytest.raises(ImportError, match=r"saelens-ext\[inspect\]"):
        read_continuations(path)


def test_reasoning_attachments_and_earlier_answers(tmp_path):
    parts = [{"type": "reasoning", "reasoning": "6 by 7"}, {"type": "text", "text": "attachment://a1"}]
    talk = [
        USER,
        {"role": "assistant", "content": "41"},
        {"role": "user", "content": [{"type": "text", "text": "No."}]},
    ]
    log = written(tmp_path / "log.json", [sample("a", 1, talk, parts, attachments={"a1": "It is 42."})])
    prefixes, found = read_continuations(log)
    assert prefixes == [[*talk[:2], {"role": "user", "content": "No."}]]
    assert list(found.values()) == [["<think>\n6 by 7\n</think>\n\nIt is 42."]]


@pytest.mark.parametrize(
    ("samples", "wanted", "message"),
    [
        (
            [sample("a", 1, [], "x")],
            None,
            "'a' of log.json has an answer and no message before it: .* without the prompt",
        ),
        ([{"id": "a", "epoch": 1, "output": {}}], None, "'a' of log.json has no messages: .* without the prompt"),
        ([], None, "holds no answer; .* without its samples"),
        (None, None, "holds no answer; .* without its samples"),
        ([sample("a", 1, [SKY], "")], None, "holds no answer"),
        ([sample("a", 1, [SKY], "x", error={"message": "oom"})], None, "holds no answer"),
        (SAMPLES, ["sky", "see"], "has no sample see; it has 7, sky"),
        ([sample("a", 1, [SKY, {"role": "tool", "content": "5"}], "x")], None, "calls tools"),
        ([sample("a", 1, [SKY], [{"type": "image", "image": "data:"}])], None, "a part of the kind 'image'"),
        (
            [sample("a", 1, [SKY], [{"type": "reasoning", "redacted": True}])],
            None,
            "reasoning that its provider redacted",
        ),
        (["a"], None, "has samples that are no objects"),
        (SAMPLES, "sky", "samples must be a list of at least one id, got 'sky'"),
        ([{"id": "a", "messages": "x"}], None, "no list of objects"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, samples, wanted, message):
    path = written(tmp_path / "log.json", samples)
    with pytest.raises(ValueError, match=message):
        read_continuations(path, samples=wanted)


def test_files_of_another_kind(tmp_path):
    (tmp_path / "a.eval").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"a.eval is not a whole log"):
        read_continuations(tmp_path / "a.eval")
    (tmp_path / "a.json").write_text('{"prompt": "a", "continuation": " x"}')
    with pytest.raises(ValueError, match="a.json lacks eval"):
        read_continuations(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "continuation": " x"}')
    with pytest.raises(ValueError, match="samples are those of a log of Inspect"):
        read_continuations(tmp_path / "a.jsonl", samples=["a"])
    with pytest.raises(FileNotFoundError):
        read_continuations(tmp_path / "b.eval")
