"""Questions: every assistant turn of a record, asked on its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distilvlm.data.batch import BadRow, SampleKey
from distilvlm.data.markers import neutralise
from distilvlm.data.readers import Source
from distilvlm.data.records import PICTURE, Record, Turn
from distilvlm.data.rows import rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """One question, its pictures and the answer that counts as right."""

    record: Record  # the system's turns, the question's user turns and the answer
    turn: int  # 0-based number of the answer among the original record's answers
    meta: Mapping[str, Any] = field(default_factory=dict)  # what else its file says of it

    @classmethod
    def of(
        cls,
        place: tuple[str | Path, int],
        identity: str,
        pictures: Sequence[str],
        text: str,
        answer: str,
        meta: Mapping[str, Any],
        turn: int = 0,
    ) -> Question:
        """A question about `pictures`, which stand before `text`, a line each, unless it has their marks.

        Args:
            place: file and row.

        Raises:
            RowError: text that no tokenizer takes.
        """
        file, row = place
        parts = [neutralise(part, "question")[0] for part in text.split(PICTURE)]
        front = f"{PICTURE}\n" * len(pictures) if len(parts) == 1 else ""
        turns = (Turn("user", front + PICTURE.join(parts)), Turn("assistant", answer))
        return cls(Record(SampleKey(Path(file).stem, str(file), row), identity, tuple(pictures), turns), turn, meta)

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


@dataclass(frozen=True)
class Asked:
    """The questions of one or several files, in order."""

    name: str  # of the file, or the files
    questions: tuple[Question, ...]
    bad: tuple[BadRow, ...] = ()  # rows that can't be asked


def asked_of(source: Source) -> Asked:
    """The questions of a data source, each with the `meta` of its row; of a conversation that
    `data convert --one-per-picture` joined, with that of its own turn.

    Raises:
        DataError: the file can't be read again.
    """
    metas: dict[int, Mapping[str, Any]] = {}
    for row, value in enumerate(rows(source.spec.path)):
        if isinstance(value, Mapping) and isinstance(meta := value.get("meta"), Mapping):
            metas[row] = meta
    questions = (
        replace(one, meta=_of_turn(metas.get(one.record.key.row, {}), one.turn)) for one in questions_of(source.records)
    )
    return Asked(source.spec.path, tuple(questions), tuple(source.bad))


def _of_turn(meta: Mapping[str, Any], turn: int) -> Mapping[str, Any]:
    turns = meta.get("turns")
    return turns[turn] if isinstance(turns, list) and turn < len(turns) and isinstance(turns[turn], Mapping) else meta


def questions_of(records: Iterable[Record]) -> Iterator[Question]:
    """Every assistant turn of every record as a question of its own, in order.

    A later turn of a conversation is asked without the turns before it: their true answers would help, the model's own
    would make one mistake count twice. It keeps the system's turns and all pictures of the record; pictures whose place
    is not in the question itself go in front of it, a line each. An assistant turn that no user turn precedes is asked
    with the pictures alone.

    Of a pair, the chosen answer is the right one. One that is rated undesirable is nobody's right answer: it is not
    asked for, and counted in the log.
    """
    undesirable = 0
    for record in records:
        system = tuple(turn for turn in record.turns if turn.role == "system")
        asked: list[Turn] = []
        number = 0
        for turn in record.turns:
            if turn.role == "user":
                asked.append(turn)
            elif turn.role == "assistant" and record.desirable is False and turn is record.turns[-1]:
                undesirable += 1
            elif turn.role == "assistant":
                turns = (*system, *_with_pictures(asked, len(record.images)), turn)
                yield Question(replace(record, turns=turns), number)
                asked = []
                number += 1
    if undesirable:
        logger.warning("%d answers rated undesirable are not asked for: they are not right", undesirable)


def _with_pictures(asked: list[Turn], pictures: int) -> list[Turn]:
    if sum(turn.text.count(PICTURE) for turn in asked) == pictures and asked:
        return asked
    bare = [replace(turn, text=turn.text.replace(PICTURE, "").strip()) for turn in asked] or [Turn("user", "")]
    front = f"{PICTURE}\n" * pictures
    return [replace(bare[0], text=front + bare[0].text), *bare[1:]]
