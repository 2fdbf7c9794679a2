"""Weights and a temperature that change are written in the loss section, and what can't be meant is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from distilvlm.recipe.schedules import Ramp
from distilvlm.recipe.schema import LossSpec


def loss(**written: Any) -> LossSpec:
    return LossSpec.model_validate(written)


def test_a_ramp_is_a_pure_function_of_the_update() -> None:
    ramp = Ramp.model_validate({"from": 2, "to": 1, "begin": 0.2, "end": 0.6})
    assert [ramp.at(update, 11) for update in range(11)] == pytest.approx([2, 2, 2, 1.75, 1.5, 1.25, 1, 1, 1, 1, 1])
    cosine = Ramp.model_validate({"from": 0, "to": 4, "shape": "cosine"})
    assert [cosine.at(update, 5) for update in range(5)] == pytest.approx([0, 2 - 2**0.5, 2, 2 + 2**0.5, 4])
    step = Ramp.model_validate({"from": 0, "to": 3, "begin": 0.5, "end": 0.5})
    assert [step.at(update, 5) for update in range(5)] == [0, 0, 3, 3, 3]
    assert step.at(0, 1) == 0  # a stage of one update is at its begin


def test_a_weight_is_what_its_schedule_ends_at() -> None:
    assert loss(schedule={"response": {"from": 0, "to": 0.5}}).response == 0.5
    assert loss(response=0.5, schedule={"response": {"from": 0}}).schedule["response"].stop == 0.5
    fading = loss(response=1, schedule={"text": {"from": 1, "to": 0}, "temperature": {"from": 4, "to": 1}})
    assert fading.weights == {"text": 1.0, "response": 1.0}  # a term of the stage, although it ends at 0
    assert fading.temperature == 1


def test_a_dumped_section_means_the_same() -> None:
    written = loss(response=1, schedule={"text": {"from": 1, "to": 0}, "temperature": {"from": 4, "to": 1}})
    assert LossSpec.model_validate(written.model_dump(mode="json", by_alias=True)) == written


def test_changing_values_are_told_in_words() -> None:
    told = loss(
        visual=0.5,
        divergence="skew_reverse_kl",
        mix=0.2,
        schedule={
            "response": {"from": 0, "to": 1, "end": 0.3},
            "temperature": {"from": 4, "to": 1, "begin": 0.1, "shape": "cosine"},
        },
    )
    assert told.told("response") == "0 → 1 over the first 30%"
    assert told.told("visual") == "0.5"
    assert told.compared_by == "skew_reverse_kl, λ 0.2, temperature 4 → 1 from 10% to 100%, cosine"
    assert loss().compared_by == loss(temperature=2).compared_by == ""


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"schedule": {"balance": {"from": 0, "to": 1}}},
            r"schedule\.balance: there is no such schedule; there is one of text,",
        ),
        (
            {"response": 1, "schedule": {"response": {"from": 0, "to": 2}}},
            "response is 1, but its schedule goes",
        ),
        ({"schedule": {"response": {"from": 0, "to": 0}}}, "0 throughout: leave it out"),
        ({"response": 1, "schedule": {"temperature": {"from": 0, "to": 1}}}, "a temperature is positive"),
        ({"schedule": {"temperature": {"from": 2, "to": 1}}}, "there is neither"),
        ({"response": 1, "schedule": {"response": {"from": 0, "begin": 0.5, "end": 0.1}}}, "before it begins"),
        ({"text": 0, "schedule": {"response": {"from": 0, "to": 1}}}, "at 0% of the updates text, .* are all 0"),
        (
            {"schedule": {"text": {"from": 1, "to": 0, "end": 0.2}, "visual": {"from": 0, "to": 1, "begin": 0.3}}},
            "at 20% of the updates",
        ),
        ({"response": 1, "mix": 0.5}, "forward_kl mixes nothing"),
        ({"response": 1, "divergence": "uld"}, "'forward_kl', 'reverse_kl'"),
    ],
)
def test_what_can_not_be_meant_is_refused(written: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        loss(**written)


def test_crossing_weights_are_never_all_zero() -> None:
    loss(schedule={"text": {"from": 1, "to": 0, "end": 0.5}, "response": {"from": 0, "to": 1, "begin": 0.2}})
