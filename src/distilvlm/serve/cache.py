"""Keys and values of requests that came at different times, in one batch.

Every row ends at the same column, whatever its length, as in a batch that was padded on the left: so a stock model's
own masks, sliding windows included, are right for all rows, and a step writes one column. A row that joins is copied to
where the others end; one that leaves gives its place to the last; nothing else is moved, until the columns are used up.

Inserted layers have slots of their own (models/adaptors/slots.py), which hold the rows of their workflow only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from distilvlm.models.adaptors import Host
from distilvlm.models.adaptors.slots import Ledger, Workflow

SPARE = 128
"""Columns to grow into, at least, whenever the columns are laid out anew."""

PLACES = 4
"""Rows are made room for in steps of this."""


@dataclass
class Columns:
    """Which columns are in use, of all layers alike: [first, end)."""

    first: int = 0
    end: int = 0
    capacity: int = 0


class Rows(CacheLayerMixin):
    """Keys and values of one layer, [places, heads, columns, d]; those of `members`, rows of the batch in ascending
    order, are in use.

    What stands before a row's own beginning is finite: it is masked, but nothing times NaN is NaN.
    """

    is_sliding = False  # what a window hides is kept, and hidden by the mask

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self.columns = columns
        self.members: list[int] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_zeros(0, key_states.shape[1], self.columns.capacity, key_states.shape[3])
        self.values = value_states.new_zeros(0, value_states.shape[1], self.columns.capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        first, end, rows = self.columns.first, self.columns.end, key_states.shape[0]
        self.keys[:rows, :, end] = key_states[:, :, 0]
        self.values[:rows, :, end] = value_states[:, :, 0]
        return self.keys[:rows, :, first : end + 1], self.values[:rows, :, first : end + 1]

    def join(self, key_states: Tensor, value_states: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Take in rows that were read apart.

        Args:
            key_states, value_states: [rows, heads, columns, d], left-padded; of a sliding layer the last columns only.
            rows: of the batch, behind all that are here.
            lengths: of each.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = len(self.members)
        if held + len(rows) > self._keys.shape[0]:
            self.lay_out(self.columns.end, held + len(rows))
        end = self.columns.end
        for buffer, given in ((self._keys, key_states), (self._values, value_states)):
            for row, length in enumerate(lengths):
                kept = min(length, given.shape[2])
                buffer[held + row, :, : end - kept] = 0
                buffer[held + row, :, end - kept : end] = given[row, :, given.shape[2] - kept :]
        self.members += rows

    def keep(self, order: Sequence[int]) -> None:
        """Rows of the batch that stay, in their new order."""
        places = {row: place for place, row in enumerate(self.members)}
        kept = [(new, places[old]) for new, old in enumerate(order) if old in places]
        moved = [(place, source) for place, (_, source) in enumerate(kept) if place != source]
        if moved:
            to, source = (list(each) for each in zip(*moved, strict=True))
            for buffer in (self._keys, self._values):
                buffer[to, :, : self.columns.end] = buffer[source, :, : self.columns.end]
        self.members = [new for new, _ in kept]

    def lay_out(self, width: int, places: int) -> None:
        """Make room: `columns.capacity` columns, of which those in use end at `width`, for a number of rows."""
        first, end, held = self.columns.first, self.columns.end, len(self.members)
        rounded = -(-places // PLACES) * PLACES

        def laid_out(buffer: Tensor) -> Tensor:
            made = buffer.new_zeros(rounded, buffer.shape[1], self.columns.capacity, buffer.shape[3])
            made[:held, :, width - (end - first) : width] = buffer[:held, :, first:end]
            return made

        self.keys, self.values = laid_out(self._keys), laid_out(self._values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns.end - self.columns.first

    def get_max_length(self) -> int:
        return -1

    @property
    def _keys(self) -> Tensor:
        assert self.keys is not None
        return self.keys

    @property
    def _values(self) -> Tensor:
        assert self.values is not None
        return self.values


class BatchCache(Cache):
    """The cache of a batch whose rows come and go between steps.

    Args:
        host: of a model with adaptors, whose slots stand behind those of its base.
    """

    def __init__(self, host: Host | None = None) -> None:
        super().__init__(layers=[])
        self._host = host
        self.columns = Columns()
        self.lengths: list[int] = []  # of each row
        self._workflows: list[Workflow] = []

    @property
    def bytes(self) -> int:
        held = [layer for layer in self.layers if isinstance(layer, Rows)]
        return sum(t.numel() * t.element_size() for layer in held for t in (layer.keys, layer.values) if t is not None)

    def join(self, read: Cache, lengths: Sequence[int], workflows: Sequence[Workflow]) -> None:
        """Take in the rows of a cache that a model has filled with left-padded prompts.

        Args:
            lengths: of each prompt.
            workflows: of each row, with one entry where all have the same (`Host.workflows`); none without a host.
        """
        rows = list(range(len(self.lengths), len(self.lengths) + len(lengths)))
        self._widen(max(lengths))
        for index, layer in enumerate(read.layers):
            while len(self.layers) <= index:
                self.layers.append(DummyLayer())
            if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
                continue
            if not isinstance(held := self.layers[index], Rows):
                held = self.layers[index] = Rows(self.columns)
            places: list[int] = getattr(layer, "rows", list(range(len(rows))))
            held.join(layer.keys, layer.values, [rows[p] for p in places], [lengths[p] for p in places])
        self.lengths += lengths
        self.columns.first = self.columns.end - max(self.lengths)
        self._workflows += list(workflows) * (len(lengths) if len(workflows) == 1 else 1)
        self._remember()

    def keep(self, order: Sequence[int]) -> None:
        """Rows that stay, in their new order."""
        if not order:  # what was grown is given back
            self.layers.clear()
            self.lengths, self._workflows, self.columns = [], [], Columns()
            return
        for layer in self.layers:
            if isinstance(layer, Rows):
                layer.keep(order)
        self.lengths = [self.lengths[row] for row in order]
        self.columns.first = self.columns.end - max(self.lengths)
        self._workflows = [self._workflows[row] for row in order] if self._workflows else []
        self._remember()

    def step(self) -> tuple[Tensor, Tensor]:
        """Make room for one more column; gives what the model must be told of it: the mask, [rows, columns] int64, and
        positions, [rows, 1]."""
        if self.columns.end == self.columns.capacity:
            self._lay_out(self.columns.end - self.columns.first)
        lengths = torch.tensor(self.lengths)[:, None]  # [rows, 1]
        span = self.columns.end + 1 - self.columns.first
        return (torch.arange(span) >= span - 1 - lengths).to(torch.int64), lengths

    def stepped(self) -> None:
        """The model has written its column."""
        self.columns.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _widen(self, length: int) -> None:
        """Have at least so many columns."""
        if length > self.columns.end:
            self._lay_out(length)

    def _lay_out(self, width: int) -> None:
        """Columns in use end at `width`, the spare ones follow."""
        before = self.columns.end - self.columns.first
        self.columns.capacity = width + max(SPARE, width // 4)
        for layer in self.layers:
            if isinstance(layer, Rows):
                layer.lay_out(width, len(layer.members))
        self.columns.first, self.columns.end = width - before, width

    def _remember(self) -> None:
        """Whose the rows are, for the hooks of adaptors."""
        if self._host is None:
            return
        depth = self._host.base.depth
        if len(self.layers) == depth:
            self.layers.append(DummyLayer())
        self.layers[depth] = Ledger(self._workflows)
