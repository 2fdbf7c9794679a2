"""Curves as inline SVG: every value faint, its moving average on top. Readable without JavaScript."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

from distilvlm.recipe import ANCHOR, TERMS

from .axes import Axis, fitted, labels, reading
from .experts import Experts, experts, mean_dropped, mean_entropy
from .formats import Update
from .read import Run, Stage
from .wording import preference_kind

WIDTH, HEIGHT = 380, 226
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 10, 42
LETTER = 8.5
"""Width of a letter of a label."""
POINTS = 300
"""Points per line at most: about one per unit of the picture's width."""

MEASURES = {
    "chosen_reward": "reward of chosen (β · log-ratio)",
    "rejected_reward": "reward of rejected (β · log-ratio)",
    "preference_accuracy": "records on the right side (share)",
    "z0": "z0: how far the student has moved (nats)",
}
"""What stands among the terms and is only watched: name → title."""

PREFERENCES = (
    "A log-ratio is an answer's log-probability under the student less that under its reference, in nats. On the right "
    "side are pairs whose chosen answer has the greater one, and rated answers above z0 if good, below it if not."
)

ROUTERS: dict[str, Callable[[Update], float | None]] = {
    "router entropy (of the largest)": lambda update: mean_entropy(update.routing),
    "choices dropped (share)": lambda update: mean_dropped(update.routing),
}
"""Title → value, of sparse students: means over their layers."""


DISTANCE = "encoder."

TEACHERS = {
    DISTANCE: ("distance to each encoder's features", "distance to the features of {}"),
    "encoder_weight.": ("how much each encoder counts", "how much {} counts"),
}
"""What is told of every encoder that teaches: beginning of the term → titles, of all encoders and of one."""


Kind = Literal["runs", "teachers", "seeds"]
"""What the lines of a chart are of."""


@dataclass(frozen=True)
class Line:
    """One run's values over its updates, or one seed's over a quantity."""

    label: str
    series: int  # which of the page's colours
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    log: bool
    lines_are: Kind
    ends: list[tuple[str, int, str]]  # (label, series, mean of the last tenth)


@dataclass(frozen=True)
class StageCharts:
    """All charts of the stages that stand at one place of the compared runs."""

    title: str
    names: list[tuple[str, int, str]]  # (run, series, what the stage is called there and how long it is)
    charts: list[Chart]
    note: str  # what the charts' values mean, where their titles do not say it all
    experts: list[Experts]  # of the runs whose student has any there


def stage_charts(runs: dict[str, Run], series: dict[str, int]) -> list[StageCharts]:
    """Charts by the stages' places; runs that have the same term at the same place share one chart."""
    found: list[StageCharts] = []
    for index in range(max((len(run.stages) for run in runs.values()), default=0)):
        stages = {name: run.stages[index] for name, run in runs.items() if index < len(run.stages)}
        names = [(name, series[name], _length(stage)) for name, stage in stages.items()]
        drawn = {name: stage for name, stage in stages.items() if stage.updates}
        sparse = [use for name, stage in drawn.items() for use in experts(name, series[name], stage)]
        note = PREFERENCES if any(stage.spec.loss.preference for stage in drawn.values()) else ""
        found.append(StageCharts(f"Stage {index + 1}", names, _charts(drawn, series), note, sparse))
    return found


def _length(stage: Stage) -> str:
    done, planned = len(stage.updates), stage.planned
    if stage.finished or planned == done:
        return f"{stage.spec.name}, {done:,} updates"
    of = f" of {planned:,}" if planned else ""
    return f"{stage.spec.name}, {done:,}{of} updates so far"


def _charts(stages: Mapping[str, Stage], series: Mapping[str, int]) -> list[Chart]:
    used = {term for term in _terms(stages) if not _of_teacher(term)}
    known = [*TERMS, *MEASURES]
    ordered = [term for term in known if term in used] + sorted(used.difference(known))
    wanted: list[tuple[str, Callable[[Update], float | None]]] = []
    weighed = [term for term in ordered if term not in MEASURES]
    if len(weighed) > 1:
        wanted.append(("loss (weighted sum)", lambda update: update.loss))
    for term in ordered:
        whole = [term] == weighed
        title = _title(term, stages.values(), whole)
        wanted.append((title, lambda update, term=term, whole=whole: update.loss if whole else update.terms.get(term)))
    wanted += [
        (title, value)
        for title, value in ROUTERS.items()
        if any(value(update) for stage in stages.values() for update in stage.updates)
    ]
    technical: list[tuple[str, Callable[[Update], float | None]]] = [
        ("learning rate", lambda update: update.rate),
        ("gradient norm", lambda update: update.gradient_norm),
        ("seconds per update", lambda update: update.seconds),
    ]
    charts = [chart(title, lines) for title, value in wanted if (lines := _lines(stages, series, value))]
    charts += _teachers(stages, series)
    for title, value in technical:
        if lines := _lines(stages, series, value):
            charts.append(chart(title, lines, smooth=title != "learning rate"))
    return charts


def _title(term: str, stages: Collection[Stage], whole: bool) -> str:
    """A term's name, with what its values are to be held against where that is the same for all runs."""
    if term in MEASURES:
        return MEASURES[term]
    found = {_note(term, stage) for stage in stages if any(term in update.terms for update in stage.updates)}
    notes = [note for note in (found.pop() if len(found) == 1 else "", "the whole loss" if whole else "") if note]
    return f"term: {term}" + (f" ({'; '.join(notes)})" if notes else "")


def _note(term: str, stage: Stage) -> str:
    if term == "preference":
        return preference_kind(stage.spec.loss)
    if term == "balance":
        # 1 per layer and answer that is learned, where all experts serve alike
        answers = 2 if stage.spec.loss.preference and stage.spec.loss.preference_kind != "kto_unpaired" else 1
        layers = max(len(update.routing) for update in stage.updates)
        return f"{layers * answers} at best" if layers else ""
    return ""


def _lines(
    stages: Mapping[str, Stage], series: Mapping[str, int], value: Callable[[Update], float | None]
) -> list[Line]:
    """One line for each run that has the value."""
    lines: list[Line] = []
    for name, stage in stages.items():
        points = [(update.number, given) for update in stage.updates if (given := value(update)) is not None]
        if points:
            lines.append(Line(name, series[name], [x for x, _ in points], [y for _, y in points]))
    return lines


def _terms(stages: Mapping[str, Stage]) -> list[str]:
    """All terms that are told of, in the order in which they come."""
    return list(dict.fromkeys(term for stage in stages.values() for update in stage.updates for term in update.terms))


def _of_teacher(term: str) -> bool:
    return term.startswith(tuple(TEACHERS))


def _teachers(stages: Mapping[str, Stage], series: Mapping[str, int]) -> list[Chart]:
    """What is told of each encoder that teaches: of one run in one chart, to compare encoders; of several runs
    in one chart for each encoder. The anchor's distance stands alone: it begins at 0 and is small."""
    charts: list[Chart] = []
    for prefix, (of_all, of_one) in TEACHERS.items():
        lines = {
            term.removeprefix(prefix): _lines(stages, series, lambda update, term=term: update.terms.get(term))
            for term in _terms(stages)
            if term.startswith(prefix)
        }
        alone = [name for name in lines if len(stages) > 1 or (prefix == DISTANCE and name == ANCHOR)]
        charts += [chart(of_one.format(name), lines[name]) for name in alone]
        places = {name: place % 8 for place, name in enumerate(lines)}  # an encoder's colour is the same in all charts
        together = [replace(lines[name][0], label=name, series=places[name]) for name in lines if name not in alone]
        if together:
            charts.append(chart(of_all, together, lines_are="teachers"))
    return charts


def chart(
    title: str, lines: Sequence[Line], smooth: bool = True, lines_are: Kind = "runs", over: str = "update"
) -> Chart:
    """Draw lines over their updates, or over something else. Values that are not finite are left out."""
    kept = [_finite(line) for line in lines]
    kept = [line for line in kept if line.x]
    last = max((line.x[-1] for line in kept), default=1)
    across = Axis(min((line.x[0] for line in kept), default=0), max(last, 2), LEFT, WIDTH - RIGHT)
    up = fitted((value for line in kept for value in line.y), HEIGHT - BOTTOM, TOP)
    ends = [(line.label, line.series, reading(_tail(line.y))) for line in kept]
    means = [Line(line.label, line.series, line.x, smoothed(line.y)) for line in kept] if smooth else kept
    pieces = [grid(across, up, over + (" (values on a log scale)" if up.log else ""))]
    pieces += [_path(line, across, up, "raw") for line in kept if smooth]
    pieces += [_path(line, across, up, "mean") for line in means]
    said = "; ".join(f"{line.label} from {reading(line.y[0])} to {reading(_tail(line.y))}" for line in kept)
    svg = Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-label="{said}" data-x="{x0} {x1} {p0} {p1}" '
        'data-y="{y0} {y1} {q0} {q1} {log}">{body}</svg>'
    ).format(
        w=WIDTH,
        h=HEIGHT,
        said=f"{title} over {over}s: {said}" if over == "update" else f"{title} over {over}: {said}",
        x0=f"{across.low:g}",
        x1=f"{across.high:g}",
        p0=across.start,
        p1=across.end,
        y0=f"{up.low:.6g}",
        y1=f"{up.high:.6g}",
        q0=up.start,
        q1=up.end,
        log=int(up.log),
        body=Markup("").join(pieces),
    )
    return Chart(title, svg, up.log, lines_are, ends)


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average over about a thirtieth of the values, narrower towards both ends."""
    half = max(1, len(values) // 60)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means: list[float] = []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        means.append((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))
    return means


def thinned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> list[tuple[float, float]]:
    """At most `points` of a line: the smallest and the largest value of every stretch, so that no peak is lost."""
    if len(x) <= points:
        return list(zip(x, y, strict=True))
    stretches = points // 2 - 1
    kept = {0, len(x) - 1}
    for stretch in range(stretches):
        members = range(stretch * len(x) // stretches, (stretch + 1) * len(x) // stretches)
        kept |= {min(members, key=y.__getitem__), max(members, key=y.__getitem__)}
    return [(x[place], y[place]) for place in sorted(kept)]


def _finite(line: Line) -> Line:
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    return Line(line.label, line.series, [x for x, _ in points], [y for _, y in points])


def _tail(values: Sequence[float]) -> float:
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)


def _path(line: Line, across: Axis, up: Axis, kind: str) -> Markup:
    points = thinned(line.x, line.y, POINTS if kind == "raw" else POINTS // 2)
    drawn = "L".join(f"{across.place(x):.1f},{up.place(y):.1f}" for x, y in points)
    if len(points) == 1:  # a line without length, which round ends make a dot
        drawn += f"L{drawn}"
    label = Markup(' data-label="{}"').format(line.label) if kind == "mean" else ""
    return Markup('<path class="{} s{}"{} d="M{}"/>').format(kind, line.series, label, drawn)


def grid(across: Axis, up: Axis, name: str) -> Markup:
    """Lines and labels of a chart's axes, the lower one with its name."""
    pieces: list[str] = []
    for value, label in zip(up.ticks(), labels(up.ticks()), strict=True):
        y = up.place(value)
        pieces.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}"/>')
        pieces.append(f'<text x="{LEFT - 6}" y="{y + 4.5:.1f}" text-anchor="end">{label}</text>')
    base = HEIGHT - BOTTOM
    pieces.append(f'<path class="axis" d="M{LEFT},{base}H{WIDTH - RIGHT}"/>')
    for value, label in _apart(across):
        x = across.place(value)
        pieces.append(f'<path class="axis" d="M{x:.1f},{base}v4"/>')
        pieces.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{label}</text>')
    label = Markup('<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>')
    return Markup("".join(pieces)) + label.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, name)


def _apart(across: Axis) -> list[tuple[float, str]]:
    """Ticks of a lower axis, so many that their labels do not run into each other."""
    found: list[tuple[float, str]] = []
    for about in (6, 5, 4, 3, 2):
        ticks = across.ticks(about)
        found = list(zip(ticks, labels(ticks), strict=True))
        room = LETTER * (1 + max((len(label) for _, label in found), default=0))
        if all(across.place(right) - across.place(left) >= room for left, right in pairwise(ticks)):
            break
    return found
