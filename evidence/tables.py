"""The tables: a comparison file each, the data that it needs beside, and what the papers claim (`claims.yaml`)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distilvlm.models.files import write_whole
from distilvlm.quickstart import questions

from . import scenes
from .verdicts import Claim

ROOT = Path(__file__).parents[1]


def easy_vqa(directory: Path) -> None:
    """The quickstart's data, and of the test questions one a picture, about its shape or its colour: those that are
    answered by yes or no can mostly be answered without looking."""
    files = questions.write(directory / "data")
    by_picture: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in json.loads(files.test.read_text()):
        if row["conversations"][0]["value"].startswith("<image>\nwhat"):
            by_picture[row["image"]].append(row)
    asked = [rows[number % len(rows)] for number, rows in enumerate(by_picture.values())]
    write_whole(files.directory / "test-what.json", json.dumps(asked).encode())


def scenes_of_shapes(directory: Path) -> None:
    scenes.write(directory / "scenes")


def nothing(directory: Path) -> None:
    """The comparison's own preparation makes all that it needs."""


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Args:
        file: the comparison.
        data: writes into the comparison's directory what it needs before it can be read.
        command: what makes it.
    """

    name: str
    file: Path
    data: Callable[[Path], None]
    command: str

    @property
    def claims(self) -> list[Claim]:
        told = yaml.safe_load((ROOT / "evidence/claims.yaml").read_text())
        return [Claim.of(one) for one in told[self.name]]


def _of_shapes(name: str, data: Callable[[Path], None]) -> Table:
    return Table(name, ROOT / "evidence" / f"{name}.yaml", data, f"scripts/evidence {name} --seeds 3")


def _of_photographs(name: str) -> Table:
    return Table(name, ROOT / "recipes" / f"{name}-small.yaml", nothing, f"scripts/evidence {name} --seeds 3")


TABLES = {
    table.name: table
    for table in (
        _of_shapes("llava-kd", easy_vqa),
        _of_shapes("llava-mod", scenes_of_shapes),
        _of_photographs("iaa"),
        _of_photographs("move-kd"),
        _of_shapes("combined", scenes_of_shapes),
    )
}
"""In the order of the page."""
