"""The one object between data and losses. It names every row set once; a loss never shifts or masks again.

A *row* is a flat position: `sample * length + position`, or, in a packed batch, the position in its one line. Whose a
row is, only the batch knows: `owners_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from distilvlm.data.identity import Identity

IGNORED = -100
"""Label of a position without a text target (the convention of torch's and transformers' cross-entropy)."""


CHOSEN, REJECTED, MISMATCHED = 1, -1, 0
"""What a sequence of a preference record is: the better answer (or one rated desirable), the worse one (or one rated
undesirable), or another record's answer, which only measures how far the student has moved (KTO's z0)."""


@dataclass(frozen=True)
class SampleKey:
    """Where a sample comes from, for messages and the quarantine file."""

    source: str  # name in the recipe's `data`
    file: str
    row: int  # 0-based row of the file


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used, and why."""

    key: SampleKey
    field: str  # e.g. "image", "conversations[2].value"
    reason: str

    def __str__(self) -> str:
        return f"{self.key.file}, row {self.key.row}, field '{self.field}': {self.reason}"


@dataclass(frozen=True)
class Batch:
    """A micro-batch: right-padded, every sample a line of its own; or packed, all of them one behind the other in a
    single line, where none sees the others (`sizes`).

    `placeholder_rows` are all positions that receive a projected vision feature, in the order of `pictures`; registers
    of a tower are among them where the stock class cannot drop them. `visual_rows` are the picture's own tokens among
    them, which the visual terms use (not shifted). `response_rows` are the positions whose *next* token is supervised
    (already shifted), `response_targets` those next tokens.

    A record of preferences is two samples next to each other: chosen and rejected, or a rated answer and a mismatched
    one. Both show the record's pictures, and have its weight.

    A teacher of other tokens or pictures reads the same samples in a batch of its own (`teacher`), of which every
    response row is the partner of the response row of ours that is `paired` and as far from the first one.
    """

    input_ids: Tensor  # [lines, length] int64; under a placeholder stands an id that is safe to embed
    attention_mask: Tensor  # [lines, length] int64, 1 = real
    placeholder_rows: Tensor  # [pictures * placeholders] int64
    visual_rows: Tensor  # [visual] int64
    response_rows: Tensor  # [responses] int64
    response_targets: Tensor  # [responses] int64
    weights: Tensor  # [samples] float32: 1, or 0 for a stand-in of a row that could not be read
    pictures: Tensor | None  # [pictures, 3, size, size] uint8 canvases; None without pictures or with kept features
    features: Tensor | None  # [pictures, placeholders, d_vision] kept features of the frozen tower
    keys: tuple[SampleKey, ...]  # one per sample
    bad: tuple[BadRow, ...] = ()  # rows of this batch that turned out unusable while loading; their weight is 0
    roles: Tensor | None = None  # [samples] int64, of preferences only: CHOSEN, REJECTED or MISMATCHED
    reference: Tensor | None = None  # [samples] float64: log-probability that the reference gives to each answer
    owners: Tensor | None = None  # [pictures] int64, the sample that shows each picture; None without pictures
    canvases: Tensor | None = (
        None  # [pictures, 3, side, side] uint8 for encoders that teach, where they need larger ones
    )
    seen: Mapping[str, Tensor] | None = None  # what encoders saw, kept on disk; each [pictures, ...]
    teacher: Batch | None = None
    paired: Tensor | None = None  # [responses] bool, beside `teacher`
    identities: tuple[Identity | None, ...] = ()  # one per sample where a teacher's targets are kept; None: a stand-in
    sizes: tuple[int, ...] | None = None  # positions of each sample in the one line of a packed batch; padding is last

    @property
    def samples(self) -> int:
        return self.weights.numel()

    @property
    def length(self) -> int:
        """Positions of a line: of a sample with its padding, or of a whole packed batch."""
        return self.input_ids.shape[1]

    @property
    def starts(self) -> Tensor:
        """[samples] the row that each sample begins with."""
        if self.sizes is None:
            return torch.arange(self.samples, device=self.input_ids.device) * self.length
        return torch.tensor([0, *self.sizes[:-1]], device=self.input_ids.device).cumsum(0)

    @property
    def position_owners(self) -> Tensor:
        """The sample of every row, -1 for padding: [lines * length]."""
        every = torch.arange(self.input_ids.numel(), device=self.input_ids.device)
        return self.owners_of(every).masked_fill(self.attention_mask.flatten() == 0, -1)

    def owners_of(self, rows: Tensor) -> Tensor:
        """The sample that each of the rows is of."""
        return torch.searchsorted(self.starts, rows, right=True) - 1

    def unpacked(self, rows: Tensor) -> tuple[Batch, Tensor]:
        """The same samples, each in a line of its own, and where `rows` stand there: for who looks at single samples.
        Row sets keep their order."""
        if self.sizes is None:
            return self, rows
        length, device = max(self.sizes), self.input_ids.device
        starts, real = self.starts, sum(self.sizes)

        def moved(old: Tensor) -> Tensor:
            owner = self.owners_of(old)
            return owner * length + old - starts[owner]

        places = moved(torch.arange(real, device=device))
        lines = torch.zeros(2, self.samples * length, dtype=torch.int64, device=device)
        lines[0, places], lines[1, places] = self.input_ids[0, :real], 1
        teacher = None if self.teacher is None else self.teacher.unpacked(self.teacher.response_rows)[0]
        input_ids, attention_mask = lines.view(2, self.samples, length)
        padded = replace(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            placeholder_rows=moved(self.placeholder_rows),
            visual_rows=moved(self.visual_rows),
            response_rows=moved(self.response_rows),
            teacher=teacher,
            sizes=None,
        )
        return padded, moved(rows)

    @property
    def has_pictures(self) -> bool:
        return self.placeholder_rows.numel() > 0

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.seen is not None:
            moved["seen"] = {name: value.to(device, non_blocking=True) for name, value in self.seen.items()}
        if self.teacher is not None:
            moved["teacher"] = self.teacher.to(device)
        return replace(self, **moved)
