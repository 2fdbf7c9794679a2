"""Distance to vision encoders: what the weights are in the paper's form and the code's, and what does not change it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distilvlm.losses import Comparing, Objective, Pair, Pictures, comparing
from distilvlm.losses.encoder import (
    PRESETS,
    encoder_distance,
    encoder_term,
    expert_balance,
    teacher_score,
    teacher_weights,
    token_weights,
)

PICTURES, TOKENS, WIDTH = 5, 6, 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(loud: float = 1.0, anchor: bool = True, pictures: int = PICTURES) -> list[Pair]:
    """An anchor and two teachers; scores times `loud`."""
    student = drawn(pictures, TOKENS, WIDTH).requires_grad_()
    found = []
    for number, name in enumerate(["anchor", "eva", "convnext"]):
        target = drawn(pictures, TOKENS, WIDTH, seed=number + 1).requires_grad_()
        weights = drawn(pictures, TOKENS, seed=9).softmax(-1)
        score = None if number == 0 else loud * teacher_score(drawn(pictures, WIDTH, seed=7), target, scaled=True)
        found.append(Pair(name, student, target, weights, score, anchor=number == 0))
    return found if anchor else found[1:]


def of(found: list[Pair], at: list[int]) -> list[Pair]:
    """The pairs of some pictures."""
    chosen = {"student", "target", "token_weights", "score"}
    return [
        replace(pair, **{name: value[at] for name, value in vars(pair).items() if name in chosen and value is not None})
        for pair in found
    ]


def test_distance_is_the_weighted_mean_of_squares_over_channels():
    student, target = drawn(2, 3, 4), drawn(2, 3, 4, seed=1)
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    expected = [
        sum((float(weights[b, j]) + 1 / 3) * float((student[b, j] - target[b, j]).square().mean()) for j in range(3))
        for b in range(2)
    ]
    assert encoder_distance(student, target, weights).tolist() == pytest.approx(expected, rel=1e-6)
    assert encoder_distance(target, target, weights).tolist() == [0, 0]


def test_uniform_token_weights_double_the_distance():
    """Which is why a reproduction of weighting needs a control of twice the loss's weight."""
    student, target = drawn(2, 3, 4), drawn(2, 3, 4, seed=1)
    uniform = torch.full((2, 3), 1 / 3)
    torch.testing.assert_close(encoder_distance(student, target, uniform), 2 * encoder_distance(student, target))


def test_distance_is_formed_in_fp32():
    student, target = drawn(2, 3, 4).bfloat16(), drawn(2, 3, 4, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder_distance(student, target)
    assert torch.equal(found, encoder_distance(student.float(), target.float()))


def test_tokens_of_different_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match=r"the student's tokens are \[2, 3, 4\], the target's \[2, 1, 4\]"):
        encoder_distance(drawn(2, 3, 4), drawn(2, 1, 4))


def test_reference_token_weights_are_nearly_uniform_and_the_paper_s_are_not():
    """A second softmax over probabilities: no weight is more than e^(largest difference) times another."""
    attention = torch.tensor([[[0.9, 0.04, 0.01], [0.5, 0.04, 0.01]]])  # what CLS gives itself is missing
    importance = torch.tensor([[0.93, 0.055, 0.015]])
    reference = token_weights("reference", importance, attention)
    assert reference is not None
    torch.testing.assert_close(reference, torch.tensor([[0.7, 0.04, 0.01]]).softmax(-1))
    assert float(reference.max() / reference.min()) == pytest.approx(math.exp(0.69), rel=1e-5)
    assert token_weights("paper", importance, attention) is importance
    assert token_weights("none", importance) is None


def test_token_weights_without_what_they_are_made_of_are_refused():
    with pytest.raises(ValueError, match="made from attention by heads"):
        token_weights("reference", torch.ones(1, 1))
    with pytest.raises(ValueError, match="unknown token weights 'uniform': paper, reference or none"):
        token_weights("uniform", torch.ones(1, 1))


def test_a_score_is_the_mean_product_with_the_query():
    query, target = drawn(2, 4), drawn(2, 3, 4, seed=1)
    expected = [sum(float(query[b] @ target[b, j]) for j in range(3)) / 3 for b in range(2)]
    assert teacher_score(query, target, scaled=False).tolist() == pytest.approx(expected, rel=1e-5)
    assert teacher_score(query, target, scaled=True).tolist() == pytest.approx([x / 2 for x in expected], rel=1e-5)
    by_token = query.unsqueeze(1).expand(2, 3, 4)
    torch.testing.assert_close(teacher_score(by_token, target, True), teacher_score(query, target, True))


def test_the_anchor_s_share_is_fixed_and_rows_sum_to_1():
    weights = teacher_weights(torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), 0.8)
    torch.testing.assert_close(weights, torch.tensor([[0.8, 0.15, 0.05], [0.8, 0.1, 0.1]]))
    torch.testing.assert_close(teacher_weights(torch.zeros(1, 2), None), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(teacher_weights(torch.zeros(3, 0), 0.8), torch.full((3, 1), 0.8))


def test_flattening_depends_on_the_batch_and_only_the_reference_has_it():
    sure, torn = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    together = torch.cat([sure, torn])
    alone = teacher_weights(sure, None, flatten=True)
    assert float(alone[0, 0]) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3)  # at most this, of two
    assert float(teacher_weights(together, None, flatten=True)[0, 0]) > 0.99
    torch.testing.assert_close(teacher_weights(together, None)[:1], teacher_weights(sure, None))


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_of_a_picture_depend_on_its_batch_mates_only_in_reference_presets(preset: str):
    rules = comparing(preset)
    found = pairs(loud=200)  # saturated
    whole = encoder_term(found, rules)
    alone = [encoder_term(of(found, [picture]), rules) for picture in range(PICTURES)]
    same = [
        torch.allclose(whole[part], torch.cat([one[part] for one in alone]), rtol=1e-5, atol=1e-7) for part in (0, 2)
    ]
    assert same == [preset == "paper"] * 2
    torch.testing.assert_close(whole[1], torch.cat([one[1] for one in alone]))


def test_presets_differ_where_the_paper_and_the_code_do():
    assert PRESETS.keys() == {"paper", "reference-v1.0", "reference-v1.1"}
    assert PRESETS["reference-v1.0"] == PRESETS["reference-v1.1"]
    one, other = vars(PRESETS["paper"]), vars(PRESETS["reference-v1.0"])
    assert {name for name in one if one[name] != other[name]} == {"token_weights", "teacher_weights", "detach"}
    changed = comparing("paper", side="student", detach=None)
    assert changed == replace(PRESETS["paper"], side="student")
    with pytest.raises(ValueError, match=r"unknown preset 'reference-v1'; did you mean 'reference-v1\.\d'\?"):
        comparing("reference-v1")


@pytest.mark.parametrize("detach", [True, False])
def test_adapters_learn_through_the_weights_only_if_these_are_not_detached(detach: bool):
    found = pairs()
    total, distances, weights = encoder_term(found, replace(PRESETS["paper"], detach=detach))
    (gradient,) = torch.autograd.grad(total.sum(), found[1].target, retain_graph=True)
    (fixed,) = torch.autograd.grad((weights.detach() * distances).sum(), found[1].target)
    assert torch.allclose(gradient, fixed) == detach


def test_without_scores_teachers_weigh_the_same_and_weighing_by_them_is_refused():
    found = [replace(pair, score=None) for pair in pairs()]
    _, _, weights = encoder_term(found, replace(PRESETS["paper"], teacher_weights="none"))
    torch.testing.assert_close(weights, torch.tensor([[0.8, 0.1, 0.1]]).expand(PICTURES, 3))
    with pytest.raises(ValueError, match="weighed by their scores, and eva, convnext has none"):
        encoder_term(found, PRESETS["paper"])
    with pytest.raises(ValueError, match="an anchor is the first"):
        encoder_term(found[::-1], PRESETS["paper"])


def test_balance_of_uniform_routing_is_one_over_the_number_of_experts():
    uniform = torch.full((2, 4, 3), 1 / 3)
    torch.testing.assert_close(expert_balance([uniform, uniform]), torch.full((2,), 1 / 3))
    sure = torch.eye(3)[torch.tensor([[0, 1, 2]])]
    torch.testing.assert_close(expert_balance([sure]), torch.tensor([1 / 3]))
    torch.testing.assert_close(expert_balance([sure[:, :1]]), torch.tensor([1.0]))


def test_balance_pools_layers_and_only_probabilities_have_a_gradient():
    z = drawn(2, 2, 4, 3).requires_grad_()  # layers, pictures, tokens, experts
    p = z.softmax(-1)
    expected = []
    for b in range(2):
        shares = [(p[:, b].argmax(-1) == e).float().mean() for e in range(3)]
        expected.append(sum(shares[e] * p[:, b, :, e].mean() for e in range(3)))
    torch.testing.assert_close(expert_balance(p.unbind(0)), torch.stack(expected))  # type: ignore[arg-type]
    found, rule = (
        torch.autograd.grad(x.sum(), z, retain_graph=True)[0]
        for x in (expert_balance(p.unbind(0)), torch.stack(expected))  # type: ignore[arg-type]
    )
    torch.testing.assert_close(found, rule)


# As terms of a stage

OWNERS = torch.tensor([0, 0, 1, 3, 3])  # sample 2 has no picture
PROBABILITIES = [drawn(PICTURES, TOKENS + 1, 3, seed=seed).softmax(-1) for seed in (11, 12)]
WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 0.0])  # sample 3 is a stand-in


def objective(**changes: Any) -> Objective:
    return Objective(**{"text": 0, "encoder": 0.5, "expert_balance": 0.01, **changes})


def test_a_sample_is_the_mean_of_its_pictures_and_one_without_adds_0():
    found = pairs()
    outcome = objective().of_pictures(Pictures(OWNERS, found, PROBABILITIES), WEIGHTS, 4)
    each, distances, weights = encoder_term(found, PRESETS["paper"])
    balances = expert_balance(PROBABILITIES)

    def of_samples(x: Tensor) -> Tensor:
        return (x[:2].mean() + x[2]) / 4

    expected = {"encoder": of_samples(each), "expert_balance": of_samples(balances)}
    for number, name in enumerate(["anchor", "eva", "convnext"]):
        expected[f"encoder.{name}"] = of_samples(distances[:, number])
        expected[f"encoder_weight.{name}"] = of_samples(weights[:, number])
    assert outcome.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outcome.terms[name], value.detach(), msg=name)
    torch.testing.assert_close(outcome.loss, 0.5 * expected["encoder"] + 0.01 * expected["expert_balance"])


def test_micro_batches_do_not_change_the_objective():
    found = pairs(loud=200)
    whole = objective().of_pictures(Pictures(OWNERS, found, PROBABILITIES), WEIGHTS, 4).loss
    parts = []
    for samples, at in (([2, 0], [0, 1]), ([3, 1], [2, 3, 4])):
        owners = torch.tensor([samples.index(int(owner)) for owner in OWNERS[at]])
        given = Pictures(owners, of(found, at), [p[at] for p in PROBABILITIES])
        parts.append(objective().of_pictures(given, WEIGHTS[samples], 4).loss)
    torch.testing.assert_close(sum(parts), whole)
    (one,) = torch.autograd.grad(whole, found[0].student, retain_graph=True)
    (other,) = torch.autograd.grad(sum(parts), found[0].student)  # type: ignore[arg-type]
    torch.testing.assert_close(one, other)


def test_terms_of_pictures_are_added_to_those_of_language():
    rows = torch.arange(4)
    hidden, head = drawn(4, 3, seed=3), drawn(7, 3, seed=4)
    given = Pictures(OWNERS, pairs(), PROBABILITIES)
    arguments: dict[str, Any] = {"rows": rows, "owners": rows, "response_rows": rows, "response_targets": rows}
    arguments |= {"visual_rows": rows[:0], "sample_weights": WEIGHTS, "samples_in_update": 4}
    text = Objective(text=1)(hidden, head, None, **arguments)
    seen = objective().of_pictures(given, WEIGHTS, 4)
    both = objective(text=1)(hidden, head, None, **arguments, pictures=given)
    torch.testing.assert_close(both.loss, text.loss + seen.loss)
    assert both.terms == text.terms | seen.terms
    none = objective(text=1)(hidden, head, None, **arguments)  # a micro-batch without pictures
    assert torch.equal(none.loss, text.loss)


def test_what_a_stage_needs():
    assert objective().needs == {"vision.pairs", "vision.probabilities"}
    assert not objective().of_language
    assert objective(text=1, expert_balance=0).needs == {"student.hidden", "vision.pairs"}
    with pytest.raises(ValueError, match="only a tower with a mixture of several experts"):
        objective().of_pictures(Pictures(OWNERS, pairs()), WEIGHTS, 4)
    with pytest.raises(ValueError, match="at least one teacher"):
        objective().of_pictures(Pictures(OWNERS, (), PROBABILITIES), WEIGHTS, 4)


def test_rules_are_a_recipe_s_fields():
    from distilvlm.recipe import ComparisonSpec

    assert set(vars(PRESETS["paper"])) == set(ComparisonSpec.model_fields) - {"preset", "teachers", "importance"}
    assert isinstance(
        comparing(**ComparisonSpec(side="student").model_dump(exclude={"teachers", "importance"})), Comparing
    )
