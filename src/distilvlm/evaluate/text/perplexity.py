"""Perplexity of held-out text: how well a model predicts what people wrote, token by token and byte by byte.

A text is read in windows that overlap: each predicts its last `stride` tokens from all that stand before them in the
window. So every token is predicted once, the first one behind BOS (or the end of another text), and all but those of a
text's beginning from at least window - stride tokens. Models with different tokenizers can be compared per byte only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distilvlm.data.batch import SampleKey
from distilvlm.data.problems import DataError
from distilvlm.data.records import Record, Turn
from distilvlm.data.rows import rows
from distilvlm.evaluate.measures import Figure, Measure
from distilvlm.evaluate.questions import Question
from distilvlm.evaluate.report import Evaluation, score
from distilvlm.evaluate.text.likelihood import Likelihood, Passage, Progress, likelihoods
from distilvlm.evaluate.text.tokens import Tokens, context, harmless, opening, tokenised
from distilvlm.models.vlm import VLM

WINDOW = 1024
"""Tokens, where the model's context is not shorter."""


@dataclass(frozen=True)
class Text:
    """One held-out text."""

    file: str
    row: int
    text: str


@dataclass(frozen=True)
class _Window:
    passage: Passage
    question: Question  # its text is the part that is predicted
    bytes: int


def read_texts(path: str | Path, field: str = "text") -> list[Text]:
    """A text per row of a JSON list or JSONL file (in `field`), or a plain text file, or every one of a directory.

    Raises:
        DataError: no text; a row without one, which is named.
    """
    path = Path(path)
    if path.is_dir():
        found = [one for file in sorted(path.rglob("*.txt")) for one in read_texts(file)]
    elif path.suffix in (".json", ".jsonl"):
        found = []
        for number, row in enumerate(rows(path)):
            value = row.get(field) if isinstance(row, Mapping) else None
            if not isinstance(value, str):
                raise DataError(f"{path}, row {number}: no text in the field '{field}'")
            found.append(Text(str(path), number, value))
    else:
        try:
            found = [Text(str(path), 0, path.read_text(encoding="utf-8"))]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} can't be read as text: {error}") from None
    found = [replace(one, text=harmless(one.text, f"{one.file}, row {one.row}")) for one in found if one.text.strip()]
    if not found:
        raise DataError(f"{path} holds no text")
    return found


def _summed(transform: Any, name: str, title: str, parts: Any, about: str, headline: bool = True) -> Figure:
    return Figure(name, title, parts, "lower", about, percent=False, headline=headline, transform=transform)


FIGURES = (
    _summed(
        np.exp,
        "perplexity",
        "perplexity per token",
        lambda one: (-one.details["log_likelihood"], one.details["tokens"]),
        "How many tokens a model wavers between, on average. Of models with the same tokenizer.",
    ),
    _summed(
        np.exp,
        "byte_perplexity",
        "perplexity per byte",
        lambda one: (-one.details["log_likelihood"], one.details["bytes"]),
        "The same per byte of text, whatever the tokenizer.",
    ),
    _summed(
        None,
        "bits_per_byte",
        "bits per byte",
        lambda one: (-one.details["log_likelihood"] / math.log(2), one.details["bytes"]),
        "Size of the text, compressed with the model.",
        headline=False,
    ),
)


def measure(found: Mapping[tuple[str, int, int], tuple[Likelihood, int]]) -> Measure:
    """The measure of windows whose likelihood and number of bytes are known, by their place."""

    def judge(question: Question, prediction: str) -> Mapping[str, Any]:
        known, size = found[question.place]
        return {
            "log_likelihood": known.total,
            "tokens": known.tokens,
            "bytes": size,
            "right": False,  # nothing is right or wrong here; a report wants to be told
            "verdict": f"perplexity {math.exp(-known.total / known.tokens):.2f}",
        }

    return Measure("perplexity", FIGURES, judge)


PERPLEXITY = measure({})
"""The measure of windows that were predicted before, and are read from a file (`report.rescored`)."""


def perplexity(
    vlm: VLM,
    texts: Sequence[Text],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict every token of the texts in the model's active workflow. Intervals draw windows.

    Args:
        window: tokens that are read at once; default: WINDOW, or the model's context where that is shorter.
        stride: tokens that a window predicts; default: half of the window.
        out: file for one JSON line per window.

    Raises:
        DataError: a window that is longer than the model's context, or a stride that is longer than the window.
    """
    limit = context(vlm)
    window = window or min(WINDOW, limit or WINDOW)
    stride = stride or max(1, window // 2)
    if not 1 <= stride <= window or window > (limit or window):
        raise DataError(f"window {window}, stride {stride}: the context is {limit}, a stride is at most a window")
    tokens = tokenised(vlm, [one.text for one in texts])
    windows = [each for one, ids in zip(texts, tokens, strict=True) for each in _windows(vlm, one, ids, window, stride)]
    found = likelihoods(vlm, [one.passage for one in windows], batch_size=batch_size, progress=progress)
    known = {one.question.place: (each, one.bytes) for one, each in zip(windows, found, strict=True)}
    questions = [one.question for one in windows]
    evaluation = score(questions, [""] * len(questions), measure=measure(known))
    if out is not None:
        evaluation.write(out)
    return evaluation


def _windows(vlm: VLM, text: Text, tokens: Tokens, window: int, stride: int) -> Iterator[_Window]:
    first = tokens.behind(0)  # behind what the tokenizer puts in front by itself
    ids = (opening(vlm), *tokens.ids[first:])
    ends = [0, *tokens.ends[first:]]
    for number, start in enumerate(range(1, len(ids), stride)):
        end = min(start + stride, len(ids))
        begin = max(0, end - 1 - window)
        part = text.text[ends[start - 1] : ends[end - 1] if end < len(ids) else None]
        record = Record(SampleKey("text", text.file, text.row), str(text.row), (), (Turn("assistant", part),))
        yield _Window(Passage(ids[begin:end], start - begin), Question(record, number), len(part.encode()))
