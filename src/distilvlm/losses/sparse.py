"""A teacher's distribution of which only some probabilities are known: what is kept on disk, or comes over a network.

Student and teacher are compared over events: each known id, and all other ids together. A divergence D of the events'
probabilities q reaches the student's logits z through q: with u the logits of the events (log q, but for a constant),

    ∂D/∂z_i = ∂D/∂u_i                                  of a known id
    ∂D/∂z_i = ∂D/∂u_rest · p_S(i) / Σ_rest p_S         of all others, which the event moves together
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distilvlm.losses.divergences import Divergence

MOST = 1.01
"""Sum of a row's probabilities above which they are none; up to it, it is rounding."""


@dataclass(frozen=True)
class Sparse:
    """Distributions over the vocabulary at temperature 1, as far as they are known.

    With `tail`, what is left of 1 is the probability of all other ids together: student and teacher are compared over
    the known ids and this one more event, which is a lower bound of the divergence over all ids (of forward and reverse
    KL and their mixtures: events are made of ids). An id that is given twice counts once, and one that the student
    lacks belongs to the rest.

    Without, nothing is left: ids that were drawn from the teacher, each with its share of the draws (unbiased for
    forward KL's gradient, arXiv 2503.16870). Shares of an id that is given twice add up, and those of ids that the
    student lacks are left out, so that the others are shares of the ids that both have.

    A row of which nothing is known has a divergence of 0.
    """

    ids: Tensor  # [rows, kept] int64, -1 where a row has fewer
    log_probabilities: Tensor  # [rows, kept] fp32, nats; −inf where there is no id
    tail: bool


def require_comparable(sparse: Sparse, divergence: str, temperature: float) -> None:
    """Raises `ValueError` where a divergence of these can't be right."""
    if divergence == "uld":
        raise ValueError(
            "uld ranks the probabilities of the whole vocabulary, and of this teacher only some are known: use hidden "
            "states, or a divergence of common ids"
        )
    if temperature != 1:
        raise ValueError(
            f"only some of the teacher's probabilities are known, at temperature 1; those at {temperature:g} can't be "
            "told from them: set the temperature to 1, or compare with hidden states"
        )
    if not sparse.tail and divergence != "forward_kl":
        raise ValueError(
            f"ids drawn from a teacher can't be compared by {divergence}: only forward_kl is linear in the teacher's "
            "probabilities, and so right on average over draws. Use forward_kl, likeliest ids, or hidden states"
        )


@dataclass(frozen=True)
class Events:
    """Rows of `Sparse` as what they are compared over. Made for one call, which may overwrite them."""

    ids: Tensor  # [rows, kept] any id where there is no event
    known: Tensor  # [rows, kept] bool, whether there is an event, of an id that no other one has
    log_probabilities: Tensor  # [rows, kept + 1] the teacher's, finite; the last one is of all other ids

    @staticmethod
    def of(sparse: Sparse, compared: int, precision: torch.dtype) -> Events:
        """`compared`: the student's ids below are compared.

        Raises `ValueError` for rows whose probabilities sum to more than 1.
        """
        tiny = torch.finfo(precision).tiny
        ids = torch.where(sparse.ids < compared, sparse.ids, -1)
        ids, order = torch.where(ids < 0, compared, ids).sort(dim=-1, stable=True)  # no ids at the end
        given = sparse.log_probabilities.to(precision).gather(-1, order).exp().masked_fill(ids == compared, 0)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        place = first.cumsum(-1) - 1  # among the row's different ids
        found = torch.zeros_like(given).scatter_add_(-1, place, given.masked_fill(~first, 0) if sparse.tail else given)
        ids = torch.full_like(ids, compared).scatter_(-1, place, ids)
        known = ids < compared
        mass = found.sum(-1, keepdim=True)  # [rows, 1]
        if bool((mass > MOST).any()):
            raise ValueError(
                f"the known probabilities of a row sum to {float(mass.max()):.4g}: give log-probabilities in nats, at "
                "temperature 1"
            )
        if sparse.tail:
            rest = (1 - mass).clamp_min(0).masked_fill(known.sum(-1, keepdim=True) == compared, 0)
        else:
            found, rest = found / mass.clamp_min(tiny), (mass == 0).to(precision)
        return Events(ids.masked_fill(~known, 0), known, torch.cat([found, rest], -1).clamp_min(tiny).log())

    def __getitem__(self, rows: Tensor | slice) -> Events:
        return Events(self.ids[rows], self.known[rows], self.log_probabilities[rows])

    def compare(self, log_student: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
        """As a divergence: [rows] and, written over `log_student`, the gradient for the logits behind it.

        log_student: [rows, compared] log-probabilities.
        """
        tiny = torch.finfo(log_student.dtype).tiny
        known = log_student.gather(-1, self.ids).clamp_min_(math.log(tiny)).masked_fill_(~self.known, math.log(tiny))
        rest = log_student.exp_()
        # Adding, since an id stands where there is no event, too, perhaps that of another event.
        rest.scatter_add_(-1, self.ids, -rest.gather(-1, self.ids).mul_(self.known))
        mass = rest.sum(-1, keepdim=True).clamp_min_(tiny)  # [rows, 1], without the cancellation of 1 − Σ
        value, slope = divergence(torch.cat([known, mass.log()], -1), self.log_probabilities)
        gradient = rest.mul_(slope[:, -1:] / mass)
        return value, gradient.scatter_add_(-1, self.ids, slope[:, :-1].mul(self.known))
