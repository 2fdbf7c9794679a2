"""Visual question answering files: rows of picture, question, answer (JSON, JSONL, CSV), and VQAv2's pair of files."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distilvlm.data.convert.items import Fault, Item, Reading, asked, filled
from distilvlm.data.problems import DataError
from distilvlm.data.rows import MalformedRow, rows

IMAGE_FIELDS = ("image", "image_name", "image_path", "image_file", "img_path", "file_name", "filename", "imageId")
QUESTION_FIELDS = ("question", "query", "prompt", "text")
ANSWER_FIELDS = ("answer", "multiple_choice_answer", "answers", "label")
ID_FIELDS = ("id", "question_id", "qid", "questionId")

VQAV2_PICTURE = "COCO_{data_subtype}_{image_id:012d}.jpg"
"""How COCO's 2014 pictures are called, which VQAv2 asks about."""


def read(
    source: Path,
    images: Path | None = None,
    *,
    annotations: Path | str | None = None,
    question: str = "{question}",
    answer: str = "{answer}",
    image_field: str | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
    picture: str | None = None,
) -> Reading:
    """One row per question.

    Args:
        source: a list of objects or one that maps ids to objects (JSON), JSONL, CSV with a header, or VQAv2's
            `..._questions.json`.
        images: the pictures' directory; default: the file's own.
        annotations: VQAv2's `..._annotations.json`; its `multiple_choice_answer` is the answer that most people gave.
        question, answer: templates with {question}, {answer} and every other field of the row.
        image_field, question_field, answer_field: default: the first that rows have of IMAGE_FIELDS, QUESTION_FIELDS,
            ANSWER_FIELDS. An answer that is a list (several people's) becomes the most frequent one.
        picture: file name of a row's picture where no field holds it, e.g. "{image_id}.png"; default for VQAv2 is
            COCO's.

    Raises:
        DataError: the files can't be read, or the first row lacks a field.
    """
    found = _rows(source)
    if annotations is not None:
        found = _annotated(found, source, Path(annotations))
        picture = picture or (VQAV2_PICTURE if image_field is None else None)
    first = next((row for row in found if isinstance(row, Mapping)), None)
    if first is None:
        raise DataError(f"{source} has no row that is an object")
    question_field = _field(first, source, "question", question_field, QUESTION_FIELDS)
    answer_field = _field(first, source, "answer", answer_field, ANSWER_FIELDS)
    if picture is None:
        image_field = _field(first, source, "image", image_field, IMAGE_FIELDS)
    used = {question_field, answer_field, image_field}

    def items() -> Iterator[Item | Fault]:
        for number, row in enumerate(found):
            if not isinstance(row, Mapping):
                reason = row.reason if isinstance(row, MalformedRow) else "is no object with fields"
                yield Fault(str(source), number, "row", reason)
                continue
            texts = {
                question_field: plain_text(row.get(question_field)),
                answer_field: answer_text(row.get(answer_field)),
            }
            named = filled(picture, row, "picture") if picture else plain_text(row.get(image_field or ""))
            empty = [field for field, text in {**texts, image_field or "image": named}.items() if not text]
            if empty:
                yield Fault(str(source), number, empty[0], "is missing or empty: fill it in, or remove the row")
                continue
            values = {**row, **texts, "question": texts[question_field], "answer": texts[answer_field]}
            turns = asked(filled(question, values, "question"), filled(answer, values, "answer"))
            identity = next((str(row[key]) for key in ID_FIELDS if row.get(key) is not None), str(number))
            meta = {key: value for key, value in row.items() if key not in used and key not in ID_FIELDS}
            place = image_field or "image"
            yield Item(str(source), number, identity, (named,), turns, row, meta, image_field=place)

    return Reading((images or source.parent).absolute(), items())


def _rows(source: Path) -> Sequence[Any]:
    if source.suffix.lower() in (".csv", ".tsv"):
        return _table(source)
    whole = _whole(source)
    if whole is None:
        return list(rows(source))
    if isinstance(whole.get("questions"), list):
        shared = {key: value for key, value in whole.items() if key in ("data_type", "data_subtype")}
        return [{**shared, **row} if isinstance(row, Mapping) else row for row in whole["questions"]]
    if len(whole) > 0 and all(isinstance(row, Mapping) for row in whole.values()):
        return [{"id": key, **row} for key, row in whole.items()]
    return [whole]


def _whole(source: Path) -> dict[str, Any] | None:
    """The file as one JSON object; None where it is a list or JSONL (which `rows` reads, and names what is wrong)."""
    try:
        value = json.loads(source.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def _table(source: Path) -> list[Any]:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} can't be read: {error}") from None
    found: list[Any] = []
    delimiter = "\t" if source.suffix.lower() == ".tsv" else ","
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter):
            if None in row or None in row.values():
                found.append(MalformedRow("has another number of cells than the header: quote cells that hold a comma"))
            else:
                found.append(row)
    except csv.Error as error:
        raise DataError(f"{source}, row {len(found)}: {error}") from None
    return found


def _annotated(questions: Sequence[Any], source: Path, annotations: Path) -> list[Any]:
    """Questions with what is said of them, joined by `question_id`."""
    whole = _whole(annotations)
    given = whole.get("annotations") if whole else None
    if not isinstance(given, list):
        raise DataError(f"{annotations}: no list 'annotations' in it; VQAv2's ..._annotations.json is expected")
    by_question = {entry.get("question_id"): entry for entry in given if isinstance(entry, Mapping)}
    asked_for = {row.get("question_id") for row in questions if isinstance(row, Mapping)}
    strangers = [key for key in by_question if key not in asked_for]
    if strangers:
        raise DataError(
            f"{annotations}: {len(strangers)} answers have no question in {source} (question_id {strangers[0]} is the "
            "first): are these the two files of one split?"
        )
    return [
        {**row, **by_question.get(row.get("question_id"), {})} if isinstance(row, Mapping) else row for row in questions
    ]


def _field(row: Mapping[str, Any], source: Path, what: str, given: str | None, usual: Sequence[str]) -> str:
    found = next((name for name in ([given] if given else usual) if name in row), None)
    if found is None:
        wanted = f"no field '{given}'" if given else f"none of the usual fields of the {what} ({', '.join(usual)})"
        raise DataError(
            f"{source}: the first row has {wanted}; it has {', '.join(sorted(map(str, row)))}. "
            f"Set {what}_field to the one that holds the {what}"
        )
    return found


def answer_text(value: Any) -> str:
    """An answer as text; the most frequent of several people's (the earliest of equals)."""
    if isinstance(value, list):
        given = [plain_text(entry.get("answer") if isinstance(entry, Mapping) else entry) for entry in value]
        counted = Counter(text for text in given if text)
        return counted.most_common(1)[0][0] if counted else ""
    return plain_text(value)


def plain_text(value: Any) -> str:
    """A field as text; "" where it holds none."""
    if value is None or isinstance(value, (dict, list)):
        return ""
    return str(value).strip()
