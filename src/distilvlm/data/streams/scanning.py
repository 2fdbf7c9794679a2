"""Where the rows of a JSON list begin and end, found without parsing them: hundreds of MB a second, in flat memory.

Only characters that shape a list are looked at: quotes, backslashes, brackets and commas. A quote with an odd number of
backslashes in front is text; what stands between two other quotes is, too; a comma in the list itself ends a row. Text
that is no JSON gives rows that don't parse, the first of which is where the fault is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

QUOTE, BACKSLASH, COMMA, OPEN, CLOSE = 1, 2, 3, 4, 5
_MEANING = bytearray(256)
for _characters, _meaning in ((b'"', QUOTE), (b"\\", BACKSLASH), (b",", COMMA), (b"[{", OPEN), (b"]}", CLOSE)):
    for _character in _characters:
        _MEANING[_character] = _meaning
_TABLE = bytes(_MEANING)

SPACE = b" \t\r\n"

PIECE = 2**20
"""Bytes that are looked at together: what is made of them stays in a processor's cache."""


@dataclass
class ListScan:
    """The state between two blocks of a list.

    Attributes:
        bounds: of blocks so far: places behind the opening bracket and every comma of the list; each begins a row.
        end: the place of the closing bracket, once it was met.
    """

    place: int  # of the next block in the file
    end: int | None = None
    after: int | None = None  # place of the first thing that follows the list
    bounds: list[np.ndarray] = field(default_factory=list)
    _depth: int = 0
    _in_text: bool = False
    _backslashes: int = 0  # that the last block ended with

    def take(self, block: bytes) -> None:
        """Look at the next block."""
        if self.end is None:
            self._scan(block)
        if self.end is not None and self.after is None:
            start = max(0, self.end + 1 - self.place)
            rest = block[start:].lstrip(SPACE)
            if rest:
                self.after = self.place + len(block) - len(rest)
        self.place += len(block)

    def _scan(self, block: bytes) -> None:
        meaning = np.frombuffer(bytearray(block.translate(_TABLE)), np.uint8)
        self._unescape(meaning)
        places = np.flatnonzero(meaning)
        kinds = meaning[places]
        quotes = kinds == QUOTE
        # Of every character: whether the quotes up to it, itself included, are odd: it is in a text.
        within = np.logical_xor.accumulate(quotes) ^ self._in_text
        self._in_text = bool(within[-1]) if len(within) else self._in_text
        shapes = np.flatnonzero(~quotes & ~within)
        kinds, places = kinds[shapes], places[shapes]
        steps = (kinds == OPEN).astype(np.int8) - (kinds == CLOSE).astype(np.int8)
        depth = self._depth + np.cumsum(steps, dtype=np.int32)
        closed = np.flatnonzero(depth <= 0)
        if len(closed):
            last = int(closed[0])
            self.end = self.place + int(places[last])
            kinds, places, depth = kinds[:last], places[:last], depth[:last]
        elif len(depth):
            self._depth = int(depth[-1])
        begins = (depth == 1) & (kinds == COMMA)
        if not self.bounds and len(kinds):
            begins[0] = True  # the list's own bracket
        self.bounds.append(self.place + places[begins] + 1)

    def _unescape(self, meaning: np.ndarray) -> None:
        """Take backslashes out, and quotes that they make text."""
        slashes = np.flatnonzero(meaning == BACKSLASH)
        carried, self._backslashes = self._backslashes, 0
        if carried % 2 and meaning[0] == QUOTE:
            meaning[0] = 0
        if not len(slashes):
            return
        first = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)  # of every run of backslashes
        lengths = np.diff(first, append=len(slashes))
        ends = slashes[first] + lengths  # the place behind each run
        if slashes[0] == 0:
            lengths[0] += carried
        if ends[-1] == len(meaning):
            self._backslashes = int(lengths[-1])
            ends, lengths = ends[:-1], lengths[:-1]
        escaped = ends[lengths % 2 == 1]
        meaning[escaped[meaning[escaped] == QUOTE]] = 0
        meaning[slashes] = 0


def list_rows(blocks: Iterable[bytes], start: int) -> ListScan:
    """The rows of a list that begins (with its bracket) at `start`, where `blocks` begins."""
    scan = ListScan(start)
    for block in blocks:
        for place in range(0, len(block), PIECE):
            scan.take(block[place : place + PIECE])
    return scan


def lines(blocks: Iterable[bytes], start: int) -> Iterator[np.ndarray]:
    """The places of line breaks, of each block."""
    for block in blocks:
        yield start + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        start += len(block)
