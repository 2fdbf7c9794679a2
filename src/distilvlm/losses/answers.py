"""The preference term of a stage: losses of whole answers, through the one chunked path of the loss head.

An answer's log-probability is a sum over its rows. The loss is a function of these sums, so its slope at each answer is
known once they are, and the answer's rows then go through the head again as a text loss of that weight.
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distilvlm.losses.linear import linear_distillation
from distilvlm.losses.preference import moved, preference, rated
from distilvlm.losses.row_order import IGNORED


@dataclass(frozen=True)
class Preferences:
    """What a batch of preferences has beside its answers. A record is two samples next to each other."""

    roles: Tensor  # [samples] 1 chosen or desirable, -1 rejected or undesirable, 0 mismatched (see data/batch.py)
    reference: Tensor  # [samples] log-probability of the answer under the reference
    agree: Callable[[Tensor], Tensor] = lambda local: local  # `moves` of this micro-batch → of the whole update


@dataclass(frozen=True)
class Answers:
    """Answers of a batch. `hidden` are rows of final-normed hidden states, of which `places` predict answers."""

    hidden: Tensor  # [rows, d]
    head: Tensor  # [vocab, d]
    labels: Tensor  # [rows]
    places: Tensor  # [responses]
    owners: Tensor  # [responses] the sample of each

    @staticmethod
    def of(
        hidden: Tensor, head: Tensor, rows: Tensor, owners: Tensor, response_rows: Tensor, response_targets: Tensor
    ) -> Answers:
        """Arguments as `Objective` has them."""
        places = torch.searchsorted(rows, response_rows)
        labels = torch.full_like(rows, IGNORED)
        labels[places] = response_targets
        return Answers(hidden, head, labels, places, owners[places])

    def log_probabilities(self, samples: int) -> Tensor:
        """Of whole answers in nats, [samples] float64, without gradient."""
        with torch.no_grad():
            every = torch.ones_like(self.labels, dtype=torch.float32)
            text = linear_distillation(self.hidden, self.head, None, None, self.labels, every, every * 0).text
        sums = torch.zeros(samples, dtype=torch.float64, device=text.device)
        return sums.index_add_(0, self.owners, -text[self.places].double())

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ of each answer's −log-probability times its weight, [samples]; with gradient."""
        spread = torch.zeros_like(self.labels, dtype=weights.dtype)
        spread[self.places] = weights[self.owners]
        return linear_distillation(self.hidden, self.head, None, None, self.labels, spread, spread * 0).loss


def moves(logps: Tensor, given: Preferences, weights: Tensor) -> Tensor:
    """What z0 is made of, as sums that add up over micro-batches and processes, [3] float64: of the records' first and
    of their second log-ratio, and their number. Of rated answers, the mismatched ones are the second.

    logps, weights: [samples].
    """
    ratios, each = logps.double() - given.reference.double(), weights[::2].double()
    return torch.stack([(ratios[::2] * each).sum(), (ratios[1::2] * each).sum(), each.sum()])


@dataclass(frozen=True)
class Preferring:
    """A preference loss of records.

    own_z0: KTO's z0 is this micro-batch's and has a gradient, as in LLaVA-MoD's code.
    """

    kind: str
    beta: float
    desirable: float
    undesirable: float
    label_smoothing: float
    own_z0: bool

    @property
    def agrees(self) -> bool:
        """Whether `Preferences.agree` is asked."""
        return self.kind == "kto_unpaired" or (self.kind == "kto" and not self.own_z0)

    def __call__(self, logps: Tensor, given: Preferences, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ over records of the loss, with gradient for `logps` [samples] float64; and what is worth watching, as sums
        over records, too."""
        reference = given.reference.to(logps)
        first, second, weight = (logps - reference)[::2], (logps - reference)[1::2], weights[::2]  # [records]
        z0s: tuple[Tensor, Tensor] | None = None
        if self.agrees:
            sums = given.agree(moves(logps.detach(), given, weights))
            of_first, of_second = (sums[:2] / sums[2].clamp_min(1)).clamp_min(0)
            z0s = of_first, of_second
        elif self.kind == "kto":
            real = weight != 0
            nothing = first.sum() * 0
            z0s = (moved(first[real]), moved(second[real])) if bool(real.any()) else (nothing, nothing)
        if self.kind == "kto_unpaired":
            assert z0s is not None
            z0, good = z0s[1], given.roles[::2] == 1
            losses = rated(logps[::2], reference[::2], good, z0, self.beta, self.desirable, self.undesirable)
            right = torch.where(good, first > z0, first < z0)
            measures = {"z0": z0 * weight.sum(), "preference_accuracy": (right * weight).sum()}
            return (losses * weight).sum(), measures
        losses = preference(
            logps[::2],
            logps[1::2],
            reference[::2],
            reference[1::2],
            self.kind,
            self.beta,
            self.desirable,
            self.undesirable,
            self.label_smoothing,
            z0s,
            detach=self.agrees,
        )
        if self.kind == "kto":
            losses = losses.view(2, -1).mean(0)
        measures = {
            "chosen_reward": (self.beta * first * weight).sum(),
            "rejected_reward": (self.beta * second * weight).sum(),
            "preference_accuracy": ((first > second) * weight).sum(),
        }
        return (losses * weight).sum(), measures
