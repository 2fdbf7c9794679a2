"""What a server, a page and a terminal may rely on: requests, what is answered, and the engine that answers.

A request that can't be answered is refused when it is submitted; whatever goes wrong later ends that request alone, and
its ticket says so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image

Finish = Literal["stop", "length"]
"""Why an answer ended: by an end of turn or a stop string, or where its limit or the model's context cut it."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        text: with `<image>` where a picture of `Request.pictures` stands, in order, and nowhere else.
    """

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Request:
    """What is asked: a conversation or the beginning of a text.

    Attributes:
        model: a served model's name (`ServedModel.name`).
        messages: the conversation; its last turn is the user's. Empty where `prompt` is given.
        prompt: a text to go on with, as it stands, without a template; `<image>` in it as in a message. Or its token
            ids.
        echo: whether the first piece is the prompt, with what the model thought of its tokens where `logprobs` are
            wanted. That is read once more for it.
        pictures: decoded, upright RGB (`data.geometry.decode`), in the order of their `<image>`.
        max_tokens: of the answer; None: as many as the model's context has room for.
        temperature: 0 is greedy; 1 draws from the model's own distribution.
        top_p: draws are among the likeliest tokens that together have this probability, (0, 1].
        seed: the same request with the same seed has the same answer, whatever is answered beside it; None: any seed.
        stop: texts that end the answer and are not part of it.
        logprobs: None: none; n: of every token, and of the n likeliest at its place. They are the model's own, before
            temperature and top_p.
    """

    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    echo: bool = False
    pictures: tuple[Image.Image, ...] = ()
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was.

    Attributes:
        token: its text, alone; bytes that are no whole character show as U+FFFD.
        logprob: natural logarithm; None of a repeated prompt's first token, which nothing precedes.
        likeliest: (text, id, logprob) of the likeliest tokens at its place, the likeliest first.
    """

    token: str
    id: int
    logprob: float | None
    likeliest: tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What one step adds to one answer. An answer's last piece, and no other, has a `finish`; its text may be empty.

    Attributes:
        text: whole characters only, and nothing that may turn out to begin a stop string: what is held back comes with
            a later piece.
        ids: the tokens that were chosen since the last piece, without the one that ended the answer. They may be of
            text that is held back; tokens of a stop string are among them, its text never is.
        logprobs: of `ids`, or of the tokens of a repeated prompt; None where the request asks for none.
        finish: why this is the last one; None where more will come.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish: Finish | None


@dataclass(frozen=True)
class Usage:
    """Positions read and tokens chosen so far. A picture has as many positions as the model has placeholders for it."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ServedModel:
    """A model that requests may name.

    Attributes:
        sees: whether it takes pictures.
        boxes: whether it was taught to answer with boxes `[x1, y1, x2, y2]` as shares of the canvas.
        context: positions that prompt and answer may have together.
        parameters: of all that answers under this name, shared or not.
        geometry: how pictures become its canvas: "square", "pad" or "crop".
    """

    name: str
    sees: bool
    boxes: bool
    context: int
    parameters: int
    geometry: str


class Busy(Exception):  # noqa: N818 - a state, as queue.Full
    """The queue is full.

    Attributes:
        retry_after: seconds after which there may be a place.
    """

    def __init__(self, retry_after: float, reason: str = "the queue is full") -> None:
        super().__init__(f"{reason}: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Draining(Busy):
    """The engine finishes what it has and takes nothing new."""

    def __init__(self, retry_after: float = 30.0) -> None:
        super().__init__(retry_after, "this server is about to stop")


class Refused(ValueError):  # noqa: N818 - what becomes of a request
    """A request that can't be answered.

    Attributes:
        field: of the request, as `Request` calls it.
        reason: what is wrong with it, and what to do.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class Failed(RuntimeError):  # noqa: N818 - what becomes of a request
    """An answer ended by an error of its own; others go on. What iterating a ticket raises."""


class NotFinite(Failed):
    """The model's numbers for this request are NaN or infinite: it is the request's fault, and will be again."""


class Ticket(Protocol):
    """One request in the engine. Its pieces can be taken once, from any thread or in an event loop, as they come."""

    @property
    def usage(self) -> Usage: ...

    @property
    def seconds_to_first_token(self) -> float | None:
        """From submission to the first token chosen; None before."""
        ...

    def cancel(self) -> None:
        """Answer no more, and free the place. Iterating ends without a `finish`. May be said at any time, from any
        thread, more than once."""
        ...

    def __iter__(self) -> Iterator[Piece]:
        """Blocks until there is a piece.

        Raises:
            Failed: what ended this answer.
        """
        ...

    def __aiter__(self) -> AsyncIterator[Piece]:
        """The same in an event loop, without a thread that waits."""
        ...


class Engine(Protocol):
    """One base and a thread that decodes."""

    @property
    def models(self) -> tuple[ServedModel, ...]: ...

    def submit(self, request: Request) -> Ticket:
        """Queue a request. Tokenises it and makes canvases of its pictures: not to be called in an event loop.

        Raises:
            Refused: it can't be answered: no such model, more positions than its context, ...
            Busy: the queue is full.
            Draining: nothing new is taken.
        """
        ...

    def drain(self, seconds: float) -> None:
        """Refuse new requests, finish those that are in it, and stop. What is not finished after `seconds` fails."""
        ...

    def numbers(self) -> Mapping[str, float]:
        """Name → value, for metrics. Those that end in `_total` only grow."""
        ...
