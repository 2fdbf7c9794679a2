"""Runs that learn from vision encoders: an encoder alone, and inside of a VLM; from teachers, and from their cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from distilvlm.models.compose import build
from distilvlm.models.encoder_directory import load_encoder
from distilvlm.models.mixture import mixtures
from distilvlm.models.save import load
from distilvlm.recipe.models import ModelSpec
from distilvlm.runs.directory import RunDirectory
from distilvlm.runs.events import read_events

from .conftest import Server, weights
from .tiny import language
from .tiny_move import ENCODERS, write_alone, write_vlm

STEPS = 3  # of each stage
Run = tuple[Path, list[str]]

PLAIN = {"pictures.augment": None}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its targets are standardised."""
    path = write_alone(tmp_path_factory.mktemp("alone"))
    recipe = yaml.safe_load(path.read_text())
    for stage in recipe["stages"]:
        stage["encoder"] = {"standardise": True}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def alone_run(alone: Path, server: Server) -> Run:
    directory = alone.parent / "whole"
    return directory, server.finish(alone, directory)


@pytest.fixture(scope="module")
def vlm_run(vlm: Path, server: Server) -> Run:
    directory = vlm.parent / "whole"
    return directory, server.finish(vlm, directory)


def updates(run: Path, stage: str | None = None) -> list[dict[str, Any]]:
    events = [event for event in read_events(run / "events.jsonl") if event["event"] == "update"]
    return [event for event in events if stage in (None, event["stage"])]


def trained(run: Path, stage: str) -> dict[str, Tensor]:
    return load_file(next(run.glob(f"stages/*-{stage}")) / "final" / "weights.safetensors")


def test_experts_learn_under_a_frozen_tower_and_adapters_go_on(alone_run: Run) -> None:
    run, _ = alone_run
    first, second = trained(run, "experts"), trained(run, "all")
    assert all(".mixture." in name or name.startswith("adapters.") for name in first)
    assert {name.split(".")[2] for name in first if name.startswith("adapters.")} == {"cnn", "siglip"}  # no anchor's
    base = {name for name in second.keys() - first.keys()}
    assert base and all(name.startswith("model.vision_tower.") for name in base)
    assert not any("layers.2." in name for name in second)  # behind the layer that is read
    for name in first:
        assert not torch.equal(first[name], second[name]), name


def test_events_tell_of_every_teacher_and_of_the_experts(alone_run: Run, vlm_run: Run) -> None:
    for run in (alone_run[0], vlm_run[0]):
        for event in updates(run):
            terms, count = event["terms"], event["samples"]
            shares = [terms[f"encoder_weight.{name}"] for name in ENCODERS]
            shown = sum(shares)  # of the samples with pictures, whose weights sum to 1
            assert shown == pytest.approx(round(shown * count) / count, abs=1e-5) and 0 < shown <= 1 + 1e-6
            assert shares[0] == pytest.approx(0.8 * shown, rel=1e-4)
            text = terms.get("text", 0.0)
            weight = 0.5 if "text" in terms else 1.0
            expected = text + weight * terms["encoder"] + 0.01 * terms["expert_balance"]
            assert event["loss"] == pytest.approx(expected, rel=1e-4)
            assert len(event["vision_routing"]) == 2
            assert all(sum(layer["load"]) == pytest.approx(1) for layer in event["vision_routing"])


def test_the_finished_encoder_is_one_directory_that_a_vlm_starts_from(alone_run: Run, alone: Path) -> None:
    run, _ = alone_run
    encoder = load_encoder(run / "model")
    state = encoder.model.state_dict()
    assert len(mixtures(encoder.model)) == 2
    final = {name: value for name, value in trained(run, "all").items() if not name.startswith("adapters.")}
    assert final and all(torch.equal(state[name], value) for name, value in final.items())
    (kept,) = (run / "model").glob("*.safetensors")
    assert not any("adapters" in name for name in load_file(kept))
    parts = {"config": language(16), "tokenizer": str(alone.parent / "tokenizer")}
    built = build(ModelSpec.model_validate({"vision": {"from": str(run / "model")}, "language": parts}), seed=0)
    theirs = built.model.model.vision_tower.state_dict()
    assert all(torch.equal(theirs[name.removeprefix("model.vision_tower.")], state[name]) for name in state)
    held = load_file(run / "adapters" / "adapters.safetensors")
    adapters = {name: value for name, value in trained(run, "all").items() if name.startswith("adapters.")}
    assert all(torch.equal(held[name.removeprefix("adapters.")], value) for name, value in adapters.items())


def test_a_vlm_with_experts_loads_with_them(vlm_run: Run) -> None:
    run, _ = vlm_run
    loaded = load(run / "model").model
    state = loaded.state_dict()
    assert len(mixtures(loaded)) == 2
    for name, value in trained(run, "finetune").items():
        if not name.startswith("adapters."):
            assert torch.equal(state[name], value), name
    kind = json.loads((run / "model" / "config.json").read_text())["vision_config"]["model_type"]
    assert kind.startswith("distilvlm_mixed_")  # which plain transformers does not know


def test_one_expert_ends_as_a_stock_encoder(alone: Path, server: Server, tmp_path: Path) -> None:
    single = {"do": "mix", "experts": 1, "rank": 2, "dropout": 0.0, "start": "kaiming"}
    content = yaml.safe_load(alone.read_text())
    content["stages"] = content["stages"][:1]
    content["stages"][0] |= {"transform": [single], "train": ["vision.experts", "adapters"]}
    content["stages"][0]["loss"] = {"text": 0.0, "encoder": 1.0}
    content["pictures"] = {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    server.finish(tmp_path / "recipe.yaml", tmp_path / "run")
    assert AutoConfig.from_pretrained(tmp_path / "run" / "model").model_type == "clip_vision_model"
    state = AutoModel.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert not any("mixture" in name for name in state)


@pytest.mark.parametrize(("kind", "stage"), [("alone", 0), ("vlm", 1)])
def test_a_killed_run_continues_bit_for_bit(
    request: pytest.FixtureRequest, server: Server, tmp_path: Path, kind: str, stage: int
) -> None:
    """Behind a checkpoint, with dropout, augmentation and adapters under way."""
    recipe, (whole, operations) = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_run")
    steps = [number for number, label in enumerate(operations, start=1) if label == "step"]
    statuses, _ = server.run(recipe, tmp_path / "run", die_at=steps[stage * STEPS + 2])
    assert any(statuses), server.errors()
    server.finish(recipe, tmp_path / "run")
    found, expected = weights(tmp_path / "run"), weights(whole)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
    assert [event["loss"] for event in updates(tmp_path / "run")] == [event["loss"] for event in updates(whole)]


@pytest.fixture(scope="module")
def online(vlm: Path, server: Server) -> list[dict[str, Any]]:
    """The updates of a run without augmentation, which a cache would not see."""
    server.finish(vlm, vlm.parent / "online", overrides=PLAIN)
    return updates(vlm.parent / "online")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_a_training_from_the_cache_has_the_losses_of_one_with_teachers(
    vlm: Path, online: list[dict[str, Any]], server: Server, tmp_path: Path, precision: str, tolerance: float
) -> None:
    cached = PLAIN | {"cache.path": str(tmp_path / "cache"), "cache.precision": precision, "machine.workers": 1}
    if precision == "fp32":  # killed while it fills the cache, it goes on where it was
        statuses, operations = server.run(vlm, tmp_path / "run", overrides=cached, die_at=40)
        assert any(statuses) and not any(label == "step" for label in operations), server.errors()
    server.finish(vlm, tmp_path / "run", overrides=cached)
    for one, other in zip(online, updates(tmp_path / "run"), strict=True):
        for name, value in one["terms"].items():
            assert other["terms"][name] == pytest.approx(value, rel=tolerance, abs=1e-6), name


def test_micro_batches_and_processes_do_not_change_the_objective(vlm: Path, server: Server, tmp_path: Path) -> None:
    """Rows without a picture count as 0; a process may have none with one."""
    content = yaml.safe_load(vlm.read_text())
    content["stages"] = [content["stages"][1] | {"transform": [{"do": "mix", "rank": 2, "dropout": 0.0}]}]
    content["student"]["language"]["config"]["attention_dropout"] = 0.0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    found: list[dict[str, float]] = []
    for number, (size, world) in enumerate([(4, 1), (1, 2)]):
        directory = tmp_path / str(number)
        server.finish(tmp_path / "recipe.yaml", directory, world=world, overrides={"machine.micro_batch": size})
        found.append(updates(directory)[0]["terms"] | {"norm": updates(directory)[0]["gradient_norm"]})
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_targets_are_standardised_by_a_rotation_that_the_run_keeps(alone_run: Run) -> None:
    kept = load_file(RunDirectory(alone_run[0]).standards)
    for name in ENCODERS:
        rotation = kept[f"{name}.rotation"]
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(rotation)), atol=1e-4, rtol=0)
    adapters = load_file(alone_run[0] / "adapters" / "adapters.safetensors")
    assert torch.equal(adapters["standards.cnn.mean"], kept["cnn.mean"])


def test_where_the_anchor_looks_is_kept_for_the_report(alone_run: Run) -> None:
    content = json.loads((alone_run[0] / "importance.json").read_text())
    (one,) = content["maps"]
    assert one["encoder"] == "anchor" and len(one["used_by"]) == 2
    for looked in one["pictures"]:
        assert Path(looked["picture"]).exists()
        assert len(looked["weights"]) == 4 and sum(looked["weights"]) == pytest.approx(1, abs=1e-4)
