"""Templates: a record becomes token ids and labels, by one rendering and one tokenisation.

A token is learned if and only if its characters (the tokenizer's offsets) meet those of an answer or of the
end-of-turn token behind it. Nothing is ever tokenised again to count a length.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distilvlm.data.batch import IGNORED
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.records import IMAGE_TOKEN, PICTURE, Record
from distilvlm.data.rendering import Renderer, Rendering

logger = logging.getLogger(__name__)

Kind = Literal["chat", "vicuna", "plain"]

SAFE_ID = 0
"""Stands under placeholders and padding: any id with an embedding will do, it never reaches the model's output."""

# A template that writes today's date would make tomorrow's run another one; Llama 3's own fallback date is used.
_PINNED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}{{- '' }}"


@dataclass(frozen=True)
class Answer:
    """Where what is learned of one answer stands in a rendered text, in characters."""

    begin: int
    close: int  # where the token that ends the turn begins; `end` where there is none
    end: int


@dataclass(frozen=True)
class Encoded:
    """A record as tokens, pictures expanded to their placeholders."""

    input_ids: Tensor  # [length] int64; SAFE_ID under placeholders
    labels: Tensor  # [length] int64; the token itself where it is learned, else IGNORED (not shifted)
    placeholder_positions: Tensor  # [pictures * placeholders] int64
    cut: bool = False  # whether the end was cut off at max_length
    text: str = ""  # that was tokenised
    spans: Tensor | None = (
        None  # [length, 2] int64: characters of `text` that each token is of; −1 where there are none
    )
    answers: tuple[Answer, ...] = ()  # in their order

    @property
    def learned(self) -> int:
        """Tokens with a target: the first of a row has nothing to be predicted from."""
        return int((self.labels[1:] != IGNORED).sum())


class Template:
    """How a conversation is written for one tokenizer. Make it with `Template.of`."""

    def __init__(self, kind: Kind, tokenizer: Any, renderer: Renderer, image_id: int, prefix: list[int]) -> None:
        self.kind = kind
        self.tokenizer = tokenizer
        self.renderer = renderer
        self.image_id = image_id
        self.prefix = prefix  # what the tokenizer itself puts before a text (BOS), or nothing

    @classmethod
    def of(cls, kind: Kind, tokenizer: Any) -> Template:
        """The template of `kind` for a fast tokenizer that has `<image>` as a special token.

        Raises:
            DataError: a slow tokenizer, no `<image>`, no chat template for kind "chat", or one that can't be masked.
        """
        name = f"the {kind} template of {tokenizer.name_or_path or type(tokenizer).__name__}"
        if not tokenizer.is_fast:
            raise DataError(f"{name}: a slow tokenizer gives no offsets; use its fast version (tokenizer.json)")
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        if IMAGE_TOKEN not in special or image_id is None:
            raise DataError(f"{name}: the tokenizer has no special token {IMAGE_TOKEN}")
        variables = {**tokenizer.special_tokens_map, "picture": PICTURE}
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        if kind == "vicuna" and not eos:
            raise DataError(f"{name}: the tokenizer has no eos_token, which ends every answer")
        ends = special - {IMAGE_TOKEN} - ({bos} - {eos})
        renderer = Renderer(_jinja(kind, tokenizer, name), name, variables, sorted(ends), eos)
        if kind == "chat" and not renderer.ends_turns:
            logger.warning("%s writes no end-of-turn token behind answers: the model can't learn to stop", name)
        return cls(kind, tokenizer, renderer, image_id, _default_prefix(tokenizer))

    @property
    def ends_turns(self) -> bool:
        """Whether the end of a turn is learned (False for `plain`, and for a chat template that writes none)."""
        return self.renderer.ends_turns

    def encode(self, record: Record, placeholders: int, max_length: int | None = None) -> Encoded:
        """The record as training tokens, each picture as `placeholders` positions, cut to `max_length` positions.

        Of a preference only the last answer is learned, which was chosen or rated: earlier ones belong to the prompt
        (LLaVA-MoD's code counts them, too; its data has one answer per conversation).

        Raises:
            RowError: the template refuses the record, its pictures do not fit, or nothing is left to learn.
        """
        if self.kind == "plain" and len(record.answers) != 1:
            raise RowError("conversation", f"has {len(record.answers)} answers; the plain template takes one caption")
        encoded, last = self._encode(record, placeholders)
        if record.preferences is not None:
            encoded.labels[:last] = IGNORED
        length = len(encoded.input_ids)
        if max_length is not None and length > max_length:
            if bool((encoded.placeholder_positions >= max_length).any()):
                raise RowError(
                    "image",
                    f"{len(record.images)} x {placeholders} visual tokens are more than the context of {max_length} "
                    "positions holds; raise max_length or show fewer pictures",
                )
            encoded = replace(
                encoded,
                input_ids=encoded.input_ids[:max_length],
                labels=encoded.labels[:max_length],
                cut=True,
                spans=None if encoded.spans is None else encoded.spans[:max_length],
            )
        if encoded.learned == 0:
            where = f"the first {max_length} of {length} positions" if encoded.cut else f"its {length} positions"
            raise RowError("conversation", f"nothing to learn: no answer stands in {where}")
        return encoded

    def prompt(self, record: Record, placeholders: int) -> Encoded:
        """The record up to its last answer, for generation; labels are all IGNORED.

        Where the record ends with an answer, the prompt is what stood before it in training, token for token.
        """
        if record.turns and record.turns[-1].role == "assistant" and record.turns[-1].text.strip():
            encoded, last = self._encode(record, placeholders)
            encoded = Encoded(encoded.input_ids[:last], encoded.labels[:last], encoded.placeholder_positions)
        else:
            turns = record.turns[:-1] if record.turns and record.turns[-1].role == "assistant" else record.turns
            encoded = self._tokenise(Rendering(self.renderer.opening(turns), ()), len(record.images), placeholders)[0]
        return Encoded(encoded.input_ids, torch.full_like(encoded.labels, IGNORED), encoded.placeholder_positions)

    def beginning(self, text: str, pictures: int, placeholders: int) -> Encoded:
        """A text to go on with, as it stands and without turns; PICTURE in it is a picture. Labels are all IGNORED.

        Raises:
            RowError: another number of pictures than it has places for.
        """
        encoded = self._tokenise(Rendering(text, ()), pictures, placeholders)[0]
        return Encoded(encoded.input_ids, encoded.labels, encoded.placeholder_positions)

    def _encode(self, record: Record, placeholders: int) -> tuple[Encoded, int]:
        return self._tokenise(self.renderer.render(record.turns), len(record.images), placeholders)

    def _tokenise(self, rendering: Rendering, pictures: int, placeholders: int) -> tuple[Encoded, int]:
        """Tokens of a rendering, and the position of the first token of its last span."""
        text, spans = _with_image_tokens(rendering)
        backend = self.tokenizer.backend_tokenizer
        # Called directly: the wrapper's batch call would start threads, which forked loader processes complain of. It
        # also resets what an earlier call with truncation or padding has left behind, so we do.
        backend.no_truncation()
        backend.no_padding()
        tokens = backend.encode(text, add_special_tokens=False)
        ids = np.asarray(tokens.ids, dtype=np.int64)  # [tokens]
        starts, ends = _whole_ranges(np.asarray(tokens.offsets, dtype=np.int64).reshape(-1, 2), text)
        learned = np.zeros(len(ids), dtype=bool)
        last = len(ids)
        for start, end in spans:
            within = (starts < end) & (ends > start)
            learned |= within
            last = int(within.argmax()) if within.any() else last
        is_picture = ids == self.image_id
        if int(is_picture.sum()) != pictures:
            raise RowError(
                "conversation",
                f"{int(is_picture.sum())} image tokens for {pictures} pictures after {self.renderer.name}: it drops, "
                "repeats or writes them",
            )

        answers = tuple(Answer(start, self.renderer.closing(text, (start, end)), end) for start, end in spans)
        prefix = [] if self._begins_with_bos(text) else self.prefix
        ids = np.concatenate([np.asarray(prefix, dtype=np.int64), ids])
        is_picture = np.concatenate([np.zeros(len(prefix), dtype=bool), is_picture])
        learned = np.concatenate([np.zeros(len(prefix), dtype=bool), learned]) & ~is_picture
        repeats = np.where(is_picture, placeholders, 1)
        last = int(repeats[: last + len(prefix)].sum())
        positions = np.flatnonzero(np.repeat(is_picture, repeats))
        labels = np.repeat(np.where(learned, ids, IGNORED), repeats)
        ids = np.repeat(np.where(is_picture, SAFE_ID, ids), repeats)
        places = np.stack([starts, ends], axis=1)  # [tokens, 2]
        places = np.concatenate([np.full((len(prefix), 2), -1), places])
        places[is_picture] = -1
        encoded = Encoded(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(positions),
            text=text,
            spans=torch.from_numpy(np.repeat(places, repeats, axis=0)),
            answers=answers,
        )
        return encoded, last

    def _begins_with_bos(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)


def export_chat_template(kind: Kind, tokenizer: Any) -> str:
    """The Jinja that a saved processor carries: the same text as ours, content as text or as a list of image and text
    parts (a picture is `<image>` and a newline, as the messages reader has it)."""
    source = _jinja(kind, tokenizer, f"the {kind} template")
    if _is_exported(source):
        return source
    parts = _file("parts")
    if Template.of(kind, tokenizer).renderer.takes_parts:
        parts = parts.replace("as_parts = false", "as_parts = true")
    return parts + source


def llama_cpp_template(exported: str) -> str:
    """The Jinja for llama.cpp of a template that `export_chat_template` wrapped, or of any other: pictures are markers
    of llama.cpp's, and behind each stands the newline that LLaVA has there."""
    parts = _file("parts")
    for begin in (parts, parts.replace("as_parts = false", "as_parts = true")):
        exported = exported.removeprefix(begin)
    return _file("llama_cpp") + exported


def explain(encoded: Encoded, tokenizer: Any) -> str:
    """The tokens as text: what is learned stands in ⟦ ⟧, a picture as `[picture: N placeholders]`."""
    placeholder = np.zeros(len(encoded.input_ids), dtype=bool)
    placeholder[encoded.placeholder_positions.numpy()] = True
    kinds = np.where(placeholder, 2, (encoded.labels != IGNORED).numpy())  # 2 picture, 1 learned, 0 neither
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    pieces: list[str] = []
    for start, end in pairwise(borders):
        if end == start:
            continue
        if kinds[start] == 2:
            pieces.append(f"[picture: {end - start} placeholders]")
            continue
        text = tokenizer.decode(encoded.input_ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        pieces.append(f"⟦{text}⟧" if kinds[start] == 1 else text)
    return "".join(pieces)


def _jinja(kind: Kind, tokenizer: Any, name: str) -> str:
    if kind != "chat":
        return _file(kind)
    if not tokenizer.chat_template:
        raise DataError(f"{name}: the tokenizer has no chat template; set template: vicuna for this data source")
    source = tokenizer.get_chat_template()
    return _PINNED_DATE + source if "strftime_now" in source and not _is_exported(source) else source


def _is_exported(source: str) -> bool:
    """Whether `export_chat_template` made it: a stage may go on from a model that an earlier one saved."""
    return source.startswith(_file("parts").splitlines()[0])


def _file(name: str) -> str:
    return (files("distilvlm.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def _default_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text of its own accord (BOS or nothing)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return list(dressed[:start])
    return []


def _with_image_tokens(rendering: Rendering) -> tuple[str, list[tuple[int, int]]]:
    """PICTURE characters become image tokens, and the spans move with them."""
    pieces = rendering.text.split(PICTURE)
    if len(pieces) == 1:
        return rendering.text, list(rendering.spans)
    growth = len(IMAGE_TOKEN) - len(PICTURE)

    def moved(place: int) -> int:
        return place + growth * rendering.text.count(PICTURE, 0, place)

    return IMAGE_TOKEN.join(pieces), [(moved(start), moved(end)) for start, end in rendering.spans]


def _whole_ranges(offsets: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of every token, [tokens] each. Some tokenizers trim white space off their offsets
    (`trim_offsets`): it is given back to the token that holds it, the one behind the gap."""
    starts, ends = offsets[:, 0].copy(), offsets[:, 1]
    before = np.maximum.accumulate(np.concatenate([[0], ends]))[:-1]
    for token in np.flatnonzero(starts > before):
        if text[before[token] : starts[token]].isspace():
            starts[token] = before[token]
    return starts, ends
