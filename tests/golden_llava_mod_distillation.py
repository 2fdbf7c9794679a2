"""LLaVA-MoD's golden cases of mimic distillation, and of the trainer's totals."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from distilvlm.losses import Objective, Outcome, Targets, linear_distillation
from distilvlm.losses.divergences import forward_kl
from tests.golden_cases import Reading
from tests.golden_llava_kd import TrainerCase

VALUES, GRADIENTS = 1e-5, 1e-6

DEPARTURES = {
    "divergence": "the reference's loss is the cross-entropy with the teacher; ours is less by the teacher's entropy, "
    "so that it is 0 where both agree. The gradient is the same",
    "infinite": "an entry with an infinite logit adds nothing, in the reference and in the divergence of two rows; a "
    "linear head has no such logit, and the loss of one is not finite: a run stops there",
}


# Mimic distillation


def check_distillation(reading: Reading) -> None:
    modes = [name.removesuffix("loss").removesuffix(".") for name in reading.names if name.endswith("loss")]
    for mode in modes:
        student, teacher, labels = (
            _of_mode(reading, mode, name) for name in ("student_logits", "teacher_logits", "labels")
        )
        length, common = labels.shape[1], min(student.shape[-1], teacher.shape[-1])
        assert common == student.shape[-1], "the reference cuts the teacher's rows only"
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)  # [rows, vocab]
        everything = "all" in mode.split("_")
        counts = torch.ones_like(labels, dtype=torch.bool) if everything else labels != -100
        weights = counts.flatten().float() / counts.sum()
        entropy = (weights * _entropy(teacher[:, :common], student.isfinite())).sum()
        prefix = f"{mode}." if mode else ""
        if student.isinf().any():
            log_student, log_teacher = (
                z.log_softmax(-1).masked_fill(student.isinf(), -1e4) for z in (student, teacher[:, :common])
            )
            value = (weights * forward_kl(log_student, log_teacher)[0]).sum()
            reading.near(f"{prefix}loss", value + entropy, VALUES)
            assert not _through_head(student, teacher, weights)[0].isfinite(), DEPARTURES["infinite"]
            continue
        value, gradient = _through_head(student, teacher, weights)
        reading.near(f"{prefix}loss", value + entropy, VALUES)
        if (name := f"{prefix}grad_student_logits") in reading:
            reading.near(name, gradient.unflatten(0, (-1, length)), GRADIENTS)
        if not everything and (labels[:, 0] == -100).all():  # nothing predicts the first position
            value, gradient = _through_objective(student, teacher, labels)
            reading.near(f"{prefix}loss", value + entropy, VALUES)
            if name in reading:
                reading.near(name, gradient.unflatten(0, (-1, length)), GRADIENTS)
    _check_probabilities(reading)


def _of_mode(reading: Reading, mode: str, name: str) -> Tensor:
    own = f"{mode}.{name}"
    found = next(one for one in (own, f"{own}_f16", name, f"{name}_f16") if one in reading)
    array = reading.input(found)
    return array.float() if array.is_floating_point() else array


def _entropy(teacher: Tensor, counts: Tensor) -> Tensor:
    """Of rows, over the ids that count; [rows]."""
    log_teacher = teacher.double().log_softmax(-1)
    return -(log_teacher.exp() * log_teacher).masked_fill(~counts, 0).sum(-1)


def _through_head(student: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient for logits, [rows, vocab]: rows of the identity choose the columns of a head."""
    head, choose = student.T.clone().requires_grad_(), torch.eye(len(student))
    labels = torch.full((len(student),), -100)
    loss = linear_distillation(choose, head, choose, teacher.T, labels, weights * 0, weights).loss
    loss.backward()
    assert head.grad is not None
    return loss, head.grad.T


def _through_objective(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same as a stage computes it."""
    objective = Objective(text=0, response=1, reference=frozenset({"unshifted_mask", "token_mean"}))
    this = TrainerCase.of(labels, 0, 0, 0)
    rows = objective.rows(this.response_rows, this.visual_rows)
    choose, head = torch.eye(len(student))[rows], student.T.clone().requires_grad_()
    loss = loss_of(objective, this, rows, choose, head, choose, teacher.T).loss
    loss.backward()
    assert head.grad is not None
    return loss, head.grad.T


def loss_of(objective: Objective, this: TrainerCase, rows: Tensor, *models: Tensor | None, **more: object) -> Outcome:
    """`models`: hidden states of the rows and head, of the student and of the teacher."""
    weights = torch.ones(this.samples)
    student, head, *teacher = models
    return objective(
        student,  # type: ignore[arg-type]
        head,  # type: ignore[arg-type]
        Targets(*teacher),
        rows=rows,
        owners=rows // this.length,
        response_rows=this.response_rows,
        response_targets=this.response_targets,
        visual_rows=this.visual_rows,
        sample_weights=weights,
        samples_in_update=this.samples // 2 if objective.preference else this.samples,
        **more,  # type: ignore[arg-type]
    )


def _check_probabilities(reading: Reading) -> None:
    for name in reading.names:
        found = re.fullmatch(r"(teacher_probs|student_logprobs)(?:_(sum|shape|first(\d+)))?", name)
        if found is None:
            continue
        logits = _of_mode(reading, "", f"{found[1].partition('_')[0]}_logits")  # [samples, length, vocab]
        logits = logits[..., : _of_mode(reading, "", "student_logits").shape[-1]]  # the common ids
        if found[2] == "shape":
            reading.same(name, torch.tensor(logits.shape))
        elif found[2] == "sum":
            reading.near(name, logits.double().softmax(-1).sum(-1), VALUES)
        else:
            count = int(found[3] or logits.shape[-1])
            flat = logits.flatten(0, 1)
            labels = torch.arange(count).repeat(len(flat))
            rows = torch.eye(len(flat)).repeat_interleave(count, 0)
            ones = torch.ones(len(labels))
            logs = -linear_distillation(rows, flat.T, None, None, labels, ones, ones * 0).text
            logs = logs.view(*logits.shape[:2], count)
            reading.near(name, logs.exp() if found[1] == "teacher_probs" else logs, VALUES)


# The trainer's totals


def check_trainer(reading: Reading) -> None:
    hidden, head = reading.input("student_hidden"), reading.input("lm_head")
    others = reading.case.sibling(
        lambda arrays: (
            {"labels", "teacher_logits"} <= arrays.keys()
            and arrays["teacher_logits"].shape == (*hidden.shape[:2], head.shape[0])
        )
    )
    labels, teacher = others["labels"], others["teacher_logits"]
    coefficient, layers = float(reading.input("router_aux_loss_coef")), reading.input("l_aux_per_layer")
    tokens = labels.numel()
    routed = [probabilities_of(float(value), tokens) for value in layers]
    this = TrainerCase.of(labels, 0, 0, 0)
    entropy = _entropy(teacher.flatten(0, 1), torch.ones(tokens, head.shape[0], dtype=torch.bool))
    entropy = entropy[(labels != -100).flatten()].mean()
    owners = torch.arange(len(labels)).unsqueeze(1).expand_as(labels).flatten()  # the reference lets padding count

    def run(text: float, balance: float, switches: set[str]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        objective = Objective(text=text, response=1, balance=balance, reference=frozenset(switches))
        rows = objective.rows(this.response_rows, this.visual_rows)
        student_head, eye = head.clone().requires_grad_(), torch.eye(head.shape[0])
        student, taught = hidden.flatten(0, 1)[rows], teacher.flatten(0, 1)[rows]
        more = {"router_probabilities": routed if balance else (), "position_owners": owners}
        out = loss_of(objective, this, rows, student, student_head, taught, eye, **more)
        out.loss.backward()
        assert student_head.grad is not None
        return out.loss, out.terms, student_head.grad

    parity = {"unshifted_mask", "token_mean", "padding"}
    _, terms, _ = run(1.0, coefficient, parity)
    text, aux = terms["text"], coefficient * terms["balance"]
    if "plain_ce" in reading:
        reading.near("plain_ce", text, VALUES)
    none = torch.tensor(-1.0)
    for name in [name.removesuffix(".total") for name in reading.names if name.endswith(".total")]:
        sparse = float(reading.input(f"{name}.student_forward_moe_loss")) >= 0
        adds = float(reading.input(f"{name}.moe_logged")) >= 0  # moe_loss_enable
        learns_text = "only_kd" not in name
        # The model's own loss, beside which the trainer's is the second, has the balance in it whatever the flag says.
        counted = coefficient if sparse and (adds or learns_text) else 0.0
        switches = parity | ({"doubled_balance"} if adds else set())
        total, terms, gradient = run(1.0 if learns_text else 0.0, counted, switches)
        reading.near(f"{name}.total", total + entropy, VALUES)
        reading.near(f"{name}.align", terms["response"] + entropy, VALUES)
        reading.near(f"{name}.grad_lm_head", gradient, GRADIENTS)
        reading.near(f"{name}.moe_logged", aux if adds else none, VALUES)
        reading.near(f"{name}.student_forward_moe_loss", aux if sparse else none, VALUES)
        for logged in ("lm_logged", "student_forward_loss"):
            reading.near(f"{name}.{logged}", text + aux if sparse else text, VALUES)


def probabilities_of(value: float, tokens: int, experts: int = 16) -> Tensor:
    """Router probabilities whose balance is `value`, [tokens, experts]: some tokens know no favourite, which is their
    first expert, the others have their second with probability q."""
    share = (tokens // 2) / tokens
    q = (value - share) / (experts * (1 - share) ** 2)
    assert 1 / (experts - 1) <= q <= 1, f"no probabilities are made here for a balance of {value}"
    made = torch.full((tokens, experts), 1 / experts)
    made[tokens // 2 :] = (1 - q) / (experts - 2)
    made[tokens // 2 :, :2] = torch.tensor([0, q])
    made[tokens // 2 :, 0] = 0
    return made
