"""Whether a server reads a prompt as this run does, and speaks of the positions that it is thought to speak of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distilvlm.teachers.interface import TeacherError

from .dialects import Answer

DRIFT = 0.1
"""Nats at which two answers are of other weights or other positions: far more than another order of sums in bf16 makes,
far less than another model."""

AROUND = 5
"""Positions that are shown on either side of the first difference."""


def require_aligned(ids: Sequence[int], answer: Answer, is_picture: Sequence[bool], tokenizer: Any, url: str) -> None:
    """Compare token by token; a picture's positions only in number, since what stands there is the server's own affair.

    Args:
        ids: of the prompt, as this run has them.
        is_picture: of each, whether it stands for a part of a picture.
        tokenizer: this run's, for words.

    Raises:
        TeacherError: they differ; shows both sequences around the first difference.
    """
    theirs = answer.ids
    for position in range(max(len(ids), len(theirs))):
        ours = ids[position] if position < len(ids) else None
        if position < len(is_picture) and is_picture[position] and position < len(theirs):
            continue
        if position >= len(theirs) or ours != theirs[position]:
            raise TeacherError(
                f"{url} reads a prompt as other tokens than this run: {len(theirs)} instead of {len(ids)}, the first "
                f"difference is at position {position}\n"
                f"{_side_by_side(ids, theirs, position, is_picture, tokenizer)}\n"
                "Serve a model with this tokenizer and as many tokens per picture, and with a template or option that "
                "adds nothing (see docs/teachers.md); or teach from elsewhere: teacher.kind local or cached"
            )
    if len(answer.known) != len(theirs):
        raise TeacherError(f"{url} gives log-probabilities of {len(answer.known)} positions for {len(theirs)} tokens")
    for position in range(1, len(ids)):
        if not is_picture[position] and ids[position] not in answer.known[position]:
            likeliest = [_likeliest(entry) for entry in answer.known]
            raise TeacherError(
                f"{url} speaks of other positions than those of its tokens: at position {position} the token that "
                "stands there has no log-probability (below: the likeliest one there)\n"
                f"{_side_by_side(ids, likeliest, position, is_picture, tokenizer)}\n"
                "Every token of a prompt has one at its own position; a server that is off by one can't teach"
            )


def require_blind(first: Answer, second: Answer, url: str) -> None:
    """Two prompts differ in their last token: what is said of its position may not know which it is.

    A model that repeats what it has read gives the tokens that `require_aligned` looks for even when it speaks of the
    next position; this shows it still.

    Raises:
        TeacherError: it does know.
    """
    if (off := drift(first.known[-1:], second.known[-1:])) >= DRIFT:
        raise TeacherError(
            f"{url} speaks of other positions than those of its tokens: what it says of the last one depends on the "
            f"token that stands there (by {off:.2g} nats). A server that is off by one can't teach"
        )


def drift(before: Sequence[dict[int, float]], after: Sequence[dict[int, float]]) -> float:
    """How far log-probabilities of the same positions are apart: mean over ids that both know, in nats."""
    off = [
        abs(value - then[id])
        for now, then in zip(before, after, strict=False)
        for id, value in now.items()
        if id in then and value > -math.inf
    ]
    return sum(off) / len(off) if off else math.inf


def _likeliest(entry: dict[int, float]) -> int | None:
    return max(entry, key=entry.__getitem__, default=None)


def _side_by_side(
    ours: Sequence[int], theirs: Sequence[int | None], first: int, is_picture: Sequence[bool], tokenizer: Any
) -> str:
    lines = [f"    {'position':>8}  {'this run':<28}  the server"]
    for position in range(max(0, first - AROUND), min(max(len(ours), len(theirs)), first + AROUND + 1)):
        shown = position < len(ours) and is_picture[position]
        left = "part of a picture" if shown else _word(ours, position, tokenizer)
        mark = ">" if position == first else " "
        lines.append(f"  {mark} {position:>8}  {left:<28}  {_word(theirs, position, tokenizer)}")
    return "\n".join(lines)


def _word(ids: Sequence[int | None], position: int, tokenizer: Any) -> str:
    id = ids[position] if position < len(ids) else None
    if id is None:
        return "–"
    token = tokenizer.convert_ids_to_tokens(id) if 0 <= id < len(tokenizer) else None
    return f"{id} {token!r}"
