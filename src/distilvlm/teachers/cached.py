"""A teacher whose targets were computed before, and are read from disk: it takes neither time nor memory."""

from __future__ import annotations

import torch
from torch import Tensor

from distilvlm.data.batch import Batch
from distilvlm.models.shards import ShardReader

from .cache import TeacherCache, read_head
from .interface import Targets, TeacherError
from .reduced import restored


class CachedTeacher:
    """What a cache has of a batch. Samples are found by what they are (`Batch.identities`), whichever row, stage or
    recipe they were filled for.

    Raises:
        TeacherError: the kept head is damaged.
    """

    shares_vision = False
    view = None

    def __init__(self, cache: TeacherCache) -> None:
        self.keep, self.keeping, self.directory = cache.keep, cache.keeping, cache.directory
        self.vlm = cache.outline  # without weights
        self.student_device = cache.student_device
        self.head = read_head(cache).to(cache.student_device) if cache.keeps_head else None
        self.dtype = torch.float32 if self.head is None else self.head.dtype
        self.provides = frozenset({"teacher.responses", "teacher.relation"})
        if self.keep.visual == "hidden":
            self.provides |= {"teacher.visual"}
        self._reader = ShardReader(cache.directory)

    def targets(self, batch: Batch, rows: Tensor, features: Tensor | None) -> Targets:
        """As the protocol; `features` are of no use here.

        Raises:
            TeacherError: the cache lacks a sample.
            FeatureError: a shard is damaged; says what to do.
        """
        if not len(rows):  # a process without samples
            return Targets(torch.zeros(0, self.keeping.width, dtype=self.dtype, device=rows.device), self.head)
        samples = [(at, identity) for at, identity in enumerate(batch.identities) if identity is not None]
        answers = [self._read(batch, at, identity.answers) for at, identity in samples]
        asked = bool(torch.isin(batch.visual_rows, rows).all())  # else no term compares visual rows
        visual = batch.visual_rows if asked else batch.visual_rows[:0]
        pictures = [
            self._read(batch, at, key)
            for at, identity in (samples if len(visual) else ())
            for key in self.keeping.pictures(identity)
        ]
        relations: tuple[Tensor, ...] | None = None
        if self.keep.visual == "relation":
            matrices = [item["pictures.relation"].to(rows.device) for item in pictures]
            relations = tuple(flat.view(round(len(flat) ** 0.5), -1) for flat in matrices)  # [visual, visual] each
            visual = visual[:0]
        seen = self._joined([item["pictures.hidden"] for item in pictures if relations is None], visual)
        if self.keep.responses == "hidden":
            thought = self._joined([item["answers.hidden"] for item in answers], batch.response_rows)
            hidden = thought.new_zeros(len(rows), self.keeping.width)
            for places, found in ((batch.response_rows, thought), (visual, seen)):
                own = torch.isin(places, rows)
                hidden[torch.searchsorted(rows, places[own])] = found[own]
            return Targets(hidden, self.head, relations=relations, vocabulary=self.keeping.common)
        names = [name.removeprefix("answers.") for name in answers[0]] if answers else []
        kept = {
            name: self._joined([item[f"answers.{name}"] for item in answers], batch.response_rows) for name in names
        }
        responses = restored(kept) if kept else None
        hidden = seen if relations is None else None
        return Targets(hidden, self.head, responses, relations, vocabulary=self.keeping.common)

    def _read(self, batch: Batch, at: int, key: str) -> dict[str, Tensor]:
        row = batch.keys[at]
        told = f"data '{row.source}', {row.file}, row {row.row}"
        place = self._reader.place(key)
        if place is None:
            raise TeacherError(
                f"{told}: the teacher's cache {self.directory} lacks it: it has changed since the cache was filled. "
                "Start the run again, which fills what is missing, or fill it: distilvlm cache RECIPE"
            )
        return self._reader.tensors(*place, told)

    def _joined(self, found: list[Tensor], rows: Tensor) -> Tensor:
        """What was read of the samples, one behind the other, as the batch has their rows."""
        joined = torch.cat(found) if found else torch.zeros(0, self.keeping.width, dtype=self.dtype)
        if len(joined) != len(rows):
            raise TeacherError(
                f"the teacher's cache {self.directory} has {len(joined)} rows of a batch that shows {len(rows)}: "
                "remove it and fill it again"
            )
        return joined.to(rows.device, non_blocking=True)
