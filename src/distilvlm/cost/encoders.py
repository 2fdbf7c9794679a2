"""What vision encoders that teach cost a stage, and what a stage of pictures alone costs: memory by running the code on
tensors that have a size but no memory, time by counting multiplications. No weights are loaded.

Multiplications are taken at the speed of a large matrix product here, so times are the least that is to be expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from distilvlm.data.geometry import PictureError, canvas, decode
from distilvlm.models import forward
from distilvlm.models.alone import Encoder
from distilvlm.models.encoders import EncoderTeacher, build_encoder, frozen_copy
from distilvlm.models.vlm import VLM, on_meta
from distilvlm.recipe import Recipe, StageSpec
from distilvlm.teachers.encoder_cache import kept_bytes
from distilvlm.teachers.encoders import Shape, of_stage

from .clock import Clock
from .memory import WINDOW, Live, fake_maker, mapped, parameter_bytes
from .numbers import as_bytes

COPIES = 4
"""Of what an encoder saw, in fp32, while it is compared: itself, mapped, their difference, and a gradient."""


@dataclass(frozen=True)
class Teaching:
    """What encoders cost a stage."""

    held: int = 0  # bytes of their weights
    looking: int = 0  # most bytes while one of them sees a micro-batch's pictures
    compared: int = 0  # bytes of what they saw, while it is compared
    operations: float = 0.0  # floating-point operations of a picture
    cached: int | None = None  # bytes of a picture in the cache; None without one
    stores: int = 0  # that these lie in

    def mapped(self, shown: int, pictures: int) -> int:
        """Bytes of the cache of so many pictures that stay in memory when some of them were shown."""
        cached = self.cached or 0
        return mapped(shown, cached, cached * pictures, self.stores * WINDOW)

    def notes(self, pictures: int | None) -> list[str]:
        """What the cache of encoders' features takes, which is not the run's; `pictures` of the stage."""
        if self.cached is None:
            return []
        size = f"{as_bytes(self.cached)} a picture"
        whole = "" if pictures is None else f", {as_bytes(self.cached * pictures)} for {pictures:,}"
        return [
            f"the cache of encoders' features takes {size}{whole}; filling it is not counted (distilvlm cache --plan)"
        ]


def teaching(
    recipe: Recipe, stage: StageSpec, student: VLM | Encoder, shapes: Mapping[str, Shape], pictures: int
) -> Teaching:
    """What a stage's encoders cost for micro-batches of so many pictures; with a cache they are not asked any more.

    Args:
        shapes: of the encoders that are here; others cost nothing that is known.
    """
    names = [name for name in of_stage(recipe, stage) if name in shapes]
    seen = 4 * pictures * sum(shapes[name].tokens * shapes[name].channels for name in names)
    if recipe.cache is not None:
        each = sum(kept_bytes(recipe.cache, shapes[name]) for name in names)
        return Teaching(compared=COPIES * seen, cached=each, stores=len(names))
    held, looking, operations = 0, 0, 0.0
    for name in names:
        encoder = _outline(recipe, name, student)
        dtype = torch.bfloat16 if recipe.encoders[name].precision == "bf16" else torch.float32
        held += parameter_bytes(encoder.model, dtype)
        operations += _operations(encoder)
        looking = max(looking, _looking(encoder, pictures))
    return Teaching(held, looking, COPIES * seen, operations)


def seeing(student: VLM | Encoder, pictures: int, trains: bool, checkpointing: bool) -> tuple[int, float]:
    """A tower's part of a step of pictures alone: most bytes that a micro-batch takes beyond weights and gradients, and
    the operations of one picture, back and forth if something in it trains.

    Args:
        student: with `requires_grad` as the stage has it; it may be without weights, and is left as it is.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _fake(on_meta(student.model), mode)
    model.train(trains)
    if checkpointing and trains:
        forward.enable_gradient_checkpointing(model)  # pyright: ignore
    tower: nn.Module = model.model.vision_tower  # pyright: ignore

    def step(count: int) -> None:
        size = student.layout.size
        with mode:
            canvases = torch.empty(count, 3, size, size, dtype=torch.uint8)
        features = forward.vision_features(model, student.layout, canvases)  # pyright: ignore
        if features.requires_grad:
            features.float().square().mean().backward()

    with Live([*tower.parameters(), *tower.buffers()]) as live:
        step(pictures)
    gradients = sum(4 * p.numel() for p in tower.parameters() if p.requires_grad)
    for parameter in tower.parameters():
        parameter.grad = None
    with FlopCounterMode(display=False) as counter:
        step(1)
    return max(0, live.peak - gradients), float(counter.get_total_flops())


def reading(recipe: Recipe, paths: Sequence[str], student: VLM | Encoder, clock: Clock) -> float:
    """Seconds to make a picture's canvas, where no loader process does it beside the device."""
    if recipe.machine.workers or not paths:
        return 0.0

    def fetch() -> None:
        canvas(decode(paths[0]), recipe.pictures.geometry, student.layout.size)

    try:
        return clock.time(fetch, 0.05)
    except PictureError:  # the run's own check names it
        return 0.0


def _outline(recipe: Recipe, name: str, student: VLM | Encoder) -> EncoderTeacher:
    spec = recipe.encoders[name]
    if spec.source is None and spec.config is None:
        return frozen_copy(on_meta(student.model.model.vision_tower), student.layout, name)  # pyright: ignore
    return build_encoder(spec, name, recipe.seed, meta=True)


def _operations(encoder: EncoderTeacher) -> float:
    with FlopCounterMode(display=False) as counter:
        encoder.see(torch.empty(1, 3, encoder.size, encoder.size, device="meta"))
    return float(counter.get_total_flops())


def _looking(encoder: EncoderTeacher, pictures: int) -> int:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _fake(encoder.model, mode)
    with mode:
        pixels = torch.empty(pictures, 3, encoder.size, encoder.size)
    with Live([*encoder.model.parameters(), *encoder.model.buffers(), pixels]) as live:
        encoder.see(pixels)
    return live.peak


def _fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with tensors that have a size but no memory, in place; tied ones stay one."""
    make, made = fake_maker(mode), dict[int, Tensor]()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(make(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # pyright: ignore
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = make(buffer)
    return model
