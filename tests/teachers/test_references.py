"""What a teacher thinks of preferences: exact, once per record, and the same after a kill."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch.nn.functional import log_softmax

from distilvlm.data import Grouping, StageData, read
from distilvlm.data.collate import collate
from distilvlm.data.stage import stage_data
from distilvlm.models import forward
from distilvlm.models.compose import build
from distilvlm.recipe import Recipe, load_recipe
from distilvlm.teachers import LocalTeacher, References, references
from tests.runs.tiny_mod import write_mod_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    directory = tmp_path_factory.mktemp("references")
    path = write_mod_recipe(directory, rows=7)
    rows = json.loads((directory / "pairs.json").read_text())
    (directory / "pairs.json").write_text(json.dumps([*rows, rows[2]]))  # the last is the third once more
    return load_recipe(path)


def teacher_of(recipe: Recipe, seed: int = 0) -> LocalTeacher:
    assert recipe.teacher is not None
    student, vlm = build(recipe.student, 0), build(recipe.teacher, seed)
    return LocalTeacher(vlm, student, device=CPU, student_device=CPU, share_vision=True)


@pytest.fixture(scope="module")
def teacher(recipe: Recipe) -> LocalTeacher:
    return teacher_of(recipe)


@pytest.fixture(scope="module")
def data(recipe: Recipe, teacher: LocalTeacher) -> StageData:
    stage, vlm = recipe.stages[-1], teacher.vlm
    return stage_data(recipe, stage, vlm.tokenizer, vlm.layout, [read(recipe.data["pairs"], "pairs")])


def lines(directory: Path) -> list[str]:
    return sorted(line for file in directory.rglob("*.jsonl") for line in file.read_text().splitlines())


def test_they_are_the_teacher_s_log_probabilities(teacher: LocalTeacher, data: StageData, tmp_path: Path) -> None:
    found = References(tmp_path, teacher, "fp32").fill(data, grouping=Grouping(3))
    assert len(found) == 8
    for index, pair in found.items():
        batch = collate([data[0, index]])
        model, layout = teacher.vlm.model, teacher.vlm.layout
        with torch.no_grad():
            features = None if batch.pictures is None else forward.vision_features(model, layout, batch.pictures)
            hidden = forward.hidden_states(model, layout, batch, features).double()
            logits = log_softmax(hidden @ forward.head_weight(model).double().T, -1).flatten(0, 1)
        each = logits[batch.response_rows, batch.response_targets]
        for side in (0, 1):
            own = batch.response_rows // batch.length == side
            assert pair[side] == pytest.approx(float(each[own].sum()), rel=1e-5)
    assert found[2] == found[7]


def test_every_record_is_looked_at_once_however_often_it_comes(
    teacher: LocalTeacher, data: StageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = References(tmp_path, teacher, "fp32").fill(data, grouping=Grouping(3))
    assert len(lines(tmp_path)) == 7
    monkeypatch.setattr(References, "_look", lambda *_: pytest.fail("the teacher was asked again"))
    assert References(tmp_path, teacher, "fp32").fill(data, grouping=Grouping(1)) == first


def test_only_records_that_a_stage_shows_are_looked_at(
    teacher: LocalTeacher, data: StageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = References(tmp_path / "every", teacher, "fp32").fill(data, grouping=Grouping(3))
    some = References(tmp_path / "some", teacher, "fp32").fill(data, grouping=Grouping(3), shown={5, 1})
    assert [*some] == [1, 5]
    assert all(some[index] == pytest.approx(every[index], rel=1e-6) for index in some)
    assert len(lines(tmp_path / "some")) == 2


def test_after_a_kill_they_are_the_same_bit_for_bit(
    teacher: LocalTeacher, data: StageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are of two records; whichever of them are there, the others are computed as they would have been."""
    monkeypatch.setattr(references, "RECORDS", 2)
    whole = References(tmp_path / "whole", teacher, "fp32").fill(data, grouping=Grouping(2))
    files = sorted((tmp_path / "whole").rglob("*.jsonl"))
    assert len(files) == 4
    for lost in files:
        kept = lost.read_bytes()
        lost.unlink()
        assert References(tmp_path / "whole", teacher, "fp32").fill(data, grouping=Grouping(2)) == whole
        assert lost.read_bytes() == kept


def test_processes_share_the_work_although_one_is_late(
    teacher: LocalTeacher, data: StageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "RECORDS", 2)
    alone = References(tmp_path / "alone", teacher, "fp32").fill(data, grouping=Grouping(2))
    together, looked = Barrier(2), {0: 0, 1: 0}

    class Share(References):
        rank = 0

        def _look(self, data: StageData, indices: list[int], grouping: Grouping) -> list[tuple[float, float]]:
            looked[self.rank] += len(indices)
            return super()._look(data, indices, grouping)

    def process(rank: int) -> dict[int, tuple[float, float]]:
        store = Share(tmp_path / "two", teacher, "fp32")
        store.rank = rank
        time.sleep(rank)

        def wait() -> None:
            together.wait(60)

        return store.fill(data, grouping=Grouping(2), rank=rank, world=2, wait=wait)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, (0, 1))) == [alone, alone]
    assert looked == {0: 4, 1: 3}
    assert lines(tmp_path / "two") == lines(tmp_path / "alone")


def test_another_teacher_or_precision_is_another_store(
    recipe: Recipe, teacher: LocalTeacher, data: StageData, tmp_path: Path
) -> None:
    ours = References(tmp_path, teacher, "fp32").fill(data, grouping=Grouping(4))
    theirs = References(tmp_path, teacher_of(recipe, seed=5), "fp32").fill(data, grouping=Grouping(4))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = References(tmp_path, teacher, "bf16").fill(data, grouping=Grouping(4))
    assert len(list(tmp_path.iterdir())) == 3
    assert all(a != b for a, b in zip(ours.values(), theirs.values(), strict=True))
    assert all(a != b and a == pytest.approx(b, rel=0.05) for a, b in zip(ours.values(), rounded.values(), strict=True))
