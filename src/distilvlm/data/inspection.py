"""One pass over a stage's samples before its first step: templates, masks, lengths, headers of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from distilvlm.data import geometry
from distilvlm.data.batch import BadRow
from distilvlm.data.problems import RowError
from distilvlm.data.records import Record
from distilvlm.data.report import DataReport, SourceReport
from distilvlm.data.template import Encoded

if TYPE_CHECKING:
    from distilvlm.data.dataset import StageData


def inspect(data: StageData, progress: Callable[[int], None] | None, indices: Sequence[int]) -> DataReport:
    """What is known of the samples `indices`, and every row among them, or that the readers met, that can't be used.
    Nothing is decoded."""
    report = DataReport()
    lengths: dict[str, list[int]] = {}
    for source in data.sources:
        lengths[source.name] = []
        report.sources[source.name] = SourceReport(
            weight=source.spec.weight,
            neutralised=source.neutralised,
            markers_added=source.markers_added,
            answers_dropped=source.answers_dropped,
            bad=len(source.bad),
        )
        report.bad.extend(source.bad)
    headers: dict[str, str | None] = {}
    for seen, index in enumerate(indices):
        record = data.record(index)
        counts = report.sources[record.key.source]
        try:
            sequences = _sequences(data, index)
            beside = data.beside(index, sequences[0])
            for position, path in enumerate(record.images):
                if path not in headers:
                    headers[path] = geometry.problem(path)
                if headers[path] is not None:
                    raise RowError(image_field(record, position), str(headers[path]))
        except RowError as error:
            report.bad.append(BadRow(record.key, error.field, error.reason))
            counts.bad += 1
        else:
            _count(counts, record, sequences)
            if beside is not None:
                row, paired = beside
                counts.paired += int(paired.sum())
                counts.teachers_longest = max(counts.teachers_longest, len(row.input_ids))
            lengths[record.key.source].extend(data.note_lengths(index, sequences))
        if progress:
            progress(seen + 1)
    for name, counts in report.sources.items():
        counts.measure(lengths[name])
    return report


def image_field(record: Record, position: int) -> str:
    """How messages call a picture of a record."""
    return "image" if len(record.images) == 1 else f"image[{position}]"


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
