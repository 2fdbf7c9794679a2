"""`distilvlm teach` and the teacher of kind `remote`: the same targets as here, and an outage costs only time."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from distilvlm.data import Batch, StageData, read
from distilvlm.data.collate import collate
from distilvlm.data.stage import stage_data
from distilvlm.models.compose import build
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, load_recipe
from distilvlm.teachers import LocalTeacher, TeacherError
from distilvlm.teachers.remote import RemoteTeacher, connection
from distilvlm.teachers.remote.message import Question
from tests.runs.tiny import VISION, write_recipe, write_tokenizer

from .remote_servers import LARGEST, Teaching

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(write_recipe(tmp_path_factory.mktemp("remote")))


@pytest.fixture(scope="module")
def student(recipe: Recipe) -> VLM:
    return build(recipe.student, recipe.seed)


@pytest.fixture(scope="module")
def local(recipe: Recipe, student: VLM) -> LocalTeacher:
    return LocalTeacher(teaching_model(recipe), student, device=CPU, student_device=CPU, share_vision=False)


def teaching_model(recipe: Recipe, seed: int = 7) -> VLM:
    assert recipe.teacher is not None
    return build(recipe.teacher, seed)


@pytest.fixture(scope="module")
def data(recipe: Recipe, student: VLM) -> StageData:
    source = read(recipe.data["questions"], "questions")
    return stage_data(recipe, recipe.stages[-1], student.tokenizer, student.layout, [source])


@pytest.fixture(scope="module")
def batches(data: StageData) -> list[Batch]:
    """Pictures and text only together, and text only."""
    return [collate([data[0, index] for index in chosen]) for chosen in ((0, 1, 2, 3), (3, 7))]


@pytest.fixture(scope="module")
def running(local: LocalTeacher) -> Iterator[Teaching]:
    server = Teaching(local.vlm)
    yield server
    server.kill()


@pytest.fixture
def mortal(local: LocalTeacher, monkeypatch: pytest.MonkeyPatch) -> Iterator[Teaching]:
    """A server to be killed, and a run that does not wait long between two attempts."""
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.01)
    server = Teaching(local.vlm)
    yield server
    server.kill()


def remote(
    recipe: Recipe, server: Teaching, student: VLM, outline: VLM | None = None, **changes: object
) -> RemoteTeacher:
    assert recipe.teacher is not None
    fields = {"precision": changes.pop("precision", "fp32")}
    there = {"url": server.url, "patience": 5.0, "timeout": 5.0, **changes}
    spec = recipe.teacher.model_dump(by_alias=True, exclude_unset=True) | {"kind": "remote", "remote": there, **fields}
    return RemoteTeacher(type(recipe.teacher).model_validate(spec), student, CPU, outline)


def rows_of(batch: Batch) -> torch.Tensor:
    return torch.cat([batch.response_rows, batch.visual_rows]).unique()


def test_targets_are_those_of_the_same_model_here_bit_for_bit(
    recipe: Recipe, student: VLM, local: LocalTeacher, running: Teaching, batches: list[Batch]
) -> None:
    teacher = remote(recipe, running, student)
    for batch in batches:
        here, there = (one.targets(batch, rows_of(batch), None) for one in (local, teacher))
        assert here.hidden is not None and there.hidden is not None and here.head is not None
        assert len(here.hidden) > 3 and torch.equal(here.hidden, there.hidden)
        assert there.head is not None and torch.equal(here.head, there.head)


def test_products_are_in_bf16_where_the_run_s_are(
    recipe: Recipe, student: VLM, local: LocalTeacher, running: Teaching, batches: list[Batch]
) -> None:
    teacher = remote(recipe, running, student)
    whole = teacher.targets(batches[0], rows_of(batches[0]), None).hidden
    with torch.autocast("cpu", torch.bfloat16):
        here, there = (one.targets(batches[0], rows_of(batches[0]), None).hidden for one in (local, teacher))
    assert whole is not None and here is not None and there is not None
    assert torch.equal(here, there) and not torch.equal(whole, there)


def test_a_packed_batch_is_one_there_too(
    recipe: Recipe, student: VLM, local: LocalTeacher, running: Teaching, data: StageData
) -> None:
    batch = collate([data[0, index] for index in range(4)], packed=True)
    assert batch.sizes is not None
    teacher = remote(recipe, running, student)
    here, there = (one.targets(batch, rows_of(batch), None).hidden for one in (local, teacher))
    assert here is not None and there is not None and torch.equal(here, there)


def test_no_row_is_an_answer_too(recipe: Recipe, student: VLM, running: Teaching, batches: list[Batch]) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    found = remote(recipe, running, student).targets(batches[1], none, None).hidden
    assert found is not None and found.shape == (0, 24)


def test_a_run_waits_for_a_server_that_died_and_gets_the_same(
    recipe: Recipe,
    student: VLM,
    local: LocalTeacher,
    mortal: Teaching,
    batches: list[Batch],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "distilvlm")
    monkeypatch.setattr(connection, "TOLD_EVERY", 0.1)
    teacher = remote(recipe, mortal, student)
    teacher.targets(batches[0], rows_of(batches[0]), None)
    mortal.kill()
    later = threading.Timer(0.6, mortal.start)
    later.start()
    there = teacher.targets(batches[0], rows_of(batches[0]), None).hidden
    later.join()
    here = local.targets(batches[0], rows_of(batches[0]), None).hidden
    assert here is not None and there is not None and torch.equal(here, there)
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "does not answer (ConnectionRefusedError" in told[0] and "waiting for it, at most 5 s" in told[0]
    assert 1 <= len([line for line in told if line.startswith("still waiting")]) <= 6
    assert "answers again after" in told[-1]


def test_an_idle_connection_that_the_server_gave_up_is_no_outage(
    recipe: Recipe, student: VLM, mortal: Teaching, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = remote(recipe, mortal, student)
    mortal.kill()
    mortal.start()
    caplog.set_level(logging.INFO, "distilvlm")
    assert teacher.targets(batches[1], rows_of(batches[1]), None).hidden is not None
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_patience_has_an_end_and_says_that_the_run_can_go_on(
    recipe: Recipe, student: VLM, mortal: Teaching, batches: list[Batch]
) -> None:
    teacher = remote(recipe, mortal, student, patience=0.05)
    mortal.kill()
    with pytest.raises(TeacherError, match=r"did not answer for .* Nothing is lost: .*same command goes on"):
        teacher.targets(batches[0], rows_of(batches[0]), None)
    mortal.start()


def test_another_model_behind_the_same_address_is_refused(
    recipe: Recipe, student: VLM, mortal: Teaching, batches: list[Batch]
) -> None:
    teacher = remote(recipe, mortal, student)
    before = mortal.vlm
    mortal.kill()
    mortal.vlm = teaching_model(recipe, seed=8)
    mortal.start()
    with pytest.raises(TeacherError, match=r"came back as another model \(fingerprint '\w+', now '\w+'\)"):
        teacher.targets(batches[0], rows_of(batches[0]), None)
    mortal.kill()
    mortal.vlm = before
    mortal.start()
    assert teacher.targets(batches[0], rows_of(batches[0]), None).hidden is not None


def test_a_server_that_fails_is_asked_again(
    recipe: Recipe, student: VLM, mortal: Teaching, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = remote(recipe, mortal, student)
    answer, failures = mortal.server.hidden, iter([RuntimeError("out of memory")] * 2)

    def hidden(body: bytes, products: str) -> bytes:
        if (failure := next(failures, None)) is not None:
            raise failure
        return answer(body, products)

    monkeypatch.setattr(mortal.server, "hidden", hidden)
    assert teacher.targets(batches[0], rows_of(batches[0]), None).hidden is not None


@pytest.mark.parametrize(("key", "told"), [("wrong", "the key is wrong"), (None, "a key is wanted")])
def test_without_the_key_nothing_is_told(
    recipe: Recipe, student: VLM, local: LocalTeacher, monkeypatch: pytest.MonkeyPatch, key: str | None, told: str
) -> None:
    server = Teaching(local.vlm, key="right")
    monkeypatch.setenv("TEACHER_KEY", "right")
    assert remote(recipe, server, student, key_variable="TEACHER_KEY").description.width == 24
    if key is not None:
        monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(TeacherError, match=rf"{server.url} refused \(HTTP 401\): {told}; the key is what the variable"):
        remote(recipe, server, student, key_variable=key and "TEACHER_KEY")
    server.kill()


def test_a_key_that_is_not_set_is_said_before_asking(recipe: Recipe, student: VLM, running: Teaching) -> None:
    with pytest.raises(TeacherError, match="names NO_SUCH_KEY, which is not set"):
        remote(recipe, running, student, key_variable="NO_SUCH_KEY")


def test_what_cannot_teach_this_student_is_refused_with_both_sides_named(
    recipe: Recipe, student: VLM, running: Teaching, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path / "other", extra="cat dog")
    other = {"language.tokenizer": str(tmp_path / "other")}
    for change, told in (
        (other, r"different tokenizers: \d+ ids differ, the first is \d+ \(student '\S+', teacher '\S+'\)"),
        ({"vision.config": {**VISION, "image_size": 24}}, r"4 tokens \(4 visual\) for the teacher and 9 \(9 visual\)"),
    ):
        spec = recipe.student.model_dump(by_alias=True, exclude_unset=True)
        for field, value in change.items():
            part, name = field.split(".")
            spec[part][name] = value
        with pytest.raises(TeacherError, match=told):
            remote(recipe, running, build(type(recipe.student).model_validate(spec), 0))
    with pytest.raises(TeacherError, match=r"teacher\.precision is bf16, and http://\S+ holds its weights in fp32"):
        remote(recipe, running, student, precision="bf16")
    told = r"the recipe's teacher has width 16, and the model at http://\S+ 24: name the model that is served"
    with pytest.raises(TeacherError, match=told):  # the student is narrower than what is served
        remote(recipe, running, student, outline=student)


@pytest.mark.parametrize(("tensors", "found"), [({"hidden": torch.zeros(2, 3)}, r"\[2, 3\]"), ({}, "missing")])
def test_an_answer_that_is_not_the_rows_asked_for_is_refused(
    recipe: Recipe,
    student: VLM,
    running: Teaching,
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    tensors: dict[str, torch.Tensor],
    found: str,
) -> None:
    teacher = remote(recipe, running, student)
    monkeypatch.setattr(running.server, "hidden", lambda *_: save({"other": torch.zeros(1), **tensors}))
    rows = rows_of(batches[1])
    told = rf"the hidden that http://\S+ sent is {found}, not \[{len(rows)}, 24\]"
    with pytest.raises(TeacherError, match=told):
        teacher.targets(batches[1], rows, None)


def test_a_server_of_another_kind_is_named(
    recipe: Recipe, student: VLM, running: Teaching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(running.server.description), "as_models", lambda *_: {"data": [{"id": "gpt"}]})
    with pytest.raises(TeacherError, match=r"is no server of `distilvlm teach`: set teacher\.remote\.protocol"):
        remote(recipe, running, student)


def test_a_micro_batch_that_is_too_large_is_not_sent(
    recipe: Recipe, student: VLM, running: Teaching, batches: list[Batch]
) -> None:
    teacher = remote(recipe, running, student)
    many = Batch(**{**vars(batches[0]), "pictures": torch.zeros(2000, 3, 16, 16, dtype=torch.uint8)})
    with pytest.raises(TeacherError, match=r"takes [\d,]+ bytes, and http://\S+ accepts 1,048,576: set machine\.micro"):
        teacher.targets(many, rows_of(many), None)


def test_what_is_no_question_is_answered_with_what_is_wrong(running: Teaching, batches: list[Batch]) -> None:
    batch = batches[0]
    right = {name: v for name, v in vars(Question.of(batch, batch.response_rows)).items() if v is not None}
    model = running.server.description.fingerprint

    def post(body: bytes, path: str = f"/v1/hidden?model={model}", length: int | None = None) -> tuple[int, str]:
        asked = http.client.HTTPConnection("127.0.0.1", running.port, timeout=5)
        asked.request("POST", path, body, {} if length is None else {"Content-Length": str(length)})
        reply = asked.getresponse()
        said = reply.read()
        asked.close()
        return reply.status, "" if reply.status == 200 else json.loads(said)["error"]["message"]

    assert post(save(right))[0] == 200
    for change, told in (
        ({"input_ids": right["input_ids"] + 1000}, "input_ids reach up to"),
        ({"input_ids": right["input_ids"].int()}, "input_ids is torch.int32, not torch.int64"),
        ({"attention_mask": right["attention_mask"][:3]}, "] and attention_mask [3, "),
        ({"attention_mask": right["attention_mask"] * 2}, "attention_mask has other values"),
        ({"rows": right["rows"] - 1000}, "rows are not different positions"),
        ({"placeholder_rows": right["placeholder_rows"][1:]}, "placeholders for 3 pictures of 4 each"),
        ({"pictures": right["pictures"].float()}, "pictures are [3, 3, 16, 16] torch.float32"),
        ({"sizes": torch.tensor([3])}, "samples of [3] positions are not in one line"),
        ({"code": torch.zeros(1)}, "the tensors are"),
    ):
        status, said = post(save({**right, **change}))
        assert status == 400 and told in said, said
    assert post(b"\x80\x04K\x00.")[0] == 400  # a pickle
    assert post(save(right), "/v1/hidden?model=other") == (412, f"this is the model {model}, and other was asked")
    assert post(b"", length=LARGEST + 1)[0] == 413
    assert post(b"", "/v1/other")[0] == 404


def test_several_processes_are_served_one_after_another(
    recipe: Recipe, student: VLM, running: Teaching, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, answer = 0, 0, running.server.hidden

    def hidden(body: bytes, products: str) -> bytes:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return answer(body, products)

    monkeypatch.setattr(running.server, "hidden", hidden)
    teachers = [remote(recipe, running, student) for _ in range(3)]
    found: dict[int, torch.Tensor | None] = {}

    def ask(number: int) -> None:
        batch = batches[number % 2]
        found[number] = teachers[number].targets(batch, rows_of(batch), None).hidden

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert torch.equal(found[0], found[2]) and found[1] is not None  # pyright: ignore


def test_what_is_under_way_is_answered_when_the_server_stops(
    recipe: Recipe, student: VLM, mortal: Teaching, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, answer = remote(recipe, mortal, student), mortal.server.hidden
    began = threading.Event()

    def hidden(body: bytes, products: str) -> bytes:
        began.set()
        time.sleep(0.2)
        return answer(body, products)

    monkeypatch.setattr(mortal.server, "hidden", hidden)
    found: list[torch.Tensor | None] = []
    thread = threading.Thread(
        target=lambda: found.append(teacher.targets(batches[0], rows_of(batches[0]), None).hidden)
    )
    thread.start()
    assert began.wait(5)
    mortal.server.shutdown()
    mortal.server.server_close()
    thread.join()
    assert found[0] is not None
    mortal.start()
