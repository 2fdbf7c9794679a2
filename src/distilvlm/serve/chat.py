"""A conversation in a terminal or through a pipe: lines are questions or commands, answers are written as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from distilvlm.data.geometry import PictureError, decode

from .interface import Busy, Engine, Failed, Message, Piece, Refused, Request

HELP = """\
/picture FILE  show a picture with the next question
/model NAME    let another of the models answer; alone: which there are
/reset         forget the conversation
/quit          leave, as the end of the input does
Ctrl-C stops an answer; what was said stays in the conversation."""


@dataclass
class Talk:
    """One conversation with an engine's models.

    Args:
        settings: how answers are drawn, and the model that begins; its conversation is what was said before.
        say: writes a part of an answer.
        tell: writes a line about the conversation, which is no part of it.
    """

    engine: Engine
    settings: Request
    say: Callable[[str], object]
    tell: Callable[[str], object]
    _shown: list[Image.Image] = field(default_factory=list)  # with the next question

    def run(self, lines: Iterable[str]) -> int:
        """Answer line by line; gives how many could not be answered or done."""
        failed = 0
        for line in lines:
            line = line.strip()
            if line in ("/quit", "/exit"):
                break
            if line:
                failed += not (self._command(line) if line.startswith("/") else self.ask(line))
        return failed

    def show(self, file: str) -> bool:
        """Have a picture stand before the next question."""
        try:
            self._shown.append(decode(str(Path(file).expanduser())))
        except PictureError as error:
            self.tell(str(error))
            return False
        self.tell(f"{file} stands before the next question")
        return True

    def ask(self, question: str) -> bool:
        """Ask, and write the answer. Whether there is one; without one the question is not part of the conversation."""
        before = self.settings
        text = "<image>\n" * len(self._shown) + question
        asked = replace(
            before, messages=(*before.messages, Message("user", text)), pictures=(*before.pictures, *self._shown)
        )
        said: list[str] = []
        began, last = time.monotonic(), None
        try:
            ticket = self.engine.submit(asked)
        except (Refused, Busy) as error:
            self.tell(f"not answered: {error}")
            return False
        try:
            for piece in ticket:
                last = piece
                said.append(piece.text)
                self.say(piece.text)
        except Failed as error:
            self.say("\n")
            self.tell(f"not answered: {error}")
            return False
        except KeyboardInterrupt:
            ticket.cancel()
            last = None
        self.say("\n")
        if any(said):
            self._shown = []
            self.settings = replace(asked, messages=(*asked.messages, Message("assistant", "".join(said))))
        self.tell(_summary(last, ticket.usage.completion_tokens, time.monotonic() - began))
        return True

    def _command(self, line: str) -> bool:
        command, _, given = line.partition(" ")
        given = given.strip()
        if command == "/picture" and given:
            return self.show(given)
        if command == "/reset" and not given:
            self._shown = []
            system = tuple(message for message in self.settings.messages if message.role == "system")
            self.settings = replace(self.settings, messages=system, pictures=())
            self.tell("forgotten")
            return True
        if command == "/model":
            return self._choose(given)
        self.tell(HELP)
        return command == "/help"

    def _choose(self, name: str) -> bool:
        names = [model.name for model in self.engine.models]
        if name not in names:
            told = [f"{one} (answers now)" if one == self.settings.model else one for one in names]
            self.tell(("there is no such model: " if name else "") + ", ".join(told))
            return not name
        self.settings = replace(self.settings, model=name)
        self.tell(f"{name} answers from here on")
        return True


def _summary(last: Piece | None, tokens: int, seconds: float) -> str:
    why = {None: "stopped, ", "stop": "", "length": "cut off, "}[None if last is None else last.finish]
    return f"{why}{tokens} tokens, {tokens / max(seconds, 1e-6):.1f} a second"
