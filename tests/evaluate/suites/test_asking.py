"""A model asked a suite: killed and resumed, by two processes, whatever the batch; answers of another model refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from distilvlm.data.problems import DataError
from distilvlm.evaluate import score
from distilvlm.evaluate.suites import SUITES, TEXT_SUITES, Asking, Opened, ask_suite, compared, weigh_suite
from distilvlm.evaluate.suites.ledger import Ledger
from distilvlm.evaluate.suites.processes import Processes
from distilvlm.models.save import save
from distilvlm.models.vlm import VLM
from tests.evaluate.asking import question

from .small_data import mmbench, mme, picture, put, ten, vqav2


class Killed(Exception):  # noqa: N818
    pass


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    told = vqav2(tmp_path / "vqav2", [ten(red=3, blue=7)] * 9, [f"What {'is ' * n}it?" for n in range(9)])
    return replace(told, max_new_tokens=6)


def dies_after(batches: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        nonlocal batches
        batches -= 1
        if batches == 0:
            raise Killed

    return progress


def written(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_what_was_answered_before_a_kill_is_not_asked_again(
    vlm: VLM, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask_suite(vlm, opened, "square", Asking(batch_size=2))
    assert whole is not None
    out = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        ask_suite(vlm, opened, "square", Asking(batch_size=2, out=out, progress=dies_after(3)))
    assert not out.exists()
    part = tmp_path / "answers.part-0.jsonl"
    with part.open("a") as stream:
        stream.write('{"n": 8, "predic')  # a kill in the middle of a line
    seen: list[tuple[int, int]] = []
    done = ask_suite(vlm, opened, "square", Asking(batch_size=2, out=out, progress=lambda *counts: seen.append(counts)))
    assert seen == [(2, 3), (3, 3)]  # 6 of 9 were known
    assert done is not None and done.samples == whole.samples and done.figures == whole.figures
    assert [row["prediction"] for row in written(out)] == [one.prediction for one in whole.samples]
    assert not list(tmp_path.glob("*.part-*"))
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["asked"]["suite"] == "vqav2" and told["vqa_accuracy"]["mean"] == whole.figures["vqa_accuracy"].mean  # type: ignore[union-attr]

    monkeypatch.setattr("distilvlm.evaluate.suites.asking.answer", lambda *_, **__: pytest.fail("asked again"))
    again = ask_suite(vlm, opened, "square", Asking(out=out))
    assert again is not None and again.figures == whole.figures


def test_other_numbers_of_processes_go_on_where_one_stopped(vlm: VLM, opened: Opened, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        ask_suite(vlm, opened, "square", Asking(batch_size=2, out=out, progress=dies_after(2)))
    identity = json.loads((tmp_path / "answers.part-0.jsonl").read_text().splitlines()[0])["asked"]
    assert sorted(Ledger(out, identity, rank=3).known()) == sorted(Ledger(out, identity).known())
    assert len(Ledger(out, identity).known()) == 4


@pytest.mark.parametrize("finished", [False, True])
def test_answers_of_another_model_or_suite_are_refused(
    vlm: VLM, make_vlm: Callable[..., VLM], opened: Opened, tmp_path: Path, finished: bool
) -> None:
    out = tmp_path / "answers.jsonl"
    if finished:
        ask_suite(vlm, opened, "square", Asking(out=out))
    else:
        with pytest.raises(Killed):
            ask_suite(vlm, opened, "square", Asking(batch_size=2, out=out, progress=dies_after(1)))
    with pytest.raises(DataError, match=r"another model or to something else \(model: "):
        ask_suite(make_vlm(seed=1), opened, "square", Asking(out=out))
    with pytest.raises(DataError, match=r"prompt: .* there, \"Hm\" now"):
        ask_suite(vlm, replace(opened, prompt="Hm"), "square", Asking(out=out))
    with pytest.raises(DataError, match="template"):
        ask_suite(vlm, opened, "square", Asking(template="plain", out=out))


def test_a_file_of_somebody_else_is_not_overwritten(vlm: VLM, opened: Opened, tmp_path: Path) -> None:
    out = put(tmp_path / "answers.jsonl", "precious\n")
    with pytest.raises(DataError, match="choose another --out"):
        ask_suite(vlm, opened, "square", Asking(out=out))
    assert out.read_text() == "precious\n"
    with pytest.raises(DataError, match=r"name it \.jsonl"):
        ask_suite(vlm, opened, "square", Asking(out=tmp_path / "answers.json"))


def test_questions_that_cannot_be_asked_are_counted_or_stop(vlm: VLM, tmp_path: Path) -> None:
    row = {"question": "Which?", "A": "x", "B": "y", "answer": "A", "category": "c"}
    mmbench(tmp_path, [{**row, "index": 1}, {**row, "index": 2, "answer": "Q"}])
    put(tmp_path / "pictures" / "unused.png", picture(1))
    opened = SUITES["mmbench"].opened(tmp_path, max_new_tokens=2)
    with pytest.raises(DataError, match="field 'answer'"):
        ask_suite(vlm, opened, "square")
    out = tmp_path / "answers.jsonl"
    asking = Asking(on_bad_row="quarantine", out=out)
    for _ in range(2):  # the second time from the file
        found = ask_suite(vlm, opened, "square", asking)
        assert found is not None and found.n == 2 and [row.field for row in found.bad] == ["answer"]


def test_a_question_longer_than_the_context_is_left_out_and_stays_so(vlm: VLM, tmp_path: Path) -> None:
    opened = vqav2(tmp_path / "data", [["yes"] * 10] * 2, ["Short?", "long " * 200])
    out = tmp_path / "answers.jsonl"
    for _ in range(2):
        found = ask_suite(vlm, replace(opened, max_new_tokens=2), "square", Asking(on_bad_row="quarantine", out=out))
        assert found is not None and found.n == 1 and "context" in found.bad[0].reason


WORKER = """
import sys
from pathlib import Path
from distilvlm.evaluate.suites import SUITES, Asking, ask_suite
from distilvlm.models.save import load
model, data, out = sys.argv[1:]
vlm = load(model)
opened = SUITES["mme"].opened(data, max_new_tokens=4)
found = ask_suite(vlm, opened, "square", Asking(batch_size=3, out=Path(out)))
print("evaluation" if found else "nothing")
"""


def processes(count: int, port: int, *arguments: object) -> list[subprocess.Popen[str]]:
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, arguments)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def test_two_processes_write_what_one_does(vlm: VLM, tmp_path: Path, free_port: int) -> None:
    save(vlm, tmp_path / "model", "square")
    data = mme(tmp_path / "mme", {"existence": 3, "code_reasoning": 2})
    alone = ask_suite(vlm, SUITES["mme"].opened(data, max_new_tokens=4), "square", Asking(out=tmp_path / "alone.jsonl"))
    assert alone is not None
    out = tmp_path / "two.jsonl"
    running = processes(2, free_port, tmp_path / "model", data, out)
    try:
        said = [one.communicate(timeout=120)[0].strip() for one in running]
    finally:
        for one in running:
            one.send_signal(signal.SIGKILL) if one.poll() is None else None
    assert [one.returncode for one in running] == [0, 0] and said == ["evaluation", "nothing"]
    assert out.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert json.loads(out.with_suffix(".json").read_text()) == json.loads((tmp_path / "alone.json").read_text())


def test_shares_are_everything_once() -> None:
    shares = [Processes(rank, 3).share(list(range(10))) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) == 1


def mmlu(root: Path) -> Path:
    rows = "".join(f"What is {n}?,one,two,three,four,{'ABCD'[n % 4]}\n" for n in range(6))
    put(root / "dev" / "biology_dev.csv", rows)
    put(root / "test" / "biology_test.csv", rows)
    return root


def test_text_suites_are_resumed_too(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = TEXT_SUITES["mmlu"]
    choices = suite.read(mmlu(tmp_path / "mmlu"), "test")
    whole = weigh_suite(vlm, suite, choices)
    assert whole is not None and {*whole.categories} == {"biology"}
    out = tmp_path / "answers.jsonl"
    monkeypatch.setattr("distilvlm.evaluate.suites.asking.AT_A_TIME", 1)
    with pytest.raises(Killed):
        weigh_suite(vlm, suite, choices, Asking(batch_size=2, out=out, progress=dies_after(2)))
    seen: list[int] = []
    done = weigh_suite(
        vlm, suite, choices, Asking(batch_size=2, out=out, progress=lambda done, total: seen.append(total))
    )
    assert seen == [2] and done is not None and done.samples == whole.samples
    again = weigh_suite(vlm, suite, choices, Asking(out=out))
    assert again is not None and again.figures == whole.figures and again.summary() == whole.summary()


def test_two_models_are_compared_on_the_questions_they_share(
    vlm: VLM, make_vlm: Callable[..., VLM], opened: Opened, tmp_path: Path
) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for model, file in zip((vlm, make_vlm(seed=1)), files, strict=True):
        ask_suite(model, opened, "square", Asking(out=file))
    lines = files[1].read_text().splitlines(keepends=True)
    answers = [json.loads(line) for line in lines]
    answers[0]["details"]["score"] = 0.9  # one answer that is nearly right
    files[1].write_text("".join(json.dumps(one) + "\n" for one in answers[:-1]))
    found = compared(*files)
    assert ([one.n for one in found.each], found.alone) == ([8, 8], 1)
    second = found.each[1].main
    assert second is not None and second.mean == pytest.approx(0.9 / 8)
    other = tmp_path / "c.jsonl"
    ask_suite(vlm, replace(opened, prompt="Hm"), "square", Asking(out=other))
    with pytest.raises(DataError, match="prompt is"):
        compared(files[0], other)


@pytest.mark.parametrize(
    ("row", "measure", "reason"),
    [
        (0, "gqa", r"a\.jsonl is measured by accurate, .*b\.jsonl by gqa"),
        (1, "accurate", r"b\.jsonl have no question in common"),
        (0, "beauty", r"b\.jsonl is measured by 'beauty', which this version does not know"),
    ],
)
def test_answers_that_have_nothing_to_compare_are_refused(tmp_path: Path, row: int, measure: str, reason: str) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, number, name in zip(files, (0, row), ("accurate", measure), strict=True):
        score([question(number, "red")], ["red"]).write(file)
        put(file.with_suffix(".json"), {"asked": {"suite": "shelf", "measure": name}})
    with pytest.raises(DataError, match=reason):
        compared(*files)
