"""Runs recipes in forked children that die where they are told to: one import of torch for hundreds of kills.

Reads one JSON object a line from standard input: {recipe, directory, log, die_at, stop_at, stop_rank, group,
world, disable, overrides}; answers one line: {"statuses": [...]}. `die_at` is the number of the file operation or
optimiser step before which a child kills itself with SIGKILL; in its optimiser step `stop_at` process `stop_rank` sends
itself, or its `group`, SIGTERM. The server itself never runs autograd, which does not survive a fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
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

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
distilvlm.runs.expense.estimate = lambda *_, **__: []  # seconds per run, and no file of its own


class Deathbed:
    """Counts file operations and optimiser steps of this process, and kills it before a chosen one."""

    def __init__(self, die_at: int | None, log: Path, directory: Path) -> None:
        self.die_at, self.log, self.directory, self.count = die_at, log.open("a"), directory, 0
        for module, name in [(os, "replace"), (os, "rename"), (os, "fsync"), (os, "unlink"), (shutil, "rmtree")]:
            setattr(module, name, self._wrap(getattr(module, name), name))
        torch.optim.AdamW.step = self._wrap(torch.optim.AdamW.step, "step")  # type: ignore[method-assign]

    def _wrap(self, function: Any, name: str) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            label = self._label(name, arguments)
            self.count += 1
            if self.die_at == self.count:
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


def stop_in(step_number: int, group: bool) -> None:
    """Let this process be asked to stop while it makes an update."""
    step, steps = torch.optim.AdamW.step, [0]

    def stopped(self: torch.optim.AdamW, *arguments: Any) -> Any:
        steps[0] += 1
        if steps[0] == step_number:
            os.killpg(os.getpgrp(), signal.SIGTERM) if group else os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    torch.optim.AdamW.step = stopped  # type: ignore[method-assign]
    distilvlm.runs.execute.consult = lambda *_: None  # the doctor's own steps are not counted


def child(request: dict[str, Any], rank: int, port: int) -> None:
    world = request.get("world", 1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    Deathbed(request.get("die_at"), Path(request["log"] + str(rank)), Path(request["directory"]))
    if request.get("disable") == "loading":
        checkpoint.load_weights = lambda *_: None
    if request.get("group"):
        os.setpgrp()
    if request.get("stop_rank") == rank:
        stop_in(request["stop_at"], request.get("group", False))
    with interruptible() if "stop_at" in request else contextlib.nullcontext():
        distilvlm.runs.execute.run(request["recipe"], request.get("overrides", {}), request["directory"])
    if world > 1:
        torch.distributed.destroy_process_group()


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
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
        statuses = [os.waitpid(pid, 0)[1] for pid in children]
        sys.stdout.write(json.dumps({"statuses": statuses}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
