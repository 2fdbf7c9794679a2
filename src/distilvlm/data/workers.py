"""Loader processes that may die: what they were at is made again by others, and the batches are the same.

A batch is a function of the samples in it, so nothing is lost and nothing comes twice.
"""

from __future__ import annotations

import itertools
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch.utils.data import DataLoader

from distilvlm.data.batch import Batch
from distilvlm.data.dataset import StageData
from distilvlm.data.problems import DataError
from distilvlm.data.sample import Sample
from distilvlm.data.sampler import SampleIndex

logger = logging.getLogger(__name__)

RESTARTS = 3
"""How often in a row processes are started again: a sample at which they die would kill each of them."""

PASSED = 100
"""Batches that end a row: whatever killed them did not lie in what was under way."""

CERTAIN = 0.5
"""Seconds in which an error shows to have been a death: its connections break before the process has ended."""

REMEDIES = {
    signal.SIGKILL: "most likely by the kernel, which was short of memory (dmesg): fewer machine.workers",
    signal.SIGBUS: "most likely for want of shared memory (/dev/shm; in a container --shm-size): fewer machine.workers",
    signal.SIGSEGV: "a library crashed, most likely while it decoded a picture: look at those below",
}


class Workers:
    """Processes that make batches; a context in which they live.

    Args:
        data: what samples are of.
        groups: the samples of each batch, in order; each is put into `under_way` as it is asked for.
        under_way: what was asked for and has not come yet.
        join: samples to their batch.
        count: how many processes.
        begin: called in each, with its number.
    """

    def __init__(
        self,
        data: StageData,
        groups: Iterable[list[SampleIndex]],
        under_way: deque[list[SampleIndex]],
        join: Callable[[list[Sample]], Batch],
        count: int,
        begin: Callable[[int], None],
    ) -> None:
        self._data, self._left, self._under_way = data, iter(groups), under_way
        self._join, self._count, self._begin = join, count, begin
        self._row, self._since = 0, 0
        self._asking = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGCHLD)
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._before)

    def next(self) -> Batch:
        """The batch that was asked for first.

        Raises:
            DataError: a sample can't be loaded, or processes die again and again.
        """
        while True:
            try:
                self._asking = True
                torch._C._error_if_any_worker_fails()  # one may have died while nobody asked
                batch: Batch = next(self._made)
            except (
                RuntimeError,
                OSError,
                EOFError,
            ) as error:  # also of a tensor whose maker has died before it was here
                self._asking = False
                self._revive(error)
                continue
            finally:
                self._asking = False
            self._under_way.popleft()
            self._since += 1
            return batch

    def _start(self) -> None:
        again = list(self._under_way)
        loader = DataLoader(
            self._data,
            batch_sampler=itertools.chain(again, self._left),  # type: ignore[arg-type]  (any iterable of lists will do)
            num_workers=self._count,
            collate_fn=self._join,
            # The loader seeds its processes from a generator: without its own it would draw from the global one.
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=self._begin,
        )
        self._made: Any = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # Instead of torch's own, which raises wherever the main thread happens to be, also within an update.
            signal.signal(signal.SIGCHLD, self._died)

    def _died(self, number: int, frame: FrameType | None) -> None:
        if self._asking:
            torch._C._error_if_any_worker_fails()

    def _stop(self) -> None:
        for process in self._made._workers:
            process.kill()  # it may wait for a lock that a dead one held
        self._made._shutdown_workers()

    def _dead(self) -> list[tuple[int, int]]:
        """Processes that ended by themselves: number and status."""
        codes = [process.exitcode for process in self._made._workers]
        return [(number, code) for number, code in enumerate(codes) if code]

    def _revive(self, error: Exception) -> None:
        """Start all processes again, if one has died. Raises the error where none has, and DataError as `next`."""
        until = time.monotonic() + CERTAIN
        while not (dead := self._dead()):
            if time.monotonic() > until:
                raise error
            time.sleep(CERTAIN / 20)
        self._stop()
        self._row = 1 if self._since >= PASSED else self._row + 1
        self._since = 0
        number, code = dead[0]
        killed = signal.Signals(-code) if code < 0 else None
        how = f"ended with status {code}" if killed is None else f"was killed by {killed.name}"
        remedy = REMEDIES.get(killed, "look at what it printed") if killed is not None else "look at what it printed"
        what = f"loader process {number + 1} of {self._count} {how} ({remedy})"
        if self._row > RESTARTS:
            keys = [self._data.record(index).key for samples in self._under_way for _, index in samples]
            rows = ", ".join(f"{key.file} row {key.row}" for key in keys)
            raise DataError(
                f"{what}. Loader processes died {self._row} times in a row and got no further; they were at one of "
                f"these: {rows}. With machine.workers=0 the error comes up in the run itself"
            ) from error
        logger.warning("%s: they are started again and make the same batches (%d of %d)", what, self._row, RESTARTS)
        self._start()
