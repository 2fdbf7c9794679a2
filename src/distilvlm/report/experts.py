"""How a student's experts were used, of its language model or its vision encoder: which served how much, by layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .formats import LayerUse
from .read import Stage

WIDTH, ROW = 380, 13
COLUMNS = 60
"""Stretches of updates that a map shows at most, each the mean of its updates."""

TAIL = 10
"""The figures beside a map are means over the last tenth of the updates."""


@dataclass(frozen=True)
class Layer:
    """One sparse layer of a stage."""

    number: int  # among the sparse layers, from 1
    map: Markup  # a row per expert, a column per stretch of updates, darker where it served more
    load: list[float]  # share of all choices per expert
    entropy: float  # of the router's probabilities, as a share of the largest possible
    dropped: float  # share of choices that found their expert full


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
        return any(layer.dropped for layer in self.layers)


def experts(run: str, series: int, stage: Stage) -> list[Experts]:
    """Of each part that has any."""
    found: list[Experts] = []
    for part, told in (
        ("vision encoder", [update.vision_routing for update in stage.updates if update.vision_routing]),
        ("language model", [update.routing for update in stage.updates if update.routing]),
    ):
        if told:
            layers = [_layer(number, [update[number] for update in told]) for number in range(len(told[0]))]
            found.append(Experts(run, series, part, layers))
    return found


def _layer(number: int, uses: Sequence[LayerUse]) -> Layer:
    tail = uses[-max(1, len(uses) // TAIL) :]
    count = len(uses[0].load)
    load = [math.fsum(use.load[expert] for use in tail) / len(tail) for expert in range(count)]
    return Layer(
        number=number + 1,
        map=_map(number + 1, uses, load),
        load=load,
        entropy=math.fsum(use.entropy for use in tail) / len(tail) / math.log(count),
        dropped=math.fsum(use.dropped for use in tail) / len(tail),
    )


def _map(number: int, uses: Sequence[LayerUse], load: Sequence[float]) -> Markup:
    """Shades are of twice an even share at most: an expert that serves half of that is as pale as it looks."""
    count, columns = len(load), min(COLUMNS, len(uses))
    full = min(1.0, 2 / count)
    width = WIDTH / columns
    cells: list[Markup] = []
    for column in range(columns):
        stretch = uses[column * len(uses) // columns : (column + 1) * len(uses) // columns]
        for expert in range(count):
            share = math.fsum(use.load[expert] for use in stretch) / len(stretch)
            cell = Markup('<rect x="{x}" y="{y}" width="{w}" height="{h}" fill-opacity="{o}"/>')
            cells.append(
                cell.format(
                    x=f"{column * width:.1f}",
                    y=expert * ROW,
                    w=f"{width + 0.2:.1f}",  # a little over, or seams show between the columns
                    h=ROW - 1,
                    o=f"{min(1.0, share / full):.2f}",
                )
            )
    said = ", ".join(f"expert {expert + 1} {100 * share:.0f}%" for expert, share in enumerate(load))
    return Markup('<svg class="experts" viewBox="0 0 {w} {h}" role="img" aria-label="{said}">{body}</svg>').format(
        w=WIDTH, h=count * ROW, said=f"layer {number}, at the end: {said}", body=Markup("").join(cells)
    )
