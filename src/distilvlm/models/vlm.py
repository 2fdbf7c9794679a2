"""A vision-language model as the package passes it around: a stock Llava, its tokenizer, and how its tower sees.

Nobody outside `models/` needs a module path of Hugging Face's: `forward.py` runs the model, `parts.py` names its parts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
"""The special token that stands for one vision feature. In raw text it marks a picture (LLaVA's convention)."""


@dataclass(frozen=True)
class VisionLayout:
    """How the vision tower sees a picture and which of its tokens reach the language model.

    `visual` covers the placeholders of ONE picture in their order; False is a register, which the stock class cannot
    drop but which is never a visual row.
    """

    size: int  # picture side in pixels
    patch: int  # patch side in pixels
    placeholders: int  # tokens per picture in the language model's sequence
    visual: tuple[bool, ...]  # [placeholders]
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    select: Literal["default", "full"]  # the stock class's strategy: 'default' drops index 0
    layer: int  # index into the tower's hidden states, negative from the end

    def __post_init__(self) -> None:
        if len(self.visual) != self.placeholders:
            raise ValueError(f"the visual mask has {len(self.visual)} entries for {self.placeholders} placeholders")


@dataclass
class VLM:
    """A stock `LlavaForConditionalGeneration` and what is needed to feed it.

    The tokenizer holds `<image>` as a special token with id `image_id`. That id is a spare row of the embedding where
    there is one; otherwise it is `embedding_rows`, one past the end: such an id is never embedded (`Batch.input_ids`
    carry a safe id under placeholders), and only `save` adds a row for it.

    `random_parts` are those of 'vision', 'projector' and 'language' that were drawn when the model was composed, not
    read from a checkpoint.
    """

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase | None  # None only on the meta device, where a plan may lack the files
    layout: VisionLayout
    image_id: int
    random_parts: frozenset[str] = frozenset()

    @property
    def embedding_rows(self) -> int:
        """Rows of the input embedding; ids from here on cannot be embedded."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.shape[0]

    def without_weights(self) -> VLM:
        """The same on the meta device: for what can be told from names, shapes and dtypes."""
        return replace(self, model=on_meta(self.model))

    def to(self, device: torch.device | str) -> VLM:
        """Move the model to a device; returns self."""
        nn.Module.to(self.model, device)  # transformers' own, decorated, is opaque to type checkers
        return self

    @property
    def image_id_is_virtual(self) -> bool:
        """True where `<image>` has no row, so `save` must add one."""
        return self.image_id >= self.embedding_rows


Module = TypeVar("Module", bound=nn.Module)


def on_meta(module: Module) -> Module:
    """A copy without weights, whatever was put into the stock class; tied tensors stay one."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    return copy.deepcopy(module, memo)
