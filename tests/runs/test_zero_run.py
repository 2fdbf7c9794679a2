"""Processes that share moments by DeepSpeed's ZeRO train what one trains, and any number continues it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distilvlm.recipe import RecipeError, load_recipe
from distilvlm.recipe.schema import MachineSpec, OptimSpec
from distilvlm.runs.stopping import CONTINUE
from distilvlm.runs.stored import part
from distilvlm.train import zero

from .conftest import Server, weights
from .test_objective_is_per_sample import losses, recipe
from .test_sharded_run import (
    ONE,
    assert_same,
    assert_same_events,
    encoders_and_a_tower,
    killed,
    sparse_and_preferences,
    updates,
)

installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
TWO = {"machine.tokens": 96, "machine.packing": True, "machine.gradient_checkpointing": True}
CLIP = 0.5


def said(directory: Path, name: str, **more: Any) -> dict[str, str]:
    """Overrides: two processes share the student by a file of DeepSpeed's."""
    file = directory / f"{name}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000, **more}}))
    return {"machine.parallel": "deepspeed", "machine.deepspeed": str(file)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 7 samples an update, of several rates, whose gradients are cut."""
    place = tmp_path_factory.mktemp("zero")
    return recipe(place, ["projector", "language"], batch=7, updates=5, rates={"projector": 0.001}, clip=CLIP)


@pytest.fixture(scope="module")
def one(path: Path, server: Server) -> Path:
    """Its run in one process."""
    server.finish(path, path.parent / "one", overrides=ONE)
    return path.parent / "one"


@installed
def test_two_processes_train_what_one_does(path: Path, one: Path, server: Server, tmp_path: Path) -> None:
    server.finish(path, tmp_path / "two", overrides={**TWO, **said(tmp_path, "zero")}, world=2)
    assert_same(tmp_path / "two", one)


@installed
def test_moments_may_wait_on_the_cpu(path: Path, one: Path, server: Server, tmp_path: Path) -> None:
    machine = said(tmp_path, "zero", offload_optimizer={"device": "cpu"})
    server.finish(path, tmp_path / "two", overrides=machine, world=2)
    assert_same(tmp_path / "two", one)


@pytest.fixture(scope="module")
def undisturbed(path: Path, server: Server) -> tuple[Path, dict[str, str], list[str]]:
    """A run of two processes, how they share it, and the main one's operations."""
    machine = {**said(path.parent, "undisturbed"), "machine.checkpoint_every": 2}
    run = path.parent / "undisturbed"
    return run, machine, server.finish(path, run, overrides=machine, world=2)


@installed
def test_a_killed_run_goes_on_with_any_number_and_engine(
    path: Path, one: Path, undisturbed: tuple[Path, dict[str, str], list[str]], server: Server, tmp_path: Path
) -> None:
    whole, machine, operations = undisturbed
    at = [i for i, label in enumerate(operations, start=1) if label == "step"]
    groups = len(at) // 5  # DeepSpeed steps one by one
    statuses, _ = server.run(path, tmp_path / "killed", die_at=at[3 * groups], overrides=machine, world=2)
    assert any(statuses)
    (checkpoint,) = tmp_path.glob("killed/stages/*/checkpoints/*")
    assert {part(stem, i, 2) for stem in ("weights", "optimizer") for i in range(2)} < {
        f.name for f in checkpoint.iterdir()
    }
    ways = {"zero": (machine, 2), "ddp": (ONE, 1), "fsdp": ({"machine.parallel": "fsdp"}, 2)}
    for name, (how, world) in ways.items():
        shutil.copytree(tmp_path / "killed", tmp_path / name)
        server.finish(path, tmp_path / name, overrides=how, world=world)
        assert_same(tmp_path / name, one)
    found, expected = weights(tmp_path / "zero"), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@installed
def test_two_share_by_zero_what_one_began(path: Path, one: Path, server: Server, tmp_path: Path) -> None:
    operations = server.finish(path, tmp_path / "whole", overrides=ONE)
    killed(path, tmp_path / "run", server, operations, 4, overrides=ONE)
    server.finish(path, tmp_path / "run", overrides=said(tmp_path, "zero"), world=2)
    assert_same(tmp_path / "run", one)


@installed
@pytest.mark.parametrize("make", [sparse_and_preferences, encoders_and_a_tower])
def test_every_kind_of_stage(make: Callable[[Path], Path], server: Server, tmp_path: Path) -> None:
    path = make(tmp_path / "recipe")
    server.finish(path, tmp_path / "one")
    machine = {**said(tmp_path, "zero"), "machine.micro_batch": 1}
    server.finish(path, tmp_path / "two", overrides=machine, world=2)
    assert_same_events(tmp_path / "two", tmp_path / "one")


STOPPED = """
import os, signal
from distilvlm.train.zero import Zero
begun = [0]
def clear(self, optimizer):
    begun[0] += 1
    if begun[0] == 2 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
Zero.clear = clear
"""


@installed
def test_all_stop_behind_the_same_update_and_go_on(
    path: Path, undisturbed: tuple[Path, dict[str, str], list[str]], server: Server, tmp_path: Path
) -> None:
    whole, machine, _ = undisturbed
    request = {"overrides": machine, "world": 2}
    statuses, _ = server.run(path, tmp_path / "run", prelude=STOPPED, stop_at=2, **request)
    assert [os.waitstatus_to_exitcode(status) for status in statuses] == [CONTINUE] * 2, server.errors()
    server.finish(path, tmp_path / "run", **request)
    found, expected = weights(tmp_path / "run"), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


SPOILED = """
from distilvlm.train.zero import Zero
forward, ran = Zero.forward, [0]
def spoiled(self, *arguments):
    result = forward(self, *arguments)
    ran[0] += 1
    return {**result, "loss": result["loss"] * float("nan")} if rank == 1 and ran[0] == 2 else result
Zero.forward = spoiled
"""


@installed
def test_nan_of_one_process_stops_all_before_the_update(path: Path, server: Server, tmp_path: Path) -> None:
    machine = {**said(tmp_path, "zero"), "machine.micro_batch": 4}
    statuses, _ = server.run(path, tmp_path / "run", overrides=machine, world=2, prelude=SPOILED)
    assert all(statuses) and "NonFiniteError" in server.errors()
    assert len(updates(tmp_path / "run")) == 1


@installed
def test_bf16_comes_by_autocast_alone(path: Path, one: Path, server: Server, tmp_path: Path) -> None:
    machine = {**said(tmp_path, "zero"), "machine.precision": "bf16"}
    server.finish(path, tmp_path / "two", overrides=machine, world=2)
    found, expected = losses(tmp_path / "two"), losses(one)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.05)
    assert not torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


WRONG: Sequence[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": None}, "has no object 'zero_optimization'"),
    ({"zero_optimization": {"stage": 2}}, r"stage is 2: .* set 'parallel: fsdp'"),
    ({"zero_optimization": {"stage": "auto"}}, "stage is null"),
    ({"train_batch_size": 64}, r"'train_batch_size' is 64, but the recipe's optim\.batch decides"),
    ({"gradient_clipping": 1.0}, r"'gradient_clipping' is 1\.0, but the recipe's optim\.clip decides"),
    ({"bf16": {"enabled": True}}, r"'bf16' is .*, but the recipe's machine\.precision decides"),
    ({"optimizer": {"type": "Lamb", "params": {"lr": 1}}}, "'optimizer' is .*, but the recipe's optim decides"),
    ({"compression_training": {}}, "'compression_training' is not among what was tried"),
    ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, r"'zero_optimization\.overlap_comm' is not among"),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}}, r'device is "nvme"'),
]


@pytest.mark.parametrize(("fields", "match"), WRONG)
def test_a_file_that_says_something_else_is_refused(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, **fields}))
    machine = MachineSpec(parallel="deepspeed", deepspeed=str(file))
    with pytest.raises(RecipeError, match=match):
        zero.configuration(machine, OptimSpec(lr=1e-3, batch=8, updates=1, clip=0.5))


@pytest.mark.parametrize("text", [None, "{"])
def test_a_file_that_is_none_is_refused(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    if text is not None:
        file.write_text(text)
    machine = MachineSpec(parallel="deepspeed", deepspeed=str(file))
    with pytest.raises(RecipeError, match="can't be read as JSON"):
        zero.configuration(machine, OptimSpec(lr=1e-3, batch=8, updates=1))


def test_what_is_left_open_is_the_recipes(tmp_path: Path) -> None:
    """As files for transformers' Trainer are written."""
    auto = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}
    text = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
        "optimizer": auto,
        "bf16": {"enabled": "auto"},
    }
    equal = {"train_batch_size": 8, "gradient_clipping": 0.5, "gradient_accumulation_steps": "auto"}
    (tmp_path / "zero.json").write_text(json.dumps({**text, **equal, "fp16": {"enabled": False, "loss_scale": 0}}))
    machine = MachineSpec(parallel="deepspeed", deepspeed=str(tmp_path / "zero.json"), precision="bf16")
    made = zero.configuration(machine, OptimSpec(lr=1e-3, batch=8, updates=1, clip=0.5))
    assert made["zero_optimization"] == {"stage": 1} and "optimizer" not in made
    assert made["gradient_clipping"] == 0.5 and made["torch_autocast"]["enabled"]


@pytest.mark.parametrize("setting", ["machine.parallel=deepspeed", "machine.deepspeed=zero.json"])
def test_engine_and_file_need_each_other(path: Path, setting: str) -> None:
    with pytest.raises(RecipeError, match=r"'parallel: deepspeed' and 'deepspeed: FILE\.json' need each other"):
        load_recipe(path, [setting])


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"pip install 'distilvlm\[deepspeed\]'"):
        zero.require(MachineSpec(parallel="deepspeed", deepspeed="zero.json"), [])
