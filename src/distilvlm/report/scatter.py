"""Models as points: quality against a quantity, a point per seed with its interval, drawn as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .axes import fitted, reading
from .curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, grid

SHAPES = (
    "M-4.6,0a4.6,4.6 0 1 0 9.2,0a4.6,4.6 0 1 0 -9.2,0z",
    "M-4,-4h8v8h-8z",
    "M0,-5.4l5.2,9h-10.4z",
    "M0,-5.8l5.8,5.8l-5.8,5.8l-5.8,-5.8z",
)
"""Models differ in shape, too, for whoever does not see their colours: disc, square, triangle, diamond."""


@dataclass(frozen=True)
class Point:
    """One model.

    Args:
        values: mean, low and high of each seed.
        said: x in words.
    """

    label: str
    series: int
    x: float
    values: Sequence[tuple[float, float, float]]
    said: str


@dataclass(frozen=True)
class Scatter:
    title: str
    over: str
    svg: Markup
    points: list[Point]


def scatter(title: str, points: Sequence[Point], over: str) -> Scatter:
    """Draw every model's values over its x."""
    across = fitted((point.x for point in points), LEFT, WIDTH - RIGHT)
    up = fitted((value for point in points for one in point.values for value in one), HEIGHT - BOTTOM, TOP)
    pieces = [grid(across, up, over + (" (log scale)" if across.log else ""))]
    for point in points:
        x = across.place(point.x)
        for mean, low, high in point.values:
            whisker = f"M{x:.1f},{up.place(low):.1f}V{up.place(high):.1f}"
            pieces.append(Markup('<path class="whisker s{}" d="{}"/>').format(point.series, whisker))
            pieces.append(marker(point.series, x, up.place(mean)))
    said = "; ".join(f"{point.label} {reading(_mean(point))} at {point.said}" for point in points)
    svg = Markup('<svg class="scatter" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{title} over {over}: {said}", Markup("").join(pieces)
    )
    return Scatter(title, over, svg, list(points))


def marker(series: int, x: float, y: float) -> Markup:
    """A model's mark at a place of a picture."""
    shape = SHAPES[series % len(SHAPES)]
    return Markup('<path class="point s{}" transform="translate({:.1f} {:.1f})" d="{}"/>').format(series, x, y, shape)


def _mean(point: Point) -> float:
    return sum(mean for mean, _, _ in point.values) / len(point.values)
