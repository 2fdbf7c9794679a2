"""What is in a picture, from COCO's annotation files as published: instances_*.json, captions_*.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from distilvlm.data.problems import DataError
from distilvlm.evaluate.hallucination.captions import default_synonyms
from distilvlm.evaluate.hallucination.synonyms import Synonyms
from distilvlm.evaluate.questions import Asked, Question


@dataclass
class Annotations:
    """Objects and human captions of pictures, by COCO's number of the picture."""

    names: tuple[str, ...] = ()  # of all classes, whether a picture shows them or not
    things: dict[int, dict[str, int]] = field(default_factory=dict)  # also of pictures without any
    captions: dict[int, list[str]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)  # file name → number

    def number(self, question: Question) -> int | None:
        """The question's picture: by `meta.image_id`, or by the name of its file."""
        given = question.meta.get("image_id")
        if isinstance(given, (int, str)) and str(given).isdecimal():
            return int(given)
        names = (PurePosixPath(path.replace("\\", "/")).name for path in question.record.images)
        return next((self.numbers[name] for name in names if name in self.numbers), None)


def read_annotations(paths: Iterable[str | Path]) -> Annotations:
    """Files of instances and of captions, told apart by their content; several splits are joined.

    Raises:
        DataError: a file can't be read or is neither; no file has instances; names the file.
    """
    found = Annotations()
    names: dict[str, None] = {}
    paths = [Path(path) for path in paths]
    for path in paths:
        content = _content(path)
        for picture in content["images"]:
            number, file = _number(picture, "id", path, "images"), str(_field(picture, "file_name", path, "images"))
            found.numbers[PurePosixPath(file).name] = number
        if "categories" not in content:
            for row in content["annotations"]:
                number = _number(row, "image_id", path, "annotations")
                found.captions.setdefault(number, []).append(_field(row, "caption", path, "annotations"))
            continue
        classes = {
            _field(row, "id", path, "categories"): _field(row, "name", path, "categories")
            for row in content["categories"]
        }
        names |= dict.fromkeys(classes.values())
        for picture in content["images"]:
            found.things.setdefault(_number(picture, "id", path, "images"), {})
        for row in content["annotations"]:
            here = found.things.setdefault(_number(row, "image_id", path, "annotations"), {})
            name = classes.get(_field(row, "category_id", path, "annotations"))
            if name is None:
                raise DataError(f"{path}: 'annotations' name category {row['category_id']}, which is not among them")
            here[name] = here.get(name, 0) + 1
    found.names = tuple(names)
    if not found.things:
        listed = ", ".join(map(str, paths))
        raise DataError(
            f"no objects in {listed}: give COCO's instances_*.json (captions alone don't say what is there)"
        )
    return found


def with_things(asked: Asked, annotations: Annotations) -> Asked:
    """The questions with `meta.things` and `meta.captions` of their pictures.

    Raises:
        DataError: a picture that the annotations don't have.
    """
    questions: list[Question] = []
    for question in asked.questions:
        number = annotations.number(question)
        if number is None or number not in annotations.things:
            key = question.record.key
            shown = number if number is not None else ", ".join(question.record.images) or "no picture"
            raise DataError(
                f"{key.file}, row {key.row}: the annotations have no picture {shown}: give the split that it is of"
            )
        more = {"things": annotations.things[number], "captions": annotations.captions.get(number, [])}
        questions.append(replace(question, meta={**question.meta, **more}))
    return replace(asked, questions=tuple(questions))


def annotated(
    asked: Asked, files: Sequence[str | Path] = (), synonyms: str | Path | None = None, also: Sequence[Question] = ()
) -> tuple[Asked, Synonyms]:
    """Questions that say what is in their pictures, and the words for it.

    Args:
        files: COCO's annotations; without any, the questions' `meta.things` say it.
        synonyms: the table's file; default: every name of the annotations names itself.
        also: further questions whose things are objects, too (what only they show can be hallucinated all the same).

    Raises:
        DataError: as `read_annotations`, `with_things`, `Synonyms.read`; a question about a picture of which nothing
            says what is in it.
    """
    names: tuple[str, ...] = ()
    if files:
        annotations = read_annotations(files)
        asked, names = with_things(asked, annotations), annotations.names
    if synonyms is not None:
        return asked, Synonyms.read(synonyms)
    return asked, default_synonyms([*asked.questions, *(one for one in also if "things" in one.meta)], names)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the annotations {path} can't be read: {error}") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise DataError(
            f"{path} has no lists 'images' and 'annotations': give COCO's instances_*.json or captions_*.json"
        )
    return content


def _field(row: Any, key: str, path: Path, where: str) -> Any:
    if not isinstance(row, Mapping) or key not in row:
        raise DataError(f"{path}: an entry of '{where}' has no '{key}'")
    return row[key]


def _number(row: Any, key: str, path: Path, where: str) -> int:
    """The number of a picture; some writers make texts of them."""
    value = _field(row, key, path, where)
    if not str(value).isdecimal():
        raise DataError(f"{path}: '{key}' of an entry of '{where}' is {value!r}, which is no picture's number")
    return int(value)
