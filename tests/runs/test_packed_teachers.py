"""Lines of several samples under every kind of teacher: the losses of samples that stand alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distilvlm.data import Grouping
from distilvlm.models.compose import build
from distilvlm.runs.events import read_events
from distilvlm.runs.execute import run
from tests.teachers.cached_recipe import data_of, loaded, written
from tests.teachers.remote_servers import Completions, Teaching, serving

from .test_remote_run import teaching_model

PACKED = {"packing": True, "tokens": 110}
ALL = {"text": 1.0, "response": 0.7, "visual": 0.4, "relation": 0.5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, which other shapes draw otherwise."""
    path = written(tmp_path_factory.mktemp("packed"), rows=9)
    content = yaml.safe_load(path.read_text())
    content["student"]["language"]["config"]["attention_dropout"] = 0.0
    content["teacher"]["language"]["config"]["initializer_range"] = 0.2
    optim = {"lr": 1e-3, "batch": 6, "updates": 2}
    stage = {"name": "dft", "train": ["projector", "language"], "data": ["questions"], "loss": ALL, "optim": optim}
    content["stages"] = [stage]
    content["machine"] = {}
    path.write_text(yaml.safe_dump(content))
    return path


def executed(recipe: Path, directory: Path, machine: dict[str, Any], **teacher: Any) -> list[dict[str, Any]]:
    changes = {f"teacher.{name}": value for name, value in teacher.items()}
    changes |= {f"machine.{name}": value for name, value in machine.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distilvlm.runs.expense.estimate", lambda *_, **__: [])  # as `no_estimate_before_a_run`
        run(recipe, changes, directory)
    return [event for event in read_events(directory / "events.jsonl") if event["event"] == "update"]


def assert_same(packed: list[dict[str, Any]], padded: list[dict[str, Any]], terms: set[str]) -> None:
    assert len(packed) == len(padded) >= 2
    for ours, theirs in zip(packed, padded, strict=True):
        assert set(ours["terms"]) == set(theirs["terms"]) == terms
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6, abs=1e-6)
        for name, value in theirs["terms"].items():
            assert ours["terms"][name] == pytest.approx(value, rel=1e-6, abs=1e-6) and value > 0


@pytest.fixture(scope="module")
def alone(recipe: Path) -> list[dict[str, Any]]:
    """A local teacher's, sample by sample."""
    return executed(recipe, recipe.parent / "alone", {"micro_batch": 1}, kind="local")


@pytest.fixture(scope="module")
def server(recipe: Path) -> Iterator[Teaching]:
    server = Teaching(teaching_model(recipe))
    yield server
    server.kill()


def test_a_local_teacher(recipe: Path, alone: list[dict[str, Any]], tmp_path: Path) -> None:
    packed = executed(recipe, tmp_path / "run", PACKED, kind="local")
    assert_same(packed, alone, set(ALL))


def test_lines_hold_several_samples(recipe: Path) -> None:
    """Else the others would say nothing."""
    packed = loaded(recipe, **{f"machine.{name}": value for name, value in PACKED.items()})
    (stage,), data = packed.stages, data_of(packed, build(packed.student, packed.seed))
    samples = [(0, index) for index in range(6)]
    lines = Grouping.of(packed.machine, stage).split(samples, data[stage.name].sequence_lengths)
    assert 1 < len(lines) < 6, lines


@pytest.mark.parametrize("visual", ["hidden", "relation"])
def test_a_cached_teacher(recipe: Path, alone: list[dict[str, Any]], tmp_path: Path, visual: str) -> None:
    keep = {"path": str(tmp_path / "kept"), "visual": visual}
    path, expected = recipe, alone
    if visual == "relation":
        path = without_visual(recipe, tmp_path)
        expected = executed(path, tmp_path / "alone", {"micro_batch": 1}, kind="local")
    packed = executed(path, tmp_path / "run", PACKED, keep=keep)
    assert_same(packed, expected, set(ALL) - ({"visual"} if visual == "relation" else set()))


def without_visual(recipe: Path, place: Path) -> Path:
    content = yaml.safe_load(recipe.read_text())
    content["stages"][0]["loss"] = {**ALL, "visual": 0.0}
    path = place / "relation.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("responses", ["top_k", "sampled"])
def test_a_cache_of_known_ids(recipe: Path, tmp_path: Path, responses: str) -> None:
    keep = {"path": str(tmp_path / "kept"), "responses": responses, "top_k": 9, "draws": 9}
    padded = executed(recipe, tmp_path / "padded", {"micro_batch": 1}, keep=keep)
    assert_same(executed(recipe, tmp_path / "packed", PACKED, keep=keep), padded, set(ALL))


def test_a_teacher_elsewhere(recipe: Path, alone: list[dict[str, Any]], server: Teaching, tmp_path: Path) -> None:
    packed = executed(recipe, tmp_path / "run", PACKED, kind="remote", remote={"url": server.url})
    assert_same(packed, alone, set(ALL))


def test_a_server_of_log_probabilities(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["stages"][0]["loss"] = {"text": 1.0, "response": 0.7}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with serving(Completions(teaching_model(recipe))) as server:
        remote = {"url": server.url, "protocol": "openai", "top_k": 12}
        padded = executed(path, tmp_path / "padded", {"micro_batch": 1}, kind="remote", remote=remote)
        packed = executed(path, tmp_path / "packed", PACKED, kind="remote", remote=remote)
    assert_same(packed, padded, {"text", "response"})
