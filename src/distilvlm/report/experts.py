"""How a student's experts were used over a stage, of its language model or its vision encoder, layer by layer: which
served, how sure routers were."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from .formats import LayerUse
from .read import Stage

ROW = 13
"""Height of an expert's row of a map in pixels; maps are as wide as their column of the page."""

COLUMNS = 60
"""Stretches of updates that a map shows at most, each the mean of its updates."""

STEPS = 4
"""Shades on either side of an even share: the last is twice of it, or half."""

SPARK = (60, 20)
"""Width and height of the line of a layer's entropy."""

TAIL = 10
"""The figures beside a map are means over the last tenth of the updates."""


@dataclass(frozen=True)
class Layer:
    """One sparse layer of a stage. Shares of entropy are of the largest possible: all experts alike to the router."""

    name: str  # its number in the language model, or among the sparse layers
    map: Markup  # a row per expert, a column per stretch of updates
    load: list[float]  # share of all choices per expert, at the end
    line: Markup  # entropy over the updates
    entropy: tuple[float, float]  # in the first tenth of the updates, and in the last
    dropped: float  # share of choices that found their expert full, over the whole stage
    most_dropped: float  # of an update


@dataclass(frozen=True)
class Experts:
    """The layers with experts of one run's stage."""

    run: str
    series: int
    part: str  # "language model" or "vision encoder"
    layers: list[Layer]

    @property
    def even(self) -> float:
        """Each expert's share if all served alike."""
        return 1 / len(self.layers[0].load)

    @property
    def drops(self) -> bool:
        return any(layer.most_dropped for layer in self.layers)


def experts(run: str, series: int, stage: Stage) -> list[Experts]:
    """Of each part that has any."""
    known = [] if stage.about is None or stage.about.student is None else stage.about.student.sparse_layers
    found: list[Experts] = []
    for part, word, numbers, told in (
        ("vision encoder", "layer", [], [update.vision_routing for update in stage.updates if update.vision_routing]),
        ("language model", "sparse layer", known, [update.routing for update in stage.updates if update.routing]),
    ):
        if not told:
            continue
        names = [f"layer {layer}" for layer in numbers]
        if len(names) != len(told[0]):  # their numbers are not recorded
            names = [f"{word} {number + 1}" for number in range(len(told[0]))]
        layers = [_layer(name, [update[at] for update in told]) for at, name in enumerate(names)]
        found.append(Experts(run, series, part, layers))
    return found


def mean_entropy(uses: Sequence[LayerUse]) -> float | None:
    """Over the layers of an update, as a share of the largest possible; None for a dense student."""
    return math.fsum(map(_undecided, uses)) / len(uses) if uses else None


def mean_dropped(uses: Sequence[LayerUse]) -> float | None:
    """Over the layers of an update; None for a dense student."""
    return math.fsum(use.dropped for use in uses) / len(uses) if uses else None


def _undecided(use: LayerUse) -> float:
    return use.entropy / math.log(len(use.load))


def _layer(name: str, uses: Sequence[LayerUse]) -> Layer:
    few = max(1, len(uses) // TAIL)
    load = [_mean(uses[-few:], lambda use, at=expert: use.load[at]) for expert in range(len(uses[0].load))]
    return Layer(
        name=name,
        map=_map(name, uses, load),
        load=load,
        line=_line(uses),
        entropy=(_mean(uses[:few], _undecided), _mean(uses[-few:], _undecided)),
        dropped=_mean(uses, lambda use: use.dropped),
        most_dropped=max(use.dropped for use in uses),
    )


def _mean(uses: Sequence[LayerUse], value: Callable[[LayerUse], float]) -> float:
    return math.fsum(map(value, uses)) / len(uses)


def _stretches(uses: Sequence[LayerUse]) -> list[Sequence[LayerUse]]:
    columns = min(COLUMNS, len(uses))
    return [uses[at * len(uses) // columns : (at + 1) * len(uses) // columns] for at in range(columns)]


def shade(share: float, even: float) -> int:
    """From −STEPS (half of an even share, or less) over 0 (even) to STEPS (twice of it, or more)."""
    if share <= 0:
        return -STEPS
    return round(STEPS * min(1.0, max(-1.0, math.log2(share / even))))


def _map(name: str, uses: Sequence[LayerUse], load: Sequence[float]) -> Markup:
    """Cells of one shade are one path, and neighbours of one shade one rectangle of it: a page may have many maps."""
    stretches, count = _stretches(uses), len(load)
    rectangles: dict[int, list[str]] = {}
    for expert in range(count):
        shades = [shade(_mean(part, lambda use, at=expert: use.load[at]), 1 / count) for part in stretches]
        for value, cells in groupby(enumerate(shades), key=lambda cell: cell[1]):
            places = [place for place, _ in cells]
            across = len(places)
            rectangles.setdefault(value, []).append(f"M{places[0]},{expert * ROW}h{across}v{ROW - 1}h-{across}z")
    paths = [f'<path class="{_name(value)}" d="{"".join(pieces)}"/>' for value, pieces in sorted(rectangles.items())]
    said = ", ".join(f"expert {expert + 1} {100 * share:.0f}%" for expert, share in enumerate(load))
    return Markup(
        '<svg class="experts" viewBox="0 0 {w} {h}" height="{h}" preserveAspectRatio="none" role="img" '
        'aria-label="{said}">{body}</svg>'
    ).format(w=len(stretches), h=count * ROW - 1, said=f"{name}, at the end: {said}", body=Markup("".join(paths)))


def _name(value: int) -> str:
    """Class of a shade, which the style sheet colours."""
    return "even" if not value else f"more m{value}" if value > 0 else f"less m{-value}"


def _line(uses: Sequence[LayerUse]) -> Markup:
    width, height = SPARK
    values = [_mean(part, _undecided) for part in _stretches(uses)]
    step = width / max(1, len(values) - 1)
    points = "L".join(f"{at * step:.1f},{1 + (height - 2) * (1 - value):.1f}" for at, value in enumerate(values))
    if len(values) == 1:  # a line without length, which round ends make a dot
        points += f"L{points}"
    return Markup(
        '<svg class="spark" viewBox="0 0 {w} {h}" aria-hidden="true"><path class="grid" d="M0,1H{w}M0,{b}H{w}"/>'
        '<path class="mean s0" d="M{points}"/></svg>'
    ).format(w=width, h=height, b=height - 1, points=points)
