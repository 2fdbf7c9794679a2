"""Time and extra memory of the relation loss alone, forward and backward, against both models' logits.

    python benchmarks/relation.py

* "reference": logits of the visual rows of both models in fp32, their row-by-row products, one cosine (specification
  §2.1 item 4), and the gradient down to the hidden states and, where the head trains, to the head.
* "ours": through H (WᵀW) Hᵀ. Gram matrices of frozen heads are ready (built once per stage: "gram").

Targets: frozen head at most 0.1 times the reference's time; trained head at most 1.0 times, and no memory that grows
with the vocabulary but the head's gradient, which is in the figures of both.
"""

from __future__ import annotations

import argparse

import loss_head
import measuring
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from distilvlm.losses import relation

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "rows", "vocabulary", "d_student", "d_teacher",
    "head", "what", "seconds", "extra_mib", "head_gradient_mib", "time_ratio", "memory_ratio",
]  # fmt: skip


def reference(sample: loss_head.Sample) -> Tensor:
    student = sample.student @ sample.student_head.T
    with torch.no_grad():
        teacher = sample.teacher @ sample.teacher_head.T
    apart = cosine_similarity((teacher @ teacher.T).flatten(), (student @ student.T).flatten(), dim=0)
    return 1 - apart


def ours(sample: loss_head.Sample) -> Tensor:
    heads = sample.student_head, sample.teacher_head
    return relation(sample.student, heads[0], sample.teacher, heads[1], *sample.grams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[576, 728], help="visual rows of the sample")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151936, 65536])
    parser.add_argument("--student", type=int, default=896, help="width of the student's hidden states")
    parser.add_argument("--teacher", type=int, default=2048, help="width of the teacher's hidden states")
    measuring.arguments(parser, "relation.csv")
    options = parser.parse_args()
    base = measuring.prepare(options) | {"d_student": options.student, "d_teacher": options.teacher}
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    columns = "{:>5} {:>10} {:>7} {:>9} {:>9} {:>9} {:>17} {:>10} {:>12}"
    shown = ["rows", "vocabulary", *FIELDS[FIELDS.index("head") :]]
    print(columns.format(*shown))
    written: list[dict[str, object]] = []
    for rows in options.rows:
        for vocabulary in options.vocabulary:
            for head in ("frozen", "trained"):
                sample = loss_head.Sample(options, "all", rows, vocabulary, "fp32", head)
                sample.build_grams()
                steps: dict[str, measuring.Step] = {
                    "reference": lambda sample=sample: reference(sample).backward(),
                    "ours": lambda sample=sample: ours(sample).backward(),
                    "gram": sample.build_grams,
                }
                found = measuring.measured(steps, options, sample.forget)
                gradient = 4 * vocabulary * options.student / 2**20 if head == "trained" else 0
                for what, (seconds, mib) in found.items():
                    line: dict[str, object] = {"rows": rows, "vocabulary": vocabulary, "head": head, "what": what}
                    line |= {"seconds": round(seconds, 5), "extra_mib": round(mib)}
                    line |= {"head_gradient_mib": round(gradient) if what != "gram" else 0}
                    line |= {"time_ratio": round(seconds / found["reference"][0], 3)}
                    line |= {"memory_ratio": round(mib / found["reference"][1], 3)}
                    print(columns.format(*(str(line[name]) for name in shown)), flush=True)
                    written.append({**base, **line})
    measuring.write(options, FIELDS, written)


if __name__ == "__main__":
    main()
