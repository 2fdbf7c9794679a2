"""Loader processes die: the batches are the same, and a sample that kills each of them is named."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distilvlm.data import Batch, DataError, Grouping, StageData, batches
from distilvlm.data.workers import RESTARTS, Workers

from .small_data import llava_row, make_pictures
from .test_batches import collected, make_order, same, stage_data


class Deadly:
    """Reads features of a picture; the first so many processes that come to picture 2 die of a signal there."""

    def __init__(self, directory: Path, deaths: int, by: int = signal.SIGKILL) -> None:
        self.directory, self.deaths, self.by = directory, deaths, by

    def __call__(self, path: str) -> torch.Tensor:
        if path.endswith("2.png") and (died := len(list(self.directory.glob("died*")))) < self.deaths:
            (self.directory / f"died{died}").touch()
            os.kill(os.getpid(), self.by)
        return torch.full((5, 3), float(Path(path).stem))


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., StageData]:
    images = make_pictures(tmp_path / "images", 4)
    rows = [llava_row(n, images[n % 4], "<image>\nq", "red") for n in range(8)]
    return lambda deaths, by=signal.SIGKILL: stage_data(tmp_path, rows, feature_reader=Deadly(tmp_path, deaths, by))


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSEGV])
def test_the_batches_are_the_same_whoever_dies(made, by: int, caplog: pytest.LogCaptureFixture) -> None:
    expected = collected(made(0), make_order(made(0)), 0, 3, grouping=Grouping(2))
    before = signal.getsignal(signal.SIGCHLD)
    data = made(2, by)
    with caplog.at_level(logging.WARNING):
        found = collected(data, make_order(data), 0, 3, grouping=Grouping(2), workers=2)
    assert [update for update, _ in found] == [0, 1, 2]
    pairs = zip(itertools.chain(*(b for _, b in expected)), itertools.chain(*(b for _, b in found)), strict=True)
    assert all(same(one, other) for one, other in pairs)
    told = [record.getMessage() for record in caplog.records]  # of one, if both died at once
    assert told and all(f"of 2 was killed by {signal.Signals(by).name}" in line for line in told)
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_sample_at_which_each_of_them_dies_is_named(made) -> None:
    data = made(99)
    with pytest.raises(DataError, match=r"process 1 of 1 was killed by SIGKILL .*died 4 times in a row.*row (2|6)"):
        collected(data, make_order(data, batch=1), 0, 8, workers=1)


def test_a_death_does_not_interrupt_the_work_on_another_batch(made) -> None:
    """torch's own handler raises wherever the main thread is: in the middle of an update."""
    data = made(0)
    stream = batches(data, make_order(data, batch=1), 0, 8, workers=2)
    _, first = next(stream)
    found: list[Batch] = list(first)
    loader = _children()[0]
    os.kill(loader, signal.SIGKILL)
    while " Z " not in Path(f"/proc/{loader}/stat").read_text():
        time.sleep(0.01)  # here torch's handler would raise
    for _, micro_batches in stream:
        found += micro_batches
    assert len(found) == 8


def test_a_row_of_deaths_ends_where_work_goes_on(made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilvlm.data.workers.PASSED", 1)
    data = made(0)
    stream = batches(data, make_order(data, batch=1), 0, 8, workers=1)
    seen = 0
    for _, micro_batches in stream:
        seen += len(list(micro_batches))
        for loader in _children():
            os.kill(loader, signal.SIGKILL)
    assert seen == 8 > RESTARTS


def test_an_error_that_is_no_death_is_told_as_it_is(made) -> None:
    one = deque([[(0, 0)]])
    with Workers(made(0), [], one, _fails, 1, _begins) as processes, pytest.raises(RuntimeError, match="no such thing"):
        processes.next()


def _begins(process: int) -> None:
    """Nothing is to be done in a process."""


def _fails(samples: object) -> Batch:
    raise RuntimeError("no such thing")


def _children() -> list[int]:
    """Loader processes. Others of this process are none of ours: the suite's server of runs, a browser."""
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]
