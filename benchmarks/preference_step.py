"""Time and extra memory of one preference update with cached reference log-probabilities, against the reference's.

    python benchmarks/preference_step.py

A student of SmolLM2-135M's shapes with 10 of its layers, and a teacher with all 30: random weights, records of 64
visual positions, a prompt, and two answers. What trains is what LLaVA-MoD's last stage does: feed-forwards, projector.

* "four forwards": the student on the chosen answers, on the rejected ones, the teacher on both; logits of all positions
  (specification §2.4, as in the published trainer).
* "ours": `train.Loop` on the same records, chosen and rejected in one forward; the teacher has been asked before and is
  gone. Target: at most 0.6 times the time. KTO's z0 is of the whole update: with two micro-batches it takes one more
  forward of each, without gradient.
* "look": what asking the teacher takes, once per record and run: with one pass over the data it belongs to the price.

Both make gradients of all micro-batches, clip them and take an optimiser step.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import measuring
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from distilvlm.data import Grouping
from distilvlm.data.batch import CHOSEN, REJECTED, Batch, SampleKey
from distilvlm.losses.answers import Answers
from distilvlm.losses.objective import Objective
from distilvlm.losses.preference import preference
from distilvlm.models import VLM, choose, forward
from distilvlm.models.architectures import published
from distilvlm.models.language import cut_config
from distilvlm.models.towers import CLIP, layout_of
from distilvlm.recipe.schema import OptimSpec
from distilvlm.train.loop import Loop
from distilvlm.train.optim import adamw
from distilvlm.train.task import Task

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "records", "visual", "prompt", "answer",
    "student_layers", "teacher_layers", "dtype", "kind", "micro_batches", "what", "seconds", "extra_mib", "time_ratio",
]  # fmt: skip
SHAPES = "HuggingFaceTB/SmolLM2-135M"
SIDE = 8  # patches along a picture's side


def model(layers: int, device: str, shapes: str = SHAPES, side: int = SIDE) -> VLM:
    """A Llava of random weights; its tower is of one layer, and never runs: features are kept.

    Args:
        layers: of its language model, which may be more than `shapes` have.
        side: patches along a picture's side.
    """
    text = published(shapes)
    if text is None:
        raise ValueError(f"the shapes of {shapes} are not known (models/architectures.py)")
    if layers > text.num_hidden_layers:
        text = type(text)(**(text.to_dict() | {"num_hidden_layers": layers, "layer_types": None}))
    vision = CLIPVisionConfig(
        hidden_size=1024, num_hidden_layers=1, num_attention_heads=16, patch_size=14, image_size=14 * side
    )
    layout = layout_of(vision, -1, "default", CLIP)
    config = LlavaConfig(
        vision_config=vision, text_config=cut_config(text, range(layers)), image_token_index=text.vocab_size,
        image_seq_length=layout.placeholders, vision_feature_layer=layout.layer, tie_word_embeddings=True,
    )  # fmt: skip
    return VLM(LlavaForConditionalGeneration(config).to(device).eval(), None, layout, text.vocab_size)


def records(options: argparse.Namespace, vocabulary: int) -> Batch:
    """Pairs: the chosen answer is a little longer than the rejected one, as they tend to be."""
    torch.manual_seed(0)
    visual, start = SIDE**2, SIDE**2 + options.prompt
    answers = [options.answer, options.answer - options.answer // 8] * options.records
    samples, length = len(answers), start + options.answer
    ids = torch.randint(0, vocabulary, (samples, length))
    sample = torch.arange(samples).unsqueeze(1)
    position = torch.arange(length).unsqueeze(0)
    ends = start + torch.tensor(answers).unsqueeze(1)
    placeholders = (sample * length + torch.arange(visual)).flatten()
    supervised = ((position >= start - 1) & (position < ends - 1)).flatten().nonzero().flatten()
    features = torch.randn(options.records, visual, 1024).repeat_interleave(2, dim=0)
    return Batch(
        input_ids=ids,
        attention_mask=(position < ends).long(),
        placeholder_rows=placeholders,
        visual_rows=placeholders,
        response_rows=supervised,
        response_targets=ids.flatten()[supervised + 1],
        weights=torch.ones(samples),
        pictures=None,
        features=features,
        keys=tuple(SampleKey("pairs", "pairs.json", row // 2) for row in range(samples)),
        roles=torch.tensor([CHOSEN, REJECTED]).repeat(options.records),
    ).to(options.device)


def part(batch: Batch, samples: Tensor) -> Batch:
    """Some samples of a batch, in their order, cut to the longest of them."""
    length = int(batch.attention_mask[samples].sum(1).max())

    def rows(old: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the rows that stay, and which they were."""
        owner, place = old // batch.length, old % batch.length
        new = torch.full((batch.samples,), -1, device=old.device)
        new[samples] = torch.arange(samples.numel(), device=old.device)
        stays = new[owner] >= 0
        return new[owner[stays]] * length + place[stays], stays

    placeholders, _ = rows(batch.placeholder_rows)
    responses, kept = rows(batch.response_rows)
    assert batch.features is not None and batch.roles is not None
    return Batch(
        input_ids=batch.input_ids[samples, :length],
        attention_mask=batch.attention_mask[samples, :length],
        placeholder_rows=placeholders,
        visual_rows=placeholders,
        response_rows=responses,
        response_targets=batch.response_targets[kept],
        weights=batch.weights[samples],
        pictures=None,
        features=batch.features[samples],
        keys=tuple(batch.keys[index] for index in samples.tolist()),
        roles=batch.roles[samples],
        reference=None if batch.reference is None else batch.reference[samples],
    )


def look(teacher: VLM, batch: Batch) -> Tensor:
    """[samples] log-probability of each answer, as `teachers.References` asks for them."""
    with torch.no_grad():
        hidden = forward.hidden_states(teacher.model, teacher.layout, batch, batch.features)
        head, rows = forward.head_weight(teacher.model), batch.response_rows
        owners = batch.owners_of(rows)
        answers = Answers.of(hidden.flatten(0, 1)[rows], head, rows, owners, rows, batch.response_targets)
        return answers.log_probabilities(batch.samples)


def summed(vlm: VLM, batch: Batch) -> Tensor:
    """The same from logits of all positions, [samples], as the published trainer has it."""
    hidden = forward.hidden_states(vlm.model, vlm.layout, batch, batch.features)
    logits = vlm.model.lm_head(hidden).float()  # [samples, length, V]
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.response_rows + 1] = batch.response_targets
    labels, logits = labels[:, 1:], logits[:, :-1]
    each = logits.log_softmax(-1).gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
    return (each * (labels != -100)).sum(1)


class Contenders:
    """Both ways to make an update of the same records, of students with the same weights."""

    def __init__(self, options: argparse.Namespace, dtype: str) -> None:
        self.options = options
        measuring.forget_precision()
        self.accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision="no" if dtype == "fp32" else "bf16")
        self.student, self.teacher = model(options.student, options.device), model(options.teacher, options.device)
        self.teacher.model.requires_grad_(False)
        self.members = choose(self.student.model, ["language.feed_forward", "projector"]).parameters
        self.spec = OptimSpec(lr=1e-8, batch=options.records, updates=1_000_000, schedule="constant", clip=1.0)
        self.optimizer = adamw(self.members, self.spec)
        self.batch = records(options, self.student.embedding_rows)

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def look(self) -> None:
        with self.accelerator.autocast():
            look(self.teacher, self.batch)

    def four_forwards(self, kind: str, micro_batches: int) -> measuring.Step:
        halves = [(part(p, _every(p, 0)), part(p, _every(p, 1))) for p in self._split(micro_batches)]

        def run() -> None:
            for chosen, rejected in halves:
                with self.accelerator.autocast():
                    policy = [summed(self.student, half) for half in (chosen, rejected)]
                    with torch.no_grad():
                        reference = [summed(self.teacher, half) for half in (chosen, rejected)]
                    losses = preference(*policy, *reference, kind=kind, detach=False)
                (losses.mean() / micro_batches).backward()
            nn.utils.clip_grad_norm_([p for m in self.members.values() for p in m.values()], self.spec.clip or 0)
            self.optimizer.step()

        return run

    def ours(self, kind: str, micro_batches: int) -> measuring.Step:
        with self.accelerator.autocast():
            reference = look(self.teacher, self.batch)
        batches = self._split(micro_batches, reference)
        objective = Objective(text=0, preference=1, preference_kind=kind)
        task = Task(self.student, objective, None)
        size = self.options.records // micro_batches
        loop = Loop(self.accelerator, task, self.optimizer, None, self.spec, self.spec.updates or 1, Grouping(size))

        def run() -> None:
            for _ in loop.run([(0, self.options.records, batches)]):
                pass

        return run

    def _split(self, micro_batches: int, reference: Tensor | None = None) -> list[Batch]:
        batch = copy.copy(self.batch)
        object.__setattr__(batch, "reference", reference)
        samples = torch.arange(batch.samples, device=self.options.device)
        return [part(batch, some) for some in samples.chunk(micro_batches)]


def _every(batch: Batch, which: int) -> Tensor:
    return torch.arange(which, batch.samples, 2, device=batch.input_ids.device)


def cases(options: argparse.Namespace, dtype: str) -> Sequence[dict[str, object]]:
    contenders = Contenders(options, dtype)
    runs: dict[tuple[str, int, str], measuring.Step] = {("", 0, "look"): contenders.look}
    for case in options.case:
        kind, _, count = case.partition(":")
        runs[kind, int(count or 1), "four forwards"] = contenders.four_forwards(kind, int(count or 1))
        runs[kind, int(count or 1), "ours"] = contenders.ours(kind, int(count or 1))
    named = {f"{kind} {count} {what}": run for (kind, count, what), run in runs.items()}
    found = dict(zip(runs, measuring.measured(named, options, contenders.forget).values(), strict=True))
    rows: list[dict[str, object]] = []
    for (kind, count, what), (seconds, mib) in found.items():
        row = {"dtype": dtype, "kind": kind, "micro_batches": count or "", "what": what}
        row |= {"seconds": round(seconds, 3), "extra_mib": round(mib)}
        if kind:
            row["time_ratio"] = round(seconds / found[kind, count, "four forwards"][0], 3)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--case", nargs="+", default=["kto", "kto:2", "dpo"], help="KIND or KIND:MICRO_BATCHES")
    parser.add_argument("--records", type=int, default=4, help="of an update")
    parser.add_argument("--prompt", type=int, default=40, help="tokens behind the picture")
    parser.add_argument("--answer", type=int, default=60, help="tokens of a chosen answer")
    parser.add_argument("--student", type=int, default=10, help="layers")
    parser.add_argument("--teacher", type=int, default=30, help="layers")
    measuring.arguments(parser, "preference_step.csv")
    options = parser.parse_args()
    base = measuring.prepare(options)
    base |= {"records": options.records, "visual": SIDE**2, "prompt": options.prompt, "answer": options.answer}
    base |= {"student_layers": options.student, "teacher_layers": options.teacher}
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    columns = "{:>5} {:>5} {:>13} {:>14} {:>9} {:>9} {:>6}"
    print(columns.format("dtype", "kind", "micro-batches", "what", "seconds", "extra MiB", "× time"))
    written: list[dict[str, object]] = []
    for dtype in options.dtype:
        for row in cases(options, dtype):
            print(columns.format(*(row.get(name, "") for name in FIELDS[FIELDS.index("dtype") :])), flush=True)
            written.append({**base, **row})
    measuring.write(options, FIELDS, written)


if __name__ == "__main__":
    main()
