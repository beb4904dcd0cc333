"""The page, and what it asks of a :class:`~saelens_ext.serve.live.LiveModel`."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from saelens_ext._files import json_safe
from saelens_ext.host.models import describe_model
from saelens_ext.host.tokens import visible
from saelens_ext.report.page import embed_json, render_page
from saelens_ext.serve.live import LiveModel, SteeredSoFar
from saelens_ext.serve.requests import prompt_of, steer_request, template_options
from saelens_ext.serve.served import Served
from saelens_ext.serve.worker import TooManyWaitingError, Worker

MAX_BODY = 500_000
"""Bytes of a request."""
N_FOUND = 40
"""Latents that a search lists."""
_HEADERS = {
    # Nothing that was typed or said stays in a browser's cache on disk.
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
# A latent's view brings its colours as style attributes.
_ALLOWED = "; connect-src 'self'; style-src-attr 'unsafe-inline'"

logger = logging.getLogger(__name__)
Answer = Callable[[dict[str, Any]], Awaitable[Any]]


class LivePage:
    """The answers to what the page asks."""

    def __init__(self, live: LiveModel, title: str | None = None):
        self._live = live
        self.worker = Worker()
        name = str(describe_model(live.model)["model_name"])
        self._html = render_page(
            "live.html",
            styles=["dictionary.css", "live.css"],
            scripts=["text.js", "live.js"],
            packages=["saelens_ext.serve"],
            allowed=_ALLOWED,
            title=title or f"{name}, live",
            has_chat=live.has_chat_template,
            limits=live.limits,
            data=embed_json(self._about()),
        )

    def _about(self) -> dict[str, Any]:
        live = self._live
        dictionaries = [
            {
                "name": one.name,
                "hook": str(one.sae.cfg.metadata.hook_name),
                "noun": one.noun,
                "size": one.d_sae,
                "threshold": None if one.partition is None else float(one.partition.cfg.threshold),
            }
            for one in live.dictionaries.values()
        ]
        return json_safe({"dictionaries": dictionaries, "limits": {**asdict(live.limits), "tokens": live.max_tokens}})

    def app(self, hosts: list[str]) -> Starlette:
        """The application; it answers under the names ``hosts`` alone, so that no other page can pose as it."""
        answers: dict[str, Answer] = {
            "read": self._read,
            "latent": self._latent,
            "find": self._find,
            "stop": self._stop,
        }
        routes = [Route("/", self._page), Route("/steer", self._steer, methods=["POST"])]
        routes += [Route(f"/{name}", _answering(answer), methods=["POST"]) for name, answer in answers.items()]
        checked = Middleware(TrustedHostMiddleware, allowed_hosts=hosts)
        return Starlette(routes=routes, middleware=[checked], lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.worker.close()

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(self._html, headers=_HEADERS)

    async def _read(self, asked: dict[str, Any]) -> Any:
        prompt, template = prompt_of(asked), {"chat_template_options": template_options(asked)}
        found = await self.worker.run(lambda: self._live.read(prompt, **template))
        shown = {name: [asdict(one) | {"text": visible(one.text)} for one in own] for name, own in found.items()}
        return {name: {"tokens": shown[name], "labels": self._labels(name, own)} for name, own in found.items()}

    def _labels(self, name: str, tokens: list[Any]) -> dict[int, Any]:
        """The labels of all latents that are named in a reading."""
        one = self._live.dictionaries[name]
        named = {latent.latent for token in tokens for latent in token.latents}
        named |= {token.region for token in tokens if token.region is not None}
        return {latent: _label(one, latent) for latent in sorted(named)}

    async def _latent(self, asked: dict[str, Any]) -> Any:
        one = self._live.dictionary(asked.get("dictionary"))
        latent = one.check(asked.get("latent"))
        view = one.show(latent, self._live.tokenizer)
        return {"html": None if view is None else view._repr_html_(), "label": _label(one, latent)}

    async def _find(self, asked: dict[str, Any]) -> Any:
        one, query = self._live.dictionary(asked.get("dictionary")), asked.get("query", "")
        if not isinstance(query, str) or len(query) > 200:
            raise ValueError("A search takes a text of at most 200 characters.")
        return {"latents": [{"latent": latent, **_label(one, latent)} for latent in one.find(query, N_FOUND)]}

    async def _stop(self, asked: dict[str, Any]) -> Any:
        return {"stopped": self.worker.stop(str(asked.get("job")))}

    async def _steer(self, request: Request) -> Response:
        try:
            asked = await _body(request)
            wanted, job = steer_request(asked), asked.get("job")
            template = {"chat_template_options": wanted.chat_template_options}
            if not isinstance(job, str) or not 0 < len(job) <= 64:
                raise ValueError("job must be a text of 1 to 64 characters that names the request.")
            stream = self.worker.stream(
                job,
                lambda: self._live.steer(wanted.prompt, wanted.changes, wanted.options, **template),
                SteeredSoFar(stage="stopped", done=True),
            )
            first = await anext(stream, None)
        except Exception as error:
            return _refused(error)
        if isinstance(first, Exception):
            return _refused(first)
        return StreamingResponse(_lines(first, stream), headers=_HEADERS, media_type="application/x-ndjson")


def _answering(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return _json(await answer(await _body(request)))
        except Exception as error:
            return _refused(error)

    return endpoint


async def _body(request: Request) -> dict[str, Any]:
    """The object in a request; a form of another page cannot send this type."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ValueError("A request must be of type application/json.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ValueError(f"A request has at most {MAX_BODY:,} bytes; shorten the text.")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("A request must be a JSON object; this one is none.") from error
    if not isinstance(asked, dict):
        raise ValueError(f"A request must be a JSON object, got {type(asked).__name__}.")
    return asked


def _json(value: Any, status: int = 200) -> Response:
    # Escaped, since half a character, which an error may quote, has no bytes.
    return Response(json.dumps(json_safe(value)), status, headers=_HEADERS, media_type="application/json")


def _refused(error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    return _json({"error": _said(error)}, 503 if isinstance(error, TooManyWaitingError) else 400)


def _said(error: Exception) -> str:
    if not isinstance(error, (ValueError, TooManyWaitingError)):
        logger.error("The live page could not answer", exc_info=error)
        return f"The model failed ({type(error).__name__}): {visible(str(error)).splitlines()[0] if str(error) else ''}"
    return visible(str(error))


async def _lines(first: Any, stream: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """One line of JSON per update."""
    update = first
    while update is not None:
        value = {"error": _said(update)} if isinstance(update, Exception) else _update(update)
        yield json.dumps(json_safe(value)).encode() + b"\n"
        update = await anext(stream, None)


def _update(update: SteeredSoFar) -> dict[str, Any]:
    shown = replace(update, unsteered=visible(update.unsteered), steered=visible(update.steered))
    strengths = [None if one is None else {**asdict(one), "reached": one.reached} for one in update.strengths]
    return asdict(replace(shown, strengths=())) | {"strengths": strengths}


def _label(one: Served, latent: int) -> dict[str, Any]:
    found = one.label(latent)
    return {"text": visible(found["text"]), "sure": found["sure"]}
