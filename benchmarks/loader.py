"""Pictures a second that one loader process makes, and the share of a step that is spent waiting for them.

    scripts/iaa-small   # which leaves weights and data
    PHOTOS=DATA python benchmarks/loader.py recipes/iaa-small/align.yaml --set pictures.features=null

Takes the first stage of a recipe whose data is here; without kept features, or there is nothing to decode. "decoded":
its samples are loaded one by one, as a loader process does it: decoded, put on the canvas, tokens made. The other
rows train the stage for so many updates with so many loader processes: seconds of the updates but for the first, and
of these the ones in which no micro-batch was ready. Target: less than 2% with workers. On a machine whose cores all
train, loader processes take what they need from the training.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import measuring
import torch

from distilvlm.data.stage import source_of, stage_data, stage_order
from distilvlm.models.compose import build
from distilvlm.recipe import Recipe, load_recipe
from distilvlm.runs import expense
from distilvlm.runs.events import read_events
from distilvlm.runs.execute import run

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "recipe", "stage", "size", "what", "workers", "samples",
    "pictures", "seconds", "pictures_per_second", "wait", "wait_share",
]  # fmt: skip


def loaded(recipe: Recipe, updates: int) -> dict[str, object]:
    """What loading the samples of some updates takes in one process."""
    stage = recipe.stages[0]
    student = build(recipe.student, recipe.seed)
    sources = [source_of(recipe, stage, name) for name in stage.data]
    data = stage_data(recipe, stage, student.tokenizer, student.layout, sources)
    order = stage_order(recipe, 0, data)
    wanted = [at for number in range(updates) for at in order.update(number)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    began = time.perf_counter()
    pictures = sum(0 if sample.pictures is None else len(sample.pictures) for sample in map(data.__getitem__, wanted))
    seconds = time.perf_counter() - began
    torch.set_num_threads(threads)
    return {
        "size": student.layout.size,
        "what": "decoded",
        "workers": "",
        "samples": len(wanted),
        "pictures": pictures,
        "seconds": round(seconds, 3),
        "pictures_per_second": round(pictures / seconds, 1),
    }


def trained(recipe: Recipe, workers: int, size: object) -> dict[str, object]:
    """What the updates of the stage take, and how long they wait."""
    recipe = recipe.model_copy(update={"machine": recipe.machine.model_copy(update={"workers": workers})})
    with tempfile.TemporaryDirectory() as directory:
        run(recipe, directory=directory)
        events = [event for event in read_events(Path(directory) / "events.jsonl") if event["event"] == "update"][1:]
    seconds, wait = (sum(event[name] for event in events) for name in ("seconds", "wait"))
    return {
        "size": size,
        "what": "trained",
        "workers": workers,
        "samples": sum(event["samples"] for event in events),
        "seconds": round(seconds, 3),
        "wait": round(wait, 3),
        "wait_share": round(wait / seconds, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="as `distilvlm run --set`")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes")
    parser.add_argument("--updates", type=int, default=10, help="that are timed, behind one that warms up")
    measuring.arguments(parser, "loader.csv")
    options = parser.parse_args()
    base = {name: value for name, value in measuring.prepare(options).items() if name in FIELDS}
    recipe = load_recipe(options.recipe, options.set)
    first = recipe.stages[0]
    optim = first.optim.model_copy(update={"updates": options.updates + 1, "epochs": None})
    recipe = recipe.model_copy(update={"stages": [first.model_copy(update={"optim": optim})]})
    base |= {"recipe": recipe.name, "stage": first.name}
    expense.estimate = lambda *_, **__: []  # of no interest here, and seconds long
    rows = [loaded(recipe, options.updates)]
    print(f"decoded: {rows[0]['pictures_per_second']} pictures/s of {rows[0]['size']} px in one process")
    for workers in options.workers:
        row = trained(recipe, workers, rows[0]["size"])
        print(f"{workers} workers: {row['seconds']} s, {row['wait']} s of them waiting", flush=True)
        rows.append(row)
    measuring.write(options, FIELDS, [{**base, **row} for row in rows])


if __name__ == "__main__":
    main()
