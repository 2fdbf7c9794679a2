"""What `distilvlm plan` says that a recipe takes, against what a few updates of each of its stages take.

    python benchmarks/estimates.py recipes/photos/distilled.yaml --teacher local cached remote
    python benchmarks/estimates.py recipe.yaml --tokens 512 --packing --set stages.0.optim.batch=4
    python benchmarks/estimates.py --runs runs/quickstart runs/photos

Every recipe runs once for each kind of teacher, with so many updates a stage, in a process and a directory of its own.
The estimate is the one that the run makes before its first step. Rows are of a stage's

* memory_bytes: its peak; of a process on a CPU the resident set, on a GPU what torch allocated there;
* seconds_per_update: the median without the first update, without what a server takes. One thread on a CPU is timed by
  the processor's clock, estimate and run alike, which does not count what others do meanwhile; more threads want the
  machine for themselves;
* disk_bytes: what the stage leaves in the run's directory;
* sent_bytes, received_bytes: bodies between the run and a server, per update; once_bytes: the teacher's head;

and of "(fill)", which is `distilvlm cache` for all stages: its memory, its seconds and the cache's bytes.

"cached" fills a cache that is thrown away; "remote" asks a `distilvlm teach` of the same teacher on loopback, and keeps
no vision features, which it could not be sent. "as it is" leaves the recipe's teacher alone. `--runs` reads what runs
that were made have noted instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measuring
import torch

import distilvlm
from distilvlm.cost import Meter, clock
from distilvlm.models.compose import build
from distilvlm.recipe import Recipe, load_recipe
from distilvlm.runs.caching import Filling
from distilvlm.runs.plan import plan
from distilvlm.runs.stage import StageRun
from distilvlm.teachers.remote import TeachingServer
from distilvlm.teachers.remote.connection import Ask, Connection
from distilvlm.train import loop

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "recipe", "teacher", "batching", "stage",
    "quantity", "estimated", "measured", "ratio",
]  # fmt: skip
QUANTITIES = {
    "peak_memory_bytes": "memory_bytes",
    "seconds_per_update": "seconds_per_update",
    "disk_bytes": "disk_bytes",
}
FILL = "(fill)"
Found = dict[str, dict[str, list[float | None]]]
"""Stage -> quantity -> [estimated, measured]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="directories below which runs have ended")
    parser.add_argument("--teacher", nargs="+", default=["as it is"], choices=["as it is", "local", "cached", "remote"])
    parser.add_argument("--updates", type=int, default=6, help="of every stage")
    parser.add_argument("--tokens", type=int, help="machine.tokens")
    parser.add_argument("--packing", action="store_true", help="machine.packing")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="as of distilvlm run")
    parser.add_argument("--child", nargs=3, metavar=("JOB", "OVERRIDES", "DIRECTORY"), help=argparse.SUPPRESS)
    measuring.arguments(parser, "estimates.csv")
    parser.set_defaults(repeats=1)
    options = parser.parse_args()
    about = measuring.prepare(options)
    if options.child:
        job, overrides, directory = options.child
        if about["clock"] == "cpu":
            for module in (clock, loop):
                module.time = SimpleNamespace(perf_counter=time.process_time)  # pyright: ignore
        JOBS[job](options.recipes[0], json.loads(overrides), Path(directory))
        return
    rows: list[dict[str, object]] = []
    for recipe in options.recipes:
        for teacher in options.teacher:
            found = middle([measured(recipe, teacher, options) for _ in range(options.repeats)])
            rows += shown(found, {**about, "recipe": recipe.stem, "teacher": teacher, "batching": batching(options)})
    for file in sorted(path for root in options.runs for path in root.rglob("cost.json")):
        name = "/".join(file.parts[-3:-1])
        rows += shown(
            noted(file), {**about, "clock": "wall", "recipe": name, "teacher": "as it is", "batching": "as it is"}
        )
    measuring.write(options, FIELDS, rows)
    ratios = [float(str(row["ratio"])) for row in rows]
    print(f"{sum(abs(ratio - 1) > 0.15 for ratio in ratios)} of {len(ratios)} are off by more than 15%")


def batching(options: argparse.Namespace) -> str:
    if options.tokens is None:
        return "packed" if options.packing else "as it is"
    return f"{options.tokens} positions" + (", packed" if options.packing else "")


def shown(found: Found, about: Mapping[str, object]) -> list[dict[str, object]]:
    """Rows of what is known on both sides, which are printed, too."""
    rows: list[dict[str, object]] = []
    for stage, quantities in found.items():
        for quantity, (expected, seen) in quantities.items():
            if expected is None or not seen:
                continue
            ratio = round(expected / seen, 3)
            row = {"stage": stage, "quantity": quantity, "estimated": expected, "measured": seen, "ratio": ratio}
            rows.append({**about, **row})
            print(*(rows[-1][name] for name in FIELDS[6:]), sep=", ", flush=True)
    return rows


def middle(runs: Sequence[Found]) -> Found:
    """Medians over runs of the same."""

    def median(stage: str, quantity: str, side: int) -> float | None:
        values = [run[stage][quantity][side] for run in runs]
        known = [value for value in values if value is not None]
        return statistics.median(known) if len(known) == len(values) else None

    return {
        stage: {name: [median(stage, name, side) for side in (0, 1)] for name in quantities}
        for stage, quantities in runs[0].items()
    }


def noted(file: Path) -> Found:
    """What a run's `cost.json` says."""
    return {
        entry["stage"]: {
            quantity: [entry["estimate"][name], (entry["measured"] or {}).get(name)]
            for name, quantity in QUANTITIES.items()
        }
        for entry in json.loads(file.read_text())["stages"]
    }


def measured(recipe: Path, teacher: str, options: argparse.Namespace) -> Found:
    """A recipe that runs in processes of its own."""
    with tempfile.TemporaryDirectory(prefix="estimates-") as name:
        place = Path(name)
        overrides = changes(load_recipe(recipe, options.set), teacher, place, options)
        if teacher != "remote":
            return _run(recipe, teacher, overrides, place, options)
        with serving(recipe, overrides, options) as url:
            return _run(recipe, teacher, [*overrides, f"teacher.remote.url={url}"], place, options)


def _run(recipe: Path, teacher: str, overrides: list[str], place: Path, options: argparse.Namespace) -> Found:
    filled: dict[str, float] = {}
    if teacher == "cached":
        _child("fill", recipe, overrides, place, options)
        filled = json.loads((place / "fill.json").read_text())
    _child("run", recipe, overrides, place, options)
    found = noted(place / "run" / "cost.json")
    if filled:
        costs = json.loads((place / "run" / "cost.json").read_text())["stages"]
        looks = [stage["look"] for stage in costs if stage["look"] is not None]
        found[FILL] = {
            "memory_bytes": [max(look["peak_memory_bytes"] for look in looks), filled["memory"]],
            "seconds": [sum(look["seconds"] for look in looks), filled["seconds"]],
            "disk_bytes": [sum(look["disk_bytes"] for look in looks), filled["disk"]],
        }
    for stage, quantities in json.loads((place / "network.json").read_text()).items():
        found[stage] |= quantities
    return found


def changes(recipe: Recipe, teacher: str, place: Path, options: argparse.Namespace) -> list[str]:
    """Overrides of a recipe for a few updates of each stage, and for where its teacher is."""
    found = [*options.set, "machine.trackers=[]"]
    for number in range(len(recipe.stages)):
        found += [f"stages.{number}.optim.epochs=null", f"stages.{number}.optim.updates={options.updates}"]
    if options.tokens is not None:
        found.append(f"machine.tokens={options.tokens}")
    if options.packing:
        found.append("machine.packing=true")
    if teacher != "as it is":
        found.append(f"teacher.kind={teacher}")
    if teacher == "cached":
        found.append(f"teacher.keep.path={place / 'cache'}")
    if teacher == "remote":
        found += ["teacher.remote.protocol=distilvlm", "pictures.features=null"]
    return found


@contextmanager
def serving(recipe: Path, overrides: Sequence[str], options: argparse.Namespace) -> Iterator[str]:
    """The recipe's teacher behind HTTP in a process of its own; its address."""
    local = [*overrides, "teacher.kind=local", "teacher.remote=null"]
    local.remove("teacher.kind=remote")
    local.remove("teacher.remote.protocol=distilvlm")
    server = subprocess.Popen(_command("serve", recipe, local, Path(), options), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            raise SystemExit(f"{recipe}: its teacher can't be served; what is above says why")
        yield url
    finally:
        server.terminate()
        server.wait()


def _child(job: str, recipe: Path, overrides: list[str], place: Path, options: argparse.Namespace) -> None:
    subprocess.run(_command(job, recipe, overrides, place, options), check=True, stdout=sys.stderr)


def _command(job: str, recipe: Path, overrides: Sequence[str], place: Path, options: argparse.Namespace) -> list[str]:
    child = ["--child", job, json.dumps(list(overrides)), str(place)]
    return [
        sys.executable,
        __file__,
        str(recipe),
        *child,
        "--threads",
        str(options.threads),
        "--device",
        options.device,
    ]


def serve(recipe: Path, overrides: list[str], _: Path) -> None:
    """As `distilvlm teach`, which serves a directory; this one serves what a recipe names, random models included."""
    spec = load_recipe(recipe, overrides)
    assert spec.teacher is not None, "the recipe has no teacher"
    dtype = torch.bfloat16 if spec.teacher.held == "bf16" else torch.float32
    place = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    vlm = build(spec.teacher, spec.seed, dtype=dtype).to(place or torch.device("cpu"))
    server = TeachingServer(vlm, recipe.stem, ("127.0.0.1", 0), None, 1 << 30)
    print(server.url, flush=True)
    server.serve()


def fill(recipe: Path, overrides: list[str], place: Path) -> None:
    """As `distilvlm cache`; seconds are those of looking at records, without comparing it with micro-batches."""
    done = 0.0

    def progress(*_: object) -> None:
        nonlocal done
        done = clock.time.perf_counter()

    with Meter(torch.accelerator.current_accelerator() or "cpu") as meter:
        filling = Filling(recipe, overrides)
        began = clock.time.perf_counter()
        filling.fill(progress=progress)
    cache = Path(load_recipe(recipe, overrides).teacher.keep.path)  # pyright: ignore
    disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    seen = {"memory": meter.measured().peak_memory_bytes, "seconds": done - began, "disk": disk}
    (place / "fill.json").write_text(json.dumps(seen))


def run(recipe: Path, overrides: list[str], place: Path) -> None:
    """The run, and what went over the network in each of its stages."""
    asked: dict[str, list[int]] = {}
    once = [0]
    execute, ask = StageRun.execute, Connection.ask
    stage = ""

    def executed(self: StageRun, *arguments: Any, **others: Any) -> None:
        nonlocal stage
        stage = self.stage.name
        execute(self, *arguments, **others)

    def counted(self: Connection, asks: Sequence[Ask]) -> list[bytes]:
        answers = ask(self, asks)
        for one, answer in zip(asks, answers, strict=True):
            if one.path == "/v1/head":
                once[0] = len(answer)
            elif one.body is not None and stage:
                sent, received = asked.get(stage, [0, 0])
                asked[stage] = [sent + len(one.body), received + len(answer)]
        return answers

    StageRun.execute, Connection.ask = executed, counted
    distilvlm.run(recipe, overrides, place / "run")
    found: Found = {}
    spec = load_recipe(recipe, overrides)
    for one in plan(spec).stages if asked else ():
        if one.network is not None and one.name in asked and one.updates:
            sent, received = (count / one.updates for count in asked[one.name])
            found[one.name] = {
                "sent_bytes": [one.network.sent, sent],
                "received_bytes": [one.network.received, received],
                "once_bytes": [one.network.once, once[0]],
            }
    (place / "network.json").write_text(json.dumps(found))


JOBS = {"serve": serve, "fill": fill, "run": run}

if __name__ == "__main__":
    main()
