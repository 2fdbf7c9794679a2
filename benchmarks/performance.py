"""Every figure of docs/performance.md: runs the benchmarks one after another, draws the curves, writes the tables.

    python benchmarks/performance.py                       # everything, on a GPU too where one is (about 40 minutes)
    python benchmarks/performance.py --only relation step  # some of them; the others' tables stay as they are
    python benchmarks/performance.py --only                # none: tables and curves from the files that are there

"loader" needs what `scripts/iaa-small` leaves, and is run where that is there or when it is named.

Each benchmark is a command of its own, which is printed and can be run by itself; it writes one CSV file. Tables stand
in docs/performance.md between comments that name their benchmark. Needs `pip install 'distilvlm[benchmarks]'`.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.ticker import LogLocator

pyplot.switch_backend("svg")
pyplot.rcParams["svg.hashsalt"] = "distilvlm"  # else ids differ from time to time

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
Row = Mapping[str, str]

QWEN = "--student Qwen/Qwen2.5-0.5B --layers 24 --teacher Qwen/Qwen2.5-1.5B --teacher-layers 37"
COMMANDS = {
    "loss_head": [
        "loss_head.py --rows 792 --vocabulary 151936 --repeats 2",
        "loss_head.py --rows 2048 --vocabulary 151936 --terms response --repeats 1 --append",
    ],
    "relation": ["relation.py --rows 728 --repeats 2"],
    "step": ["step.py --repeats 2", "step.py --dtype bf16 --repeats 2 --append"],
    "packing": ["packing.py --tokens 2048 --repeats 2", "packing.py --tokens 8192 --repeats 1 --append"],
    "growth": ["growth.py --repeats 1"],
    "loader": ["loader.py recipes/iaa-small/align.yaml --set pictures.features=null"],
    "loss_head_gpu": ["loss_head.py --vocabulary 151936 --repeats 7"],
    "relation_gpu": ["relation.py --repeats 10"],
    "step_gpu": [f"step.py {QWEN} --side 24 --samples 8 --text 200 --dtype bf16 --repeats 10"],
    "packing_gpu": ["packing.py --dtype bf16 --layers 30 --tokens 8192"],
    "growth_gpu": ["growth.py --grows rows vocabulary --repeats 10"],
}
"""Benchmark -> what it runs. Those of a GPU run where there is one, the others on the CPU."""

SHOWN: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "loss_head": (
        ("terms", "rows", "dtype", "head"),
        ("seconds", "extra_mib", "time_ratio", "memory_ratio", "times_products", "gradient_error"),
    ),
    "relation": (("rows", "vocabulary", "head"), ("seconds", "extra_mib", "time_ratio", "memory_ratio")),
    "step": (("dtype",), ("seconds", "extra_mib", "times_fine_tuning", "times_reference")),
    "packing": (("dtype", "tokens"), ("useful_share", "useful_tokens_per_second", "ratio", "extra_mib")),
    "loader": (("workers",), ("samples", "seconds", "pictures_per_second", "wait", "wait_share")),
}
"""Benchmark -> what tells its cases apart, and what is measured of each contender."""

HEADS = {
    "seconds": "seconds", "extra_mib": "extra MiB", "time_ratio": "× time", "memory_ratio": "× memory",
    "times_products": "× products", "gradient_error": "error", "times_fine_tuning": "× fine-tuning",
    "times_reference": "× reference", "useful_share": "useful", "useful_tokens_per_second": "useful tokens/s",
    "ratio": "× padded", "samples": "samples", "pictures_per_second": "pictures/s", "wait": "seconds waited",
    "wait_share": "share waited",
}  # fmt: skip
CASES = {
    "terms": "{}", "rows": "{} rows", "vocabulary": "{} ids", "dtype": "{}", "head": "head {}",
    "tokens": "{} positions", "workers": "{} loader processes",
}  # fmt: skip


def possible(name: str) -> bool:
    if name == "loader":
        return (Path(os.environ.get("COMPARISON", "runs/iaa-small")) / "weights").exists()
    return torch.cuda.is_available() or not name.endswith("_gpu")


def measure(names: Sequence[str]) -> None:
    for name in names:
        for command in COMMANDS[name]:
            device = "cuda" if name.endswith("_gpu") else "cpu"
            words = [*shlex.split(command), "--device", device]
            print("$ python benchmarks/" + shlex.join(words), flush=True)
            subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]], check=True)


def read(name: str) -> list[Row]:
    file = RESULTS / f"{name}.csv"
    if not file.exists():
        return []
    with file.open(newline="") as rows:
        return list(csv.DictReader(rows))


def table(name: str, rows: Sequence[Row]) -> str:
    """Markdown: a line per contender of each case."""
    cases, measured = SHOWN[name.removesuffix("_gpu")]
    lines = ["| | |" + "".join(f" {HEADS[column]} |" for column in measured), "|---|---|" + "---:|" * len(measured)]
    last = ""
    for row in rows:
        case = ", ".join(CASES[column].format(row[column]) for column in cases if row[column])
        ours = row["what"] in ("ours", "cached", "local", "packed")
        cells = [row["what"], *(rounded(row[column]) for column in measured)]
        shown = [f"**{cell}**" if ours and cell else cell for cell in cells]
        lines.append("| " + " | ".join(["" if case == last else case, *shown]) + " |")
        last = case
    return "\n".join(lines)


def rounded(figure: str) -> str:
    """To three digits, as far as it has more behind the point."""
    if "e" in figure:
        return figure.replace("e-0", "e\u2011")  # which no line is broken at
    if "." not in figure:
        return figure
    return f"{float(figure):.3g}" if float(figure) < 100 else f"{float(figure):.0f}"


def told(name: str, rows: Sequence[Row]) -> str:
    """Where, when and by which commands."""
    first = rows[0]
    device = "cuda" if name.endswith("_gpu") else "cpu"
    commands = "; ".join(f"`python benchmarks/{command} --device {device}`" for command in COMMANDS[name])
    threads = "" if device == "cuda" else f", {first['threads']} threads"
    return f"{first['machine']}{threads}, torch {first['torch']}, {first['date']}: {commands}."


def curves(name: str, rows: Sequence[Row]) -> None:
    """Seconds against the size of what grows, both axes logarithmic, with the straight line through the largest."""
    kinds = [kind for kind in ("rows", "vocabulary", "samples") if any(row["grows"] == kind for row in rows)]
    labels = {"rows": "rows of the loss head", "vocabulary": "ids of the vocabulary", "samples": "rows of a data file"}
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(3.4 * len(kinds), 3.1), layout="constrained", squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for head, colour in (("frozen", "#2563a8"), ("trained", "#c2571a"), ("", "#2563a8")):
            points = [
                (int(row["size"]), float(row["seconds"]))
                for row in rows
                if row["grows"] == kind and row["head"] == head
            ]
            if not points:
                continue
            sizes, seconds = zip(*points, strict=True)
            axis.loglog(sizes, seconds, "o-", color=colour, label=f"head {head}" if head else None)
            straight = [seconds[-1] * size / sizes[-1] for size in sizes]
            axis.loglog(sizes, straight, ":", color=colour, linewidth=1)
        measured = sorted({int(row["size"]) for row in rows if row["grows"] == kind})
        axis.set_xticks(measured, [f"{size // 1000}k" if size >= 1000 else str(size) for size in measured], minor=False)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_xlabel(labels[kind])
        axis.set_ylabel("seconds")
        axis.grid(True, which="major", alpha=0.3)
        if kind != "samples":
            axis.legend(frameon=False)
    figure.savefig(PAGE.parent / f"performance-{name.replace('_', '-')}.svg", metadata={"Date": None})
    pyplot.close(figure)


def written(page: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opened, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise SystemExit(f"{PAGE} has no place for {name}: it needs {begin} and, behind it, {end}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), default=None, help="which benchmarks to run")
    options = parser.parse_args()
    measure([name for name in COMMANDS if possible(name)] if options.only is None else options.only)
    page = PAGE.read_text()
    for name in COMMANDS:
        if not (rows := read(name)):
            continue
        if name.startswith("growth"):
            curves(name, rows)
            content = told(name, rows)
        else:
            content = table(name, rows) + "\n\n" + told(name, rows)
        page = written(page, name, content)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
