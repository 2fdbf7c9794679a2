"""A run of IAA: a projector's alignment, then adaptors beside a frozen base. It may be killed anywhere, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import distilvlm
from distilvlm import cli
from distilvlm.cost import estimate
from distilvlm.cost.meter import bytes_under
from distilvlm.data import read
from distilvlm.evaluate import answer
from distilvlm.models import build, hosted, load, save
from distilvlm.models.parts import named
from distilvlm.models.sources import NotHere
from distilvlm.models.vlm import VLM
from distilvlm.recipe import ModelSpec, SourceSpec, load_recipe
from distilvlm.report.page import render
from distilvlm.report.read import read_run
from distilvlm.runs.events import read_events
from distilvlm.runs.student import Student
from distilvlm.train.task import FrozenBaseError, Task, objective_of

from .conftest import Server, weights
from .tiny_iaa import GROUNDING, MULTIMODAL, write_iaa_recipe

STAGES = ("align", "multimodal", "grounding")
STEPS = 6  # of each stage


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_iaa_recipe(tmp_path_factory.mktemp("iaa"))


@pytest.fixture(scope="module")
def whole(recipe: Path, server: Server) -> tuple[Path, list[str]]:
    """The run, never disturbed, and its file operations and steps."""
    directory = recipe.parent / "whole"
    return directory, server.finish(recipe, directory)


@pytest.fixture
def finished(whole: tuple[Path, list[str]]) -> VLM:
    return load(whole[0] / "model")


def stock(recipe: Path) -> VLM:
    """The base as the recipe composes it, which knows nothing of adaptors."""
    resolved = load_recipe(recipe)
    return build(resolved.student, resolved.seed)


def final(run: Path, stage: str) -> dict[str, Tensor]:
    return load_file(run / f"stages/{STAGES.index(stage):02d}-{stage}/final/weights.safetensors")


def hidden(vlm: VLM) -> Tensor:
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        return vlm.model(input_ids=ids).logits


def test_a_finished_student_is_its_adaptors_and_what_they_stand_on(
    whole: tuple[Path, list[str]], finished: VLM
) -> None:
    model = whole[0] / "model"
    assert finished.adaptors == ("multimodal", "grounding") and finished.workflow == "text"
    files = {file.relative_to(model).as_posix() for file in model.rglob("*.safetensors")}
    assert files == {f"{name}/adaptor.safetensors" for name in finished.adaptors} | {"projector.safetensors"}
    everything = named(finished.model)
    for stage in ("multimodal", "grounding"):
        trained = final(whole[0], stage)
        assert {name.split(".")[1] for name in trained} == {stage}
        for name, tensor in trained.items():
            assert torch.equal(everything[name], tensor), name


def test_the_base_is_bit_for_bit_what_it_was_through_the_whole_run(recipe: Path, finished: VLM) -> None:
    before = stock(recipe)
    ours, theirs = dict(finished.model.named_parameters()), dict(before.model.named_parameters())
    assert ours.keys() == theirs.keys() and type(finished.model) is type(before.model)
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed and all("projector" in name for name in changed)  # of the alignment, before any adaptor
    assert torch.equal(hidden(finished), hidden(before))
    spoken = {name: hidden(finished.use(name)) for name in finished.adaptors}
    assert not torch.equal(spoken["multimodal"], spoken["grounding"])
    assert not torch.equal(spoken["multimodal"], hidden(finished.use("text")))


def test_an_adaptors_projector_begins_as_the_aligned_one(recipe: Path, whole: tuple[Path, list[str]]) -> None:
    run, _ = whole
    student = Student(load_recipe(recipe))
    stages = {stage.name: stage for stage in load_recipe(recipe).stages}
    student.replay(stages["align"], run / "stages/00-align/final")
    student.transform(stages["multimodal"])
    own = student.vlm.host["multimodal"].projector  # pyright: ignore
    aligned = final(run, "align")
    assert own is not None
    for name, value in own.state_dict().items():
        assert torch.equal(value, aligned[f"model.multi_modal_projector.{name}"])


def test_bytes_on_disk_were_foreseen(recipe: Path, whole: tuple[Path, list[str]]) -> None:
    run, _ = whole
    resolved = load_recipe(recipe)
    costs = estimate(resolved, build(resolved.student, 0, meta=True), None, measure=False)
    for cost, stage in zip(costs, ("00-align", "01-multimodal", "02-grounding"), strict=True):
        assert cost.disk["trained"] == pytest.approx(bytes_under(run / "stages" / stage / "final"), abs=60)
    assert costs[-1].disk["finished student"] == pytest.approx(bytes_under(run / "model"), rel=0.02)


def test_the_report_shows_what_an_adaptor_is_and_takes(whole: tuple[Path, list[str]]) -> None:
    page = render(read_run(whole[0]))
    assert "insert adaptor &#39;multimodal&#39;: 2 layers, structure (c)" in page
    assert "<td>multimodal, structure (c)</td><td>1, 3</td>" in page
    assert page.count('gates <span class="soft">544</span>') == 1  # of (b) alone
    for told in ("multimodal 48.1 kB", "grounding 50.2 kB", "the frozen base"):
        assert told in page


def events(run: Path) -> list[dict[str, Any]]:
    found = [event for event in read_events(run / "events.jsonl") if event["event"] == "update"]
    for event in found:
        del event["seconds"], event["wait"]
    return found


def test_a_killed_run_continues_bit_for_bit(
    recipe: Path, whole: tuple[Path, list[str]], server: Server, tmp_path: Path
) -> None:
    """In the last stage, behind a checkpoint that holds its adaptor and nothing of the base or the other one."""
    (expected, operations), stage = whole, STAGES[-1]
    steps = [number for number, label in enumerate(operations, start=1) if label == "step"]
    assert len(steps) == len(STAGES) * STEPS
    run = tmp_path / "run"
    statuses, _ = server.run(recipe, run, die_at=steps[STAGES.index(stage) * STEPS + 3])
    assert any(statuses), server.errors()
    (kept,) = run.glob(f"stages/*-{stage}/checkpoints/*/weights.safetensors")
    assert all(name.startswith(f"adaptors.{stage}.") for name in load_file(kept))
    server.finish(recipe, run)
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert events(run) == events(expected)


def test_two_processes_end_where_one_does(
    recipe: Path, whole: tuple[Path, list[str]], server: Server, tmp_path: Path
) -> None:
    overrides: dict[str, Any] = {"student.language.config.attention_dropout": 0.0}
    overrides |= {f"stages.{stage}.optim": {"epochs": None, "updates": 2} for stage in STAGES}
    for name, world in (("one", 1), ("two", 2)):
        statuses, _ = server.run(recipe, tmp_path / name, world=world, overrides=overrides)
        assert not any(statuses), server.errors()
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_a_gradient_of_the_base_stops_the_first_update(recipe: Path) -> None:
    resolved = load_recipe(recipe)
    student = Student(resolved)
    student.transform(resolved.stages[1])
    student.choose(resolved.stages[1])
    task = Task(student.vlm, objective_of(resolved.stages[1]), None)
    with pytest.raises(FrozenBaseError, match="has no gradient"):
        task.require_frozen_base()
    everything = named(student.vlm.model)
    for parameter in everything.values():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    task.require_frozen_base()
    stray = everything["model.language_model.norm.weight"]
    stray.grad = torch.zeros_like(stray)
    with pytest.raises(FrozenBaseError, match=r"norm\.weight is frozen and has a gradient"):
        task.require_frozen_base()


def test_a_mixed_batch_answers_as_each_workflow_does_alone(recipe: Path, finished: VLM) -> None:
    records = list(
        read(
            SourceSpec(path=str(recipe.parent / "questions.json"), images=str(recipe.parent / "pictures")), "q"
        ).records
    )
    names = ("text", *finished.adaptors)
    workflows = [names[index % 3] for index in range(len(records))]
    alone = {
        name: answer(finished.use(name), records, "chat", "square", max_new_tokens=6, batch_size=1) for name in names
    }
    finished.use("text")
    mixed = answer(finished, records, "chat", "square", max_new_tokens=6, batch_size=5, workflows=workflows)
    assert mixed == [alone[name][index] for index, name in enumerate(workflows)]
    assert len({tuple(answers) for answers in alone.values()}) == 3
    assert finished.workflow == "text"


def test_the_command_line_asks_a_workflow_by_name(
    recipe: Path, whole: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    files = ["--data", recipe.parent / "questions.json", "--images", recipe.parent / "pictures"]
    asking = ["distilvlm", "evaluate", whole[0] / "model", *files, "--json", "--max-new-tokens", 2]

    def said(*options: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", [*map(str, asking), *options])
        with pytest.raises(SystemExit):
            cli.main()
        told = capsys.readouterr()
        return told.out, told.err

    assert json.loads(said()[0])["workflow"] == "grounding"  # the last that was inserted
    assert json.loads(said("--workflow", "text")[0])["workflow"] == "text"
    assert "no workflow 'see' in this model: there is text, multimodal, grounding" in said("--workflow", "see")[1]


def test_a_recipe_goes_on_from_a_directory_of_adaptors(
    recipe: Path, whole: tuple[Path, list[str]], server: Server, tmp_path: Path
) -> None:
    """It trains one of them further, then a copy of it."""
    content = yaml.safe_load(recipe.read_text())
    content["student"] = {"from": str(whole[0] / "model"), "workflow": "multimodal"}
    common = {"data": ["questions"], "optim": {"lr": 1e-3, "batch": 4, "updates": 2}}
    insert = {**MULTIMODAL, "adaptor": "copy", "start": "multimodal"}
    content["stages"] = [
        {"name": "more", "train": ["adaptor.layers"], **common},
        {"name": "copy", "transform": [insert], "train": ["adaptor.norm"], **common},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    server.finish(path, tmp_path / "run")
    before, after = load(whole[0] / "model"), load(tmp_path / "run/model")
    assert after.adaptors == (*before.adaptors, "copy")
    one, other = named(before.model), named(after.model)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed and all(name.startswith("adaptors.multimodal.layers.") for name in changed)
    trained, copied = (after.host[name].state_dict() for name in ("multimodal", "copy"))  # pyright: ignore
    assert {name for name in trained if not torch.equal(trained[name], copied[name])} == {"norm.weight"}
    origins = (json.loads((run / "model/host.json").read_text())["student"] for run in (whole[0], tmp_path / "run"))
    assert next(origins) == next(origins)


def test_nobody_takes_adaptors_for_a_stock_checkpoint(
    whole: tuple[Path, list[str]], finished: VLM, tmp_path: Path
) -> None:
    model = whole[0] / "model"
    with pytest.raises((ValueError, OSError)):
        AutoConfig.from_pretrained(model)
    with pytest.raises((ValueError, OSError)):
        AutoModelForImageTextToText.from_pretrained(model)
    spec = yaml.safe_load((whole[0] / "recipe.yaml").read_text())["student"]
    with pytest.raises(ValueError, match="holds adaptors and no model of its own"):
        build(ModelSpec.model_validate({**spec, "language": {"from": str(model)}}), 0)
    with pytest.raises(ValueError, match="a stock checkpoint has no place for adaptors"):
        save.save(finished, tmp_path / "stock", "square")


def test_another_base_is_refused(whole: tuple[Path, list[str]], recipe: Path) -> None:
    spec = load_recipe(recipe).student
    assert spec.language is not None and spec.language.config is not None
    config = {**spec.language.config, "initializer_range": 0.5}
    other = spec.model_copy(update={"language": spec.language.model_copy(update={"config": config})})
    with pytest.raises(ValueError, match="other weights than its adaptors were trained on"):
        hosted.load(whole[0] / "model", base=other)
    gone = ModelSpec.model_validate({"from": str(recipe.parent / "nowhere" / "model")})
    with pytest.raises(NotHere):
        hosted.load(whole[0] / "model", base=gone)


def test_it_is_the_same_base_in_half_precision(whole: tuple[Path, list[str]]) -> None:
    vlm = load(whole[0] / "model", torch.bfloat16)
    assert {tensor.dtype for tree in vlm.trees for tensor in tree.parameters()} == {torch.bfloat16}


def test_adaptors_learn_from_a_teacher_as_any_student_does(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["teacher"] = content["student"]
    for stage in content["stages"][1:]:
        stage["loss"] = {"text": 1.0, "response": 1.0, "relation": 0.5}
        stage["optim"] = {"lr": 1e-3, "batch": 4, "updates": 2, "warmup": 0.0}
    content["machine"] = {"micro_batch": 2, "gradient_checkpointing": True}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    run = distilvlm.run(path, directory=tmp_path / "run")
    told = events(run.directory)
    assert [event["stage"] for event in told[STEPS:]] == ["multimodal"] * 2 + ["grounding"] * 2
    assert all(event["terms"]["response"] > 0 for event in told[STEPS:])
    # (b) begins as the base, which is the teacher but for its projector.
    first = {event["stage"]: event["terms"]["response"] for event in reversed(told[STEPS:])}
    assert first["grounding"] < first["multimodal"]
    assert GROUNDING["structure"] == "b"
