"""Kept features of encoders: what they would give now, for as long as nothing of it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from distilvlm.cli import app
from distilvlm.models.kept import FeatureError
from distilvlm.recipe import RecipeError
from distilvlm.runs.caching import Filling
from distilvlm.teachers import TeacherError
from distilvlm.teachers.encoders import EncoderTeachers, pooled
from tests.runs.tiny import write_recipe
from tests.runs.tiny_move import write_alone


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    return write_alone(directory, pictures={}, cache={"path": str(directory / "cache"), "precision": "fp32"})


@pytest.fixture(scope="module")
def filled(recipe: Path) -> Filling:
    filling = Filling(recipe)
    filling.fill(threads=2)
    return filling


def test_what_is_read_is_what_the_encoders_see(filled: Filling) -> None:
    stage = filled._cache.recipe.stages[0]
    teachers = filled._cache.teachers
    expected = teachers.of_paths(filled.pictures, stage)
    reader = filled._cache.reader()
    for number, path in enumerate(filled.pictures):
        found = reader(path)
        assert {"anchor/importance", "anchor/cls", "cnn/tokens", "siglip/tokens"} <= found.keys()
        assert "siglip/importance" not in found  # nobody weighs by it
        for name, seen in expected.items():
            torch.testing.assert_close(found[f"{name}/tokens"], seen.tokens[number], atol=1e-5, rtol=1e-5)


def test_what_it_takes_is_said_before_and_nothing_when_it_is_full(recipe: Path, filled: Filling) -> None:
    assert sum(one.missing for one in Filling(recipe).expenses) == 0
    empty = Filling(recipe, {"cache.path": str(recipe.parent / "other")})
    by_name = {one.name: one for one in empty.expenses}
    assert {one.missing for one in by_name.values()} == {10}
    assert by_name["cnn"].bytes == pytest.approx(10 * (9 * 12 * 4 + 150))
    assert all(one.seconds > 0 for one in by_name.values())
    written = sum(file.stat().st_size for file in (recipe.parent / "cache" / "cnn" / "shards").iterdir())
    assert written == pytest.approx(by_name["cnn"].bytes, rel=0.2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pictures.geometry": "pad"}, "preprocessing: geometry"),
        ({"seed": 8}, "teacher: weights"),
        ({"encoders.siglip.layer": 1}, "layer"),
        ({"encoders.cnn.pool": 2}, "pool"),
        ({"encoders.siglip.size": 40}, "preprocessing: side of the canvas"),
        ({"cache.precision": "bf16"}, "precision"),
    ],
)
def test_a_changed_maker_is_refused_by_name(recipe: Path, filled: Filling, change: dict[str, Any], told: str) -> None:
    with pytest.raises(FeatureError, match=told):
        Filling(recipe, change)


def test_an_encoder_of_fewer_tokens_than_it_is_pooled_to_is_refused(recipe: Path) -> None:
    with pytest.raises(TeacherError, match=r"encoders\.cnn\.pool is 9, but the encoder gives only \d×\d tokens"):
        Filling(recipe, {"encoders.cnn.pool": 9})


def test_a_recipe_that_compares_with_no_encoder_has_nothing_to_keep(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rows=1, pictures={}, encoders={"cnn": {"from": "cnn"}}, cache={"path": "kept"})
    with pytest.raises(RecipeError, match=r"recipe 'tiny': no stage compares with encoders \(loss\.encoder\): nothing"):
        Filling(path)


def test_a_changed_picture_is_seen_anew_and_others_stay(recipe: Path, filled: Filling, tmp_path: Path) -> None:
    path = Path(filled.pictures[0])
    before = path.read_bytes()
    path.write_bytes(Path(filled.pictures[1]).read_bytes() + b"\0")  # another content, the same picture
    try:
        with pytest.raises(FeatureError, match="added or changed after the store was filled"):
            filled._cache.reader()(str(path))
        again = Filling(recipe)
        assert {one.missing for one in again.expenses} == {1}
        again.fill()
        reader = again._cache.reader()
        one, other = reader(str(path)), reader(filled.pictures[1])
        torch.testing.assert_close(one["cnn/tokens"], other["cnn/tokens"])
    finally:
        path.write_bytes(before)


def test_a_damaged_byte_is_found_when_it_is_read(recipe: Path, tmp_path: Path) -> None:
    filling = Filling(recipe, {"cache.path": str(tmp_path / "cache")})
    filling.fill()
    (shard,) = (tmp_path / "cache" / "cnn" / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FeatureError, match=r"is damaged.*Remove the file and fill again"):
        for path in filling.pictures:
            filling._cache.reader()(path)


def test_several_processes_share_one_cache(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilvlm.models.kept.PictureStore.__init__.__defaults__", (3,))  # pictures per file
    place = {"cache.path": str(tmp_path / "cache")}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        filling = Filling(recipe, place)
        filling.fill()
        done = sum(1 for _ in (tmp_path / "cache" / "cnn" / "shards").glob("*.safetensors"))
        assert done == (2 if rank == "0" else 4)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    whole = Filling(recipe)._cache.reader()
    for path in filling.pictures:
        for name, value in filling._cache.reader()(path).items():
            torch.testing.assert_close(value, whole(path)[name], atol=1e-5, rtol=1e-5)


def test_pooling_averages_neighbours(filled: Filling) -> None:
    teachers: EncoderTeachers = filled._cache.teachers
    seen = teachers.look("siglip", torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8))
    small = pooled(seen, 2)
    assert small.grid == (2, 2)
    maps = seen.tokens.unflatten(1, (4, 4))
    torch.testing.assert_close(small.tokens[:, 1], maps[:, :2, 2:].mean((1, 2)))


def test_the_command_tells_what_it_takes_and_fills(recipe: Path, tmp_path: Path) -> None:
    place = ["--set", f"cache.path={tmp_path / 'cache'}"]
    told = CliRunner().invoke(app, ["cache", str(recipe), *place, "--plan", "--json"])
    assert told.exit_code == 0, told.output
    content = json.loads(told.output)["encoders"]
    assert [one["missing"] for one in content] == [10, 10, 10]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    done = CliRunner().invoke(app, ["cache", str(recipe), *place])
    assert done.exit_code == 0 and "encoder 'cnn': 10 pictures to see" in done.output, done.output
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
    again = CliRunner().invoke(app, ["cache", str(recipe), *place])
    assert "the cache is full" in again.output
    content = yaml.safe_load(recipe.read_text())
    del content["cache"]
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=r"--set cache\.path=DIR"):
        Filling(tmp_path / "none.yaml")
