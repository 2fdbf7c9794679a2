"""One pass over a stage's samples before its first step: templates, masks, lengths, headers of pictures."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from distilvlm.data import geometry
from distilvlm.data.batch import BadRow
from distilvlm.data.parallel import mapped
from distilvlm.data.problems import RowError
from distilvlm.data.records import Record
from distilvlm.data.report import DataReport, SourceReport
from distilvlm.data.template import Encoded
from distilvlm.storage import is_inside

if TYPE_CHECKING:
    from distilvlm.data.dataset import StageData

STRETCH = 512
"""Samples of a job."""

PAYS = 8 * STRETCH
"""Samples from which on several processes look at them."""

HEADERS = 65_536
"""Pictures whose header a process remembers."""


def inspect(
    data: StageData,
    progress: Callable[[int, int], None] | None,
    indices: Sequence[int],
    processes: int | None = None,
) -> DataReport:
    """What is known of the samples `indices`, and every row among them, or that the readers met, that can't be used.
    Nothing is decoded; the data gets to know its samples' lengths.

    Args:
        progress: called now and then with how many samples were seen, of how many.
        processes: that share the work; default: one, or one for each core where it is much.
    """
    if processes is None and len(indices) < PAYS:
        processes = 1
    jobs = [indices[start : start + STRETCH] for start in range(0, len(indices), STRETCH)]
    looks: list[_Look] = []
    seen = 0
    for job, look in zip(jobs, mapped(_Inspecting(data), jobs, processes), strict=True):
        data.learn_lengths(job, look.known)
        looks.append(look)
        seen += len(job)
        if progress:
            progress(seen, len(indices))
    return _report(data, looks)


def image_field(record: Record, position: int) -> str:
    """How messages call a picture of a record."""
    return "image" if len(record.images) == 1 else f"image[{position}]"


@dataclass
class _Look:
    """What some samples showed."""

    counts: dict[str, SourceReport]
    known: np.ndarray  # [samples, sequences] int32: lengths, 0 where they are not known
    bad: list[BadRow] = field(default_factory=list)
    lengths: dict[str, array[int]] = field(default_factory=dict)  # of all sequences of a source


class _Inspecting:
    """A look at a stretch of samples."""

    def __init__(self, data: StageData) -> None:
        self.data = data
        self.headers: dict[str, str | None] = {}

    def __call__(self, stretch: Sequence[int]) -> _Look:
        counts = {source.name: SourceReport() for source in self.data.sources}
        width = 1 if self.data.preferences is None else 2
        look = _Look(counts, np.zeros((len(stretch), width), np.int32))
        for number, index in enumerate(stretch):
            self._at(look, number, index)
        return look

    def _at(self, look: _Look, number: int, index: int) -> None:
        data, record = self.data, self.data.record(index)
        counts = look.counts[record.key.source]
        try:
            sequences = _sequences(data, index)
            beside = data.beside(index, sequences[0])
            for position, path in enumerate(record.images):
                if (problem := self._problem(path)) is not None:
                    raise RowError(image_field(record, position), problem)
        except RowError as error:
            look.bad.append(BadRow(record.key, error.field, error.reason))
            counts.bad += 1
            return
        _count(counts, record, sequences)
        if beside is not None:
            row, paired = beside
            counts.paired += int(paired.sum())
            counts.teachers_longest = max(counts.teachers_longest, len(row.input_ids))
        lengths = data.note_lengths(index, sequences)
        look.lengths.setdefault(record.key.source, array("i")).extend(lengths)
        if data.preferences != "rated":  # as `note_lengths`
            look.known[number] = lengths

    def _problem(self, path: str) -> str | None:
        if is_inside(path):  # a shard's index has looked at it
            return None
        if path not in self.headers:
            if len(self.headers) >= HEADERS:
                self.headers.clear()
            self.headers[path] = geometry.problem(path)
        return self.headers[path]


def _report(data: StageData, looks: Sequence[_Look]) -> DataReport:
    report = DataReport()
    for source in data.sources:
        counts = SourceReport(
            weight=source.spec.weight,
            neutralised=source.neutralised,
            markers_added=source.markers_added,
            answers_dropped=source.answers_dropped,
            bad=len(source.bad),
        )
        for look in looks:
            counts.add(look.counts[source.name])
        own = [np.array(look.lengths.get(source.name, ()), np.int32) for look in looks]
        counts.measure(np.concatenate([np.zeros(0, np.int32), *own]))
        report.sources[source.name] = counts
        report.bad.extend(source.bad)
    for look in looks:
        report.bad.extend(look.bad)
    return report


def _sequences(data: StageData, index: int) -> tuple[Encoded, ...]:
    try:
        return data.sequences(index)
    except RowError:
        if data.preferences != "rated":
            raise
        # The other sequence has another row's answer: what is wrong with that is told where it belongs.
        return (data.encoded(index),)


def _count(counts: SourceReport, record: Record, sequences: Sequence[Encoded]) -> None:
    counts.samples += 1
    counts.pairs += record.preferences == "pairs"
    counts.rated += record.preferences == "rated"
    counts.desirable += bool(record.desirable)
    counts.with_pictures += bool(record.images)
    counts.pictures += len(record.images)
    counts.tokens += sum(len(encoded.input_ids) for encoded in sequences)
    counts.learned += sum(encoded.learned for encoded in sequences)
    counts.cut += any(encoded.cut for encoded in sequences)
