"""A model as requests name it: how it writes conversations and sees pictures, and what it refuses."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from distilvlm.data.batch import IGNORED, SampleKey
from distilvlm.data.geometry import Geometry, PictureError, canvas
from distilvlm.data.markers import neutralise, place
from distilvlm.data.problems import RowError
from distilvlm.data.records import IMAGE_TOKEN, PICTURE, Record, Turn
from distilvlm.data.stage import background
from distilvlm.data.template import Encoded, Template
from distilvlm.models.vlm import VisionLayout

from .interface import Refused, Request, ServedModel
from .sampling import Draw

MOST_LIKELIEST = 20
HOTTEST = 2.0


@dataclass(frozen=True)
class Prompt:
    """A request as the model reads it."""

    encoded: Encoded
    canvases: tuple[Tensor, ...]  # uint8 [3, size, size] each
    draw: Draw
    limit: int  # tokens of the answer, at most
    echo: str | None = None  # what is repeated before it

    @property
    def length(self) -> int:
        return len(self.encoded.input_ids)


@dataclass(frozen=True)
class Served:
    """A workflow under its name.

    Attributes:
        workflow: of the host; "text" without one.
        ends: ids that end a conversation's answer, and those that end a text.
    """

    about: ServedModel
    workflow: str
    template: Template
    geometry: Geometry
    layout: VisionLayout
    turn_ends: frozenset[int]
    text_ends: frozenset[int]
    _tokenizing: Lock = field(default_factory=Lock)  # a fast tokenizer is changed while it is used

    def prompt(self, request: Request) -> Prompt:
        """Read a request.

        Raises:
            Refused: it can't be answered.
        """
        _check(request)
        if request.pictures and not self.about.sees:
            raise Refused("pictures", f"'{self.about.name}' is a language model: it sees nothing")
        with self._tokenizing:
            try:
                encoded = self._encoded(request)
                echo = self._text(request.prompt) if request.echo and request.prompt is not None else None
            except RowError as error:
                raise Refused("prompt" if request.prompt is not None else "messages", error.reason) from None
        room = self.about.context - len(encoded.input_ids)
        if room < 1 or (request.max_tokens or 0) > room:
            asked = f" and max_tokens {request.max_tokens}" if request.max_tokens and room > 0 else ""
            shown = f", {self.layout.placeholders} for each picture," if request.pictures else ""
            raise Refused(
                "max_tokens" if asked else "prompt" if request.prompt is not None else "messages",
                f"{len(encoded.input_ids)} positions of the prompt{shown}{asked} are more than the context of "
                f"{self.about.context} that '{self.about.name}' has"
                + (f": ask for {room} tokens at most" if asked else ": shorten it, or begin a new conversation"),
            )
        draw = Draw(request.temperature, request.top_p, random.Random(request.seed))
        return Prompt(encoded, self._canvases(request), draw, request.max_tokens or room, echo)

    def _text(self, prompt: str | tuple[int, ...]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self.template.tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False)

    def _encoded(self, request: Request) -> Encoded:
        pictures = len(request.pictures)
        if isinstance(request.prompt, tuple):
            return self._of_ids(request.prompt, pictures)
        if request.prompt is not None:
            parts = request.prompt.split(IMAGE_TOKEN) if pictures else [request.prompt]
            text = PICTURE.join(neutralise(part, "prompt")[0] for part in parts)
            if text.count(PICTURE) != pictures:
                found = text.count(PICTURE)
                told = f"{found} {IMAGE_TOKEN} for {pictures} picture{'s' * (pictures > 1)}: write one for each"
                raise RowError("prompt", told)
            encoded = self.template.beginning(text, pictures, self.layout.placeholders)
            if not len(encoded.input_ids):
                raise RowError("prompt", "is empty, and this tokenizer puts nothing before a text: give a first word")
            return encoded
        turns = [Turn(message.role, message.text) for message in request.messages]
        places = [f"messages[{number}]" for number in range(len(turns))]
        turns = place(turns, pictures, "messages", places)[0]
        record = Record(SampleKey("", "", 0), "", ("",) * pictures, tuple(turns))
        return self.template.prompt(record, self.layout.placeholders)

    def _of_ids(self, ids: tuple[int, ...], pictures: int) -> Encoded:
        tokenizer = self.template.tokenizer
        image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        wrong = next((id for id in ids if not 0 <= id < len(tokenizer) or id == image), None)
        if wrong is not None:
            what = f"stands for a picture ({IMAGE_TOKEN})" if wrong == image else "is no id of this tokenizer"
            raise RowError("prompt", f"{wrong} {what}: ids are below {len(tokenizer)}, and of text alone")
        if pictures:
            raise RowError("prompt", f"token ids have no place for {pictures} pictures: give a text")
        read = torch.tensor(ids, dtype=torch.int64)
        return Encoded(read, torch.full_like(read, IGNORED), torch.empty(0, dtype=torch.int64))

    def _canvases(self, request: Request) -> tuple[Tensor, ...]:
        try:
            return tuple(
                canvas(picture, self.geometry, self.layout.size, background(self.layout))
                for picture in request.pictures
            )
        except PictureError as error:
            raise Refused("pictures", str(error)) from None


def _check(request: Request) -> None:
    """Raises Refused for a field that is wrong by itself."""
    if (request.prompt is None) == (not request.messages):
        raise Refused("messages", "give a conversation, or a prompt to go on with, one of both")
    if request.messages and request.messages[-1].role != "user":
        raise Refused("messages", f"end with a turn of the {request.messages[-1].role}: the user's must be the last")
    if request.max_tokens is not None and request.max_tokens < 1:
        raise Refused("max_tokens", f"is {request.max_tokens}: ask for 1 at least")
    if not (math.isfinite(request.temperature) and 0 <= request.temperature <= HOTTEST):
        raise Refused("temperature", f"is {request.temperature}: give a number from 0, greedy, to {HOTTEST:g}")
    if not 0 < request.top_p <= 1:
        raise Refused("top_p", f"is {request.top_p}: give a number above 0, up to 1")
    if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LIKELIEST:
        raise Refused("logprobs", f"are wanted of {request.logprobs} tokens: give a number from 0 to {MOST_LIKELIEST}")
    if "" in request.stop:
        raise Refused("stop", "holds an empty text, which stands everywhere")
