"""Processes that train together watch each other: one that is gone or stands still is named, and the others end.

A collective call that waits for a process tells nothing but that it waited, and over NCCL the whole process is aborted.
So a thread of each process notes in the store at which they met (a TCPStore) where its main thread is, and reads where
the others are. Times are told as seconds since, by each process's own monotonic clock: clocks of machines are never
compared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import distributed

logger = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between two notes."""

MISSED = 3
"""Notes that a process may miss before it is taken for gone; it may have been busy or swapped out."""

MARGIN = 60.0
"""Seconds that collective calls wait longer than processes watch each other: the watch has more to say."""

_meetings = itertools.count()


class PeerError(RuntimeError):
    """Another process is gone, or has stopped: what this one waits for will not come."""


@dataclass
class _Peer:
    """What this process knows of another."""

    note: dict[str, Any]
    heard: float  # when the note was another one than before, by this process's clock
    gone: str | None = None  # why it left


class Peers:
    """Watches the other processes inside a `with` block; alone, it does nothing.

    Args:
        timeout: seconds that a process may stand still.
        where: a number that changes when this process gets on, and where it is in words.
        end: what ends this process where its main thread does not come back.

    Raises (leaving the block):
        PeerError: instead of a collective call's own error, where another process is the reason.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        timeout: float,
        where: Callable[[], tuple[int, str]],
        end: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self._me, self._world = accelerator.process_index, accelerator.num_processes
        self._timeout, self._where, self._end = timeout, where, end
        self._beat = min(BEAT, timeout / 5)
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._others: dict[int, _Peer] = {}
        self._moves, self._moved, self._notes = -1, time.monotonic(), 0
        self._lost: str | None = None  # why the store can't be asked any more

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        if self._world == 1:
            yield
            return
        meeting = next(_meetings)
        self._store = distributed.PrefixStore(f"distilvlm/peers/{meeting}", self._connected())
        self._exchange()
        thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            self._over.set()
            thread.join()
            reason = self._reason(error)
            self._leave(str(reason or error) or type(error).__name__)
            if reason is not None:
                raise PeerError(reason) from error
            raise
        self._over.set()
        thread.join()
        self._leave("")

    def _connected(self) -> Any:
        """A store of this thread alone, where all met: calls of one store wait for each other.

        Raises:
            PeerError: nobody answers there; a launcher that was killed had the store, and left its processes behind.
        """
        everybodys: Any = distributed.distributed_c10d._get_default_store()
        before = everybodys.timeout
        everybodys.set_timeout(timedelta(seconds=max(1.0, self._grace)))  # of connecting, too
        try:
            ours = everybodys.clone()
        except RuntimeError as error:
            self._lost = str(error).splitlines()[0]
            raise PeerError(self._told()) from error
        finally:
            everybodys.set_timeout(before)
        ours.set_timeout(timedelta(seconds=max(1.0, self._beat)))
        return ours

    def _watch(self) -> None:
        while not self._over.wait(self._beat):
            self._exchange()
            if (why := self._verdict()) is not None and not self._over.is_set():
                logger.error("%s", why)
                logging.shutdown()
                sys.stderr.flush()
                self._end()
                return

    def _exchange(self) -> None:
        """Note where this process is; read where the others are."""
        now = time.monotonic()
        moves, place = self._where()
        if moves != self._moves:
            self._moves, self._moved = moves, now
        self._notes += 1
        still = now - self._moved
        note = {"note": self._notes, "place": place, "still": still}
        note["code"] = _code(self._main) if still > self._beat else None
        try:
            self._store.set(str(self._me), json.dumps(note))
            for rank in range(self._world):
                if rank == self._me:
                    continue
                if self._store.check([str(rank)]):
                    found = json.loads(self._store.get(str(rank)))
                    if rank not in self._others or self._others[rank].note["note"] != found["note"]:
                        self._others[rank] = _Peer(found, now)
                    if self._store.check([f"{rank}/left"]):
                        self._others[rank].gone = self._store.get(f"{rank}/left").decode()
                else:  # it has yet to come
                    self._others.setdefault(rank, _Peer({"note": 0, "place": "has not begun", "still": 0.0}, now))
            self._lost = None
        except RuntimeError as error:
            self._lost = self._lost or str(error).splitlines()[0]

    def _verdict(self) -> str | None:
        """Why this process should end, whose main thread waits for something that will not come."""
        still = time.monotonic() - self._moved
        if still > self._timeout:
            own = f"process {self._me} of {self._world} stands still for {still:.0f} s at {self._where()[1]}"
            return f"{own}.\n{self._told()}"
        if still > self._grace and (self._lost is not None or self._absent()):
            return self._told()
        return None

    @property
    def _grace(self) -> float:
        """Seconds after which a process that does not answer is taken for gone."""
        return self._beat * MISSED

    def _absent(self) -> list[int]:
        """Processes that are gone, or left because of an error."""
        now = time.monotonic()
        return [
            rank
            for rank, one in self._others.items()
            if one.gone or (one.gone is None and now - one.heard > self._grace)
        ]

    def _reason(self, error: BaseException) -> str | None:
        """What another process has to do with an error of this one; waits until it is certain."""
        if type(error) is not RuntimeError and not isinstance(error, distributed.DistError):
            return None
        until = time.monotonic() + self._grace + 2 * self._beat
        while time.monotonic() < until:
            self._exchange()
            if self._lost is not None or self._absent():
                return self._told()
            time.sleep(self._beat / 2)
        return None

    def _told(self) -> str:
        """The others one by one, the one that stands still for longest first, and what to do."""
        now, lines = time.monotonic(), list[tuple[float, str]]()
        absent = self._absent()
        for rank, one in self._others.items():
            who, place = f"process {rank} of {self._world}", one.note["place"]
            still = one.note["still"] + now - one.heard
            if one.gone:
                lines.append((float("inf"), f"  {who} stopped at {place}: {one.gone}"))
            elif rank in absent:
                lines.append(
                    (
                        1e9 + still,
                        f"  {who} is gone: nothing was heard of it for {now - one.heard:.0f} s; then it was at {place}",
                    )
                )
            elif one.gone is None and still > self._beat:
                code = f" ({one.note['code']})" if one.note.get("code") else ""
                lines.append((still, f"  {who} stands still for {still:.0f} s at {place}{code}"))
        lines.sort(key=lambda line: -line[0])
        if self._lost is not None:
            lines.append((0.0, f"  where processes meet does not answer (process 0, or the launcher): {self._lost}"))
        if not lines:
            lines.append((0.0, f"  the others go on; this one is at {_code(self._main)}"))
        return "\n".join(
            [
                "processes that train together have lost each other:",
                *(line for _, line in lines),
                "→ the run is at its last checkpoint: the same command continues. A process that is gone was killed "
                "(dmesg, the job's log) or lost its machine or network; one that stands still longer than the others "
                "is what they wait for. If it only was slow, raise machine.timeout",
            ]
        )

    def _leave(self, why: str) -> None:
        with contextlib.suppress(RuntimeError):  # nobody is left to be told
            self._store.set(f"{self._me}/left", why[:2000])


def _code(thread: int) -> str:
    """Where a thread is in this package's code."""
    frame, here = sys._current_frames().get(thread), Path(__file__).parents[1]
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(here):
        frame = frame.f_back
    if frame is None:
        return "code of others"
    return f"{Path(frame.f_code.co_filename).relative_to(here)}, line {frame.f_lineno}, {frame.f_code.co_name}"
