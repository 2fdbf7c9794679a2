"""LLaVA-MoD's definitions once more, in float64 and with loops over tokens: what departures are held against, and what
further golden cases are made of in tests. Nothing here calls the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gated:
    """Where tokens go in DeepSpeed's top-2 gate."""

    probabilities: Tensor  # [tokens, experts]
    weights: Tensor  # [tokens, experts] of the survivors, renormalised
    slots: Tensor  # [tokens, experts] place in the expert's queue; -1 where not routed or dropped
    counts: Tensor  # [experts] first choices, dropped ones too

    @property
    def balance(self) -> Tensor:
        """E Σ m c"""
        experts = self.probabilities.shape[1]
        return experts * (self.probabilities.mean(0) * self.counts / self.counts.sum()).sum()

    def combine(self, places: int) -> Tensor:
        """[tokens, experts, places]"""
        slots = torch.nn.functional.one_hot(self.slots.clamp_min(0), places)
        return self.weights.unsqueeze(2) * slots * (self.slots >= 0).unsqueeze(2)


def top2(logits: Tensor, noise: Tensor | None, places: int) -> Gated:
    logits = logits.double()
    tokens, experts = logits.shape
    probabilities = logits.softmax(-1)
    noisy = logits.detach() if noise is None else logits.detach() + noise.double()
    first = [int(logits[t].argmax()) for t in range(tokens)]
    second = [
        max((e for e in range(experts) if e != first[t]), key=lambda e: float(noisy[t, e])) for t in range(tokens)
    ]
    queue = [0] * experts
    slots = torch.full((tokens, experts), -1)
    for choices in (first, second):
        for t, e in enumerate(choices):
            if queue[e] < places:
                slots[t, e] = queue[e]
            queue[e] += 1
    kept = probabilities * (slots >= 0)
    weights = kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
    return Gated(probabilities, weights, slots, torch.tensor([first.count(e) for e in range(experts)]))


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x, gate, up, down = (t.double() for t in (x, gate, up, down))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def moe(x: Tensor, router: Tensor, experts: Sequence[Tensor], noise: Tensor | None, factor: float):
    """x: [..., d]; experts: gate and up [experts, inner, d], down [experts, d, inner]. The output, and `Gated`."""
    flat = x.double().flatten(0, -2)
    tokens, count = len(flat), len(router)
    gated = top2(flat @ router.double().T, noise, math.ceil(tokens / count * 2 * factor))
    outputs = torch.stack([feed_forward(flat, *(part[e] for part in experts)) for e in range(count)], 1)
    return (gated.weights.unsqueeze(2) * outputs).sum(1).view(x.shape), gated


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ of log p(label t | position t - 1), [samples]; labels [samples, length], -100 where none."""
    found = []
    for z, y in zip(logits.double(), labels, strict=True):
        terms = [z[t - 1].log_softmax(-1)[y[t]] for t in range(1, len(y)) if y[t] != -100]
        found.append(torch.stack(terms).sum() if terms else z.sum() * 0)
    return torch.stack(found)


def cross_entropy(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    """Of the teacher with the student, mean over the positions that count."""
    student, teacher = student.double(), teacher[..., : student.shape[-1]].double()
    each = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    return (each * counts).sum() / counts.sum()


def preference_losses(kind: str, c: Tensor, r: Tensor, beta: float, smoothing: float = 0.0, detach: bool = False):
    """`c`, `r`: [pairs] log-ratios of chosen and rejected answers; names of the reference."""
    if kind == "kto_pair":
        of_c, of_r = torch.relu(c.mean()), torch.relu(r.mean())
        if detach:
            of_c, of_r = of_c.detach(), of_r.detach()
        return torch.cat([1 - torch.sigmoid(beta * (c - of_r)), 1 - torch.sigmoid(beta * (of_c - r))])
    margin = beta * (c - r)
    if kind == "sigmoid":
        return (1 - smoothing) * torch.log1p(torch.exp(-margin)) + smoothing * torch.log1p(torch.exp(margin))
    if kind == "hinge":
        return torch.relu(1 - margin)
    return (c - r - 1 / (2 * beta)) ** 2
