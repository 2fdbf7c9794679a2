"""VQAv2, VizWiz, TextVQA: answers of ten people, and the accuracy that averages over leaving each of them out.

An answer that k of the nine others gave is worth min(1, k / 3); the mean is over who is left out (Antol et al. 2015).
Predictions go through TextVQA's answer processor first, as LLaVA-1.5 does before it submits to VQAv2's and VizWiz's
servers. What happens to people's answers differs, as in the three scripts:

* VQAv2: where they are not all the same, both sides lose punctuation and articles, and number words become digits;
  where they are, they are compared as they stand.
* VizWiz: they are compared as they stand.
* TextVQA: they go through its processor, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distilvlm.data.problems import DataError, RowError
from distilvlm.evaluate.measures import Answered, Figure, Measure
from distilvlm.evaluate.questions import Asked, Question
from distilvlm.evaluate.suites.normalisation import processed, punctuation, words
from distilvlm.evaluate.suites.suite import Sources, content, field_of, gathered, listed

Compared = Callable[[str, Sequence[str]], tuple[str, list[str]]]
"""Prediction and people's answers → both as they are compared."""

VIZWIZ_PROMPT = (
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase."
)
"""LLaVA-1.5's for VizWiz."""


def agreement(said: str, answers: Sequence[str]) -> float:
    """The accuracy of an answer that equals some of `answers`, as strings."""
    others = [[answer for place, answer in enumerate(answers) if place != left_out] for left_out in range(len(answers))]
    return sum(min(1.0, nine.count(said) / 3) for nine in others) / len(others)


def as_vqa(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    said = processed(prediction)
    given = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len({*given}) > 1:
        return words(punctuation(said)), [words(punctuation(answer)) for answer in given]
    return said, given


def as_vizwiz(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    return words(punctuation(processed(prediction))), list(answers)


def as_textvqa(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    return processed(prediction), [processed(answer) for answer in answers]


def _kind(question: Question) -> Mapping[str, Any]:
    return {"kind": question.meta["kind"]} if question.meta.get("kind") else {}


def people(compared: Compared, name: str) -> Measure:
    """The measure of answers that several people gave: `meta.answers` of a question."""

    def judge(question: Question, prediction: str) -> Mapping[str, Any]:
        answers = question.meta.get("answers")
        if not isinstance(answers, list) or not answers:
            key = question.record.key
            raise DataError(f"{key.file}, row {key.row}: no list of people's answers (answers) to compare with")
        said, given = compared(prediction, answers)
        worth = agreement(said, given)
        verdict = "right" if worth == 1 else f"{worth:.2f}" if worth else "wrong"
        return {"compared": said, "score": worth, "right": worth == 1, "verdict": verdict, **_kind(question)}

    return Measure(name, FIGURES, judge, category="kind")


def _worth(one: Answered) -> tuple[float, float]:
    return one.details["score"], 1


FIGURES = (
    Figure(
        "vqa_accuracy",
        "VQA accuracy",
        _worth,
        about="min(1, people who said so / 3), averaged over leaving each of the people out.",
    ),
    Figure(
        "agreed",
        "agreed by four or more",
        lambda one: (one.details["right"], 1),
        about="Answers that count in full, whoever is left out.",
        headline=False,
    ),
)


def read_vqav2(where: Sources) -> Asked:
    """v2_OpenEnded_mscoco_{split}_questions.json with v2_mscoco_{split}_annotations.json; pictures below {split}/.

    The authors keep the answers of test and test-dev to themselves: those splits can't be scored here.
    """
    questions = where.file("questions", f"v2_OpenEnded_mscoco_{where.split}_questions.json")
    annotations = where.file("answers", f"v2_mscoco_{where.split}_annotations.json")
    answers = {row.get("question_id"): row for row in listed(annotations, "annotations")}

    def question(number: int, row: Mapping[str, Any]) -> Question:
        identity, picture = field_of(row, "question_id"), int(field_of(row, "image_id"))
        told = answers.get(identity)
        if told is None:
            raise RowError("question_id", f"{identity} has no answers in {annotations.name}")
        name = f"COCO_{where.split}_{picture:012d}.jpg"
        return _question(
            where,
            (questions, number),
            str(identity),
            where.picture(f"{where.split}/{name}", f"images/{name}", name),
            {"question": field_of(row, "question")},
            [one["answer"] for one in field_of(told, "answers")],
            told.get("answer_type"),
            told.get("multiple_choice_answer"),
        )

    return gathered(questions, enumerate(listed(questions, "questions")), question)


def read_vizwiz(where: Sources) -> Asked:
    """{split}.json (image, question, answers, answer_type); pictures below {split}/."""
    file = where.file("questions", f"{where.split}.json", f"Annotations/{where.split}.json")

    def question(number: int, row: Mapping[str, Any]) -> Question:
        name = field_of(row, "image")
        return _question(
            where,
            (file, number),
            name,
            where.picture(f"{where.split}/{name}", f"images/{name}", name),
            {"question": field_of(row, "question")},
            [one["answer"] for one in field_of(row, "answers")],
            row.get("answer_type"),
        )

    return gathered(file, enumerate(listed(file)), question)


def read_textvqa(where: Sources) -> Asked:
    """TextVQA_0.5.1_{split}.json; pictures below train_images/. A prompt with {ocr}, as LLaVA-1.5 asks, gets the tokens
    of TextVQA_Rosetta_OCR_v0.2_{split}.json."""
    file = where.file("questions", f"TextVQA_[0-9]*_{where.split}.json")
    ocr: dict[str, list[str]] = {}
    if "{ocr}" in where.prompt:
        read = where.file("ocr", f"TextVQA_Rosetta_OCR_*_{where.split}.json")
        ocr = {row["image_id"]: row["ocr_tokens"] for row in content(read)["data"]}

    def question(number: int, row: Mapping[str, Any]) -> Question:
        picture = field_of(row, "image_id")
        name = f"{picture}.jpg"
        return _question(
            where,
            (file, number),
            str(row.get("question_id", number)),
            where.picture(*(f"{folder}/{name}" for folder in ("train_images", "test_images", "images")), name),
            {"question": field_of(row, "question"), "ocr": ", ".join(ocr.get(picture, []))},
            list(field_of(row, "answers")),
            None,
        )

    return gathered(file, enumerate(listed(file, "data")), question)


def _question(
    where: Sources,
    place: tuple[Any, int],
    identity: str,
    picture: str,
    values: Mapping[str, Any],
    answers: list[str],
    kind: Any,
    usual: str | None = None,
) -> Question:
    usual = usual or max(answers, key=answers.count)
    return Question.of(place, identity, (picture,), where.asked(**values), usual, {"answers": answers, "kind": kind})
