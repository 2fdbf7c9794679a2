"""Plain vision transformers of transformers: CLIP, SigLIP, DINOv2 and 3 with or without registers, ViT, ..."""

from __future__ import annotations

import logging
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..towers import blocks_of, hidden_state_on_meta, side_of, tokens_that_change
from . import attention
from .importance import clipped, importance_of
from .interface import EncoderTeacher, Seen, View

log = logging.getLogger(__name__)

Source = Literal["cls", "pooling", "received", "none"]
"""What importance is read from: CLS attention, the pooling head's query, or what tokens receive from each other."""


class ViTEncoder(EncoderTeacher):
    """The patch tokens of one hidden state, without CLS and registers.

    Blocks behind that state are cut off, unless the pooling head needs them for importance.

    Args:
        tower: owned from here on; its configuration, too.
        layer: index of the hidden state; negative from the end. The output of a block as it is: no closing norm.

    Raises:
        ValueError: the layer is not there, the size does not fit, or the tower's tokens are no square grid.
    """

    def __init__(self, name: str, tower: PreTrainedModel, view: View, layer: int) -> None:
        config: Any = tower.config
        depth: int = config.num_hidden_layers
        self._options = attention.interpolation(tower, view.size)
        try:
            read = 0 if layer in (0, -depth - 1) else attention.block_of(layer, depth) + 1
        except ValueError as error:
            raise ValueError(f"encoder '{name}': {error}") from error
        changes, side = _patches(config, view.size, read, self._options, name)
        self._block = read - 1  # -1: the embeddings
        self._first = changes.index(True)
        self._pooling = None if not changes[0] or read == 0 else _pooling_head(tower)
        self.source: Source = "received"
        if read == 0:
            self.source = "none"
        elif not changes[0]:
            self.source = "cls"
        elif self._pooling is not None:
            self.source = "pooling"
        if self.source != "pooling":
            del blocks_of(tower)[1][max(read, 1) :]
            config.num_hidden_layers = max(read, 1)
        if self.source not in ("cls", "none"):
            log.info(
                "encoder '%s' has no CLS token: its importance is read from %s",
                name,
                "its pooling head, behind its last layer" if self._pooling else "the attention that tokens receive",
            )
        reads = {"layer": read, "importance": self.source}
        super().__init__(name, tower, view, config.hidden_size, (side, side), reads)

    @property
    def gives_importance(self) -> bool:
        return self.source != "none"

    def _look(self, pixels: Tensor, importance: bool) -> Seen:
        states, queried = self._run(pixels, importance)
        tokens = states[:, self._first :].contiguous()  # [pictures, N, C]
        cls = None if self._first == 0 else states[:, 0]
        if queried is None:
            return Seen(tokens, self.grid, cls)
        rows = queried[..., self._first :]  # [pictures, heads, N]
        weights = importance_of(rows)
        return Seen(tokens, self.grid, cls, rows, clipped(weights) if self.source == "received" else weights)

    def _run(self, pixels: Tensor, importance: bool) -> tuple[Tensor, Tensor | None]:
        """All tokens of the hidden state, [pictures, T, C], and attention to them, [pictures, heads, T]."""
        kept: list[Any] = []
        blocks = blocks_of(self.model)[1]
        if self._block < 0:
            handle = blocks[0].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        else:
            handle = blocks[self._block].register_forward_hook(lambda _, __, output: kept.append(output))
        try:
            if not importance:
                self.model(pixels, **self._options)
                return kept[0], None
            if self._pooling is not None:
                weights = _pooled(self._pooling, lambda: self.model(pixels, **self._options))
                return kept[0], weights
            row = attention.from_cls if self.source == "cls" else attention.received
            with attention.watched(self.model, self._block, row) as rows:
                self.model(pixels, **self._options)
            return kept[0], attention.only_row(rows, self.model)
        finally:
            handle.remove()


def _patches(config: Any, size: int, layer: int, options: dict[str, Any], name: str) -> tuple[list[bool], int]:
    """For every token whether it is a patch, and patches per side. CLS and registers stand before all patches."""
    what = f"encoder '{name}' ('{config.model_type}')"
    try:
        changes = tokens_that_change(config, size, **options)
        read = hidden_state_on_meta(config, size, layer, **options)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        own = side_of(config, "image_size")
        raise ValueError(f"{what} cannot see pictures of {size} px, its own size is {own}: {error}") from error
    side = size // (side_of(config, "patch_size") or size)
    first = len(changes) - side * side
    is_plain = tuple(read.shape) == (1, len(changes), config.hidden_size)
    if not is_plain or first < 0 or any(changes[:first]) or not all(changes[first:]):
        raise ValueError(
            f"{what} is no plain vision transformer: hidden state {layer} is {list(read.shape)} with {sum(changes)} "
            f"tokens that depend on the picture, where [1, tokens, {config.hidden_size}] ending in {side}×{side} "
            "patches was expected"
        )
    return changes, side


def _pooling_head(tower: nn.Module) -> nn.MultiheadAttention | None:
    """The attention of a head that asks with a learned query (SigLIP's `probe`)."""
    for module in tower.modules():
        if isinstance(getattr(module, "probe", None), nn.Parameter):
            pooling = getattr(module, "attention", None)
            if isinstance(pooling, nn.MultiheadAttention):
                return pooling
    return None


def _pooled(pooling: nn.MultiheadAttention, run: Any) -> Tensor:
    """How much the head's query attends to each token while `run` runs, [pictures, heads, T] float32."""
    asked: list[tuple[Tensor, ...]] = []
    handle = pooling.register_forward_pre_hook(lambda _, inputs: asked.append(inputs))
    try:
        run()
    finally:
        handle.remove()
    query, key, value = asked[0]
    _, weights = pooling(query, key, value, need_weights=True, average_attn_weights=False)  # [pictures, heads, 1, T]
    return weights[:, :, 0].float()
