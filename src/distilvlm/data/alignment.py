"""Which positions of a student's row and of a teacher's, of other tokens, say the same of the same answer.

Two models that spell a text with different tokens can be compared where both have read the same text and are about to
write what comes next: where a token of each begins at the same character of the answer, or ends the turn behind it.
Positions in between have no partner. Nothing is tokenised here; places are the tokenizers' own offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilvlm.data.batch import IGNORED
from distilvlm.data.template import Answer, Encoded


@dataclass(frozen=True)
class TeacherView:
    """How a teacher reads records whose rows are not the student's: its tokens, or its pictures, are others."""

    tokenizer: Any  # fast, with `<image>` as a special token
    placeholders: int  # positions per picture
    visual: Sequence[bool]  # [placeholders] False for a register
    size: int  # side of its canvas in pixels


def pairs(student: Encoded, teacher: Encoded) -> Tensor:
    """Positions of tokens that are learned and begin at the same place of the same answer, [pairs, 2] int64: student's
    and teacher's, both rising. What predicts them are the positions before.

    White space around an answer that only one of the templates writes is not of the answer; a token that begins in it
    and reaches into the answer begins where the answer does. Answers are paired in their order. Where the templates
    write different answers, or different numbers of them, nothing is paired.
    """
    found: list[tuple[int, int]] = []
    if len(student.answers) == len(teacher.answers):
        for ours, theirs in zip(student.answers, teacher.answers, strict=True):
            shared = _shared(_written(student, ours), _written(teacher, theirs))
            if shared is not None:
                before, after, length = shared
                mine = _places(student, ours, ours.begin + before, length)
                others = _places(teacher, theirs, theirs.begin + after, length)
                found += [(mine[place], others[place]) for place in sorted(mine.keys() & others.keys())]
    return torch.tensor(found, dtype=torch.int64).view(-1, 2)


def teachers_row(teacher: Encoded, paired: Tensor) -> Encoded:
    """A teacher's row as far as it is compared: only what has a partner keeps its label, and what stands behind the
    last partner and the last picture, which nothing before depends on, is left out.

    Args:
        paired: [pairs] positions of its tokens that have a partner.
    """
    labels = torch.full_like(teacher.labels, IGNORED)
    labels[paired] = teacher.labels[paired]
    places = torch.cat([paired, teacher.placeholder_positions])
    length = int(places.max()) + 1 if places.numel() else 1
    return Encoded(teacher.input_ids[:length], labels[:length], teacher.placeholder_positions)


def _written(encoded: Encoded, answer: Answer) -> str:
    return encoded.text[answer.begin : answer.close]


def _shared(ours: str, theirs: str) -> tuple[int, int, int] | None:
    """Where in each of two spellings of an answer their common text begins, and its length; None if they differ in more
    than the white space around."""
    core = ours.strip()
    if core != theirs.strip():
        return None
    leads = [text[: len(text) - len(text.lstrip())] for text in (ours, theirs)]
    tails = [text[len(lead) + len(core) :] for text, lead in zip((ours, theirs), leads, strict=True)]
    lead = _common(leads[0][::-1], leads[1][::-1])
    return len(leads[0]) - lead, len(leads[1]) - lead, lead + len(core) + _common(*tails)


def _common(first: str, second: str) -> int:
    """Characters that two texts begin with alike."""
    same = [one == other for one, other in zip(first, second, strict=False)]
    return same.index(False) if False in same else len(same)


def _places(encoded: Encoded, answer: Answer, start: int, length: int) -> dict[int, int]:
    """Place in an answer's common text, which begins at character `start` -> position of the learned token that begins
    there. The token that ends the turn stands at `length`."""
    assert encoded.spans is not None
    begins, ends = encoded.spans.numpy().T  # [positions] each
    # A token that begins within a character, or before an earlier one has ended, says nothing of a whole text.
    read = np.maximum.accumulate(np.concatenate([[0], ends]))[:-1]
    usable = (begins >= read) & (ends > begins) & (encoded.labels != IGNORED).numpy()
    usable[:1] = False  # nothing predicts it
    places: dict[int, int] = {}
    for position in np.flatnonzero(usable & (begins < start + length) & (ends > start)).tolist():
        begin = int(begins[position])
        if begin >= start:
            places[begin - start] = position
        elif encoded.text[begin:start].isspace():
            places[0] = position
    closing = np.flatnonzero(usable & (begins == answer.close))
    if answer.close < answer.end and closing.size:
        places[length] = int(closing[0])
    return places
