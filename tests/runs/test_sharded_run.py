"""Processes that hold a part of the student each (FSDP2) train what one process trains, and any number continues it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import distilvlm
from distilvlm.recipe import RecipeError, load_recipe
from distilvlm.runs.directory import RunError
from distilvlm.runs.events import read_events
from distilvlm.runs.stored import Stored, part

from .conftest import Server, weights
from .test_objective_is_per_sample import losses, recipe
from .tiny_iaa import write_iaa_recipe
from .tiny_mod import write_mod_recipe
from .tiny_move import write_vlm

FSDP = {
    "machine.parallel": "fsdp",
    "machine.tokens": 96,
    "machine.packing": True,
    "machine.gradient_checkpointing": True,
    "machine.offload": True,
    "machine.shard_teacher": True,
    "machine.checkpoint_every": 2,
}
SINGLE = {"machine.parallel": "fsdp", "machine.micro_batch": 1}
ONE = {"machine.micro_batch": 7, "machine.checkpoint_every": 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 7 samples an update."""
    return recipe(tmp_path_factory.mktemp("sharded"), ["projector", "language"], batch=7, updates=5)


@pytest.fixture(scope="module")
def one(path: Path, server: Server) -> tuple[Path, list[str]]:
    """Its run in one process, and that one's operations."""
    run = path.parent / "one"
    return run, server.finish(path, run, overrides=ONE)


@pytest.fixture(scope="module")
def two(path: Path, server: Server) -> tuple[Path, list[str]]:
    """Its run in two processes that share the student."""
    run = path.parent / "two"
    return run, server.finish(path, run, overrides=FSDP, world=2)


def killed(path: Path, run: Path, server: Server, operations: list[str], step: int, **request: Any) -> Path:
    """A run that died before an update; `operations` are those of one that did not."""
    at = [i for i, label in enumerate(operations, start=1) if label == "step"][step - 1]
    statuses, _ = server.run(path, run, die_at=at, **request)
    assert any(statuses)
    return run


@pytest.fixture(scope="module")
def killed_two(path: Path, two: tuple[Path, list[str]], server: Server) -> Path:
    """Died behind the checkpoint of update 2."""
    return killed(path, path.parent / "killed", server, two[1], 4, overrides=FSDP, world=2)


def assert_same(found: Path, expected: Path, atol: float = 1e-5) -> None:
    torch.testing.assert_close(losses(found), losses(expected), atol=atol, rtol=atol)
    ours, theirs = weights(found), weights(expected)
    for name in (name for name in theirs if name.startswith("model/")):
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_train_what_one_does(one: tuple[Path, list[str]], two: tuple[Path, list[str]]) -> None:
    assert_same(two[0], one[0])


def test_each_process_writes_its_rows(killed_two: Path) -> None:
    (checkpoint,) = killed_two.glob("stages/*/checkpoints/*")
    names = sorted(file.name for file in checkpoint.glob("*.safetensors"))
    assert names == [
        *(part("optimizer", i, 2) for i in range(2)), "random.safetensors", *(part("weights", i, 2) for i in range(2))
    ]  # fmt: skip
    with Stored(checkpoint, "weights") as stored:
        for name in stored.names:
            rows = stored.shape(name)[0]
            for process in range(2):
                with safe_open(checkpoint / part("weights", process, 2), "pt") as file:
                    held = file.get_slice(name).get_shape()[0]
                assert held == (-(-rows // 2) if process == 0 else rows // 2), name


@pytest.mark.parametrize("world", [1, 2])
def test_any_number_of_processes_continues(
    path: Path,
    one: tuple[Path, list[str]],
    two: tuple[Path, list[str]],
    killed_two: Path,
    server: Server,
    tmp_path: Path,
    world: int,
) -> None:
    shutil.copytree(killed_two, tmp_path / "run")
    server.finish(path, tmp_path / "run", overrides=FSDP if world > 1 else ONE, world=world)
    assert_same(tmp_path / "run", one[0])
    if world == 2:
        found, undisturbed = weights(tmp_path / "run"), weights(two[0])
        assert all(torch.equal(found[name], undisturbed[name]) for name in undisturbed)


def sparse_and_preferences(directory: Path) -> Path:
    return without_dropout(write_mod_recipe(directory), slice(1, 3))


def adaptors(directory: Path) -> Path:
    return without_dropout(write_iaa_recipe(directory), slice(1, 2))


def encoders_and_a_tower(directory: Path) -> Path:
    """A tower that becomes a mixture and trains; micro-batches of one, of which some have no picture."""
    path = without_dropout(write_vlm(directory), slice(1, 2))
    content = yaml.safe_load(path.read_text())
    content["stages"][0]["transform"] = [{"do": "mix", "rank": 2, "dropout": 0.0}]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def without_dropout(path: Path, stages: slice) -> Path:
    """Two updates of some stages of a recipe."""
    content = yaml.safe_load(path.read_text())
    content["student"]["language"]["config"]["attention_dropout"] = 0.0
    content["pictures"]["augment"] = None
    content["stages"] = content["stages"][stages]
    for stage in content["stages"]:
        stage["optim"] = {key: value for key, value in stage["optim"].items() if key != "epochs"} | {"updates": 2}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize("make", [sparse_and_preferences, encoders_and_a_tower])
def test_every_kind_of_stage(make: Callable[[Path], Path], server: Server, tmp_path: Path) -> None:
    path = make(tmp_path / "recipe")
    server.finish(path, tmp_path / "one")
    server.finish(path, tmp_path / "two", overrides=SINGLE, world=2)
    assert_same_events(tmp_path / "two", tmp_path / "one")


def test_two_share_the_adaptor_that_one_began(server: Server, tmp_path: Path) -> None:
    path = adaptors(tmp_path / "recipe")
    operations = server.finish(path, tmp_path / "one", overrides={"machine.checkpoint_every": 1})
    killed(path, tmp_path / "two", server, operations, 2, overrides={"machine.checkpoint_every": 1})
    server.finish(path, tmp_path / "two", overrides=SINGLE, world=2)
    assert_same_events(tmp_path / "two", tmp_path / "one")


def assert_same_events(found: Path, expected: Path) -> None:
    two, one = updates(found), updates(expected)
    assert [event["stage"] for event in two] == [event["stage"] for event in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["terms"] == pytest.approx(theirs["terms"], rel=1e-4, abs=1e-5)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)


def updates(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == "update"]


def test_rows_of_several_files(tmp_path: Path) -> None:
    values = torch.arange(14.0).view(7, 2)
    for process, rows in enumerate((slice(0, 3), slice(3, 6), slice(6, 7), slice(7, 7))):
        save_file({"a": values[rows].clone(), "step": torch.tensor(5.0)}, tmp_path / part("x", process, 4))
    with Stored(tmp_path, "x") as stored:
        assert stored.names == {"a", "step"} and stored.shape("a") == (7, 2) and stored.shape("step") == ()
        for first in range(8):
            for last in range(first, 8):
                assert torch.equal(stored.rows("a", slice(first, last)), values[first:last])
        assert stored.rows("step", slice(0, 0)) == 5
    (tmp_path / part("x", 2, 4)).unlink()
    with pytest.raises(RunError, match="holds 3 of 4 files of x"):
        Stored(tmp_path, "x")


def test_a_teacher_of_few_bits_is_not_split(path: Path) -> None:
    asked = ["machine.parallel=fsdp", "machine.shard_teacher=true", "teacher.precision=8bit"]
    with pytest.raises(RecipeError, match=r"a teacher in 8 or 4 bits can't be split"):
        load_recipe(path, asked)


def test_a_launcher_does_not_choose_the_engine(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RunError, match=r"accelerate was told to use DEEPSPEED.* set machine.parallel=fsdp"):
        distilvlm.run(path, directory=tmp_path / "run")


@pytest.mark.parametrize("name", ["offload", "shard_teacher"])
def test_only_what_is_split_can_be_offloaded(path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' needs 'parallel: fsdp'"):
        load_recipe(path, [f"machine.{name}=true"])
