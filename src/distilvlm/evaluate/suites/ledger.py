"""Answers on disk as they are given, so that whatever is killed need not be asked again.

Beside `OUT.jsonl`, which is only there when it is whole: `OUT.json` says what was asked of whom and what came of it,
and while a model is being asked, `OUT.part-RANK.jsonl` of each process grows line by line. Its first line says what is
asked of whom, too; other answers than those are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilvlm.data.batch import BadRow, SampleKey
from distilvlm.data.problems import DataError
from distilvlm.models.files import write_whole

Entry = dict[str, Any]
"""{"n": number of the question, "prediction": text, ...}, or {"n", "field", "reason"} of one that can't be asked."""


class Ledger:
    """The answers of one suite and one model.

    Args:
        out: OUT.jsonl.
        identity: what is asked of whom.
        rank: of this process, which writes a part of its own.

    Raises:
        DataError: a name that ends in .json. Reading raises it for answers of another model or to something else, and
            names what differs.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        if out.suffix == ".json":
            raise DataError(f"{out} must not end in .json, where what was asked is written: name it .jsonl")
        self.out = out
        self.identity = json.loads(json.dumps(identity))  # as it reads back
        self.part = out.with_name(f"{out.stem}.part-{rank}.jsonl")

    @property
    def about(self) -> Path:
        return self.out.with_suffix(".json")

    def finished(self) -> bool:
        """Whether all was asked and written. Raises DataError where that was something else."""
        if not self.about.is_file():
            if self.out.exists():
                raise DataError(f"{self.out} is there, and no {self.about.name} says what it is: choose another --out")
            return False
        try:
            told = json.loads(self.about.read_text(encoding="utf-8"))["asked"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.about} is not from this command: choose another --out") from None
        self._require(told, self.about)
        return self.out.is_file()

    def known(self) -> dict[int, Entry]:
        """What killed processes, however many, have left: number of the question → its entry."""
        found: dict[int, Entry] = {}
        for part in self._parts():
            lines = _whole_lines(part)
            if lines:
                self._require(lines[0].get("asked"), part)
                found |= {entry["n"]: entry for entry in lines[1:]}
        return found

    def begin(self) -> None:
        """Make this process's part ready to grow: a line that a kill cut goes."""
        lines = _whole_lines(self.part) if self.part.is_file() else []
        write_whole(self.part, "".join(map(_line, lines or [{"asked": self.identity}])).encode())

    def add(self, *entries: Entry) -> None:
        with self.part.open("a", encoding="utf-8") as stream:
            stream.write("".join(map(_line, entries)))

    def left_out(self) -> list[BadRow]:
        """The rows that could not be asked, of an asking that is `finished`."""
        told = json.loads(self.about.read_text(encoding="utf-8"))["left_out"]
        return [BadRow(SampleKey(*key), field, reason) for *key, field, reason in told]

    def finish(self, lines: str, summary: Mapping[str, Any], left_out: Sequence[BadRow]) -> None:
        """Write the whole file and what it says, then clear the parts."""
        rows = [[row.key.source, row.key.file, row.key.row, row.field, row.reason] for row in left_out]
        told = {"asked": self.identity, **summary, "left_out": rows}
        write_whole(self.about, (json.dumps(told, indent=1) + "\n").encode())
        write_whole(self.out, lines.encode())
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.out.parent.glob(f"{self.out.stem}.part-*.jsonl"))

    def _require(self, told: Any, file: Path) -> None:
        if told == self.identity:
            return
        told = told if isinstance(told, Mapping) else {}
        changed = [key for key in self.identity if told.get(key) != self.identity[key]]
        shown = "; ".join(f"{key}: {_short(told.get(key))} there, {_short(self.identity[key])} now" for key in changed)
        raise DataError(
            f"{file} has answers of another model or to something else ({shown or 'more is said there'}): choose "
            "another --out, or remove it"
        )


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """A file's lines up to one that was cut."""
    found: list[dict[str, Any]] = []
    for line in file.read_bytes().split(b"\n")[:-1]:  # what stands behind the last end of line is none
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
