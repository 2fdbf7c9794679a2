"""Time, extra memory and error of the loss head, forward and backward, against logits that are built whole.

    python benchmarks/loss_head.py
    python benchmarks/loss_head.py --terms response --rows 2048 --vocabulary 151936 --dtype bf16 --head trained

Terms "all": one sample of LLaVA-KD, text + response + visual + relation, of every 13 rows 12 visual ones (792 rows are
732 and 60). Terms "response": text and forward KL on every row, which is what the peers' functions compute.

* "reference": both models' logits and the terms as the published trainer writes them (logits in the models' dtype, then
  `.float()`; relation in fp32).
* "trl": `GKDTrainer.generalized_jsd_loss` with beta 0 and torch's cross-entropy, on logits, where TRL is installed.
* "liger": `LigerFusedLinearJSDLoss` with beta 0, where Liger is installed; compiled on a GPU.
* "products": the bare matrix products that nobody can avoid: both heads' logits, the gradient of the hidden states and,
  where the head trains, of the head; in pieces of rows, so that memory is not their limit, a head of another dtype cast
  once.
* "gram": Gram matrices of frozen heads (the teacher's always), built once per stage, and counted nowhere else.

What trains is held in fp32, also where autocast multiplies in bf16. Extra memory is the peak of the first pass above
the inputs, the head's own gradient included. Errors are ‖x − y‖ / ‖y‖ of the gradient of the hidden states, and of the
loss, against the reference formula in float64 on the same numbers, with `--checked` rows (the formula's fp64 logits of
all rows do not fit).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence

import measuring
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from distilvlm.losses import Objective, gram
from distilvlm.losses.targets import Targets

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "terms", "rows", "vocabulary", "d_student",
    "d_teacher", "dtype", "head", "what", "seconds", "extra_mib", "time_ratio", "memory_ratio", "times_products",
    "loss_error", "gradient_error",
]  # fmt: skip
CONTENDERS = ("reference", "trl", "liger", "ours", "products", "gram")
PEERS = {"trl": "trl", "liger": "liger_kernel"}
PIECE = {"cpu": 264, "cuda": 512}
"""Rows that "products" multiplies at a time."""


class Sample:
    """Hidden states, heads and rows of one sample; the inputs that every contender shares."""

    def __init__(self, options: argparse.Namespace, terms: str, rows: int, vocabulary: int, dtype: str, head: str):
        draw = torch.Generator(options.device).manual_seed(0)
        self.device, self.dtype, self.terms, self.rows = options.device, DTYPES[dtype], terms, rows
        self.visual = rows * 12 // 13 if terms == "all" else 0

        def random(first: int, second: int, scale: float) -> Tensor:
            numbers = torch.randn(first, second, generator=draw, device=options.device)
            return numbers.mul_(scale).to(self.dtype)

        # Scaled so that logits have a spread of about 2, as a language model's do.
        self.student = random(rows, options.student, 1.0).requires_grad_()
        self.student_head = random(vocabulary, options.student, 2 * options.student**-0.5)
        if head == "trained":
            self.student_head = self.student_head.float().requires_grad_()
        self.teacher = random(rows, options.teacher, 1.0)
        self.teacher_head = random(vocabulary, options.teacher, 2 * options.teacher**-0.5)
        self.targets = torch.randint(0, vocabulary, (rows - self.visual,), generator=draw, device=options.device)
        self.grams: tuple[Tensor | None, Tensor | None] = (None, None)

    def build_grams(self) -> None:
        frozen = not self.student_head.requires_grad
        self.grams = (gram(self.student_head) if frozen else None, gram(self.teacher_head))

    def forget(self) -> None:
        self.student.grad = self.student_head.grad = None

    def cast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def ours(sample: Sample) -> Tensor:
    rows = torch.arange(sample.rows, device=sample.device)
    weights = {"visual": 1.0, "relation": 1.0} if sample.terms == "all" else {}
    return Objective(text=1, response=1, **weights)(
        sample.student,
        sample.student_head,
        Targets(sample.teacher, sample.teacher_head),
        rows,
        owners=torch.zeros_like(rows),
        response_rows=rows[sample.visual :],
        response_targets=sample.targets,
        visual_rows=rows[: sample.visual],
        sample_weights=torch.ones(1, device=sample.device),
        samples_in_update=1,
        student_gram=sample.grams[0],
        teacher_gram=sample.grams[1],
    ).loss


def reference(sample: Sample) -> Tensor:
    """The terms of LLaVA-KD's `compute_loss` on the rows that matter (specification §2.1)."""
    student = (sample.student @ sample.student_head.T).float()
    with torch.no_grad():
        teacher = (sample.teacher @ sample.teacher_head.T).float()
    return formula(student, teacher, sample)


def formula(student: Tensor, teacher: Tensor, sample: Sample) -> Tensor:
    def divergence(rows: slice) -> Tensor:
        return kl_div(student[rows].log_softmax(-1), teacher[rows].softmax(-1), reduction="batchmean")

    visual, response = slice(0, sample.visual), slice(sample.visual, None)
    loss = cross_entropy(student[response], sample.targets) + divergence(response)
    if sample.terms == "response":
        return loss
    with torch.autocast(sample.device, enabled=False):
        relation_student = student[visual] @ student[visual].T
        relation_teacher = teacher[visual] @ teacher[visual].T
    relation = 1 - cosine_similarity(relation_teacher.flatten(), relation_student.flatten(), dim=0)
    return loss + divergence(visual) + relation


def trl(sample: Sample) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    student = sample.student @ sample.student_head.T
    with torch.no_grad():
        teacher = sample.teacher @ sample.teacher_head.T
    apart = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], sample.targets[None], beta=0.0)
    return cross_entropy(student.float(), sample.targets) + apart


def liger(sample: Sample) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(1.0, 1.0, beta=0.0, compiled=sample.device == "cuda")
    head = sample.student_head.to(sample.dtype)
    return loss(sample.student, head, sample.teacher, sample.teacher_head, sample.targets)


def products(sample: Sample) -> None:
    with torch.no_grad(), torch.autocast(sample.device, enabled=False):
        head = sample.student_head.to(sample.dtype)
        for rows in torch.arange(sample.rows, device=sample.device).split(PIECE[sample.device]):
            logits = sample.student[rows] @ head.T
            sample.teacher[rows] @ sample.teacher_head.T
            logits @ head
            if sample.student_head.requires_grad:
                logits.T @ sample.student[rows]


def step_of(what: str, sample: Sample) -> measuring.Step:
    if what == "products":
        return lambda: products(sample)
    if what == "gram":
        return sample.build_grams
    loss: Callable[[Sample], Tensor] = {"ours": ours, "reference": reference, "trl": trl, "liger": liger}[what]

    def step() -> None:
        with sample.cast():
            value = loss(sample)
        value.backward()  # outside of autocast, as a training loop does

    return step


def error(what: str, sample: Sample) -> tuple[float, float]:
    """Of loss and gradient, against the formula in float64 on the same numbers."""
    loss = {"ours": ours, "reference": reference, "trl": trl, "liger": liger}[what]
    with sample.cast():
        value = loss(sample)
    (found,) = torch.autograd.grad(value, sample.student)
    hidden = sample.student.detach().double().requires_grad_()
    # Under autocast the head is multiplied as bf16: what is measured is the arithmetic and not that rounding.
    head = sample.student_head.detach().to(sample.dtype).double()
    exact = formula(hidden @ head.T, sample.teacher.double() @ sample.teacher_head.double().T, sample)
    (true,) = torch.autograd.grad(exact, hidden)
    apart = float((found.double() - true).norm() / true.norm())
    return abs(value.item() - exact.item()) / exact.item(), apart


def contenders(terms: str) -> list[str]:
    found = [what for what in CONTENDERS if what not in PEERS or terms == "response"]
    missing = [what for what in found if what in PEERS and importlib.util.find_spec(PEERS[what]) is None]
    if missing:
        print(f"not installed, and left out: {', '.join(missing)}", file=sys.stderr)
    return [what for what in found if what not in missing and (what != "gram" or terms == "all")]


def case(
    options: argparse.Namespace, terms: str, rows: int, vocabulary: int, dtype: str, head: str
) -> Sequence[dict[str, object]]:
    """Rows of the table."""
    what = vocabulary, dtype, head
    chosen = [name for name in contenders(terms) if name in options.what]
    errors: dict[str, tuple[float, float]] = {}
    small = Sample(options, terms, options.checked, *what)
    if terms == "all":
        small.build_grams()
    for name in chosen:
        if name not in ("products", "gram"):
            errors[name] = error(name, small)
    del small
    sample = Sample(options, terms, rows, *what)
    if terms == "all":
        sample.build_grams()
    found = measuring.measured({name: step_of(name, sample) for name in chosen}, options, sample.forget)
    lines: list[dict[str, object]] = []
    for name, (seconds, mib) in found.items():
        line = {"terms": terms, "rows": rows, "vocabulary": vocabulary, "dtype": dtype, "head": head, "what": name}
        line |= {"seconds": round(seconds, 5), "extra_mib": round(mib)}
        if "reference" in found:
            line |= {"time_ratio": round(seconds / found["reference"][0], 3)}
            line |= {"memory_ratio": round(mib / found["reference"][1], 3)}
        if "products" in found:
            line["times_products"] = round(seconds / found["products"][0], 2)
        if name in errors:
            line |= {"loss_error": f"{errors[name][0]:.1e}", "gradient_error": f"{errors[name][1]:.1e}"}
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terms", nargs="+", choices=["all", "response"], default=["all", "response"])
    parser.add_argument("--rows", type=int, nargs="+", default=[792, 2048])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151936, 65536])
    parser.add_argument("--student", type=int, default=896, help="width of the student's hidden states")
    parser.add_argument("--teacher", type=int, default=2048, help="width of the teacher's hidden states")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--head", nargs="+", choices=["frozen", "trained"], default=["frozen", "trained"])
    parser.add_argument("--what", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--checked", type=int, default=104, help="rows of the sample whose errors are measured")
    measuring.arguments(parser, "loss_head.csv")
    options = parser.parse_args()
    base = measuring.prepare(options) | {"d_student": options.student, "d_teacher": options.teacher}
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    shown = FIELDS[FIELDS.index("terms") : FIELDS.index("vocabulary") + 1] + FIELDS[FIELDS.index("dtype") :]
    columns = "{:>8} {:>5} {:>10} {:>5} {:>7} {:>9} {:>9} {:>9} {:>10} {:>12} {:>14} {:>10} {:>14}"
    print(columns.format(*shown))
    for terms in options.terms:
        for rows in options.rows:
            for vocabulary in options.vocabulary:
                for dtype in options.dtype:
                    for head in options.head:
                        lines = case(options, terms, rows, vocabulary, dtype, head)
                        for line in lines:
                            print(columns.format(*(str(line.get(name, "")) for name in shown)), flush=True)
                        measuring.write(options, FIELDS, [{**base, **line} for line in lines])
                        options.append = True


if __name__ == "__main__":
    main()
