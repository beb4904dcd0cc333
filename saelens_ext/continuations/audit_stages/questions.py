"""What is asked of a model: prefixes, and for each the continuations that were brought along, if any were."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelens_ext import _checks, _files
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.audit_stages.inspect_log import LOG_SUFFIXES, read_inspect_log
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.sample import score_continuations, texts_or_ids
from saelens_ext.host.chat_template import Prompt, checked_messages, different_prompts, in_words
from saelens_ext.host.models import HostModel

Given = Sequence[str | Sequence[int]]
Continuations = Given | Mapping[str, Given] | Path
"""Of one prefix, of several by their texts, or a file of them."""
_KEYS = ({"prompt", "continuation"}, {"prompt", "token_ids"})
_LINE = '{"prompt": …, "continuation": …}, or has "token_ids" in place of "continuation"'


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prefix, and its continuations if they are not to be sampled."""

    prompt: Prompt
    given: tuple[str | tuple[int, ...], ...] | None = None

    @property
    def words(self) -> str:
        """The prefix as one text."""
        return in_words(self.prompt)

    @property
    def digest(self) -> str | None:
        """Of the continuations that were given."""
        return None if self.given is None else _files.short_name(self.given)

    def scored(self, model: HostModel, config: AuditConfig) -> ContinuationSet:
        """The continuations that were given; equal ones are one, with their ``count``."""
        template = {name: getattr(config, name) for name in ("chat_template", "chat_template_options")}
        counts = Counter(self.given)
        rows: Any = [one if isinstance(one, str) else list(one) for one in counts]
        scored = score_continuations(model, self.prompt, rows, **template, **config.per_pass)
        return scored.with_columns({"count": torch.tensor(list(counts.values()))}).with_weights(config.weights)


def questions(prefixes: Prompt | Sequence[Prompt], continuations: Continuations | str | None) -> list[Question]:
    """The questions that ``audit_continuations`` is given.

    Raises:
        ValueError: no prefix or one twice; continuations of another prefix, or a prefix without any; a line of a file
            that lacks its prompt or its continuation.
    """
    prompts = different_prompts(prefixes, "prefixes")
    if continuations is None:
        return [Question(prompt=prompt) for prompt in prompts]
    words = [in_words(prompt) for prompt in prompts]
    if isinstance(continuations, str | Path):
        if not Path(continuations).is_file():
            raise FileNotFoundError(
                f"continuations is a text, which names a file, and there is no file {str(continuations)!r:.200}; "
                "continuations themselves are given as a list."
            )
        found: Mapping[str, Any] = read_continuations(continuations)[1]
    elif isinstance(continuations, Mapping):
        found = continuations
    elif len(prompts) == 1:
        found = {words[0]: continuations}
    else:
        raise ValueError(
            f"continuations is one list, and there are {len(prompts)} prefixes; give a mapping from each prefix to its "
            "own, or a JSONL file."
        )
    unknown, without = [one for one in found if one not in words], [one for one in words if one not in found]
    if unknown or without:
        odd = f"of {unknown[0]!r:.200}, which is no prefix" if unknown else f"none of the prefix {without[0]!r:.200}"
        raise ValueError(f"continuations has {odd}; give those of exactly the prefixes that are audited.")
    return [
        Question(prompt=prompt, given=_checked(found[one], one)) for prompt, one in zip(prompts, words, strict=True)
    ]


def _checked(given: Any, prefix: str) -> tuple[str | tuple[int, ...], ...]:
    name = f"continuations of {prefix!r:.80}"
    return tuple(one if isinstance(one, str) else tuple(one) for one in texts_or_ids(given, name))


def read_continuations(
    path: str | Path, *, samples: Sequence[str | int] | None = None
) -> tuple[list[Prompt], dict[str, list[Any]]]:
    """Read prefixes and continuations of them for :func:`audit_continuations`.

    Args:
        path: a JSONL file of lines ``{"prompt": …, "continuation": …}`` (or ``"token_ids"``), where a prompt is a text
            or a conversation; or a log of Inspect (``.eval``, ``.json``), where the last answer of each sample and
            epoch continues the conversation before it. Reasoning that a log keeps apart is put back between
            ``<think>`` and ``</think>``.
        samples: ids of the samples of a log; all by default.

    Returns:
        The prefixes, and the continuations of each by its text; that of a conversation is its roles and what each says.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a log compressed with Zstandard, and zipfile-zstd is not installed.
        ValueError: another kind of file, or an empty one; a line that lacks its prompt or its continuation; a log
            without samples or prompts, with tools, or without a sample asked for.

    Examples:
        >>> prefixes, continuations = sx.read_continuations("log.eval", samples=["sky"])  # doctest: +SKIP
        >>> audit = sx.audit_continuations(
        ...     model, prefixes, dictionaries, continuations=continuations
        ... )  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix in LOG_SUFFIXES:
        return read_inspect_log(path, samples)
    if samples is not None:
        raise ValueError(f"samples are those of a log of Inspect ({', '.join(LOG_SUFFIXES)}), and {path} is none.")
    prompts: dict[str, Prompt] = {}
    found: dict[str, list[Any]] = {}
    for prompt, one in _files.read_json_lines(path, _entry):
        prompts[in_words(prompt)] = prompt
        found.setdefault(in_words(prompt), []).append(one)
    if not found:
        raise ValueError(f"{path} is empty; a line is {_LINE}.")
    return list(prompts.values()), found


def _entry(entry: Any) -> tuple[Prompt, Any]:
    """A prefix and a continuation of it, from the object in one line."""
    if not isinstance(entry, dict) or set(entry) not in _KEYS:
        given = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"a line is {_LINE}; got {given!r:.200}.")
    one = _checks.text(entry["continuation"], "continuation") if "continuation" in entry else entry["token_ids"]
    if "token_ids" in entry and not isinstance(one, list):
        raise ValueError(f"token_ids must be a list of whole numbers, got {one!r:.100}.")
    prompt = entry["prompt"]
    return prompt if isinstance(prompt, str) else checked_messages(prompt, "prompt"), one
