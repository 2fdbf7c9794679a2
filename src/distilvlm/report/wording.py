"""Numbers and facts as the page writes them: the filters of its templates."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from distilvlm.recipe import Transform
from distilvlm.recipe.schema import LossSpec
from distilvlm.runs import about

from .formats import Interval
from .read import Stage

MINUS = "\u2212"

_TRANSFORM: TypeAdapter[Any] = TypeAdapter(Transform)

LONGEST = 600
"""Characters of an answer that the page shows."""


def share(interval: Interval, percent: bool = True) -> str:
    """A score in percent, `87.1 [86.5, 87.7]`, or a number as it is, `12.34 [12.05, 12.70]`."""
    unit, digits = (100, 1) if percent else (1, 2)
    mean, low, high = (f"{unit * value:.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def points(interval: Interval, percent: bool = True) -> str:
    """A difference in percentage points, `+6.3 [+5.8, +6.9]`, or of numbers as they are."""
    unit, digits = (100, 1) if percent else (1, 2)
    mean, low, high = (_signed(unit * value, digits) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def size(value: float | None) -> str:
    """Bytes for a person: `1.22 GB` (powers of 1000, as disks are sold and `plan` counts)."""
    if value is None:
        return "not measured"
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= step:
            return f"{value / step:.3g} {unit}" if value < 1000 * step else f"{value / step:,.0f} {unit}"
    return f"{value:.0f} bytes"


def duration(value: float | None) -> str:
    """Seconds for a person: `83 ms`, `12.4 s`, `3 min 20 s`, `2 h 5 min`."""
    if value is None:
        return "not measured"
    if value < 1:
        return f"{1000 * value:.3g} ms" if value else "0 s"
    if value < 90:
        return f"{value:.3g} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def relative_error(estimate: float | None, measured: float | None) -> str:
    """How far the estimate is off what was measured, `+7%`; nothing where one is missing."""
    if estimate is None or not measured:
        return "\u2013"
    return f"{_signed(100 * (estimate / measured - 1), 0)}%"


def command(words: str | list[str]) -> str:
    """A command as it is typed, without the folder of the program."""
    if isinstance(words, str):
        return words
    return shlex.join([Path(words[0]).name, *words[1:]]) if words else ""


def transform(steps: list[Any]) -> str:
    """What a stage does to the student before it trains."""
    return "; ".join(
        str(_TRANSFORM.validate_python(dict(step) if isinstance(step, Mapping) else step)) for step in steps
    )


def terms(stage: Stage) -> str:
    """The loss of a stage: `text + response + 0.5 relation`."""
    given = stage.about.terms if stage.about is not None and stage.about.terms else stage.spec.loss.weights
    used = {name: weight for name, weight in given.items() if name != "temperature" and weight}
    loss = stage.spec.loss
    full = {"preference": f"preference ({preference_kind(loss)})"}
    said = " + ".join(
        full.get(name, name) if weight == 1 else f"{weight:g} {full.get(name, name)}"
        for name, weight in used.items()
        if name not in loss.schedule
    )
    changing = [f"{name} ({loss.told(name)})" for name in used if name in loss.schedule]
    said = " + ".join([said, *changing] if said else changing)
    said += f", {loss.compared_by}" if loss.compared_by else ""
    said += _aligned(stage)
    return said + (f"; as LLaVA-MoD's code: {', '.join(stage.spec.reference)}" if stage.spec.reference else "")


def _aligned(stage: Stage) -> str:
    """How much of a stage's answers has a partner in the rows of a teacher that reads its own."""
    counts = [] if stage.about is None else [source for source in stage.about.data.values() if "paired" in source]
    learned, paired = (sum(source[name] for source in counts) for name in ("learned", "paired"))
    if not learned or not any(source["teachers_longest"] for source in counts):
        return ""
    return f"; {paired / learned:.0%} of the tokens have a partner in the teacher's rows"


def preference_kind(loss: LossSpec) -> str:
    """Which preference loss, and what shapes it: `kto, β 0.1`."""
    shaping = {"λ desirable": loss.desirable, "λ undesirable": loss.undesirable}
    said = [f"{name} {value:g}" for name, value in shaping.items() if value != 1]
    said += [f"label smoothing {loss.label_smoothing:g}"] if loss.label_smoothing else []
    return ", ".join([loss.preference_kind, f"β {loss.beta:g}", *said])


def student(stages: Sequence[Stage], index: int) -> str:
    """The student's size from this stage on, where the stage changes it: `33,904 parameters, 27,760 serve a token`."""
    sizes = [None if stage.about is None else stage.about.student for stage in stages[: index + 1]]
    size, before = sizes[index], next((one for one in reversed(sizes[:index]) if one is not None), None)
    if size is None or not size.sparse_layers or (before is not None and before.parameters == size.parameters):
        return ""
    return f"{size.parameters:,} parameters, {size.active_parameters:,} serve a token"


def moment(text: str | None) -> str:
    """An ISO time without its fraction of a second."""
    if not text:
        return "not recorded"
    whole = text.replace("T", " ").split(".")[0].removesuffix("+00:00").removesuffix("Z")
    return f"{whole} UTC" if text.endswith(("+00:00", "Z")) and len(whole) > 10 else whole


def machine(facts: Mapping[str, Any] | str) -> str:
    """Processor, cores, memory and device, as far as they are known."""
    if isinstance(facts, str):
        return facts or "not recorded"
    if {"processor", "cores", "memory_bytes", "device"} <= {*facts}:
        return about.in_words(dict(facts))
    return ", ".join(f"{name} {value}" for name, value in facts.items()) or "not recorded"


def token(text: str) -> str:
    """A token's text with its white space made visible."""
    return text.replace("\n", "\u21b5\n").replace("\t", "\u2192\t")


def clipped(text: str) -> str:
    """An answer that does not end (an untrained model's) up to where it says no more."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} \u2026 ({len(text):,} characters)"


def count(value: float | None) -> str:
    """A number of a data report, which older runs may lack."""
    return "\u2013" if value is None else f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"


def questions(count: int) -> str:
    return f"{count:,} question{'' if count == 1 else 's'}"


def rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _signed(value: float, digits: int = 1) -> str:
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"
