"""Divergences between two rows of log-probabilities, each with its gradient in closed form.

Every function takes `log_student` and `log_teacher`, [rows, vocab] log-probabilities that are finite (an impossible
token has a very low one, not −inf), and returns

* the divergence of each row in nats (but for `uld`), [rows];
* its gradient with respect to the student's logits behind `log_student`, [rows, vocab].

With f a function of p_S, ∂f/∂z = p_S ⊙ (f′ − ⟨p_S, f′⟩). Both arguments may be overwritten: the caller works on pieces
that fit a processor's cache and has no further use for them.

Definitions and mixing constants: `distill_loss_utils.py` of Fantasyele/LLaVA-KD @ aad2802 (the DistiLLM family). Its
`forward_kl` and `skewed_forward_kl` leave out the teacher's entropy, a constant of the student; here it is subtracted,
so that every divergence is zero when student and teacher agree.
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

JENSEN_SHANNON_MIX = 0.9
"""λ of M = (1 − λ) p_T + λ p_S: the default of the reference's `js_distance`."""

SKEW = 0.1
"""λ of the skewed divergences: the default of the reference, DistiLLM's α."""


def forward_kl(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p_T ‖ p_S) = Σ p_T (log p_T − log p_S); LLaVA-KD §2.1."""
    teacher = log_teacher.exp()
    value = _dot(teacher, log_teacher.sub_(log_student))
    return value, log_student.exp_().sub_(teacher)


def reverse_kl(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p_S ‖ p_T) = Σ p_S (log p_S − log p_T)."""
    ratio = log_teacher.neg_().add_(log_student)
    student = log_student.exp_()
    return _dot(student, ratio), _through_softmax(student, ratio)


def jensen_shannon(log_student: Tensor, log_teacher: Tensor, mix: float = JENSEN_SHANNON_MIX) -> tuple[Tensor, Tensor]:
    """λ KL(p_S ‖ M) + (1 − λ) KL(p_T ‖ M) with M = (1 − λ) p_T + λ p_S; `mix` is λ."""
    log_middle = _log_mixture(log_teacher, 1 - mix, log_student, mix)
    to_teacher = _dot(log_teacher.exp(), log_teacher.sub_(log_middle))
    ratio = log_middle.neg_().add_(log_student)
    student = log_student.exp_()
    value = mix * _dot(student, ratio) + (1 - mix) * to_teacher
    return value, _through_softmax(student, ratio).mul_(mix)


def skew_forward_kl(log_student: Tensor, log_teacher: Tensor, mix: float = SKEW) -> tuple[Tensor, Tensor]:
    """KL(p_T ‖ λ p_T + (1 − λ) p_S); `mix` is λ."""
    log_middle = _log_mixture(log_teacher, mix, log_student, 1 - mix)
    ratio = log_teacher.sub(log_middle)
    value = _dot(log_teacher.exp_(), ratio)
    return value, _through_softmax(log_student.exp_(), ratio.exp_().mul_(mix - 1))


def skew_reverse_kl(log_student: Tensor, log_teacher: Tensor, mix: float = SKEW) -> tuple[Tensor, Tensor]:
    """KL(p_S ‖ (1 − λ) p_T + λ p_S); `mix` is λ."""
    ratio = _log_mixture(log_teacher, 1 - mix, log_student, mix).neg_().add_(log_student)
    student = log_student.exp_()
    value = _dot(student, ratio)
    return value, _through_softmax(student, ratio.sub_(ratio.exp(), alpha=mix))


def uld(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Universal logit distillation: Σ_i |p_S(i) − p_T(i)| of the i-th largest probabilities, the shorter vocabulary
    filled up with zeros. It is the Wasserstein distance under a uniform cost between tokens, so it needs no common ids:
    [rows, vocab] and [rows, vocab_teacher]. Not in nats: between 0 and 2. Source: Boizard et al. 2024, arXiv 2402.12030
    §3.2."""
    student = log_student.exp_()
    order = _descending(student)
    ranked = student.gather(-1, order)
    teacher = _sorted(log_teacher.exp_())
    both = min(ranked.shape[-1], teacher.shape[-1])
    beyond = ranked[:, both:].sum(-1) + teacher[:, both:].sum(-1)  # one of the two has nothing there
    ranked[:, :both].sub_(teacher[:, :both])
    slope = torch.empty_like(student).scatter_(-1, order, ranked.sign())  # ∂/∂p_S
    return ranked[:, :both].abs().sum(-1) + beyond, _through_softmax(student, slope)


def _descending(values: Tensor) -> Tensor:
    """The order that sorts each row, largest first. On a CPU by numpy, which takes a hundredth of torch's time."""
    if _by_torch(values):
        return values.argsort(-1, descending=True)
    return torch.from_numpy(np.argsort(-values.numpy(), axis=-1))


def _sorted(values: Tensor) -> Tensor:
    """Each row sorted, largest first."""
    if _by_torch(values):
        return values.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(-values.numpy(), axis=-1)).neg_()


def _by_torch(values: Tensor) -> bool:
    return values.device.type != "cpu" or type(values) is not Tensor  # a tensor without memory, of an estimate


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "uld": uld,
}


MIXED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
}
"""The divergences from a mixture, which take its `mix`, too."""


def chosen(name: str, mix: float | None = None) -> Divergence:
    """A divergence by its name; `mix`: λ of one from a mixture, if not its default.

    Raises `ValueError` for an unknown name, and for a mix of what mixes nothing.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; known are {', '.join(DIVERGENCES)}")
    if mix is None:
        return DIVERGENCES[name]
    if name not in MIXED:
        raise ValueError(f"{name} mixes nothing: mix is of {', '.join(MIXED)}")
    return partial(MIXED[name], mix=mix)


def compared_ids(divergence: str, student: int, teacher: int) -> tuple[int, int]:
    """How many ids of each vocabulary are compared: those that both have; all where ids mean nothing to each other."""
    common = min(student, teacher)
    return (student, teacher) if divergence == "uld" else (common, common)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.vecdot(left, right)  # [rows]


def _log_mixture(log_first: Tensor, first: float, log_second: Tensor, second: float) -> Tensor:
    """log(first · p_1 + second · p_2)."""
    return torch.logaddexp(log_first + math.log(first), log_second + math.log(second))


def _through_softmax(student: Tensor, derivative: Tensor) -> Tensor:
    """p_S ⊙ (f′ − ⟨p_S, f′⟩); overwrites `derivative`."""
    return derivative.sub_(_dot(student, derivative).unsqueeze(-1)).mul_(student)
