"""Multiple choice by log-likelihood: of several continuations, the one that the model finds most likely.

Three ways to compare continuations, all told: by their sum (accuracy, "acc" of the usual harnesses), per character
("acc_norm") and per token. A question's options are compared under the same prompt, with as many examples before it as
the model's context has room for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distilvlm.data.batch import SampleKey
from distilvlm.data.problems import DataError
from distilvlm.data.records import Record, Turn
from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.questions import Question
from distilvlm.evaluate.report import Evaluation, score
from distilvlm.evaluate.text.likelihood import Likelihood, Passage, Progress, likelihoods
from distilvlm.evaluate.text.tokens import Tokens, context, harmless, opening, tokenised
from distilvlm.models.vlm import VLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A question with its options.

    Args:
        pairs: for each option, what is read and what is then judged: usually one prompt and each option behind a space;
            where the option stands inside of a sentence, its beginning with each option and the same rest.
        head, shots: what stands before that: instructions, and solved examples, of which the last go first where the
            context is short.
    """

    question: Question  # its answer is the right option; meta.options are all
    right: int
    pairs: tuple[tuple[str, str], ...]
    head: str = ""
    shots: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        place: tuple[str | Path, int],
        task: str,
        shown: str,
        options: Sequence[str],
        right: int,
        pairs: Sequence[tuple[str, str]],
        head: str = "",
        shots: Sequence[str] = (),
        subject: str | None = None,
    ) -> Choice:
        """Args: place: file and row; shown: the question as people read it; subject: of an exam."""
        file, row = place

        def safe(text: str) -> str:
            return harmless(text, f"{file}, row {row}")

        turns = (Turn("user", shown), Turn("assistant", options[right]))
        record = Record(SampleKey(task, str(file), row), str(row), (), turns)
        question = Question(record, 0, {"task": task, "subject": subject, "options": list(options)})
        judged = tuple((safe(read), safe(option)) for read, option in pairs)
        return cls(question, right, judged, safe(head), tuple(map(safe, shots)))

    def prompt(self, shots: int) -> str:
        return self.head + "".join(self.shots[:shots])


@dataclass(frozen=True)
class Weighed:
    """What a model makes of a question's options."""

    likelihoods: tuple[Likelihood, ...]
    shots: int  # examples that had room


def _softmax(one: Answered) -> float:
    """The right option's share of the probability of all options."""
    totals = np.array(one.details["log_likelihoods"])
    shares = np.exp(totals - totals.max())
    return float(shares[one.details["truth"]] / shares.sum())


FIGURES = (
    Figure(
        "acc",
        "accuracy",
        lambda one: (one.details["right"], 1),
        about="Questions whose right option is the most likely one (sum of its tokens' log-probabilities).",
    ),
    Figure(
        "acc_norm",
        "accuracy, per character",
        lambda one: (one.details["per_character"] == one.details["truth"], 1),
        about="The same with log-probabilities divided by the option's length: long options are less likely as such.",
    ),
    Figure(
        "acc_token",
        "accuracy, per token",
        lambda one: (one.details["per_token"] == one.details["truth"], 1),
        about="The same per token of the option.",
        headline=False,
    ),
    Figure(
        "probability",
        "probability of the right option",
        lambda one: (_softmax(one), 1),
        about="Its share of the probability of all options: moves before an answer does.",
        headline=False,
    ),
    Figure(
        "chance",
        "chance",
        lambda one: (1 / len(one.details["options"]), 1),
        better="neither",
        about="What guessing gets.",
        headline=False,
    ),
)


def measure(weighed: Mapping[tuple[str, int, int], Weighed], choices: Sequence[Choice]) -> Measure:
    """The measure of questions whose options were weighed, by place. Several tasks are told apart; of one exam its
    subjects are."""
    known = {choice.question.place: choice for choice in choices}
    kind = "task" if len({choice.question.meta["task"] for choice in choices}) > 1 else "subject"

    def judge(question: Question, prediction: str) -> Mapping[str, Any]:
        choice, found = known[question.place], weighed[question.place]
        each = found.likelihoods
        totals = [one.total for one in each]
        lengths = [len(continuation.strip()) for _, continuation in choice.pairs]
        right = totals.index(max(totals)) == choice.right
        return {
            "category": question.meta[kind],
            "options": question.meta["options"],
            "truth": choice.right,
            "log_likelihoods": totals,
            "tokens": [one.tokens for one in each],
            "per_character": _best(totals, lengths),
            "per_token": _best(totals, [one.tokens for one in each]),
            "shots": found.shots,
            "right": right,
            "verdict": "right" if right else "wrong",
        }

    return Measure("choices", FIGURES, judge, category="category")


CHOICES = measure({}, ())
"""The measure of answers that were weighed before, and are read from a file (`report.rescored`)."""


def _best(totals: Sequence[float], lengths: Sequence[int]) -> int:
    each = [total / length for total, length in zip(totals, lengths, strict=True)]
    return each.index(max(each))


def choose(
    vlm: VLM,
    choices: Sequence[Choice],
    *,
    batch_size: int = 16,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Weigh the options of every question in the model's active workflow.

    Args:
        out: file for one JSON line per question, with every option's log-likelihood.
        progress: as of `likelihoods`.

    Raises:
        DataError: no question, or an option that the context has no room for.
    """
    if not choices:
        raise DataError("there is no question to choose an answer to")
    found = weigh(vlm, choices, batch_size, progress)
    weighed = {choice.question.place: one for choice, one in zip(choices, found, strict=True)}
    predictions = [preferred(choice, one) for choice, one in zip(choices, found, strict=True)]
    evaluation = score([choice.question for choice in choices], predictions, measure=measure(weighed, choices))
    if out is not None:
        evaluation.write(out)
    return evaluation


def weigh(vlm: VLM, choices: Sequence[Choice], batch_size: int = 16, progress: Progress | None = None) -> list[Weighed]:
    """The likelihood of every question's options. Arguments and errors as `choose`."""
    passages, shots = _passages(vlm, choices)
    flat = iter(likelihoods(vlm, [one for each in passages for one in each], batch_size=batch_size, progress=progress))
    return [
        Weighed(tuple(next(flat) for _ in choice.pairs), count) for choice, count in zip(choices, shots, strict=True)
    ]


def preferred(choice: Choice, weighed: Weighed) -> str:
    """The option that is likeliest."""
    totals = [one.total for one in weighed.likelihoods]
    return choice.question.meta["options"][totals.index(max(totals))]


def _passages(vlm: VLM, choices: Sequence[Choice]) -> tuple[list[list[Passage]], list[int]]:
    """For each question, its options' tokens and how many examples stand before them.

    Where not even the question alone has room, its beginning is cut off, and that is said.
    """
    limit = context(vlm)
    shots = [len(choice.shots) for choice in choices]
    passages: list[list[Passage]] = [[] for _ in choices]
    waiting = list(range(len(choices)))
    cut = fewer = 0
    while waiting:
        texts = [choices[n].prompt(shots[n]) + a + b for n in waiting for a, b in choices[n].pairs]
        tokens = iter(tokenised(vlm, texts))
        longer: list[int] = []
        for number in waiting:
            choice = choices[number]
            before = len(choice.prompt(shots[number]))
            made = [_passage(vlm, next(tokens), before + len(read)) for read, _ in choice.pairs]
            if limit is None or all(len(one.ids) - 1 <= limit for one in made):
                passages[number] = made
            elif shots[number]:
                fewer += shots[number] == len(choice.shots)
                shots[number] -= 1
                longer.append(number)
            else:
                passages[number] = [_cut(one, limit, choice) for one in made]
                cut += 1
        waiting = longer
    if fewer or cut:
        logger.warning(
            "the context of %d tokens is short: %d questions have fewer examples, and of %d the beginning was cut off",
            limit,
            fewer,
            cut,
        )
    return passages, shots


def _passage(vlm: VLM, tokens: Tokens, characters: int) -> Passage:
    start = tokens.behind(characters)
    if start == 0:
        return Passage((opening(vlm), *tokens.ids), 1)
    return Passage(tuple(tokens.ids), start)


def _cut(passage: Passage, limit: int, choice: Choice) -> Passage:
    away = len(passage.ids) - 1 - limit
    if away >= passage.start:
        key = choice.question.record.key
        raise DataError(f"{key.file}, row {key.row}: an option alone is longer than the model's context of {limit}")
    return Passage(passage.ids[max(away, 0) :], passage.start - max(away, 0)) if away > 0 else passage
