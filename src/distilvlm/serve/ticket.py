"""A request in the engine, as whoever waits for its answer holds it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from threading import Condition

from .interface import Failed, Piece, Usage


class Answer:
    """The engine's side puts pieces in, the other takes them out (`interface.Ticket`).

    Args:
        prompt_tokens: positions of the prompt.
        cancelled: told when the answer is not wanted any more.
    """

    def __init__(self, prompt_tokens: int, cancelled: Callable[[], object]) -> None:
        self._prompt_tokens = prompt_tokens
        self._cancelled = cancelled
        self._tokens = 0
        self._submitted = time.monotonic()
        self._first: float | None = None
        self._pieces: deque[Piece] = deque()
        self._over = False
        self._error: Failed | None = None
        self._changed = Condition()
        self._wake: Callable[[], object] | None = None  # of an event loop that waits

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._tokens)

    @property
    def seconds_to_first_token(self) -> float | None:
        return self._first

    @property
    def over(self) -> bool:
        """Whether nothing more can come: it is finished, cancelled or failed."""
        return self._over

    def put(self, piece: Piece) -> bool:
        """Whether anybody wants it still."""
        if self._first is None:
            self._first = time.monotonic() - self._submitted
        with self._changed:
            if self._over:
                return False
            self._tokens += len(piece.ids)
            self._pieces.append(piece)
            self._over = piece.finish is not None
            self._notify()
            return True

    def fail(self, error: Failed) -> None:
        with self._changed:
            if not self._over:
                self._over, self._error = True, error
                self._notify()

    def cancel(self) -> None:
        with self._changed:
            if self._over:
                return
            self._over = True
            self._pieces.clear()
            self._notify()
        self._cancelled()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self._over)
                piece = self._next()
            if piece is None:
                return
            yield piece

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._wake = lambda: loop.call_soon_threadsafe(event.set)
        while True:
            with self._changed:
                event.clear()
                waiting = not self._pieces and not self._over
                piece = None if waiting else self._next()
            if waiting:
                await event.wait()
            elif piece is None:
                return
            else:
                yield piece

    def _next(self) -> Piece | None:
        """The next piece; None after the last. Raises Failed."""
        if self._pieces:
            return self._pieces.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._wake is not None:
            try:
                self._wake()
            except RuntimeError:  # the loop was closed: nobody waits any more
                self._wake = None
