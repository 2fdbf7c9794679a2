"""What a million rows cost: opened the first time and again, read in order and shuffled, gone on with at row 900,000.

    python benchmarks/million_rows.py                       # two cores: some minutes, 2 GB in /tmp
    python benchmarks/million_rows.py --rows 1000 100000    # less

Data sets are made, measured and removed. Every measurement is a process of its own, which tells its peaks of memory:
anonymous, and resident, which has pages of files in it that the system may take back. What is measured ends with a
row's record or, where pictures are read, with its decoded picture; templates and tokens are the loader's (loader.py).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Peak, machine, write
from PIL import Image

from distilvlm.data import Order, read
from distilvlm.data.geometry import decode
from distilvlm.data.streams import open_rows
from distilvlm.recipe.schema import SourceSpec

FIELDS = [
    "date",
    "machine",
    "form",
    "rows",
    "mb",
    "phase",
    "seconds",
    "cpu_seconds",
    "rows_per_s",
    "anonymous_mib",
    "resident_mib",
]
FORMS = ("json", "json-own", "jsonl", "parquet", "tar")
"""A hundred pictures that all rows show; but in shards, and in \"json-own\", every row has a file of its own."""
PHASES = ("index", "open first", "open again", "in order", "shuffled", "resumed")
"""Where rows are, alone; a source with the first look at every row; with all of that kept; records; the first sample of
a run that goes on at nine tenths."""
READ = 20_000
"""Rows that are read to tell how many a second are."""
SHARD = 10_000
BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--shard-rows", type=int, default=100_000, help="of parquet and WebDataset at most")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--remark", default="", help="stands behind the machine's name")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "million_rows.csv")
    parser.add_argument("--measure", nargs=3, metavar=("PHASE", "PATH", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(*options.measure)))
        return
    where = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine() + (f"; {options.remark}" if options.remark else ""),
    }
    for form in options.forms:
        for count in sorted(
            {min(count, options.shard_rows) if form in ("parquet", "tar") else count for count in options.rows}
        ):
            with tempfile.TemporaryDirectory() as directory:
                write(options, FIELDS, [where | row for row in of_form(form, count, Path(directory))])
                options.append = True


def of_form(form: str, count: int, directory: Path) -> Iterator[dict[str, object]]:
    """A data set of so many rows, through all phases."""
    images = directory / "images"
    images.mkdir()
    for number in range(100):
        (images / f"{number}.jpg").write_bytes(picture(number))
    path = MAKERS[form](directory, count)
    for one in (images, *images.glob("*/")):
        os.utime(one, ns=(0, 10**18))  # as if it had lain there: what was just written is not trusted yet
    files = [Path(path)] if Path(path).is_file() else list(directory.glob("shards/*"))
    for file in files:
        os.utime(file, ns=(0, 10**18))
    size = sum(file.stat().st_size for file in files) / 1e6
    for phase in PHASES:
        environment = {**os.environ, "DISTILVLM_CACHE": str(directory / "cache")}
        command = [sys.executable, __file__, "--measure", phase, path, str(images)]
        printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        found = {"form": form, "rows": count, "mb": round(size, 1), "phase": phase, **json.loads(printed)}
        print(found, flush=True)
        yield found
    shutil.rmtree(directory / "cache", ignore_errors=True)


def measured(phase: str, path: str, images: str) -> dict[str, float]:
    """One phase, in this process. Rows a second are of the processors' time: others may be using them, too."""
    with Peak() as memory:
        seconds, spent, count = _phase(phase, path, images)
    return {
        "seconds": round(seconds, 4),
        "cpu_seconds": round(spent, 3),
        "rows_per_s": round(count / max(spent, 0.01)),
        "anonymous_mib": round(memory.anonymous_mib),
        "resident_mib": round(memory.mib),
    }


def _phase(phase: str, path: str, images: str) -> tuple[float, float, int]:
    """Seconds, those of processors, and rows."""
    spec = SourceSpec(path=path, images=None if path.endswith((".tar", ".parquet")) else images)
    start, used = time.perf_counter(), cpu()
    if phase == "index":
        found = len(open_rows(path))
        return time.perf_counter() - start, cpu() - used, found
    source = read(spec, "rows")
    seconds, spent, count = time.perf_counter() - start, cpu() - used, len(source.records)
    if source.bad:
        raise ValueError(f"{source.bad[0]}: the bench has made a bad row")
    if phase == "resumed":
        at = int(0.9 * count)
        start, used = time.perf_counter(), cpu()
        order = ordered(count)
        index = order.update(at // BATCH)[at % BATCH][1]
        decode(source.records[index].images[0])
        return time.perf_counter() - start, cpu() - used, 0
    if phase in ("in order", "shuffled"):
        taken = min(READ, count)
        order = ordered(count)
        updates = (order.update(number) for number in range(order.updates_per_epoch))
        shuffled = (index for update in updates for _, index in update)
        indices = range(taken) if phase == "in order" else [next(shuffled) for _ in range(taken)]
        start, used = time.perf_counter(), cpu()
        for index in indices:
            record = source.records[index]
            if path.endswith((".tar", ".parquet")):
                decode(record.images[0])
        return time.perf_counter() - start, cpu() - used, taken
    return seconds, spent, count


def cpu() -> float:
    """Seconds of processors that this process and those that it waited for have used."""
    return sum(os.times()[:4])


def ordered(count: int) -> Order:
    return Order(count, BATCH, 0, "0")


def row(number: int) -> dict[str, Any]:
    """As LLaVA's instructions are: a picture, and one or a few questions about it."""
    turns: list[dict[str, str]] = []
    for turn in range(1 + number % 3):
        asked = f'What is "{number % 97}" at place {turn} of the picture, and why? Answer in a sentence.'
        turns.append({"from": "human", "value": asked if turn else f"<image>\n{asked}"})
        turns.append(
            {"from": "gpt", "value": f"It is thing {number % 89}, because it stands beside the other one. " * 2}
        )
    return {"id": f"{number:09d}", "image": f"{number % 100}.jpg", "conversations": turns}


def picture(number: int) -> bytes:
    pixels = np.full((16, 16, 3), number % 256, np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "JPEG")
    return written.getvalue()


def make_json(directory: Path, count: int) -> str:
    return _list(directory, map(row, range(count)))


def make_json_own(directory: Path, count: int) -> str:
    """A thousand pictures to a directory, which are hard links to the hundred."""
    images = directory / "images"
    for number in range(count):
        if number % 1000 == 0:
            (images / f"{number // 1000:05d}").mkdir()
        os.link(images / f"{number % 100}.jpg", images / own(number))
    return _list(directory, ({**row(number), "image": own(number)} for number in range(count)))


def own(number: int) -> str:
    return f"{number // 1000:05d}/{number:09d}.jpg"


def _list(directory: Path, rows: Iterable[dict[str, Any]]) -> str:
    with (path := directory / "rows.json").open("w") as stream:
        for number, one in enumerate(rows):
            stream.write("[\n" if not number else ",\n")
            stream.write(json.dumps(one))
        stream.write("\n]\n")
    return str(path)


def make_jsonl(directory: Path, count: int) -> str:
    with (path := directory / "rows.jsonl").open("w") as stream:
        stream.writelines(json.dumps(row(number)) + "\n" for number in range(count))
    return str(path)


def make_parquet(directory: Path, count: int) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (directory / "shards").mkdir()
    pictures = [picture(number) for number in range(100)]
    for start in range(0, count, 10 * SHARD):
        made = (row(number) for number in range(start, min(start + 10 * SHARD, count)))
        with_pictures = [
            {"id": one["id"], "images": [{"bytes": pictures[int(one["id"]) % 100], "path": one["image"]}], **_talk(one)}
            for one in made
        ]
        file = directory / "shards" / f"rows-{start:09d}.parquet"
        pq.write_table(pa.Table.from_pylist(with_pictures), file, row_group_size=1000)
    return str(directory / "shards" / "*.parquet")


def _talk(one: dict[str, Any]) -> dict[str, Any]:
    return {"conversations": one["conversations"]}


def make_tar(directory: Path, count: int) -> str:
    (directory / "shards").mkdir()
    pictures = [picture(number) for number in range(100)]
    for start in range(0, count, SHARD):
        with tarfile.open(directory / "shards" / f"rows-{start:09d}.tar", "w") as tar:
            for number in range(start, min(start + SHARD, count)):
                told = {**row(number), "image": f"{number:09d}.jpg"}
                for name, data in (
                    (f"{number:09d}.json", json.dumps(told).encode()),
                    (told["image"], pictures[number % 100]),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(directory / "shards" / "*.tar")


MAKERS: dict[str, Callable[[Path, int], str]] = {
    "json": make_json,
    "json-own": make_json_own,
    "jsonl": make_jsonl,
    "parquet": make_parquet,
    "tar": make_tar,
}


if __name__ == "__main__":
    main()
