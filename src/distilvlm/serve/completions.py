"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from PIL import Image
from starlette.requests import Request as HttpRequest

from distilvlm.data.records import IMAGE_TOKEN

from .answers import ChatForm, TextForm
from .desk import Desk
from .errors import ApiError
from .interface import Message, Request
from .protocol import (
    ChatCompletion,
    ChatRequest,
    FilePart,
    ImagePart,
    TextCompletion,
    TextPart,
    TextRequest,
    UserPart,
    Wanted,
)

STREAMED: dict[str, Any] = {
    "description": "The answer; with `stream`, server-sent events with a piece each, and [DONE] behind the last one.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}

DEFAULT_TOKENS = 16
"""Of `/v1/completions`, as OpenAI has it; a conversation has the rest of the context."""


def routes(desk: Desk) -> APIRouter:
    """The routes that answer."""
    router = APIRouter(prefix="/v1", tags=["completions"])

    @router.post("/chat/completions", response_model=ChatCompletion, responses={200: STREAMED})
    async def chat(wanted: ChatRequest, http: HttpRequest) -> Any:
        """Answer a conversation."""
        _require_consistent(wanted)
        top = wanted.top_logprobs
        if top is not None and not wanted.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs: true", "top_logprobs")
        if None not in (wanted.max_tokens, wanted.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens are the same: give one", "max_tokens")

        def made() -> Request:
            messages, pictures = _conversation(wanted, desk)
            return Request(
                model=wanted.model,
                messages=messages,
                pictures=pictures,
                max_tokens=wanted.max_completion_tokens or wanted.max_tokens,
                logprobs=(top or 0) if wanted.logprobs else None,
                **_sampling(wanted),
            )

        return await desk.answer(http, wanted.model, made, ChatForm(wanted.model), *_streaming(wanted))

    @router.post("/completions", response_model=TextCompletion, responses={200: STREAMED})
    async def complete(wanted: TextRequest, http: HttpRequest) -> Any:
        """Continue a text as it stands, without a template."""
        _require_consistent(wanted)

        def made() -> Request:
            return Request(
                model=wanted.model,
                prompt=_only(wanted.prompt),
                echo=bool(wanted.echo),
                max_tokens=wanted.max_tokens or DEFAULT_TOKENS,
                logprobs=wanted.logprobs,
                **_sampling(wanted),
            )

        return await desk.answer(http, wanted.model, made, TextForm(wanted.model), *_streaming(wanted))

    return router


def _only(prompt: Sequence[Any]) -> str | tuple[int, ...]:
    """The one text, or the ids of the one text, alone or as a list's only element."""
    if isinstance(prompt, str):
        return prompt
    return tuple(prompt) if isinstance(prompt[0], int) else _only(prompt[0])


def _conversation(wanted: ChatRequest, desk: Desk) -> tuple[tuple[Message, ...], tuple[Image.Image, ...]]:
    """Messages as the engine has them, and their pictures, in order. Decodes: call it from a thread."""
    shown = sum(
        not isinstance(part, TextPart)
        for turn in wanted.messages
        if not isinstance(turn.content, str)
        for part in turn.content
    )
    if shown > desk.settings.pictures:
        raise ApiError(
            400, f"messages: {shown} pictures are more than the {desk.settings.pictures} of a request", "messages"
        )
    if shown and not desk.model(wanted.model).sees:
        raise ApiError(400, f"messages: '{wanted.model}' does not take pictures", "messages")
    messages: list[Message] = []
    pictures: list[Image.Image] = []
    for number, turn in enumerate(wanted.messages):
        place = f"messages.{number}.content"
        parts: list[UserPart] | list[TextPart]
        parts = [TextPart(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        texts: list[str] = []
        for index, part in enumerate(parts):
            if isinstance(part, ImagePart | FilePart):
                pictures.append(desk.pictures.of(part, f"{place}.{index}"))
                texts.append(IMAGE_TOKEN)
            else:
                if IMAGE_TOKEN in part.text:
                    raise ApiError(400, f"{place}: {IMAGE_TOKEN} stands for a picture: send that as a part", place)
                texts.append(part.text)
        role = "system" if turn.role == "developer" else turn.role
        messages.append(Message(role, "\n".join(texts)))
    return tuple(messages), tuple(pictures)


def _sampling(wanted: Wanted) -> dict[str, Any]:
    stop = [wanted.stop] if isinstance(wanted.stop, str) else wanted.stop or []
    return {
        "temperature": 1.0 if wanted.temperature is None else wanted.temperature,
        "top_p": 1.0 if wanted.top_p is None else wanted.top_p,
        "seed": wanted.seed,
        "stop": tuple(stop),
    }


def _streaming(wanted: Wanted) -> tuple[bool, bool]:
    """Whether the answer is a stream, and whether that tells what was used."""
    return bool(wanted.stream), wanted.stream_options is not None and wanted.stream_options.include_usage


def _require_consistent(wanted: Wanted) -> None:
    if wanted.stream_options is not None and not wanted.stream:
        raise ApiError(400, "stream_options: only with stream: true", "stream_options")
