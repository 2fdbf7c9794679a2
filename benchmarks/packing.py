"""Useful tokens a second of one update whose samples are padded, or packed into lines.

    python benchmarks/packing.py
    python benchmarks/packing.py --lengths lengths.csv

A student of SmolLM2-135M's shapes with some of its layers, random weights and kept features; projector and language
model train on the text loss. An update is made of the same samples each time, forward and backward of all its
micro-batches:

* "padded": as many samples as fit whatever their lengths (the budget over the longest), in the order of the data.
* "by length": padded, `machine.tokens`: samples of similar length together, up to the budget.
* "packed": `machine.packing` with `machine.tokens`: lines filled up to the budget, attention within each sample.

A token is useful if it is no padding. Target: packed at least 1.5 times padded.

Lengths are drawn, always the same ones, to look like a mixture of visual instructions: every second sample is a
question with a short answer (text of 20 to 60 tokens, 1 to 6 learned); four of ten are conversations (log-normal, 90%
between 60 and 480, half of them learned), and all of these show a picture of 64 tokens; every tenth is text alone
(log-normal, 90% between 100 and 900). `--lengths` takes real ones instead: a CSV file with a header and the columns
positions (of a whole sample), pictures, learned.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import measuring
import numpy as np
import torch
from preference_step import SIDE, model

from distilvlm.data import IGNORED, Batch, Grouping, Sample, SampleKey
from distilvlm.data.collate import collate, padded
from distilvlm.losses.objective import Objective
from distilvlm.models import choose
from distilvlm.train.task import Task

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "lengths", "samples", "mean", "longest", "layers",
    "dtype", "tokens", "what", "micro_batches", "positions", "useful_share", "seconds", "useful_tokens_per_second",
    "ratio", "extra_mib",
]  # fmt: skip
Length = tuple[int, int, int]
"""Positions of a sample, pictures, and tokens that are learned."""


def drawn(samples: int, most: int) -> list[Length]:
    rng, found = np.random.default_rng(0), list[Length]()
    for number in range(samples):
        kind = number % 10
        if kind < 5:
            text, learned, pictures = int(rng.integers(20, 61)), int(rng.integers(1, 7)), 1
        elif kind < 9:
            text, pictures = round(float(rng.lognormal(np.log(170), 0.63))), 1
            learned = text // 2
        else:
            text, pictures = round(float(rng.lognormal(np.log(300), 0.67))), 0
            learned = text // 2
        positions = min(most, max(8, text) + pictures * SIDE**2)
        found.append((positions, pictures, max(1, learned)))
    return [found[place] for place in rng.permutation(samples)]


def read(file: Path, samples: int) -> list[Length]:
    with file.open(newline="") as rows:
        found = [(int(row["positions"]), int(row["pictures"]), int(row["learned"])) for row in csv.DictReader(rows)]
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))[:samples]]


def sample(number: int, length: Length, vocabulary: int, side: int = SIDE) -> Sample:
    positions, pictures, learned = length
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(0, vocabulary, (positions,), generator=draw)
    labels = torch.full_like(ids, IGNORED)
    labels[-learned:] = ids[-learned:]
    places = torch.arange(pictures * side**2) + 1
    return Sample(
        key=SampleKey("drawn", "drawn", number),
        input_ids=ids,
        labels=labels,
        placeholder_positions=places,
        visual_positions=places,
        placeholders=side**2,
        features=torch.randn(pictures, side**2, 1024, generator=draw) if pictures else None,
    )


class Contender:
    """One way to make an update of the samples."""

    def __init__(self, task: Task, samples: Sequence[Sample], grouping: Grouping, dtype: str, device: str) -> None:
        lengths = [(len(one.input_ids),) for one in samples]
        groups = grouping.split([(0, number) for number in range(len(samples))], lambda number: lengths[number])
        self.batches: list[Batch] = [
            collate([samples[number] for _, number in group], grouping.packed).to(device) for group in groups
        ]
        self.task, self.samples, self.device = task, len(samples), device
        self.bf16 = dtype == "bf16"

    @property
    def positions(self) -> int:
        return sum(batch.input_ids.numel() for batch in self.batches)

    def __call__(self) -> None:
        for batch in self.batches:
            rows = self.task.objective.rows(batch.response_rows, batch.visual_rows)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                loss = self.task(batch, batch.features, None, rows, self.samples)["loss"]
            loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="CSV file of real ones: positions, pictures, learned")
    parser.add_argument("--samples", type=int, default=64, help="of the update")
    parser.add_argument("--longest", type=int, default=1024, help="where drawn samples are cut")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="positions of a micro-batch")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--layers", type=int, default=6, help="of the student")
    measuring.arguments(parser, "packing.csv")
    options = parser.parse_args()
    base = measuring.prepare(options)
    student = model(options.layers, options.device)
    choose(student.model, ["projector", "language"])
    task = Task(student, Objective(), None).train()
    lengths = read(options.lengths, options.samples) if options.lengths else drawn(options.samples, options.longest)
    samples = [sample(number, length, student.embedding_rows) for number, length in enumerate(lengths)]
    useful, longest = sum(length for length, *_ in lengths), max(length for length, *_ in lengths)
    base |= {"lengths": options.lengths.name if options.lengths else "drawn", "samples": len(samples)}
    base |= {"mean": round(useful / len(samples)), "longest": longest, "layers": options.layers}
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    columns = "{:>5} {:>6} {:>10} {:>13} {:>9} {:>7} {:>8} {:>9} {:>6} {:>9}"
    heads = "dtype", "tokens", "what", "micro-batches", "positions", "useful", "seconds", "tokens/s", "ratio", "MiB"
    print(columns.format(*heads))
    written: list[dict[str, object]] = []
    for dtype in options.dtype:
        for tokens in options.tokens:
            ways = {
                "padded": Grouping(max(1, tokens // padded(longest))),
                "by length": Grouping(tokens=tokens),
                "packed": Grouping(tokens=tokens, packed=True),
            }
            contenders = {name: Contender(task, samples, way, dtype, options.device) for name, way in ways.items()}
            found = measuring.measured(contenders, options, lambda: student.model.zero_grad(set_to_none=True))
            for what, (seconds, mib) in found.items():
                one = contenders[what]
                row: dict[str, object] = {"dtype": dtype, "tokens": tokens, "what": what}
                row |= {"micro_batches": len(one.batches), "positions": one.positions}
                row |= {"useful_share": round(useful / one.positions, 3), "seconds": round(seconds, 3)}
                row |= {"useful_tokens_per_second": round(useful / seconds)}
                row |= {"ratio": round(found["padded"][0] / seconds, 2), "extra_mib": round(mib)}
                print(columns.format(*(row[name] for name in FIELDS[FIELDS.index("dtype") :])), flush=True)
                written.append({**base, **row})
    measuring.write(options, FIELDS, written)


if __name__ == "__main__":
    main()
