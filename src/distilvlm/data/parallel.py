"""The same work for many things, in several processes where there are cores, with results in order."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Job = TypeVar("Job")
Result = TypeVar("Result")

_limit: ContextVar[int | None] = ContextVar("limit", default=None)


@contextmanager
def at_most(processes: int | None) -> Iterator[None]:
    """Within it, work is done by so many processes where nothing else is said; None: by as many as there are cores."""
    token = _limit.set(processes)
    try:
        yield
    finally:
        _limit.reset(token)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mapped(work: Callable[[Job], Result], jobs: Sequence[Job], processes: int | None = None) -> Iterator[Result]:
    """`work` of every job, in order. Both must be picklable, and so must results.

    Args:
        processes: default: as many as there are cores (or `at_most`) and jobs; with one, or within a loader process,
            nothing is forked.

    Raises:
        whatever `work` raises, of the first job that it raises it for.
    """
    processes = min(len(jobs), processes or _limit.get() or cores())
    if processes < 2 or multiprocessing.current_process().daemon:
        yield from map(work, jobs)
        return
    loader = DataLoader(
        _Jobs(work, jobs),
        batch_size=None,
        num_workers=processes,
        collate_fn=_as_it_is,
        # As for batches: without its own generator it would draw from the global one.
        generator=torch.Generator().manual_seed(0),
    )
    for result, error in loader:
        if error is not None:
            raise error
        yield result


class _Jobs(Dataset[Any]):
    def __init__(self, work: Callable[[Any], Any], jobs: Sequence[Any]) -> None:
        self.work = work
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> tuple[Any, Exception | None]:
        # An error goes home as a value: a loader would write the process's stack into its message.
        try:
            return self.work(self.jobs[number]), None
        except Exception as error:
            return None, error


def _as_it_is(made: Any) -> Any:
    return made
