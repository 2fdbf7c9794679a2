"""Objective: per-sample means, whatever the micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from distilvlm.losses import Objective, Targets, gram

LENGTH = 12
ALL = Objective(text=1.0, response=0.7, visual=0.4, relation=0.5, temperature=1.3)


@dataclass
class Sample:
    """One sequence: hidden states of every position, and its row sets as positions."""

    student: Tensor  # [LENGTH, 5]
    teacher: Tensor  # [LENGTH, 7]
    response: list[int]
    visual: list[int]
    weight: float = 1.0


@dataclass
class World:
    samples: list[Sample]
    student_head: Tensor
    teacher_head: Tensor
    token: Tensor  # [samples, LENGTH] the id that each position would have to predict

    def run(self, objective: Objective, chosen: list[int], in_update: int | None = None, grams=(None, None)):
        samples = [self.samples[index] for index in chosen]

        def flat(name: str) -> Tensor:
            rows = [i * LENGTH + p for i, sample in enumerate(samples) for p in getattr(sample, name)]
            return torch.tensor(rows, dtype=torch.long)

        response, visual = flat("response"), flat("visual")
        rows = objective.rows(response, visual)
        teacher = torch.cat([sample.teacher for sample in samples])[rows]
        return objective(
            torch.cat([sample.student for sample in samples])[rows],
            self.student_head,
            Targets(teacher, self.teacher_head) if len(objective.needs) > 1 else None,
            rows=rows,
            owners=rows // LENGTH,
            response_rows=response,
            response_targets=self.token[chosen].flatten()[response],
            visual_rows=visual,
            sample_weights=torch.tensor([sample.weight for sample in samples]),
            samples_in_update=in_update or len(chosen),
            student_gram=grams[0],
            teacher_gram=grams[1],
        )

    def reference(self, objective: Objective, index: int) -> dict[str, Tensor]:
        sample, common, tau = self.samples[index], len(self.teacher_head), objective.temperature
        zs, zt = sample.student @ self.student_head.T, sample.teacher @ self.teacher_head.T
        s, t = (zs[:, :common] / tau).log_softmax(-1), (zt / tau).log_softmax(-1)
        divergence = (t.exp() * (t - s)).sum(-1)
        zero = zs.sum() * 0
        terms = {"text": zero, "response": zero, "visual": zero, "relation": zero}
        if sample.response:
            terms["text"] = cross_entropy(zs[sample.response], self.token[index, sample.response])
            terms["response"] = divergence[sample.response].mean()
        if sample.visual:
            terms["visual"] = divergence[sample.visual].mean()
            rs, rt = zs[sample.visual, :common], zt[sample.visual]
            terms["relation"] = 1 - cosine_similarity((rs @ rs.T).flatten(), (rt @ rt.T).flatten(), dim=0)
        return {name: sample.weight * value for name, value in terms.items()}

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        leaves = [*(sample.student for sample in self.samples), self.student_head]
        got = torch.autograd.grad(loss, leaves, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(got, leaves, strict=True))


@pytest.fixture
def world() -> World:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def sample(response: list[int], visual: list[int], weight: float = 1.0) -> Sample:
        return Sample(normal(LENGTH, 5).requires_grad_(), normal(LENGTH, 7), response, visual, weight)

    return World(
        [
            sample([6, 7, 8, 10], [0, 1, 2, 3, 4, 5]),
            sample([3, 4, 5, 6, 7], [0, 1, 2, 3]),  # position 3 is in both sets, as in LLaVA-KD's captions
            sample([2, 5], []),  # text only
            sample([], [1, 2, 3, 4]),  # nothing to learn
            sample([8], [2, 3, 4, 5, 6]),
            sample([9, 10], [0, 1, 2, 3], weight=0.0),  # a stand-in
            sample([4, 5, 6], [1, 2]),
        ],
        normal(31, 5).requires_grad_(),
        normal(29, 7),
        torch.randint(0, 29, (7, LENGTH), generator=draw),
    )


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


def test_loss_terms_and_gradients_are_means_over_samples(world):
    parts = [world.reference(ALL, index) for index in range(7)]
    terms = {name: sum(part[name] for part in parts) / 7 for name in parts[0]}
    expected = sum(getattr(ALL, name) * value for name, value in terms.items())
    out = world.run(ALL, list(range(7)))
    close(out.loss, expected)
    assert out.terms.keys() == terms.keys()
    for name, value in out.terms.items():
        assert not value.requires_grad
        close(value, terms[name].detach())
    for actual, wanted in zip(world.gradients(out.loss), world.gradients(expected), strict=True):
        close(actual, wanted)


def test_micro_batches_do_not_change_the_objective(world):
    whole = world.run(ALL, list(range(7)))
    parts = [world.run(ALL, chosen, in_update=7) for chosen in ([0, 1], [2, 3], [4, 5], [6])]
    close(sum(part.loss for part in parts), whole.loss)
    for name, value in whole.terms.items():
        close(sum(part.terms[name] for part in parts), value)
    for actual, wanted in zip(
        world.gradients(sum(part.loss for part in parts)), world.gradients(whole.loss), strict=True
    ):
        close(actual, wanted)


def test_prebuilt_gram_matrices_of_frozen_heads_change_nothing(world):
    world.student_head = world.student_head.detach()
    grams = gram(world.student_head[:29]), gram(world.teacher_head)
    built, direct = world.run(ALL, [0, 1, 2], grams=grams), world.run(ALL, [0, 1, 2])
    close(built.loss, direct.loss)
    leaves = [sample.student for sample in world.samples[:3]]
    for actual, wanted in zip(*(torch.autograd.grad(x.loss, leaves) for x in (built, direct)), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("term", ["text", "response", "visual", "relation"])
def test_one_term_alone_is_its_own_mean(world, term):
    objective = Objective(**{**dict.fromkeys(("text", "response", "visual", "relation"), 0.0), term: 2.0})
    out = world.run(objective, list(range(7)))
    expected = sum(world.reference(objective, index)[term] for index in range(7)) / 7
    assert out.terms.keys() == {term}
    close(out.terms[term], expected.detach())
    close(out.loss, 2 * expected)


def test_text_alone_asks_for_no_teacher_and_no_visual_rows():
    objective = Objective()
    assert objective.needs == {"student.hidden"}
    assert objective.rows(torch.tensor([9, 4]), torch.tensor([1, 2])).tolist() == [4, 9]


def test_rows_are_the_sorted_union():
    assert ALL.needs == {"student.hidden", "teacher.responses", "teacher.visual", "teacher.relation"}
    assert ALL.rows(torch.tensor([3, 8]), torch.tensor([1, 2, 3])).tolist() == [1, 2, 3, 8]


def test_a_stand_in_counts_only_in_the_denominator(world):
    alone, with_stand_in = world.run(ALL, [0]), world.run(ALL, [0, 5])
    close(with_stand_in.loss, alone.loss / 2)
    world.samples[5].student = torch.full_like(world.samples[5].student, torch.nan, requires_grad=True)
    close(world.run(ALL, [0, 5]).loss, alone.loss / 2)


def test_nothing_to_learn_is_zero_not_nan(world):
    only_text = Objective()
    out = world.run(only_text, [3])
    assert out.loss == 0 and out.terms["text"] == 0
    assert all(not gradient.any() for gradient in world.gradients(out.loss))


def test_a_missing_teacher_is_refused(world):
    with pytest.raises(ValueError, match="compare with a teacher"):
        ALL(
            world.samples[0].student, world.student_head, None, torch.arange(LENGTH), LENGTH, torch.tensor([4]),
            torch.tensor([1]), torch.tensor([0]), torch.ones(1), 1,
        )  # fmt: skip


def test_rows_that_are_not_at_hand_are_refused(world):
    with pytest.raises(ValueError, match=r"Objective\.rows"):
        Objective()(
            world.samples[0].student[:2], world.student_head, None, torch.tensor([0, 2]), LENGTH,
            torch.tensor([1]), torch.tensor([1]), torch.tensor([0]), torch.ones(1), 1,
        )  # fmt: skip


def test_autocast_stays_close_in_every_term(world):
    """A head that trains shares its bf16 logits with the relation loss."""
    world.student_head = world.student_head.detach().float().requires_grad_()
    world.teacher_head = world.teacher_head.float()
    for sample in world.samples:
        sample.student, sample.teacher = sample.student.detach().float().requires_grad_(), sample.teacher.float()
    expected = world.run(ALL, list(range(7)))
    with torch.autocast("cpu", torch.bfloat16):
        out = world.run(ALL, list(range(7)))
    for name, value in out.terms.items():
        torch.testing.assert_close(value, expected.terms[name], atol=0, rtol=1e-2)
    for actual, wanted in zip(world.gradients(out.loss), world.gradients(expected.loss), strict=True):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() <= 2e-2 * wanted.norm()


def test_evaluation_runs_without_gradients(world):
    with torch.no_grad():
        out = world.run(ALL, list(range(7)))
    assert not out.loss.requires_grad
    close(out.loss, world.run(ALL, list(range(7))).loss.detach())
