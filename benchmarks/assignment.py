"""Time and extra memory of assigning a teacher's visual rows to a student's, one picture at a time (EM-KD).

    python benchmarks/assignment.py

Rows are of SmolLM2-sized models by default. Contenders:

* "cdist": the formula as it stands (arXiv 2511.21106): both models' logits of all rows, `torch.cdist` with p=1, then
  the assignment. Target: ours takes at most half its time on a CPU, and memory that does not grow with the vocabulary.
* "ours": `losses.assignment.assigned`.
* "distances alone", "matching alone": its two parts; "scipy matching alone": `linear_sum_assignment`, where scipy is.

The student's rows are some of the teacher's, shuffled and with noise, so that several want the same one.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

import measuring
import torch
from torch import Tensor

from distilvlm.losses.assignment import BLOCK, assigned, cheapest, distances

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "vocabulary", "student_d", "teacher_d",
    "student_rows", "teacher_rows", "what", "seconds", "extra_mib", "to_cdist", "note",
]  # fmt: skip
NOISE = 0.7


def rows_of(options: argparse.Namespace, ours: int, theirs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden rows and heads of student and teacher."""
    draw = torch.Generator().manual_seed(0)
    narrow, wide, ids = options.student, options.teacher, options.vocabulary
    teacher = torch.randn(theirs, wide, generator=draw) + torch.randn(wide, generator=draw)
    head = torch.randn(ids, wide, generator=draw) * wide**-0.5
    bring = torch.randn(wide, narrow, generator=draw) * wide**-0.5
    chosen = teacher[torch.randperm(theirs, generator=draw)[:ours]]
    student = (chosen + NOISE * torch.randn(ours, wide, generator=draw)) @ bring
    tensors = (student, head @ bring, teacher, head)
    return tensors[0].to(options.device), *(tensor.to(options.device) for tensor in tensors[1:])  # type: ignore[return-value]


def cases(options: argparse.Namespace) -> Iterator[list[dict[str, object]]]:
    """The rows of each pair of sizes."""
    try:
        solve = importlib.import_module("scipy.optimize").linear_sum_assignment
    except ImportError:
        solve = None
    for ours, theirs in options.rows:
        student, head, teacher, their_head = rows_of(options, ours, theirs)
        logits = (student @ head.T)[:, :BLOCK], (teacher @ their_head.T)[:, :BLOCK]
        cost = distances(*logits).double().cpu().numpy()

        def apart(pair: tuple[Tensor, Tensor] = logits) -> None:
            for _ in range(-(-options.vocabulary // BLOCK)):
                distances(*pair)

        def whole(given: tuple[Tensor, ...] = (student, head, teacher, their_head)) -> None:
            a, b, c, d = given
            cheapest(torch.cdist(a @ b.T, c @ d.T, p=1).double().cpu().numpy())

        runs: dict[str, measuring.Step] = {
            "cdist": whole,
            "ours": lambda given=(student, head, teacher, their_head): assigned(*given, options.vocabulary),
            "distances alone": apart,
            "matching alone": lambda given=cost: cheapest(given),
        }
        if solve is not None:
            runs["scipy matching alone"] = lambda given=cost: solve(given)
        found = measuring.measured(runs, options)
        rows: list[dict[str, object]] = []
        for what in [*runs, *(["scipy matching alone"] if solve is None else [])]:
            row: dict[str, object] = {"student_rows": ours, "teacher_rows": theirs, "what": what, "note": ""}
            if what in found:
                seconds, mib = found[what]
                row |= {"seconds": round(seconds, 4), "extra_mib": round(mib)}
                row |= {"to_cdist": round(seconds / found["cdist"][0], 3)} if what == "ours" else {}
            else:
                row["note"] = "scipy is not here"
            rows.append(row)
        yield rows


def pair(text: str) -> tuple[int, int]:
    ours, theirs = (int(number) for number in text.split("x"))
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=pair, nargs="+", default=[(144, 576), (576, 729), (729, 729)],
        help="of student and teacher, e.g. 576x729",
    )  # fmt: skip
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--student", type=int, default=576, help="width of the student's hidden rows")
    parser.add_argument("--teacher", type=int, default=960, help="width of the teacher's")
    measuring.arguments(parser, "assignment.csv")
    options = parser.parse_args()
    base = measuring.prepare(options)
    base |= {"vocabulary": options.vocabulary, "student_d": options.student, "teacher_d": options.teacher}
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    columns = "{:>12} {:>12} {:>21} {:>9} {:>9} {:>8}  {}"
    print(columns.format("student rows", "teacher rows", "what", "seconds", "extra MiB", "× cdist", ""))
    records: list[dict[str, object]] = []
    for rows in cases(options):
        for row in rows:
            shown = (row.get(name, "") for name in FIELDS[FIELDS.index("student_rows") :])
            print(columns.format(*shown), flush=True)
        records += [{**base, **row} for row in rows]
    measuring.write(options, FIELDS, records)


if __name__ == "__main__":
    main()
