"""What kills and failing disks cost a run: nothing but the time since its last checkpoint.

    python benchmarks/chaos.py                      # 100 kills of a run of one process
    python benchmarks/chaos.py --processes 2        # of one of two processes, or of their launcher
    python benchmarks/chaos.py --writes             # every write of a run fails, one after the other, in three ways

**Kills.** A three-stage run over tiny random models (the one of the tests) gets SIGKILL at random moments, again and
again, until it ends; then the next run begins, until there were enough kills. Of several processes a random one is
killed, or the launcher, which leaves them behind: the next start is refused until they are gone. The finished weights
must be those of an undisturbed run, bit for bit, and the directory must have the same files; after a kill there may be
one checkpoint more than `machine.keep`. "seconds lost" of a kill are the seconds from start to kill without the updates
that were saved in them, at the pace of the undisturbed run; "updates again" are those that were made and not saved.

**Writes.** A run of two updates with a checkpoint between them; its n-th write (open, write, fsync, rename, mkdir, a
file of safetensors) fails half-way as on a full disk, alone ("once") or with all that follow ("full"), or the process
is killed in it ("kill"). Then the directory must load, the same command must end with the same bits, and nothing may be
left over.

Processes are forked from one that has imported torch, and has neither run autograd nor started threads: so a start
takes a tenth of a second and not six. `--torchrun` starts them as a user does.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import measuring
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.runs.conftest import Server, weights
from tests.runs.test_failing_writes import check, write_small
from tests.runs.tiny import write_recipe

EARLY = 0.6
"""A kill comes in this first part of the time that an undisturbed run takes, so that a run has several."""

UPDATES, EVERY, KEEP = 20, 4, 2
"""Of each stage: updates, updates between checkpoints, checkpoints kept."""

COMMON = ["date", "machine", "torch", "transformers"]
KILLS = [
    *COMMON, "processes", "start", "seed", "kills", "of_launcher", "refused", "runs", "bit_equal", "left_over",
    "updates_again_mean", "updates_again_max", "seconds_lost_mean", "seconds_lost_max", "seconds_per_update",
    "seconds_undisturbed", "seconds",
]  # fmt: skip
WRITES = [*COMMON, "how", "writes", "stopped", "bit_equal", "seconds"]


def recipe_of(directory: Path) -> Path:
    """The tests' three stages, longer."""
    path = write_recipe(directory, rows=24)
    text = path.read_text().replace("epochs: 2", f"updates: {UPDATES}")
    path.write_text(text.replace("checkpoint_every: 2", f"checkpoint_every: {EVERY}\n  keep: {KEEP}"))
    return path


def saved(run: Path) -> int:
    """Updates, over all stages, that a continued run would not make again."""
    finals = list(run.glob("stages/*/final"))
    newest = max((int(place.name) for place in run.glob("stages/*/checkpoints/[0-9]*")), default=0)
    return len(finals) * UPDATES + (newest if len(finals) < 3 else 0)


def made(run: Path) -> int:
    file = run / "events.jsonl"
    return file.read_bytes().count(b'"event": "update"') if file.exists() else 0


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


class Forked:
    """Starts runs in forks of a warm process."""

    def __init__(self, server: Server, recipe: Path, processes: int) -> None:
        self.server, self.recipe, self.processes = server, recipe, processes

    def start(self, run: Path, after: float, whom: int) -> tuple[bool, bool, str]:
        """Whether it was killed, whether it ended well, and what it said."""
        statuses, _ = self.server.run(self.recipe, run, world=self.processes, kill_after=after, whom=whom)
        return self.server.killed, not any(statuses), self.server.errors()


class Torchrun:
    """Starts runs as a user does, with everything that a start takes."""

    def __init__(self, recipe: Path, processes: int) -> None:
        self.recipe, self.processes = recipe, processes

    def start(self, run: Path, after: float, whom: int) -> tuple[bool, bool, str]:
        there = Path(sys.executable).parent
        command = [str(there / "torchrun"), "--standalone", "--nproc-per-node", str(self.processes)]
        command += ["--no-python", str(there / "distilvlm"), "run", str(self.recipe), "--dir", str(run)]
        with tempfile.TemporaryFile("w+") as told:
            launcher = subprocess.Popen(command, stdout=told, stderr=told)
            try:
                status = launcher.wait(after)
                hit = False
            except subprocess.TimeoutExpired:
                ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
                os.kill(launcher.pid if whom < 0 or whom >= len(ranks) else int(ranks[whom]), signal.SIGKILL)
                status, hit = launcher.wait(), True
            told.seek(0)
            return hit, status == 0, told.read()


@dataclass
class Tally:
    kills: int = 0
    of_launcher: int = 0
    refused: int = 0
    again: list[int] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)


def finish(
    start: Forked | Torchrun, run: Path, wanted: int, span: float, pace: float, draw: random.Random, tally: Tally
):
    """Start a run and kill it until it ends, or there were enough kills: then it is left to end."""
    while True:
        before, last = saved(run), tally.kills >= wanted
        ranks: list[int] = [*range(start.processes), *([-1] if start.processes > 1 else [])]
        whom = draw.choice(ranks)
        after = 3600.0 if last else draw.uniform(0, EARLY * span)
        began = time.monotonic()
        hit, well, told = start.start(run, after, whom)
        seconds = time.monotonic() - began
        if well:
            return
        if not hit:
            if "is in use by process" not in told:
                raise SystemExit(f"a run failed by itself:\n{told[-4000:]}")
            tally.refused += 1
            time.sleep(0.5)
            continue
        tally.kills += 1
        tally.of_launcher += whom < 0
        after_kill = saved(run)
        tally.again.append(max(0, made(run) - after_kill))
        tally.lost.append(max(0.0, min(seconds, after) - (after_kill - before) * pace))
        most = max((len(list(place.glob("[0-9]*"))) for place in run.glob("stages/*/checkpoints")), default=0)
        if most > KEEP + 1:
            raise SystemExit(f"{run}: {most} checkpoints after a kill")


def kills(options: argparse.Namespace, directory: Path, server: Server) -> dict[str, object]:
    recipe, draw, tally = recipe_of(directory), random.Random(options.seed), Tally()
    start = Torchrun(recipe, options.processes) if options.torchrun else Forked(server, recipe, options.processes)
    whole = directory / "undisturbed"
    finish(start, directory / "first", 0, 0.0, 0.0, draw, tally)  # imports what is imported late
    began = time.monotonic()
    finish(start, whole, 0, 0.0, 0.0, draw, tally)
    span = time.monotonic() - began
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    pace = statistics.mean(event["seconds"] for event in events if event["event"] == "update")
    expected, there = weights(whole), files(whole)
    runs = equal = left = 0
    began = time.monotonic()
    while tally.kills < options.kills:
        run = directory / f"run-{runs}"
        finish(start, run, options.kills, span, pace, draw, tally)
        found = weights(run)
        runs += 1
        equal += found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        left += len(files(run) ^ there)
        print(
            f"{tally.kills} kills, {runs} runs, {equal} of them bit-equal, {left} files too many or too few", flush=True
        )
    return {
        "processes": options.processes,
        "start": "torchrun" if options.torchrun else "forked",
        "seed": options.seed,
        "kills": tally.kills,
        "of_launcher": tally.of_launcher,
        "refused": tally.refused,
        "runs": runs,
        "bit_equal": equal,
        "left_over": left,
        "updates_again_mean": round(statistics.mean(tally.again), 2),
        "updates_again_max": max(tally.again),
        "seconds_lost_mean": round(statistics.mean(tally.lost), 2),
        "seconds_lost_max": round(max(tally.lost), 2),
        "seconds_per_update": round(pace, 3),
        "seconds_undisturbed": round(span, 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def writes(options: argparse.Namespace, directory: Path, server: Server) -> list[dict[str, object]]:
    recipe = write_small(directory)
    count = len(server.finish(recipe, directory / "undisturbed", how="once"))
    expected = weights(directory / "undisturbed")
    rows: list[dict[str, object]] = []
    for how in options.how:
        began, stopped = time.monotonic(), 0
        for number in range(1, count + 1, options.every):
            run = directory / f"{how}-{number}"
            stopped += check(server, recipe, run, number, how, expected)
            subprocess.run(["rm", "-r", str(run)], check=True)
        tried = len(range(1, count + 1, options.every))
        seconds = round(time.monotonic() - began, 1)
        rows.append({"how": how, "writes": tried, "stopped": stopped, "bit_equal": tried, "seconds": seconds})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--torchrun", action="store_true", help="start as a user does instead of forking")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writes", action="store_true", help="let writes fail instead")
    parser.add_argument("--how", nargs="+", choices=("once", "full", "kill"), default=("once", "full", "kill"))
    parser.add_argument("--every", type=int, default=1, help="of the writes, try one in so many")
    parser.add_argument("--remark", default="", help="stands behind the machine's name, e.g. what else it was doing")
    parser.add_argument("--append", action="store_true", help="add rows to the file instead of replacing it")
    parser.add_argument("--output", type=Path, help="default: results/chaos.csv, or chaos_writes.csv")
    options = parser.parse_args()
    if options.output is None:
        options.output = Path(__file__).parent / "results" / ("chaos_writes.csv" if options.writes else "chaos.csv")
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": measuring.machine() + (f"; {options.remark}" if options.remark else ""),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "server").mkdir()
        server = Server(Path(work) / "server")
        try:
            found = writes(options, Path(work), server) if options.writes else [kills(options, Path(work), server)]
        finally:
            server.close()
    measuring.write(options, WRITES if options.writes else KILLS, [{**about, **row} for row in found])
    print(*found, sep="\n")


if __name__ == "__main__":
    main()
