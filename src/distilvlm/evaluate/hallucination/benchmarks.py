"""Published benchmarks' files as questions, and answers in the form that the benchmarks' own scripts read.

* POPE: JSONL of `question_id`, `image`, `text`, `label` (coco_pope_random.json, ..._popular.json, and so on).
* MMHal-Bench: a JSON list of `question_type`, `question_topic`, `image_id`, `image_src`, `image_content`, `question`,
  `gt_answer`, `model_answer`; its script wants the same with `model_answer` filled in.
* Object HalBench as RLHF-V publishes it: JSONL of `image_id` (COCO's number), `question`, `image` (base64), `org_idx`;
  its script wants JSONL of `question_id`, `image_id`, `prompt`, `text`. COCO's annotations say what is in the pictures.

Pictures are named by path below a directory, or stand in the file as base64: those are written to that directory.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from distilvlm.data import read
from distilvlm.data.batch import BadRow, SampleKey
from distilvlm.data.convert.tables import Store
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.rows import MalformedRow, rows
from distilvlm.evaluate.hallucination.polling import CATEGORIES
from distilvlm.evaluate.questions import Asked, Question, asked_of
from distilvlm.models.files import write_whole
from distilvlm.recipe import SourceSpec

LONGEST_NAME = 255
"""Bytes of a file name on usual file systems; what is longer is base64."""


@dataclass(frozen=True)
class Pictures:
    """Where the pictures of a benchmark are.

    Args:
        root: directory that names start from, and that embedded pictures are written to.
        needed: False where answers are there already: nothing is looked for then, and nothing written.
    """

    root: Path
    needed: bool = True

    def path(self, given: Any, row: Mapping[str, Any]) -> str:
        """A picture's file: by the row's path or address, then by its `image_id`, then out of the row itself.

        Raises RowError where there is none.
        """
        identity = str(row.get("image_id", ""))
        names = [name for name in (_name(given), _name(row.get("image_src"))) if name]
        if not self.needed:
            return str(self.root / (identity or names[0] if names else identity))
        for name in [*names, *(self._like(identity) if identity else [])]:
            if (self.root / name).is_file():
                return str(self.root / name)
        if isinstance(given, str) and (kept := self._kept(given)) is not None:
            return str(self.root / kept)
        sought = ", ".join([*names, *([f"{identity}.*"] if identity else [])]) or "is named"
        raise RowError("image", f"no file {sought} in {self.root}: say where the pictures are (--images)")

    def _like(self, identity: str) -> list[str]:
        """Files named by a number or an identity, COCO's names included."""
        patterns = [f"{identity}.*"] + ([f"*_{int(identity):012d}.*"] if identity.isdigit() else [])
        return [file.name for pattern in patterns for file in sorted(self.root.glob(pattern))]

    def _kept(self, content: str) -> str | None:
        """The name of a picture that stood in its row as base64, written unless it is there; None for other text."""
        try:
            return Store(self.root).keep(base64.b64decode(content, validate=True))
        except ValueError:  # binascii's is one
            return None


def _name(given: Any) -> str | None:
    """The file name in a path or an address, if it is one."""
    if not isinstance(given, str) or not given or len(given) > LONGEST_NAME:
        return None
    path = unquote(urlsplit(given).path) if "://" in given else given
    return PurePosixPath(path).name if "://" in given else path


def read_polling(path: str | Path, images: str | Path | None = None, pictures: bool = True) -> Asked:
    """POPE's own file, or rows of `data convert ... --task presence`: told apart by the first row.

    The kind of a POPE question (`meta.how`) is in the name of its file.

    Args:
        images: directory of the pictures; default: the file's.
        pictures: whether they must be there.

    Raises:
        DataError: the file can't be read, or is neither.
    """
    path = Path(path)
    first = next(iter(rows(path)), None)
    if isinstance(first, Mapping) and "conversations" not in first and "messages" not in first:
        how = next((kind for kind in CATEGORIES if kind in path.stem), path.stem)
        root = Pictures(Path(images) if images else path.parent, pictures)
        return _asked(path, lambda row, value: _pope(path, row, value, how, root))
    return asked_of(read(SourceSpec(path=str(path), images=None if images is None else str(images)), path.stem))


def _pope(path: Path, row: int, value: Mapping[str, Any], how: str, pictures: Pictures) -> Question:
    label = _text(value, "label").strip().lower()
    if label not in ("yes", "no"):
        raise RowError("label", f"is {label!r}, neither yes nor no")
    identity = str(value.get("question_id", row))
    image = pictures.path(value.get("image"), value)
    return _question(path, row, identity, image, _text(value, "text"), label, {"how": how})


def read_mmhal(path: str | Path, images: str | Path | None = None, pictures: bool = True) -> Asked:
    """MMHal-Bench's `response_template.json`, or a file of answers in that form (also as JSONL).

    Arguments and errors as `read_polling`; pictures are sought by the last part of `image_src`, then by `image_id`.
    """
    path = Path(path)
    root = Pictures(Path(images) if images else path.parent, pictures)

    def question(row: int, value: Mapping[str, Any]) -> Question:
        contents = value.get("image_content")
        if not isinstance(contents, list):
            raise RowError("image_content", "is no list of what is in the picture")
        meta = {key: value[key] for key in value if key not in ("image", "question", "gt_answer", "model_answer")}
        image = root.path(value.get("image"), value)
        identity = str(value.get("image_id", row))
        return _question(path, row, identity, image, _text(value, "question"), _text(value, "gt_answer"), meta)

    return _asked(path, question)


def read_objhal(path: str | Path, images: str | Path | None = None, pictures: bool = True) -> Asked:
    """Object HalBench's questions; what is there comes from `with_things`. Arguments and errors as `read_polling`."""
    path = Path(path)
    root = Pictures(Path(images) if images else path.parent / "pictures", pictures)

    def question(row: int, value: Mapping[str, Any]) -> Question:
        meta = {key: value[key] for key in ("image_id", "org_idx") if key in value}
        image = root.path(value.get("image", value.get("image_path")), value)
        return _question(path, row, str(row), image, _text(value, "question"), "", meta)

    return _asked(path, question)


def write_mmhal(path: str | Path, asked: Asked, predictions: Sequence[str]) -> None:
    """The benchmark's own rows with `model_answer` filled in, as its script reads them; written whole.

    Rows that could not be asked keep the answer that they had. Raises ValueError when the numbers differ.
    """
    given = dict(zip((one.record.key.row for one in asked.questions), predictions, strict=True))
    filled = [
        {key: content for key, content in value.items() if key != "image"}
        | ({"model_answer": given[row]} if row in given else {})
        for row, value in enumerate(_objects(Path(asked.name)))
        if isinstance(value, Mapping)
    ]
    write_whole(path, (json.dumps(filled, indent=2, ensure_ascii=False) + "\n").encode())


def write_objhal(path: str | Path, asked: Asked, predictions: Sequence[str], model: str) -> None:
    """JSONL that the benchmark's script reads; written whole. Raises ValueError when the numbers differ."""
    lines = [
        {
            "question_id": number,
            "image_id": question.meta.get("image_id"),
            "prompt": question.text,
            "text": answer,
            "model_id": model,
        }
        for number, (question, answer) in enumerate(zip(asked.questions, predictions, strict=True))
    ]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def together(files: Sequence[Asked]) -> Asked:
    """The questions of several files as one, in order."""
    questions = tuple(question for one in files for question in one.questions)
    return Asked(", ".join(one.name for one in files), questions, tuple(row for one in files for row in one.bad))


def _asked(path: Path, question: Callable[[int, Mapping[str, Any]], Question]) -> Asked:
    questions: list[Question] = []
    bad: list[BadRow] = []
    for row, value in enumerate(_objects(path)):
        try:
            if isinstance(value, MalformedRow):
                raise RowError("row", value.reason)
            questions.append(question(row, value))
        except RowError as error:
            bad.append(BadRow(SampleKey(path.stem, str(path), row), error.field, error.reason))
    return Asked(str(path), tuple(questions), tuple(bad))


def _objects(path: Path) -> Iterator[Mapping[str, Any] | MalformedRow]:
    for value in rows(path):
        yield value if isinstance(value, (Mapping, MalformedRow)) else MalformedRow("is no object with fields")


def _question(
    path: Path, row: int, identity: str, image: str, text: str, answer: str, meta: Mapping[str, Any]
) -> Question:
    return Question.of((path, row), identity, (image,), text, answer, meta)


def _text(value: Mapping[str, Any], field: str) -> str:
    given = value.get(field)
    if not isinstance(given, str):
        raise RowError(field, f"is missing; the row has {sorted(map(str, value))}" if given is None else "is no text")
    return given


def described(path: str | Path) -> Asked:
    """Questions of captions that were made elsewhere: rows of `image_id` or `image`, beside what `answers.py` reads.

    Raises:
        DataError: a row that names no picture.
    """
    path = Path(path)
    questions: list[Question] = []
    for row, value in enumerate(_objects(path)):
        if isinstance(value, MalformedRow):
            raise DataError(f"{path}, row {row}: {value.reason}")
        identity = value.get("image_id", value.get("image"))
        if not isinstance(identity, (str, int)):
            raise DataError(f"{path}, row {row}: no 'image_id' and no 'image': which picture does it describe?")
        meta = {"image_id": identity} if str(identity).isdigit() else {}
        words = next((value[key] for key in ("question", "prompt") if isinstance(value.get(key), str)), "")
        questions.append(_question(path, row, str(identity), str(identity), words, "", meta))
    return Asked(str(path), tuple(questions))
