"""What a plan says of a cached teacher: no teacher in the steps, and its look at the records before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distilvlm.cost import StageCost, estimate
from distilvlm.cost.kept import shown
from distilvlm.models.compose import build
from distilvlm.teachers.keeping import PLACED
from tests.teachers.cached_recipe import data_of, filled, loaded, written


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("plan"))


def costs(path: Path, measure: bool = False, **changes: Any) -> dict[str, StageCost]:
    recipe = loaded(path, **changes)
    assert recipe.teacher is not None
    student, teacher = (build(spec, recipe.seed, meta=True) for spec in (recipe.student, recipe.teacher))
    stages = ["dpt", "dft"]
    found = estimate(recipe, student, teacher, device="cpu", budget=1, measure=measure, stages=stages)
    return {cost.stage: cost for cost in found}


@pytest.fixture(scope="module")
def cached(path: Path) -> dict[str, StageCost]:
    return costs(path, measure=True)


def test_the_teacher_is_in_no_step_but_looks_before_them(path: Path, cached: dict[str, StageCost]) -> None:
    local = costs(path, False, **{"teacher.kind": "local"})
    for stage in ("dpt", "dft"):
        assert cached[stage].memory["teacher"] < local[stage].memory["teacher"] / 2
        assert 0 < cached[stage].time["teacher"] < cached[stage].time["student"] / 4
        look = cached[stage].look
        assert look is not None and look.records == 10 and look.seconds is not None and look.seconds > 0
        assert look.peak_memory_bytes is not None
    assert local["dft"].look is None


def test_bytes_of_the_cache_are_those_that_it_takes(path: Path, cached: dict[str, StageCost]) -> None:
    """Every record's tensors to the byte; of what is written about them, about."""
    planned = sum(cost.look.disk_bytes or 0 for cost in cached.values() if cost.look is not None)
    made = filled(loaded(path)).cache
    shards = [load_file(file) for file in (made.directory / "shards").iterdir()]
    tensors = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    keys = sum(len(keys) for keys in made.store.shards())
    twice = PLACED + 2 * 24 * 4  # the rows without a picture are one record, which a plan does not look for
    assert planned == tensors + keys * PLACED + load_file(made.head_file)["head"].nbytes + twice
    files = [*(made.directory / "shards").iterdir(), made.head_file, made.directory / "index.json"]
    assert planned == pytest.approx(sum(file.stat().st_size for file in files), rel=0.1)


def test_what_was_read_of_the_cache_stays_mapped(path: Path, cached: dict[str, StageCost]) -> None:
    local = costs(path, False, **{"teacher.kind": "local"})
    kept = cached["dpt"].look
    assert kept is not None and kept.disk_bytes is not None
    head = cached["dpt"].memory["teacher"]
    assert cached["dpt"].memory["data"] - local["dpt"].memory["data"] == kept.disk_bytes - head


@pytest.mark.parametrize("responses", ["top_k", "sampled"])
def test_ids_alone_need_no_head(path: Path, responses: str) -> None:
    keep = {"teacher.keep.responses": responses, "teacher.keep.visual": "relation"}
    found = costs(path, measure=True, **keep, **{"stages.0.loss.visual": 0, "stages.2.loss.visual": 0})
    assert found["dpt"].memory["teacher"] == 0
    assert found["dpt"].seconds_per_update is not None and found["dpt"].memory["working"] > 0


def test_records_that_an_earlier_stage_has_shown_are_not_looked_at_again(path: Path) -> None:
    found = costs(path, False, **{"stages.0.data": ["questions"]})
    assert found["dpt"].look is not None and found["dft"].look is None
    assert any("an earlier stage has filled" in note for note in found["dft"].notes)


def test_of_records_that_earlier_stages_have_shown_in_part_the_rest_is_looked_at(path: Path) -> None:
    short = {
        f"stages.{number}.optim.{name}": value
        for number in (0, 2)
        for name, value in (("epochs", None), ("updates", 1))
    }
    recipe = loaded(path, **{"stages.0.data": ["questions"], **short})
    found = costs(path, **{"stages.0.data": ["questions"], **short})
    seen = sum(cost.look.records or 0 for cost in found.values() if cost.look is not None)
    assert found["dpt"].look is not None and found["dpt"].look.records == 4
    data = data_of(recipe, build(recipe.student, recipe.seed, meta=True))["dft"]
    first, third = (shown(recipe, index, data) for index in (0, 2))
    assert seen == len(first | third) < 10
