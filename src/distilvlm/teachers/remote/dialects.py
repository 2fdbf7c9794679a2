"""How servers that give log-probabilities of prompts are asked, and what they answer.

Written after vLLM's protocol (0.10.2 and later: `return_token_ids`; read in its source up to 0.25) and SGLang's
(`/generate`, 0.4.6 and later). Where they differ: vLLM takes pictures in chat messages only, and lists the token that
stands at a position beside the likeliest ones; SGLang gives it in a list of its own.
"""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from distilvlm.models.vlm import IMAGE_TOKEN

from .connection import Ask

VERBATIM = (
    "{%- for message in messages -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}" + IMAGE_TOKEN + "{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
)
"""A chat template that adds nothing: prompts come rendered, by the template that the student is taught with."""

IMPOSSIBLE = -9999.0
"""What vLLM writes for −inf, which JSON lacks."""

CLOSE = 1e-3
"""Nats by which SGLang's two lists may differ in one probability."""


@dataclass(frozen=True)
class Prompt:
    """One row of a batch, without its padding."""

    ids: list[int]
    text: str | None  # the same with `<image>` for each picture; None: the ids are sent
    prefix: str = ""  # what a tokenizer puts before a text of its own accord; `text` begins with it
    pictures: Tensor | None = None  # [pictures, 3, size, size] uint8; only beside a text


@dataclass(frozen=True)
class Answer:
    """What a server says of a prompt as it read it."""

    ids: list[int]
    known: list[dict[int, float]]  # [positions] id -> log-probability of standing there; nothing at the first


class Dialect(Protocol):
    """A kind of server."""

    def ask(self, prompt: Prompt, model: str, top_k: int) -> Ask:
        """The question about a prompt."""
        ...

    def answer(self, reply: bytes) -> Answer:
        """Raises `KeyError`, `TypeError` or `ValueError` for a reply that is no answer."""
        ...


class VLLM:
    """Ids and texts are completions; a prompt with pictures is a conversation of one message."""

    def ask(self, prompt: Prompt, model: str, top_k: int) -> Ask:
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": 1,
            "prompt_logprobs": top_k,
            "return_token_ids": True,
            "add_special_tokens": False,
        }
        if prompt.pictures is None:
            return _ask("/v1/completions", {**body, "prompt": prompt.ids if prompt.text is None else prompt.text})
        message = {"role": "user", "content": _parts(prompt)}
        template = {"chat_template": VERBATIM, "add_generation_prompt": False}
        return _ask("/v1/chat/completions", {**body, **template, "messages": [message]})

    def answer(self, reply: bytes) -> Answer:
        given = json.loads(reply)
        told = given if given.get("prompt_logprobs") is not None else given["choices"][0]
        known = [
            {int(id): _possible(one["logprob"]) for id, one in (entry or {}).items()}
            for entry in told["prompt_logprobs"]
        ]
        return Answer([int(id) for id in told["prompt_token_ids"]], known)


class SGLang:
    """Its own endpoint: the one for conversations gives nothing of a prompt."""

    def ask(self, prompt: Prompt, model: str, top_k: int) -> Ask:
        body: dict[str, Any] = {
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top_k,
        }
        if prompt.text is None:
            body["input_ids"] = prompt.ids
        else:
            body["text"] = prompt.text.removeprefix(prompt.prefix)  # which the server adds
        if prompt.pictures is not None:
            body["image_data"] = [_data_uri(picture) for picture in prompt.pictures]
        return _ask("/generate", body)

    def answer(self, reply: bytes) -> Answer:
        told = json.loads(reply)["meta_info"]
        standing, likeliest = told["input_token_logprobs"], told["input_top_logprobs"]
        ids = [int(id) for _, id, *_ in standing]
        known: list[dict[int, float]] = [{}]
        for (value, id, *_), entry in zip(standing[1:], likeliest[1:], strict=True):
            top = {int(other): _possible(one) for one, other, *_ in entry}
            value = _possible(value)
            # The lists are told apart, so they could be of different positions: then they contradict one another.
            same = abs(top[id] - value) < CLOSE if id in top else value < min(top.values()) + CLOSE
            known.append({**top, int(id): value} if same else top)
        return Answer(ids, known)


DIALECTS: dict[str, type[Dialect]] = {"vllm": VLLM, "sglang": SGLang}
"""By what `GET /v1/models` says that a model is owned by; others are asked as vLLM is."""


def _ask(path: str, body: dict[str, Any]) -> Ask:
    return Ask(path, json.dumps(body).encode())


def _parts(prompt: Prompt) -> list[dict[str, Any]]:
    assert prompt.text is not None and prompt.pictures is not None
    parts: list[dict[str, Any]] = []
    pieces = prompt.text.split(IMAGE_TOKEN)
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image_url", "image_url": {"url": _data_uri(prompt.pictures[number - 1])}})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _data_uri(picture: Tensor) -> str:
    """A canvas as PNG, which loses nothing: [3, size, size] uint8."""
    stream = io.BytesIO()
    Image.fromarray(picture.cpu().permute(1, 2, 0).numpy()).save(stream, format="png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _possible(value: float) -> float:
    return -math.inf if value <= IMPOSSIBLE else float(value)
