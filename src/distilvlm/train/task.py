"""The one module that DDP or an engine wraps. Its own `forward` does everything that has a gradient.

Reaching into a wrapped module instead (`ddp.module.model(...)`) gives gradients that are never synchronised, without an
error. Teachers and frozen towers stand outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distilvlm.data.batch import Batch
from distilvlm.losses import gram
from distilvlm.losses.answers import Answers, Preferences, moves
from distilvlm.losses.objective import Objective
from distilvlm.models import forward, parts, routing
from distilvlm.models.vlm import VLM
from distilvlm.recipe import StageSpec
from distilvlm.teachers import Targets

Agree = Callable[[Tensor], Tensor]
"""Sums of a micro-batch → the sums over its whole update."""


def objective_of(stage: StageSpec) -> Objective:
    """The loss terms of a stage."""
    return Objective(**stage.loss.model_dump(), reference=frozenset(stage.reference))


class FrozenBaseError(RuntimeError):
    """A gradient went where none may go, or did not reach what trains."""


class Task(nn.Module):
    """Student forward to hidden states → loss terms over the rows they need → loss.

    Args:
        vlm: the student, with `requires_grad` already chosen for the stage.
        objective: the stage's loss terms.
        teacher_head: the teacher's output head if a term needs it, [vocab_teacher, d_teacher].

    Raises:
        ValueError: the balance of experts is asked of a dense student.
    """

    def __init__(self, vlm: VLM, objective: Objective, teacher_head: Tensor | None) -> None:
        super().__init__()
        self.student = vlm.model
        # Beside the stock model, not in it: here they are modules of what an engine wraps.
        self.adaptors = None if vlm.host is None else vlm.host.adaptors
        self.layout = vlm.layout
        self.objective = objective
        self.teacher_gram: Tensor | None = None
        self.student_gram: Tensor | None = None
        self._build_grams(teacher_head)
        routers = routing.routers(self.student)
        self.top_k = routers[0].top_k if routers else 0  # experts per token; 0: a dense student
        if objective.balance and not routers:
            raise ValueError(
                "loss.balance is of experts, and the student is dense: upcycle it (transform: [{do: upcycle}]), or set "
                "loss.balance to 0"
            )

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

    def require_frozen_base(self) -> None:
        """Of a student with adaptors, what trains has a gradient, and nothing else has one; asked behind a backward.

        Raises:
            FrozenBaseError: it is not so.
        """
        if self.adaptors is None:
            return
        wrong = {
            f"{name} {'has no gradient' if parameter.requires_grad else 'is frozen and has a gradient'}"
            for name, parameter in parts.named(self.student).items()
            if parameter.requires_grad is (parameter.grad is None)
        }
        if wrong:
            raise FrozenBaseError(
                f"an adaptor trains beside a base that stays as it is, but {len(wrong)} parameters say otherwise: "
                f"{'; '.join(sorted(wrong)[:3])}. The update was not made"
            )

    @property
    def vision_trains(self) -> bool:
        return any(p.requires_grad for p in self.student.model.vision_tower.parameters())

    def forward(
        self,
        batch: Batch,
        features: Tensor | None,
        targets: Targets | None,
        rows: Tensor,
        samples_in_update: int,
        agree: Agree = lambda local: local,
    ) -> dict[str, Any]:
        """Loss of one micro-batch, already divided by the samples of the whole update.

        Returns {"loss": scalar with gradient, "terms": {name: detached scalar}, "routing": `routing.tallied` of a
        sparse student, else None}; every value is a sum over this micro-batch, the first two divided by
        `samples_in_update`, so values of micro-batches and processes simply add up.

        Args:
            samples_in_update: of a preference stage, its records.
            agree: for a loss that is a function of the whole update (`Objective.agrees`).
        """
        model = self.student
        if features is None and batch.pictures is not None:
            features = forward.vision_features(model, self.layout, batch.pictures)
        hidden, seen = self._hidden_states(batch, features)
        real = batch.attention_mask.flatten().bool()  # [samples * length]
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
            router_probabilities=[layer.probabilities for layer in seen],
            attention_mask=batch.attention_mask,
            preferences=_preferences(batch, agree) if self.objective.preference else None,
        )
        loss = outcome.loss
        if not batch.has_pictures and self.training:
            # Without pictures the projector is not in the graph: DDP would wait for its gradient for ever, and a stage
            # that trains only the projector would have nothing to differentiate.
            loss = loss + forward.idle_projector(model)
        counted = real & (batch.weights != 0).repeat_interleave(batch.length)  # neither stand-ins nor idle batches
        return {"loss": loss, "terms": outcome.terms, "routing": routing.tallied(seen, counted) if seen else None}

    def _hidden_states(self, batch: Batch, features: Tensor | None) -> tuple[Tensor, list[routing.Routing]]:
        """[samples, length, d], and where a sparse student's tokens went, layer by layer."""
        real = None if "padding" in self.objective.reference else batch.attention_mask.flatten().bool()
        with routing.watched(self.student, real) as seen:
            return forward.hidden_states(self.student, self.layout, batch, features), seen

    @torch.no_grad()
    def moves(self, batch: Batch, features: Tensor | None, rows: Tensor) -> Tensor:
        """What a micro-batch adds to the sums that `agree` gives, before anything is trained on."""
        if features is None and batch.pictures is not None:
            features = forward.vision_features(self.student, self.layout, batch.pictures)
        hidden, _ = self._hidden_states(batch, features)
        head = forward.head_weight(self.student)
        answers = Answers.of(
            hidden.flatten(0, 1)[rows], head, rows, batch.length, batch.response_rows, batch.response_targets
        )
        return moves(answers.log_probabilities(batch.samples), _preferences(batch), batch.weights)


def _preferences(batch: Batch, agree: Agree = lambda local: local) -> Preferences:
    if batch.roles is None or batch.reference is None:
        keys = ", ".join(f"{key.file} row {key.row}" for key in batch.keys[:3])
        raise ValueError(f"a preference stage needs pairs or rated answers with reference log-probabilities: {keys}")
    return Preferences(batch.roles, batch.reference, agree)
