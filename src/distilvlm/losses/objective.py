"""What a stage composes of its loss terms: per-sample means, averaged over the samples of an update.

    loss = Σ_i w_i (text · CE_i + response · KL_i(𝓡) + visual · KL_i(𝓥) + relation · REL_i) / samples in the update

over the samples i of weight w_i. CE_i and KL_i(𝓡) are means over the sample's response rows, KL_i(𝓥) over its visual
rows, REL_i is its relation loss. A sample that lacks a term adds 0 to it and stays in the denominator, so
micro-batches, accumulation and the number of processes do not change the objective. At one sample per micro-batch this
is LLaVA-KD's loss (specification §2.1, §6.7).

Two terms are of another kind. The balance of experts is per sample, too, over its real tokens, and summed over layers.
A preference stage has pairs (or rated answers) for samples; its loss is a function of whole answers' log-probabilities
(see preference.py), and `z0` of KTO is one number of the whole update.

What vision encoders teach, and the balance of a vision tower's experts, are means over a sample's pictures
(encoder.py); a sample without pictures adds 0. A stage of nothing else needs no language model: `of_pictures`.

A teacher of other tokens has a partner for some of the response rows only, and KL_i(𝓡) is the mean over those; one that
sees a picture as other tokens gives its visual rows apart. Of one of which only some probabilities are known, response
rows are compared over these (sparse.py).

`reference` names where LLaVA-MoD's code is to be reproduced instead (recipe/schema.py, `Departure`).
"""

# torch's stubs are partial; this room stays strict about its own code.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distilvlm.losses.answers import Answers, Preferences, Preferring
from distilvlm.losses.assignment import assigned
from distilvlm.losses.balance import balance, balance_of_samples
from distilvlm.losses.divergences import compared_ids
from distilvlm.losses.encoder import PRESETS, Comparing, Pictures, encoder_term, expert_balance
from distilvlm.losses.linear import linear_distillation
from distilvlm.losses.relation import accumulation, relation_distance, relation_matrix
from distilvlm.losses.row_order import IGNORED
from distilvlm.losses.targets import Targets


@dataclass(frozen=True)
class Outcome:
    """Loss of a micro-batch: its share of the update's loss, ready to be added up over micro-batches and processes."""

    loss: Tensor  # scalar with gradient
    terms: dict[str, Tensor]  # scalar each, detached, without the term's weight; only terms whose weight is not 0


@dataclass(frozen=True)
class Objective:
    """Weights of the terms; 0 leaves a term out. Temperature, divergence and its mix are the response and visual
    terms', what stands behind them is the preference's."""

    text: float = 1.0
    response: float = 0.0
    visual: float = 0.0
    relation: float = 0.0
    balance: float = 0.0
    encoder: float = 0.0
    expert_balance: float = 0.0
    preference: float = 0.0
    temperature: float = 1.0
    divergence: str = "forward_kl"
    mix: float | None = None
    preference_kind: str = "kto"
    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    label_smoothing: float = 0.0
    reference: frozenset[str] = frozenset()
    comparing: Comparing = field(default_factory=lambda: PRESETS["paper"])
    assign: bool = False  # which of the teacher's visual rows is whose: by the least distance (assignment.py)

    @property
    def needs(self) -> frozenset[str]:
        """What must be given to a call beside 'student.hidden': 'teacher.responses', 'teacher.visual' and
        'teacher.relation' for the terms that compare with a teacher, 'reference.logps' for preferences,
        'router.probabilities' for the balance of experts, 'vision.pairs' and 'vision.probabilities' for terms of
        pictures. A stage of pictures alone needs no 'student.hidden'."""
        found = {"student.hidden"} if self.of_language else set[str]()
        compared = {"responses": self.response, "visual": self.visual, "relation": self.relation}
        found |= {f"teacher.{name}" for name, weight in compared.items() if weight}
        if self.preference:
            found.add("reference.logps")
        if self.balance:
            found.add("router.probabilities")
        if self.encoder:
            found.add("vision.pairs")
        if self.expert_balance:
            found.add("vision.probabilities")
        return frozenset(found)

    @property
    def of_language(self) -> bool:
        """Whether a term needs the language model."""
        return bool(self.text or self.response or self.visual or self.relation or self.preference or self.balance)

    @property
    def compares(self) -> bool:
        """Whether a term compares with a teacher."""
        return bool(self.response or self.visual or self.relation)

    @property
    def preferred(self) -> Preferring:
        """The preference term."""
        own_z0 = "undetached_z0" in self.reference
        return Preferring(
            self.preference_kind, self.beta, self.desirable, self.undesirable, self.label_smoothing, own_z0
        )

    @property
    def agrees(self) -> bool:
        """Whether the loss of a micro-batch depends on all others of its update (KTO's z0)."""
        return bool(self.preference) and self.preferred.agrees

    def rows(self, response_rows: Tensor, visual_rows: Tensor) -> Tensor:
        """The flat rows whose hidden states the terms need: the sorted union, without repetition."""
        wanted = [response_rows] if self.text or self.response or self.preference else []
        if self.response and "unshifted_mask" in self.reference:
            wanted.append(response_rows + 1)
        wanted += [visual_rows] if self.visual or self.relation else []
        return torch.unique(torch.cat(wanted)) if wanted else response_rows[:0]

    def __call__(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        targets: Targets | None,
        rows: Tensor,
        owners: Tensor,
        response_rows: Tensor,
        response_targets: Tensor,
        visual_rows: Tensor,
        sample_weights: Tensor,
        samples_in_update: int,
        student_gram: Tensor | None = None,
        teacher_gram: Tensor | None = None,
        router_probabilities: Sequence[Tensor] = (),
        position_owners: Tensor | None = None,
        preferences: Preferences | None = None,
        pictures: Pictures | None = None,
        paired: Tensor | None = None,
    ) -> Outcome:
        """The loss of one micro-batch.

        student_hidden: [rows, d], final-normed hidden states of exactly the flat `rows`, which
            `self.rows(response_rows, visual_rows)` gave; `owners` [rows] is the sample of each.
        targets: the teacher's side of these rows.
        response_rows, response_targets, visual_rows: as in Batch. sample_weights: [samples], 0 for a stand-in.
        samples_in_update: samples of the whole update, over all micro-batches and processes.
        student_gram, teacher_gram: `gram(head[:common])` of heads that are frozen. Without the student's, its relation
            matrix is built along with the other terms, and the head receives the gradient if it trains.
        router_probabilities: of each sparse layer, [positions, experts]; position_owners: [positions] the sample of
            each, -1 for padding.
        preferences: for a preference stage, whose `samples_in_update` counts records.
        pictures: for the encoder term and the balance of a tower's experts; None for a micro-batch without pictures.
        paired: [responses] bool, response rows that have a partner in the teacher's; None: all.

        Raises `ValueError` when a term needs something that is not given.
        """
        if self.preference:
            if preferences is None:
                raise ValueError("the preference term needs roles and reference log-probabilities of the batch")
            answers = Answers.of(student_hidden, student_head, rows, owners, response_rows, response_targets)
            outcome = self._prefer(answers, preferences, sample_weights, samples_in_update)
        else:
            outcome = self._compare(
                student_hidden,
                student_head,
                targets,
                rows,
                owners,
                response_rows,
                response_targets,
                visual_rows,
                sample_weights,
                samples_in_update,
                student_gram,
                teacher_gram,
                paired,
            )
        if pictures is not None:
            seen = self.of_pictures(pictures, sample_weights, samples_in_update)
            outcome = Outcome(outcome.loss + seen.loss, {**outcome.terms, **seen.terms})
        if not self.balance:
            return outcome
        if position_owners is None or not router_probabilities:
            raise ValueError("the balance term needs the routers' probabilities: only a sparse student has them")
        if preferences is not None:
            sample_weights = sample_weights * (preferences.roles != 0)  # mismatched answers are not learned from
        value = self._balanced(router_probabilities, position_owners, sample_weights) / samples_in_update
        weight = self.balance * (2 if self.text and "doubled_balance" in self.reference else 1)
        return Outcome(outcome.loss + weight * value, {**outcome.terms, "balance": value.detach()})

    def of_pictures(self, pictures: Pictures, sample_weights: Tensor, samples_in_update: int) -> Outcome:
        """The terms that need pictures and no language model.

        Beside the term 'encoder' stand, for each teacher, 'encoder.NAME', its distance, and 'encoder_weight.NAME', what
        it counted; both without the term's weight.

        Raises `ValueError` when a term needs something that is not given.
        """
        shares = pictures.shares(sample_weights.float()) / samples_in_update  # [pictures]
        loss, terms = shares.new_zeros(()), dict[str, Tensor]()
        if self.encoder:
            each, distances, weights = encoder_term(pictures.pairs, self.comparing)
            value = (shares * each).sum()
            loss, terms["encoder"] = loss + self.encoder * value, value.detach()
            for pair, distance, weight in zip(pictures.pairs, distances.unbind(1), weights.unbind(1), strict=True):
                terms[f"encoder.{pair.teacher}"] = (shares * distance.detach()).sum()
                terms[f"encoder_weight.{pair.teacher}"] = (shares * weight.detach()).sum()
        if self.expert_balance:
            if not pictures.router_probabilities:
                raise ValueError(
                    "the balance of the tower's experts needs its routers' probabilities: only a tower with a mixture "
                    "of several experts has them"
                )
            value = (shares * expert_balance(pictures.router_probabilities)).sum()
            loss, terms["expert_balance"] = loss + self.expert_balance * value, value.detach()
        return Outcome(loss, terms)

    def _balanced(self, probabilities: Sequence[Tensor], owners: Tensor, weights: Tensor) -> Tensor:
        """Σ of samples and layers."""
        if "padding" not in self.reference:
            each = [balance_of_samples(p, owners, weights.numel()) for p in probabilities]  # [samples]
            return (torch.stack(each).sum(0) * weights).sum()
        # The two answers of a preference are forward passes of their own there. Samples are padded to one length.
        passes = [slice(start, None, 2) for start in (0, 1)] if self.preference else [slice(None)]
        whole: list[Tensor] = []
        for layer in probabilities:
            padded = layer.unflatten(0, (weights.numel(), -1))  # [samples, length, experts]
            for at in passes:
                positions = padded[at].flatten(0, 1)
                everything = torch.ones(len(positions), dtype=torch.bool, device=positions.device)
                whole.append(weights[at].sum() * balance(positions, everything))
        return torch.stack(whole).sum()

    def _prefer(self, answers: Answers, given: Preferences, weights: Tensor, samples_in_update: int) -> Outcome:
        logps = answers.log_probabilities(weights.numel())  # [samples] float64
        with torch.enable_grad():
            logps.requires_grad_()
            value, measures = self.preferred(logps, given, weights.double())
            value = value / samples_in_update
            (slope,) = torch.autograd.grad(self.preference * value, logps)
        value = value.detach()
        # The gradient of an answer's log-probability is that of its rows, each weighted with the loss's slope.
        loss = answers.weighted(-slope)
        loss = loss + (self.preference * value - loss.detach()).to(loss.dtype)
        terms = {"preference": value, **{name: m.detach() / samples_in_update for name, m in measures.items()}}
        return Outcome(loss, terms)

    def _compare(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        targets: Targets | None,
        rows: Tensor,
        owners: Tensor,
        response_rows: Tensor,
        response_targets: Tensor,
        visual_rows: Tensor,
        sample_weights: Tensor,
        samples_in_update: int,
        student_gram: Tensor | None,
        teacher_gram: Tensor | None,
        paired: Tensor | None,
    ) -> Outcome:
        self._require(targets, rows)
        precision = accumulation(student_hidden, student_head)
        sample_weights = sample_weights.to(precision)
        of_tokens = "token_mean" in self.reference
        answered = response_rows if self.text or self.response else response_rows[:0]
        text = _Mean.of(rows, answered, owners, sample_weights, of_tokens)
        response = text
        if self.response and "unshifted_mask" in self.reference:
            response = _Mean.of(rows, answered + 1, owners, sample_weights, of_tokens)
        elif self.response and paired is not None:
            response = _Mean.of(rows, answered[paired], owners, sample_weights, of_tokens)
        visual = _Mean.of(
            rows, visual_rows if self.visual or self.relation else visual_rows[:0], owners, sample_weights
        )

        labels = torch.full_like(rows, IGNORED)
        if self.text or self.response:
            labels[text.places] = response_targets
        targets = targets or Targets(None, None)
        ids = compared_ids(self.divergence, student_head.shape[0], targets.ids or student_head.shape[0])
        teacher_hidden, sparse = targets.hidden, targets.responses if self.response else None
        if visual.places.numel() and (targets.visual is not None or targets.responses is not None):
            # The last position of a picture may be compared as an answer's, too, and is then another row of the
            # teacher's: visual rows stand once more behind the others.
            ours = student_hidden[visual.places]
            teacher_hidden = self._behind(targets, ours, student_head, ids[0], rows.numel())
            student_hidden = torch.cat([student_hidden, ours])
            labels = torch.cat([labels, torch.full_like(visual.places, IGNORED)])
            text, response, visual = text.before(visual), response.before(visual), visual.behind()
        elif targets.responses is not None:
            teacher_hidden = None  # it is of visual rows, which no term compares
        related, related_weights = visual.samples() if self.relation else ([], [])
        given = targets.relations if self.relation else None
        matrices = None if given is None else self._matrices(given, visual)
        distilled = linear_distillation(
            student_hidden,
            student_head,
            teacher_hidden,
            targets.head,
            labels,
            text_weight=text.spread * (self.text / samples_in_update),
            divergence_weight=(response.spread * self.response + visual.spread * self.visual) / samples_in_update,
            divergence=self.divergence,
            temperature=self.temperature,
            relation_rows=related if student_gram is None else (),
            sparse=sparse,
            sparse_rows=None if sparse is None else response.places,
            teacher_ids=targets.ids,
            mix=self.mix,
        )
        loss = distilled.loss
        terms: dict[str, Tensor] = {}
        for name, weight, per_row, mean in (
            ("text", self.text, distilled.text, text),
            ("response", self.response, distilled.divergence, response),
            ("visual", self.visual, distilled.divergence, visual),
        ):
            if weight:
                # Not a matrix product: autocast would round the rows' values to bf16.
                terms[name] = (per_row * mean.spread).sum() / samples_in_update
        if self.relation:
            total = loss.new_zeros(())
            for index, (places, weight) in enumerate(zip(related, related_weights, strict=True)):
                if student_gram is None:
                    student = distilled.relations[index]
                else:
                    student = relation_matrix(student_hidden[places], student_head, ids[0], student_gram)
                with torch.no_grad():
                    if matrices is not None:
                        teacher = matrices[index]
                    else:
                        assert teacher_hidden is not None and targets.head is not None  # else it was refused
                        teacher = relation_matrix(teacher_hidden[places], targets.head, ids[1], teacher_gram)
                total = total + weight * relation_distance(student, teacher)
            total = total / samples_in_update
            loss = loss + self.relation * total
            terms["relation"] = total.detach()
        return Outcome(loss, terms)

    def _require(self, targets: Targets | None, rows: Tensor) -> None:
        """Raises `ValueError` where the teacher's side lacks what a term compares with."""
        met = frozenset[str]() if targets is None else targets.meets
        lacking = sorted(need for need in self.needs - met if need.startswith("teacher."))
        if lacking and rows.numel():
            raise ValueError(
                f"the response, visual and relation terms compare with a teacher, and {', '.join(lacking)} are not "
                "given: give its hidden states and head, or what stands for them (targets.py)"
            )
        sparse = targets is not None and targets.responses is not None
        if sparse and self.response and "unshifted_mask" in self.reference:
            raise ValueError(
                "unshifted_mask compares the rows behind the response rows, of which sparse targets know nothing"
            )

    def _behind(self, targets: Targets, ours: Tensor, student_head: Tensor, common: int, rows: int) -> Tensor | None:
        """The teacher's hidden states where its visual rows stand behind the `rows` that the student has, too.

        ours: the student's visual rows, [visual, d].
        """
        if targets.responses is not None:
            if targets.hidden is None:
                return None
            return torch.cat([targets.hidden.new_zeros(rows, targets.hidden.shape[1]), targets.hidden])
        assert targets.hidden is not None and targets.visual is not None and targets.head is not None
        theirs = self._taught(ours, student_head, targets.visual, targets.head, common)
        return torch.cat([targets.hidden, theirs.to(targets.hidden.dtype)])

    def _matrices(self, given: Sequence[Tensor], visual: _Mean) -> list[Tensor]:
        """Of the matrices of all samples with pictures, those of samples that count."""
        counts: list[int] = torch.bincount(visual.owners, minlength=visual.weights.numel()).tolist()
        weights = [weight for count, weight in zip(counts, visual.weights.tolist(), strict=True) if count]
        if len(weights) != len(given):
            raise ValueError(
                f"{len(given)} relation matrices of the teacher's, for {len(weights)} samples with pictures"
            )
        return [matrix for matrix, weight in zip(given, weights, strict=True) if weight]

    def _taught(self, ours: Tensor, student_head: Tensor, theirs: Tensor, teacher_head: Tensor, common: int) -> Tensor:
        """The teacher's row of each visual row, [visual, d_teacher]."""
        if not self.assign:
            return theirs.flatten(0, 1)
        pictures = ours.detach().view(theirs.shape[0], -1, ours.shape[1])
        chosen = [
            rows[assigned(own, student_head, rows, teacher_head, common)]
            for own, rows in zip(pictures, theirs, strict=True)
        ]
        return torch.cat(chosen)


@dataclass(frozen=True)
class _Mean:
    """A row set of a micro-batch as a weighted per-sample mean over the rows that are at hand."""

    places: Tensor  # [set] where each row of the set stands in `rows`
    owners: Tensor  # [set] its sample
    spread: Tensor  # [rows] weight of the sample / size of the sample's set; 0 outside the set
    weights: Tensor  # [samples]

    @staticmethod
    def of(rows: Tensor, members: Tensor, owners: Tensor, weights: Tensor, of_tokens: bool = False) -> _Mean:
        """`owners`: of all rows. `of_tokens`: every row of the micro-batch weighs the same, whosever it is."""
        places = torch.searchsorted(rows, members)
        at = places.clamp_max(rows.numel() - 1)  # torch.isin would sort both
        if members.numel() and not (rows.numel() and bool((rows[at] == members).all())):
            raise ValueError(
                "hidden states of some response or visual rows are missing: take the rows of Objective.rows()"
            )
        owners = owners[places]
        counts = torch.bincount(owners, minlength=weights.numel())
        spread = torch.zeros(rows.shape[0], dtype=weights.dtype, device=rows.device)
        if of_tokens:
            spread[places] = weights[owners] * weights.sum() / weights[owners].sum().clamp_min(1)
        else:
            spread[places] = weights[owners] / counts[owners]
        return _Mean(places, owners, spread, weights)

    def before(self, others: _Mean) -> _Mean:
        """The same set where the rows of another stand behind all rows once more."""
        return replace(self, spread=torch.cat([self.spread, torch.zeros_like(self.spread[others.places])]))

    def behind(self) -> _Mean:
        """The set where its rows stand behind all rows once more, and count there."""
        places = self.spread.numel() + torch.arange(self.places.numel(), device=self.places.device)
        spread = torch.cat([torch.zeros_like(self.spread), self.spread[self.places]])
        return replace(self, places=places, spread=spread)

    def samples(self) -> tuple[list[Tensor], list[float]]:
        """Places and weight of every sample that has rows in the set and a weight."""
        counts: list[int] = torch.bincount(self.owners, minlength=self.weights.numel()).tolist()
        weights: list[float] = self.weights.tolist()
        pieces = self.places[torch.argsort(self.owners, stable=True)].split(counts)
        chosen = [index for index, count in enumerate(counts) if count and weights[index]]
        return [pieces[index] for index in chosen], [weights[index] for index in chosen]
