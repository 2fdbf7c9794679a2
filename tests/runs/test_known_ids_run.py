"""A run over a cache of likeliest ids, or of draws, that `distilvlm cache` has filled: what is said of it holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

from distilvlm.cli import app
from distilvlm.data.collate import collate
from distilvlm.models import forward
from distilvlm.models.compose import build
from distilvlm.runs.events import read_events
from distilvlm.runs.execute import run
from distilvlm.teachers import cache, keeping
from distilvlm.teachers.local import hidden_rows
from distilvlm.teachers.reduced import drawn
from tests.teachers.cached_recipe import data_of, loaded, written

ROWS = 6
REPEATS = 4
KEPT = 256


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One update over all captions, whose answers are of one length: the mean over samples is that over rows."""
    path = written(tmp_path_factory.mktemp("ids"), rows=ROWS)
    content = yaml.safe_load(path.read_text())
    content["student"]["language"]["config"] |= {"attention_dropout": 0.0, "initializer_range": 0.1}
    content["teacher"]["language"]["config"]["initializer_range"] = 0.3
    stage = content["stages"][0]
    stage |= {"loss": {"text": 0.0, "response": 1.0}, "optim": {"lr": 1e-3, "batch": ROWS, "updates": 1}}
    content |= {"stages": [stage], "machine": {"micro_batch": 1}}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Of each update that is made, all in one."""
    found: list[Tensor] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        found.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    monkeypatch.setattr("distilvlm.runs.expense.estimate", lambda *_, **__: [])
    yield found


def filled(recipe: Path, place: Path, **keep: Any) -> dict[str, Any]:
    """What a cache was filled with by the command, as the overrides of a run; 'told' is what it said."""
    changes = {"teacher.keep.path": str(place), **{f"teacher.keep.{name}": value for name, value in keep.items()}}
    sets = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    result = CliRunner().invoke(app, ["cache", str(recipe), *sets])
    assert result.exit_code == 0, result.output
    return {**changes, "told": " ".join(result.output.split())}


def response(recipe: Path, directory: Path, changes: dict[str, Any]) -> float:
    run(recipe, {name: value for name, value in changes.items() if name != "told"}, directory)
    (event,) = [event for event in read_events(directory / "events.jsonl") if event["event"] == "update"]
    return event["terms"]["response"]


def spread(recipe: Path) -> float:
    """Largest minus smallest logit of the student's at its start among ids that a row's likeliest ones leave out."""
    resolved = loaded(recipe)
    assert resolved.teacher is not None
    student, teacher = build(resolved.student, resolved.seed), build(resolved.teacher, resolved.seed)
    data = data_of(resolved, student)["dpt"]
    batch = collate([data[0, index] for index in range(ROWS)])
    logits = []
    for vlm in (student, teacher):
        hidden = hidden_rows(vlm, batch, batch.pictures, batch.response_rows)
        logits.append((hidden @ forward.head_weight(vlm.model).T).detach())
    likeliest = logits[1].topk(KEPT).indices
    others = logits[0].scatter(-1, likeliest, torch.nan)
    return float((others.nan_to_num(-torch.inf).amax(-1) - others.nan_to_num(torch.inf).amin(-1)).max())


def test_likeliest_ids_are_below_a_local_teacher_by_no_more_than_the_command_says(
    recipe: Path, gradients: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = response(recipe, tmp_path / "local", {"teacher.kind": "local"})
    changes = filled(recipe, tmp_path / "kept", responses="top_k", top_k=KEPT)
    said = re.search(r"at most (\S+) nats below the exact one, and (\S+) more for each nat", changes["told"])
    assert said is not None, changes["told"]
    below, each = map(float, said.groups())
    monkeypatch.setattr(cache, "weights_of", lambda recipe: pytest.fail("the teacher was loaded again"))
    found = response(recipe, tmp_path / "cached", changes)
    gap = exact - found
    assert 0 < gap <= 1.01 * (below + each * spread(recipe)), (exact, found)  # numbers are told to two digits
    assert below < 0.5 * exact  # else it would say nothing


def test_draws_give_the_local_teacher_s_gradient_on_average(
    recipe: Path, gradients: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    response(recipe, tmp_path / "local", {"teacher.kind": "local"})
    exact = gradients.pop()
    filled(recipe, tmp_path / "kept0", responses="sampled", draws=64)
    for repeat in range(REPEATS):

        def salted(hidden: Tensor, head: Tensor, draws: int, key: str, salt: int = repeat) -> dict[str, Tensor]:
            return drawn(hidden, head, draws, f"{key[:14]}{salt:x}{key[15:]}")  # the seed's last digit

        monkeypatch.setattr(keeping, "drawn", salted)
        keep = {"path": str(tmp_path / f"kept{repeat}"), "responses": "sampled", "draws": 64}
        response(recipe, tmp_path / f"run{repeat}", {"teacher.keep": keep})
    found = torch.stack(gradients)
    assert len(found) == REPEATS and bool((found.var(0) > 0).any())
    error = float((found.mean(0) - exact).square().sum())
    expected = float(found.var(0).sum()) / REPEATS  # of the square of a mean that is off by chance alone
    assert error <= 3 * expected, (error, expected)
    assert float(exact.square().sum()) > 20 * expected  # so an error of a fifth of the gradient would be seen
