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
        meaning = np.frombuffer(block.translate(_TABLE), np.uint8)
        places = np.flatnonzero(meaning)
        kinds = meaning[places]
        kinds, places = self._unescaped(kinds, places, len(block))
        quotes = kinds == QUOTE
        # Of every character: how many quotes stand before it, itself included; odd: it is in a text.
        count = np.cumsum(quotes) + self._in_text
        self._in_text = bool(count[-1] % 2) if len(count) else self._in_text
        shapes = ~quotes & (count % 2 == 0)
        kinds, places = kinds[shapes], places[shapes]
        depth = self._depth + np.cumsum((kinds == OPEN).astype(np.int64) - (kinds == CLOSE))
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

    def _unescaped(self, kinds: np.ndarray, places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """What is left without backslashes, and quotes that they make text."""
        slashes = places[kinds == BACKSLASH]
        if not len(slashes):
            if self._backslashes % 2 and len(places) and places[0] == 0 and kinds[0] == QUOTE:
                kinds, places = kinds[1:], places[1:]
            self._backslashes = 0
            return kinds, places
        first = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)  # of every run of backslashes
        lengths = np.diff(first, append=len(slashes))
        ends = slashes[first] + lengths  # the place behind each run
        if slashes[0] == 0:
            lengths[0] += self._backslashes
        elif self._backslashes:
            ends, lengths = np.concatenate([[0], ends]), np.concatenate([[self._backslashes], lengths])
        self._backslashes = int(lengths[-1]) if ends[-1] == size else 0
        escaped = np.isin(places, ends[lengths % 2 == 1], assume_unique=True) & (kinds == QUOTE)
        kept = (kinds != BACKSLASH) & ~escaped
        return kinds[kept], places[kept]


def list_rows(blocks: Iterable[bytes], start: int) -> ListScan:
    """The rows of a list that begins (with its bracket) at `start`, where `blocks` begins."""
    scan = ListScan(start)
    for block in blocks:
        scan.take(block)
    return scan


def lines(blocks: Iterable[bytes], start: int) -> Iterator[np.ndarray]:
    """The places of line breaks, of each block."""
    for block in blocks:
        yield start + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        start += len(block)
