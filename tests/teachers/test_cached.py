"""A cached teacher gives what a local one gives while nothing of it changes, whatever kills or shares the filling."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from distilvlm.cli import app
from distilvlm.data import Batch
from distilvlm.data.collate import collate
from distilvlm.doctor import doctor
from distilvlm.losses.divergences import forward_kl
from distilvlm.models.compose import build
from distilvlm.models.shards import FeatureError
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, RecipeError
from distilvlm.runs.teaching import Teaching
from distilvlm.teachers import CachedTeacher, LocalTeacher, TeacherError, cache
from distilvlm.teachers.nearness import changed_by, measured
from distilvlm.teachers.reduced import drawn, likeliest, rest, rest_bound, restored
from distilvlm.train import objective_of

from .cached_recipe import data_of, filled, loaded, teaching, written


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("cached"))


@pytest.fixture(scope="module")
def recipe(path: Path) -> Recipe:
    return loaded(path)


@pytest.fixture(scope="module")
def student(recipe: Recipe) -> VLM:
    return build(recipe.student, recipe.seed)


@pytest.fixture(scope="module")
def full(recipe: Recipe, student: VLM) -> Teaching:
    return filled(recipe, student)


@pytest.fixture(scope="module")
def local(full: Teaching) -> LocalTeacher:
    return full.cache.teacher()


def batch_of(recipe: Recipe, student: VLM, stage: str, samples: Sequence[int]) -> tuple[Batch, Tensor]:
    """A micro-batch, and the rows that the stage's terms need."""
    data = data_of(recipe, student)[stage]
    batch = collate([data[0, index] for index in samples])
    (spec,) = [one for one in recipe.stages if one.name == stage]
    return batch, objective_of(spec, recipe.teacher).rows(batch.response_rows, batch.visual_rows)


def kept(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((directory / "shards").glob("*"))}


@pytest.mark.parametrize("stage", ["dpt", "dft"])
def test_hidden_rows_have_the_bits_of_a_local_teacher_s_in_micro_batches_of_one(
    recipe: Recipe, student: VLM, full: Teaching, local: LocalTeacher, stage: str
) -> None:
    cached = CachedTeacher(full.cache)
    for sample in range(10):
        batch, rows = batch_of(recipe, student, stage, [sample])
        ours, theirs = cached.targets(batch, rows, None), local.targets(batch, rows, None)
        assert ours.hidden is not None and theirs.hidden is not None
        assert len(rows) > 1 and torch.equal(ours.hidden, theirs.hidden)
    assert cached.head is not None and torch.equal(cached.head, local.head)


def test_larger_micro_batches_change_no_divergence_by_more_than_is_told(
    recipe: Recipe, student: VLM, full: Teaching, local: LocalTeacher
) -> None:
    difference = measured(full.cache, recipe.machine.micro_batch)
    assert recipe.machine.micro_batch == 2 and difference is not None and difference < 1e-5
    assert any("micro-batches of 2" in line for line in full.told())
    batch, rows = batch_of(recipe, student, "dft", [0, 1])
    hidden = [one.targets(batch, rows, None).hidden for one in (CachedTeacher(full.cache), local)]
    cached, exact = (torch.log_softmax(one.double() @ local.head.double().T, -1) for one in hidden if one is not None)
    other = torch.log_softmax(torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).double(), -1)
    entropy = -(exact.exp() * exact).sum(-1)
    crossed = -(exact.exp() * other).sum(-1)
    values = [(p.exp() * (p - other)).sum(-1) for p in (cached, exact)]
    bounds = [changed_by(1e-6 + difference, float(c), float(h)) for c, h in zip(crossed, entropy, strict=True)]
    assert bool(((values[0] - values[1]).abs() <= torch.tensor(bounds)).all())


def test_a_bound_on_log_probabilities_bounds_the_divergence() -> None:
    generator = torch.Generator().manual_seed(3)
    draw = lambda scale: torch.randn(200, 12, generator=generator, dtype=torch.float64) * scale  # noqa: E731
    teacher, other = torch.log_softmax(draw(2), -1), torch.log_softmax(draw(2), -1)
    moved = torch.log_softmax(teacher + draw(0.2), -1)
    difference = (moved - teacher).abs().amax(-1)
    values = [(p.exp() * (p - other)).sum(-1) for p in (teacher, moved)]
    crossed, entropy = (-(teacher.exp() * q).sum(-1) for q in (other, teacher))
    for row in range(200):
        bound = changed_by(float(difference[row]), float(crossed[row]), float(entropy[row]))
        assert float((values[0] - values[1]).abs()[row]) <= bound


def test_likeliest_ids_are_below_the_exact_divergence_by_no_more_than_the_bound() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, head, other = (torch.randn(*shape, generator=generator) for shape in ((30, 8), (50, 8), (30, 50)))
    sparse = restored(likeliest(hidden, head, 5))
    exact, student = torch.log_softmax((hidden @ head.T).double(), -1), torch.log_softmax(other.double(), -1)
    left = rest(sparse.log_probabilities)
    known = exact.gather(-1, sparse.ids)
    torch.testing.assert_close(sparse.log_probabilities.double(), known, atol=1e-5, rtol=1e-5)
    ours = student.gather(-1, sparse.ids)
    tail = left * (left.log() - (1 - ours.exp().sum(-1)).log())
    value = (known.exp() * (known - ours)).sum(-1) + tail
    gap = forward_kl(student.clone(), exact.clone())[0] - value
    others = student.scatter(-1, sparse.ids, torch.nan)
    spread = others.nan_to_num(-torch.inf).amax(-1) - others.nan_to_num(torch.inf).amin(-1)
    for row in range(30):
        assert -1e-6 <= float(gap[row]) <= rest_bound(float(left[row]), 45, float(spread[row]))


def test_draws_are_of_the_teacher_s_distribution_and_the_same_for_the_same_key() -> None:
    hidden, head = torch.randn(3, 8), torch.randn(20, 8)
    first, again, other = (drawn(hidden, head, 4000, key) for key in ("a" * 32, "a" * 32, "b" * 32))
    assert torch.equal(first["ids"], again["ids"]) and not torch.equal(first["ids"], other["ids"])
    sparse = restored(first)
    shares = torch.zeros(3, 21).scatter_(-1, sparse.ids % 21, sparse.log_probabilities.exp())[:, :20]
    exact = torch.softmax(hidden @ head.T, -1)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3))
    assert bool(((shares - exact).abs() <= 5 * (exact / 4000).sqrt() + 1e-3).all())
    assert not sparse.tail and bool((sparse.log_probabilities[sparse.ids < 0] == -torch.inf).all())


@pytest.mark.parametrize("responses", ["top_k", "sampled"])
def test_kept_ids_are_those_of_a_local_teacher(
    path: Path, student: VLM, local: LocalTeacher, responses: str, tmp_path: Path
) -> None:
    keep = {"path": str(tmp_path), "responses": responses, "top_k": 7, "draws": 9, "visual": "relation"}
    recipe = loaded(path, **{f"teacher.keep.{name}": value for name, value in keep.items()}, **NO_VISUAL)
    made = filled(recipe, student)
    cached = CachedTeacher(made.cache)
    assert cached.head is None and not (tmp_path / "head.safetensors").exists()
    batch, rows = batch_of(recipe, student, "dft", [0, 3, 5])
    targets = cached.targets(batch, rows, None)
    exact = local.targets(batch, batch.response_rows, None).hidden
    assert targets.responses is not None and targets.hidden is None and exact is not None
    known = torch.log_softmax(exact @ local.head.T, -1)
    found = targets.responses
    if responses == "top_k":
        torch.testing.assert_close(found.log_probabilities, known.topk(7).values)
        assert any("the 7 likeliest ids leave out" in line for line in made.told())
    else:
        torch.testing.assert_close(found.log_probabilities.exp().sum(-1), torch.ones(len(batch.response_rows)))
    assert targets.relations is not None and len(targets.relations) == 2  # sample 3 is of text alone
    own = local.targets(batch, batch.visual_rows, None).hidden
    assert own is not None
    first = own[:4] @ local.head.T
    torch.testing.assert_close(targets.relations[0], first @ first.T, atol=1e-4, rtol=1e-4)


NO_VISUAL = {"stages.0.loss.visual": 0, "stages.2.loss.visual": 0}


def test_hidden_states_are_kept_in_bf16_if_that_is_asked_for(
    path: Path, student: VLM, full: Teaching, recipe: Recipe, tmp_path: Path
) -> None:
    half = loaded(path, **{"teacher.keep.path": str(tmp_path), "teacher.keep.precision": "bf16"})
    made = filled(half, student)
    batch, rows = batch_of(recipe, student, "dft", [0, 3])
    ours, exact = (CachedTeacher(one.cache).targets(batch, rows, None).hidden for one in (made, full))
    assert ours is not None and exact is not None and torch.equal(ours, exact.bfloat16())


def test_what_is_shown_twice_is_computed_once(full: Teaching) -> None:
    identities = {key for keys in full.cache.store.shards() for key in keys}
    assert sum(len(keys) for keys in full.cache.store.shards()) == len(identities)
    # Ten captions of ten pictures; ten questions, of which two are one text, and the pictures of the other eight.
    assert len(identities) == 10 + 10 + 9 + 8


def test_an_answer_that_is_cut_off_is_another_one(path: Path, student: VLM, full: Teaching) -> None:
    short = loaded(path, **{"stages.2.max_length": 45})
    asked = teaching(short, student).asked
    assert 0 < len(full.cache.store.missing(asked.records)) < len(asked.records)
    with pytest.raises(TeacherError, match=r"lacks what the teacher thinks of \d+ records of source 'questions'.*"):
        full.cache.require(asked)
    batch, rows = batch_of(short, student, "dft", [0])
    with pytest.raises(TeacherError, match=r"questions\.json, row 0: the teacher's cache .* lacks it"):
        CachedTeacher(full.cache).targets(batch, rows, None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 8}, "teacher: weights"),
        ({"teacher.precision": "bf16"}, "precision: weights"),
        ({"machine.precision": "bf16"}, "precision: products"),
        ({"pictures.geometry": "pad"}, "preprocessing: geometry: square there, pad now"),
        ({"teacher.keep.responses": "top_k"}, "kept: of answers: hidden there, top_k now"),
        ({"teacher.keep.visual": "relation", **NO_VISUAL}, "kept: of pictures"),
        ({"teacher.keep.precision": "bf16"}, "precision: kept"),
    ],
)
def test_a_changed_maker_is_refused_by_name(path: Path, full: Teaching, change: dict[str, Any], told: str) -> None:
    with pytest.raises(FeatureError, match=told):
        teaching(loaded(path, **change))


def test_another_tokenizer_template_size_or_decoder_is_refused_by_name(
    recipe: Recipe, full: Teaching, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = build(recipe.student, recipe.seed)
    assert student.tokenizer is not None
    student.tokenizer.chat_template = f"{student.tokenizer.chat_template} "
    with pytest.raises(FeatureError, match="template: chat"):
        cache.TeacherCache(recipe, student, torch.device("cpu"))
    monkeypatch.setattr(cache.PIL, "__version__", "99.1")
    with pytest.raises(FeatureError, match=r"preprocessing: backend: Pillow \d+ there, Pillow 99 now"):
        teaching(recipe)
    monkeypatch.undo()
    monkeypatch.setattr(cache, "meanings", lambda vlm: {0: "another"})
    with pytest.raises(FeatureError, match="tokenizer: "):
        teaching(recipe)


def test_the_teacher_is_not_loaded_where_nothing_is_missing(
    recipe: Recipe, student: VLM, full: Teaching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "weights_of", lambda recipe: pytest.fail("the teacher was loaded"))
    again = teaching(recipe, student)
    assert again.complete and again.expense().records == {}
    batch, rows = batch_of(recipe, student, "dpt", [4])
    assert CachedTeacher(again.cache).targets(batch, rows, None).hidden is not None


def test_what_it_takes_is_said_before(path: Path, student: VLM, tmp_path: Path) -> None:
    empty = teaching(loaded(path, **{"teacher.keep.path": str(tmp_path)}), student)
    expense = empty.expense()
    assert expense.records == {"captions": 10, "questions": 9} and expense.seconds > 0
    empty.share()
    written = sum(file.stat().st_size for file in (tmp_path / "shards").iterdir())
    assert written == pytest.approx(expense.bytes, rel=0.25)


def test_a_damaged_byte_is_found_when_it_is_read(path: Path, student: VLM, tmp_path: Path) -> None:
    made = filled(loaded(path, **{"teacher.keep.path": str(tmp_path)}), student)
    shard = next((tmp_path / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FeatureError, match=r"is damaged.*Remove the file and fill again"):
        for sample in range(10):
            CachedTeacher(made.cache).targets(*batch_of(made.recipe, student, "dft", [sample]), None)


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bits(
    path: Path, student: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "RECORDS", 5)
    places = [tmp_path / "whole", tmp_path / "killed"]
    whole, killed = (teaching(loaded(path, **{"teacher.keep.path": str(place)}), student) for place in places)
    whole.share()
    assert len(kept(places[0])) == 4
    computed = cache.TeacherCache._computed

    class Killed(BaseException):
        pass

    def dying(*arguments: Any) -> Any:
        if next(counter) == step:
            raise Killed
        return computed(*arguments)

    for step in range(4):
        counter = itertools.count()
        monkeypatch.setattr(cache.TeacherCache, "_computed", dying)
        with pytest.raises(Killed):
            killed.share()
        (places[1] / "shards").mkdir(exist_ok=True)
        (places[1] / "shards" / f".partial-{step}").write_bytes(b"left by a kill")
        monkeypatch.setattr(cache.TeacherCache, "_computed", computed)
        if step == 3:
            break
        for file in (places[1] / "shards").glob("0*"):
            os.remove(file)  # noqa: PTH107 - each step begins anew
    killed.share()
    assert kept(places[0]) == kept(places[1])


def test_a_fill_goes_on_although_its_data_has_changed_since_it_was_killed(
    path: Path, student: VLM, tmp_path: Path
) -> None:
    """The shard that was planned for records that are gone is given up, and the others are planned anew."""
    place = {"teacher.keep.path": str(tmp_path)}
    planned = teaching(loaded(path, **place), student)
    planned.cache.store.plan(planned.asked.records, lambda new: [new])
    fewer = teaching(loaded(path, **place, **{"data.questions.take": 4}), student)
    fewer.share()
    assert fewer.cache.complete(fewer.asked) and not planned.cache.complete(planned.asked)


def test_two_processes_fill_what_one_does(
    path: Path, student: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "RECORDS", 5)
    recipes = [loaded(path, **{"teacher.keep.path": str(tmp_path / name)}) for name in ("one", "two")]
    filled(recipes[0], student)
    for rank in (1, 0):
        one = teaching(recipes[1], student, rank, 2)
        one.share()
        assert one.cache.complete(one.asked) is (rank == 0)
    assert kept(tmp_path / "one") == kept(tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pictures.augment.flip": 0.5}, "has seen each picture once.*remove one of the two"),
        ({"teacher.keep.visual": "relation"}, "keeps relation matrices alone"),
        ({"stages.2.reference": ["unshifted_mask"]}, "which a cached teacher does not keep"),
    ],
)
def test_what_a_cache_cannot_give_is_refused_with_the_recipe(path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        loaded(path, **change)


def test_the_command_says_what_it_takes_and_fills(path: Path, tmp_path: Path) -> None:
    place = ["--set", f"teacher.keep.path={tmp_path}"]
    planned = CliRunner().invoke(app, ["cache", str(path), *place, "--plan", "--json"])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.output)["teacher"]["records"] == {"captions": 10, "questions": 9}
    assert not [*tmp_path.glob("shards/*"), *tmp_path.glob("*.safetensors")]
    done = CliRunner().invoke(app, ["cache", str(path), *place])
    assert "teacher: 19 records to look at (10 of 'captions', 9 of 'questions')" in done.output, done.output
    assert "nats of a local one's in micro-batches of 2" in done.output
    assert "the teacher's cache is full" in CliRunner().invoke(app, ["cache", str(path), *place, "--plan"]).output


def test_the_doctor_needs_no_cache(path: Path, tmp_path: Path) -> None:
    found = doctor(path, {"teacher.keep.path": str(tmp_path / "kept")}, tmp_path)
    assert not [finding for finding in found if finding.level == "error"]
    assert any(finding.check == "terms.response" for finding in found) and not (tmp_path / "kept").exists()
