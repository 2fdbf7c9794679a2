"""Tests that rooms of their own judge (POPE, CHAIR, RefCOCO), from the files as published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilvlm.data.batch import BadRow, SampleKey
from distilvlm.data.convert import refcoco
from distilvlm.data.convert.items import Fault
from distilvlm.data.problems import RowError
from distilvlm.evaluate.hallucination import (
    Synonyms,
    captions,
    default_synonyms,
    read_annotations,
    read_polling,
    together,
    with_things,
)
from distilvlm.evaluate.measures import Measure
from distilvlm.evaluate.questions import Asked, Question
from distilvlm.evaluate.suites.suite import Reader, Sources, content, field_of, gathered

DESCRIBE = "Please describe this image in detail."
"""What CHAIR is asked for in most papers that report it of chat models."""

JUDGED = captions(Synonyms.of_names(["nothing"]))
"""CHAIR's figures, for captions that were judged before."""

PICTURE_FOLDERS = ("val2014", "train2014", "images")


def read_pope(where: Sources) -> Asked:
    """coco_pope_random.json, _popular.json, _adversarial.json, or those of other sets; pictures below val2014/."""
    files = where.files("questions", "*pope_*.json", "*pope_*.jsonl")
    folder = next((where.root / name for name in PICTURE_FOLDERS if (where.root / name).is_dir()), where.root)
    asked = together([read_polling(file, folder) for file in files])

    def put(one: Question) -> Question:
        key = one.record.key
        text = where.asked(question=one.text)
        return Question.of((key.file, key.row), one.record.id, one.record.images, text, one.answer, one.meta, one.turn)

    return Asked(asked.name, tuple(put(one) for one in asked.questions), asked.bad)


def read_chair(where: Sources) -> Asked:
    """instances_{split}.json: every picture of it that is there is described; see `chair` for what is true."""
    file = where.file("instances", f"instances_{where.split}.json", f"annotations/instances_{where.split}.json")

    def question(number: int, row: Mapping[str, Any]) -> Question | None:
        name = field_of(row, "file_name")
        try:
            picture = where.picture(f"{where.split}/{name}", f"images/{name}", name)
        except RowError:
            return None  # papers describe 500 pictures of 40,504
        meta = {"image_id": field_of(row, "id")}
        return Question.of((file, number), str(row["id"]), (picture,), where.asked(), "", meta)

    asked = gathered(file, enumerate(content(file)["images"]), question)
    return with_things(asked, read_annotations(_annotations(where)))


def chair(where: Sources, asked: Asked) -> Measure:
    """CHAIR by the annotations' objects, and by captions_{split}.json and the authors' synonyms.txt where they are."""
    words = where.optional("words", "synonyms.txt")
    if words is not None:
        return captions(Synonyms.read(words), references=True)
    return captions(default_synonyms(asked.questions, read_annotations(_annotations(where)).names), references=True)


def _annotations(where: Sources) -> list[Path]:
    each = (
        where.optional(kind, *(f"{folder}{kind}_{where.split}.json" for folder in ("", "annotations/")))
        for kind in ("instances", "captions")
    )
    return [file for file in each if file is not None]


def referring(name: str) -> Reader:
    """The reader of RefCOCO, RefCOCO+ or RefCOCOg."""

    def read(where: Sources) -> Asked:
        """REC_{name}_*_{split}.jsonl, or refs.json with instances.json; pictures below train2014/ or images/."""
        file = where.file("questions", f"REC_{name}_*{where.split}.jsonl", "refs.json", "refs*.json")
        of_refs = file.suffix == ".json"
        annotations = where.file("instances", "instances.json") if of_refs else None
        folder = next((where.root / one for one in ("train2014", "images") if (where.root / one).is_dir()), where.root)
        split = where.split if of_refs else None
        reading = refcoco.read(file, folder, annotations=annotations, split=split, question=where.prompt)
        questions: list[Question] = []
        bad: list[BadRow] = []
        for item in reading.items:
            if isinstance(item, Fault):
                bad.append(BadRow(SampleKey(file.stem, item.file, item.row or 0), item.field, item.reason))
                continue
            asked, answer = (turn.text for turn in item.turns)
            images = [str(reading.images / image) for image in item.images]
            number = len(questions) + len(bad)  # refs hold several expressions each
            questions.append(Question.of((item.file, number), item.id, images, asked, answer, item.meta))
        return Asked(str(file), tuple(questions), tuple(bad))

    return read
