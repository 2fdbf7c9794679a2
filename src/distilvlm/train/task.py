"""The one module that DDP or an engine wraps. Its own `forward` does everything that has a gradient.

Reaching into a wrapped module instead (`ddp.module.model(...)`) gives gradients that are never synchronised, without an
error. Teachers and frozen towers stand outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distilvlm.data.batch import Batch
from distilvlm.losses import Pair, Pictures, gram
from distilvlm.losses.answers import Answers, Preferences, moves
from distilvlm.losses.divergences import compared_ids
from distilvlm.losses.objective import Objective, Outcome
from distilvlm.models import forward, parts, routing
from distilvlm.models.adapters import Adapters
from distilvlm.models.alone import Alone, Encoder
from distilvlm.models.encoders import Seen
from distilvlm.models.mixture import Choice, mixtures, tallied, watched
from distilvlm.models.vlm import VLM
from distilvlm.recipe import StageSpec, TeacherSpec
from distilvlm.recipe.schedules import Ramp
from distilvlm.teachers import Targets

from .encoders import Comparison, adapters_of, rules_of

Agree = Callable[[Tensor], Tensor]
"""Sums of a micro-batch → the sums over its whole update."""


def objective_of(stage: StageSpec, teacher: TeacherSpec | None = None) -> Objective:
    """The loss terms of a stage, compared with the recipe's teacher as it can be."""
    given = stage.loss.model_dump(exclude={"schedule"})
    if teacher is not None and teacher.tokens == "aligned":
        given["divergence"] = "uld"  # no id means the same to both
    assign = teacher is not None and teacher.visual == "assignment"
    return Objective(**given, reference=frozenset(stage.reference), comparing=rules_of(stage), assign=assign)


def objective_at(objective: Objective, schedule: Mapping[str, Ramp], update: int, updates: int) -> Objective:
    """A stage's objective at `update` (0-based) of `updates`."""
    return replace(objective, **{name: ramp.at(update, updates) for name, ramp in schedule.items()})


class FrozenBaseError(RuntimeError):
    """A gradient went where none may go, or did not reach what trains."""


class Task(nn.Module):
    """Student forward to hidden states → loss terms over the rows they need → loss.

    Args:
        vlm: the student, with `requires_grad` already chosen for the stage.
        objective: the stage's loss terms, with those whose weight is 0 at some updates only; the loop sets what it is
            at each update.
        teacher_head: the teacher's output head if a term needs it and it is here, [vocab_teacher, d_teacher].
        comparison: how the student is compared with encoders, where a term does so; its adapters are with the student.
        teacher_ids: length of the teacher's vocabulary, where no head tells it; None: at least the student's.
        device: where it will run; default: where the student is.

    Raises:
        ValueError: the balance of experts is asked of a student without any.
    """

    def __init__(
        self,
        vlm: VLM | Encoder,
        objective: Objective,
        teacher_head: Tensor | None,
        comparison: Comparison | None = None,
        teacher_ids: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.student = vlm.model
        # Beside the stock model, not in it: here they are modules of what an engine wraps.
        self.adaptors = None if vlm.host is None else vlm.host.adaptors
        self.layout = vlm.layout
        self.objective = objective
        self.comparison = comparison
        # Whether the language model's layers must get their gradients in one order, whatever a batch shows.
        self.in_step = False
        if comparison is not None:
            comparison.install(self.student)
        found = adapters_of(self.student)
        self._unreached = self._never_reached(found)
        device = device or self.student.device
        routed = [mixture for mixture in mixtures(self.student) if mixture.count > 1]
        self._uncounted: Tensor | None = None  # what no picture adds to the tally of the tower's experts
        if routed and self.vision_trains:
            shape = len(routed), routed[0].count + 3
            self._uncounted = torch.zeros(shape, dtype=torch.float64, device=device)
        self.teacher_gram: Tensor | None = None
        self.student_gram: Tensor | None = None
        self._build_grams(teacher_head, teacher_ids, device)
        routers = routing.routers(self.student)
        self.top_k = {"routing": routers[0].top_k if routers else 0, "vision_routing": 1}  # experts that serve a token
        if objective.balance and not routers:
            raise ValueError(
                "loss.balance is of experts, and the student is dense: upcycle it (transform: [{do: upcycle}]), or set "
                "loss.balance to 0"
            )
        if objective.expert_balance and not routed:
            raise ValueError(
                "loss.expert_balance is of experts of the vision tower, and it has no two in a layer: mix some in "
                "(transform: [{do: mix, experts: 3}]), or set loss.expert_balance to 0"
            )
        if objective.expert_balance and not self.vision_trains:
            raise ValueError(
                "loss.expert_balance moves routers of the vision tower, of which nothing trains: add vision.router to "
                "the stage's train, or set loss.expert_balance to 0"
            )

    def _never_reached(self, adapters: Adapters | None) -> list[nn.Module]:
        """What no term of this stage gives a gradient: adapters of teachers of other stages, and routers whose choice
        is neither scaled nor balanced. As modules, since FSDP gives them other parameters."""
        found: list[nn.Module] = []
        if adapters is not None:
            compared = adapters.teachers if self.comparison is not None else ()
            found += [one for name, one in adapters.of.items() if name not in compared]
        if not self.objective.expert_balance:
            found += [one.router for one in mixtures(self.student) if one.router is not None and one.routing == "top1"]
        return found

    def _build_grams(self, teacher_head: Tensor | None, teacher_ids: int | None, device: torch.device) -> None:
        """Gram matrices of frozen heads, built once per stage (they make the relation loss cheap)."""
        if not self.objective.relation or isinstance(self.student, Alone):
            return
        student_head = forward.head_weight(self.student)
        ids = teacher_ids or student_head.shape[0] if teacher_head is None else teacher_head.shape[0]
        ours, theirs = compared_ids(self.objective.divergence, student_head.shape[0], ids)
        with torch.no_grad():
            if teacher_head is not None:
                self.teacher_gram = gram(teacher_head[:theirs].to(device))
            if not student_head.requires_grad:
                self.student_gram = gram(student_head[:ours].to(device))

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
        seen: Mapping[str, Seen] | None = None,
    ) -> dict[str, Any]:
        """Loss of one micro-batch, already divided by the samples of the whole update.

        Returns {"loss": scalar with gradient, "terms": {name: detached scalar}, "routing": `routing.tallied` of a
        sparse student, else None, "vision_routing": the same of a tower with experts}; every value is a sum over this
        micro-batch, the first two divided by `samples_in_update`, so values of micro-batches and processes simply add
        up.

        Args:
            features: of a tower that does not train.
            samples_in_update: of a preference stage, its records.
            agree: for a loss that is a function of the whole update (`Objective.agrees`).
            seen: what encoders saw in the batch's pictures, where the student is compared with them.
        """
        tallies = {} if self._uncounted is None else {"vision_routing": self._uncounted}
        idle = self._idle(batch) if self.training else None
        chosen: list[Choice] = []
        if features is None and batch.pictures is not None:
            with watched(self.student) as chosen:
                features = forward.vision_features(self.student, self.layout, batch.pictures)
        pictures = self._pictures(batch, features, seen or {}, chosen)
        if chosen and pictures is not None:
            tallies["vision_routing"] = tallied(chosen, pictures.shares(batch.weights) > 0)
        if self.objective.of_language:
            outcome = self._of_language(
                batch, features, targets, rows, samples_in_update, agree, pictures, tallies, idle
            )
        elif pictures is not None:
            outcome = self.objective.of_pictures(pictures, batch.weights, samples_in_update)
        else:
            outcome = Outcome(batch.weights.new_zeros(()), {})
        loss = outcome.loss
        if idle is not None:
            loss = loss + idle
        terms = outcome.terms if pictures is not None else {**outcome.terms, **self._unseen(loss)}
        return {"loss": loss, "terms": terms, "routing": None, "vision_routing": None, **tallies}

    def _unseen(self, loss: Tensor) -> dict[str, Tensor]:
        """The terms of pictures where there are none: every process tells of the same ones."""
        names: list[str] = []
        if self.comparison is not None:
            teachers = self.comparison.teachers
            names = ["encoder", *(f"{kind}.{name}" for name in teachers for kind in ("encoder", "encoder_weight"))]
        names += ["expert_balance"] if self.objective.expert_balance else []
        return dict.fromkeys(names, loss.new_zeros(()))

    def _pictures(
        self, batch: Batch, features: Tensor | None, seen: Mapping[str, Seen], chosen: Sequence[Choice]
    ) -> Pictures | None:
        """What the batch's pictures give to the loss, where a term asks for it."""
        if batch.owners is None or features is None or not (self.objective.encoder or chosen):
            return None
        pairs: Sequence[Pair] = ()
        if self.comparison is not None:
            pairs = self.comparison.pairs(self.student, self.layout, features, seen)
        return Pictures(batch.owners, pairs, [choice.probabilities for choice in chosen])

    def _idle(self, batch: Batch) -> Tensor | None:
        """A zero, connected to what trains and this batch does not reach. Without it DDP would wait for its gradient
        for ever, and a stage that trains nothing else would have nothing to differentiate."""
        unreached: list[nn.Module] = []
        zero: Tensor | None = None
        if batch.owners is None and not batch.has_pictures:
            if isinstance(self.student, Alone) or not self.objective.of_language:
                unreached.append(self.student.model.vision_tower)
            else:
                zero = forward.idle_projector(self.student)
            adapters = adapters_of(self.student)
            unreached += [] if adapters is None else [adapters]
        else:
            unreached += self._unreached
        sums = [p.sum() * 0.0 for module in unreached for p in module.parameters() if p.requires_grad]
        if sums:
            zero = torch.stack(sums).sum() if zero is None else zero + torch.stack(sums).sum()
        return zero

    def _of_language(
        self,
        batch: Batch,
        features: Tensor | None,
        targets: Targets | None,
        rows: Tensor,
        samples_in_update: int,
        agree: Agree,
        pictures: Pictures | None,
        tallies: dict[str, Tensor],
        idle: Tensor | None,
    ) -> Outcome:
        """The terms that the language model is run for."""
        assert not isinstance(self.student, Alone)  # the schema refuses such a term
        hidden, seen = self._hidden_states(batch, features, idle if self.in_step else None)
        owners = batch.position_owners if seen else None
        if owners is not None:
            # Neither padding, nor stand-ins and idle batches.
            tallies["routing"] = routing.tallied(seen, (owners >= 0) & (batch.weights != 0)[owners])
        return self.objective(
            student_hidden=hidden.flatten(0, 1)[rows],  # [rows, d]
            student_head=forward.head_weight(self.student),
            targets=targets,
            rows=rows,
            owners=batch.owners_of(rows),
            response_rows=batch.response_rows,
            response_targets=batch.response_targets,
            visual_rows=batch.visual_rows,
            sample_weights=batch.weights,
            samples_in_update=samples_in_update,
            student_gram=self.student_gram,
            teacher_gram=self.teacher_gram,
            router_probabilities=[layer.probabilities for layer in seen],
            position_owners=owners,
            preferences=_preferences(batch, agree) if self.objective.preference else None,
            pictures=pictures,
            paired=batch.paired,
        )

    def _hidden_states(
        self, batch: Batch, features: Tensor | None, idle: Tensor | None = None
    ) -> tuple[Tensor, list[routing.Routing]]:
        """[lines, length, d], and where a sparse student's tokens went, layer by layer."""
        assert not isinstance(self.student, Alone)
        real = None if "padding" in self.objective.reference else batch.attention_mask.flatten().bool()
        with routing.watched(self.student, real) as seen:
            return forward.hidden_states(self.student, self.layout, batch, features, idle), seen

    @torch.no_grad()
    def moves(self, batch: Batch, features: Tensor | None, rows: Tensor) -> Tensor:
        """What a micro-batch adds to the sums that `agree` gives, before anything is trained on."""
        if features is None and batch.pictures is not None:
            features = forward.vision_features(self.student, self.layout, batch.pictures)
        hidden, _ = self._hidden_states(batch, features)
        assert not isinstance(self.student, Alone)
        head = forward.head_weight(self.student)
        answers = Answers.of(
            hidden.flatten(0, 1)[rows],
            head,
            rows,
            batch.owners_of(rows),
            batch.response_rows,
            batch.response_targets,
        )
        return moves(answers.log_probabilities(batch.samples), _preferences(batch), batch.weights)


def _preferences(batch: Batch, agree: Agree = lambda local: local) -> Preferences:
    if batch.roles is None or batch.reference is None:
        keys = ", ".join(f"{key.file} row {key.row}" for key in batch.keys[:3])
        raise ValueError(f"a preference stage needs pairs or rated answers with reference log-probabilities: {keys}")
    return Preferences(batch.roles, batch.reference, agree)
