"""Updates that can't be made: nothing is changed by them, and what is wrong is named and kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

import distilvlm
from distilvlm.models import forward
from distilvlm.recipe import load_recipe
from distilvlm.runs.directory import RunDirectory, RunError
from distilvlm.runs.events import read_events
from distilvlm.runs.shortage import MemoryShortageError, Room
from distilvlm.runs.trouble import refuse_again
from distilvlm.train import ExplodingError, NonFiniteError
from distilvlm.train.now import Now

from .tiny import write_recipe

KD = {"text": 1.0, "response": 1.0, "visual": 1.0, "relation": 0.5}
STAGE = {
    "name": "sft",
    "train": ["projector", "language"],
    "data": ["questions"],
    "optim": {"lr": 0.01, "batch": 4, "updates": 3},
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("distilvlm.runs.execute.consult", lambda *_: None)  # the doctor's own steps are not meant
    return write_recipe(tmp_path, stages=[STAGE], teacher=None)


def spoil(monkeypatch: pytest.MonkeyPatch, row: str, value: float = float("nan")) -> None:
    """Spoil what the second layer gives in every batch with this text, from the second update on."""
    original = forward.hidden_states

    def spoiled(model: Any, layout: Any, batch: Any, *rest: Any) -> torch.Tensor:
        def hook(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
            return output * value

        module = model.get_decoder().layers[1].mlp.down_proj
        wanted = _has(batch, row) and updates_seen()
        handle = module.register_forward_hook(hook, prepend=True) if wanted else None
        try:
            return original(model, layout, batch, *rest)
        finally:
            if handle is not None:
                handle.remove()

    began: list[int] = []
    begin = Now.begin
    monkeypatch.setattr(Now, "begin", lambda self, update: (began.append(update), begin(self, update)))

    def updates_seen() -> bool:
        return bool(began) and began[-1] > 1

    monkeypatch.setattr(forward, "hidden_states", spoiled)


def _has(batch: Any, row: str) -> bool:
    return any(f"{key.row}" in row.split() for key in batch.keys)


def test_the_module_and_the_samples_are_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "0 1 2 3 4 5 6 7 8 9")
    with pytest.raises(NonFiniteError, match=r"loss term text is not finite at update 2") as caught:
        distilvlm.run(recipe, directory=tmp_path / "run")
    told = str(caught.value)
    assert "what comes out of student.model.language_model.layers.1.mlp.down_proj" in told
    assert "machine.precision=fp32" in told and "micro-batch 1" in told
    (kept,) = (tmp_path / "run" / "trouble").iterdir()
    report = json.loads((kept / "report.json").read_text())
    assert report["kind"] == "forward" and report["update"] == 2 and report["terms"]["text"] == "nan"
    assert len(report["samples"]) == 2 and report["rate"] > 0
    assert {sample["terms"]["text"] for sample in report["samples"]} == {"nan"}
    assert load_file(kept / "batch.safetensors")["input_ids"].shape[0] == 2
    shown = [sample for sample in report["samples"] if sample["pictures"]]
    assert all(Path(name).exists() for sample in shown for name in sample["pictures"])


def test_the_update_changes_nothing_and_is_not_tried_again_by_the_same_command(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distilvlm.run(recipe, directory=tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        spoil(patch, "0 1 2 3 4 5 6 7 8 9")
        with pytest.raises(NonFiniteError):
            distilvlm.run(recipe, {"machine.checkpoint_every": 1}, tmp_path / "run")
    with pytest.raises(RunError, match=r"stopped at update 2 .* would stop there again(.|\n)*remove"):
        distilvlm.run(recipe, {"machine.keep": 3}, tmp_path / "run")
    place, sums = RunDirectory(tmp_path / "run"), load_recipe(recipe, {"machine.micro_batch": 1})
    refuse_again(sums, sums.stages[0], 1, place, processes=1)  # other sums may get past it
    for kept in place.trouble.iterdir():
        kept.rename(tmp_path / kept.name)  # as the message says
    distilvlm.run(recipe, directory=tmp_path / "run")
    ends = [load_file(tmp_path / one / "stages/00-sft/final/weights.safetensors") for one in ("undisturbed", "run")]
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])


def test_one_sample_among_others_is_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "3")
    with pytest.raises(NonFiniteError, match=r"so is alone: \S*questions.json row 3;"):
        distilvlm.run(recipe, {"machine.micro_batch": 4, "stages.sft.optim.updates": 6}, tmp_path / "run")
    (kept,) = (tmp_path / "run" / "trouble").iterdir()
    terms = {one["row"]: one["terms"]["text"] for one in json.loads((kept / "report.json").read_text())["samples"]}
    assert len(terms) == 4 and [row for row, value in terms.items() if value == "nan"] == [3]


def test_a_gradient_alone_is_found_on_its_way_back(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = forward.embeddings

    def endless(*arguments: Any) -> torch.Tensor:
        embedded = original(*arguments)
        if embedded.requires_grad:
            embedded.register_hook(lambda gradient: gradient * float("inf"))
        return embedded

    monkeypatch.setattr(forward, "embeddings", endless)
    with pytest.raises(NonFiniteError, match=r"the gradient is not finite at update 1(.|\n)*gradient (of|that comes)"):
        distilvlm.run(recipe, directory=tmp_path / "run")
    assert not [event for event in read_events(tmp_path / "run/events.jsonl") if event["event"] == "update"]


def test_a_teacher_that_gives_nan_is_told_as_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilvlm.runs.execute.consult", lambda *_: None)
    recipe = write_recipe(tmp_path, stages=[{**STAGE, "loss": KD}])
    original = forward.hidden_states

    def spoiled(model: Any, *arguments: Any) -> torch.Tensor:
        hidden = original(model, *arguments)
        return hidden * float("nan") if model.config.text_config.hidden_size == 24 else hidden

    monkeypatch.setattr(forward, "hidden_states", spoiled)
    with pytest.raises(NonFiniteError, match=r"the teacher's hidden states(.|\n)*teacher\.precision"):
        distilvlm.run(recipe, directory=tmp_path / "run")


def test_an_explosion_warns_by_default_and_stops_where_it_should(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("distilvlm.train.watch.ENOUGH", 1)
    rule = {"loss": 1.0001, "gradient": 1e9, "updates": 1}
    changes = {f"machine.explosion.{name}": value for name, value in rule.items()} | {"stages.sft.optim.lr": 1.0}
    with caplog.at_level(logging.WARNING):
        distilvlm.run(recipe, changes, tmp_path / "warned")
    assert any("its loss has been over 1.0001 times its median" in record.getMessage() for record in caplog.records)
    with pytest.raises(ExplodingError, match=r"row \d+(.|\n)*machine\.explosion\.then=warn"):
        distilvlm.run(recipe, changes | {"machine.explosion.then": "stop"}, tmp_path / "run")
    losses = [e["loss"] for e in read_events(tmp_path / "warned/events.jsonl") if e["event"] == "update"]
    made = [e["loss"] for e in read_events(tmp_path / "run/events.jsonl") if e["event"] == "update"]
    assert made == losses[: len(made)] and len(made) < 3


def test_memory_that_ran_out_says_what_was_planned_too_low_and_what_fits(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = forward.hidden_states

    def greedy(model: Any, layout: Any, batch: Any, *rest: Any) -> torch.Tensor:
        if batch.samples > 1 and not isinstance(model.lm_head.weight, FakeTensor):  # the plan's are fake
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return original(model, layout, batch, *rest)

    monkeypatch.setattr(forward, "hidden_states", greedy)
    # Of a card that has had 3 GB for a micro-batch that is planned with far less.
    monkeypatch.setattr("distilvlm.runs.shortage.room", lambda _: Room(3 * 10**9, 4 * 10**9, 10**9))
    settings = {"machine.micro_batch": 2, "machine.gradient_checkpointing": True}
    with pytest.raises(MemoryShortageError) as caught:
        distilvlm.run(recipe, settings, tmp_path / "run")
    told = str(caught.value)
    assert "update 1, micro-batch 1" in told and "(2 samples, " in told
    assert "planned too low: micro-batch, by" in told and "1 GB of this card" in told
    assert "fits: --set machine.micro_batch=1 (" in told


def test_memory_of_the_machine_is_no_other_case(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: Any) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(forward, "embeddings", greedy)
    monkeypatch.setattr(
        "distilvlm.runs.shortage.estimate", lambda *_, **__: (_ for _ in ()).throw(ValueError("no plan"))
    )
    with pytest.raises(
        MemoryShortageError, match=r"memory of cpu ran out: MemoryError(.|\n)*what fits is not known: .*no plan"
    ):
        distilvlm.run(recipe, directory=tmp_path / "run")
