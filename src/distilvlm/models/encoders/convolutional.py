"""Convolutional encoders of transformers: ConvNeXt, EfficientNet, MobileNet, ResNet, RegNet, ..."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from .interface import EncoderTeacher, Seen, View, flattened

log = logging.getLogger(__name__)


class ConvolutionalEncoder(EncoderTeacher):
    """One feature map, a token per place.

    Args:
        layer: index of a hidden state; None reads what stands before pooling, without the norm of a classifier
            (specification §1.1, ConvNeXt).

    Raises:
        ValueError: the layer is not there, or what the model gives there is no feature map.
    """

    def __init__(self, name: str, model: PreTrainedModel, view: View, layer: int | None) -> None:
        self._layer = layer
        if model.config.model_type == "efficientnet" and view.size % 32:
            log.warning(
                "encoder '%s': at %d px a side is halved where it is odd, and there EfficientNet of transformers drops "
                "the last row and column; multiples of 32 are seen as in its training",
                name,
                view.size,
            )
        maps = _maps_on_meta(model.config, view.size, layer, name)
        _, channels, rows, columns = maps.shape
        super().__init__(name, model, view, channels, (rows, columns), {"layer": layer})

    def _look(self, pixels: Tensor, importance: bool) -> Seen:
        tokens, grid = flattened(_read(self.model(pixels, output_hidden_states=self._layer is not None), self._layer))
        return Seen(tokens, grid)


def _read(output: Any, layer: int | None) -> Tensor:
    return output.last_hidden_state if layer is None else output.hidden_states[layer]


def _maps_on_meta(config: PretrainedConfig, size: int, layer: int | None, name: str) -> Tensor:
    with torch.device("meta"), torch.no_grad():
        model = AutoModel.from_config(config).eval()
        output = model(torch.zeros(1, 3, size, size, dtype=model.dtype), output_hidden_states=True)
    count = len(output.hidden_states)
    if layer is not None and not -count <= layer < count:
        raise ValueError(f"encoder '{name}' has hidden states 0 to {count - 1} (or -{count} to -1), not layer {layer}")
    maps = _read(output, layer)
    if maps.ndim != 4:
        raise ValueError(
            f"encoder '{name}' ('{config.model_type}') gives {list(maps.shape)} at layer {layer}, where a feature map "
            "[pictures, channels, rows, columns] was expected: give another layer (its hidden states are "
            f"{[list(state.shape) for state in output.hidden_states]})"
        )
    return maps
