"""Being asked to stop: SIGTERM, or SIGUSR1 as SLURM's `--signal` sends it. The command ends with a status that says
that the same command continues.

While a stage trains, the signal is only noted: the update is finished, all processes agree on it, a checkpoint is
saved. At any other time all that there is to save is on the disk already, and `Stopped` is raised where the process is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

CONTINUE = 75
"""Exit status of a command that was asked to stop: "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

ECHO = 5.0
"""Seconds in which further signals count as the first: a launcher passes on what its processes were sent as well."""


class Stopped(BaseException):
    """This process was asked to stop; nothing is lost. No Exception: code that takes any error of a row, a file or a
    server for a fault of these must not take this for one."""


class _State:
    """Signals are the process's, so there is one."""

    asked: signal.Signals | None = None
    deferring = False
    watching = False


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _State.asked is not None


def told() -> str:
    """By which signal, for people. Another process's, where this one got none."""
    return "another process's signal" if _State.asked is None else _State.asked.name


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, SIGNALS raise `Stopped`, or are noted where a stage trains. One that comes later than `ECHO` seconds
    behind the first ends the process at once, also where it waits for others in a call that never returns to Python.

    Threads other than the main one can't have signals: there this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _State.asked = None
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _State.watching = True
    threading.Thread(target=_watch, args=(reader,), name="second signal", daemon=True).start()
    try:
        yield
    finally:
        _State.watching, _State.asked = False, None
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.shutdown(socket.SHUT_RDWR)  # not close alone: loader processes have inherited it
        writer.close()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal is only noted (`asked`).

    Raises:
        Stopped: it was, and the block has come to its end without stopping.
    """
    _State.deferring = True
    try:
        yield
    finally:
        _State.deferring = False
    if asked():
        raise Stopped(f"stopped by {told()}; the same command continues")


def _note(number: int, frame: FrameType | None) -> None:
    again = asked()
    _State.asked = _State.asked or signal.Signals(number)
    if not _State.deferring and not again:
        raise Stopped(f"stopped by {told()}; the same command continues")


def _watch(reader: socket.socket) -> None:
    """End the process at the second signal. A thread hears of signals (`set_wakeup_fd`) even where the main one is in a
    collective call and runs no handler."""
    first: float | None = None
    with reader:
        while heard := reader.recv(1):
            if heard[0] not in SIGNALS:
                continue
            now = time.monotonic()
            if first is not None and now - first > ECHO:
                os.write(2, b"stopped at once by a second signal; the same command continues\n")
                os._exit(128 + heard[0])
            first = now if first is None else first


def _in_child() -> None:
    """A forked process's signals are not its parent's."""
    if _State.watching:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_in_child)
