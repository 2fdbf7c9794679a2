"""A run may be killed anywhere: the same command continues it and ends with the same weights, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from distilvlm.runs.events import read_events

from .conftest import Server, weights
from .operations import kind_of
from .tiny import write_recipe

KILLED = 9


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages of 2 epochs, augmentation, accumulation 2, dropout, a rate at which weights move."""
    return write_recipe(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, server: Server) -> tuple[dict[str, torch.Tensor], list[str]]:
    directory = recipe.parent / "undisturbed"
    operations = server.finish(recipe, directory)
    return weights(directory), operations


def assert_same(run: Path, expected: dict[str, torch.Tensor]) -> None:
    found = weights(run)
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
    leftovers = [path for path in run.rglob("*") if ".partial-" in path.name or ".replaced-" in path.name]
    assert not leftovers


def test_same_recipe_gives_the_same_bits(recipe: Path, undisturbed, server: Server, tmp_path: Path) -> None:
    server.finish(recipe, tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed[0])


def test_killed_before_every_kind_of_file_operation(recipe: Path, undisturbed, server: Server, tmp_path: Path) -> None:
    """One run, killed before the first operation of each kind that an undisturbed one comes to, in their order."""
    expected, operations = undisturbed
    kinds = dict.fromkeys(kind_of(label) for label in operations if label != "step")
    names = " ".join([*operations, *kinds])
    for needed in ("optimizer", "random", "position", "manifest", "rmtree", "final", "/model", "model.safetensors"):
        assert needed in names, kinds
    for kind in kinds:
        statuses, _ = server.run(recipe, tmp_path / "run", die_before=kind)
        assert statuses == [KILLED], f"{kind}: {server.errors()}"
    server.finish(recipe, tmp_path / "run")
    assert_same(tmp_path / "run", expected)


def test_killed_at_random_again_and_again(recipe: Path, undisturbed, server: Server, tmp_path: Path) -> None:
    expected, operations = undisturbed
    draw = random.Random(0)
    for attempt in range(2):
        run = tmp_path / f"run{attempt}"
        for _ in range(200):
            statuses, _ = server.run(recipe, run, die_at=draw.randrange(20, len(operations) // 2))
            if statuses == [0]:
                break
            assert statuses == [KILLED], server.errors()
        else:
            pytest.fail("200 kills, and the run did not end: it makes no progress between them")
        assert_same(run, expected)


def test_killed_in_the_second_epoch_with_loader_workers(
    recipe: Path, undisturbed, server: Server, tmp_path: Path
) -> None:
    expected, operations = undisturbed
    steps = [i for i, label in enumerate(operations) if label == "step"]
    fifth = operations[: steps[4] + 1]
    overrides = {"machine.workers": 2}
    statuses, _ = server.run(recipe, tmp_path / "run", die_at=len(fifth), overrides=overrides)
    assert statuses == [KILLED], server.errors()
    server.finish(recipe, tmp_path / "run", overrides=overrides)
    assert_same(tmp_path / "run", expected)


def test_the_comparison_notices_a_checkpoint_that_is_not_loaded(
    recipe: Path, undisturbed, server: Server, tmp_path: Path
) -> None:
    expected, operations = undisturbed
    last = max(i for i, label in enumerate(operations) if label == "step")
    server.run(recipe, tmp_path / "run", die_at=last + 1)
    server.finish(recipe, tmp_path / "run", disable="loading")
    found = weights(tmp_path / "run")
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def test_every_update_stands_in_the_events_once(recipe: Path, undisturbed, server: Server, tmp_path: Path) -> None:
    _, operations = undisturbed
    for share in (3, 2):
        server.run(recipe, tmp_path / "run", die_at=len(operations) // share)
    server.finish(recipe, tmp_path / "run")
    events = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "update"]
    expected = read_events(recipe.parent / "undisturbed" / "events.jsonl")
    expected = [event for event in expected if event["event"] == "update"]
    for event in [*events, *expected]:
        del event["seconds"], event["wait"]
    assert events == expected


def test_a_finished_run_is_left_alone(recipe: Path, undisturbed, server: Server) -> None:
    operations = server.finish(recipe, recipe.parent / "undisturbed")
    assert "step" not in operations
    assert not any(label.startswith("replace") for label in operations)
