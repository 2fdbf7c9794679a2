"""Questions: every assistant turn of a record, asked on its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from distilvlm.data.records import PICTURE, Record, Turn


@dataclass(frozen=True, slots=True)
class Question:
    """One question, its pictures and the answer that counts as right."""

    record: Record  # the system's turns, the question's user turns and the answer
    turn: int  # 0-based number of the answer among the original record's answers

    @property
    def text(self) -> str:
        """What the user asks, without the marks of the pictures."""
        asked = (turn.text for turn in self.record.turns if turn.role == "user")
        return "\n".join(asked).replace(PICTURE, "").strip()

    @property
    def answer(self) -> str:
        return self.record.answers[-1]

    @property
    def place(self) -> tuple[str, int, int]:
        """(file, row, turn): the same question has the same place in two evaluations."""
        return self.record.key.file, self.record.key.row, self.turn


def questions_of(records: Iterable[Record]) -> Iterator[Question]:
    """Every assistant turn of every record as a question of its own, in order.

    A later turn of a conversation is asked without the turns before it: their true answers would help, the model's own
    would make one mistake count twice. It keeps the system's turns and all pictures of the record; pictures whose place
    is not in the question itself go in front of it, a line each. An assistant turn that no user turn precedes is asked
    with the pictures alone.
    """
    for record in records:
        system = tuple(turn for turn in record.turns if turn.role == "system")
        asked: list[Turn] = []
        number = 0
        for turn in record.turns:
            if turn.role == "user":
                asked.append(turn)
            elif turn.role == "assistant":
                turns = (*system, *_with_pictures(asked, len(record.images)), turn)
                yield Question(replace(record, turns=turns), number)
                asked = []
                number += 1


def _with_pictures(asked: list[Turn], pictures: int) -> list[Turn]:
    if sum(turn.text.count(PICTURE) for turn in asked) == pictures and asked:
        return asked
    bare = [replace(turn, text=turn.text.replace(PICTURE, "").strip()) for turn in asked] or [Turn("user", "")]
    front = f"{PICTURE}\n" * pictures
    return [replace(bare[0], text=front + bare[0].text), *bare[1:]]
