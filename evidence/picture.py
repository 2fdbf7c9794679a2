"""docs/evidence.svg: every claim about a share, how far each seed speaks for it, and the verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from distilvlm.evaluate import Interval
from distilvlm.report.axes import Axis, fitted, labels

from .verdicts import DOES_NOT_HOLD, HOLDS, NOT_DECIDED

WIDTH, LEFT, RIGHT = 900, 430, 24
"""Of the picture, of the claims beside it, and of its border."""
LINE, GAP = 15, 5
"""Of text, and between claims."""
LETTERS = 62
"""Of a claim in one line."""
SEED = 5
"""Between the seeds of a claim."""

COLOURS = {HOLDS: "#17795e", DOES_NOT_HOLD: "#b3261e", NOT_DECIDED: "#6b7280"}
SHAPES = {
    HOLDS: "M-3.4,0a3.4,3.4 0 1 0 6.8,0a3.4,3.4 0 1 0 -6.8,0z",
    DOES_NOT_HOLD: "M-3,-3h6v6h-6z",
    NOT_DECIDED: "M0,-4l4,4l-4,4l-4,-4z",
}
"""Verdicts differ in shape, too, for whoever does not see their colours: disc, square, diamond."""


@dataclass(frozen=True)
class Judged:
    """A claim, what each seed gains by it in points (above 0: as claimed), and its verdict."""

    says: str
    gains: Sequence[Interval]
    verdict: str


def draw(tables: Mapping[str, Sequence[Judged]]) -> str:
    """The picture of all tables, by their titles."""
    values = [bound for judged in tables.values() for one in judged for gain in one.gains for bound in _bounds(gain)]
    across = fitted([*values, 0.0], LEFT, WIDTH - RIGHT)
    pieces, y = [_key()], 44.0
    tops: list[tuple[float, float]] = []
    for title, judged in tables.items():
        pieces.append(Markup('<text class="title" x="12" y="{}">{}</text>').format(y, title))
        y += 12
        top = y
        for one in judged:
            height = max(LINE * len(_lines(one.says)), SEED * len(one.gains) + 4)
            pieces.append(_claim(one, across, y, height))
            y += height + GAP
        tops.append((top, y))
        y += 30
    base = y - 30
    pieces[1:1] = _grid(across, tops, base)
    style = (
        "text{font:12px system-ui,sans-serif;fill:#1f2937}.title{font-weight:600}.tick{fill:#6b7280;text-anchor:middle}"
        ".grid{stroke:#e5e7eb}.zero{stroke:#6b7280}"
    )
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h:.0f}" role="img" '
            'aria-label="{said}"><style>{style}</style><rect width="{w}" height="{h:.0f}" fill="#fff"/>{inside}</svg>\n'
        ).format(w=WIDTH, h=base + 44, said=_said(tables), style=Markup(style), inside=Markup("\n").join(pieces))
    )


def _claim(one: Judged, across: Axis, y: float, height: float) -> Markup:
    lines, colour = _lines(one.says), COLOURS[one.verdict]
    first = y + (height - LINE * len(lines)) / 2 + 11.5
    pieces = [
        Markup('<text x="12" y="{:.1f}">{}</text>').format(first + LINE * number, line)
        for number, line in enumerate(lines)
    ]
    middle = y + height / 2 - SEED * (len(one.gains) - 1) / 2
    for number, gain in enumerate(one.gains):
        at = middle + SEED * number
        whisker = f"M{across.place(100 * gain.low):.1f},{at:.1f}H{across.place(100 * gain.high):.1f}"
        pieces.append(Markup('<path d="{}" stroke="{}"/>').format(whisker, colour))
        pieces.append(
            Markup('<path transform="translate({:.1f} {:.1f})" d="{}" fill="{}"/>').format(
                across.place(100 * gain.mean), at, SHAPES[one.verdict], colour
            )
        )
    return Markup("").join(pieces)


def _grid(across: Axis, tops: Sequence[tuple[float, float]], base: float) -> Iterator[Markup]:
    ticks = across.ticks()
    for tick, label in zip(ticks, labels(ticks), strict=True):
        x = across.place(tick)
        for top, bottom in tops:
            kind = "grid" if tick else "zero"
            yield Markup('<path class="{}" d="M{:.1f},{:.1f}V{:.1f}"/>').format(kind, x, top, bottom)
        yield Markup('<text class="tick" x="{:.1f}" y="{:.1f}">{}</text>').format(x, base + 16, label)
    name = "points by which the first row is better, a mark a seed, with 95% intervals"
    yield Markup('<text class="tick" x="{:.1f}" y="{:.1f}">{}</text>').format(
        (LEFT + WIDTH - RIGHT) / 2, base + 34, name
    )


def _key() -> Markup:
    pieces, x = [], LEFT
    for verdict, colour in COLOURS.items():
        pieces.append(
            Markup('<path transform="translate({} 16)" d="{}" fill="{}"/><text x="{}" y="20">{}</text>').format(
                x + 4, SHAPES[verdict], colour, x + 14, verdict
            )
        )
        x += 40 + 7 * len(verdict)
    return Markup("").join(pieces)


def _said(tables: Mapping[str, Sequence[Judged]]) -> str:
    """The picture in words, for who does not see it."""
    return "; ".join(
        f"{title}: " + ", ".join(f"{sum(one.verdict == known for one in judged)} {known}" for known in COLOURS)
        for title, judged in tables.items()
    )


def _lines(says: str) -> list[str]:
    return textwrap.wrap(says, LETTERS, break_on_hyphens=False)


def _bounds(gain: Interval) -> tuple[float, float]:
    return 100 * gain.low, 100 * gain.high
