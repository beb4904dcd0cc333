"""A language model behind any OpenAI-compatible chat endpoint, asked questions whose answers have a form."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from saelens_ext import _checks
from saelens_ext.host.endpoint import Answer, Endpoint, EndpointUnavailableError, gives_back

__all__ = ["ChatEndpoint", "EndpointOptions", "EndpointUnavailableError"]

logger = logging.getLogger(__name__)


class EndpointOptions(TypedDict, total=False):
    """Fields of :class:`ChatEndpoint`, as keywords."""

    cache_directory: str | Path | None
    timeout: float | int
    max_retries: int
    max_attempts: int
    max_concurrency: int
    request_options: Mapping[str, Any] | None


@dataclass(eq=False, kw_only=True)
class ChatEndpoint(Endpoint):
    """Asks a chat model questions; only answers in the form asked for are kept."""

    max_attempts: int = 3
    """How often an answer that has not the form asked for is asked for in all, at least 1."""
    request_options: Mapping[str, Any] | None = None
    """Further fields of a request. The default asks for the likeliest answer, of at most 200 tokens; give ``{}``, or
    the names that it knows, for an endpoint that refuses these.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive(self.max_attempts, "max_attempts")
        if self.request_options is None:
            self.request_options = {"temperature": 0, "max_tokens": 200}

    def ask(self, task: str, material: str, read: Callable[[str], Answer | None], reminder: str) -> Answer | None:
        """The answer to one question; None when no attempt gave one that ``read`` can read.

        ``task`` is the system's message, ``material`` the user's, ``reminder`` what is said after a text that ``read``
        gives None for.

        Raises:
            EndpointUnavailableError: the endpoint refused, failed or did not answer, or put the question before its
                answer, where the form asked for would be found too.
        """
        messages = [{"role": "system", "content": task}, {"role": "user", "content": material}]
        for _ in range(self.max_attempts):
            request = {"model": self.model, "messages": messages, **(self.request_options or {})}
            text = self.answered(request, _said, lambda answer: read(answer) is not None)
            if gives_back(text, task, material):
                raise self.error(self.without_answer("it puts the question before its answer; turn that off there"))
            answer = read(text)
            if answer is not None:
                return answer
            # The same request would mostly give the same answer, so it is told what is missing.
            messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": reminder}]
        said = "The %s %s gave no answer in the form asked for in %d attempts; it counts as missing."
        logger.warning(said, self.role, self.model, self.max_attempts)
        return None


def _said(client: Any, request: Mapping[str, Any]) -> str:
    choices = getattr(client.chat.completions.create(**request), "choices", None)
    return (choices[0].message.content or "") if choices else ""
