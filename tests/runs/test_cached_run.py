"""A run whose teacher is cached: the weights that a local one gives, from a teacher that is asked once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import distilvlm
from distilvlm.data import StageData
from distilvlm.models.shards import FeatureError
from distilvlm.runs.events import read_events
from distilvlm.teachers import cache
from tests.teachers.cached_recipe import written

from .conftest import Server, weights
from .tiny_mod import write_mod_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Micro-batches of one, and an epoch of every distilled stage. Without dropout, which processes draw apart."""
    path = written(tmp_path_factory.mktemp("cached"), rows=6)
    student = yaml.safe_load(path.read_text())["student"]
    student["language"]["config"]["attention_dropout"] = 0.0
    machine = {"micro_batch": 1, "checkpoint_every": 2}
    return changed(path, student=student, machine=machine, stages=short(path, "dpt", "dft"))


@pytest.fixture(scope="module")
def cached_run(recipe: Path, server: Server) -> tuple[Path, list[str]]:
    directory = recipe.parent / "cached"
    return directory, server.finish(recipe, directory)


def changed(path: Path, to: Path | None = None, **sections: Any) -> Path:
    """The recipe with other sections, in place or in another file."""
    to = to or path
    to.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}, sort_keys=False))
    return to


def short(path: Path, *names: str) -> list[dict[str, Any]]:
    """These stages of a recipe, an epoch of each."""
    stages = [stage for stage in yaml.safe_load(path.read_text())["stages"] if stage["name"] in names]
    return [{**stage, "optim": {**stage["optim"], "epochs": 1}} for stage in stages]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "update"]


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_cached_teacher_trains_what_a_local_one_trains_bit_for_bit(
    recipe: Path, cached_run: tuple[Path, list[str]], server: Server
) -> None:
    local = recipe.parent / "local"
    server.finish(recipe, local, overrides=["teacher.kind=local"])
    assert losses(local) == losses(cached_run[0]) and same(local, cached_run[0])


def test_a_second_run_asks_the_teacher_nothing(
    recipe: Path, cached_run: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "weights_of", lambda recipe: pytest.fail("the teacher was loaded"))
    monkeypatch.setattr(StageData, "identity", lambda *_: pytest.fail("keys were made anew"))
    again = distilvlm.run(recipe, directory=recipe.parent / "again")
    assert same(again.directory, cached_run[0])


def test_killed_while_filling_a_run_goes_on_with_the_same_command(
    recipe: Path, cached_run: tuple[Path, list[str]], server: Server, tmp_path: Path
) -> None:
    directory, operations = cached_run
    filling = [number for number, label in enumerate(operations, 1) if "shards/" in label]
    place = [f"teacher.keep.path={tmp_path / 'kept'}"]
    statuses, _ = server.run(recipe, tmp_path / "run", overrides=place, die_at=filling[0])
    assert statuses == [9] and not list(tmp_path.glob("kept/shards/0*"))
    server.finish(recipe, tmp_path / "run", overrides=place)
    assert same(tmp_path / "run", directory)


def test_two_processes_train_from_one_cache(
    recipe: Path, cached_run: tuple[Path, list[str]], server: Server, tmp_path: Path
) -> None:
    server.finish(recipe, tmp_path / "run", world=2, overrides=[f"teacher.keep.path={tmp_path / 'kept'}"])
    assert losses(tmp_path / "run") == pytest.approx(losses(cached_run[0]), rel=1e-5)


def test_kept_features_serve_beside_a_teacher_of_another_tower(recipe: Path, server: Server, tmp_path: Path) -> None:
    """With a local teacher they can't: it would have no pictures to look at."""
    other = yaml.safe_load(recipe.read_text())["teacher"]
    other["vision"]["config"]["hidden_size"] = 24
    other["keep"] = {"path": str(tmp_path / "kept")}
    path = changed(recipe, tmp_path / "recipe.yaml", teacher=other, pictures={"features": str(tmp_path / "features")})
    server.finish(path, tmp_path / "run")
    _, operations = server.run(path, tmp_path / "local", overrides=["teacher.kind=local"])
    assert "step" not in operations and "remove 'pictures.features'" in server.errors()


def test_a_stale_cache_stops_a_run_before_its_first_step(
    recipe: Path, cached_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(FeatureError, match="preprocessing: geometry: square there, crop now"):
        distilvlm.run(recipe, {"pictures.geometry": "crop"}, tmp_path / "run")
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_preferences_are_learned_beside_a_cached_teacher(server: Server, tmp_path: Path) -> None:
    path = write_mod_recipe(tmp_path, rows=6)
    changed(path, stages=short(path, "d2s", "pd"))
    local = yaml.safe_load(path.read_text())
    teacher = {**local["teacher"], "kind": "cached", "keep": {"path": str(tmp_path / "kept")}}
    changes: dict[str, Any] = {"teacher": teacher, "machine": {**local.get("machine", {}), "micro_batch": 1}}
    server.finish(changed(path, tmp_path / "cached.yaml", **changes), tmp_path / "cached")
    changes["teacher"] = local["teacher"]
    server.finish(changed(path, tmp_path / "local.yaml", **changes), tmp_path / "local")
    assert any(stage["loss"].get("preference") for stage in local["stages"])
    assert losses(tmp_path / "cached") == losses(tmp_path / "local")
    final = "stages/*/final/weights.safetensors"
    pairs = zip(sorted(tmp_path.glob(f"cached/{final}")), sorted(tmp_path.glob(f"local/{final}")), strict=True)
    for one, other in pairs:
        ours, theirs = load_file(one), load_file(other)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
