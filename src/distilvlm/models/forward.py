"""Running a VLM to hidden states: never to logits, which the loss terms build in chunks of the rows they need.

Equal to stock `LlavaForConditionalGeneration` on the same batch, but for the positions of the pictures, which come from
the batch and not from an id: under a placeholder stands an id that is safe to embed. A model with adaptors runs in its
active workflow: its language model's hooks see to the layers, what stands around them is chosen here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from . import packing, routing
from .adaptors import Host
from .alone import Alone
from .vlm import VisionLayout


class Rows(Protocol):
    """What the language model needs of a batch."""

    @property
    def input_ids(self) -> Tensor: ...  # [lines, length] int64, all safe to embed
    @property
    def attention_mask(self) -> Tensor: ...  # [lines, length] int64, 1 = real, right-padded
    @property
    def placeholder_rows(self) -> Tensor: ...  # [pictures * placeholders] flat positions, in the order of the pictures
    @property
    def sizes(self) -> tuple[int, ...] | None: ...  # of the samples of one packed line; None: each is a line of its own


def pixel_values(layout: VisionLayout, pictures: Tensor) -> Tensor:
    """Canvases as the tower wants them: uint8 [pictures, 3, size, size] → float32, normalised."""
    if pictures.dtype != torch.uint8 or tuple(pictures.shape[1:]) != (3, layout.size, layout.size):
        raise ValueError(
            f"pictures are {list(pictures.shape)} {pictures.dtype}, the tower takes [pictures, 3, {layout.size}, "
            f"{layout.size}] torch.uint8"
        )
    return normalised(pictures.to(torch.float32), layout.mean, layout.std)


def normalised(pictures: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Values of 0 to 255, [pictures, 3, size, size] float32, with the mean and deviation of RGB in [0, 1] taken out."""
    # Mean and deviation are scaled up instead of the pixels down: the order of the stock image processors, so the same
    # bits as a finished model sees when it is used without us.
    shift = torch.tensor(mean, device=pictures.device).mul(255).view(3, 1, 1)
    scale = torch.tensor(std, device=pictures.device).mul(255).view(3, 1, 1)
    return (pictures - shift) / scale


def vision_features(model: LlavaForConditionalGeneration | Alone, layout: VisionLayout, pictures: Tensor) -> Tensor:
    """What the tower hands to the projector: uint8 [pictures, 3, size, size] → [pictures, placeholders, d_vision].

    In the tower's dtype (or autocast's). A tower of which nothing trains runs without a graph and in evaluation mode.
    """
    tower: Any = model.model.vision_tower
    trains = any(parameter.requires_grad for parameter in tower.parameters())
    if not trains and tower.training:
        tower.eval()  # its features may be kept on disk, so they must not depend on dropout
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        pixels = pixel_values(layout, pictures).to(tower.dtype)
        output = tower(pixels, output_hidden_states=True, return_dict=True)
        features: Tensor = output.hidden_states[layout.layer]
    if layout.select == "default":
        features = features[:, 1:]
    if features.shape[1] != layout.placeholders:
        raise ValueError(
            f"the tower gave {features.shape[1]} tokens per picture, its layout says {layout.placeholders}"
        )
    return features


def embeddings(
    model: LlavaForConditionalGeneration,
    layout: VisionLayout,
    batch: Rows,
    features: Tensor | None,
    zero: Tensor | None = None,
) -> Tensor:
    """What the language model reads: embedded ids with the projected features in place, [lines, length, d].

    Args:
        features: [pictures, placeholders, d_vision] from `vision_features` or from a store, for every picture of the
            batch; None for a batch without pictures, which then touches neither tower nor projector.
        zero: added, to connect what the language model reads with what it is of (`idle_projector`).

    Raises:
        ValueError: features and placeholders of the batch differ in number.
    """
    embedded: Tensor = model.get_input_embeddings()(batch.input_ids)  # [lines, length, d]
    given = 0 if features is None else features.shape[0] * features.shape[1]
    if given != batch.placeholder_rows.numel():
        raise ValueError(
            f"the batch has {batch.placeholder_rows.numel()} placeholders "
            f"({layout.placeholders} per picture), but there are {given} vision features for them"
        )
    if features is not None and given:
        projected = _projected(model, batch, features)  # [pictures, placeholders, d]
        flat = embedded.flatten(0, 1)  # [lines * length, d]
        flat = flat.index_copy(0, batch.placeholder_rows, projected.flatten(0, 1).to(flat.dtype))
        embedded = flat.view_as(embedded)
    return embedded if zero is None else embedded + zero.to(embedded.dtype)


def projector(model: LlavaForConditionalGeneration) -> nn.Module:
    """What brings vision features into the language model in the one active workflow."""
    host = Host.of(model)
    return model.model.multi_modal_projector if host is None else host.projector()


def _projected(model: LlavaForConditionalGeneration, batch: Rows, features: Tensor) -> Tensor:
    """[pictures, placeholders, d]: every picture by the projector of its row's workflow."""
    host = Host.of(model)
    if host is None or isinstance(host.active, str):
        return _through(projector(model), features)
    pictures, placeholders, length = *features.shape[:2], batch.input_ids.shape[1]
    rows = (batch.placeholder_rows.view(pictures, placeholders)[:, 0] // length).tolist()  # of each picture
    whose = [host.active[row] for row in rows]
    pieces: dict[int, Tensor] = {}
    for workflow in dict.fromkeys(whose):
        places = [picture for picture, other in enumerate(whose) if other == workflow]
        with host.use(workflow):
            pieces |= zip(places, _through(projector(model), features[places]), strict=True)
    return torch.stack([pieces[picture] for picture in range(pictures)])


def _through(module: nn.Module, features: Tensor) -> Tensor:
    weight: Tensor = module.linear_1.weight  # pyright: ignore
    return module(features.to(weight.dtype))


def hidden_states(
    model: LlavaForConditionalGeneration,
    layout: VisionLayout,
    batch: Rows,
    features: Tensor | None,
    zero: Tensor | None = None,
) -> Tensor:
    """Final-normed hidden states of the language model, [lines, length, d]; arguments and errors as `embeddings`.

    Raises `ValueError`, too, where a packed line would run in several workflows at once.
    """
    decoder = model.get_decoder()
    arguments: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if batch.sizes is not None:
        host = Host.of(model)
        if host is not None and not isinstance(host.active, str):
            raise ValueError("samples of several workflows can't share a line: set machine.packing to false")
        ids = batch.input_ids
        arguments = packing.decoder_arguments(decoder, batch.sizes, ids.shape[1], ids.device)
    output = decoder(
        inputs_embeds=embeddings(model, layout, batch, features, zero), use_cache=False, return_dict=True, **arguments
    )
    return output.last_hidden_state


def layers(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """The language model's own layers, first to last; an adaptor's are not among them."""
    decoder: Any = model.get_decoder()
    return list(decoder.layers)


def head_weight(model: LlavaForConditionalGeneration) -> Tensor:
    """The output head's weight, [V, d], in the one active workflow; where head and embedding are tied, the embedding
    itself."""
    host = Host.of(model)
    return model.lm_head.weight if host is None else host.head_weight()


def idle_projector(model: LlavaForConditionalGeneration) -> Tensor:
    """A zero, connected to every parameter that only pictures reach: the projector's, and the tower's if it trains.

    Added to the loss of a batch without pictures, it gives those parameters a gradient of zeros, so that a
    projector-only stage can differentiate and DDP does not wait for gradients that never come. The tower does not run.
    """
    used = projector(model)
    first: Tensor = used.linear_1.weight  # pyright: ignore
    zero: Tensor = used(torch.zeros(1, first.shape[1], dtype=first.dtype, device=first.device)).sum() * 0.0
    for parameter in model.model.vision_tower.parameters():
        if parameter.requires_grad:
            zero = zero + parameter.sum() * 0.0
    return zero


def enable_gradient_checkpointing(model: LlavaForConditionalGeneration | Alone) -> None:
    """Keep only the blocks' inputs in training mode and compute the rest again when going backward.

    Non-reentrant, because the frozen embeddings of a projector-only stage have no gradient to pass on. Routers choose
    the second time as they did the first.
    """
    name = "activation_checkpointing_enable"  # transformers ≥ 5.23; before that it was called gradient_…
    owner: Any = model
    enable: Callable[..., Any] = getattr(owner, name, None) or owner.gradient_checkpointing_enable
    # Towers are shared: what they hold of one model must not keep it when another takes its place.
    held = weakref.ref(model)
    enable({"use_reentrant": False, "context_fn": lambda: routing.checkpointed(held())})
