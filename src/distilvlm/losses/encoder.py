"""Distance of a student's visual tokens to those of several vision encoders, and the balance of a tower's experts:
MoVE-KD's losses (specification §2, §3).

    L = Σ_i W_i L_i,   L_i = Σ_j (w_j + 1/n) · mean over channels of (s_ij − t_ij)²

per picture, over teachers i and the n tokens j that are compared. w_j says where the anchor looks, W_i how much a
teacher counts: the anchor a fixed share, the others divide the rest by a softmax of how well the anchor's CLS fits
their tokens. All of it in fp32, also under autocast.

The paper's formulas and the released code differ; `PRESETS` has both.
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

FLATTENED_ABOVE = 0.8
"""The reference flattens the teachers' weights as soon as one of them has more than this, on average over a batch."""


@dataclass(frozen=True)
class Comparing:
    """How a student is compared with encoders; the fields are those of a stage's `encoder:` section."""

    token_weights: str  # paper | reference | none
    teacher_weights: str  # paper: scores / √d; reference: without √d, flattened; none: all the same
    anchor_weight: float
    detach: bool  # teachers' weights pass no gradient on to adapters
    adapter: str = "token_mixer"  # token_mixer | interpolate
    side: str = "teacher"  # whose tokens are mapped: teacher | student
    standardise: bool = False  # targets by PHI-S


_REFERENCE = Comparing(token_weights="reference", teacher_weights="reference", anchor_weight=0.8, detach=False)

PRESETS = {
    "paper": Comparing(token_weights="paper", teacher_weights="paper", anchor_weight=0.8, detach=True),
    # The two differ in their teachers only: v1.1 has SAM, too.
    "reference-v1.0": _REFERENCE,
    "reference-v1.1": _REFERENCE,
}
"""`reference-*`: what the released code computes. Its flattening is decided by the mean over a micro-batch, so that
there, and only there, micro-batches change the objective."""


def comparing(preset: str, **changes: Any) -> Comparing:
    """A preset with some of its fields changed; None changes nothing.

    Raises ValueError for an unknown preset, naming the nearest one.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"unknown preset '{preset}'{hint} Known presets: {', '.join(PRESETS)}")
    return replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True)
class Pair:
    """Student and one teacher, where they are compared."""

    teacher: str
    student: Tensor  # [pictures, N, C]
    target: Tensor  # [pictures, N, C]
    token_weights: Tensor | None = None  # [pictures, N], summing to 1; None: all tokens count alike
    score: Tensor | None = None  # [pictures], see `teacher_score`; None where teachers are not weighed by it
    anchor: bool = False


@dataclass(frozen=True)
class Pictures:
    """What the pictures of a micro-batch give to a stage's loss."""

    owners: Tensor  # [pictures] int64, the sample that shows each
    pairs: Sequence[Pair] = ()  # for the encoder term
    router_probabilities: Sequence[Tensor] = ()  # for the balance of experts: per layer [pictures, tokens, experts]

    def shares(self, sample_weights: Tensor) -> Tensor:
        """What each picture counts, [pictures]: a sample's weight, divided among its pictures."""
        counts = torch.bincount(self.owners, minlength=sample_weights.numel())
        return (sample_weights / counts.clamp_min(1))[self.owners]


def token_weights(kind: str, importance: Tensor, attention: Tensor | None = None) -> Tensor | None:
    """One weight per patch, [pictures, N], summing to 1; None for 'none'.

    Args:
        kind: 'paper': importance itself, the attention of CLS to patches alone, averaged over heads. 'reference': a
            second softmax over the mean of what was a softmax already, which is nearly uniform: no weight is more than
            e times another.
        importance: [pictures, N], summing to 1.
        attention: [pictures, heads, N], of CLS to patches, after a softmax over all keys. For 'reference' only.

    Raises:
        ValueError: an unknown kind, or 'reference' without attention.
    """
    if kind == "none":
        return None
    if kind == "paper":
        return importance.float()
    if kind != "reference":
        raise ValueError(f"unknown token weights '{kind}': paper, reference or none")
    if attention is None:
        raise ValueError("token weights 'reference' are made from attention by heads, and there is none: use 'paper'")
    return attention.float().mean(1).softmax(-1)


def teacher_score(query: Tensor, target: Tensor, scaled: bool) -> Tensor:
    """How well a teacher's tokens fit a query: the mean of ⟨q, t_j⟩ over tokens, [pictures].

    Args:
        query: [pictures, C], the anchor's CLS at the layer compared; or [pictures, N, C], one for each token.
        target: [pictures, N, C].
        scaled: divided by √C, as in the paper. Without, the softmax over teachers saturates.
    """
    _, tokens, channels = target.shape
    query = (query.unsqueeze(1) if query.dim() == 2 else query).expand_as(target)
    with torch.autocast(target.device.type, enabled=False):
        score = torch.einsum("pnc,pnc->p", query.float(), target.float()) / tokens
    return score / channels**0.5 if scaled else score


def teacher_weights(scores: Tensor, anchor_weight: float | None, flatten: bool = False) -> Tensor:
    """Weights of teachers, [pictures, teachers]; with an anchor it has the first column, and rows sum to 1.

    Args:
        scores: [pictures, teachers without the anchor], equal ones for equal weights.
        anchor_weight: the anchor's share, which the others leave to it; None: there is no anchor.
        flatten: as the reference, where a teacher has more than 0.8 on average over the pictures at hand: another
            softmax over the weights. (It adds a constant before, which does nothing.)
    """
    others = scores.float().softmax(-1)
    if flatten and others.shape[1] and bool(others.mean(0).max() > FLATTENED_ABOVE):
        others = others.softmax(-1)
    if anchor_weight is None:
        return others
    fixed = others.new_full((len(others), 1), anchor_weight)
    return torch.cat([fixed, (1 - anchor_weight) * others], dim=1)


def encoder_distance(student: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ_j (w_j + 1/n) · mean over channels of (s_j − t_j)², [pictures] fp32.

    Args:
        student, target: [pictures, N, C]. weights: [pictures, N]; None leaves w out, which about halves the value.

    Raises ValueError where the two have other shapes.
    """
    if student.shape != target.shape:
        raise ValueError(f"the student's tokens are {list(student.shape)}, the target's {list(target.shape)}")
    each = (student.float() - target.float()).square().mean(-1)  # [pictures, N]
    distance = each.mean(-1)
    return distance if weights is None else distance + (weights.float() * each).sum(-1)


def encoder_term(pairs: Sequence[Pair], rules: Comparing) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_i W_i L_i of each picture, and what it is made of.

    Args:
        pairs: the anchor, if there is one, first.

    Returns:
        [pictures] the sum, [pictures, teachers] distances L_i and weights W_i.

    Raises:
        ValueError: no pairs, the anchor not first, or scores that the teachers' weights need.
    """
    if not pairs or any(pair.anchor for pair in pairs[1:]):
        raise ValueError("the encoder term compares with at least one teacher, and an anchor is the first of them")
    distances = torch.stack([encoder_distance(pair.student, pair.target, pair.token_weights) for pair in pairs], dim=1)
    others = [pair for pair in pairs if not pair.anchor]
    if rules.teacher_weights == "none":
        scores = distances.new_zeros(len(distances), len(others))
    elif missing := [pair.teacher for pair in others if pair.score is None]:
        raise ValueError(f"teachers are weighed by their scores, and {', '.join(missing)} has none")
    else:
        found = [pair.score for pair in others if pair.score is not None]
        scores = torch.stack(found, dim=1) if found else distances.new_zeros(len(distances), 0)
    anchor_weight = rules.anchor_weight if pairs[0].anchor else None
    weights = teacher_weights(scores, anchor_weight, rules.teacher_weights == "reference")
    if rules.detach:
        weights = weights.detach()
    return (weights * distances).sum(1), distances, weights


def expert_balance(router_probabilities: Sequence[Tensor]) -> Tensor:
    """Σ_e p_e c_e of each picture, [pictures]: mean probability of an expert times its share of tokens, both over all
    layers and all tokens, CLS included, together. 1/E where probabilities are uniform.

    Shares are discrete, so the gradient flows through p alone. The released code has it, the paper not; since layers
    are pooled, a single one may be quite unbalanced.

    Args:
        router_probabilities: per layer [pictures, tokens, experts].
    """
    probabilities = torch.stack(list(router_probabilities)).float()  # [layers, pictures, tokens, experts]
    chosen = one_hot(probabilities.detach().argmax(-1), probabilities.shape[-1]).to(probabilities.dtype)
    return (probabilities.mean((0, 2)) * chosen.mean((0, 2))).sum(-1)
