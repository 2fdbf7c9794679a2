"""Runs recipes in forked children that die where they are told to: one import of torch for hundreds of kills.

Reads one JSON object a line from standard input: {recipe, directory, log, world, overrides, disable}, and how it shall
go wrong; answers one line: {"statuses": [...], "killed": ...}.

* `die_at`: the number of the file operation or optimiser step before which a child kills itself with SIGKILL;
  `die_before`: the kind of the first one.
* `stop_at`, `stop_rank`, `group`: in update `stop_at` process `stop_rank` sends itself, or its group, SIGTERM.
* `how`, `fail_at`: writes are counted instead, and `fail_at` fails that way (writes.py).
* `prelude`: Python that a child runs first, and knows its `rank`.
* `kill_after`, `whom`: after so many seconds a process, or the launcher, is killed.

The server itself never runs autograd, which does not survive a fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
import typer

import distilvlm.runs.execute
import distilvlm.runs.expense
from distilvlm.cli.options import interruptible
from distilvlm.runs import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.runs.operations import kind_of
from tests.runs.writes import Writes

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
distilvlm.runs.expense.estimate = lambda *_, **__: []  # seconds per run, and no file of its own


class Deathbed:
    """Counts file operations and optimiser steps of this process, and kills it before a chosen one."""

    def __init__(self, die_at: int | None, die_before: str | None, log: Path, directory: Path) -> None:
        self.die_at, self.die_before, self.log, self.directory = die_at, die_before, log.open("a"), directory
        self.count = 0
        for module, name in [(os, "replace"), (os, "rename"), (os, "fsync"), (os, "unlink"), (shutil, "rmtree")]:
            setattr(module, name, self._wrap(getattr(module, name), name))
        torch.optim.AdamW.step = self._wrap(torch.optim.AdamW.step, "step")  # type: ignore[method-assign]

    def _wrap(self, function: Any, name: str) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            label = self._label(name, arguments)
            self.count += 1
            if self.die_at == self.count or self.die_before == kind_of(label):
                os.kill(os.getpid(), signal.SIGKILL)
            print(label, file=self.log, flush=True)
            return function(*arguments, **options)

        return counted

    def _label(self, name: str, arguments: tuple[Any, ...]) -> str:
        if name == "step":
            return "step"
        target = arguments[-1] if name in ("replace", "rename") else arguments[0]
        if isinstance(target, int):
            target = Path(f"/proc/self/fd/{target}").readlink()
        tail = str(target).removeprefix(str(self.directory))
        while ".partial-" in tail:  # random names
            start = tail.index(".partial-")
            tail = tail[:start] + "partial:" + tail[start + 9 + 13 :]
        return f"{name} {tail}"


def stop_in(update: int, group: bool) -> None:
    """Let this process be asked to stop while it makes an update."""
    zero_grad, begun = torch.optim.AdamW.zero_grad, [0]  # what an update begins with

    def stopped(self: torch.optim.AdamW, **options: bool) -> None:
        begun[0] += 1
        if begun[0] == update:
            os.killpg(os.getpgrp(), signal.SIGTERM) if group else os.kill(os.getpid(), signal.SIGTERM)
        zero_grad(self, **options)

    torch.optim.AdamW.zero_grad = stopped  # type: ignore[method-assign]
    distilvlm.runs.execute.consult = lambda *_: None  # the doctor's own steps are not counted


def child(request: dict[str, Any], rank: int, port: int) -> None:
    world = request.get("world", 1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log, directory = Path(request["log"] + str(rank)), Path(request["directory"])
    if "how" in request:
        Writes(directory, request.get("fail_at"), request["how"], log)
    else:
        Deathbed(request.get("die_at"), request.get("die_before"), log, directory)
    if request.get("disable") == "loading":
        checkpoint.load_weights = lambda *_: None
    if request.get("group"):
        os.setpgrp()
    if request.get("stop_rank") == rank:
        stop_in(request["stop_at"], request.get("group", False))
    exec(request.get("prelude", ""), {"rank": rank})
    with interruptible() if "stop_at" in request else contextlib.nullcontext():
        distilvlm.runs.execute.run(request["recipe"], request.get("overrides", {}), request["directory"])
    if world > 1:
        torch.distributed.destroy_process_group()


def fork(request: dict[str, Any], port: int) -> list[int]:
    """Start the processes of a run; their ids."""
    children = []
    for rank in range(request.get("world", 1)):
        pid = os.fork()
        if pid == 0:
            os.dup2(2, 1)  # nothing but answers goes to standard output
            try:
                child(request, rank, port)
            except typer.Exit as ended:
                os._exit(ended.exit_code)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    return children


def launch(request: dict[str, Any], port: int) -> int:
    """Start the processes of a run under a launcher, which ends all when one fails, as torchrun does; returns its id.
    When it is killed itself, they are not."""
    place = Path(request["log"] + "pids")
    place.unlink(missing_ok=True)
    launcher = os.fork()
    if launcher:
        while not place.exists():
            time.sleep(0.001)
        return launcher
    left = fork(request, port)
    place.with_suffix(".new").write_text(" ".join(map(str, left)))
    place.with_suffix(".new").rename(place)
    failed = False
    while left:
        pid, status = os.wait()
        left.remove(pid)
        if status and not failed:
            failed = True
            for other in left:
                os.kill(other, signal.SIGTERM)
    os._exit(int(failed))


def killed(request: dict[str, Any], port: int) -> tuple[list[int], bool]:
    """Kill a process (of a rank, or -1: the launcher) of a run after some seconds; the launcher's status, and whether
    the run was still there then."""
    launcher = launch(request, port)
    pids = [int(pid) for pid in Path(request["log"] + "pids").read_text().split()]
    end = time.monotonic() + request["kill_after"]
    while time.monotonic() < end:
        ended, status = os.waitpid(launcher, os.WNOHANG)
        if ended:
            return [status], False
        time.sleep(0.002)
    try:
        os.kill(launcher if request["whom"] < 0 else pids[request["whom"]], signal.SIGKILL)
        hit = True
    except ProcessLookupError:  # it has just ended
        hit = False
    return [os.waitpid(launcher, 0)[1]], hit


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        hit = False
        if "kill_after" in request:
            statuses, hit = killed(request, port)
        else:
            statuses = [os.waitpid(pid, 0)[1] for pid in fork(request, port)]
        sys.stdout.write(json.dumps({"statuses": statuses, "killed": hit}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
