"""What several models reply to the same questions: how long, and side by side to be read.

IAA's authors observe that a language model which was tuned on pictures answers shorter, whatever its scores say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilvlm.data import raise_or_quarantine, read
from distilvlm.data.batch import SampleKey
from distilvlm.data.problems import DataError
from distilvlm.data.records import Record, Turn
from distilvlm.data.template import Kind
from distilvlm.evaluate.generate import answer
from distilvlm.evaluate.measures import Figure, Measure
from distilvlm.evaluate.questions import Question, questions_of
from distilvlm.evaluate.report import Evaluation, score
from distilvlm.evaluate.text.likelihood import Progress
from distilvlm.evaluate.text.tokens import harmless
from distilvlm.models.files import write_whole
from distilvlm.models.vlm import VLM
from distilvlm.recipe import SourceSpec

PROMPTS = (
    "What is the difference between weather and climate?",
    "Give me three tips for sleeping better.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain to a ten-year-old how a bicycle stays upright.",
    "My plant's leaves are turning yellow. What could be the reasons?",
    "Plan a day in a city that I have never been to, without spending much.",
    "What are the advantages and disadvantages of working from home?",
    "Write a polite e-mail that asks a landlord to repair a heater.",
    "Why is the sky blue?",
    "How do I make a simple tomato soup?",
    "Name a few famous inventions of the 19th century and say why they mattered.",
    "What should I consider before I adopt a dog?",
)
"""Asked where no file is given."""


def read_prompts(path: str | Path | None = None) -> list[Question]:
    """Questions without pictures: those of LLaVA rows or messages, or the lines of a text file; default: PROMPTS.

    Raises:
        DataError: rows that can't be used, or that show pictures; no question.
    """
    if path is not None and Path(path).suffix in (".json", ".jsonl"):
        source = read(SourceSpec(path=str(path)), Path(path).stem)
        raise_or_quarantine(source.bad, "fatal")
        found = list(questions_of(source.records))
    else:
        found = [_question(str(path or "prompts"), *numbered) for numbered in enumerate(_lines(path))]
    if not found:
        raise DataError(f"{path} holds no question")
    for question in found:
        if question.record.images:
            key = question.record.key
            raise DataError(f"{key.file}, row {key.row} shows a picture: dialogues are of text alone; leave it out")
    return found


def _lines(path: str | Path | None) -> Sequence[str]:
    if path is None:
        return PROMPTS
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as a text of one question a line: {error}") from None


def _question(file: str, row: int, text: str) -> Question:
    turns = (Turn("user", harmless(text, f"{file}, row {row}")), Turn("assistant", ""))
    return Question(Record(SampleKey("prompts", file, row), str(row), (), turns), 0)


FIGURES = (
    Figure(
        "words",
        "words per reply",
        lambda one: (one.details["words"], 1),
        better="neither",
        percent=False,
        about="Split at spaces: of languages that write none, look at the tokens.",
    ),
    Figure(
        "tokens",
        "tokens per reply",
        lambda one: (one.details["tokens"], 1),
        better="neither",
        percent=False,
        about="Of the model's own tokenizer.",
    ),
    Figure(
        "cut",
        "cut at the limit",
        lambda one: (one.details["cut"], 1),
        better="lower",
        about="Replies that had not come to an end: their length is the limit's.",
    ),
    Figure("empty", "empty", lambda one: (not one.details["words"], 1), better="lower", about="No word at all."),
)


def measure(vlm: VLM, limit: int) -> Measure:
    """The measure of a model's replies of `limit` tokens at most."""

    def judge(question: Question, prediction: str) -> Mapping[str, Any]:
        assert vlm.tokenizer is not None  # a model that replies has one
        tokens, words = len(vlm.tokenizer(prediction, add_special_tokens=False)["input_ids"]), len(prediction.split())
        cut = tokens >= limit - 1  # told from the text, whose space at the ends is gone
        told = f"{words} word{'' if words == 1 else 's'}"
        return {"words": words, "tokens": tokens, "cut": cut, "right": bool(words), "verdict": told}

    return Measure("replies", FIGURES, judge)


def reply(
    vlm: VLM,
    questions: Sequence[Question],
    *,
    template: Kind = "chat",
    batch_size: int = 8,
    max_new_tokens: int = 256,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The model's greedy replies in its active workflow, and how long they are.

    Args:
        template: how the questions are written; "chat" is the model's own way.
        out: file for one JSON line per reply.
    """
    texts = answer(
        vlm,
        [question.record for question in questions],
        template,
        "square",  # there are no pictures
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    evaluation = score(questions, texts, measure=measure(vlm, max_new_tokens))
    if out is not None:
        evaluation.write(out)
    return evaluation


def side_by_side(evaluations: Mapping[str, Evaluation]) -> str:
    """Every question with every model's reply, as Markdown."""
    first = next(iter(evaluations.values()))
    parts: list[str] = []
    for number, sample in enumerate(first.samples):
        parts.append(f"## {sample.question}")
        for name, evaluation in evaluations.items():
            given = evaluation.samples[number]
            quoted = "\n".join(f"> {line}".rstrip() for line in given.prediction.splitlines()) or "> (nothing)"
            parts.append(f"**{name}** ({given.details['verdict']})\n\n{quoted}")
    return "\n\n".join(parts) + "\n"


def write_side_by_side(evaluations: Mapping[str, Evaluation], path: str | Path) -> None:
    write_whole(path, side_by_side(evaluations).encode())
