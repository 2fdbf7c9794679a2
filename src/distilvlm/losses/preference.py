"""Preference losses of answers' log-probabilities, with a reference that may be another, stronger model (the teacher).

With c and r the log-ratios log π(y|x) − log π_ref(y|x) of the chosen and the rejected answer (sums over the answer's
tokens), σ the logistic function and z₀ = max(0, mean log-ratio), which measures how far the policy has moved:

    kto     λ_D (1 − σ(β (c − z₀ of the rejected)))  and  λ_U (1 − σ(β (z₀ of the chosen − r))): LLaVA-MoD's paired form
    dpo     −(1 − ε) log σ(β (c − r)) − ε log σ(β (r − c)), ε the label smoothing
    ipo     (c − r − 1/2β)²
    hinge   max(0, 1 − β (c − r))

Sources: LLaVA-MoD `dpo_trainer.py` (specification §2.4); KTO, arXiv 2402.01306; DPO, 2305.18290; IPO, 2310.12036. KTO's
paper stops the gradient of z₀; the reference code does not, which `detach=False` reproduces.
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PAIRED = ("kto", "dpo", "ipo", "hinge")
"""Losses of a chosen and a rejected answer to the same question."""


def preference(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    kind: str = "kto",
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    label_smoothing: float = 0.0,
    z0: tuple[Tensor, Tensor] | None = None,
    detach: bool = True,
) -> Tensor:
    """Losses of pairs from the log-probabilities of their answers, [pairs] each, in nats.

    Returns [pairs], and for "kto" [2 · pairs]: first the chosen answers as desirable ones, then the rejected ones as
    undesirable; the reference's loss is the mean of what is returned.

    desirable, undesirable: λ_D and λ_U of "kto".
    label_smoothing: share of pairs that are believed to be the wrong way round ("dpo").
    z0: (of the chosen, of the rejected), scalars, where they are estimated over more than these pairs; default: over
        these.
    detach: whether z₀ is a constant.

    Raises `ValueError` for an unknown kind, or numbers of pairs that differ.
    """
    if kind not in PAIRED:
        known = ", ".join(PAIRED)
        raise ValueError(f"unknown kind of preference {kind!r}; known are {known}, and `rated` for single answers")
    shapes = {tuple(x.shape) for x in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)}
    if len(shapes) > 1:
        raise ValueError(f"a pair needs four log-probabilities, but the tensors have shapes {sorted(shapes)}")
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    if kind == "kto":
        of_chosen, of_rejected = z0 if z0 is not None else (moved(chosen), moved(rejected))
        if detach:
            of_chosen, of_rejected = of_chosen.detach(), of_rejected.detach()
        better = desirable * (1 - torch.sigmoid(beta * (chosen - of_rejected)))
        worse = undesirable * (1 - torch.sigmoid(beta * (of_chosen - rejected)))
        return torch.cat([better, worse])
    margin = chosen - rejected
    if kind == "dpo":
        right = -logsigmoid(beta * margin)
        return (1 - label_smoothing) * right - label_smoothing * logsigmoid(-beta * margin)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)).square()
    return torch.relu(1 - beta * margin)


def rated(
    policy: Tensor,
    reference: Tensor,
    is_desirable: Tensor,
    z0: Tensor,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Tensor:
    """KTO of single answers, [answers]: λ_D (1 − σ(β (x − z₀))) or λ_U (1 − σ(β (z₀ − x))), x the answer's log-ratio.

    policy, reference: [answers] log-probabilities in nats; is_desirable: [answers] bool.
    z0: scalar, `moved` of answers that belong to other questions (KTO §4.1); never has a gradient here.
    """
    distance = torch.where(is_desirable, policy - reference - z0.detach(), z0.detach() - policy + reference)
    weight = torch.where(is_desirable, desirable, undesirable).to(distance.dtype)
    return weight * (1 - torch.sigmoid(beta * distance))


def moved(log_ratios: Tensor) -> Tensor:
    """z₀: the mean log-ratio, at least 0: an estimate of KL(policy ‖ reference), which is never negative."""
    return log_ratios.mean().clamp_min(0)
