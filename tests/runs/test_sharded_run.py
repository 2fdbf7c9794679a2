"""Processes that hold a part of the student each (FSDP2) train what one process trains, and any number continues it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .conftest import Server, weights
from .test_objective_is_per_sample import losses, recipe

FSDP = {"machine.parallel": "fsdp", "machine.micro_batch": 2, "machine.checkpoint_every": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, server: Server) -> tuple[Path, Path]:
    """A recipe of 7 samples an update, and its run in one process."""
    directory = tmp_path_factory.mktemp("sharded")
    path = recipe(directory, ["projector", "language"], batch=7, updates=4)
    server.finish(path, directory / "one", overrides={"machine.micro_batch": 7})
    return path, directory / "one"


def assert_same(found: Path, expected: Path) -> None:
    torch.testing.assert_close(losses(found), losses(expected), atol=1e-5, rtol=1e-5)
    ours, theirs = weights(found), weights(expected)
    for name in (name for name in theirs if name.startswith("model/")):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes(whole: tuple[Path, Path], server: Server, tmp_path: Path) -> None:
    path, one = whole
    server.finish(path, tmp_path / "two", overrides=FSDP, world=2)
    assert_same(tmp_path / "two", one)
