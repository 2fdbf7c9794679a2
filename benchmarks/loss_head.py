"""Time and extra memory of the loss head, forward and backward, against the reference formula on materialised logits.

    python benchmarks/loss_head.py --vocabulary 151936 65536 --dtype fp32 bf16 --head frozen trained

One sample of LLaVA-KD: all four terms, 728 visual and 64 response rows by default. "reference" builds the logits of
both models and writes the four terms as the published trainer does (logits in the models' dtype, then `.float()`;
relation in fp32). "products" are the bare matrix products that nobody can avoid: both heads' logits, the gradient of
the hidden states and, where the head trains, of the head. Gram matrices of frozen heads (the teacher's always) are
built once per stage: "gram" is their time, printed, not counted.

Every measurement runs in a process of its own; its extra memory is the peak of the resident set above what the inputs
take, and includes the head's own gradient where the head trains. The contenders are measured in turn, `--repeats` times
each, so that a busy machine disturbs them alike; the table shows medians.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from distilvlm.losses import Objective, gram

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIELDS = [
    "date", "machine", "torch", "threads", "vocabulary", "rows_visual", "rows_response", "d_student", "d_teacher",
    "dtype", "head", "what", "seconds", "extra_mib", "time_ratio", "memory_ratio",
]  # fmt: skip


class Sample:
    """Hidden states, heads and rows of one sample; the inputs that every contender shares."""

    def __init__(self, options: argparse.Namespace, vocabulary: int, dtype: str, head: str) -> None:
        torch.manual_seed(0)
        self.visual, self.response = options.rows_visual, options.rows_response
        rows = self.visual + self.response

        def random(first: int, second: int, scale: float) -> Tensor:
            return torch.randn(first, second).mul_(scale).to(DTYPES[dtype])

        # Scaled so that logits have a spread of about 2, as a language model's do.
        self.student = random(rows, options.student, 1.0).requires_grad_()
        self.student_head = random(vocabulary, options.student, 2 * options.student**-0.5)
        if head == "trained":  # what trains is held in fp32, also where autocast multiplies in bf16
            self.student_head = self.student_head.float().requires_grad_()
        self.teacher = random(rows, options.teacher, 1.0)
        self.teacher_head = random(vocabulary, options.teacher, 2 * options.teacher**-0.5)
        self.targets = torch.randint(0, vocabulary, (self.response,))

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.student, self.student_head) if leaf.requires_grad]


def ours(sample: Sample, grams: tuple[Tensor | None, Tensor | None]) -> Tensor:
    rows = torch.arange(sample.visual + sample.response)
    return Objective(text=1, response=1, visual=1, relation=1)(
        sample.student,
        sample.student_head,
        sample.teacher,
        sample.teacher_head,
        rows=rows,
        owners=torch.zeros_like(rows),
        response_rows=rows[sample.visual :],
        response_targets=sample.targets,
        visual_rows=rows[: sample.visual],
        sample_weights=torch.ones(1),
        samples_in_update=1,
        student_gram=grams[0],
        teacher_gram=grams[1],
    ).loss


def reference(sample: Sample) -> Tensor:
    """The four terms of LLaVA-KD's `compute_loss` on the rows that matter (specification §2.1)."""
    student = (sample.student @ sample.student_head.T).float()
    with torch.no_grad():
        teacher = (sample.teacher @ sample.teacher_head.T).float()

    def divergence(rows: slice) -> Tensor:
        return kl_div(student[rows].log_softmax(-1), teacher[rows].softmax(-1), reduction="batchmean")

    visual, response = slice(0, sample.visual), slice(sample.visual, None)
    with torch.autocast("cpu", enabled=False):
        relation_student = student[visual] @ student[visual].T
        relation_teacher = teacher[visual] @ teacher[visual].T
    relation = 1 - cosine_similarity(relation_teacher.flatten(), relation_student.flatten(), dim=0)
    return cross_entropy(student[response], sample.targets) + divergence(response) + divergence(visual) + relation


def products(sample: Sample) -> None:
    """Both heads' logits, the student's gradients: a piece of rows at a time, so that memory is not its limit."""
    with torch.no_grad():
        for rows in torch.arange(sample.student.shape[0]).split(264):
            logits = sample.student[rows] @ sample.student_head.T
            sample.teacher[rows] @ sample.teacher_head.T
            logits @ sample.student_head
            if sample.student_head.requires_grad:
                logits.T @ sample.student[rows]


def backward(loss: Tensor) -> None:
    with torch.autocast("cpu", enabled=False):  # as a training loop does
        loss.backward()


class Peak:
    """Highest resident set of this process while the block runs, above where it started (Linux)."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.start = self.highest = self._resident()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        self.mib = (self.highest - self.start) / 2**20

    def _watch(self) -> None:
        while self._running:
            self.highest = max(self.highest, self._resident())
            time.sleep(0.002)

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(options: argparse.Namespace, vocabulary: int, dtype: str, head: str, what: str) -> tuple[float, float]:
    """Seconds and extra MiB of one contender, in this process. The first pass measures memory, the second time."""
    torch.set_num_threads(options.threads)
    sample = Sample(options, vocabulary, dtype, head)
    grams: tuple[Tensor | None, Tensor | None] = (None, None)
    if what in ("ours", "gram"):
        start = time.perf_counter()
        teacher_gram = gram(sample.teacher_head)
        grams = (gram(sample.student_head) if head == "frozen" else None, teacher_gram)
        if what == "gram":
            return time.perf_counter() - start, 0.0
    step: Callable[[], object] = {
        "ours": lambda: backward(ours(sample, grams)),
        "reference": lambda: backward(reference(sample)),
        "products": lambda: products(sample),
    }[what]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        with Peak() as peak:
            step()
        for leaf in sample.leaves():
            leaf.grad = None
        start = time.perf_counter()
        step()
        return time.perf_counter() - start, peak.mib


def measure_apart(arguments: list[str]) -> tuple[float, float]:
    output = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=os.environ
    ).stdout
    seconds, mib = output.split()
    return float(seconds), float(mib)


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return f"{cpu}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151936, 65536])
    parser.add_argument("--rows-visual", type=int, default=728)
    parser.add_argument("--rows-response", type=int, default=64)
    parser.add_argument("--student", type=int, default=896, help="width of the student's hidden states")
    parser.add_argument("--teacher", type=int, default=2048, help="width of the teacher's hidden states")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--head", nargs="+", choices=["frozen", "trained"], default=["frozen", "trained"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loss_head.csv")
    parser.add_argument("--what", choices=["ours", "reference", "products", "gram"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what:
        seconds, mib = measure(options, options.vocabulary[0], options.dtype[0], options.head[0], options.what)
        print(seconds, mib)
        return

    base = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "torch": torch.__version__,
        "threads": options.threads, "rows_visual": options.rows_visual, "rows_response": options.rows_response,
        "d_student": options.student, "d_teacher": options.teacher,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    columns = "{:>10} {:>5} {:>7} {:>9} {:>8} {:>9} {:>6} {:>6}"
    print(columns.format("vocabulary", "dtype", "head", "what", "seconds", "extra MiB", "× time", "× mem"))
    records: list[dict[str, object]] = []
    for vocabulary in options.vocabulary:
        for dtype in options.dtype:
            for head in options.head:
                contenders = ["reference", "ours", "products", "gram"]
                results: dict[str, list[tuple[float, float]]] = {what: [] for what in contenders}
                for _ in range(options.repeats):
                    for what in contenders:
                        case = ["--what", what, "--vocabulary", vocabulary, "--dtype", dtype, "--head", head]
                        sizes = ["--rows-visual", options.rows_visual, "--rows-response", options.rows_response]
                        widths = ["--student", options.student, "--teacher", options.teacher]
                        arguments = [*case, *sizes, *widths, "--threads", options.threads]
                        results[what].append(measure_apart([str(argument) for argument in arguments]))
                medians = {
                    w: [statistics.median(column) for column in zip(*r, strict=True)] for w, r in results.items()
                }
                for what, (seconds, mib) in medians.items():
                    ratio, share = seconds / medians["reference"][0], mib / medians["reference"][1]
                    record = {
                        **base, "vocabulary": vocabulary, "dtype": dtype, "head": head, "what": what,
                        "seconds": round(seconds, 3), "extra_mib": round(mib), "time_ratio": round(ratio, 3),
                        "memory_ratio": round(share, 3),
                    }  # fmt: skip
                    records.append(record)
                    cells = f"{seconds:.2f}", f"{mib:.0f}", f"{ratio:.2f}", f"{share:.2f}"
                    print(columns.format(vocabulary, dtype, head, what, *cells), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(records)


if __name__ == "__main__":
    main()
