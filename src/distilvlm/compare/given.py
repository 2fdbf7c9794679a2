"""What `distilvlm compare RUN...` was given: models under their names, and where the answers of each lie."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distilvlm.data.problems import DataError
from distilvlm.models.files import MANIFEST

ANSWERS = "answers"
"""Where answers lie beside a run or a model: `evaluate --out RUN/answers/gqa.jsonl`."""

_NAME = re.compile(r"(?:([\w.+-]+)=)?(.+)", re.DOTALL)


@dataclass
class Given:
    """One model.

    Attributes:
        run: the directory of the run that made it, if one was given.
        model: its files; None where answers alone were given.
        answers: question set → file.
    """

    name: str
    run: Path | None = None
    model: Path | None = None
    answers: dict[str, Path] = field(default_factory=dict)


def read_given(words: Sequence[str]) -> list[Given]:
    """Models in the order in which they are first named; words with the same NAME= are of one model.

    Args:
        words: [NAME=]PATH each: a run directory, a model directory, or a file that `evaluate --out` wrote. Without a
            name a directory is called by its last part that is not `model`, and a file belongs to the directory that it
            lies in, but for `answers`.

    Raises:
        DataError: nothing lies there; two models have one name; one model has two files of a set; nobody was asked
            anything.
    """
    found: dict[str, Given] = {}
    for word in words:
        match = _NAME.fullmatch(word)
        assert match is not None  # the pattern fits everything but nothing
        name, path = match[1], Path(match[2]).absolute()
        if path.is_file():
            _answers(found.setdefault(name or _called(path.parent), Given(name or _called(path.parent))), path)
        elif path.is_dir():
            _directory(found, name or _called(path), path)
        else:
            raise DataError(f"{match[2]}: no such file or directory: give runs, models or files of answers")
    given = list(found.values())
    if not any(one.answers for one in given):
        raise DataError(
            f"nothing was asked of {', '.join(found)}: ask first, as in `distilvlm evaluate {words[0]}/model "
            f"--suite gqa --data GQA --out {words[0]}/{ANSWERS}/gqa.jsonl`"
        )
    return given


def _directory(found: dict[str, Given], name: str, path: Path) -> None:
    one = found.setdefault(name, Given(name))
    if one.model is not None:
        raise DataError(f"two models are called '{name}', {one.model} and {path}: name one of them, as in NAME={path}")
    if (path / "comparison.json").is_file():
        raise DataError(f"{path} is a comparison: `distilvlm report {path}` makes its page; its runs can be given here")
    if (path / "recipe.yaml").is_file() or (path.name == "model" and (path.parent / "recipe.yaml").is_file()):
        one.run = path if (path / "recipe.yaml").is_file() else path.parent
        one.model = one.run / "model"
    else:
        one.model = path
    if not any((one.model / file).is_file() for file in ("config.json", MANIFEST)):
        what = "the run is not finished" if one.run is not None else "it is neither a run nor a model"
        raise DataError(f"{path}: {what}: no config.json and no {MANIFEST} in {one.model}")
    for file in sorted((one.run or one.model).glob(f"{ANSWERS}/*.jsonl")):
        if ".part-" not in file.name:  # of an asking that is not finished
            _answers(one, file)


def _answers(one: Given, file: Path) -> None:
    questions = _asked(file)
    if (other := one.answers.setdefault(questions, file)) != file:
        raise DataError(f"{one.name}: {other} and {file} both answer {questions}: leave one of them")


def _asked(file: Path) -> str:
    """The set's name: the suite and its split, as the JSON file beside it says; else the file's."""
    try:
        about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["asked"]
        return "-".join(part for part in (about["suite"], about.get("split")) if part)
    except FileNotFoundError:
        return file.stem
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file.with_suffix('.json')} does not say what {file} answers") from None


def _called(path: Path) -> str:
    return path.parent.name if path.name in ("model", ANSWERS) else path.name
