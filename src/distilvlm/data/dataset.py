"""The data of one stage: its sources' records as samples, each a pure function of (seed, pass, index)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distilvlm.data import geometry
from distilvlm.data.alignment import TeacherView, pairs, teachers_row
from distilvlm.data.batch import BadRow
from distilvlm.data.geometry import GREY, PictureError
from distilvlm.data.identity import Identity, identify
from distilvlm.data.inspection import image_field, inspect
from distilvlm.data.pictures import NoText
from distilvlm.data.preferences import of_side
from distilvlm.data.problems import DataError, RowError
from distilvlm.data.readers import Source, one_kind
from distilvlm.data.records import Preferences, Record
from distilvlm.data.report import DataReport
from distilvlm.data.sample import Sample, joined, stand_in
from distilvlm.data.sampler import SampleIndex
from distilvlm.data.template import Encoded, Template
from distilvlm.recipe.schema import PictureSpec

REMEMBERED = 65_536
"""Pictures whose content a process remembers: names of all would be gigabytes."""

FeatureReader = Callable[[str], Tensor]
"""Path of a picture to its kept features, [placeholders, d_vision]."""

SeenReader = Callable[[str], dict[str, Tensor]]
"""Path of a picture to what encoders saw in it, by name; each tensor is of one picture."""

ReferenceReader = Callable[[int], tuple[float, float]]
"""Index of a preference to the log-probabilities that the reference gives to the answers of its two sequences."""


class StageData(Dataset[Sample]):
    """A map-style dataset over (pass, index), picklable for loader processes.

    A preference is one sample of two sequences about the same pictures: chosen and rejected; or a rated answer and,
    behind the same prompt, the last answer of the next sample of its source (of the first, behind the last). That one
    fits the prompt by chance only, so it tells how far the student has moved whatever is asked (KTO's z0; TRL makes it
    by the same rotation, of a batch).

    Args:
        sources: what `readers.read` gave; each uses the template that its recipe entry names.
        tokenizer: fast, with `<image>` as a special token; None: pictures alone are looked at, and no text.
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
        reference_reader: see `with_references`.
        encoder_size: side of a second canvas, which encoders see that teach; None: they need none.
        seen_reader: what encoders saw, kept on disk.
        teacher: of a teacher that reads rows of its own beside the student's; every sample then brings them.
        identifies: whether samples say what they are to a teacher whose targets are kept.

    Raises:
        ValueError: augmentation together with kept features, which would not see it; or as `with_references`.
        DataError: no usable record, sources of different kinds, a source with a single rated answer, or a template that
            does not fit the tokenizer.
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
        reference_reader: ReferenceReader | None = None,
        encoder_size: int | None = None,
        seen_reader: SeenReader | None = None,
        teacher: TeacherView | None = None,
        identifies: bool = False,
    ) -> None:
        if (feature_reader or seen_reader) is not None and pictures.augment is not None:
            raise ValueError("pictures.augment has no effect on kept features: drop it, or drop what keeps them")
        if len(visual) != placeholders:
            raise ValueError(f"the visual mask has {len(visual)} entries for {placeholders} placeholders")
        self.sources = list(sources)
        self.pictures_alone = tokenizer is None
        self.teacher = None if self.pictures_alone else teacher
        self.templates: dict[str, Template] = {}
        self.teacher_templates: dict[str, Template] = {}
        for source in () if self.pictures_alone else self.sources:
            kind = source.spec.template
            if kind not in self.templates:
                self.templates[kind] = Template.of(kind, tokenizer)
                if self.teacher is not None:
                    self.teacher_templates[kind] = Template.of(kind, self.teacher.tokenizer)
        self.placeholders = placeholders
        self.visual = torch.tensor([bool(entry) for entry in visual])
        self.pictures = pictures
        self.size = size
        self.max_length = max_length
        self.seed = seed
        self.background = background
        self.feature_reader = feature_reader
        self.on_bad_row = on_bad_row
        self.identifies = identifies
        self.encoder_size = encoder_size
        self.seen_reader = seen_reader
        self.preferences: Preferences | None = one_kind(self.sources)
        self.reference_reader: ReferenceReader | None = None
        width = 1 if self.preferences is None else 2
        # Of each source [records, sequences], 0: not known. A check meets every sample, for millions of which a
        # dictionary would take gigabytes.
        self._known_lengths = [np.zeros((len(source.records), width), np.int32) for source in self.sources]
        self._contents: dict[str, str] = {}  # picture -> what `geometry.content` says
        self._members = np.concatenate(
            [
                np.stack([np.full(len(source.records), number), np.arange(len(source.records))], axis=1, dtype=np.int32)
                for number, source in enumerate(self.sources)
            ]
        )  # [samples, 2] source and record
        self._settle()
        if reference_reader is not None:
            self._refer_to(reference_reader)
        if self.teacher is not None and self.preferences is not None:
            raise ValueError(
                "preferences are of whole answers in the student's own tokens: they have no teacher's rows"
            )

    def __len__(self) -> int:
        return len(self._members)

    @property
    def picture_counts(self) -> np.ndarray:
        """[samples] pictures per sample."""
        return self._gather([source.records.pictures for source in self.sources])

    @property
    def lengths(self) -> np.ndarray:
        """[samples] words and visual tokens (of a pair's longer side): a measure of length that needs no tokenising
        (LLaVA's)."""
        words = self._gather([source.records.words for source in self.sources])
        return words + self.placeholders * self.picture_counts

    @property
    def blocks(self) -> np.ndarray:
        """[samples] what of the storage each is in, see `Records.blocks`; no two sources share one."""
        found: list[np.ndarray] = []
        first = 0
        for source in self.sources:
            own = source.records.blocks + first
            first = int(own.max(initial=first - 1)) + 1
            found.append(own)
        return self._gather(found)

    @property
    def mixture(self) -> list[tuple[int, float]]:
        """(samples, weight) of each source, for `Order`."""
        counts = np.diff(self._starts)
        return [(int(count), source.spec.weight) for count, source in zip(counts, self.sources, strict=True)]

    def place(self, index: int) -> tuple[int, int]:
        """Of a sample: the number of its source, and of the record there."""
        source, record = self._members[index]
        return int(source), int(record)

    def record(self, index: int) -> Record:
        source, record = self._members[index]
        return self.sources[source].records[int(record)]

    def encoded(self, index: int) -> Encoded:
        """Tokens and labels of a sample; of a preference those of its first sequence. Raises `RowError`."""
        record = self.record(index)
        try:
            return self._encode(index, record)
        except RowError as error:
            raise of_side(error, record, "chosen") from None

    def sequences(self, index: int) -> tuple[Encoded, ...]:
        """Tokens and labels of a sample's sequence, or of both of a preference. Raises `RowError`."""
        record = self.record(index)
        first = self.encoded(index)
        if record.preferences is None:
            return (first,)
        if record.preferences == "rated":
            return first, self._mismatched(record, index)
        try:
            second = self._encode(index, record.rejected())
        except RowError as error:
            raise of_side(error, record, "rejected") from None
        if first.input_ids.equal(second.input_ids):
            where = f"the first {self.max_length} positions" if first.cut else "tokens"
            raise RowError("rejected", f"nothing to learn: chosen and rejected are the same in {where}")
        return first, second

    def sequence_lengths(self, index: int) -> tuple[int, ...]:
        """Positions of a sample's sequence, or of both of a preference; 1 for a row that can't be used, as a stand-in
        has. Known without making tokens where a check has seen the sample."""
        source, record = self._members[index]
        known: list[int] = self._known_lengths[source][record].tolist()
        if all(known):
            return tuple(known)
        try:
            return self.note_lengths(index, self.sequences(index))
        except RowError:
            return (1,) * len(known)

    @property
    def known_lengths(self) -> dict[str, np.ndarray]:
        """Source to [records, 1 + sequences] int32: a record's row, and its lengths, 0 where one is not known. What a
        check has found may be put back into other data of the same sources."""
        return {
            source.name: np.concatenate([_rows(source)[:, None], known], axis=1)
            for source, known in zip(self.sources, self._known_lengths, strict=True)
        }

    def recall_lengths(self, lengths: Mapping[str, np.ndarray]) -> None:
        """Put `known_lengths` back; rows that were not there then (a picture was missing) stay unknown. Raises
        ValueError where they are of other sources."""
        if {name: kept.shape[1:] for name, kept in lengths.items()} != {
            name: kept.shape[1:] for name, kept in self.known_lengths.items()
        }:
            raise ValueError("kept lengths are of other sources")
        for source, known in zip(self.sources, self._known_lengths, strict=True):
            kept = lengths[source.name]
            _, ours, theirs = np.intersect1d(_rows(source), kept[:, 0], return_indices=True)
            known[ours] = kept[theirs, 1:]

    def learn_lengths(self, indices: Sequence[int], lengths: np.ndarray) -> None:
        """Keep what another process noted of samples: [samples, sequences] int32, 0 for what is not known."""
        members = self._members[np.asarray(indices)]
        for number, known in enumerate(self._known_lengths):
            own = members[:, 0] == number
            known[members[own, 1]] = lengths[own]

    def note_lengths(self, index: int, sequences: Sequence[Encoded]) -> tuple[int, ...]:
        """Keep the `sequence_lengths` of sequences that were made."""
        lengths = tuple(len(encoded.input_ids) for encoded in sequences)
        if self.preferences != "rated":  # whose second sequence is another row's when rows are left out
            source, record = self._members[index]
            self._known_lengths[source][record] = lengths
        return lengths

    def beside(self, index: int, student: Encoded) -> tuple[Encoded, Tensor] | None:
        """The row of a sample that the teacher reads, as far as it is compared, and which labels of the student's have
        a partner there, [length] bool; None for a teacher that reads the student's rows. Raises `RowError`."""
        if self.teacher is None:
            return None
        template = self.teacher_templates[self.sources[self._members[index, 0]].spec.template]
        encoded = template.encode(self.record(index), self.teacher.placeholders)
        ours, theirs = pairs(student, encoded).unbind(1)  # [pairs] each
        paired = torch.zeros_like(student.labels, dtype=torch.bool)
        paired[ours] = True
        return teachers_row(encoded, theirs), paired

    def assemble(
        self,
        index: int,
        pictures: Tensor | None = None,
        features: Tensor | None = None,
        canvases: Tensor | None = None,
        seen: Mapping[str, Tensor] | None = None,
        teacher_pictures: Tensor | None = None,
    ) -> Sample:
        """A sample that shows what is given. Raises `RowError`.

        Args:
            pictures: [pictures, 3, size, size] uint8, or None without pictures or with kept features.
            features: [pictures, placeholders, d_vision]
            canvases: [pictures, 3, encoder_size, encoder_size] uint8, where encoders see a canvas of their own.
            seen: what encoders saw, each [pictures, ...].
            teacher_pictures: [pictures, 3, side, side] uint8, where a teacher sees a canvas of its own.
        """
        record = self.record(index)
        shown = self.visual.repeat(0 if self.pictures_alone else len(record.images))
        sequences = self.sequences(index)
        made = [
            Sample(
                key=record.key,
                input_ids=encoded.input_ids,
                labels=encoded.labels,
                placeholder_positions=encoded.placeholder_positions,
                visual_positions=encoded.placeholder_positions[shown],
                placeholders=0 if self.pictures_alone else self.placeholders,
                pictures=pictures,
                features=features,
                canvases=canvases,
                seen=seen,
                identity=self._identity(record, encoded) if self.identifies else None,
            )
            for encoded in sequences
        ]
        reader = self.reference_reader
        sample = joined(record, made, None if reader is None else reader(index))
        beside = self.beside(index, sequences[0])
        if beside is None or self.teacher is None:
            return sample
        row, paired = beside
        theirs = Sample(
            key=record.key,
            input_ids=row.input_ids,
            labels=row.labels,
            placeholder_positions=row.placeholder_positions,
            visual_positions=row.placeholder_positions[torch.tensor(self.teacher.visual).repeat(len(record.images))],
            placeholders=self.teacher.placeholders,
            pictures=pictures if teacher_pictures is None else teacher_pictures,
            features=features,
        )
        return replace(sample, teacher=theirs, paired=paired)

    def __getitem__(self, at: SampleIndex) -> Sample:
        showing, index = at
        record = self.record(index)
        try:
            pictures = features = canvases = theirs = None
            if record.images and self.feature_reader is not None:
                features = torch.stack([self._features(path) for path in record.images])
            if record.images and (features is None or self.encoder_size is not None):
                pictures, canvases, theirs = self._canvases(record, showing, index)
                pictures = pictures if features is None else None
            return self.assemble(index, pictures, features, canvases, self._seen(record), theirs)
        except (RowError, PictureError) as error:
            told = (error.field, error.reason) if isinstance(error, RowError) else ("image", str(error))
            problem = BadRow(record.key, *told)
            if self.on_bad_row == "fatal":
                raise DataError(f"data '{record.key.source}', {problem}") from error
            return stand_in(record, self.placeholders, (problem,), referred=self.reference_reader is not None)
        except Exception as error:
            where = f"data '{record.key.source}', {record.key.file}, row {record.key.row} (pass {showing})"
            raise DataError(f"{where} could not be loaded: {type(error).__name__}: {error}") from error

    def with_references(self, reader: ReferenceReader) -> StageData:
        """The same preferences, with what the reference says of them. Bad rows must be out before: indices are these.

        Raises:
            ValueError: the data holds no preferences, or is augmented, which the reference would not see.
        """
        referred = copy.copy(self)
        referred._refer_to(reader)
        return referred

    def preference_key(self, index: int) -> str:
        """SHA-256 of everything of a preference that decides on its log-probabilities under a given model: both
        sequences, which of their tokens are learned, and the content of its pictures with how they are shown.

        Raises:
            ValueError: the data holds no preferences.
            RowError, PictureError: the sample can't be used.
        """
        if self.preferences is None:
            raise ValueError("plain conversations have no preferences")
        record = self.record(index)
        contents = self._content(record)
        how = [self.placeholders, self.size, self.pictures.geometry, self.background] if record.images else []
        key = hashlib.sha256(json.dumps([how, contents]).encode())
        for encoded in self.sequences(index):
            for tensor in (encoded.input_ids, encoded.labels, encoded.placeholder_positions):
                key.update(f"{len(tensor)}:".encode() + tensor.numpy().tobytes())
        return key.hexdigest()

    def identity(self, index: int) -> Identity:
        """What a sample is to a teacher whose targets are kept. Raises `RowError`, `PictureError`."""
        return self._identity(self.record(index), self.encoded(index))

    def _identity(self, record: Record, encoded: Encoded) -> Identity:
        return identify(encoded.input_ids, encoded.labels, encoded.placeholder_positions, self._content(record))

    def _content(self, record: Record) -> list[str]:
        """What `geometry.content` says of each picture, asked once as a rule."""
        if len(self._contents) > REMEMBERED:
            self._contents.clear()
        for path in record.images:
            if path not in self._contents:
                self._contents[path] = geometry.content(path)
        return [self._contents[path] for path in record.images]

    def check(
        self, progress: Callable[[int, int], None] | None = None, indices: Sequence[int] | None = None
    ) -> DataReport:
        """One pass over everything before the first step: templates, masks, lengths, headers of pictures. Nothing is
        decoded. What it finds is applied by `problems.raise_or_quarantine` and `without`.

        Args:
            progress: called now and then with how many samples were seen, of how many.
            indices: the samples to look at; default: all. What the readers found is reported in any case.
        """
        return inspect(self, progress, range(len(self)) if indices is None else indices)

    def without(self, bad: Sequence[BadRow]) -> StageData:
        """The same data without the rows of `bad`; later samples move up.

        Raises:
            DataError: nothing is left.
            ValueError: references are known already, by indices that would no longer be right.
        """
        if self.reference_reader is not None:
            raise ValueError("bad rows go before the references of the others are read")
        usable = [
            ~np.isin(source.records.rows, [row.key.row for row in bad if row.key.source == source.name])
            for source in self.sources
        ]
        rest = copy.copy(self)
        rest._members = self._members[self._gather(usable)]
        rest._settle()
        return rest

    def _refer_to(self, reader: ReferenceReader) -> None:
        if self.preferences is None:
            raise ValueError("plain conversations have no reference: it is of preferences")
        if self.pictures.augment is not None:
            raise ValueError("pictures.augment has no effect on a preference's kept reference: drop it")
        self.reference_reader = reader

    def _encode(self, index: int, record: Record) -> Encoded:
        template = self.templates.get(self.sources[self._members[index, 0]].spec.template, NoText())
        return template.encode(record, self.placeholders, self.max_length)

    def _mismatched(self, record: Record, index: int) -> Encoded:
        source = self._members[index, 0]
        start, end = self._starts[source], self._starts[source + 1]
        other = self.record(int(start + (index + 1 - start) % (end - start)))
        try:
            return self._encode(index, record.answered(other.answers[-1]))
        except RowError as error:
            raise RowError(error.field, f"{error.reason} (with the answer of row {other.key.row})") from None

    def _canvases(self, record: Record, showing: int, index: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The student's canvases, those of encoders where they see larger ones, and those of a teacher where it sees
        another size: of one decoded picture each."""
        rng = geometry.augmentation_rng(self.seed, showing, index) if self.pictures.augment else None
        side = None if self.teacher is None or self.teacher.size == self.size else self.teacher.size
        sizes = (self.size, self.encoder_size, side)
        made: tuple[list[Tensor], ...] = ([], [], [])
        for position, path in enumerate(record.images):
            try:
                image = geometry.decode(path)
                if self.pictures.augment is not None and rng is not None:
                    image = geometry.augment(image, self.pictures.augment, rng)
                for size, canvases in zip(sizes, made, strict=True):
                    if size is not None:
                        canvases.append(geometry.canvas(image, self.pictures.geometry, size, self.background))
            except PictureError as error:
                raise RowError(image_field(record, position), str(error)) from error
        own, larger, theirs = (torch.stack(canvases) if canvases else None for canvases in made)
        assert own is not None
        return own, larger, theirs

    def _seen(self, record: Record) -> dict[str, Tensor] | None:
        if self.seen_reader is None or not record.images:
            return None
        pictures = [self.seen_reader(path) for path in record.images]
        return {name: torch.stack([picture[name] for picture in pictures]) for name in pictures[0]}

    def _features(self, path: str) -> Tensor:
        assert self.feature_reader is not None
        features = self.feature_reader(path)
        if features.ndim != 2 or features.shape[0] != self.placeholders:
            raise ValueError(f"features of {path} are {list(features.shape)}, not [{self.placeholders}, d_vision]")
        return features

    def _gather(self, per_source: Sequence[np.ndarray]) -> np.ndarray:
        starts = np.cumsum([0, *(len(values) for values in per_source)])
        return np.concatenate(per_source)[starts[self._members[:, 0]] + self._members[:, 1]]

    def _settle(self) -> None:
        """What follows from the members."""
        if not len(self._members):
            names = ", ".join(f"'{source.name}' ({source.spec.path})" for source in self.sources) or "no source"
            raise DataError(f"no usable row in {names}")
        counts = np.bincount(self._members[:, 0], minlength=len(self.sources))
        self._starts = np.cumsum([0, *counts])  # [sources + 1] the first sample of each source, and the end
        if self.preferences == "rated" and 1 in counts:
            source = self.sources[int(np.flatnonzero(counts == 1)[0])]
            raise DataError(
                f"{source.spec.path}: one rated answer alone can't be learned from, because the answer of another row "
                "is needed to tell how far the student has moved: add rows"
            )


def _rows(source: Source) -> np.ndarray:
    """[records] int32: the row of each."""
    return source.records.rows.astype(np.int32)
