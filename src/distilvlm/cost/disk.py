"""Bytes that a stage leaves in the run's directory, and what it holds there while it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distilvlm.losses.objective import Objective
from distilvlm.models.alone import Encoder
from distilvlm.models.mixture import mixtures
from distilvlm.models.upcycling import upcycled_layers
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.recipe.schema import TERMS
from distilvlm.train import objective_of

POSITION = 420
"""`position.json` and `manifest.json` of a finished stage, about."""

ABOUT = 850
"""`about.json` of a stage, about."""

EXPORTED_ALONE = 2_500
"""The same of a finished encoder alone."""

EXPORTED = 6_500
"""Configuration files, processor, chat template and manifest of a finished student, about."""


DESCRIBED = 1_500
"""What an adaptor's directory says of it, or a host's of its adaptors, about."""


@dataclass(frozen=True)
class Disk:
    """Bytes under the run's directory. `kept` is what is still there when the stage, or the run, is finished."""

    final: int  # what the stage trained
    events: int
    model: int  # the finished student, behind the last stage
    checkpoints: int  # at most, while the stage runs

    @property
    def kept(self) -> int:
        return self.final + self.events + self.model + ABOUT

    @property
    def parts(self) -> dict[str, int]:
        found = {"trained": self.final, "events": self.events, "about": ABOUT, "checkpoints": self.checkpoints}
        return {**found, "finished student": self.model} if self.model else found


def of_stage(
    recipe: Recipe, index: int, vlm: VLM | Encoder, trained: Mapping[str, nn.Parameter], updates: int | None
) -> Disk:
    """What stage `index` writes in so many updates; `vlm` is the student as it trains, and may be without weights."""
    spec, keep, checkpoint_every = recipe.stages[index], recipe.machine.keep, recipe.machine.checkpoint_every
    objective, teachers = objective_of(spec, recipe.teacher), list(recipe.teachers_of(spec))
    last = index == len(recipe.stages) - 1
    final = safetensors_bytes(trained) + POSITION
    states = safetensors_bytes(trained) + 2 * sum(4 * p.numel() for p in trained.values()) + 300 * len(trained) + 6_000
    # The newest is written before the oldest is removed.
    held = 0 if updates is None else min(keep + 1, (updates - 1) // checkpoint_every)
    model: int = 0
    own = {name: p for name, p in vlm.model.named_parameters() if not name.startswith("adapters.")}
    if last and isinstance(vlm, Encoder):
        model = safetensors_bytes(own) + EXPORTED_ALONE
    elif last and isinstance(vlm, VLM) and vlm.host is not None and vlm.adaptors:
        adaptors = [dict(vlm.host[name].named_parameters()) for name in vlm.adaptors]
        projector = dict(vlm.model.model.multi_modal_projector.named_parameters())
        model = sum(safetensors_bytes(tensors) + DESCRIBED for tensors in [*adaptors, projector])
    elif last and isinstance(vlm, VLM):
        rows = max(vlm.embedding_rows, vlm.image_id + 1)
        width: int = vlm.model.get_input_embeddings().weight.shape[1]  # pyright: ignore
        added = (rows - vlm.embedding_rows) * width * 4
        tied = vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight
        model = safetensors_bytes(own) + added * (1 if tied else 2) + EXPORTED
        if vlm.tokenizer is not None:
            model += len(vlm.tokenizer.backend_tokenizer.to_str(pretty=True).encode())  # pyright: ignore
    if last:  # adapters are kept beside the student
        model += sum(4 * p.numel() for name, p in vlm.model.named_parameters() if name.startswith("adapters."))
    return Disk(final, (updates or 0) * _event_bytes(objective, vlm, teachers), model, held * states)


def safetensors_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = torch.float32) -> int:
    """Size of a safetensors file of these tensors, to the byte: 8 of length, a JSON header, the data.

    Args:
        dtype: that they are written in; None: each in its own.
    """
    header: dict[str, object] = {}
    at = 0
    kinds = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    for name in sorted(tensors, key=lambda name: (-kinds[name].itemsize, name)):
        end = at + kinds[name].itemsize * tensors[name].numel()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _KINDS[kinds[name]], "shape": shape, "data_offsets": [at, end]}
        at = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + at


_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}
"""What safetensors calls them."""


def _event_bytes(objective: Objective, vlm: VLM | Encoder, teachers: Sequence[str]) -> int:
    """Of an update: its terms, what is watched of a preference loss and of teachers, and every layer with experts."""
    names = [name for name in TERMS if getattr(objective, name)]
    if objective.preference:
        rewards = ["chosen_reward", "rejected_reward"] if objective.preference_kind != "kto_unpaired" else ["z0"]
        names += [*rewards, "preference_accuracy"]
    names += [f"{kind}.{name}" for name in teachers for kind in ("encoder", "encoder_weight")]
    layers = len(upcycled_layers(vlm.model.config))
    experts = getattr(vlm.model.config.get_text_config(), "num_experts", 0)
    routing = 15 + layers * (52 + 22 * experts) if layers else 0
    routed = [one for one in mixtures(vlm.model) if one.count > 1]
    seen = 22 + sum(52 + 22 * one.count for one in routed) if routed else 0
    return 212 + sum(len(name) + 25 for name in names) + routing + seen
