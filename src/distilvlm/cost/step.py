"""One micro-batch as a run makes it, in pieces that can be watched or timed apart.

The pieces call what `train.Task`, `train.Loop` and `teachers.LocalTeacher` call, in their order and under the same
autocast, but no accelerator, and they read no value off a tensor, so that they run on tensors without memory, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distilvlm.data import Batch
from distilvlm.losses import gram
from distilvlm.losses.answers import Answers, Preferences
from distilvlm.losses.divergences import compared_ids
from distilvlm.losses.objective import Objective
from distilvlm.losses.sparse import Sparse
from distilvlm.losses.targets import Targets
from distilvlm.models import forward, routing
from distilvlm.models.routing import Routing
from distilvlm.models.vlm import VLM
from distilvlm.recipe.teachers import KeepSpec


@dataclass
class Step:
    """A student, perhaps its teacher, and a micro-batch.

    Args:
        student: its `requires_grad` chosen; in training mode where the run has it so.
        teacher: None where no teacher gives targets: a stage of text loss only, or of preferences.
        objective: the stage's loss terms.
        batch: with `features` in place of pictures, unless the tower trains. Of preferences, it may lack their
            reference: any will do.
        autocast: dtype that products run in, or None.
    """

    student: VLM
    teacher: VLM | None
    objective: Objective
    batch: Batch
    autocast: torch.dtype | None
    device: torch.device
    teacher_features: Tensor | None = None  # where the student's own are made with a graph
    kept: KeepSpec | None = None  # of a teacher whose targets are read from disk; of its model only the head is here

    def __post_init__(self) -> None:
        self.rows = self.objective.rows(self.batch.response_rows, self.batch.visual_rows)
        if self.batch.roles is not None and self.batch.reference is None:
            self.batch = replace(self.batch, reference=torch.zeros(self.batch.samples, dtype=torch.float64))
        self._real = self.batch.attention_mask.flatten().bool()  # [samples * length]

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def grams(self) -> tuple[Tensor | None, Tensor | None]:
        """Gram matrices of the frozen heads, student's and teacher's, as `Task` keeps them."""
        if self.teacher is None or not self.objective.relation:
            return None, None
        has_matrices = self.kept is not None and self.kept.visual == "relation"
        student, teacher = forward.head_weight(self.student.model), forward.head_weight(self.teacher.model)
        ours, theirs = compared_ids(self.objective.divergence, student.shape[0], teacher.shape[0])
        with torch.no_grad():
            ours_made = None if student.requires_grad else gram(student[:ours])
            return ours_made, None if has_matrices else gram(teacher[:theirs])

    def vision(self, pictures: Tensor) -> Tensor:
        with torch.no_grad(), self.cast():
            return forward.vision_features(self.student.model, self.student.layout, pictures)

    def targets(self) -> Tensor | None:
        """The teacher's hidden states of the rows, [rows, d_teacher]."""
        if self.teacher is None:
            return None
        if self.kept is not None:
            head = forward.head_weight(self.teacher.model)
            return head.new_empty(self.rows.numel(), head.shape[1])
        batch, rows = self.batch, self.rows
        if batch.teacher is not None:
            batch, rows = batch.teacher, rows % batch.teacher.input_ids.numel()  # as many, whichever they are
        elif batch.has_pictures and self.teacher.layout.placeholders != self.student.layout.placeholders:
            raise NotImplementedError(
                "the teacher reads rows of its own, and the data that they are made of is not here"
            )
        features = self.batch.features if self.teacher_features is None else self.teacher_features
        with torch.no_grad(), self.cast():
            hidden = forward.hidden_states(self.teacher.model, self.teacher.layout, batch, features)
            return hidden.flatten(0, 1)[rows]

    def hidden(self) -> tuple[Tensor, list[Routing]]:
        """The student's hidden states of all positions, [lines, length, d], and where each sparse layer sent its
        tokens; within `cast()`."""
        features, pictures = self.batch.features, self.batch.pictures
        if features is None and pictures is not None:  # the tower trains
            features = forward.vision_features(self.student.model, self.student.layout, pictures)
        with routing.watched(self.student.model, None if "padding" in self.objective.reference else self._real) as seen:
            hidden = forward.hidden_states(self.student.model, self.student.layout, self.batch, features)
        return hidden, seen

    def loss(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor | None,
        grams: tuple[Tensor | None, Tensor | None],
        seen: Sequence[Routing] = (),
    ) -> Tensor:
        """The objective of hidden states of the rows, [rows, d]; within `cast()`. `seen` as `hidden` gave it."""
        batch = self.batch
        given = None if batch.roles is None or batch.reference is None else Preferences(batch.roles, batch.reference)
        return self.objective(
            student_hidden=hidden,
            student_head=head,
            targets=self._given(targets),
            rows=self.rows,
            owners=batch.owners_of(self.rows),
            response_rows=batch.response_rows,
            response_targets=batch.response_targets,
            visual_rows=batch.visual_rows,
            sample_weights=batch.weights,
            samples_in_update=batch.samples,
            student_gram=grams[0],
            teacher_gram=grams[1],
            router_probabilities=[layer.probabilities for layer in seen],
            position_owners=batch.position_owners,
            preferences=given,
        ).loss

    def _given(self, hidden: Tensor | None) -> Targets | None:
        """The teacher's side as a run has it; values that decide on nothing are made up."""
        if self.teacher is None:
            return None
        head, batch, kept = forward.head_weight(self.teacher.model), self.batch, self.kept
        if kept is None or (kept.responses == kept.visual == "hidden"):
            return Targets(hidden, head)
        relations: tuple[Tensor, ...] | None = None
        if kept.visual == "relation":
            counts: list[int] = torch.bincount(batch.owners_of(batch.visual_rows), minlength=batch.samples).tolist()
            relations = tuple(torch.ones(count, count, device=self.device) for count in counts if count)
        if kept.responses == "hidden":
            return Targets(hidden, head, relations=relations)
        wide = min(head.shape[0], kept.top_k if kept.responses == "top_k" else kept.draws)
        ids = torch.arange(wide, device=self.device).expand(batch.response_rows.numel(), wide)
        logs = torch.full(ids.shape, -math.log(2 * wide), device=self.device)
        responses = Sparse(ids, logs, tail=kept.responses == "top_k")
        if relations is not None or hidden is None:
            return Targets(None, None, responses, relations, vocabulary=head.shape[0])
        return Targets(hidden[: batch.visual_rows.numel()], head, responses)

    def log_probabilities(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Of whole answers, [samples], of hidden states of the rows, [rows, d]: what KTO's z0 and a reference need."""
        batch = self.batch
        owners = batch.owners_of(self.rows)
        answers = Answers.of(hidden, head, self.rows, owners, batch.response_rows, batch.response_targets)
        return answers.log_probabilities(batch.samples)

    def run(self, grams: tuple[Tensor | None, Tensor | None], mark: Callable[[str], None]) -> None:
        """A whole micro-batch; `mark` is told the name of each phase before it begins."""
        mark("teacher")
        targets = self.targets()
        mark("forward")
        with self.cast():
            hidden, seen = self.hidden()
            head = forward.head_weight(self.student.model)
            loss = self.loss(hidden.flatten(0, 1)[self.rows], head, targets, grams, seen)
            del hidden
            if not self.batch.has_pictures:
                loss = loss + forward.idle_projector(self.student.model)
            if seen:
                routing.tallied(seen, self._real)
            del seen
        mark("backward")
        loss.backward()


def cut_rows(batch: Batch, share: float) -> Batch:
    """The same positions with fewer of them in the loss: the first `share` of each row set, at least one row."""

    def first(rows: Tensor) -> Tensor:
        return rows[: max(1, round(rows.numel() * share))]

    return replace(
        batch,
        response_rows=first(batch.response_rows),
        response_targets=first(batch.response_targets),
        visual_rows=first(batch.visual_rows),
    )


def features_like(batch: Batch, vlm: VLM) -> Tensor:
    """Of the shape that the model's tower gives for the batch's pictures, on the meta device."""
    pictures = 0 if batch.features is None else batch.features.shape[0]
    width: int = vlm.model.config.vision_config.hidden_size  # pyright: ignore
    return torch.empty(pictures, vlm.layout.placeholders, width, device="meta")
