"""A run of LLaVA-MoD: dense mimic, sparse mimic, preferences. It may be killed anywhere, as any other."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2MoeForCausalLM

import distilvlm
from distilvlm.models import routing
from distilvlm.models.upcycling import upcycled_layers
from distilvlm.recipe import Recipe
from distilvlm.runs import execute
from distilvlm.runs.events import read_events
from distilvlm.runs.stage import StageRun
from distilvlm.runs.student import Student
from distilvlm.teachers import LocalTeacher, References

from .conftest import Server, weights
from .tiny_mod import write_mod_recipe

STEPS = 6  # of each stage


def stochastic(directory: Path) -> Path:
    """Experts are drawn and may be full, so that a continued run must draw on; dropout, too."""
    path = write_mod_recipe(directory)
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"][1]["transform"][0] |= {"second_expert": "gumbel", "capacity": 0.9}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stochastic(tmp_path_factory.mktemp("mod"))


@pytest.fixture(scope="module")
def whole(recipe: Path, server: Server) -> tuple[Path, list[str]]:
    """The run, never disturbed, and its file operations and steps."""
    directory = recipe.parent / "whole"
    return directory, server.finish(recipe, directory)


def updates(run: Path, stage: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run / "events.jsonl") if e["event"] == "update" and e["stage"] == stage]


def test_the_finished_student_is_a_stock_sparse_model(whole: tuple[Path, list[str]]) -> None:
    run, _ = whole
    stock = AutoModelForImageTextToText.from_pretrained(run / "model")
    text = stock.config.text_config
    assert text.architectures == [Qwen2MoeForCausalLM.__name__] and upcycled_layers(stock.config) == [0, 2]
    found = dict(stock.named_parameters())
    trained = load_file(run / "stages/02-pd/final/weights.safetensors")
    assert any("experts" in name for name in trained) and any(name.endswith("mlp.gate.weight") for name in trained)
    for name, tensor in trained.items():
        assert torch.equal(found[name], tensor), name
    unused = [parameter for name, parameter in found.items() if ".shared_expert" in name]
    assert len(unused) == 8 and not any(parameter.view(torch.int32).any() for parameter in unused)


def test_each_stage_trains_what_it_names_and_experts_part(whole: tuple[Path, list[str]]) -> None:
    run, _ = whole
    dense, sparse, preferred = (
        load_file(run / f"stages/{stage}/final/weights.safetensors") for stage in ("00-d2d", "01-d2s", "02-pd")
    )
    assert sparse.keys() == preferred.keys() and all("attn" not in name for name in sparse)
    layer = "model.language_model.layers.0.mlp"
    gate_up = torch.cat([dense[f"{layer}.gate_proj.weight"], dense[f"{layer}.up_proj.weight"]])
    experts = sparse[f"{layer}.experts.gate_up_proj"]
    # Adam moves a weight by about its rate in an update: they are still near what they were copied from.
    for expert in experts:
        assert not torch.equal(expert, gate_up) and (expert - gate_up).abs().max() < 0.1
    assert not torch.equal(experts[0], experts[1])
    for name in sparse:
        assert not torch.equal(sparse[name], preferred[name]), name


def test_events_tell_how_experts_were_used_layer_by_layer(whole: tuple[Path, list[str]]) -> None:
    run, _ = whole
    assert all("routing" not in event for event in updates(run, "d2d"))
    for stage in ("d2s", "pd"):
        events = updates(run, stage)
        assert len(events) == STEPS
        for event in events:
            assert len(event["routing"]) == 2  # layers 0 and 2
            for layer in event["routing"]:
                assert len(layer["load"]) == 4 and sum(layer["load"]) == pytest.approx(1)
                assert 0 < layer["entropy"] <= torch.tensor(4.0).log() + 1e-6
                assert 0 <= layer["dropped"] < 0.5
            # The loss is what its terms say: each with its weight.
            terms = event["terms"]
            named = terms["text"] + terms["response"] if stage == "d2s" else terms["preference"]
            assert event["loss"] == pytest.approx(named + 0.01 * terms["balance"], rel=1e-5)
    assert any(layer["dropped"] > 0 for event in updates(run, "d2s") for layer in event["routing"])
    begun = updates(run, "pd")[0]["terms"]
    assert {"chosen_reward", "rejected_reward", "preference_accuracy"} <= begun.keys()


def test_how_experts_are_chosen_lasts_until_a_stage_says_otherwise(recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["stages"][2]["reference"] = ["capacity"]
    further = {**content["stages"][2], "name": "more", "reference": []}
    content["stages"].append(further)
    student = Student(Recipe.model_validate(content))
    chosen = {}
    for stage in student._recipe.stages:
        student.transform(stage)
        student.choose(stage)
        chosen[stage.name] = {(one.second_expert, one.capacity) for one in routing.routers(student.vlm.model)}
    drawn = {("gumbel", 0.9)}
    assert chosen == {"d2d": set(), "d2s": drawn, "pd": {("gumbel", 1.5)}, "more": drawn}


def test_references_are_kept_once_per_record(whole: tuple[Path, list[str]], recipe: Path) -> None:
    run, _ = whole
    lines = [json.loads(line) for file in (run / "references").rglob("*.jsonl") for line in file.open()]
    records = len(json.loads((recipe.parent / "pairs.json").read_text()))
    assert len({line["key"] for line in lines}) == len(lines) == records
    assert all(line["first"] < 0 and line["second"] < 0 and line["first"] != line["second"] for line in lines)


def assert_same(run: Path, whole: Path) -> None:
    found, expected = weights(run), weights(whole)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
    for stage in ("d2d", "d2s", "pd"):
        one, other = updates(run, stage), updates(whole, stage)
        for event in (*one, *other):
            del event["seconds"], event["wait"]
        assert one == other


@pytest.mark.parametrize("at", ["d2s", "references", "pd"])
def test_a_killed_run_continues_bit_for_bit(
    recipe: Path, whole: tuple[Path, list[str]], server: Server, tmp_path: Path, at: str
) -> None:
    """In a stage behind its first checkpoint (every second update), and while the teacher's answers are written."""
    expected, operations = whole
    steps = [number for number, label in enumerate(operations, start=1) if label == "step"]
    assert len(steps) == 3 * STEPS
    written = [number for number, label in enumerate(operations, start=1) if "references" in label]
    die = {"d2s": steps[STEPS + 3], "references": written[-1], "pd": steps[2 * STEPS + 3]}[at]
    statuses, _ = server.run(recipe, tmp_path / "run", die_at=die)
    assert any(statuses), server.errors()
    server.finish(recipe, tmp_path / "run")
    assert_same(tmp_path / "run", expected)


def test_what_has_done_its_work_leaves_memory_and_the_teacher_is_asked_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense student as experts are made of it, the teacher before preferences. A run that stops among these and
    goes on asks nothing again."""
    teachers: list[weakref.ref[Any]] = []
    looked: list[int] = []
    there: dict[str, list[bool]] = {}
    dense: list[weakref.ref[Any]] = []  # the student before it is sparse, and a weight of what becomes experts
    left: dict[str, list[bool]] = {}
    build, look, train = execute.open_teacher, References._look, StageRun._train
    interrupt = [True]

    def noted(*arguments: Any) -> LocalTeacher:
        teacher = build(*arguments)
        teachers.extend(weakref.ref(one) for one in (teacher, teacher.vlm.model))
        return teacher

    def asked(self: References, data: Any, indices: list[int], grouping: Any) -> Any:
        looked.extend(indices)
        return look(self, data, indices, grouping)

    def trained(self: StageRun, *arguments: Any) -> None:
        there[self.stage.name] = [one() is not None for one in teachers]
        left[self.stage.name] = [one() is not None for one in dense]
        if self.stage.name == "d2d":
            model: Any = self.student.vlm.model
            first = model.model.language_model.layers[0].mlp.up_proj.weight
            dense.extend((weakref.ref(model), weakref.ref(first)))
        if self.stage.name == "pd" and interrupt.pop():
            raise KeyboardInterrupt
        train(self, *arguments)

    monkeypatch.setattr(execute, "open_teacher", noted)
    monkeypatch.setattr(References, "_look", asked)
    monkeypatch.setattr(StageRun, "_train", trained)
    with pytest.raises(KeyboardInterrupt):
        distilvlm.run(recipe, directory=tmp_path / "run")
    assert there == {"d2d": [True, True], "d2s": [True, True], "pd": [False, False]}
    assert left == {"d2d": [], "d2s": [False, False], "pd": [False, False]}
    assert sorted(looked) == list(range(10))
    teachers.clear()
    looked.clear()
    interrupt.append(False)
    distilvlm.run(recipe, directory=tmp_path / "run")
    assert not looked and there["pd"] == [False] * len(teachers)
