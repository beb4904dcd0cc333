"""Prompts and answers from a log of Inspect (inspect.aisi.org.uk): ``.eval``, or ``.json``.

The formats are read here, since Inspect itself pins other versions of what the hosts need: both are JSON with one
object for each sample and epoch, which the first has in the members ``samples/*.json`` of a zip file.
"""

import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from saelens_ext import _checks, _files
from saelens_ext.host.chat_template import Prompt, checked_messages, in_words

logger = logging.getLogger(__name__)

LOG_SUFFIXES = (".eval", ".json")
_ATTACHED = "attachment://"


def read_inspect_log(path: Path, samples: Sequence[str | int] | None) -> tuple[list[Prompt], dict[str, list[str]]]:
    """The conversations of a log up to the last answer, and for each, in words, the answers of its epochs in order.

    Epochs whose conversations differ before the last answer, as those of an agent do, are prompts of their own. Samples
    that failed or whose answer is empty are left out, with a logged warning.

    Raises:
        ValueError: not such a log, or one without samples; a sample that is not there, has no prompt or calls tools.
    """
    prompts: dict[str, Prompt] = {}
    found: dict[str, list[str]] = {}
    wanted = None if samples is None else set(map(str, _checks.listed(samples, "samples", "id")))
    seen, left_out = set(), 0
    present = list(_samples(path))
    if not all(isinstance(one, dict) for one in present):
        raise ValueError(f"{path} has samples that are no objects; it is no log of Inspect.")
    for sample in sorted(present, key=lambda one: (str(one.get("id")), one.get("epoch") or 0)):
        name = str(sample.get("id"))
        seen.add(name)
        if wanted is not None and name not in wanted:
            continue
        prompt, answer = _parted(sample, f"Sample {name!r} of {path.name}")
        if not answer.strip():
            left_out += 1
            continue
        words = in_words(prompt)
        prompts[words] = prompt
        found.setdefault(words, []).append(answer)
    if missing := (wanted or set()) - seen:
        have = ", ".join(sorted(seen)[:20])
        raise ValueError(f"{path} has no sample {', '.join(sorted(missing))}; it has {have}.")
    if left_out:
        logger.warning("%d samples of %s have no answer and are left out.", left_out, path.name)
    if not found:
        raise ValueError(f"{path} holds no answer; it may be of a run that failed, or without its samples.")
    return list(prompts.values()), found


def _samples(path: Path) -> Iterator[Any]:
    if path.suffix != ".eval":
        yield from _files.read_json(path, keys=["eval"]).get("samples") or ()
        return
    try:
        with ZipFile(path) as archive:
            for name in archive.namelist():
                if name.startswith("samples/") and name.endswith(".json"):
                    yield json.loads(_content(archive, name))
    except (BadZipFile, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole log of Inspect ({error}).") from error


def _content(archive: ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except NotImplementedError:  # Zstandard, which zipfile reads from Python 3.14 on
        try:
            importlib.import_module("zipfile_zstd")  # which teaches zipfile to
        except ImportError as error:
            raise ImportError(
                "This log is compressed with Zstandard: pip install 'saelens-ext[inspect]', or convert it with "
                "inspect log convert --to json."
            ) from error
        return archive.read(name)


def _parted(sample: Mapping[str, Any], name: str) -> tuple[Prompt, str]:
    """A sample's conversation up to the last answer, and that; an empty one where the model gave none."""
    messages = sample.get("messages") or []
    attached = sample.get("attachments") or {}
    if not isinstance(messages, list) or not all(isinstance(one, Mapping) for one in messages):
        raise ValueError(f"{name} has messages that are no list of objects; it is no log of Inspect.")
    if not messages or sample.get("error"):
        if not messages and not sample.get("error"):
            raise ValueError(f"{name} has no messages: the log was written without the prompt.")
        return "", ""
    *before, last = messages
    if last.get("role") != "assistant":
        return "", ""
    if any(one.get("role") == "tool" or one.get("tool_calls") for one in messages):
        raise ValueError(f"{name} calls tools, whose messages chat templates write in ways of their own; leave it out.")
    if not before:
        raise ValueError(f"{name} has an answer and no message before it: the log was written without the prompt.")
    talk = [{"role": one.get("role"), "content": _text(one, attached, name)} for one in before]
    return checked_messages(talk, name), _text(last, attached, name)


def _text(message: Mapping[str, Any], attached: Mapping[str, str], name: str) -> str:
    """What a message says, its reasoning between the marks that most models write."""
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    said = []
    for part in parts:
        kind = part.get("type")
        if kind == "reasoning" and not part.get("redacted"):
            said.append(f"<think>\n{_resolved(part.get('reasoning'), attached)}\n</think>\n\n")
        elif kind == "text":
            said.append(_resolved(part.get("text"), attached))
        elif kind == "reasoning":
            raise ValueError(f"{name} has reasoning that its provider redacted, without which its answer is no whole.")
        else:
            raise ValueError(f"{name} has a message with a part of the kind {kind!r}; only text can be continued.")
    return "".join(said)


def _resolved(text: Any, attached: Mapping[str, str]) -> str:
    text = str(text or "")
    return attached.get(text.removeprefix(_ATTACHED), text) if text.startswith(_ATTACHED) else text
