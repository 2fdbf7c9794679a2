"""A model asked a suite: in batches, by one process or several, resumed where it was killed, and scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distilvlm.data.batch import BadRow
from distilvlm.data.geometry import Geometry
from distilvlm.data.problems import DataError, raise_or_quarantine
from distilvlm.data.template import Kind
from distilvlm.evaluate.generate import Features, answer
from distilvlm.evaluate.measures import Measure
from distilvlm.evaluate.questions import Asked, Question
from distilvlm.evaluate.report import Evaluation, rescored, score
from distilvlm.evaluate.suites.catalogue import TextSuite
from distilvlm.evaluate.suites.ledger import Entry, Ledger
from distilvlm.evaluate.suites.processes import Processes, launched
from distilvlm.evaluate.suites.suite import Opened
from distilvlm.evaluate.text.choices import Choice, Weighed, measure, preferred, weigh
from distilvlm.evaluate.text.likelihood import Likelihood
from distilvlm.models import parts
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.vlm import VLM

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], object]

AT_A_TIME = 16
"""Batches of text questions between two entries in the ledger."""


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    Args:
        out: OUT.jsonl, for one line per question; the asking can be killed and resumed with it. None keeps nothing.
        features: kept features of the vision tower.
        on_bad_row: whether a question that can't be asked stops the asking.
        progress: called with the number of questions that this process has answered, and its total.
    """

    template: Kind = "chat"
    batch_size: int = 16
    features: Features | None = None
    out: Path | None = None
    on_bad_row: Literal["fatal", "quarantine"] = "fatal"
    progress: Progress | None = None


_USUAL = Asking()


def ask_suite(vlm: VLM, opened: Opened, geometry: Geometry, asking: Asking = _USUAL) -> Evaluation | None:
    """Ask a suite's questions of the model's active workflow and score the answers, over pictures.

    Of several processes each asks its share; the first one alone writes, and returns the evaluation (others None).

    Raises:
        DataError: a question that can't be asked, unless quarantined; `asking.out` has answers of another model or to
            something else.
    """
    asked = opened.asked
    raise_or_quarantine(asked.bad, asking.on_bad_row)

    def answers(numbers: Sequence[int], add: Callable[..., None]) -> None:
        questions = [asked.questions[number] for number in numbers]
        rejected: list[BadRow] = []

        def said(index: int, text: str) -> None:
            add({"n": numbers[index], "prediction": text})

        answer(
            vlm,
            [one.record for one in questions],
            asking.template,
            geometry,
            batch_size=asking.batch_size,
            max_new_tokens=opened.max_new_tokens,
            features=asking.features,
            bad=None if asking.on_bad_row == "fatal" else rejected,
            progress=asking.progress,
            said=said,
        )
        unusable = {row.key: row for row in rejected}
        for number, one in zip(numbers, questions, strict=True):
            if (row := unusable.get(one.record.key)) is not None:
                add({"n": number, "field": row.field, "reason": row.reason})

    def scored(entries: Mapping[int, Entry]) -> Evaluation:
        given: list[tuple[Question, str]] = []
        bad = list(asked.bad)
        for number, one in enumerate(asked.questions):
            entry = entries[number]
            if "prediction" in entry:
                given.append((one, entry["prediction"]))
            else:
                bad.append(BadRow(one.record.key, entry["field"], entry["reason"]))
        if not given:
            raise DataError(f"{asked.name}: no question can be asked ({len(bad)} rows can't be used)")
        questions, predictions = [one for one, _ in given], [text for _, text in given]
        return score(questions, predictions, measure=opened.measure, by_picture=True, bad=list(dict.fromkeys(bad)))

    identity = {**opened.identity, "template": asking.template}
    return _asked(vlm, identity, len(asked.questions), asking, (opened.measure, True), answers, scored)


def weigh_suite(vlm: VLM, suite: TextSuite, choices: Sequence[Choice], asking: Asking = _USUAL) -> Evaluation | None:
    """The same of a suite of text alone: the likelihood of its options.

    Raises:
        DataError: an option that the context has no room for; as `ask_suite`.
    """

    def answers(numbers: Sequence[int], add: Callable[..., None]) -> None:
        step = AT_A_TIME * asking.batch_size
        order = sorted(numbers, key=lambda number: -len(choices[number].prompt(len(choices[number].shots))))
        for start in range(0, len(order), step):
            some = order[start : start + step]
            for number, found in zip(some, weigh(vlm, [choices[n] for n in some], asking.batch_size), strict=True):
                each = [[one.total, one.tokens] for one in found.likelihoods]
                text = preferred(choices[number], found)
                add({"n": number, "prediction": text, "likelihoods": each, "shots": found.shots})
            if asking.progress is not None:
                asking.progress(start + len(some), len(order))

    def scored(entries: Mapping[int, Entry]) -> Evaluation:
        weighed = {
            choice.question.place: Weighed(
                tuple(Likelihood(*one) for one in entries[number]["likelihoods"]), entries[number]["shots"]
            )
            for number, choice in enumerate(choices)
        }
        predictions = [entries[number]["prediction"] for number in range(len(choices))]
        return score([one.question for one in choices], predictions, measure=measure(weighed, choices))

    asked = Asked(suite.name, tuple(one.question for one in choices))
    opened = Opened(suite.name, asked, measure({}, choices), "", suite.split, 0)
    identity = {**opened.identity, "shots": max((len(one.shots) for one in choices), default=0)}
    return _asked(vlm, identity, len(choices), asking, (opened.measure, False), answers, scored)


def _asked(
    vlm: VLM,
    identity: Mapping[str, Any],
    total: int,
    asking: Asking,
    judged: tuple[Measure, bool],
    answers: Callable[[Sequence[int], Callable[..., None]], None],
    scored: Callable[[Mapping[int, Entry]], Evaluation],
) -> Evaluation | None:
    """Ask what is not known yet, every process its share, and score all.

    Args:
        judged: the measure of answers that are there already, and whether its intervals are over pictures.
    """
    with launched() as processes:
        ledger = None if asking.out is None else Ledger(asking.out, {**identity, **_of_model(vlm)}, processes.rank)
        if ledger is not None and ledger.finished():
            logger.info("%s: all %d questions are answered already", ledger.out, total)
            processes.wait()
            if not processes.main:
                return None
            measure, by_picture = judged
            return rescored(ledger.out, measure=measure, by_picture=by_picture, bad=ledger.left_out())
        known = {} if ledger is None else ledger.known()
        processes.wait()  # nobody writes before everybody has read: each would leave out other questions
        if known:
            logger.info("%d of %d questions are answered already", len(known), total)
        if ledger is not None:
            ledger.begin()
        own: dict[int, Entry] = {}

        def add(*entries: Entry) -> None:
            own.update({entry["n"]: entry for entry in entries})
            if ledger is not None:
                ledger.add(*entries)

        missing = processes.share([number for number in range(total) if number not in known])
        if missing:
            answers(missing, add)
        return _gathered(processes, known, own, ledger, scored)


def _gathered(
    processes: Processes,
    known: Mapping[int, Entry],
    own: Mapping[int, Entry],
    ledger: Ledger | None,
    scored: Callable[[Mapping[int, Entry]], Evaluation],
) -> Evaluation | None:
    entries = dict(known)
    for each in processes.all(own):
        entries |= each
    evaluation = None
    if processes.main:
        evaluation = scored(entries)
        if ledger is not None:
            ledger.finish(evaluation.lines(), evaluation.summary(), evaluation.bad)
    processes.wait()
    return evaluation


def _of_model(vlm: VLM) -> dict[str, Any]:
    weights = fingerprint(vlm.model, beside=parts.beside(vlm.model))
    return {"model": weights, **({"workflow": vlm.workflow} if vlm.adaptors else {})}
