"""Calls of any OpenAI-compatible endpoint, with retries and a cache on disk."""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TypeVar

from saelens_ext import _checks, _files

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Question = TypeVar("Question")

_CACHE_FORMAT = 1
KEY_VARIABLE = "OPENAI_API_KEY"
_INVISIBLE = re.compile(r"<[^<>]*>|\s")
_ROLES = 20
"""Characters that names of roles may take before what was asked."""


class EndpointUnavailableError(RuntimeError):
    """The endpoint refused, failed or did not answer, however often it was asked."""


@dataclass(eq=False)
class Endpoint:
    """Makes calls and keeps their answers.

    Calls that meet a 429, a 5xx, a broken connection or a timeout are made again after waits that double from half a
    second to eight, with jitter, or that the server names. Answers that can be used are kept in ``cache_directory``
    under the SHA-256 of the request, each written whole or not at all; so after an interruption the same call goes on
    from there, and costs nothing the second time.

    Raises:
        ImportError: the openai client is not installed.
        ValueError: no key, or a number out of range.
    """

    base_url: str
    """The endpoint up to and without ``/chat/completions``, for example ``http://localhost:8000/v1``."""
    model: str
    """The name of the model at the endpoint."""
    api_key: str | None = None
    """By default the environment variable ``OPENAI_API_KEY``. It is not written anywhere."""
    _: KW_ONLY
    cache_directory: str | Path | None = None
    """Where answers are kept; None keeps none."""
    timeout: float | int = 60.0
    """Seconds to wait for one answer."""
    max_retries: int = 5
    """How often a failed call is made again."""
    max_concurrency: int = 4
    """Calls at a time."""
    role: str = "judge"
    """What errors call it."""
    advice: str = ""
    """What else errors say may help."""
    error: type[EndpointUnavailableError] = EndpointUnavailableError
    """Raised where there is no answer."""

    def __post_init__(self) -> None:
        check_calls(self.timeout, self.max_retries, self.max_concurrency)
        if self.cache_directory is not None:
            self.cache_directory = Path(self.cache_directory)
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"The {self.role} needs the openai client: pip install 'saelens-ext[judge]'") from error
        key = self.api_key or os.environ.get(KEY_VARIABLE)
        if not key:
            raise ValueError(
                f"The {self.role} has no API key. Set the environment variable OPENAI_API_KEY or pass api_key=; for a "
                "server of your own that asks for none, any text will do, api_key='none' for example."
            )
        self.api_key = None
        # What is no JSON is either not read, or an answer whose parts are not found.
        self._failures = (openai.APIError, json.JSONDecodeError)
        self._client = openai.OpenAI(
            base_url=self.base_url, api_key=key, timeout=float(self.timeout), max_retries=self.max_retries
        )

    def map(self, ask: Callable[[Question], Answer], questions: Iterable[Question]) -> list[Answer]:
        """``ask`` of every question, ``max_concurrency`` at a time, in order; after an error nothing more is asked."""
        errors: list[Exception] = []

        def ask_unless_failed(question: Question) -> Answer:
            if errors:
                raise errors[0]
            try:
                return ask(question)
            except Exception as error:
                errors.append(error)
                raise

        with ThreadPoolExecutor(self.max_concurrency) as pool:
            return list(pool.map(ask_unless_failed, questions))

    def close(self) -> None:
        """Close the connections that are kept open."""
        self._client.close()

    def answered(
        self, request: Mapping[str, Any], call: Callable[[Any, Mapping[str, Any]], Answer], usable: Callable[[Any], Any]
    ) -> Answer:
        """The answer to a request, from the cache where it is there.

        Args:
            request: what is asked, JSON-safe.
            call: makes the call with a client, and reads a JSON-safe answer from the reply.
            usable: whether an answer is kept: another day may bring a better one.

        Raises:
            EndpointUnavailableError: the endpoint refused, failed or did not answer.
        """
        path = self._cache_path(request)
        cached = None if path is None else _cached_answer(path)
        if cached is not None:
            return cached
        try:
            answer = call(self._client, request)
        except self._failures as error:
            raise self.error(f"{self.without_answer(f'{type(error).__name__}: {error}')}") from error
        if path is not None and usable(answer):
            _files.write_json(path, {"format_version": _CACHE_FORMAT, "request": request, "answer": answer})
        return answer

    def without_answer(self, why: str) -> str:
        """What is said when there is no answer."""
        where = "none is kept, since no cache_directory was given"
        if self.cache_directory is not None:
            where = f"those are in {self.cache_directory}, and the same call goes on from there"
        return (
            f"The {self.role} {self.model} at {self.base_url} gave no answer ({why}). Check the address, the key "
            f"({KEY_VARIABLE}) and the name of the model, or raise timeout and max_retries.{self.advice} Of the "
            f"answers so far, {where}."
        )

    def _cache_path(self, request: Mapping[str, Any]) -> Path | None:
        if self.cache_directory is None:
            return None
        text = json.dumps([self.base_url, request], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        return Path(self.cache_directory) / key[:2] / f"{key}.json"


def gives_back(text: str, *asked: str) -> bool:
    """Whether a text begins with all that was asked, in order, as servers write it that put it before an answer.

    Tags, white space and a role's name or two before each part do not count.
    """
    rest = _INVISIBLE.sub("", text)
    for part in asked:
        part = _INVISIBLE.sub("", part)
        place = rest.find(part, 0, len(part) + _ROLES)
        if not part or place < 0:
            return False
        rest = rest[place + len(part) :]
    return True


def check_calls(timeout: float | int, max_retries: int, max_concurrency: int) -> None:
    """Raise ValueError for a number out of range."""
    _checks.between(timeout, 0, math.inf, "timeout")
    if max_retries < 0:
        raise ValueError(f"max_retries must be at least 0, got {max_retries!r}.")
    _checks.positive(max_concurrency, "max_concurrency")


def _cached_answer(path: Path) -> Any:
    try:
        return _files.read_json(path, _CACHE_FORMAT, ["answer"])["answer"]
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("A kept answer is not readable and is asked for again: %s", error)
        return None
