"""A whole distilled update against the plain fine-tuning update of the same student on the same samples.

    python benchmarks/step.py
    python benchmarks/step.py --student Qwen/Qwen2.5-0.5B --teacher Qwen/Qwen2.5-1.5B --teacher-layers 37 --dtype bf16

A student of SmolLM2-135M's shapes and a teacher of SmolLM2-360M's with 50 layers, 4 times the student's parameters:
random weights, both with one vision tower whose features are kept. Projector and language model train; micro-batches of
`--samples`; forward, backward, clipping, AdamW.

* "fine-tuning": the text loss alone, `train.Loop` without a teacher.
* "cached": text + response + visual + relation; the teacher's hidden rows are read from disk, and compared with their
  hashes, as a cached teacher's are. Target: at most 1.15 times fine-tuning.
* "local": the same terms, the teacher runs beside the student. Target: at most 2.2 times fine-tuning.
* "reference": the same terms as the published trainer has them: both models' logits of all positions, in fp32 from
  there on. Target: "local" at most half of its time.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import loss_head
import measuring
import torch
from accelerate import Accelerator
from packing import sample
from preference_step import model
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from distilvlm.data import Batch, Grouping
from distilvlm.data.collate import collate
from distilvlm.losses.objective import Objective
from distilvlm.losses.targets import Targets
from distilvlm.models import VLM, choose, forward
from distilvlm.models.shards import ShardReader, ShardStore
from distilvlm.recipe.schema import OptimSpec
from distilvlm.teachers.local import hidden_rows
from distilvlm.train.loop import Loop
from distilvlm.train.optim import adamw
from distilvlm.train.task import Task

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "student", "teacher", "size_ratio", "samples",
    "visual", "positions", "dtype", "what", "seconds", "extra_mib", "times_fine_tuning", "times_reference",
]  # fmt: skip


class Local:
    """A teacher in this process that takes the student's features."""

    shares_vision = True

    def __init__(self, vlm: VLM) -> None:
        self.vlm, self.head = vlm, forward.head_weight(vlm.model)

    def targets(self, batch: Batch, rows: Tensor, features: Tensor | None) -> Targets:
        return Targets(hidden_rows(self.vlm, batch, None, rows, features), self.head)


class Cached:
    """Its hidden rows, read from a store that has every sample's under a key of its own."""

    shares_vision = False

    def __init__(self, local: Local, batch: Batch, rows: Tensor, directory: str) -> None:
        self.head, self.device = local.head, rows.device
        hidden = local.targets(batch, rows, batch.features).hidden
        assert hidden is not None
        owners = batch.owners_of(rows)
        store = ShardStore(directory, {"teacher": "random"})
        self.keys = [str(number) for number in range(batch.samples)]
        store.plan(self.keys, lambda new: [new])
        store.write(0, [{"hidden": hidden[owners == n].cpu()} for n in range(batch.samples)], ragged=True)
        self.reader = ShardReader(directory)

    def targets(self, batch: Batch, rows: Tensor, features: Tensor | None) -> Targets:
        places = [(self.reader.place(key), key) for key in self.keys]
        found = [self.reader.tensors(*place, key)["hidden"] for place, key in places if place is not None]
        return Targets(torch.cat(found).to(self.device, non_blocking=True), self.head)


class Contenders:
    def __init__(self, options: argparse.Namespace, dtype: str, directory: str) -> None:
        bf16, device = dtype == "bf16", options.device
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if bf16 else "no")
        self.student = model(options.layers, device, options.student, options.side)
        self.teacher = model(options.teacher_layers, device, options.teacher, options.side)
        self.teacher.model.requires_grad_(False).to(loss_head.DTYPES[dtype])
        members = choose(self.student.model, ["projector", "language"]).parameters
        self.spec = OptimSpec(lr=1e-8, batch=options.samples, updates=1_000_000, schedule="constant", clip=1.0)
        self.optimizer = adamw(members, self.spec)
        length = options.side**2 + options.text
        shape = length, 1, options.text // 2
        samples = [sample(n, shape, self.student.embedding_rows, options.side) for n in range(options.samples)]
        self.batch = collate(samples).to(device)
        self.every = Objective(text=1, response=1, visual=1, relation=1)
        self.local = Local(self.teacher)
        rows = self.every.rows(self.batch.response_rows, self.batch.visual_rows)
        with self.accelerator.autocast():
            self.cached = Cached(self.local, self.batch, rows, directory)

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, objective: Objective, teacher: Local | Cached | None) -> measuring.Step:
        task = Task(self.student, objective, None if teacher is None else teacher.head)
        grouping = Grouping(self.batch.samples)
        # What a benchmark needs of a teacher, not all that a run does.
        given = teacher, self.spec, self.spec.updates or 1, grouping
        loop = Loop(self.accelerator, task, self.optimizer, *given)  # pyright: ignore[reportArgumentType]

        def run() -> None:
            for _ in loop.run([(0, self.batch.samples, [self.batch])]):
                pass

        return run

    def reference(self) -> None:
        batch = self.batch
        self.student.model.train()
        with self.accelerator.autocast():
            student = self._logits(self.student, batch)
            with torch.no_grad():
                teacher = self._logits(self.teacher, batch)
            losses = [self._published(student, teacher, batch, number) for number in range(batch.samples)]
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_([p for p in self.student.model.parameters() if p.grad is not None], 1.0)
        self.optimizer.step()

    def _logits(self, vlm: VLM, batch: Batch) -> Tensor:
        hidden = forward.hidden_states(vlm.model, vlm.layout, batch, batch.features)
        return vlm.model.lm_head(hidden).float().flatten(0, 1)  # [samples * length, V]

    def _published(self, student: Tensor, teacher: Tensor, batch: Batch, number: int) -> Tensor:
        """Of one sample: the trainer's micro-batches hold one (specification §2.1)."""
        answers = batch.response_rows[batch.owners_of(batch.response_rows) == number]
        targets = batch.response_targets[batch.owners_of(batch.response_rows) == number]
        visual = batch.visual_rows[batch.owners_of(batch.visual_rows) == number]

        def apart(rows: Tensor) -> Tensor:
            return kl_div(student[rows].log_softmax(-1), teacher[rows].softmax(-1), reduction="batchmean")

        with torch.autocast(student.device.type, enabled=False):
            ours, theirs = student[visual] @ student[visual].T, teacher[visual] @ teacher[visual].T
        relation = 1 - cosine_similarity(theirs.flatten(), ours.flatten(), dim=0)
        return cross_entropy(student[answers], targets) + apart(answers) + apart(visual) + relation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M", help="whose shapes it has")
    parser.add_argument("--layers", type=int, default=30, help="of the student")
    parser.add_argument("--teacher", default="HuggingFaceTB/SmolLM2-360M")
    parser.add_argument("--teacher-layers", type=int, default=50)
    parser.add_argument("--samples", type=int, default=4, help="of the update, in one micro-batch")
    parser.add_argument("--side", type=int, default=14, help="patches along a picture's side")
    parser.add_argument("--text", type=int, default=60, help="tokens of a sample, half of them learned")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    measuring.arguments(parser, "step.csv")
    options = parser.parse_args()
    base = measuring.prepare(options)
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    for dtype in options.dtype:
        measuring.forget_precision()
        with tempfile.TemporaryDirectory() as directory:
            all_of = Contenders(options, dtype, str(Path(directory) / "store"))
            sizes = [
                sum(p.numel() for p in vlm.model.model.language_model.parameters())
                for vlm in (all_of.student, all_of.teacher)
            ]
            steps = {
                "fine-tuning": all_of.update(Objective(), None),
                "cached": all_of.update(all_of.every, all_of.cached),
                "local": all_of.update(all_of.every, all_of.local),
                "reference": all_of.reference,
            }
            found = measuring.measured(steps, options, all_of.forget)
        shape = {
            "student": f"{options.student.split('/')[-1]}, {options.layers} layers, {sizes[0] / 1e6:.0f} M",
            "teacher": f"{options.teacher.split('/')[-1]}, {options.teacher_layers} layers, {sizes[1] / 1e6:.0f} M",
            "size_ratio": round(sizes[1] / sizes[0], 2),
            "samples": options.samples,
            "visual": options.side**2,
            "positions": all_of.batch.input_ids.numel(),
            "dtype": dtype,
        }
        print(", ".join(f"{name} {value}" for name, value in shape.items()))
        lines: list[dict[str, object]] = []
        for what, (seconds, mib) in found.items():
            line: dict[str, object] = {"what": what, "seconds": round(seconds, 4), "extra_mib": round(mib)}
            line["times_fine_tuning"] = round(seconds / found["fine-tuning"][0], 2)
            line["times_reference"] = round(seconds / found["reference"][0], 2)
            print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)
            lines.append({**base, **shape, **line})
        measuring.write(options, FIELDS, lines)
        options.append = True


if __name__ == "__main__":
    main()
