"""What a cache keeps of what a teacher thinks of one record: of its answers, and of each of its pictures."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from distilvlm.data import Sample
from distilvlm.data.collate import collate
from distilvlm.data.identity import Identity
from distilvlm.losses import gram
from distilvlm.losses.relation import relation_matrix
from distilvlm.recipe.teachers import KeepSpec

from .local import LocalTeacher
from .reduced import drawn, likeliest

Item = dict[str, Tensor]
"""Name -> tensor: 'answers.hidden' or 'answers.ids' and 'answers.log_probabilities', each [responses, ...];
'pictures.hidden' [visual, d] or 'pictures.relation' [visual · visual]."""

PLACED = 150
"""Bytes of a key and its hash in the index and in a shard's header, about."""


@dataclass
class Keeping:
    """How things are kept.

    Args:
        common: ids that student and teacher both have.
        width: of the teacher's hidden states.
        visual_rows: of one picture.
        held: dtype that the teacher's weights are held in.
        autocast: whether products run in bf16.
    """

    keep: KeepSpec
    common: int
    width: int
    visual_rows: int
    held: torch.dtype
    autocast: bool

    def __post_init__(self) -> None:
        self._gram: Tensor | None = None

    def release(self) -> None:
        self._gram = None

    def pictures(self, identity: Identity) -> tuple[str, ...]:
        """The keys that hold the visual rows of a record: each picture's, or one relation matrix of all."""
        return identity.pictures if self.keep.visual == "hidden" else identity.pictures[-1:]

    def sizes(self, identity: Identity, visual: bool) -> dict[str, int]:
        """The keys of a record -> bytes of what is kept under each.

        Args:
            visual: whether its pictures are asked for, too.
        """
        found = {identity.answers: self.answers_bytes(identity.responses)}
        for key in self.pictures(identity) if visual else ():
            found[key] = self.picture_bytes(len(identity.pictures))
        return found

    def answers_bytes(self, responses: float) -> int:
        """Of a record with so many response rows."""
        each = {"hidden": self._row, "top_k": 8 * min(self.keep.top_k, self.common), "sampled": 4 * self.keep.draws}
        return PLACED + round(responses * each[self.keep.responses])

    def picture_bytes(self, pictures: int = 1) -> int:
        """Of a picture, or of the relation matrix of so many."""
        if self.keep.visual == "hidden":
            return PLACED + self.visual_rows * self._row
        return PLACED + 4 * (self.visual_rows * pictures) ** 2

    @property
    def _row(self) -> int:
        return self.width * (torch.bfloat16 if self.keep.precision == "bf16" else self.held).itemsize

    @torch.no_grad()
    def of_sample(self, sample: Sample, teacher: LocalTeacher, wanted: Collection[str]) -> dict[str, Item]:
        """Key -> what is kept under it, of those of a sample's keys that are wanted."""
        identity = sample.identity
        if identity is None:  # a stand-in of a row that turned out unusable, which counts for nothing in training, too
            return {}
        batch = collate([sample]).to(teacher.student_device)
        rows = torch.unique(torch.cat([batch.response_rows, batch.visual_rows]))
        found: dict[str, Item] = {}
        with self.cast(teacher.student_device):
            targets = teacher.targets(batch, rows, None)
            assert targets.hidden is not None and targets.head is not None  # a local teacher's
            head = targets.head[: self.common]
            if identity.answers in wanted:
                hidden = targets.hidden[torch.searchsorted(rows, batch.response_rows)]
                found[identity.answers] = self._of_answers(hidden, head, identity.answers)
            visual = targets.hidden[torch.searchsorted(rows, batch.visual_rows)]  # [pictures * visual, d]
            for number, key in enumerate(identity.pictures):
                if key in wanted:
                    end = (number + 1) * self.visual_rows
                    found[key] = self._of_picture(visual[:end], head)
        return found

    def cast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.autocast)

    def _of_answers(self, hidden: Tensor, head: Tensor, key: str) -> Item:
        if self.keep.responses == "hidden":
            return {"answers.hidden": self._rounded(hidden)}
        if self.keep.responses == "top_k":
            kept = likeliest(hidden, head, self.keep.top_k)
        else:
            kept = drawn(hidden, head, self.keep.draws, key)
        return {f"answers.{name}": value for name, value in kept.items()}

    def _of_picture(self, visual: Tensor, head: Tensor) -> Item:
        """visual: [rows, d], its own behind those of the pictures before it."""
        if self.keep.visual == "hidden":
            return {"pictures.hidden": self._rounded(visual[-self.visual_rows :])}
        if self._gram is None:
            self._gram = gram(head)
        matrix = relation_matrix(visual, head, self.common, self._gram)
        return {"pictures.relation": matrix.flatten().to("cpu", torch.float32)}

    def _rounded(self, hidden: Tensor) -> Tensor:
        return hidden.to("cpu", torch.bfloat16 if self.keep.precision == "bf16" else hidden.dtype)
