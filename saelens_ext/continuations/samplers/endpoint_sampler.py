"""Continuations from any OpenAI-compatible completions endpoint: vLLM, the servers of llama.cpp and TGI, and others."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from saelens_ext import _checks
from saelens_ext.continuations.samplers.sampler import Draw
from saelens_ext.host.endpoint import KEY_VARIABLE, Endpoint, check_calls, gives_back
from saelens_ext.steering.sampling import SamplingOptions

PROMPTS = ("tokens", "text")

# Draws of neighbouring seeds must not meet.
_SEED_STEP = 1_000_003
_SEEDS = 2**31
_TOKEN_ID = "token_id:"
# No token holds a prompt of so many.
_LONG = 4
_ADVICE = (
    " It must serve /completions: where there are chats alone, no prefix is gone on from (texts that you have are "
    "audited with continuations=). prompt_as='text' is for one that takes no token ids."
)
_RESERVED = ("model", "prompt", "n", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "echo")


@_checks.normalising
@dataclass(frozen=True)
class EndpointSampler:
    """Draws continuations from a completions endpoint.

    Every draw has a seed of its own, made from the seed and the draw's number. An endpoint cuts stop texts off. Calls
    that meet a 429, a 5xx, a broken connection or a timeout are made again. The key is read from the environment
    variable ``OPENAI_API_KEY`` where it is set, and not written anywhere.

    Raises:
        ValueError: an address that is none, that ends in ``/completions`` or that holds a user name, a password or a
            query; a number out of range; a request option that an argument of sampling decides.

    Examples:
        >>> sampler = sx.EndpointSampler("http://localhost:8000/v1", "gpt2", choices_per_request=8)
        >>> sampler.describe()["model"]
        'gpt2'
    """

    base_url: str
    """The endpoint up to and without ``/completions``, for example ``http://localhost:8000/v1``."""
    model: str
    """The name of the model at the endpoint."""
    _: KW_ONLY
    prompt_as: str = "tokens"
    """"tokens", the ids that the model reads, for an endpoint of the same tokenizer; or "text", for one of another, or
    that takes no ids (TGI). Whether an endpoint puts BOS before a text is its own affair: where it reads another number
    of tokens than the model, that is logged as a warning."""
    choices_per_request: int = 1
    """Continuations to ask for at a time; with more than 1, an endpoint that gives fewer is asked again."""
    request_options: dict[str, Any] | None = None
    """Further fields of a request. With vLLM, ``{"return_token_ids": true}`` gives the tokens as they were drawn, and
    ``{"include_stop_str_in_output": true}`` keeps stop texts."""
    cache_directory: str | None = None
    """Where answers are kept, so that the same call goes on after an interruption; None keeps none."""
    timeout: float | int = 60.0
    """Seconds to wait for one answer."""
    max_retries: int = 5
    """How often a failed call is made again."""
    max_concurrency: int = 4
    """Calls at a time."""

    def __post_init__(self) -> None:
        _checks.normalise_fields(self)
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must begin with http:// or https://, got {self.base_url!r}.")
        if "@" in parts.netloc or parts.query or parts.fragment:
            shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
            raise ValueError(
                f"base_url must have no user name, password or query, since it is written into settings: {shown}. Keys "
                f"go into the environment variable {KEY_VARIABLE}."
            )
        if parts.path.rstrip("/").endswith("/completions"):
            raise ValueError(f"base_url ends before /completions (and /chat), which calls add; got {self.base_url!r}.")
        if not self.model:
            raise ValueError("model is empty; give the name of the model at the endpoint.")
        _checks.choice(self.prompt_as, PROMPTS, "prompt_as")
        _checks.positive(self.choices_per_request, "choices_per_request")
        check_calls(self.timeout, self.max_retries, self.max_concurrency)
        decided = [name for name in _RESERVED if name in (self.request_options or {})]
        if decided:
            raise ValueError(f"request_options has {', '.join(decided)}, which the arguments of sampling decide.")

    def describe(self) -> dict[str, Any]:
        """What decides the draws; see :class:`Sampler`."""
        names = ("base_url", "model", "prompt_as", "request_options")
        return {"kind": "endpoint", **{name: getattr(self, name) for name in names}}

    def draw(
        self,
        prefix: str,
        prefix_ids: Sequence[int],
        numbers: Sequence[int],
        options: SamplingOptions,
        stop: Sequence[str],
    ) -> list[Draw]:
        """See :class:`Sampler`.

        Raises:
            ImportError: the openai client is not installed.
            EndpointUnavailableError: the endpoint refused, failed, did not answer or answered something else; or it
                puts the prefix before each continuation.
        """
        request = {
            "model": self.model,
            "prompt": prefix if self.prompt_as == "text" else [int(i) for i in prefix_ids],
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "logprobs": 1,
            **({"stop": list(stop)} if stop else {}),
            **({} if options.top_k is None else {"top_k": options.top_k}),
            **(self.request_options or {}),
        }
        endpoint = Endpoint(
            self.base_url,
            self.model,
            # A server of one's own may ask for no key, and the client wants one.
            os.environ.get(KEY_VARIABLE) or "none",
            cache_directory=self.cache_directory,
            timeout=self.timeout,
            max_retries=self.max_retries,
            max_concurrency=self.max_concurrency,
            role="endpoint",
            advice=_ADVICE,
        )
        parts = [numbers[i : i + self.choices_per_request] for i in range(0, len(numbers), self.choices_per_request)]
        with closing(endpoint):
            found = endpoint.map(lambda part: list(_drawn(endpoint, request, part, options.seed)), parts)
            drawn = [one for part in found for one in part]
            if drawn and len(prefix_ids) >= _LONG and all(gives_back(one.text, prefix) for one in drawn):
                _check_echo(endpoint, request, prefix, options.seed)
        return drawn


def _drawn(endpoint: Endpoint, request: Mapping[str, Any], numbers: Sequence[int], seed: int) -> Iterator[Draw]:
    """The draws of some numbers in a row; an endpoint that gives fewer choices is asked for the rest."""
    left = list(numbers)
    while left:
        asked = {**request, "seed": (seed * _SEED_STEP + left[0]) % _SEEDS}
        asked |= {"n": len(left)} if len(left) > 1 else {}
        reply = endpoint.answered(asked, _call, _choices)
        choices = _choices(reply)
        if not choices:
            raise endpoint.error(endpoint.without_answer(f"it answered without choices: {reply!r:.200}"))
        usage = reply.get("usage")
        prompt_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        yield from (_read(choice, prompt_tokens) for choice in choices[: len(left)])
        left = left[len(choices) :]


def _check_echo(endpoint: Endpoint, request: Mapping[str, Any], prefix: str, seed: int) -> None:
    """Raise if the endpoint puts the prompt before a continuation of one token, which no model fits it into."""
    (one,) = _drawn(endpoint, {**request, "max_tokens": 1}, [0], seed)
    if gives_back(one.text, prefix):
        raise endpoint.error(
            f"The endpoint {endpoint.model} at {endpoint.base_url} puts the prompt before each continuation (echo): "
            f"{prefix!r:.100} and one token gave {one.text!r:.200}. Turn that off there; a continuation is only what "
            "follows the prompt."
        )


def _call(client: Any, request: Mapping[str, Any]) -> Any:
    # Read as JSON, since servers give more than the client's types know; what it does not know is sent as it is.
    rest = {name: value for name, value in request.items() if name not in ("model", "prompt")}
    made = client.completions.with_raw_response.create(
        model=request["model"], prompt=request["prompt"], extra_body=rest
    )
    return made.http_response.json()


def _choices(reply: Any) -> list[dict[str, Any]]:
    """The choices of a reply; none where it is something else."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list):
        return []
    return choices if all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in choices) else []


def _read(choice: Mapping[str, Any], prompt_tokens: Any) -> Draw:
    """A choice as OpenAI, vLLM and TGI give it, or llama.cpp."""
    found = choice.get("logprobs")
    found = found if isinstance(found, dict) else {}
    each = found.get("content")
    if isinstance(each, list):
        tokens, scores, ids = ([one.get(name) for one in each] for name in ("token", "logprob", "id"))
    else:
        tokens, scores, ids = found.get("tokens"), found.get("token_logprobs"), choice.get("token_ids")
    if ids is None and tokens and all(isinstance(one, str) and one.startswith(_TOKEN_ID) for one in tokens):
        ids, tokens = [one.removeprefix(_TOKEN_ID) for one in tokens], None
    has_ids = bool(ids) and all(isinstance(one, int) or (isinstance(one, str) and one.isdigit()) for one in ids)
    return Draw(
        text=choice["text"],
        token_ids=[int(one) for one in cast("list[Any]", ids)] if has_ids else None,
        tokens=tokens if tokens and all(isinstance(one, str) for one in tokens) else None,
        log_probs=[one if isinstance(one, int | float) else None for one in scores] if scores else None,
        ended_by=str(choice.get("finish_reason") or "unknown"),
        prompt_tokens=prompt_tokens if isinstance(prompt_tokens, int) else None,
    )
