"""The data of one stage: its sources' records as samples, each a pure function of (seed, pass, index)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distilvlm.data import geometry
from distilvlm.data.batch import IGNORED, BadRow, SampleKey
from distilvlm.data.geometry import GREY, PictureError
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.readers import Source
from distilvlm.data.records import Record
from distilvlm.data.report import DataReport, SourceReport
from distilvlm.data.sampler import SampleIndex
from distilvlm.data.template import SAFE_ID, Encoded, Template
from distilvlm.recipe.schema import PictureSpec

FeatureReader = Callable[[str], Tensor]
"""Path of a picture to its kept features, [placeholders, d_vision]."""


@dataclass(frozen=True)
class Sample:
    """One row, ready to be collated."""

    key: SampleKey
    input_ids: Tensor  # [length] int64
    labels: Tensor  # [length] int64, not shifted
    placeholder_positions: Tensor  # [pictures * placeholders] int64
    visual_positions: Tensor  # [visual] int64: the placeholders that are no registers
    placeholders: int  # per picture
    pictures: Tensor | None = None  # [pictures, 3, size, size] uint8
    features: Tensor | None = None  # [pictures, placeholders, d_vision]
    weight: float = 1.0
    bad: tuple[BadRow, ...] = ()


class StageData(Dataset[Sample]):
    """A map-style dataset over (pass, index), picklable for loader processes.

    Args:
        sources: what `readers.read` gave; each uses the template that its recipe entry names.
        tokenizer: fast, with `<image>` as a special token.
        placeholders: positions per picture.
        visual: [placeholders] False for a register of the tower.
        pictures: geometry and augmentation.
        size: side of the canvas in pixels.
        max_length: positions per row, visual tokens included.
        seed: the recipe's.
        background: colour of padding (geometry "pad"): the tower's mean as LLaVA has it, `int(mean * 255)`.
        feature_reader: kept features instead of pixels; pictures are then not decoded.
        on_bad_row: what a row does that turns out unusable while loading: "fatal" raises, "quarantine" makes a stand-in
            of weight 0 that carries the reason in `bad`.

    Raises:
        ValueError: augmentation together with kept features, which would not see it.
        DataError: no usable record, or a template that does not fit the tokenizer.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Any,
        *,
        placeholders: int,
        visual: Sequence[bool],
        pictures: PictureSpec,
        size: int,
        max_length: int,
        seed: int,
        background: tuple[int, int, int] = GREY,
        feature_reader: FeatureReader | None = None,
        on_bad_row: Literal["fatal", "quarantine"] = "fatal",
    ) -> None:
        if feature_reader is not None and pictures.augment is not None:
            raise ValueError("pictures.augment has no effect on kept features: drop it, or drop pictures.features")
        if len(visual) != placeholders:
            raise ValueError(f"the visual mask has {len(visual)} entries for {placeholders} placeholders")
        self.sources = list(sources)
        self.templates: dict[str, Template] = {}
        for source in self.sources:
            kind = source.spec.template
            if kind not in self.templates:
                self.templates[kind] = Template.of(kind, tokenizer)
        self.placeholders = placeholders
        self.visual = torch.tensor([bool(entry) for entry in visual])
        self.pictures = pictures
        self.size = size
        self.max_length = max_length
        self.seed = seed
        self.background = background
        self.feature_reader = feature_reader
        self.on_bad_row = on_bad_row
        self._members = np.concatenate(
            [
                np.stack([np.full(len(source.records), number), np.arange(len(source.records))], axis=1)
                for number, source in enumerate(self.sources)
            ]
        )  # [samples, 2] source and record
        self._need_samples()

    def __len__(self) -> int:
        return len(self._members)

    @property
    def picture_counts(self) -> np.ndarray:
        """[samples] pictures per sample."""
        return self._gather([source.records.pictures for source in self.sources])

    @property
    def lengths(self) -> np.ndarray:
        """[samples] words and visual tokens: a measure of length that needs no tokenising (LLaVA's)."""
        words = self._gather([source.records.words for source in self.sources])
        return words + self.placeholders * self.picture_counts

    @property
    def mixture(self) -> list[tuple[int, float]]:
        """(samples, weight) of each source, for `Order`."""
        counts = np.bincount(self._members[:, 0], minlength=len(self.sources))
        return [(int(count), source.spec.weight) for count, source in zip(counts, self.sources, strict=True)]

    def record(self, index: int) -> Record:
        source, record = self._members[index]
        return self.sources[source].records[int(record)]

    def encoded(self, index: int) -> Encoded:
        """Tokens and labels of a sample. Raises `RowError`."""
        source, record = self._members[index]
        template = self.templates[self.sources[source].spec.template]
        return template.encode(self.sources[source].records[int(record)], self.placeholders, self.max_length)

    def __getitem__(self, at: SampleIndex) -> Sample:
        showing, index = at
        record = self.record(index)
        try:
            return self._sample(record, showing, index)
        except (RowError, PictureError) as error:
            problem = BadRow(record.key, *_field_and_reason(error))
            if self.on_bad_row == "fatal":
                raise DataError(f"data '{record.key.source}', {problem}") from error
            return _stand_in(problem, self.placeholders)
        except Exception as error:
            where = f"data '{record.key.source}', {record.key.file}, row {record.key.row} (pass {showing})"
            raise DataError(f"{where} could not be loaded: {type(error).__name__}: {error}") from error

    def check(self, progress: Callable[[int], None] | None = None, indices: Sequence[int] | None = None) -> DataReport:
        """One pass over everything before the first step: templates, masks, lengths, headers of pictures. Nothing is
        decoded. What it finds is applied by `problems.raise_or_quarantine` and `without`.

        Args:
            progress: called with the number of samples seen, after each.
            indices: the samples to look at; default: all. What the readers found is reported in any case.
        """
        report = DataReport()
        lengths: dict[str, list[int]] = {}
        for source in self.sources:
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
        for seen, index in enumerate(range(len(self)) if indices is None else indices):
            record = self.record(index)
            counts = report.sources[record.key.source]
            try:
                encoded = self.encoded(index)
                for position, path in enumerate(record.images):
                    if path not in headers:
                        headers[path] = geometry.problem(path)
                    if headers[path] is not None:
                        raise RowError(_image_field(record, position), str(headers[path]))
            except RowError as error:
                report.bad.append(BadRow(record.key, error.field, error.reason))
                counts.bad += 1
            else:
                lengths[record.key.source].append(len(encoded.input_ids))
                counts.samples += 1
                counts.with_pictures += bool(record.images)
                counts.pictures += len(record.images)
                counts.tokens += len(encoded.input_ids)
                counts.learned += encoded.learned
                counts.cut += encoded.cut
            if progress:
                progress(seen + 1)
        for name, counts in report.sources.items():
            counts.measure(lengths[name])
        return report

    def without(self, bad: Sequence[BadRow]) -> StageData:
        """The same data without the rows of `bad`; later samples move up."""
        usable = [
            ~np.isin(source.records.rows, [row.key.row for row in bad if row.key.source == source.name])
            for source in self.sources
        ]
        rest = copy.copy(self)
        rest._members = self._members[self._gather(usable)]
        rest._need_samples()
        return rest

    def _sample(self, record: Record, showing: int, index: int) -> Sample:
        encoded = self.encoded(index)
        pictures = features = None
        if record.images and self.feature_reader is not None:
            features = torch.stack([self._features(path) for path in record.images])
        elif record.images:
            pictures = self._canvases(record, showing, index)
        return Sample(
            key=record.key,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            placeholder_positions=encoded.placeholder_positions,
            visual_positions=encoded.placeholder_positions[self.visual.repeat(len(record.images))],
            placeholders=self.placeholders,
            pictures=pictures,
            features=features,
        )

    def _canvases(self, record: Record, showing: int, index: int) -> Tensor:
        rng = geometry.augmentation_rng(self.seed, showing, index) if self.pictures.augment else None
        made: list[Tensor] = []
        for position, path in enumerate(record.images):
            try:
                image = geometry.decode(path)
                if self.pictures.augment is not None and rng is not None:
                    image = geometry.augment(image, self.pictures.augment, rng)
                made.append(geometry.canvas(image, self.pictures.geometry, self.size, self.background))
            except PictureError as error:
                raise RowError(_image_field(record, position), str(error)) from error
        return torch.stack(made)

    def _features(self, path: str) -> Tensor:
        assert self.feature_reader is not None
        features = self.feature_reader(path)
        if features.ndim != 2 or features.shape[0] != self.placeholders:
            raise ValueError(f"features of {path} are {list(features.shape)}, not [{self.placeholders}, d_vision]")
        return features

    def _gather(self, per_source: Sequence[np.ndarray]) -> np.ndarray:
        starts = np.cumsum([0, *(len(values) for values in per_source)])
        return np.concatenate(per_source)[starts[self._members[:, 0]] + self._members[:, 1]]

    def _need_samples(self) -> None:
        if not len(self._members):
            names = ", ".join(f"'{source.name}' ({source.spec.path})" for source in self.sources) or "no source"
            raise DataError(f"no usable row in {names}")


def _stand_in(problem: BadRow, placeholders: int) -> Sample:
    """One unlearned token of weight 0, so that every rank still makes its micro-batches."""
    none = torch.zeros(0, dtype=torch.int64)
    return Sample(
        key=problem.key,
        input_ids=torch.tensor([SAFE_ID]),
        labels=torch.tensor([IGNORED]),
        placeholder_positions=none,
        visual_positions=none,
        placeholders=placeholders,
        weight=0.0,
        bad=(problem,),
    )


def _field_and_reason(error: RowError | PictureError) -> tuple[str, str]:
    return (error.field, error.reason) if isinstance(error, RowError) else ("image", str(error))


def _image_field(record: Record, position: int) -> str:
    return "image" if len(record.images) == 1 else f"image[{position}]"
