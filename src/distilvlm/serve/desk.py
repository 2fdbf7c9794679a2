"""Where requests become tickets, and tickets answers: what all completions have in common."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import anyio
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import errors
from .answers import ChatForm, TextForm, event
from .errors import ApiError
from .interface import Engine, Failed, Piece, Request, ServedModel, Ticket
from .metrics import Metrics
from .pictures import Pictures
from .settings import Settings
from .uploads import Uploads

logger = logging.getLogger(__name__)

PREPARING = 2
"""Requests whose pictures are decoded at the same time: each may take hundreds of megabytes while it is."""

Result = TypeVar("Result")


class Desk:
    """What the routes of one server share.

    Args:
        engines: each with models of other names.

    Raises:
        ValueError: two models of one name.
    """

    def __init__(self, engines: Sequence[Engine], settings: Settings) -> None:
        self.settings, self.engines = settings, tuple(engines)
        self.models: dict[str, ServedModel] = {}
        self._engine_of: dict[str, Engine] = {}
        for engine in engines:
            for model in engine.models:
                if model.name in self.models:
                    raise ValueError(f"two models are called '{model.name}': name one of them, as in NAME=MODEL")
                self.models[model.name], self._engine_of[model.name] = model, engine
        self.metrics = Metrics({engine.models[0].name: engine for engine in engines})
        self.uploads = Uploads(settings.uploads, settings.kept)
        self.pictures = Pictures(settings, self.uploads)
        self.started = int(time.time())
        self.draining = False
        self._preparing = anyio.CapacityLimiter(PREPARING)

    def model(self, name: str) -> ServedModel:
        """Raises `ApiError` where there is none of that name."""
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"there is no model '{name}': there is {known}", "model", "model_not_found")
        return self.models[name]

    def drain(self) -> None:
        """Refuse new requests and wait for those under way, as long as the settings say. Blocks."""
        self.draining = True
        end = time.monotonic() + self.settings.draining
        for engine in self.engines:
            engine.drain(max(0.0, end - time.monotonic()))

    async def prepared(self, work: Callable[[], Result]) -> Result:
        """What `work` gives, in a thread: a few at a time, the others wait with nothing but their bodies."""
        return await anyio.to_thread.run_sync(work, limiter=self._preparing)

    async def answer(
        self,
        http: HttpRequest,
        model: str,
        made: Callable[[], Request],
        form: ChatForm | TextForm,
        stream: bool,
        with_usage: bool,
    ) -> Response | BaseModel:
        """Answer one completion, whole or as a stream. A client that leaves takes its request with it.

        Args:
            made: makes the request; called in a thread.
            form: how the answer looks.

        Raises:
            ApiError, Refused, Busy, Failed: before anything of the answer was sent.
        """
        engine = self._engine_of[self.model(model).name]
        if self.draining:
            raise ApiError(503, "this server is about to stop", code="draining", retry_after=self.settings.draining)
        ticket = await self.prepared(lambda: engine.submit(made()))
        pieces = self._pieces(ticket, model)
        try:
            if not stream:
                found = await _unless_gone(http, _all(pieces))
                return form.whole(found, ticket.usage)
            # Nothing is sent before the first piece: what goes wrong until then has a status of its own.
            first = await _unless_gone(http, _next(pieces))
        except BaseException as error:
            ticket.cancel()
            if isinstance(error, _GoneError):
                return Response(status_code=499)  # read by nobody; the metrics tell it
            raise
        return _Events(ticket, pieces, _events(first, pieces, ticket, form, with_usage))

    async def _pieces(self, ticket: Ticket, model: str) -> AsyncGenerator[Piece]:
        """A ticket's pieces, counted. Left early, the ticket is cancelled."""
        began, last = time.monotonic(), None
        finish = "cancelled"
        try:
            async for piece in ticket:
                now = time.monotonic()
                if piece.ids:
                    if last is not None:
                        self.metrics.between(model, len(piece.ids), now - last)
                    elif (seconds := ticket.seconds_to_first_token) is not None:
                        self.metrics.first_token(model, seconds)
                    last = now
                finish = piece.finish or finish
                yield piece
            if finish == "cancelled":
                raise Failed("the answer was cancelled by the server")
        except Exception:
            finish = "failed"
            raise
        finally:
            ticket.cancel()
            usage = ticket.usage
            whole = time.monotonic() - began
            self.metrics.ended(model, finish, usage.prompt_tokens, usage.completion_tokens, whole)


class _GoneError(Exception):
    """Whoever asked is not there any more."""


class _Events(StreamingResponse):
    """A stream that gives its place back, however it ends: also when its generator was never begun."""

    def __init__(self, ticket: Ticket, pieces: AsyncGenerator[Piece], events: AsyncIterator[str]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._ticket, self._pieces = ticket, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()
            with anyio.CancelScope(shield=True):
                await self._pieces.aclose()


async def _events(
    first: Piece, rest: AsyncIterator[Piece], ticket: Ticket, form: ChatForm | TextForm, with_usage: bool
) -> AsyncIterator[str]:
    if (opening := form.opening()) is not None:
        yield event(opening)
    try:
        yield event(form.chunk(first))
        async for piece in rest:
            if piece.text or piece.finish or piece.logprobs:
                yield event(form.chunk(piece))
    except Exception as error:  # the status is sent already: the stream says it, and ends without [DONE]
        yield event(errors.ErrorBody(**errors.of(error).body))
        return
    if with_usage:
        yield event(form.closing(ticket.usage))
    yield event("[DONE]")


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _next(pieces: AsyncGenerator[Piece]) -> Piece:
    return await anext(pieces)


async def _unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives, unless the client leaves before. Raises `_GoneError`, when `work` has been ended."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_left(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _GoneError
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _left(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
