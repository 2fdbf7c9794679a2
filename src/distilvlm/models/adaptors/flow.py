"""Hooks on a host's own modules: through which an adaptor's layers run, and its tables stand in for the host's.

In the workflow "text" each returns at once, and the output stays the very tensor that it was. In a batch of several
workflows all rows share the host's layers; an adaptor's modules run on its rows only, with masks and positions cut to
them where these differ between rows. What a row gets is what its workflow gives alone up to rounding (1e-5 in fp32):
products over fewer rows are summed in another order.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from . import slots
from .adaptor import Adaptor
from .config import TEXT

if TYPE_CHECKING:
    from .host import Host

_CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


class Passing(threading.local):
    """What one pass through a host hands from hook to hook; each thread has its own."""

    def __init__(self) -> None:
        self.chain: dict[int, Tensor] = {}  # structure (a): adaptor's serial -> what its next inserted layer reads
        self.replaced: dict[str, Any] = {}
        self.placeholders: Tensor | None = None  # of each row, while a Llava embeds pictures of several workflows

    def __deepcopy__(self, memo: object) -> Passing:
        return Passing()  # a copied host has passes of its own


class Entry:
    """Before a pass: the cache, if there is one, must be of the active workflow."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.host.active != TEXT:
            self.host.require_same_tables()
        self.host.passing.chain.clear()
        if (cache := _cache(args, kwargs)) is not None:
            slots.require(cache, self.host.base.depth, self.host.workflows)


class Insertion:
    """Behind a layer of the host: the layers that are inserted there."""

    def __init__(self, host: Host, position: int) -> None:
        self.host, self.position = host, position

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output  # [B, length, d]
        shares = self.host.shares(hidden.shape[0], hidden.device)
        shares = [(adaptor, rows) for adaptor, rows in shares if self.position in adaptor.config.positions]
        if not shares:
            return None
        entering: Tensor = args[0] if args else kwargs["hidden_states"]
        for adaptor, rows in shares:
            hidden = self._inserted(adaptor, rows, layer, entering, hidden, args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _inserted(
        self,
        adaptor: Adaptor,
        rows: Tensor | None,
        layer: nn.Module,
        entering: Tensor,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """[B, length, d]: `hidden`, changed in the adaptor's rows.

        Args:
            entering, args, kwargs: what the host's own layer was called with; `hidden` is what it gave.
        """
        number, batch = adaptor.config.positions.index(self.position), hidden.shape[0]
        inner = adaptor.layers[number]
        kwargs = self._with_room(adaptor, number, rows, layer, batch, args, kwargs)
        behind = _of_rows(hidden, rows, batch)
        if adaptor.config.structure != "a":
            read = behind
        else:
            chained = self.host.passing.chain.pop(adaptor.serial, None)
            read = _of_rows(entering, rows, batch) if chained is None or number == 0 else chained
        args, kwargs = _of_rows(args[1:], rows, batch), _cut(kwargs, rows, batch)
        if "hidden_states" in kwargs:
            kwargs.pop("hidden_states")
        given = inner(_in_dtype_of(read, inner), *args, **kwargs)
        given = given[0] if isinstance(given, tuple) else given  # [rows, length, d]
        if adaptor.config.structure == "a" and number + 1 < len(adaptor.layers):
            self.host.passing.chain[adaptor.serial] = given
        if adaptor.gates is not None:
            given = behind + adaptor.gates[number](given).to(behind.dtype)
        given = given.to(hidden.dtype)
        return given if rows is None else hidden.index_copy(0, rows, given)

    def _with_room(
        self,
        adaptor: Adaptor,
        number: int,
        rows: Tensor | None,
        layer: Any,
        batch: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """The layer's arguments, whose cache has a slot for the inserted one.

        transformers checkpoints a layer's forward, and hooks run outside of that: an inserted layer does so by itself,
        as its frozen one does.
        """
        inner: Any = adaptor.layers[number]
        checkpointing: bool = getattr(layer, "gradient_checkpointing", False)
        if hasattr(layer, "gradient_checkpointing"):
            inner.gradient_checkpointing = checkpointing
        if checkpointing:
            inner._gradient_checkpointing_func = layer._gradient_checkpointing_func
            if getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "reentrant gradient checkpointing loses the gradient of layers behind a frozen embedding: "
                    "enable it with {'use_reentrant': False}"
                )
            if layer.training:  # then no cache is written
                return kwargs | {name: None for name in _CACHE_NAMES if name in kwargs}
        if (cache := _cache(args, kwargs)) is not None:
            slot = adaptor.slot + number
            host = self.host
            slots.make_room(cache, host.base.depth, host.workflows, self.position, slot, rows, batch)
        return kwargs


class Replacement:
    """Around a table or norm of the host: the active adaptor's own gives the output instead.

    Where the host's is a plain embedding or linear layer it gets only the rows that it serves, often none: a vocabulary
    of 128,000 is not multiplied in vain.
    """

    def __init__(self, host: Host, part: str) -> None:
        self.host, self.part = host, part

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        passing = self.host.passing
        passing.replaced.pop(self.part, None)
        shares = self._shares(args[0]) if self.host.active != TEXT else []
        if not shares:
            return None
        given: Tensor = args[0]
        if shares[0][1] is None:
            left = None
        else:
            served = torch.cat([rows for _, rows in shares if rows is not None])
            left = torch.ones(given.shape[0], dtype=torch.bool, device=given.device)
            left = left.index_fill(0, served, False).nonzero().flatten()
        narrow = type(module) in (nn.Embedding, nn.Linear)
        passing.replaced[self.part] = (given, shares, left, narrow)
        if not narrow:
            return None
        cut = given.reshape(-1, *given.shape[1:])[:0] if left is None else given.index_select(0, left)
        return (cut, *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        found = self.host.passing.replaced.pop(self.part, None)
        if found is None:
            return None
        given, shares, left, narrow = found
        if left is None:
            return self._own(shares[0][0], given, output)
        kept = output if narrow else output.index_select(0, left)
        pieces = [kept, *(self._own(adaptor, given.index_select(0, rows), output) for adaptor, rows in shares)]
        order = torch.cat([left, *(rows for _, rows in shares)]).argsort()
        widest = kept.dtype
        for piece in pieces:
            widest = torch.promote_types(widest, piece.dtype)
        return torch.cat([piece.to(widest) for piece in pieces]).index_select(0, order)

    def _own(self, adaptor: Adaptor, given: Tensor, like: Tensor) -> Tensor:
        module = getattr(adaptor, self.part)
        out: Tensor = module(_in_dtype_of(given, module))
        return out if self.part == "lm_head" else out.to(like.dtype)

    def _shares(self, given: Tensor) -> list[tuple[Adaptor, Tensor | None]]:
        batch = given.shape[0] if given.dim() else 1
        shares = self.host.shares(batch, given.device) if self.part != "projector" else self._pictures(given)
        return [(adaptor, rows) for adaptor, rows in shares if getattr(adaptor, self.part) is not None]

    def _pictures(self, features: Tensor) -> list[tuple[Adaptor, Tensor | None]]:
        """Whose picture is whose: [pictures, placeholders, d] in the order of the rows."""
        if isinstance(self.host.active, str):
            return self.host.shares(features.shape[0], features.device)
        placeholders = self.host.passing.placeholders
        if placeholders is None:
            raise ValueError(
                "a batch of several workflows shows pictures, and nothing says to which rows they belong: give the "
                "Llava input_ids with its image tokens, or project each workflow's own, under host.use(workflow)"
            )
        counts = placeholders.to(features.device) // features.shape[1]
        row = torch.arange(len(counts), device=features.device).repeat_interleave(counts)  # [pictures]
        found: list[tuple[Adaptor, Tensor | None]] = []
        for adaptor, rows in self.host.shares(len(counts), features.device):
            assert rows is not None
            found.append((adaptor, torch.isin(row, rows).nonzero().flatten()))
        return found


class Sight:
    """Before a stock Llava runs on a batch of several workflows: how many placeholders each row has."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        known = ids is not None and not isinstance(self.host.active, str)
        self.host.passing.placeholders = (ids == model.config.image_token_id).sum(1) if known else None


def _cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)


def _in_dtype_of(value: Tensor, module: nn.Module) -> Tensor:
    """What trains is held in fp32 over a base in bf16: outside of autocast, which does this itself, somebody must."""
    if not value.is_floating_point() or torch.is_autocast_enabled(value.device.type):
        return value
    return value.to(next(module.parameters()).dtype)


def _cut(kwargs: dict[str, Any], rows: Tensor | None, batch: int) -> dict[str, Any]:
    if rows is None:
        return dict(kwargs)
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() > 2:
        raise ValueError("positions of several axes cannot be cut by row: give one workflow for the whole batch")
    return {name: _of_rows(value, rows, batch) for name, value in kwargs.items()}


def _of_rows(value: Any, rows: Tensor | None, batch: int) -> Any:
    """What differs between rows, cut to these; what is one for all rows, as it is."""
    if rows is None:
        return value
    if isinstance(value, Tensor):
        per_row = value.dim() > 1 and value.shape[0] == batch
        return value.index_select(0, rows.to(value.device)) if per_row else value
    if isinstance(value, tuple | list):
        return type(value)(_of_rows(one, rows, batch) for one in value)
    if type(value).__name__ == "BlockMask":
        raise ValueError(
            "masks of flex attention cannot be cut by row: load the model with attn_implementation='sdpa', or give one "
            "workflow for the whole batch"
        )
    return value
