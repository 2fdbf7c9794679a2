"""One row of one layer's attention, while the whole tower goes on with its fast kernel.

The stock way to attention weights, `output_attentions` with eager attention, holds [pictures, heads, tokens, tokens] of
every layer. Here a tower runs with an implementation of its own name, which hands every call to the one that it had
(SDPA) and looks at queries and keys in the one block that is asked for. They come as they are used, after rotary
embeddings and norms, whatever the class calls its projections. Memory: `benchmarks/encoder_attention.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..towers import blocks_of, side_of, tokens_that_change

IMPLEMENTATION = "sdpa_with_a_row"
"""Name for transformers' attention implementations; a configuration has it only inside of `watched`."""

Row = Callable[[Tensor, Tensor, float], Tensor]
"""Queries and keys [pictures, heads, tokens, d_head] and the scale of their products → [pictures, heads, tokens]."""


@dataclass
class _Watch:
    modules: set[nn.Module]  # of the block: its attention is one of them
    row: Row
    before: Callable[..., Any]
    rows: list[Tensor] = field(default_factory=list)


_watching: ContextVar[_Watch] = ContextVar("watching")


def from_cls(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """How much the first token attends to each."""
    logits = torch.einsum("phd,phtd->pht", queries[:, :, 0].float(), keys.float()) * scaling
    return logits.softmax(-1)


def received(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """How much each token is attended to, on average over all queries. A head at a time: [tokens, tokens] is large."""
    heads = [
        (query.float() @ key.float().transpose(1, 2) * scaling).softmax(-1).mean(1)
        for query, key in zip(queries.unbind(1), keys.unbind(1), strict=True)
    ]
    return torch.stack(heads, dim=1)


@contextmanager
def watched(tower: nn.Module, block: int, row: Row) -> Iterator[list[Tensor]]:
    """Inside, every forward of the tower appends `row` of that block's attention to the list."""
    config: Any = tower.config
    had = config._attn_implementation
    before = ALL_ATTENTION_FUNCTIONS.get_interface(had, sdpa_attention_forward)  # eager computes the same, in more room
    watch = _Watch(set(blocks_of(tower)[1][block].modules()), row, before)
    token = _watching.set(watch)
    config._attn_implementation = IMPLEMENTATION
    try:
        yield watch.rows
    finally:
        config._attn_implementation = had
        _watching.reset(token)


def cls_attention(tower: nn.Module, layer: int, pixels: Tensor) -> Tensor:
    """How much CLS attends to each patch, in the block whose output is hidden state `layer`.

    Args:
        tower: a transformers ViT with a CLS token.
        layer: index of a hidden state, as `vision.layer`; not 0, which no block gives.
        pixels: [pictures, 3, size, size], normalised.

    Returns:
        [pictures, heads, patches] float32: the CLS row of softmax(QKᵀ/√d) over all keys, of which patches are kept.

    Raises:
        ValueError: the tower has no CLS token, or the layer no block.
    """
    config: Any = tower.config
    options = interpolation(tower, pixels.shape[-1])
    changes = tokens_that_change(config, pixels.shape[-1], **options)
    if changes[0]:
        raise ValueError(f"'{config.model_type}' has no CLS token, so no row of attention is its own")
    with torch.no_grad(), watched(tower, block_of(layer, config.num_hidden_layers), from_cls) as rows:
        tower(pixels, **options)
    return only_row(rows, tower)[..., changes.index(True) :]


def only_row(rows: list[Tensor], tower: nn.Module) -> Tensor:
    """The row that one forward left.

    Raises ValueError if it left none, or several.
    """
    if len(rows) != 1:
        raise ValueError(
            f"{type(tower).__name__} ran the attention of a block {len(rows)} times through transformers' interface: "
            "its attention cannot be read"
        )
    return rows[0]


def block_of(layer: int, depth: int) -> int:
    """Number of the block whose output is hidden state `layer` of `depth` blocks.

    Raises ValueError for hidden state 0, which comes before all blocks, and for one that is not there.
    """
    if not -depth - 1 <= layer <= depth:
        raise ValueError(f"layer is {layer}, but there are hidden states 0 to {depth} (or -{depth + 1} to -1)")
    if layer % (depth + 1) == 0:
        raise ValueError("hidden state 0 comes before all blocks: no attention belongs to it")
    return layer % (depth + 1) - 1


def interpolation(tower: nn.Module, size: int) -> dict[str, Any]:
    """What to tell a tower's forward so that it sees pictures of another size than its own.

    DINOv2 and its kind interpolate their position embeddings unasked; CLIP and SigLIP must be told.
    """
    config: Any = tower.config
    takes = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
    return {"interpolate_pos_encoding": True} if takes and size != side_of(config, "image_size") else {}


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    watch = _watching.get()
    if module in watch.modules:
        if attention_mask is not None or options.get("position_bias") is not None:
            raise ValueError(f"{type(module).__name__} adds a mask or bias to its logits: its rows cannot be read")
        scaling = options.get("scaling")
        with torch.no_grad():
            watch.rows.append(watch.row(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling))
    return watch.before(module, query, key, value, attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _forward)
