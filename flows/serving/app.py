"""The routes: from a request's body to its answer, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flows.serving.admission import Admission, Admitted
from flows.serving.body import read_body
from flows.serving.detokenize import Answer
from flows.serving.errors import ApiError, Disconnected, draining, failed
from flows.serving.replies import ChatShape, Choice, Envelope, Shape, TextShape, usage
from flows.serving.settings import Settings
from flows.serving.worker import Call, Worker

log = logging.getLogger("headwater.serving")
_OUTCOMES = {408: "timeout", 413: "too_large", 429: "queue_full", 500: "failed", 503: "draining"}


@dataclass
class State:
    """What all connections share."""

    admission: Admission
    worker: Worker
    settings: Settings
    model: str
    draining: bool = False
    responding: int = 0
    """Requests that are being answered; the server waits for them when it ends."""
    created: int = 0


def make_app(state: State) -> Starlette:
    """The ASGI application."""
    state.created = int(time.time())

    async def models(request: HttpRequest) -> Response:
        return _json({"object": "list", "data": [_card(state)]})

    async def one_model(request: HttpRequest) -> Response:
        state.admission.known(request.path_params["model"])
        return _json(_card(state))

    async def health(request: HttpRequest) -> Response:
        if not state.worker.alive:
            return _json({"status": "failed"}, 503)
        return _json({"status": "draining"}, 503) if state.draining else _json({"status": "ok"})

    async def metrics(request: HttpRequest) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return PlainTextResponse(state.worker.exposition(), media_type=kind)

    async def told(request: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = _plain(request, error)
        assert isinstance(error, ApiError)
        return _json(error.envelope(), error.status, error.headers)

    chat = Endpoint(state, "chat", state.admission.chat, ChatShape)
    text = Endpoint(state, "completions", state.admission.text, TextShape)
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", text, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", one_model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: told, ApiError: told})
    app.router.redirect_slashes = False
    return app


class Endpoint:
    """One of the two endpoints that make text, as an ASGI application."""

    def __init__(
        self,
        state: State,
        name: str,
        admit: Callable[[bytes], Admitted],
        shape: Callable[[Callable[[int], bytes], bool], Shape],
    ) -> None:
        self.state = state
        self.name = name
        self.admit = admit
        self.shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; however it ends, that is counted, and nothing of it goes on in the engine."""
        reply = _Reply(scope, receive, send)
        self.state.responding += 1
        try:
            outcome = await self._answer(reply)
        except ApiError as error:
            outcome = _OUTCOMES.get(error.status, "refused")
            await reply.error(error)
        except (Disconnected, asyncio.CancelledError):
            outcome = "cancelled"
        except Exception:
            log.exception("a request failed")
            outcome = "failed"
            await reply.error(ApiError(500, "an error of the server's own; its log says more"))
        finally:
            self.state.responding -= 1
        self.state.worker.metrics.outcomes[self.name, outcome] += 1

    async def _answer(self, reply: _Reply) -> str:
        state = self.state
        # Before the body is read, and again after: reading takes the client's time.
        self._check_open()
        body = await read_body(
            reply.headers, reply.receive, state.settings.max_body, state.settings.read_timeout
        )
        # A long prompt takes a while to encode, and the other streams go on meanwhile.
        admitted = await asyncio.to_thread(self.admit, body)
        self._check_open()
        call = state.worker.submit(admitted.requests)
        state.worker.metrics.prompt_tokens += admitted.prompt_tokens
        watch = asyncio.create_task(self._watch(reply, call))
        try:
            return await self._tell(reply, call, admitted)
        finally:
            state.worker.cancel(call)
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    def _check_open(self) -> None:
        if self.state.draining:
            raise draining()
        if not self.state.worker.alive:
            raise failed()

    async def _watch(self, reply: _Reply, call: Call) -> None:
        """Free the rows of a client that goes away, streaming or not."""
        while (await reply.receive())["type"] != "http.disconnect":
            pass
        self.state.worker.cancel(call)
        call.events.put_nowait((0, Disconnected()))

    async def _tell(self, reply: _Reply, call: Call, admitted: Admitted) -> str:
        options = admitted.options
        table = self.state.admission.table
        shape = self.shape(self.state.admission.spell, options.log_probs)
        choices = [Choice(Answer(table, options.stop, shape.thoughts)) for _ in admitted.requests]
        envelope = admitted.envelope(self.state.model)
        if options.stream:
            await self._stream(reply, call, admitted, shape, choices, envelope)
        else:
            await self._collect(call, choices)
            told = [shape.whole(index, choice) for index, choice in enumerate(choices)]
            await reply.json(200, envelope.whole(told, usage(admitted.prompt_tokens, choices)))
        return "ok"

    async def _collect(self, call: Call, choices: Sequence[Choice]) -> None:
        while any(choice.answer.finish is None for choice in choices):
            index, update = await call.next()
            choice = choices[index]
            choice.add(choice.answer.take(update))
            if choice.answer.finish is not None:
                self.state.worker.cancel(call, index)

    async def _stream(
        self,
        reply: _Reply,
        call: Call,
        admitted: Admitted,
        shape: Shape,
        choices: Sequence[Choice],
        envelope: Envelope,
    ) -> None:
        told = admitted.options.include_usage

        async def say(*parts: dict[str, Any] | None) -> None:
            chunks = [envelope.chunk([part], None, told) for part in parts if part is not None]
            if chunks:
                await reply.events(chunks)

        opened: set[int] = set()
        while any(choice.answer.finish is None for choice in choices):
            # Nothing is sent before the first token, so that what fails before it has a status of its own.
            index, update = await call.next()
            answer = choices[index].answer
            if answer.finish is not None:
                continue
            pieces = answer.take(update)
            parts = [shape.part(index, piece) for piece in pieces]
            if index not in opened:
                opened.add(index)
                parts = [shape.opening(index), *parts]
            if answer.finish is not None:
                self.state.worker.cancel(call, index)
                parts.append(shape.ending(index, answer.finish))
            await say(*parts)
        if told:
            await reply.events([envelope.chunk([], usage(admitted.prompt_tokens, choices), told)])
        await reply.end_events()


class _Reply:
    """One HTTP exchange. An error after the first event is an event itself, and the stream ends there."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.receive = receive
        self.headers = HttpRequest(scope).headers
        self._scope, self._send = scope, send
        self._streaming = False

    async def json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        await _json(body, status, headers)(self._scope, self.receive, self._send)

    async def error(self, error: ApiError) -> None:
        if not self._streaming:
            await self.json(error.status, error.envelope(), error.headers)
        else:
            await self.events([error.envelope()])
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def events(self, bodies: Sequence[Any]) -> None:
        if not self._streaming:
            self._streaming = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        data = b"".join(b"data: %s\n\n" % _dump(body) for body in bodies)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_events(self) -> None:
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _dump(body: Any) -> bytes:
    """JSON in ASCII: whatever is in a text, nothing on the way can misread it."""
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    more = {"x-content-type-options": "nosniff", **(headers or {})}
    return Response(_dump(body), status, more, media_type="application/json")


def _card(state: State) -> dict[str, Any]:
    return {
        "id": state.model,
        "object": "model",
        "created": state.created,
        "owned_by": "headwater",
        "max_model_len": state.worker.engine.context,
    }


def _plain(request: HttpRequest, error: HTTPException) -> ApiError:
    """Starlette's own errors: a route or method that is not there."""
    if error.status_code == 405:
        message = f"{request.method} is not for {request.url.path}: use {(error.headers or {}).get('Allow')}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, f"there is nothing at {request.url.path}", code="not_found")
