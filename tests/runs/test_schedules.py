"""A schedule is a function of the update: a killed run goes on as if nothing had been, and events tell the values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distilvlm
from distilvlm.losses import Objective
from distilvlm.recipe import load_recipe
from distilvlm.recipe.schedules import Ramp
from distilvlm.runs.events import read_events
from distilvlm.runs.plan import plan
from distilvlm.train.task import objective_at
from tests.runs.conftest import weights
from tests.runs.test_plan import shown
from tests.runs.tiny import write_recipe

SCHEDULE = {"response": {"from": 0, "to": 1, "begin": 0.4, "end": 1}, "temperature": {"from": 3, "to": 1}}
STAGE = {
    "name": "dft",
    "train": ["projector", "language"],
    "data": ["questions"],
    "loss": {"text": 1.0, "divergence": "reverse_kl", "schedule": SCHEDULE},
    "optim": {"lr": 0.01, "batch": 4, "updates": 6},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, stages=[STAGE])


def test_an_interrupted_run_ends_with_the_same_bits_and_tells_every_value(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distilvlm.run(recipe, (), tmp_path / "whole")
    step, steps = torch.optim.AdamW.step, list[int]()

    def interrupted(self: torch.optim.AdamW, *_: object) -> None:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distilvlm.run(recipe, (), tmp_path / "run")
    monkeypatch.undo()
    distilvlm.run(recipe, (), tmp_path / "run")
    found, expected = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    updates = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "update"]
    told = [update["scheduled"] for update in updates]
    assert [one["response"] for one in told] == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1])
    assert [one["temperature"] for one in told] == pytest.approx([3, 2.6, 2.2, 1.8, 1.4, 1])
    for update in updates:
        terms, at = update["terms"], update["scheduled"]["response"]
        assert ("response" in terms) == bool(at)  # what weighs nothing costs nothing
        assert update["loss"] == pytest.approx(terms["text"] + at * terms.get("response", 0))


def test_a_plan_tells_what_changes(recipe: Path) -> None:
    resolved = plan(recipe)
    assert resolved.stages[0].loss["response"] == 1
    table = shown(resolved)
    assert "response 0 → 1 from 40% to 100% ×" in table
    assert "reverse_kl, temperature 3 → 1 over all updates" in table


def test_a_dumped_recipe_has_the_same_schedule(recipe: Path) -> None:
    resolved = load_recipe(recipe)
    assert resolved.stages[0].loss.schedule["temperature"] == Ramp.model_validate({"from": 3, "to": 1})


def test_an_objective_changes_in_nothing_else() -> None:
    whole = Objective(response=1.0, visual=0.4, divergence="reverse_kl")
    schedule = {name: Ramp.model_validate(ramp) for name, ramp in SCHEDULE.items()}
    first, last = (objective_at(whole, schedule, update, 6) for update in (0, 5))
    assert first == Objective(response=0.0, visual=0.4, divergence="reverse_kl", temperature=3.0)
    assert last == whole
