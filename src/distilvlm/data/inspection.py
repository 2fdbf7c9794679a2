"""One pass over a stage's samples before its first step: templates, masks, lengths, headers of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distilvlm.data import geometry
from distilvlm.data.batch import BadRow
from distilvlm.data.parallel import mapped
from distilvlm.data.problems import RowError
from distilvlm.data.records import Record
from distilvlm.data.report import DataReport, SourceReport
from distilvlm.data.template import Encoded

if TYPE_CHECKING:
    from distilvlm.data.dataset import StageData

STRETCH = 512
"""Samples of a job."""


def inspect(data: StageData, progress: Callable[[int], None] | None, indices: Sequence[int]) -> DataReport:
    """What is known of the samples `indices`, and every row among them, or that the readers met, that can't be used.
    Nothing is decoded."""
    look = _Look({source.name: SourceReport() for source in data.sources})
    for seen, index in enumerate(indices):
        look.at(data, index)
        if progress:
            progress(seen + 1)
    return _report(data, [look])


def inspect_together(data: StageData, progress: Callable[[int], None] | None = None) -> DataReport:
    """As `inspect`, of all samples and by several processes. The data does not get to know its samples' lengths."""
    every = range(len(data))
    jobs = [every[start : start + STRETCH] for start in range(0, len(every), STRETCH)]
    looks: list[_Look] = []
    for job, look in zip(jobs, mapped(_Inspecting(data), jobs), strict=True):
        looks.append(look)
        if progress:
            progress(job.stop)
    return _report(data, looks)


def image_field(record: Record, position: int) -> str:
    """How messages call a picture of a record."""
    return "image" if len(record.images) == 1 else f"image[{position}]"


@dataclass
class _Look:
    """What some samples showed."""

    counts: dict[str, SourceReport]
    bad: list[BadRow] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    headers: dict[str, str | None] = field(default_factory=dict)

    def at(self, data: StageData, index: int) -> None:
        """Look at a sample."""
        record = data.record(index)
        counts = self.counts[record.key.source]
        try:
            sequences = _sequences(data, index)
            beside = data.beside(index, sequences[0])
            for position, path in enumerate(record.images):
                if path not in self.headers:
                    self.headers[path] = geometry.problem(path)
                if self.headers[path] is not None:
                    raise RowError(image_field(record, position), str(self.headers[path]))
        except RowError as error:
            self.bad.append(BadRow(record.key, error.field, error.reason))
            counts.bad += 1
            return
        _count(counts, record, sequences)
        if beside is not None:
            row, paired = beside
            counts.paired += int(paired.sum())
            counts.teachers_longest = max(counts.teachers_longest, len(row.input_ids))
        self.lengths.setdefault(record.key.source, []).extend(data.note_lengths(index, sequences))


@dataclass(frozen=True)
class _Inspecting:
    """A look at a stretch of samples, in a process of its own."""

    data: StageData

    def __call__(self, stretch: range) -> _Look:
        look = _Look({source.name: SourceReport() for source in self.data.sources})
        for index in stretch:
            look.at(self.data, index)
        look.headers.clear()
        return look


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
        counts.measure([length for look in looks for length in look.lengths.get(source.name, ())])
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
