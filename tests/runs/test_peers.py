"""Two processes train together: whatever one does, the other ends in bounded time and says why."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import Accelerator
from torch import distributed

from distilvlm.runs.peers import PeerError, Peers

from .conftest import Server
from .tiny import write_recipe

STAGE = {
    "name": "sft",
    "train": ["projector", "language"],
    "data": ["questions"],
    "optim": {"lr": 0.01, "batch": 4, "updates": 4},
}
SETTINGS = {"machine.timeout": 2, "machine.micro_batch": 1, "machine.checkpoint_every": 1}

AT_THREE = """
import os, signal, time
from distilvlm.train.loop import Loop
given = Loop.given
def spoiled(self, batch):
    found = given(self, batch)
    if rank == 1 and self.now.update == 3:
        {what}
    return found
Loop.given = spoiled
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("peers"), stages=[STAGE], teacher=None)


def spoiled(server: Server, recipe: Path, run: Path, what: str) -> tuple[list[int], str, float]:
    began = time.monotonic()
    statuses, _ = server.run(recipe, run, world=2, overrides=SETTINGS, prelude=AT_THREE.format(what=what))
    return statuses, server.errors(), time.monotonic() - began


def test_a_dead_process_is_named_and_the_run_continues(recipe: Path, server: Server, tmp_path: Path) -> None:
    statuses, told, seconds = spoiled(
        server, recipe, tmp_path / "run", "time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert statuses == [256, 9] and seconds < 30
    assert "process 1 of 2 is gone" in told and "update 3, micro-batch 1" in told
    server.finish(recipe, tmp_path / "run", world=2, overrides=SETTINGS)
    assert (tmp_path / "run" / "model" / "manifest.json").exists()


def test_a_process_that_stands_still_is_named_with_its_line(recipe: Path, server: Server, tmp_path: Path) -> None:
    statuses, told, seconds = spoiled(server, recipe, tmp_path / "run", "time.sleep(3600)")
    assert statuses == [256, 256] and seconds < 30
    assert "process 1 of 2 stands still" in told and "update 3, micro-batch 1: computes (" in told
    assert "machine.timeout" in told


def test_all_stop_at_the_same_update_where_one_has_nan(recipe: Path, server: Server, tmp_path: Path) -> None:
    statuses, told, seconds = spoiled(
        server, recipe, tmp_path / "run", "self.task.student.lm_head.weight.data.mul_(float('nan'))"
    )
    assert statuses == [256, 256] and seconds < 30
    assert told.count("loss term text is not finite at update 3") >= 2  # every process says so
    (kept,) = (tmp_path / "run" / "trouble").iterdir()
    assert kept.name == "sft-00000003-1"


def test_an_error_of_one_is_told_by_the_other(recipe: Path, server: Server, tmp_path: Path) -> None:
    statuses, told, seconds = spoiled(server, recipe, tmp_path / "run", "raise OSError('the disk is gone')")
    assert statuses == [256, 256] and seconds < 30
    assert "process 1 of 2 stopped at" in told and "PeerError" in told and "the disk is gone" in told


def test_who_is_left_behind_by_a_killed_launcher_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun has the store, and what a process is connected to answers no more."""
    launcher = distributed.TCPStore("127.0.0.1", 0, is_master=True)
    patience = timedelta(seconds=600)
    met: Any = distributed.TCPStore("127.0.0.1", launcher.port, is_master=False, timeout=patience)
    del launcher
    monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", lambda: distributed.PrefixStore("run", met))
    alone = SimpleNamespace(process_index=0, num_processes=2)
    began = time.monotonic()
    peers = Peers(cast(Accelerator, alone), 2, lambda: (0, "update 1"))
    with pytest.raises(PeerError, match=r"where processes meet does not answer"), peers.watching():
        raise AssertionError("began to train")
    assert time.monotonic() - began < 20
    assert met.timeout == patience  # collective calls wait as long as before
