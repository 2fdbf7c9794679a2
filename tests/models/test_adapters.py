"""Adapters between a student and encoders that teach it, and one step with every kind of student and teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distilvlm.losses import Moments, Objective, Pictures, comparing
from distilvlm.losses.encoder import teacher_score, token_weights
from distilvlm.models.adapters import Adapters, Interpolation, TokenMixer, Tokens
from distilvlm.models.encoders import frozen_copy, query_of
from distilvlm.models.mixture import MixConfig, mix, watched
from distilvlm.models.towers import HALF, layout_of

from .encoder_models import canvases, encoder
from .test_tower_mixture import states, tower_of

STUDENT = Tokens(8, (3, 3))
TEACHERS = {"anchor": STUDENT, "eva": Tokens(5, (4, 4)), "convnext": Tokens(12, (2, 2))}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(pictures: int = 2) -> dict[str, Any]:
    return {
        "student": drawn(pictures, 9, 8),
        "targets": {name: drawn(pictures, t.count, t.channels, seed=1) for name, t in TEACHERS.items()},
        "weights": drawn(pictures, 9, seed=2).softmax(-1),
        "query": drawn(pictures, 8, seed=3),
    }


def adapters(**rules: Any) -> Adapters:
    return Adapters(STUDENT, TEACHERS, comparing("paper", **rules))


@pytest.mark.parametrize("adapter", ["token_mixer", "interpolate"])
def test_on_the_teacher_s_side_the_student_stays_as_it_is(adapter: str):
    shown = given()
    anchor, *others = adapters(adapter=adapter)(**shown)
    assert torch.equal(anchor.target, shown["targets"]["anchor"])
    assert anchor.anchor and anchor.score is None
    for pair in others:
        assert torch.equal(pair.student, shown["student"])
        assert pair.target.shape == shown["student"].shape
        assert pair.score is not None
        torch.testing.assert_close(pair.score, teacher_score(shown["query"], pair.target, scaled=True))
    for pair in (anchor, *others):
        assert pair.token_weights is not None
        assert torch.equal(pair.token_weights, shown["weights"])


@pytest.mark.parametrize("adapter", ["token_mixer", "interpolate"])
def test_on_the_student_s_side_the_target_stays_as_it_is(adapter: str):
    shown = given()
    anchor, *others = adapters(adapter=adapter, side="student")(**shown)
    assert torch.equal(anchor.student, shown["student"])
    for pair in others:
        assert torch.equal(pair.target, shown["targets"][pair.teacher])
        assert pair.student.shape == pair.target.shape
        assert pair.score is not None and pair.score.shape == (2,)
        assert pair.token_weights is not None  # on the teacher's grid
        assert pair.token_weights.shape == pair.target.shape[:2]
        torch.testing.assert_close(pair.token_weights.sum(1), torch.ones(2))


def test_the_score_on_the_student_s_side_is_high_where_the_mapped_query_is_the_target():
    built = adapters(side="student")
    shown = given()
    mapped = built.of["eva"](shown["query"].unsqueeze(1).expand(-1, 9, -1)).detach()
    for sign in (1, -1):
        shown["targets"]["eva"] = sign * mapped
        score = {pair.teacher: pair.score for pair in built(**shown)}["eva"]
        assert score is not None
        expected = sign * mapped.square().sum(-1).mean(-1) / 5**0.5
        torch.testing.assert_close(score, expected)


def test_scores_pass_no_gradient_on_unless_asked():
    for detach in (True, False):
        pair = adapters(detach=detach)(**given())[1]
        assert pair.score is not None
        assert pair.score.requires_grad != detach


def test_interpolation_brings_a_constant_to_itself_and_keeps_places():
    """Whatever the grids, and row stays row."""
    for source, target in (((4, 4), (2, 2)), ((2, 2), (4, 4)), ((4, 2), (3, 3))):
        built = Interpolation(Tokens(4, source), Tokens(6, target))
        constant = drawn(1, 1, 4).expand(1, source[0] * source[1], 4)
        found = built(constant)
        torch.testing.assert_close(found, found[:, :1].expand_as(found))
    built = Interpolation(Tokens(4, (4, 4)), Tokens(4, (2, 2)))
    upper = torch.zeros(1, 4, 4, 4)
    upper[:, :2] = drawn(4)
    found = built(upper.flatten(1, 2))[0]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
    assert not torch.allclose(found[0], found[2])


def test_a_token_mixer_maps_channels_then_tokens():
    built = TokenMixer(Tokens(3, (2, 2)), Tokens(5, (1, 3)))
    tokens = drawn(2, 4, 3)
    inside = torch.nn.functional.gelu(tokens @ built.channels.weight.T + built.channels.bias)
    expected = torch.einsum("pnc,mn->pmc", inside, built.tokens.weight) + built.tokens.bias[:, None]
    torch.testing.assert_close(built(tokens), expected)


def test_standardised_targets_are_of_one_scale_and_the_anchor_is_compared_with_itself_still():
    built = Adapters(STUDENT, TEACHERS, comparing("paper", side="student", standardise=True))
    shown = given(pictures=40)
    shown["targets"]["eva"] = 100 * shown["targets"]["eva"] + 7
    assert built(**shown)[1].target.isnan().all()  # not stated yet
    for name, target in shown["targets"].items():
        moments = Moments()
        moments.add(target)
        built.standardise(name, moments.standardisation())
    for pair in built(**shown):
        torch.testing.assert_close(pair.target.var((0, 1)), torch.ones(pair.target.shape[2]), atol=0.02, rtol=0)
    shown["student"] = shown["targets"]["anchor"]
    anchor = built(**shown)[0]
    assert torch.equal(anchor.student, anchor.target)
    again = Adapters(STUDENT, TEACHERS, comparing("paper", side="student", standardise=True), seed=1)
    again.load_state_dict(built.state_dict())
    assert torch.equal(again(**shown)[1].target, built(**shown)[1].target)


def test_adapters_are_drawn_each_on_its_own():
    one, other = adapters(), Adapters(STUDENT, {"eva": TEACHERS["eva"]}, comparing("paper"))
    assert torch.equal(one.of["eva"].channels.weight, other.of["eva"].channels.weight)  # type: ignore[union-attr]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the anchor has 16 tokens of 5 channels, the student 9 of 8"):
        Adapters(STUDENT, {"anchor": TEACHERS["eva"]}, comparing("paper"))
    with pytest.raises(ValueError, match="unknown adapter 'mlp': token_mixer, interpolate"):
        adapters(adapter="mlp")
    with pytest.raises(ValueError, match="on the side of the teacher or the student, not 'both'"):
        adapters(side="both")
    shown = given()
    with pytest.raises(ValueError, match="no features of convnext are given"):
        adapters()(**shown | {"targets": {name: shown["targets"][name] for name in ("anchor", "eva")}})
    with pytest.raises(ValueError, match="which need a query"):
        adapters()(**shown | {"query": None})
    with pytest.raises(ValueError, match="is 5 wide, the student's tokens are 8"):
        adapters()(**shown | {"query": drawn(2, 5)})
    assert adapters(teacher_weights="none")(**shown | {"query": None})[1].score is None


@pytest.mark.parametrize("preset", ["paper", "reference-v1.0"])
@pytest.mark.parametrize("teacher", ["dinov2", "convnext", "sam"])
@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2"])
def test_a_step_brings_any_student_nearer_to_any_teacher(family: str, teacher: str, preset: str):
    """A ViT, a CNN and SAM. SigLIP has no CLS to ask or to weigh tokens by: its pooling head stands in."""
    tower = tower_of(family)
    layout = layout_of(tower.config, -2, "patches", HALF)
    rules = comparing(preset)
    shown = canvases(2, side=64)
    anchor, other = frozen_copy(tower, layout), encoder(teacher)
    looked = anchor.see(anchor.pixels(shown), importance=True)
    assert looked.importance is not None
    weights = token_weights(rules.token_weights, looked.importance, looked.attention)
    forms = {"anchor": Tokens(anchor.channels, anchor.grid), teacher: Tokens(other.channels, other.grid)}
    targets = {"anchor": looked.tokens, teacher: other.see(other.pixels(shown)).tokens}
    built = Adapters(forms["anchor"], forms, rules)
    mix(tower, MixConfig(rank=4, start="zero" if preset == "paper" else "kaiming"), layout.layer)
    objective = Objective(text=0, encoder=0.5, expert_balance=0.01, comparing=rules)
    optimiser = torch.optim.SGD([*tower.parameters(), *built.parameters()], lr=1e-4)
    losses: list[float] = []
    for _ in range(2):
        with watched(tower) as choices:
            read = states(tower, anchor.pixels(shown))[layout.layer][:, -anchor.tokens :]
        pairs = built(read, targets, weights, query=query_of(looked))
        pictures = Pictures(torch.arange(2), pairs, [choice.probabilities for choice in choices])
        outcome = objective.of_pictures(pictures, torch.ones(2), 2)
        if not losses:  # with B of zero the student is its own anchor still
            assert (float(outcome.terms["encoder.anchor"]) < 1e-10) == (preset == "paper")
        losses.append(float(outcome.loss.detach()))
        optimiser.zero_grad()
        outcome.loss.backward()
        optimiser.step()
    assert losses[1] < losses[0]
