"""Slots of inserted layers in a key-value cache of transformers', and who may use it.

A cache that `generate` makes has a slot for each of the host's layers. In a workflow with an adaptor it grows: slot L
is a `Ledger`, which holds no keys and says in which workflow each row was read; behind it lie the slots of inserted
layers, of the kind of the slot that their frozen layer has. Keys of the host's own layers depend on the workflow, too,
since what they read does: a cache serves the workflow that made it, and no other. The workflow without adaptors leaves
it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .config import TEXT

Workflow = tuple[str, int]
"""A workflow's name, and the serial number of its adaptor."""


class Ledger(DummyLayer):
    """The workflow of each row of a cache; one entry where all have the same."""

    def __init__(self, workflows: Sequence[Workflow]) -> None:
        super().__init__()
        self.workflows = list(workflows)

    def batch_select_indices(self, indices: Tensor) -> None:
        if len(self.workflows) > 1:
            self.workflows = [self.workflows[row] for row in indices.tolist()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._require_one("beam search")

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._require_one("repeating rows")

    def _require_one(self, what: str) -> None:
        if len(self.workflows) > 1:
            raise ValueError(f"{what} needs one workflow for the whole batch: this cache has rows of several")


class _OfRows:
    """A slot that holds some of the batch's rows only."""

    def __init__(self, rows: Sequence[int], batch: int, **size: Any) -> None:
        super().__init__(**size)
        self.rows, self.whole = list(rows), batch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)  # pyright: ignore
        if hasattr(self, "batch_size"):  # of a static slot, by which `generate` tells the cache's
            self.batch_size = self.whole

    def batch_select_indices(self, indices: Tensor) -> None:
        places = {row: place for place, row in enumerate(self.rows)}
        staying = [(new, places[old]) for new, old in enumerate(indices.tolist()) if old in places]
        self.rows = [new for new, _ in staying]
        kept = torch.tensor([place for _, place in staying], dtype=torch.int64, device=indices.device)
        super().batch_select_indices(kept)  # pyright: ignore


class _DynamicOfRows(_OfRows, DynamicLayer):
    pass


class _SlidingOfRows(_OfRows, DynamicSlidingWindowLayer):
    pass


class _StaticOfRows(_OfRows, StaticLayer):
    pass


class _StaticSlidingOfRows(_OfRows, StaticSlidingWindowLayer):
    pass


_OF_ROWS: dict[type, type] = {
    DynamicLayer: _DynamicOfRows,
    DynamicSlidingWindowLayer: _SlidingOfRows,
    StaticLayer: _StaticOfRows,
    StaticSlidingWindowLayer: _StaticSlidingOfRows,
}


def require(cache: Cache, depth: int, active: Sequence[Workflow]) -> None:
    """Refuse a cache that another workflow has filled; one that was emptied loses what that workflow added.

    Args:
        depth: of the host.
        active: the workflow of each row, or one for all.
    """
    ledger = cache.layers[depth] if len(cache.layers) > depth else None
    held = ledger.workflows if isinstance(ledger, Ledger) else [(TEXT, 0)]
    if _same(held, active):
        return
    if int(cache.get_seq_length()) == 0:
        del cache.layers[depth:]
        return
    raise ValueError(
        f"this key-value cache was filled in workflow {_told(held)}, and {_told(active)} is active: no workflow can "
        "read another's keys. Start with a new cache, which reads the whole conversation again"
        + ("; where rows left the batch, say host.select(rows), too" if len(held) != len(active) > 1 else "")
    )


def make_room(
    cache: Cache,
    depth: int,
    active: Sequence[Workflow],
    position: int,
    slot: int,
    rows: Tensor | None,
    batch: int,
) -> None:
    """Give a cache the slot of a layer that is inserted behind `position`, if it has none yet.

    Args:
        rows: which of the batch's rows the slot is of; None: all.

    Raises:
        ValueError: a kind of cache that cannot be extended.
    """
    if getattr(cache, "offloading", False):
        raise ValueError(
            "an offloaded cache moves its slots in the order of the host's layers, and an adaptor's are not among "
            "them: use cache_implementation 'dynamic' or 'static'"
        )
    while len(cache.layers) < depth:  # made without a configuration, it grows while layers run
        assert cache.layer_class_to_replicate is not None
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) == depth:
        cache.layers.append(Ledger(active))
    while len(cache.layers) <= slot:
        cache.layers.append(DummyLayer())
    if isinstance(cache.layers[slot], DummyLayer):
        cache.layers[slot] = _like(cache.layers[position], rows, batch)


def _like(layer: Any, rows: Tensor | None, batch: int) -> Any:
    """An empty slot of the same kind."""
    kind = type(layer)
    # Those of rows derive from the plain kinds, but no slot of the host's own is one.
    if kind not in _OF_ROWS:
        raise ValueError(
            f"a cache of {kind.__name__} cannot be extended by an adaptor's layers (quantised, shared or recurrent "
            "states): use cache_implementation 'dynamic' or 'static'"
        )
    size: dict[str, int] = {}
    if isinstance(layer, DynamicSlidingWindowLayer):
        size = {"sliding_window": layer.sliding_window}
    elif isinstance(layer, StaticLayer):
        size = {"max_cache_len": layer.max_cache_len}
        if isinstance(layer, StaticSlidingWindowLayer):
            size["sliding_window"] = layer.max_cache_len  # the smaller of window and length, which is what counts
    made: Any = kind(**size) if rows is None else _OF_ROWS[kind](rows.tolist(), batch, **size)
    if getattr(layer, "record_past", False):
        made.activate_past_recording()
    return made


def _same(held: Sequence[Workflow], active: Sequence[Workflow]) -> bool:
    if len(held) == 1 or len(active) == 1:
        return set(held) == set(active) and len(set(held)) == 1
    return list(held) == list(active)


def _told(workflows: Sequence[Workflow]) -> str:
    names = [f"'{name}'" for name, _ in workflows]
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"
