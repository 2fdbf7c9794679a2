"""Rows of a JSON list or a JSONL file, each read when it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from distilvlm.data.problems import DataError
from distilvlm.data.streams.scanning import SPACE, lines, list_rows
from distilvlm.data.streams.stored import Stored, decoded
from distilvlm.storage import Held, Reader, is_remote, keep

KEPT_FROM = 32 * 2**20
"""Bytes of a file whose rows are read when asked for, and whose places are kept. Smaller ones are held in memory."""

SETTLED = 2.0
"""Seconds that a file must have been left alone before its time of change is trusted: clocks of file systems tick."""


class MalformedRow:
    """A row that is not JSON, where only this one is lost: a line of a JSONL file, a sample of a shard."""

    def __init__(self, reason: str, field: str = "row") -> None:
        self.reason = reason
        self.field = field


class JsonRows(Stored):
    """The rows of a `.json` list or a `.jsonl` file (told apart by the first character).

    Raises:
        DataError: no such file, not UTF-8, or neither a list nor JSONL; what is malformed in a list is told by the row
            that it is in, when that is read.
    """

    def __init__(self, name: str) -> None:
        try:
            self.reader = Reader(name)
            if self.reader.stand[0] < KEPT_FROM:
                self.reader = Held(name)
        except FileNotFoundError:
            raise DataError(f"no data file {name}") from None
        except IsADirectoryError:
            raise DataError(f"{name} is a directory; name the JSON or JSONL file in it") from None
        except (OSError, ModuleNotFoundError) as error:
            raise DataError(f"{name} can't be opened: {error}") from None
        self.files = (name,)
        self.start, self.is_list = _beginning(self.reader)
        self._content: str | None = None
        if not isinstance(self.reader, Held):
            self._keep()
        else:
            bounds, blank, self.faulty = self._found()
            self.bounds, self.blank = bounds, blank

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def content(self) -> str:
        """SHA-256 of the file."""
        if self._content is None:
            self._content = _hashed(self.reader)
        return self._content

    def file_of(self, row: int) -> str:
        return self.files[0]

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        return rows // 4096  # stretches of the file; its pictures lie elsewhere

    def value(self, row: int, text: bytes) -> Any:
        name = self.files[0]
        try:
            return decoded(text)
        except UnicodeDecodeError as error:
            at = int(self.bounds[row]) + error.start
            raise DataError(f"{name} is not UTF-8 (byte {at}): {error.reason}") from None
        except json.JSONDecodeError as error:
            message, line, column = error.msg, error.lineno, error.colno
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets within brackets
            message, line, column = str(error), 1, 1
        if not self.is_list:
            number = row + 1 + int(np.searchsorted(self.blank, row, side="right"))
            return MalformedRow(f"line {number} is malformed JSON at character {column}: {message}")
        line += self._line(int(self.bounds[row])) - 1
        if row == len(self) - 1 and self.faulty == "cut" and "Extra data" not in message:
            whole = f"row {row} is malformed JSON: {message}; or the file ends inside the list, cut off"
            raise DataError(f"{name}, line {line}: {whole}")
        raise DataError(f"{name}, line {line}: row {row} is malformed JSON: {message}")

    def stretch(self, start: int, stop: int) -> Iterator[Any]:
        yield from super().stretch(start, stop)
        if stop >= len(self) and self.faulty is not None:  # every row was whole
            line = self._line(self.reader.stand[0] if self.faulty == "cut" else int(self.faulty))
            what = (
                f"malformed JSON after row {len(self) - 1}: the file ends inside the list; is it cut off?"
                if self.faulty == "cut"
                else "something follows the end of the list"
            )
            raise DataError(f"{self.files[0]}, line {line}: {what}")

    def _keep(self) -> None:
        """Take the rows' places from the cache, if they are of this file as it is."""
        name = self.files[0] if is_remote(self.files[0]) else os.path.abspath(self.files[0])  # noqa: PTH100
        state = [*self.reader.stand, *_more(name)]

        def make(_: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            settled = is_remote(name) or time.time_ns() - self.reader.stand[1] > SETTLED * 1e9
            with ThreadPoolExecutor(1) as beside:  # both read the whole file, and hashing needs no interpreter
                content = beside.submit(_hashed, self.reader)
                bounds, blank, faulty = self._found()
            about = {"state": state, "settled": settled, "content": content.result(), "faulty": faulty}
            return {"bounds": bounds, "blank": blank}, about

        kept = keep(["rows", 1, name], state, make, lambda about: about["settled"])
        self.bounds, self.blank, self.faulty = kept.arrays["bounds"], kept.arrays["blank"], kept.about["faulty"]
        self._content = kept.about["content"]

    def _found(self) -> tuple[np.ndarray, np.ndarray, str | None]:
        """[rows + 1] int64: row r is what stands in bytes bounds[r] ... bounds[r + 1] - 2; [blank lines] how many rows
        stand before each; and what is wrong with the list as a whole: "cut", or the place of what follows it."""
        none = np.zeros(0, np.int64)
        if not self.is_list:
            return *self._lines(), None
        scan = list_rows(self.reader.blocks(self.start), self.start)
        end = self.reader.stand[0] if scan.end is None else scan.end
        bounds = np.concatenate([*scan.bounds, [end + 1]]).astype(np.int64)
        if len(bounds) == 2 and not self.reader.read(int(bounds[0]), int(bounds[1] - bounds[0]) - 1).strip(SPACE):
            bounds = bounds[1:]  # an empty list
        faulty = "cut" if scan.end is None else None if scan.after is None else str(scan.after)
        return bounds, none, faulty

    def _lines(self) -> tuple[np.ndarray, np.ndarray]:
        breaks = list(lines(self.reader.blocks(self.start), self.start))
        ends = np.append(np.concatenate(breaks), self.reader.stand[0])
        bounds = np.concatenate([[self.start], ends + 1]).astype(np.int64)
        # A blank line is no row. Whatever begins with space is looked at; the others are many.
        blank = np.zeros(len(bounds) - 1, np.bool_)
        place = 0
        for block_start, block in _placed(self.reader.blocks(self.start), self.start):
            upto = int(np.searchsorted(bounds[:-1], block_start + len(block)))
            first = np.frombuffer(block, np.uint8)[bounds[place:upto] - block_start]
            for line in place + np.flatnonzero((first <= 32) & (first != 0)):
                text = self.reader.read(int(bounds[line]), int(bounds[line + 1] - bounds[line]) - 1)
                blank[line] = not text.strip(SPACE)
            place = upto
        blank[place:] = True  # the file ends with a line break
        rows = np.flatnonzero(~blank)
        before = np.searchsorted(rows, np.flatnonzero(blank))  # rows before each blank line
        last = int(bounds[rows[-1] + 1]) if len(rows) else self.start + 1
        return np.append(bounds[rows], last).astype(np.int64), before.astype(np.int64)

    def _line(self, place: int) -> int:
        """The number of the line that a place is in."""
        count = 1
        for start, block in _placed(self.reader.blocks(), 0):
            count += block.count(b"\n", 0, max(0, place - start))
            if start + len(block) >= place:
                break
        return count


def _placed(blocks: Iterator[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    for block in blocks:
        yield start, block
        start += len(block)


def _beginning(reader: Reader) -> tuple[int, bool]:
    """Where the first character is that is no space, and whether it opens a list."""
    place = 3 if reader.read(0, 3) == b"\xef\xbb\xbf" else 0
    for start, block in _placed(reader.blocks(place), place):
        rest = block.lstrip(SPACE)
        if not rest:
            continue
        if rest[:1] == b"[":
            return start + len(block) - len(rest), True
        if rest[:1] == b"{":
            return place, False
        if rest[0] >= 0x80:
            try:
                rest[:4096].decode("utf-8")
            except UnicodeDecodeError as error:
                if error.start < 4000:  # else the cut is to blame
                    at = start + len(block) - len(rest) + error.start
                    raise DataError(f"{reader.name} is not UTF-8 (byte {at}): {error.reason}") from None
        first = rest[:4].decode("utf-8", "ignore")[:1]
        raise DataError(f"{reader.name} begins with {first!r}: neither a JSON list nor JSONL of objects")
    raise DataError(f"{reader.name} is empty")


def _hashed(reader: Reader) -> str:
    found = hashlib.sha256()
    for block in reader.blocks():
        found.update(block)
    return found.hexdigest()


def _more(name: str) -> list[int]:
    """What a change shows in that left a local file's size and time as they were."""
    if is_remote(name):
        return []
    found = Path(name).stat()
    return [found.st_ctime_ns, found.st_ino]
