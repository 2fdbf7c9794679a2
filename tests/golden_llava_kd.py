"""LLaVA-KD's golden cases (golden/llava_kd.md says what each array is).

Trainer cases go through `Objective` twice: with the case's hidden states and heads, and with the logits as hidden
states under an identity head, which turns the gradient of the hidden states into that of the logits. `utils` cases are
the reference's library of divergences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distilvlm.losses import Objective, Targets, gram, linear_distillation
from distilvlm.losses.divergences import DIVERGENCES
from distilvlm.losses.relation import relation_matrix
from tests.golden_cases import GoldenCase, near

VALUES, RELATION, GRADIENTS = 1e-5, 3e-6, 1e-6  # absolute
TERMS = {"text": "ce", "response": "kl_res", "visual": "kl_vis", "relation": "rel"}


@dataclass(frozen=True)
class Departure:
    """Where we differ from the reference on purpose: `arrays` are compared with our rule, all others as usual."""

    rule: str
    arrays: tuple[str, ...]
    visual_rows: int | None = None  # the picture's own tokens, where the case's `n_img` is not their number


LOSS = ("total", "grad_student_logits")
DEPARTURES = {
    "textonly_b2": Departure(
        "a mean per sample, then over samples; the reference weights tokens over the micro-batch",
        ("ce", "kl_res", *LOSS),
    ),
    "tiny6_mismatch": Departure(
        "the student's labels choose the response rows of both models; the reference drops the response term silently "
        "when the teacher's own mask has another number of rows",
        ("kl_res", *LOSS),
    ),
    "short_clip728": Departure(
        "visual rows are the picture's own 6 tokens; the reference's constant of 728 lets question and answer in",
        ("kl_vis", "rel", "R_student", "R_teacher", *LOSS),
        visual_rows=6,
    ),
    "b2_image_raises": Departure("two pictures in a micro-batch are the mean of both; the reference raises", ("",)),
}

UNKNOWN_DIVERGENCES = {
    # Arrays of the reference's library that are no divergence here, and what we do instead.
    "tv_distance": "total variation: no stage of any method uses it; refused with the known names",
    "symmetric_kl_raises": "cannot run in the reference either; refused with the known names",
}


def check(case: GoldenCase) -> bool:
    """Compares the case if it is one of ours; False if its arrays are of another kind."""
    if "hidden_student" in case.arrays:
        check_trainer(case)
    elif "logits_student" in case.arrays and {"forward_kl", "reverse_kl"} & case.arrays.keys():
        check_divergences(case)
    elif case.name in DEPARTURES and set(case.arrays) == {""}:
        check_two_pictures()
    else:
        return False
    return True


# Trainer cases


@dataclass(frozen=True)
class Result:
    terms: dict[str, Tensor]
    total: Tensor
    gradient_hidden: Tensor
    gradient_head: Tensor


@dataclass(frozen=True)
class TrainerCase:
    """A trainer case as a micro-batch of ours."""

    samples: int
    length: int
    response_rows: Tensor
    response_targets: Tensor
    visual_rows: Tensor
    objective: Objective = field(default_factory=lambda: Objective(1.0, 1.0, 1.0, 1.0))

    @staticmethod
    def of(labels: Tensor, pictures: int, start: int, tokens: int) -> TrainerCase:
        samples, length = labels.shape
        predicted = torch.full_like(labels, -100)
        predicted[:, :-1] = labels[:, 1:]
        rows = torch.nonzero(predicted.flatten() != -100).squeeze(1)
        visual = torch.arange(start, min(start + tokens, length)) if pictures else torch.arange(0)
        offsets = torch.arange(samples).unsqueeze(1) * length
        return TrainerCase(samples, length, rows, predicted.flatten()[rows], (offsets + visual).flatten())

    def run(self, student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, frozen: bool) -> Result:
        """Hidden states are [samples, length, d]."""
        student, student_head = student.clone().requires_grad_(), student_head.clone().requires_grad_(not frozen)
        rows = self.objective.rows(self.response_rows, self.visual_rows)
        out = self.objective(
            student.flatten(0, 1)[rows],
            student_head,
            Targets(teacher.flatten(0, 1)[rows], teacher_head),
            rows=rows,
            owners=rows // self.length,
            response_rows=self.response_rows,
            response_targets=self.response_targets,
            visual_rows=self.visual_rows,
            sample_weights=torch.ones(self.samples),
            samples_in_update=self.samples,
            student_gram=gram(student_head) if frozen else None,
            teacher_gram=gram(teacher_head),
        )
        out.loss.backward()
        assert student.grad is not None
        head_gradient = torch.zeros_like(student_head) if student_head.grad is None else student_head.grad
        return Result(out.terms, out.loss.detach(), student.grad, head_gradient)

    def rule(self, student: Tensor, teacher: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Our definition in float64 on logits [samples, length, vocab]: terms by golden names, and the gradient."""
        student, teacher = student.double().requires_grad_(), teacher.double()
        z, t = student.flatten(0, 1), teacher.flatten(0, 1)
        log_s, log_t = z.log_softmax(-1), t.log_softmax(-1)
        divergence = (log_t.exp() * (log_t - log_s)).sum(-1)
        terms = {name: z.sum() * 0 for name in TERMS.values()}
        for sample in range(self.samples):
            response = self.response_rows[self.response_rows // self.length == sample]
            targets = self.response_targets[self.response_rows // self.length == sample]
            visual = self.visual_rows[self.visual_rows // self.length == sample]
            if len(response):
                terms["ce"] = terms["ce"] + cross_entropy(z[response], targets) / self.samples
                terms["kl_res"] = terms["kl_res"] + divergence[response].mean() / self.samples
            if len(visual):
                terms["kl_vis"] = terms["kl_vis"] + divergence[visual].mean() / self.samples
                r_s, r_t = z[visual] @ z[visual].T, t[visual] @ t[visual].T
                cosine = (r_s * r_t).sum() / (r_s.norm() * r_t.norm())
                terms["rel"] = terms["rel"] + (1 - cosine) / self.samples
                terms.setdefault("R_student", r_s)
                terms.setdefault("R_teacher", r_t)
        terms["total"] = sum((terms[name] for name in TERMS.values()), torch.zeros(()))
        (gradient,) = torch.autograd.grad(terms["total"], student)
        return {name: value.detach() for name, value in terms.items()}, gradient


def check_trainer(case: GoldenCase) -> None:
    arrays, departure = case.arrays, DEPARTURES.get(case.name, Departure("none", ()))
    pictures, start, tokens = (int(arrays[name].flatten()[0]) for name in ("num_images", "image_start", "n_img"))
    this = TrainerCase.of(arrays["labels"], pictures, start, departure.visual_rows or tokens)
    heads = arrays["W_student"], arrays["W_teacher"]
    ruled, ruled_gradient = this.rule(arrays["logits_student"], arrays["logits_teacher"])

    def expected(name: str) -> Tensor:
        """The reference's array, or our rule's where we depart. A term that the reference lacks is 0 for it."""
        if name in departure.arrays:
            return ruled_gradient if name == "grad_student_logits" else ruled[name]
        return arrays.get(name, torch.zeros(()))

    for name in ("student", "teacher"):
        logits = arrays[f"hidden_{name}"] @ arrays[f"W_{name}"].T
        near(logits, arrays[f"logits_{name}"], VALUES, f"logits_{name}")
        if f"R_{name}" in arrays:
            hidden = arrays[f"hidden_{name}"].flatten(0, 1)[this.visual_rows]
            head = arrays[f"W_{name}"]
            for way, built in (("prebuilt", gram(head)), ("built in the call", None)):
                matrix = relation_matrix(hidden, head, len(head), built)
                wanted = expected(f"R_{name}").squeeze(0)
                near(matrix, wanted, VALUES * float(wanted.abs().max()), f"R_{name}, Gram matrix {way}")

    gradient = expected("grad_student_logits")
    hidden_student, hidden_teacher = arrays["hidden_student"], arrays["hidden_teacher"]
    for frozen in (True, False):
        result = this.run(hidden_student, heads[0], hidden_teacher, heads[1], frozen)
        for ours, theirs in TERMS.items():
            near(result.terms[ours], expected(theirs), RELATION if ours == "relation" else VALUES, theirs)
        near(result.total, expected("total"), VALUES, "total")
        # Sums over rows or ids: the tolerance of one entry times the size of what it is multiplied with.
        near(
            result.gradient_hidden, gradient @ heads[0].to(gradient.dtype), GRADIENTS * 10, "gradient of hidden states"
        )
        if not frozen:
            wanted = gradient.flatten(0, 1).T @ hidden_student.flatten(0, 1).to(gradient.dtype)
            near(result.gradient_head, wanted, GRADIENTS * 10, "gradient of the head")

    identity = torch.eye(len(heads[0]))
    for frozen in (True, False):
        result = this.run(arrays["logits_student"], identity, arrays["logits_teacher"], identity, frozen)
        near(result.total, expected("total"), VALUES, "total, identity head")
        near(result.gradient_hidden, gradient, GRADIENTS, "grad_student_logits")


def check_two_pictures() -> None:
    """The case holds no inputs. Ours: two samples with pictures are the mean of the two alone."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 12, 5, generator=draw), torch.randn(2, 12, 7, generator=draw)
    heads = torch.randn(17, 5, generator=draw), torch.randn(17, 7, generator=draw)
    labels = torch.randint(0, 17, (2, 12), generator=draw)
    labels[:, :9] = -100
    both = TrainerCase.of(labels, 1, 2, 6).run(student, heads[0], teacher, heads[1], frozen=False)
    parts = [
        TrainerCase.of(labels[i : i + 1], 1, 2, 6).run(
            student[i : i + 1], heads[0], teacher[i : i + 1], heads[1], False
        )
        for i in range(2)
    ]
    near(both.total, (parts[0].total + parts[1].total) / 2, VALUES, "total of two pictures")
    near(both.gradient_head, (parts[0].gradient_head + parts[1].gradient_head) / 2, GRADIENTS, "gradient of the head")


# Divergences


def teacher_entropy(log_teacher: Tensor) -> Tensor:
    """−Σ p_T log p_T per row. The reference leaves it out of its two forward divergences."""
    return -torch.special.xlogy(log_teacher.exp(), log_teacher.exp()).sum(-1)


def no_constant(log_teacher: Tensor) -> Tensor:
    return torch.zeros(log_teacher.shape[0])


# Array of the reference → our divergence, the constant of the student that the reference leaves out, masked by labels?
DEFINITIONS: dict[str, tuple[str, Callable[[Tensor], Tensor], bool]] = {
    "forward_kl": ("forward_kl", teacher_entropy, True),
    "reverse_kl": ("reverse_kl", no_constant, True),
    "js_distance": ("jensen_shannon", no_constant, True),
    "skewed_forward_kl": ("skew_forward_kl", teacher_entropy, True),
    "skewed_reverse_kl": ("skew_reverse_kl", no_constant, True),
    "reverse_kl_womask": ("reverse_kl", no_constant, False),
    "skewed_reverse_kl_womask": ("skew_reverse_kl", no_constant, False),
}


def check_divergences(case: GoldenCase) -> None:
    arrays = dict(case.arrays)
    student = arrays.pop("logits_student").flatten(0, 1)
    teacher = arrays.pop("logits_teacher").flatten(0, 1)
    labels = arrays.pop("labels").flatten()
    finite = bool(student.isfinite().all() and teacher.isfinite().all())
    for name, reference in arrays.items():
        if name in UNKNOWN_DIVERGENCES:
            with pytest.raises(ValueError, match="known are"):
                rows_through_head(student, teacher, name.removesuffix("_raises"))
            continue
        assert name in DEFINITIONS, f"{case.name}: nothing here compares array {name!r}"
        ours, left_out, masked = DEFINITIONS[name]
        rows = labels != -100 if masked else torch.ones_like(labels, dtype=torch.bool)
        value = rows_of_function(student, teacher, ours) + left_out(teacher.log_softmax(-1))
        near(value[rows].mean(), reference, VALUES, name)
        if finite:
            value = rows_through_head(student, teacher, ours) + left_out(teacher.log_softmax(-1))
            near(value[rows].mean(), reference, VALUES, f"{name} through linear_distillation")


def rows_through_head(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """The public path: logits are hidden states under an identity head."""
    identity, rows = torch.eye(student.shape[1]), student.shape[0]
    labels, none, all_rows = torch.full((rows,), -100), torch.zeros(rows), torch.ones(rows)
    out = linear_distillation(student, identity, teacher, identity, labels, none, all_rows, divergence=divergence)
    return out.divergence


def rows_of_function(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """The row function itself. The reference leaves entries with an infinite logit of either model out of its sums (a
    linear head cannot produce one); here that is a probability of 0 for both."""
    infinite = student.isinf() | teacher.isinf()
    log_student, log_teacher = (z.log_softmax(-1).masked_fill(infinite, -1e4) for z in (student, teacher))
    return DIVERGENCES[divergence](log_student, log_teacher)[0]
