"""The one module that DDP or an engine wraps. Its own `forward` does everything that has a gradient.

Reaching into a wrapped module instead (`ddp.module.model(...)`) gives gradients that are never synchronised, without an
error. Teachers and frozen towers stand outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distilvlm.data.batch import Batch
from distilvlm.losses import gram
from distilvlm.losses.objective import Objective
from distilvlm.models import forward
from distilvlm.models.vlm import VLM
from distilvlm.teachers import Targets


class Task(nn.Module):
    """Student forward to hidden states → loss terms over the rows they need → loss.

    Args:
        vlm: the student, with `requires_grad` already chosen for the stage.
        objective: the stage's loss terms.
        teacher_head: the teacher's output head if a term needs it, [vocab_teacher, d_teacher].
    """

    def __init__(self, vlm: VLM, objective: Objective, teacher_head: Tensor | None) -> None:
        super().__init__()
        self.student = vlm.model
        self.layout = vlm.layout
        self.objective = objective
        self.teacher_gram: Tensor | None = None
        self.student_gram: Tensor | None = None
        self._build_grams(teacher_head)

    def _build_grams(self, teacher_head: Tensor | None) -> None:
        """Gram matrices of frozen heads, built once per stage (they make the relation loss cheap)."""
        if teacher_head is None or not self.objective.relation:
            return
        student_head = forward.head_weight(self.student)
        common = min(student_head.shape[0], teacher_head.shape[0])
        with torch.no_grad():
            self.teacher_gram = gram(teacher_head[:common])
            if not student_head.requires_grad:
                self.student_gram = gram(student_head[:common])

    @property
    def vision_trains(self) -> bool:
        return any(p.requires_grad for p in self.student.model.vision_tower.parameters())

    def forward(
        self, batch: Batch, features: Tensor | None, targets: Targets | None, rows: Tensor, samples_in_update: int
    ) -> dict[str, Any]:
        """Loss of one micro-batch, already divided by the samples of the whole update.

        Returns {"loss": scalar with gradient, "terms": {name: detached scalar}}; every value is a sum over this
        micro-batch divided by `samples_in_update`, so values of micro-batches and processes simply add up.
        """
        model = self.student
        if features is None and batch.pictures is not None:
            features = forward.vision_features(model, self.layout, batch.pictures)
        hidden = forward.hidden_states(model, self.layout, batch, features)  # [samples, length, d]
        outcome = self.objective(
            student_hidden=hidden.flatten(0, 1)[rows],  # [rows, d]
            student_head=forward.head_weight(model),
            teacher_hidden=None if targets is None else targets.hidden,
            teacher_head=None if targets is None else targets.head,
            rows=rows,
            length=batch.length,
            response_rows=batch.response_rows,
            response_targets=batch.response_targets,
            visual_rows=batch.visual_rows,
            sample_weights=batch.weights,
            samples_in_update=samples_in_update,
            student_gram=self.student_gram,
            teacher_gram=self.teacher_gram,
        )
        loss = outcome.loss
        if not batch.has_pictures and self.training:
            # Without pictures the projector is not in the graph: DDP would wait for its gradient for ever, and a stage
            # that trains only the projector would have nothing to differentiate.
            loss = loss + forward.idle_projector(model)
        return {"loss": loss, "terms": outcome.terms}
