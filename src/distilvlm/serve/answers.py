"""Pieces of an answer as OpenAI's bodies: a whole one, or events of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from pydantic import BaseModel

from .interface import Finish, Piece, TokenLogprob, Usage
from .protocol import (
    Answer,
    Candidate,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatToken,
    ChunkChoice,
    Delta,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    UsageBody,
)

LEAST = -9999.0
"""JSON has no infinity; OpenAI writes this for a token that can't be."""


class ChatForm:
    """One answer of `/v1/chat/completions`."""

    def __init__(self, model: str) -> None:
        self.id, self.created, self.model = f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> ChatCompletion:
        choice = ChatChoice(
            message=Answer(content="".join(piece.text for piece in pieces)),
            logprobs=_chat_logprobs(pieces),
            finish_reason=_finish(pieces),
        )
        return ChatCompletion(
            id=self.id, created=self.created, model=self.model, choices=[choice], usage=usage_body(usage)
        )

    def opening(self) -> ChatChunk | None:
        """What a stream begins with."""
        return self._chunk(ChunkChoice(delta=Delta(role="assistant", content="")))

    def chunk(self, piece: Piece) -> ChatChunk:
        delta = Delta(content=piece.text) if piece.text else Delta()
        return self._chunk(
            ChunkChoice(
                delta=delta, logprobs=_chat_logprobs([piece]) if piece.ids else None, finish_reason=piece.finish
            )
        )

    def closing(self, usage: Usage) -> ChatChunk:
        """What was used, which a stream ends with where it is wanted."""
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=[], usage=usage_body(usage))

    def _chunk(self, choice: ChunkChoice) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=[choice])


class TextForm:
    """One answer of `/v1/completions`, whose stream has the same bodies as a whole one."""

    def __init__(self, model: str) -> None:
        self.id, self.created, self.model = f"cmpl-{secrets.token_hex(12)}", int(time.time()), model
        self._offset = 0

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> TextCompletion:
        choice = TextChoice(
            text="".join(piece.text for piece in pieces),
            logprobs=self._logprobs(pieces),
            finish_reason=_finish(pieces),
        )
        return self._body([choice], usage_body(usage))

    def opening(self) -> TextCompletion | None:
        return None

    def chunk(self, piece: Piece) -> TextCompletion:
        logprobs = self._logprobs([piece]) if piece.ids or piece.logprobs else None
        return self._body([TextChoice(text=piece.text, logprobs=logprobs, finish_reason=piece.finish)])

    def closing(self, usage: Usage) -> TextCompletion:
        return self._body([], usage_body(usage))

    def _body(self, choices: list[TextChoice], usage: UsageBody | None = None) -> TextCompletion:
        return TextCompletion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _logprobs(self, pieces: Sequence[Piece]) -> TextLogprobs | None:
        if any(piece.logprobs is None for piece in pieces):
            return None
        told = [one for piece in pieces for one in piece.logprobs or ()]
        offsets: list[int] = []
        for one in told:
            offsets.append(self._offset)
            self._offset += len(one.token)
        return TextLogprobs(
            tokens=[one.token for one in told],
            token_logprobs=[None if one.logprob is None else max(one.logprob, LEAST) for one in told],
            # two ids may have the same text: the likelier one counts
            top_logprobs=[
                None
                if one.logprob is None
                else {text: max(logprob, LEAST) for text, _, logprob in reversed(one.likeliest)}
                for one in told
            ],
            text_offset=offsets,
        )


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def event(body: BaseModel | str) -> str:
    """One server-sent event."""
    if isinstance(body, TextCompletion | ChatChunk) and body.usage is None:
        body = body.model_dump_json(exclude={"usage"})
    return f"data: {body if isinstance(body, str) else body.model_dump_json()}\n\n"


def _finish(pieces: Sequence[Piece]) -> Finish:
    finish = pieces[-1].finish
    assert finish is not None  # an answer without one has failed
    return finish


def _chat_logprobs(pieces: Sequence[Piece]) -> ChatLogprobs | None:
    if any(piece.logprobs is None for piece in pieces):
        return None
    return ChatLogprobs(content=[_token(one) for piece in pieces for one in piece.logprobs or ()])


def _token(one: TokenLogprob) -> ChatToken:
    assert one.logprob is not None  # conversations are not repeated
    likeliest = [_candidate(text, logprob) for text, _, logprob in one.likeliest]
    return ChatToken(**_candidate(one.token, one.logprob).model_dump(), top_logprobs=likeliest)


def _candidate(text: str, logprob: float) -> Candidate:
    return Candidate(token=text, logprob=max(logprob, LEAST), bytes=None if "\ufffd" in text else [*text.encode()])
