"""From turns to one text, and where in it the answers stand.

The places come from the rendering itself: from the template's own `{% generation %}` blocks, or from private-use marks
around each answer that are taken out again. Nothing is tokenised here, and nothing is rendered in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from distilvlm.data.problems import DataError, RowError
from distilvlm.data.records import RESERVED, Turn

_OPEN, _CLOSE = RESERVED[1], RESERVED[2]
_MARKS = re.compile(f"([{_OPEN}{_CLOSE}])")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = (
    Turn("user", "first question"),
    Turn("assistant", "first answer"),
    Turn("user", "second question"),
    Turn("assistant", "second answer"),
)


@dataclass(frozen=True)
class Rendering:
    text: str
    spans: tuple[tuple[int, int], ...]  # [start, end) in characters of what is learned, one per answer with text


class Renderer:
    """A Jinja chat template that shows its answers.

    Args:
        jinja: source of the template.
        name: how error messages call it.
        variables: what the template reads beside the messages (special tokens).
        end_tokens: special tokens; the one right behind an answer ends the turn and is learned.
        eos_token: learned also where white space stands between it and the answer (Llama-2's `answer </s>`).

    Raises:
        DataError: the template fails on a plain conversation of two rounds, or does not show its answers.
    """

    def __init__(
        self, jinja: str, name: str, variables: Mapping[str, Any], end_tokens: Sequence[str], eos_token: str | None
    ) -> None:
        self.jinja = jinja
        self.name = name
        self.variables = dict(variables)
        self.tracks = _GENERATION.search(jinja) is not None
        self.takes_parts = False
        self._lead = ""  # white space between the opening of a turn and its answer
        alternatives = [re.escape(token) for token in sorted(end_tokens, key=len, reverse=True)]
        if eos_token:
            alternatives.append(rf"\s*{re.escape(eos_token)}")
        self._end_of_turn = re.compile("|".join(alternatives) or "(?!)")
        self._ends = tuple(end_tokens)
        self._probe()

    @property
    def ends_turns(self) -> bool:
        """Whether an end-of-turn token is learned, so that generation can stop."""
        rendering = self.render(_PROBE)
        start, end = rendering.spans[-1]
        return rendering.text[start:end].rstrip().endswith(self._ends)

    def render(self, turns: Sequence[Turn]) -> Rendering:
        """The conversation as one text, with the spans that are learned.

        Raises:
            RowError: the template refuses the conversation, or changes an answer so that its place can't be known.
        """
        if self.tracks:
            text, spans = self._run(turns, track=True)
            spans = [(start, end) for start, end in spans if end > start]
        else:
            text = self._run(turns)[0]
            spans = [(self._with_lead(text, start), end) for start, end in self._marked_spans(turns, text)]
        return Rendering(text, tuple(self._with_end_of_turn(text, span) for span in _joined(spans)))

    def closing(self, text: str, span: tuple[int, int]) -> int:
        """Where, in a learned span of a text, the token that ends the turn begins; the span's end where there is
        none."""
        start, end = span
        written = text[start:end].rstrip()
        token = max((token for token in self._ends if written.endswith(token)), key=len, default=None)
        return end if token is None else start + len(written) - len(token)

    def opening(self, turns: Sequence[Turn]) -> str:
        """The conversation up to where the assistant is to speak (`add_generation_prompt`)."""
        return self._run(turns, add_generation_prompt=True)[0]

    def _marked_spans(self, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
        answers = sum(1 for turn in turns if turn.role == "assistant" and turn.text.strip())
        # Marks outside an answer's white space show all of it; a template that trims needs them inside.
        for inside in (False, True):
            pieces = _MARKS.split(self._run([_marked(turn, inside) for turn in turns])[0])
            if "".join(pieces[::2]) == text and pieces[1::2] == [_OPEN, _CLOSE] * answers:
                ends: list[int] = []
                place = 0
                for piece in pieces[:-1:2]:
                    place += len(piece)
                    ends.append(place)
                return list(zip(ends[::2], ends[1::2], strict=True))
        raise RowError(
            "conversation",
            f"{self.name} drops, repeats or rewrites an answer, so that what is learned can't be told from its text; "
            "use a template with {% generation %} blocks, or template: vicuna",
        )

    def _with_lead(self, text: str, start: int) -> int:
        return start - len(self._lead) if text.endswith(self._lead, 0, start) else start

    def _with_end_of_turn(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        start, end = span
        if self.tracks and text[start:end].endswith(self._ends):
            return span
        match = self._end_of_turn.match(text, end)
        return (start, match.end()) if match else span

    def _run(
        self, turns: Sequence[Turn], track: bool = False, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        messages = [{"role": turn.role, "content": self._content(turn.text)} for turn in turns]
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.jinja,
                return_assistant_tokens_mask=track,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except (TemplateError, TypeError) as error:
            raise RowError("conversation", f"{self.name} refuses it: {error}") from error
        return str(texts[0]), [(int(start), int(end)) for start, end in spans[0]] if track else []

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.takes_parts else text

    def _probe(self) -> None:
        """Find out whether content is text or parts, and that both answers are found where they stand."""
        reasons: list[str] = []
        for self.takes_parts in (False, True):
            try:
                rendering = self.render(_PROBE)
            except RowError as error:
                reasons.append(error.reason)
                continue
            learned = "".join(rendering.text[start:end] for start, end in rendering.spans)
            if all(turn.text in learned for turn in _PROBE if turn.role == "assistant"):
                self._lead = self._find_lead()
                return
            reasons.append(f"its {{% generation %}} blocks hold {learned!r}, not the answers")
        raise DataError(f"{self.name} can't be used for training: {reasons[0]}")

    def _find_lead(self) -> str:
        """Llama-2's prompt ends in `[/INST]` and its answer begins with a space: the model has to write that space, so
        it is learned, also where the tokenizer makes it a token of its own."""
        try:
            text, opening = self.render(_PROBE[:2]).text, self.opening(_PROBE[:1])
        except RowError:
            return ""
        start = text.find(_PROBE[1].text)
        between = text[len(opening) : start]
        return between if text.startswith(opening) and between.isspace() else ""


def _marked(turn: Turn, inside: bool) -> Turn:
    """The turn with marks around its answer. One without text has none: nothing is learned from it."""
    core = turn.text.strip()
    if turn.role != "assistant" or not core:
        return turn
    if not inside:
        return Turn(turn.role, f"{_OPEN}{turn.text}{_CLOSE}")
    start = turn.text.index(core)
    return Turn(turn.role, f"{turn.text[:start]}{_OPEN}{core}{_CLOSE}{turn.text[start + len(core) :]}")


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
