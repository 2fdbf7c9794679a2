"""An engine that repeats what it is told, a word a step, without a model."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field

from distilvlm.serve.interface import (
    Busy,
    Draining,
    Failed,
    NotFinite,
    Piece,
    Refused,
    Request,
    ServedModel,
    TokenLogprob,
    Usage,
)

MODELS = (
    ServedModel("parrot", sees=True, boxes=False, context=64, parameters=7, geometry="pad"),
    ServedModel("parrot-text", sees=False, boxes=False, context=64, parameters=5, geometry="pad"),
)


class FakeTicket:
    """The words of the last message (or prompt), one a step; as many as `engine` lets it."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self.engine, self.request = engine, request
        text = request.prompt if request.prompt is not None else request.messages[-1].text
        seen = [f"{picture.width}x{picture.height}" for picture in request.pictures]
        self.words = [*seen, *text.replace("<image>", "").split()]
        self.cancelled = threading.Event()
        self.usage = Usage(len(self.words) + 3, 0)
        self.seconds_to_first_token: float | None = None

    def cancel(self) -> None:
        self.cancelled.set()
        self.engine.leave(self)

    def pieces(self) -> Iterator[Piece]:
        cut = self.request.max_tokens
        for number, word in enumerate(self.words):
            if word == "fail":
                self.engine.leave(self)
                raise Failed("the model gave no number")
            if word == "nan":
                self.engine.leave(self)
                raise NotFinite("the model's numbers are not finite (NaN)")
            if number == cut:
                break
            self.seconds_to_first_token = self.seconds_to_first_token or 0.01
            self.usage = Usage(self.usage.prompt_tokens, number + 1)
            text = (" " if number else "") + word
            yield Piece(text, (number,), self._logprobs(text, number), None)
        finish = "length" if cut is not None and cut < len(self.words) else "stop"
        self.engine.leave(self)
        yield Piece("", (), None if self.request.logprobs is None else (), finish)

    def _logprobs(self, text: str, number: int) -> tuple[TokenLogprob, ...] | None:
        if self.request.logprobs is None:
            return None
        likeliest = ((text, number, -0.25), ("\ufffd", 99, float("-inf")))
        return (TokenLogprob(text, number, -0.25, likeliest[: self.request.logprobs]),)

    def __iter__(self) -> Iterator[Piece]:
        raise NotImplementedError  # the server has an event loop

    async def __aiter__(self) -> AsyncIterator[Piece]:
        for number, piece in enumerate(self.pieces()):
            while not self.cancelled.is_set() and number >= self.engine.stand_still_after:
                await asyncio.sleep(0.002)
            if self.cancelled.is_set() and piece.finish is None:
                return
            yield piece


@dataclass
class FakeEngine:
    places: int = 8
    models: tuple[ServedModel, ...] = MODELS
    stand_still_after: float = math.inf  # pieces of each answer
    requests: list[Request] = field(default_factory=list)
    running: list[FakeTicket] = field(default_factory=list)
    cancelled: list[FakeTicket] = field(default_factory=list)
    draining: bool = False

    def submit(self, request: Request) -> FakeTicket:
        if self.draining:
            raise Draining()
        if len(self.running) >= self.places:
            raise Busy(2.4)
        ticket = FakeTicket(self, request)
        if len(ticket.words) > 50:
            raise Refused("messages", f"{len(ticket.words)} positions are more than the model's context of 50")
        self.requests.append(request)
        self.running.append(ticket)
        return ticket

    def leave(self, ticket: FakeTicket) -> None:
        if ticket in self.running:
            self.running.remove(ticket)
            if ticket.cancelled.is_set():
                self.cancelled.append(ticket)

    def drain(self, seconds: float) -> None:
        self.draining = True
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            time.sleep(0.005)
        for ticket in list(self.running):
            ticket.cancel()

    def numbers(self) -> Mapping[str, float]:
        return {"running": len(self.running), "steps_total": 12.0}
