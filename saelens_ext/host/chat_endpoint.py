"""A language model behind any OpenAI-compatible chat endpoint, with retries and a cache on disk."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import TypedDict

from saelens_ext import _checks, _files

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Question = TypeVar("Question")

_CACHE_FORMAT = 1


class EndpointUnavailableError(RuntimeError):
    """The endpoint refused, failed or did not answer, however often it was asked."""


class EndpointOptions(TypedDict, total=False):
    """Fields of :class:`ChatEndpoint`, as keywords."""

    cache_directory: str | Path | None
    timeout: float | int
    max_retries: int
    max_attempts: int
    max_concurrency: int
    request_options: Mapping[str, Any] | None


@dataclass(eq=False)
class ChatEndpoint:
    """Asks a chat model questions whose answers have a form.

    Calls that meet a 429, a 5xx, a broken connection or a timeout are made again after waits that double from half a
    second to eight, with jitter, or that the server names. Answers in the form asked for are kept in
    ``cache_directory`` under the SHA-256 of the request, each written whole or not at all; so after an interruption
    the same call goes on from there, and costs nothing the second time.

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
    max_attempts: int = 3
    """How often an answer that has not the form asked for is asked for in all, at least 1."""
    max_concurrency: int = 4
    """Calls at a time."""
    request_options: Mapping[str, Any] | None = None
    """Further fields of a request. The default asks for the likeliest answer, of at most 200 tokens; give ``{}``, or
    the names that it knows, for an endpoint that refuses these.
    """
    role: str = "judge"
    """What errors call it."""
    error: type[EndpointUnavailableError] = EndpointUnavailableError
    """Raised where there is no answer."""

    def __post_init__(self) -> None:
        _checks.between(self.timeout, 0, math.inf, "timeout")
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be at least 0, got {self.max_retries!r}.")
        _checks.positive(self.max_attempts, "max_attempts")
        _checks.positive(self.max_concurrency, "max_concurrency")
        if self.cache_directory is not None:
            self.cache_directory = Path(self.cache_directory)
        if self.request_options is None:
            self.request_options = {"temperature": 0, "max_tokens": 200}
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"The {self.role} needs the openai client: pip install 'saelens-ext[judge]'") from error
        key = self.api_key or os.environ.get("OPENAI_API_KEY")
        if not key:
            raise ValueError(
                f"The {self.role} has no API key. Set the environment variable OPENAI_API_KEY or pass api_key=; for a "
                "server of your own that asks for none, any text will do, api_key='none' for example."
            )
        self.api_key = None
        self._failures = (openai.APIError, json.JSONDecodeError)
        self._client = openai.OpenAI(
            base_url=self.base_url, api_key=key, timeout=float(self.timeout), max_retries=self.max_retries
        )

    def map(self, ask: Callable[[Question], Answer], questions: Iterable[Question]) -> list[Answer]:
        """``ask`` of every question, ``max_concurrency`` at a time, in order."""
        with ThreadPoolExecutor(self.max_concurrency) as pool:
            return list(pool.map(ask, questions))

    def ask(self, task: str, material: str, read: Callable[[str], Answer | None], reminder: str) -> Answer | None:
        """The answer to one question; None when no attempt gave one that ``read`` can read.

        ``task`` is the system's message, ``material`` the user's, ``reminder`` what is said after a text that ``read``
        gives None for.

        Raises:
            EndpointUnavailableError: the endpoint refused, failed or did not answer.
        """
        messages = [{"role": "system", "content": task}, {"role": "user", "content": material}]
        for _ in range(self.max_attempts):
            text = self._answer({"model": self.model, "messages": messages, **(self.request_options or {})}, read)
            answer = read(text)
            if answer is not None:
                return answer
            # The same request would mostly give the same answer, so it is told what is missing.
            messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": reminder}]
        said = "The %s %s gave no answer in the form asked for in %d attempts; it counts as missing."
        logger.warning(said, self.role, self.model, self.max_attempts)
        return None

    def close(self) -> None:
        """Close the connections that are kept open."""
        self._client.close()

    def _answer(self, request: dict[str, Any], read: Callable[[str], Any]) -> str:
        """The text that answers a request, from the cache where it is there."""
        path = self._cache_path(request)
        cached = None if path is None else _cached_answer(path)
        if cached is not None:
            return cached
        answer = self._call(request)
        # Nonsense is not kept: another day may bring an answer.
        if path is not None and read(answer) is not None:
            _files.write_json(path, {"format_version": _CACHE_FORMAT, "request": request, "answer": answer})
        return answer

    def _cache_path(self, request: dict[str, Any]) -> Path | None:
        if self.cache_directory is None:
            return None
        text = json.dumps([self.base_url, request], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        return Path(self.cache_directory) / key[:2] / f"{key}.json"

    def _call(self, request: dict[str, Any]) -> str:
        """Make the call; the client makes it again as long as that may help."""
        try:
            reply = self._client.chat.completions.create(**request)
        except self._failures as error:
            where = "none is kept, since no cache_directory was given"
            if self.cache_directory is not None:
                where = f"those are in {self.cache_directory}, and the same call goes on from there"
            raise self.error(
                f"The {self.role} {self.model} at {self.base_url} gave no answer ({type(error).__name__}: {error}). "
                "Check the address, the key and the name of the model, or raise timeout and max_retries. Of the "
                f"answers so far, {where}."
            ) from error
        choices = getattr(reply, "choices", None)
        return (choices[0].message.content or "") if choices else ""


def _cached_answer(path: Path) -> str | None:
    try:
        return str(_files.read_json(path, _CACHE_FORMAT, ["answer"])["answer"])
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("A kept answer is not readable and is asked for again: %s", error)
        return None
