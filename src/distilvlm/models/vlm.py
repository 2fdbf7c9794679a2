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

from .adaptors import TEXT, Host

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

    A model with adaptors (`host`) is the frozen stock model and modules beside it: `trees` are all of it.
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

    @property
    def host(self) -> Host | None:
        """What holds the model's adaptors; None where none was ever inserted."""
        return Host.of(self.model)

    @property
    def adaptors(self) -> tuple[str, ...]:
        """The names of the model's adaptors, in the order in which they were inserted."""
        return () if self.host is None else self.host.names

    @property
    def workflow(self) -> str:
        """The one active workflow: an adaptor's name, or 'text'."""
        return TEXT if self.host is None or not isinstance(self.host.active, str) else self.host.active

    @property
    def trees(self) -> tuple[nn.Module, ...]:
        """All modules that hold weights: the stock model, and its adaptors if it has any."""
        return (self.model,) if self.host is None else (self.model, self.host.adaptors)

    @property
    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer of all trees, each once."""
        found = {id(t): t for tree in self.trees for t in [*tree.parameters(), *tree.buffers()]}
        return list(found.values())

    def train(self, mode: bool = True) -> VLM:
        """Put all trees into training mode, or out of it; returns self."""
        for tree in self.trees:
            tree.train(mode)
        return self

    def use(self, workflow: str | None) -> VLM:
        """Make a workflow the active one until another is; returns self.

        Args:
            workflow: 'text' or an adaptor's name; None is the adaptor that was inserted last, if there is any.

        Raises:
            ValueError: there is no such adaptor.
        """
        chosen = workflow or (self.adaptors[-1] if self.adaptors else TEXT)
        if chosen not in (TEXT, *self.adaptors):
            raise ValueError(
                f"there is no workflow '{chosen}' in this model: there is {', '.join((TEXT, *self.adaptors))}"
            )
        if self.host is not None:
            self.host.set(chosen)
        return self

    def without_weights(self) -> VLM:
        """The same on the meta device: for what can be told from names, shapes and dtypes."""
        return replace(self, model=on_meta(self.model))

    def to(self, device: torch.device | str) -> VLM:
        """Move the model to a device; returns self."""
        for tree in self.trees:
            nn.Module.to(tree, device)  # transformers' own, decorated, is opaque to type checkers
        return self

    @property
    def image_id_is_virtual(self) -> bool:
        """True where `<image>` has no row, so `save` must add one."""
        return self.image_id >= self.embedding_rows


Module = TypeVar("Module", bound=nn.Module)


def on_meta(module: Module) -> Module:
    """A copy without weights, whatever was put into the stock class or stands beside it; tied tensors stay
    one."""
    host = Host.of(module)
    trees: list[nn.Module] = [module] if host is None else [module, host.adaptors]
    memo: dict[int, object] = {}
    for tree in trees:
        memo |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in tree.parameters()}
        memo |= {id(b): torch.empty_like(b, device="meta") for b in tree.buffers()}
    return copy.deepcopy(module, memo)
