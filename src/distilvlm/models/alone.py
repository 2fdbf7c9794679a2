"""A student that is a vision encoder alone: no language model, no projector.

Its tower stands under the name that it has in a Llava, so that parts, checkpoints and features are told alike, and a
tower that was trained alone continues in a VLM without renaming.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .vlm import VisionLayout, on_meta


class _Body(nn.Module):
    """What stands where a Llava has its body."""

    vision_tower: PreTrainedModel

    def __init__(self, tower: PreTrainedModel) -> None:
        super().__init__()
        self.vision_tower = tower


class Alone(nn.Module):
    """A tower with a Llava's names.

    Args:
        layer: the hidden state that is read.
    """

    def __init__(self, tower: PreTrainedModel, layer: int) -> None:
        super().__init__()
        self.model = _Body(tower)
        self.config: Any = copy.deepcopy(tower.config)
        self.config.vision_feature_layer = layer

    @property
    def tower(self) -> PreTrainedModel:
        return self.model.vision_tower

    @property
    def device(self) -> torch.device:
        return self.tower.device

    def activation_checkpointing_enable(self, *options: Any) -> None:
        """As a Llava's."""
        name = "activation_checkpointing_enable"  # transformers ≥ 5.23; before that it was called gradient_…
        enable: Callable[..., Any] = getattr(self.tower, name, None) or self.tower.gradient_checkpointing_enable
        enable(*options)


@dataclass
class Encoder:
    """A vision tower as the package passes it around; as a `VLM`, without what needs a language model."""

    model: Alone
    layout: VisionLayout
    random_parts: frozenset[str] = frozenset()
    tokenizer: None = None

    @property
    def host(self) -> None:
        """Adaptors are of language models."""
        return None

    @property
    def adaptors(self) -> tuple[str, ...]:
        return ()

    @property
    def trees(self) -> tuple[nn.Module, ...]:
        """All modules that hold weights."""
        return (self.model,)

    @property
    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer, each once."""
        return list({id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}.values())

    def train(self, mode: bool = True) -> Encoder:
        """Put the tower into training mode, or out of it; returns self."""
        self.model.train(mode)
        return self

    def without_weights(self) -> Encoder:
        """The same on the meta device: for what can be told from names, shapes and dtypes."""
        return replace(self, model=on_meta(self.model))

    def to(self, device: torch.device | str) -> Encoder:
        """Move the tower to a device; returns self."""
        nn.Module.to(self.model, device)
        return self
