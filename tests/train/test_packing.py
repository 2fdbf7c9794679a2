"""Packed is what padded is: losses, terms and gradients of samples that share a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distilvlm.data import Batch, Sample, SampleKey
from distilvlm.data.batch import CHOSEN, IGNORED, REJECTED
from distilvlm.data.collate import collate
from distilvlm.losses import Objective
from distilvlm.models import forward, packing, routing
from distilvlm.models.adaptors import AdaptorConfig, Host
from distilvlm.models.compose import build
from distilvlm.models.upcycling import upcycle
from distilvlm.models.vlm import VLM
from distilvlm.recipe.models import ModelSpec
from distilvlm.teachers import LocalTeacher
from distilvlm.train import Task
from tests.runs.tiny import VISION, language, write_tokenizer

CPU = torch.device("cpu")
KINDS = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": False},
    "sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
}
ALL = Objective(text=1.0, response=0.7, visual=0.4, relation=0.5, temperature=1.3)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """make(kind, hidden, layers) → a VLM in fp64, so that only a sample in sight of another makes a difference."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)

    def made(kind: str = "llama", hidden: int = 16, layers: int = 2) -> VLM:
        facts = {**language(hidden, layers), "attention_dropout": 0.0, **KINDS[kind]}
        spec = {"vision": {"config": VISION}, "language": {"config": facts, "tokenizer": str(directory)}}
        vlm = build(ModelSpec.model_validate(spec), seed=hidden)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in vlm.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        vlm.model.double().requires_grad_(False)
        return vlm

    return made


def sample(vlm: VLM, seed: int, texts: Sequence[int], answer: int, weight: float = 1.0) -> Sample:
    """Text of so many tokens before each picture and behind the last, of which the last `answer` are learned."""
    draw = torch.Generator().manual_seed(seed)
    per_picture, pictures = vlm.layout.placeholders, len(texts) - 1
    places, length = [], 0
    for text in texts[:-1]:
        length += text
        places.append(torch.arange(length, length + per_picture))
        length += per_picture
    length += texts[-1]
    ids = torch.randint(3, 60, (length,), generator=draw)
    labels = torch.full((length,), IGNORED)
    if answer:
        labels[-answer:] = ids[-answer:]
    size = vlm.layout.size
    positions = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
    pixels = torch.randint(0, 256, (pictures, 3, size, size), dtype=torch.uint8, generator=draw)
    return Sample(
        key=SampleKey("talk", "talk.json", seed),
        input_ids=ids,
        labels=labels,
        placeholder_positions=positions,
        visual_positions=positions,
        placeholders=per_picture,
        pictures=pixels if places else None,
        weight=weight,
    )


def samples_of(vlm: VLM) -> list[Sample]:
    """A picture; text only; two pictures; a row that could not be read; a picture to begin with; an answer alone."""
    return [
        sample(vlm, 1, (2, 9), 4),
        sample(vlm, 2, (7,), 3),
        sample(vlm, 3, (1, 0, 8), 5),
        sample(vlm, 4, (1,), 0, weight=0.0),
        sample(vlm, 5, (0, 21), 12),
        sample(vlm, 6, (3,), 2),
    ]


def outcome(task: Task, batch: Batch, teacher: LocalTeacher | None = None) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Loss, terms and tallies of a micro-batch; gradients of what trains."""
    trained = [p for tree in (task.student, task.adaptors) if tree is not None for p in tree.parameters()]
    trained = [parameter for parameter in trained if parameter.requires_grad]
    rows = task.objective.rows(batch.response_rows, batch.visual_rows)
    targets = None if teacher is None else teacher.targets(batch, rows, None)
    result = task(batch, None, targets, rows, 7)
    gradients = torch.autograd.grad(result["loss"], trained)
    values = {"loss": result["loss"].detach(), **result["terms"]}
    return values | ({} if result["routing"] is None else {"routing": result["routing"]}), list(gradients)


def require_same(
    task: Task, samples: Sequence[Sample], teacher: LocalTeacher | None = None, rtol: float = 1e-9, atol: float = 1e-12
) -> dict[str, Tensor]:
    padded, packed = (outcome(task, collate(samples, packed), teacher) for packed in (False, True))
    assert padded[0].keys() == packed[0].keys()
    for name, value in padded[0].items():
        torch.testing.assert_close(packed[0][name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for found, expected in zip(packed[1], padded[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=10 * rtol, atol=atol)
    assert all(gradient.any() for gradient in padded[1])
    return padded[0]


def train(vlm: VLM, *parts: str) -> VLM:
    for name, parameter in vlm.model.named_parameters():
        # A frozen head goes the other way through the relation loss; keys' biases cancel in softmax.
        parameter.requires_grad_(any(part in name for part in parts) and not name.endswith("k_proj.bias"))
    return vlm


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone(make: Any, kind: str) -> None:
    student = train(make(kind), "projector", "language_model", "lm_head")
    require_same(Task(student, Objective(), None).train(), samples_of(student))


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_every_term_of_a_teacher_that_reads_the_same_line(make: Any, kind: str, head: str) -> None:
    student, guide = make(kind), make(kind, hidden=24, layers=3)
    train(student, "projector", *(["language_model", "lm_head"] if head == "trained" else []))
    teacher = LocalTeacher(guide, student, CPU, CPU, share_vision=False)
    task = Task(student, ALL, teacher.head).train()
    terms = require_same(task, samples_of(student), teacher)
    assert all(terms[name] > 0 for name in ("text", "response", "visual", "relation"))


def test_in_single_precision_to_rounding(make: Any) -> None:
    student = train(make(), "projector", "language_model")
    student.model.float()
    require_same(Task(student, Objective(), None).train(), samples_of(student), rtol=1e-6, atol=1e-6)


def test_gradient_checkpointing_runs_a_line_again_as_it_ran(make: Any) -> None:
    student = train(make(), "projector", "language_model")
    task, batch = Task(student, Objective(), None).train(), collate(samples_of(student), packed=True)
    _, expected = outcome(task, batch)
    forward.enable_gradient_checkpointing(student.model)
    student.model.zero_grad()
    rows = task.objective.rows(batch.response_rows, batch.visual_rows)
    task(batch, None, None, rows, 7)["loss"].backward()  # torch.autograd.grad goes without it
    found = [p.grad for p in student.model.parameters() if p.requires_grad]
    for one, other in zip(found, expected, strict=True):
        assert one is not None and torch.equal(one, other)


def test_experts_balance_per_sample_and_are_tallied_without_padding(make: Any) -> None:
    student = upcycle(make("qwen2"), layers="all", seed=2)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if ".mlp.experts." in name or ".gate." in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    routing.install(student.model)
    train(student, "projector", "mlp.gate.weight").model.float()  # torch multiplies experts in fp32 at most
    task = Task(student, Objective(balance=0.5), None).train()
    require_same(task, samples_of(student), rtol=1e-6, atol=1e-6)


def test_an_adaptor_reads_lines(make: Any) -> None:
    student = make()
    host = Host.attach(student.model)
    host.add("seeing", AdaptorConfig(positions=(0, 1)))
    student = replace(student)
    with host.use("seeing"):
        host.adaptors.double().requires_grad_(True)
        task = Task(student, Objective(), None).train()
        assert task.adaptors is not None
        require_same(task, samples_of(student))
    host.add("other", AdaptorConfig(positions=(1,)))
    batch = collate(samples_of(student)[1:2] * 2, packed=True)
    with host.use(("seeing", "other")), pytest.raises(ValueError, match="several workflows can't share a line"):
        forward.hidden_states(student.model, student.layout, batch, None)


def test_answers_of_a_preference_share_a_line(make: Any) -> None:
    student = train(make(), "projector", "language_model")
    pairs = [
        replace(
            sample(student, seed, (2, 9), 4),
            role=CHOSEN,
            reference=-9.0,
            second=replace(sample(student, seed, (2, 12), 7), role=REJECTED, reference=-8.0),
        )
        for seed in (1, 2, 3)
    ]
    task = Task(student, Objective(text=0, preference=1, preference_kind="kto"), None).train()
    require_same(task, pairs)
    padded, packed = (collate(pairs, packed) for packed in (False, True))
    rows = [task.objective.rows(batch.response_rows, batch.visual_rows) for batch in (padded, packed)]
    torch.testing.assert_close(task.moves(packed, None, rows[1]), task.moves(padded, None, rows[0]))


def test_another_sample_s_tokens_change_no_bit(make: Any) -> None:
    student = make()
    first, second, third = samples_of(student)[:3]
    other = replace(first, input_ids=first.input_ids.flip(0))
    batches = [collate([one, second, third], packed=True) for one in (first, other)]
    hidden = []
    for batch in batches:
        features = forward.vision_features(student.model, student.layout, batch.pictures)  # type: ignore[arg-type]
        hidden.append(forward.hidden_states(student.model, student.layout, batch, features)[0])
    start = len(first.input_ids)
    assert torch.equal(hidden[0][start:], hidden[1][start:]) and not torch.equal(hidden[0][:start], hidden[1][:start])


def test_an_unpacked_batch_is_the_padded_one(make: Any) -> None:
    vlm = make()
    samples = samples_of(vlm)
    padded, packed = collate(samples), collate(samples, packed=True)
    rows = torch.unique(torch.cat([packed.response_rows, packed.visual_rows]))
    found, moved = packed.unpacked(rows)
    length = max(len(one.input_ids) for one in samples)
    assert torch.equal(found.input_ids, padded.input_ids[:, :length])
    assert torch.equal(found.attention_mask, padded.attention_mask[:, :length])
    for name in ("response_rows", "visual_rows", "placeholder_rows"):
        ours, theirs = getattr(found, name), getattr(padded, name)
        assert torch.equal(ours // length, theirs // padded.length)
        assert torch.equal(ours % length, theirs % padded.length)
    assert torch.equal(moved, torch.unique(torch.cat([found.response_rows, found.visual_rows])))
    assert padded.unpacked(padded.response_rows)[0] is padded
    assert torch.equal(packed.owners_of(packed.response_rows), padded.owners_of(padded.response_rows))


def test_a_language_model_that_looks_across_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = make()
    packing.require_packable(vlm, "student")
    whole = packing.decoder_arguments

    def leaking(*given: Any) -> dict[str, Any]:
        return whole(*given) | {"position_ids": None, "cuts": None}

    monkeypatch.setattr(packing, "decoder_arguments", leaking)
    with pytest.raises(ValueError, match=r"the student's language model \(llama\) can't be packed: .* machine.packing"):
        packing.require_packable(vlm, "student")


def test_what_is_not_packed_runs_as_before(make: Any) -> None:
    vlm = make()
    batch = collate(samples_of(vlm))
    features = forward.vision_features(vlm.model, vlm.layout, batch.pictures)  # type: ignore[arg-type]
    before = forward.hidden_states(vlm.model, vlm.layout, batch, features)
    packing.require_packable(vlm, "student")
    assert torch.equal(forward.hidden_states(vlm.model, vlm.layout, batch, features), before)
    assert packing.IMPLEMENTATION not in vlm.model.config.to_json_string()
