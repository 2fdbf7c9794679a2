"""A teacher in this process: a frozen vision-language model, on the student's device or on one of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distilvlm.data.batch import Batch
from distilvlm.models import forward
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.onednn import faster_linear
from distilvlm.models.vlm import VLM, VisionLayout
from distilvlm.recipe import TeacherSpec

from .interface import Targets, TeacherError
from .own_rows import grid, interpolated, require_comparable_pictures, view

logger = logging.getLogger(__name__)


class LocalTeacher:
    """Exact targets: final-normed hidden states of the rows that the terms ask for.

    Args:
        vlm: the teacher; it is frozen and put into evaluation mode.
        student: the student it teaches.
        device: where the teacher runs; its targets are brought to `student_device`.
        share_vision: let the student's vision tower serve both if it has the same weights. Only for a student whose
            tower never trains.
        spec: what may differ between the two (`tokens`, `visual`); by default they must share a tokenizer and the
            number of visual tokens.

    Raises:
        TeacherError: the two cannot be compared row by row.
    """

    provides = frozenset({"teacher.responses", "teacher.visual", "teacher.relation"})

    def __init__(
        self,
        vlm: VLM,
        student: VLM,
        device: torch.device,
        student_device: torch.device,
        share_vision: bool,
        spec: TeacherSpec | None = None,
    ) -> None:
        if spec is None or spec.tokens == "same":
            require_same_meanings(meanings(student), meanings(vlm))
        if spec is None or spec.visual == "same":
            require_same_visual_tokens(vlm.layout, student.layout)
        else:
            require_comparable_pictures(spec, vlm.layout, student.layout)
        self.view = None if spec is None else view(spec, vlm, student)
        self._grids: tuple[tuple[int, int], tuple[int, int]] | None = None
        if spec is not None and spec.visual == "interpolate":
            self._grids = grid(vlm.layout, "teacher"), grid(student.layout, "student")
        self.shares_vision = share_vision and _same_tower(vlm, student)
        if self.shares_vision:
            # Same weights, so keep them once; the student's tower then serves both.
            vlm.model.model.vision_tower = student.model.model.vision_tower
            logger.info("teacher and student share one vision tower: it runs once per picture")
        self.vlm = vlm
        self.device = device
        self.student_device = student_device
        for tree in vlm.trees:
            tree.requires_grad_(False).eval()
        vlm.to(device)

    @property
    def head(self) -> Tensor:
        return forward.head_weight(self.vlm.model)  # [vocab_teacher, d_teacher]

    @property
    def identity(self) -> str:
        """The hash of its weights."""
        return fingerprint(self.vlm.model)

    def targets(self, batch: Batch, rows: Tensor, features: Tensor | None) -> Targets:
        batch = batch.to(self.device)
        features = None if features is None else features.to(self.device)
        if self.view is not None:
            return self._own(batch, rows.to(self.device), features)
        hidden = hidden_rows(self.vlm, batch, batch.pictures, rows.to(self.device), features)
        return Targets(hidden.to(self.student_device), self.head.to(self.student_device))

    def _own(self, batch: Batch, rows: Tensor, features: Tensor | None) -> Targets:
        """Of rows of its own: a response row of the batch gets its partner's, visual rows stand apart."""
        own, head = batch.teacher, self.head
        hidden = head.new_zeros(rows.numel(), head.shape[1])
        if own is None or batch.paired is None:
            if rows.numel():
                raise TeacherError("this teacher reads rows of its own, and the batch was made without them")
            return Targets(hidden.to(self.student_device), head.to(self.student_device))
        found = hidden_rows(self.vlm, own, own.pictures, torch.cat([own.response_rows, own.visual_rows]), features)
        answers, seen = found.split([own.response_rows.numel(), own.visual_rows.numel()])
        partners = batch.response_rows[batch.paired]
        asked = torch.isin(partners, rows)
        hidden = hidden.to(found.dtype).index_copy(0, torch.searchsorted(rows, partners[asked]), answers[asked])
        seen = seen.unflatten(0, (-1, sum(self.vlm.layout.visual)))  # [pictures, visual_teacher, d_teacher]
        if self._grids is not None and seen.numel():
            seen = interpolated(seen, *self._grids)
        there = self.student_device
        return Targets(hidden.to(there), head.to(there), visual=seen.to(there))


@torch.no_grad()
def hidden_rows(
    vlm: VLM, batch: forward.Rows, pictures: Tensor | None, rows: Tensor, features: Tensor | None = None
) -> Tensor:  # [rows, d_teacher]
    """Final-normed hidden states of the flat `rows`; everything on the model's device.

    Args:
        features: of the pictures, where they are known; else the model's own tower looks at `pictures`.

    Raises:
        TeacherError: the batch shows pictures, and there is neither.
    """
    with faster_linear(vlm):
        if features is None and batch.placeholder_rows.numel():
            if pictures is None:
                raise TeacherError("a batch with kept features has no pictures for another vision tower")
            features = forward.vision_features(vlm.model, vlm.layout, pictures)
        hidden = forward.hidden_states(vlm.model, vlm.layout, batch, features)  # [samples, length, d_teacher]
    return hidden.flatten(0, 1)[rows]


def require_same_meanings(ours: Mapping[int, str], theirs: Mapping[int, str]) -> None:
    """Student and teacher must give every id the same meaning; padding rows at the end may differ in number.

    Args:
        ours: `meanings` of the student.
        theirs: of the teacher.

    Raises:
        TeacherError: an id means something else; names the first.
    """
    if ours == theirs:
        return
    differing = sorted(id for id in ours.keys() | theirs.keys() if ours.get(id) != theirs.get(id))
    first = differing[0]
    raise TeacherError(
        f"teacher and student have different tokenizers: {len(differing)} ids differ, the first is {first} "
        f"(student {ours.get(first)!r}, teacher {theirs.get(first)!r}). Response and visual divergences compare "
        "probabilities id by id: choose a student of the teacher's family, set their weights to 0, or compare the two "
        "where their tokens begin at the same character (teacher: {tokens: aligned})"
    )


def meanings(vlm: VLM) -> dict[int, str]:
    """id -> token, without `<image>`, whose id is a placeholder's and may differ between the two."""
    if vlm.tokenizer is None:
        raise TeacherError("teacher and student need their tokenizers")
    return {id: token for token, id in vlm.tokenizer.get_vocab().items() if id != vlm.image_id}


def require_same_visual_tokens(teacher: VisionLayout, student: VisionLayout) -> None:
    """Raises `TeacherError` where the rows of a picture cannot be paired."""
    if teacher.visual != student.visual:
        raise TeacherError(
            f"one picture is {teacher.placeholders} tokens ({sum(teacher.visual)} visual) for the teacher and "
            f"{student.placeholders} ({sum(student.visual)} visual) for the student: the rows cannot be paired. Give "
            "both the same vision encoder, size and 'select', or set teacher: {visual: interpolate}"
        )
    if teacher.size != student.size:
        raise TeacherError(
            f"the teacher sees pictures of {teacher.size} px and the student of {student.size} px: both are fed one "
            "canvas, so set the same vision 'size', or teacher: {visual: interpolate}"
        )


def _same_tower(teacher: VLM, student: VLM) -> bool:
    """Whether the student's tower can serve the teacher: the same weights, but for rounding to the teacher's dtype."""
    if teacher.layout != student.layout:
        return False
    theirs, ours = (vlm.model.model.vision_tower for vlm in (teacher, student))
    if _architecture(theirs) != _architecture(ours):
        return False
    known = dict(ours.named_parameters())
    return all(torch.equal(known[name].detach().to(their), their.detach()) for name, their in theirs.named_parameters())


def _architecture(tower: PreTrainedModel) -> dict[str, Any]:
    facts = tower.config.to_diff_dict()
    return {name: value for name, value in facts.items() if name != "dtype"}
