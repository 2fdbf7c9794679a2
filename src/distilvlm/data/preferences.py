"""Rows of preferences: pairs of a chosen and a rejected answer, and single answers that were rated.

A pair has its prompt once (`prompt`, `conversations` or `messages`, beside two answers) or in both of its whole
conversations; a rated answer is `completion` behind a prompt, or the end of a conversation, with a `label`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distilvlm.data.problems import RowError
from distilvlm.data.records import Preferences, Record
from distilvlm.data.turns import Draft, Form, Placed, conversation, kind

PROMPTS = ("prompt", "conversations", "messages")
"""Fields of a prompt; the first that a row has."""

WORDS: dict[Preferences | None, str] = {
    None: "a plain conversation",
    "pairs": "a pair of answers (chosen, rejected)",
    "rated": "a rated answer (label: true or false)",
}

# Keys of a turn, and its two speakers.
_TURN: dict[Form, tuple[str, str, str, str]] = {
    "llava": ("from", "value", "human", "gpt"),
    "messages": ("role", "content", "user", "assistant"),
}


def family(row: dict[str, Any]) -> Preferences | None:
    """What a row's keys say that it is."""
    if "chosen" in row or "rejected" in row:
        return "pairs"
    if isinstance(row.get("label"), bool) or ("label" in row and "completion" in row):
        return "rated"
    return None


def check_family(row: dict[str, Any], first: Preferences | None) -> None:
    """Raise `RowError` for a row that is not of the kind of its file's first row."""
    found = family(row)
    if found != first:
        field = "chosen" if "pairs" in (found, first) else "label"
        raise RowError(field, f"the row is {WORDS[found]}, the first one {WORDS[first]}: a file holds one kind")


def form(row: dict[str, Any]) -> Form | None:
    """LLaVA's or OpenAI's form, told from a row of preferences; None where neither is to be seen."""
    if "conversations" in row:
        return "llava"
    for key in ("prompt", "chosen", "rejected", "completion"):
        given = row.get(key)
        turn = given[0] if isinstance(given, list) and given else given
        if isinstance(turn, dict):
            return "llava" if "from" in turn else "messages"
    return "messages" if "prompt" in row or "messages" in row else None


def draft(row: dict[str, Any], form: Form, root: Path | None) -> Draft:
    """A row of preferences as a draft of its record: both sides with all the care that a plain conversation gets.

    Raises:
        RowError: what is wrong with a side, or with the two of them together.
    """
    first, *second = sides(row, form)
    made = _side(row, form, first, root)
    if not second:
        made.desirable = label(row)
        return made
    other = _side(row, form, second[0], root)
    if other.images != made.images:
        raise RowError(
            "rejected", f"shows the pictures {other.images}, chosen {made.images}: both must show the same, in order"
        )
    if other.turns[:-1] != made.turns[:-1]:
        raise RowError("rejected", "has another prompt than chosen: only the last answer may differ")
    if other.turns[-1].text.strip() == made.turns[-1].text.strip():
        raise RowError("rejected", "is the same answer as chosen: nothing to prefer")
    made.other = other.turns
    made.neutralised += other.neutralised
    return made


def sides(row: dict[str, Any], form: Form) -> list[tuple[str, Placed]]:
    """(field, whole conversation) of both sides of a pair, or of a rated answer. Raises `RowError`."""
    key = next((name for name in PROMPTS if row.get(name) is not None), None)
    prompt = [] if key is None else _turns(row, key, form, speaker=2)
    if family(row) == "pairs":
        return [(side, _whole(row, side, prompt, form)) for side in ("chosen", "rejected")]
    if "completion" in row or key in (None, "prompt"):
        return [("completion", _whole(row, "completion", prompt, form))]
    return [(key, prompt)]


def label(row: dict[str, Any]) -> bool:
    """Whether a rated answer is a good one. Raises `RowError`."""
    given = row.get("label")
    if not isinstance(given, bool):
        raise RowError("label", f"is {kind(given)}, not true (a good answer) or false")
    return given


def _side(row: dict[str, Any], form: Form, side: tuple[str, Placed], root: Path | None) -> Draft:
    key, turns = side
    made = conversation(row, form, key, turns, root)
    last = made.turns[-1]
    if last.role != "assistant" or not last.text.strip():
        what = f"is the {last.role}'s" if last.role != "assistant" else "has no text"
        raise RowError(turns[-1][0], f"{what}: a conversation that is rated or compared ends with its answer")
    return made


def _whole(row: dict[str, Any], side: str, prompt: Placed, form: Form) -> Placed:
    """The prompt and the answer of a side, which may hold both itself."""
    turns = _turns(row, side, form, speaker=3)
    speakers = [turn.get(_TURN[form][0]) if isinstance(turn, dict) else None for _, turn in turns]
    asks = [speaker in ("human", "user", "system", "developer") for speaker in speakers]
    if not prompt:
        if not any(asks):
            raise RowError(side, f"holds no question, and there is no prompt ({', '.join(PROMPTS)})")
        return turns
    if not asks[0]:
        return [*prompt, *turns]
    before = [turn for _, turn in turns[:-1]]
    if before[-len(prompt) :] != [turn for _, turn in prompt]:
        field = prompt[0][0].partition("[")[0]
        raise RowError(side, f"holds a whole conversation, but its prompt is not '{field}': leave one of them out")
    return turns


def _turns(row: dict[str, Any], key: str, form: Form, speaker: int) -> Placed:
    given = row.get(key)
    if isinstance(given, list) and given:
        return [(f"{key}[{position}]", turn) for position, turn in enumerate(given)]
    if isinstance(given, dict):
        return [(key, given)]
    if isinstance(given, str):
        keys = _TURN[form]
        return [(key, {keys[0]: keys[speaker], keys[1]: given})]
    raise RowError(key, f"is {kind(given)}, not text, a turn or a list of turns")


def of_side(error: RowError, record: Record, side: str) -> RowError:
    """A pair's error says on which side."""
    is_pair = record.preferences == "pairs" and error.field == "conversation"
    return RowError(side, error.reason) if is_pair else error
