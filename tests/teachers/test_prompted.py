"""A teacher behind vLLM or SGLang: what it says is the model's, of the positions asked for, or nothing is learned."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from distilvlm.data import Batch, StageData, read
from distilvlm.data.collate import collate
from distilvlm.data.stage import stage_data
from distilvlm.models import forward
from distilvlm.models.compose import build
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, load_recipe
from distilvlm.recipe.models import TeacherSpec
from distilvlm.recipe.teachers import RemoteSpec
from distilvlm.teachers import TeacherError
from distilvlm.teachers.local import hidden_rows
from distilvlm.teachers.remote import PromptedTeacher, connection
from tests.runs.tiny import write_recipe

from .remote_servers import Completions, serving

CPU = torch.device("cpu")
TOP_K = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(write_recipe(tmp_path_factory.mktemp("prompted"), pictures={}))


@pytest.fixture(scope="module")
def student(recipe: Recipe) -> VLM:
    return build(recipe.student, 0)


@pytest.fixture(scope="module")
def vlm(recipe: Recipe) -> VLM:
    return build_teacher(recipe, 1)


def build_teacher(recipe: Recipe, seed: int) -> VLM:
    assert recipe.teacher is not None
    vlm = build(recipe.teacher, seed)
    vlm.model.requires_grad_(False).eval()
    vlm.model.lm_head.weight.mul_(20)  # far from uniform; tied, so that it likes to repeat what it has just read
    return vlm


@pytest.fixture(scope="module")
def data(recipe: Recipe, student: VLM) -> StageData:
    source = read(recipe.data["questions"], "questions")
    return stage_data(recipe, recipe.stages[-1], student.tokenizer, student.layout, [source])


@pytest.fixture(scope="module")
def batch(data: StageData) -> Batch:
    """Pictures and text only, one turn and two."""
    return collate([data[0, index] for index in range(4)])


@pytest.fixture(params=["vllm", "sglang"])
def server(request: pytest.FixtureRequest, vlm: VLM) -> Iterator[Completions]:
    with serving(Completions(vlm, request.param)) as running:
        yield running


@pytest.fixture
def vllm(vlm: VLM) -> Iterator[Completions]:
    with serving(Completions(vlm)) as running:
        yield running


def teacher_of(recipe: Recipe, url: str, student: VLM, **changes: object) -> PromptedTeacher:
    assert recipe.teacher is not None
    remote = RemoteSpec.model_validate({"url": url, "protocol": "openai", "top_k": TOP_K, "patience": 5.0, **changes})
    spec: TeacherSpec = recipe.teacher.model_copy(update={"kind": "remote", "remote": remote})
    return PromptedTeacher(spec, student, CPU)


def test_targets_are_the_model_s_likeliest_ids_of_the_response_rows(
    recipe: Recipe, student: VLM, vlm: VLM, batch: Batch, server: Completions
) -> None:
    teacher = teacher_of(recipe, server.url, student)
    for _ in range(2):  # as text, and from the second batch on as ids
        sparse = teacher.targets(batch, batch.response_rows, None).responses
        assert sparse is not None and sparse.tail
        hidden = hidden_rows(vlm, batch, batch.pictures, batch.response_rows)
        exact = (hidden @ forward.head_weight(vlm.model).T).log_softmax(-1)  # [responses, vocabulary]
        assert len(sparse.ids) == len(batch.response_rows) > 8
        for row, target in enumerate(batch.response_targets.tolist()):
            known = sparse.ids[row] >= 0
            ids = sparse.ids[row][known]
            assert set(exact[row].topk(TOP_K).indices.tolist()) | {target} == set(ids.tolist())
            torch.testing.assert_close(sparse.log_probabilities[row][known], exact[row][ids], atol=1e-4, rtol=0)
            assert bool((sparse.log_probabilities[row][~known] == -torch.inf).all())


def test_prompts_without_pictures_go_as_text_first_and_as_ids_once_they_were_read_alike(
    recipe: Recipe, student: VLM, batch: Batch, server: Completions
) -> None:
    teacher = teacher_of(recipe, server.url, student)
    field = "prompt" if server.kind == "vllm" else "input_ids"
    for kind in (str, list):
        server.bodies.clear()
        teacher.targets(batch, batch.response_rows, None)
        plain = [body for _, body in server.bodies if "messages" not in body and "image_data" not in body]
        # The fourth row has no picture; in the first batch, two prompts more see to it that positions are right.
        assert [isinstance(body.get(field, ""), kind) for body in (plain[0], plain[-1])] == [True, kind is list]
        assert (len(server.bodies), len(plain)) == ((6, 3) if kind is str else (4, 1))


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("front", r"reads a prompt as other tokens than this run.*first\s+difference is at position 0\n"),
        ("own", r"reads a prompt as other tokens than this run"),
        ("shifted", r"speaks of other positions than those of its tokens: what it says of the last one depends on"),
        ("bare", r"speaks of other positions than those of its tokens: at position \d+ the token that stands there"),
        ("no_ids", r"gives no log-probabilities of prompts with their token ids"),
    ],
)
def test_a_server_that_reads_or_counts_otherwise_is_refused(
    recipe: Recipe, student: VLM, batch: Batch, vllm: Completions, variant: str, told: str
) -> None:
    vllm.variant = variant
    with pytest.raises(TeacherError, match=told):
        teacher_of(recipe, vllm.url, student).targets(batch, batch.response_rows, None)


def test_both_sequences_stand_side_by_side(recipe: Recipe, student: VLM, batch: Batch, vllm: Completions) -> None:
    vllm.variant = "front"
    with pytest.raises(TeacherError) as caught:
        teacher_of(recipe, vllm.url, student).targets(batch, batch.response_rows, None)
    lines = str(caught.value).splitlines()
    marked = next(number for number, line in enumerate(lines) if line.startswith("  >"))
    assert lines[marked].split()[1:] == ["0", "2", "'<|im_start|>'", "1", "'<|im_end|>'"]
    assert lines[marked + 1].split()[-2:] == ["2", "'<|im_start|>'"]  # ours, one position later


def test_an_sglang_that_is_off_by_one_is_refused(recipe: Recipe, student: VLM, vlm: VLM, batch: Batch) -> None:
    with serving(Completions(vlm, "sglang")) as server:
        server.variant = "shifted"
        with pytest.raises(TeacherError, match="speaks of other positions"):
            teacher_of(recipe, server.url, student).targets(batch, batch.response_rows, None)


def test_another_tokenizer_is_seen_in_the_first_batch(
    recipe: Recipe, student: VLM, vlm: VLM, batch: Batch, vllm: Completions, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Completions.read
    monkeypatch.setattr(Completions, "read", lambda self, text: read(self, text.replace("sky", "is")))
    with pytest.raises(TeacherError, match="reads a prompt as other tokens"):
        teacher_of(recipe, vllm.url, student).targets(batch, batch.response_rows, None)


def test_a_text_that_is_not_read_back_as_its_tokens_has_no_target(
    recipe: Recipe, student: VLM, batch: Batch, vllm: Completions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distilvlm")
    teacher = teacher_of(recipe, vllm.url, student)
    ids = batch.input_ids.clone()
    half = student.tokenizer.convert_tokens_to_ids("Ã")  # pyright: ignore  # 0xC3 alone is half of a character
    ids[0, int(batch.attention_mask[0].sum()) - 1] = half
    cut = replace(batch, input_ids=ids)
    for _ in range(2):
        sparse = teacher.targets(cut, cut.response_rows, None).responses
        assert sparse is not None
        own = cut.response_rows // cut.length == 0
        assert bool((sparse.ids[own] == -1).all()) and bool((sparse.ids[~own, :TOP_K] >= 0).all())
    assert [record.message for record in caplog.records if "is not asked" in record.message] == [
        f"{batch.keys[0].file}, row 0: its text is read as other tokens than it was cut to, so the teacher at "
        f"{vllm.url} is not asked about it (1 samples so far)"
    ]


def test_ids_that_the_student_lacks_are_left_to_the_tail(
    recipe: Recipe, student: VLM, batch: Batch, vllm: Completions
) -> None:
    teacher = teacher_of(recipe, vllm.url, student)
    whole = teacher.targets(batch, batch.response_rows, None).responses
    teacher._vocabulary = 100
    less = teacher.targets(batch, batch.response_rows, None).responses
    assert whole is not None and less is not None
    assert int(whole.ids.max()) >= 100 > int(less.ids.max())
    assert float(less.log_probabilities.exp().sum(1).max()) < 1


def test_the_same_server_goes_on_behind_an_outage_and_another_model_does_not(
    recipe: Recipe, student: VLM, vlm: VLM, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.01)
    with serving(Completions(vlm)) as server:
        teacher = teacher_of(recipe, server.url, student)
        before = teacher.targets(batch, batch.response_rows, None).responses
        port = server.server_port
    teacher._connection.close()  # a stopped server's threads hold connections
    with serving(Completions(vlm, port=port)):
        after = teacher.targets(batch, batch.response_rows, None).responses
    assert before is not None and after is not None
    assert torch.equal(before.ids, after.ids) and torch.equal(before.log_probabilities, after.log_probabilities)
    teacher._connection.close()
    with (
        serving(Completions(build_teacher(recipe, 2), port=port)),
        pytest.raises(TeacherError, match=r"came back as another model \(log-probabilities of one prompt differ"),
    ):
        teacher.targets(batch, batch.response_rows, None)


def test_a_model_that_is_not_served_is_named(recipe: Recipe, student: VLM, vllm: Completions) -> None:
    with pytest.raises(TeacherError, match=r"does not serve large.*teacher\.remote\.model"):
        teacher_of(recipe, vllm.url, student, model="large")
