"""An epoch of encoder distillation whose teachers see every picture, against one that reads what they saw from disk.

    distilvlm prepare dinov2-small efficientnet-lite2 tinyvit-5m mobilenetv2 --out weights
    python benchmarks/encoder_cache.py --weights weights --pictures DIRECTORY

Student and anchor are DINOv2-S; teachers are those of `recipes/move-kd-small.yaml`. Both epochs are runs of the same
recipe with the same samples, but for `cache`; an epoch is the sum of its updates without the first, which warms up.
Target: from the cache at most 0.3 times the time with teachers. What filling the cache takes is a row of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measuring

from distilvlm.recipe import Recipe
from distilvlm.runs import expense
from distilvlm.runs.caching import Filling
from distilvlm.runs.events import read_events
from distilvlm.runs.execute import run
from distilvlm.train import loop

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "size", "pictures", "trains", "experts", "what",
    "seconds", "to_teachers", "bytes_per_picture", "note",
]  # fmt: skip
TRAINED = {"experts": ["vision.experts", "vision.router", "adapters"], "all": ["vision", "adapters"]}


def recipe(options: argparse.Namespace, trains: str, cache: Path | None) -> Recipe:
    weights = options.weights.absolute()
    content: dict[str, Any] = {
        "name": "encoder-cache",
        "student": {"vision": {"from": str(weights / "dinov2-small"), "size": options.size}},
        "encoders": {
            "anchor": {},
            "efficientnet": {"from": str(weights / "efficientnet-lite2"), "size": options.teacher_size},
            "tinyvit": {"from": str(weights / "tinyvit-5m"), "size": options.teacher_size},
            "mobilenet": {"from": str(weights / "mobilenetv2"), "size": options.teacher_size},
        },
        "data": {"pictures": {"path": str(options.pictures.absolute()), "take": options.take}},
        "stages": [
            {
                "name": "distil",
                "transform": [{"do": "mix", "experts": options.experts, "rank": 8}],
                "train": TRAINED[trains],
                "data": ["pictures"],
                "loss": {"text": 0.0, "encoder": 1.0, "expert_balance": 0.01 if options.experts > 1 else 0.0},
                "optim": {"lr": 1e-3, "batch": 16, "epochs": 1},
            }
        ],
        "machine": {"micro_batch": 16, "checkpoint_every": 10_000, "workers": options.workers},
    }
    if cache is not None:
        content["cache"] = {"path": str(cache), "precision": "bf16"}
    return Recipe.model_validate(content)


def epoch(of: Recipe, place: Path) -> float:
    """Seconds of the updates but for the first."""
    run(of, directory=place)
    taken = [event["seconds"] for event in read_events(place / "events.jsonl") if event["event"] == "update"]
    return sum(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="directory that `distilvlm prepare` wrote to")
    parser.add_argument("--pictures", type=Path, required=True, help="directory of pictures")
    parser.add_argument("--take", type=int, default=160, help="pictures of an epoch")
    parser.add_argument("--size", type=int, default=98, help="of the student's pictures")
    parser.add_argument("--teacher-size", type=int, help="of the teachers' pictures; default: each its own")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--trains", nargs="+", choices=list(TRAINED), default=["experts"])
    measuring.arguments(parser, "encoder_cache.csv")
    options = parser.parse_args()
    common = measuring.prepare(options)
    if common["clock"] == "cpu":  # what others do meanwhile does not count
        loop.time = SimpleNamespace(perf_counter=time.process_time)  # pyright: ignore
    now = time.process_time if common["clock"] == "cpu" else time.perf_counter
    expense.estimate = lambda *_, **__: []  # of no interest here, and seconds long
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        began = now()
        filling = Filling(recipe(options, options.trains[0], place / "cache"))
        filling.fill()
        filled = now() - began
        size = sum(file.stat().st_size for file in (place / "cache").rglob("*.safetensors")) / len(filling.pictures)
        for trains in options.trains:
            facts = common | {"size": f"{options.size}/{options.teacher_size or 'own'}", "trains": trains}
            facts |= {"pictures": len(filling.pictures), "experts": options.experts}
            online = [
                epoch(recipe(options, trains, None), place / f"{trains}-online{n}") for n in range(options.repeats)
            ]
            kept = [
                epoch(recipe(options, trains, place / "cache"), place / f"{trains}-kept{n}")
                for n in range(options.repeats)
            ]
            for what, seconds, note in (
                ("teachers", min(online), "an epoch"),
                ("cache", min(kept), "an epoch"),
                ("filling", filled, "once, hashes of teachers and pictures included"),
            ):
                row = {**facts, "what": what, "seconds": round(seconds, 2), "note": note}
                row |= {"to_teachers": round(seconds / min(online), 3), "bytes_per_picture": round(size)}
                rows.append(row)
                print(f"{trains:8} {what:9} {seconds:8.1f} s  {seconds / min(online):.2f}×")
    measuring.write(options, FIELDS, rows)


if __name__ == "__main__":
    main()
