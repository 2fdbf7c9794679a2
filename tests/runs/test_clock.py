"""The wall clock may jump: what a run measures and in which order it does things is none of its business."""

from __future__ import annotations

import itertools
import os
import re
import time
from pathlib import Path

import pytest

import distilvlm
from distilvlm.models.files import directory_whole
from distilvlm.runs import checkpoint
from distilvlm.runs.events import read_events
from distilvlm.runs.peers import Peers

from .tiny import write_recipe

STAGE = {
    "name": "sft",
    "train": ["projector"],
    "data": ["questions"],
    "optim": {"lr": 0.01, "batch": 4, "updates": 4},
}

TOLD = {
    *("runs/about.py", "report/page.py", "compare/table.py", "compare/speed.py"),
    *("serve/desk.py", "serve/answers.py", "serve/uploads.py"),
}
"""Where people, or clients of the server, are told what time it is."""

FRESH = {"data/streams/survey.py", "data/streams/json_rows.py"}
"""Where a file that was just written to is looked at again: with a wrong clock once more than needed."""


def test_time_of_day_is_only_read_to_be_told() -> None:
    package = Path(distilvlm.__file__).parent
    reads = re.compile(r"\btime\.time\(|\bdatetime\.now\(|\butcnow\(|\btime\.time_ns\(|st_[mc]time\b(?!_ns)")
    found = {file.relative_to(package).as_posix() for file in package.rglob("*.py") if reads.search(file.read_text())}
    assert found - TOLD - FRESH == set()


def test_durations_and_order_survive_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, stages=[STAGE], teacher=None)
    real, jumps = time.time, itertools.count()

    def jumping() -> float:
        return real() + (-1) ** next(jumps) * 3e7  # a year back, a year ahead

    monkeypatch.setattr(time, "time", jumping)
    distilvlm.run(recipe, {"machine.checkpoint_every": 1}, tmp_path / "run")
    events = [event for event in read_events(tmp_path / "run/events.jsonl") if event["event"] == "update"]
    assert [event["number"] for event in events] == [1, 2, 3, 4]
    assert all(0 <= event["wait"] <= event["seconds"] < 600 for event in events)


def test_the_newest_checkpoint_is_that_of_the_last_update(tmp_path: Path) -> None:
    for update in (2, 4):
        with directory_whole(tmp_path / f"{update:08d}") as partial:
            (partial / "position.json").write_text("{}")
    older = tmp_path / "00000002"
    for file in (older, older / "position.json"):
        os.utime(file, (4e9, 4e9))  # made while the clock was a century ahead
    assert checkpoint.last_whole(tmp_path) == tmp_path / "00000004"
    checkpoint.rotate(tmp_path, keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["00000004"]


def test_a_jump_is_no_process_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = Peers(_Two(), 10.0, lambda: (1, "update 1"))  # pyright: ignore
    peers._store = _Store()  # pyright: ignore
    peers._exchange()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 1e6)
    peers._exchange()
    assert peers._verdict() is None
    later = time.monotonic() + 11
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert "stands still for 11 s" in str(peers._verdict())


class _Two:
    process_index, num_processes = 0, 2


class _Store(dict):  # pyright: ignore
    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)
