"""What a model saw of one sample: its tokens, which of them are picture, and which are learned."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distilvlm.data import IGNORED, DataError, Encoded, Record, Template
from distilvlm.data import read as read_data
from distilvlm.models.save import load
from distilvlm.models.vlm import VLM
from distilvlm.recipe import SourceSpec

from .read import Run

LOOKED_AT = 16
"""Rows from the start of a file among which a sample is looked for: one with a picture if there is one."""

SpanKind = Literal["prompt", "learned", "picture"]


@dataclass(frozen=True)
class Span:
    """Neighbouring positions of one kind."""

    kind: SpanKind
    positions: int
    tokens: tuple[str, ...] = ()  # a piece of text per token; empty for a picture
    registers: int = 0  # of a picture's positions: placeholders that are no picture


@dataclass(frozen=True)
class Mask:
    """One sample of a data source."""

    template: str
    source: str
    place: str  # file and row; of preferences also which answer
    spans: tuple[Span, ...]
    pictures: tuple[str, ...]
    cut: bool
    used_by: tuple[str, ...]  # runs and stages

    @property
    def positions(self) -> int:
        return sum(span.positions for span in self.spans)

    @property
    def learned(self) -> int:
        return sum(span.positions for span in self.spans if span.kind == "learned")

    @property
    def visual(self) -> int:
        return sum(span.positions - span.registers for span in self.spans if span.kind == "picture")


@dataclass(frozen=True)
class NoMask:
    """A source whose sample can't be shown, and why."""

    source: str
    used_by: tuple[str, ...]
    problem: str


def masks(runs: Sequence[Run]) -> list[Mask | NoMask]:
    """One sample for every data source of every run, of pairs both sides; samples that two runs see alike are shown
    once."""
    found: list[Mask | NoMask] = []
    for run in runs:
        vlm, problem = _model(run)
        for source, stages in _sources(run).items():
            users = (f"{run.name}: {', '.join(stages)}",)
            longest = min(stage.spec.max_length for stage in run.stages if source in stage.spec.data)
            made = [NoMask(source, users, problem)] if vlm is None else _masks(run, source, vlm, longest, users)
            for one in made:
                same = next((at for at, other in enumerate(found) if _unused(other) == _unused(one)), None)
                if same is None:
                    found.append(one)
                else:
                    found[same] = replace(found[same], used_by=(*found[same].used_by, *users))
    return found


def spans(encoded: Encoded, tokenizer: Any, visual: Sequence[bool]) -> tuple[Span, ...]:
    """The positions of a row, neighbours of one kind together.

    Args:
        visual: [placeholders] of one picture; False is a register.
    """
    placeholder = {*encoded.placeholder_positions.tolist()}
    ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
    made: list[Span] = []
    start = 0
    while start < len(ids):
        if start in placeholder:
            made.append(Span("picture", len(visual), registers=len(visual) - sum(visual)))
            start += len(visual)
            continue
        learned = labels[start] != IGNORED
        end = start
        while end < len(ids) and end not in placeholder and (labels[end] != IGNORED) == learned:
            end += 1
        made.append(Span("learned" if learned else "prompt", end - start, _pieces(ids[start:end], tokenizer)))
        start = end
    return tuple(made)


def _pieces(ids: Sequence[int], tokenizer: Any) -> tuple[str, ...]:
    """The text of each token; tokens that make one character together stay together."""
    pieces: list[str] = []
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        if "\ufffd" in text and len(waiting) < 4:
            continue
        pieces.append(text)
        waiting = []
    if waiting:
        pieces.append(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
    return tuple(pieces)


def _sources(run: Run) -> dict[str, list[str]]:
    """Data source → names of the stages that train on it, in order."""
    used: dict[str, list[str]] = {}
    for stage in run.stages:
        for source in stage.spec.data:
            used.setdefault(source, []).append(stage.spec.name)
    return used


def _model(run: Run) -> tuple[VLM | None, str]:
    """The run's finished student without its weights: its tokenizer and the layout of its visual tokens."""
    if not run.finished:
        return None, "the run is not finished, so it has no model with a tokenizer yet"
    try:
        with _silent("distilvlm.models"):  # what it would say was said when the run was made
            vlm = load(run.path / "model", meta=True)
    except (OSError, ValueError) as error:
        return None, f"its model does not load: {error}"
    return (vlm, "") if vlm.tokenizer is not None else (None, "its model has no tokenizer")


def _masks(run: Run, source: str, vlm: VLM, max_length: int, users: tuple[str, ...]) -> Sequence[Mask | NoMask]:
    spec = run.recipe.data[source]
    try:
        record = _sample(spec, source)
        template = Template.of(spec.template, vlm.tokenizer)
        made = {
            which: template.encode(side, vlm.layout.placeholders, max_length) for which, side in _sides(record).items()
        }
    except (DataError, OSError, ValueError) as error:  # RowError is a ValueError, too
        return [NoMask(source, users, f"its data can't be read now: {error}")]
    return [
        Mask(
            template=spec.template,
            source=source,
            place=f"{Path(record.key.file).name}, row {record.key.row}{which}",
            spans=spans(encoded, vlm.tokenizer, vlm.layout.visual),
            pictures=record.images,
            cut=encoded.cut,
            used_by=users,
        )
        for which, encoded in made.items()
    ]


def _sides(record: Record) -> dict[str, Record]:
    """Which answer -> the conversation that ends with it."""
    if record.preferences == "pairs":
        return {", chosen": record, ", rejected": record.rejected()}
    if record.preferences == "rated":
        return {f", rated {'desirable' if record.desirable else 'undesirable'}": record}
    return {"": record}


def _sample(spec: SourceSpec, name: str) -> Record:
    """The first usable row with a picture among the first ones, or the first usable row. Raises DataError."""
    first = spec.model_copy(update={"take": LOOKED_AT, "rows": None})
    with _silent("distilvlm.data"):  # counts of the first rows would be taken for the file's
        records = read_data(first, name).records
    if not len(records):
        raise DataError(f"no usable row among the first {LOOKED_AT} of {spec.path}")
    return next((record for record in records if record.images), records[0])


@contextmanager
def _silent(room: str) -> Iterator[None]:
    quiet = logging.getLogger(room)
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        yield
    finally:
        quiet.setLevel(level)


def _unused(mask: Mask | NoMask) -> Mask | NoMask:
    return replace(mask, used_by=())
