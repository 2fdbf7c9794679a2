"""Whichever write of a run fails, and however: its directory loads, and continuing ends with the same bits. All of
them: `benchmarks/chaos.py --writes`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import Tensor

from distilvlm.report.read import Run, read
from distilvlm.runs.events import read_events

from .conftest import Server, weights
from .test_kills import assert_same
from .tiny import write_recipe
from .writes import How


def write_small(directory: Path) -> Path:
    """A stage of two updates with a checkpoint between them."""
    optim = {"lr": 0.01, "batch": 4, "updates": 2}
    stages = [{"name": "sft", "train": ["projector", "language"], "data": ["questions"], "optim": optim}]
    machine = {"micro_batch": 4, "checkpoint_every": 1, "keep": 1}
    return write_recipe(directory, teacher=None, stages=stages, machine=machine)


def check(server: Server, recipe: Path, run: Path, number: int, how: How, expected: dict[str, Tensor]) -> bool:
    """Let write `number` fail, look at what is there, and continue; returns whether that ended the run."""
    statuses, _ = server.run(recipe, run, fail_at=number, how=how)
    leftovers = [path for path in run.rglob("*") if path.name.startswith((".partial-", ".replaced-"))]
    if how != "kill" and any(statuses):
        told = server.errors().splitlines()[-1]
        assert "DiskError: no room" in told and str(run) in told and "the same command continues" in told, told
        assert not leftovers
    if (run / "recipe.yaml").exists():
        found = read(run)
        assert isinstance(found, Run) and found.recipe.name == "tiny"
    server.finish(recipe, run)
    assert_same(run, expected)
    made = [event["number"] for event in read_events(run / "events.jsonl") if event["event"] == "update"]
    assert made == [1, 2]
    return any(statuses)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("writes"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, server: Server) -> tuple[dict[str, Tensor], list[str]]:
    directory = recipe.parent / "undisturbed"
    writes = server.finish(recipe, directory, how="once")
    return weights(directory), writes


def kinds(writes: list[str]) -> dict[str, int]:
    """Kind of write -> its last number."""
    found: dict[str, int] = {}
    for number, label in enumerate(writes, start=1):
        found[re.sub(r"\.partial-[0-9a-f]{12}-", "", re.sub(r"[0-9a-f]{16}", "HASH", label))] = number
    return found


def test_a_failing_write_loses_nothing(
    recipe: Path, undisturbed: tuple[dict[str, Tensor], list[str]], server: Server, tmp_path: Path
) -> None:
    expected, writes = undisturbed
    numbers = kinds(writes)
    # In what is known of the data, the log, the checkpoint, the finished stage and the finished model.
    chosen: list[tuple[str, How]] = [
        ("write /data/HASH.json", "kill"),
        ("write /events.jsonl", "full"),
        ("safetensors /stages/00-sft/checkpoints/00000001/optimizer.safetensors", "once"),
        ("write /stages/00-sft/final/manifest.json", "kill"),
        ("safetensors /model/model.safetensors", "full"),
    ]
    for place, (kind, how) in enumerate(chosen):
        check(server, recipe, tmp_path / f"run{place}", numbers[kind], how, expected)
