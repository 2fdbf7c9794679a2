"""What goes over the network between a run and a teacher elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distilvlm.models import forward
from distilvlm.models.vlm import VLM, VisionLayout
from distilvlm.recipe import Recipe, StageSpec, TeacherSpec
from distilvlm.recipe.teachers import KeepSpec

from .disk import safetensors_bytes
from .shapes import Shapes, Size

WORD = 5
"""Bytes of a token in a prompt, as text or as a number in JSON, about."""

KNOWN = 75
"""Bytes of one id and its log-probability in an answer, about: vLLM tells its rank and its text, too."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one update, over all processes."""

    sent: int
    received: int | None  # None where the teacher's width is not known here
    once: int | None  # its head, by each process; None where its size is not known


def received(spec: TeacherSpec) -> KeepSpec:
    """What the targets of a teacher elsewhere are like as they arrive, in the words of one that is kept on disk."""
    if spec.remote is not None and spec.remote.protocol == "openai":
        return KeepSpec(responses="top_k", top_k=spec.remote.top_k + 1, visual="relation")  # no head comes along
    return KeepSpec()


def traffic(recipe: Recipe, stage: StageSpec, student: VLM, teacher: VLM | None, shapes: Shapes) -> Traffic | None:
    """What an update of `stage` asks of a teacher elsewhere; None where there is none, or it is not asked in training.
    Bodies are counted to the byte between a run and `distilvlm teach`; what HTTP writes around them is not.

    Args:
        teacher: without weights is enough; None where its files are not here.
        shapes: of the stage's micro-batches.
    """
    spec, layout = recipe.teacher, student.layout
    if spec is None or spec.kind != "remote" or spec.remote is None or not stage.loss.compares:
        return None
    updates = len(shapes.updates)
    asked = [size for update in shapes.updates for size in update]
    if spec.remote.protocol == "openai":
        positions, pixels = sum(size.real for size in asked), sum(size.pictures for size in asked) * 3 * layout.size**2
        sent = positions * WORD + pixels * 4 / 3  # base64; PNG makes them smaller, noise does not
        return Traffic(round(sent / updates), round(positions * (spec.remote.top_k + 1) * KNOWN / updates), 0)
    sent = sum(question_bytes(size, layout, recipe.machine.packing) for size in asked)
    if teacher is None:
        return Traffic(round(sent / updates), None, None)
    vocabulary, width = forward.head_weight(teacher.model).shape
    held = torch.bfloat16 if spec.held == "bf16" else torch.float32
    rows = sum(_body({"hidden": torch.empty(size.rows, width, dtype=held, device="meta")}) for size in asked)
    return Traffic(
        round(sent / updates),
        round(rows / updates),
        _body({"head": torch.empty(vocabulary, width, dtype=held, device="meta")}),
    )


def question_bytes(size: Size, layout: VisionLayout, packed: bool) -> int:
    """Bytes of what `teachers.remote.message.Question` makes of a micro-batch."""

    def ids(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    line = size.lines, size.positions // size.lines
    asked = {"input_ids": ids(*line), "attention_mask": ids(*line), "rows": ids(size.rows)}
    asked["placeholder_rows"] = ids(size.pictures * layout.placeholders)
    if size.pictures:
        asked["pictures"] = torch.empty(size.pictures, 3, layout.size, layout.size, dtype=torch.uint8, device="meta")
    if packed:
        asked["sizes"] = ids(size.sequences)
    return _body(asked)


def _body(tensors: Mapping[str, Tensor]) -> int:
    return safetensors_bytes(tensors, None)
