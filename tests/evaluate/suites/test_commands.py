"""`distilvlm evaluate --suite`, from files to figures; suites of one's own; two models' answers compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distilvlm import cli
from distilvlm.data.problems import DataError
from distilvlm.evaluate.suites import own_suite
from distilvlm.models.save import save
from distilvlm.models.vlm import VLM
from distilvlm.recipe import RecipeError

from .small_data import figures, mmbench, picture, put, ten, vqav2
from .test_asking import mmlu

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(cli, "_configure_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", ["distilvlm", "evaluate", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def model(vlm: VLM, tmp_path: Path) -> Path:
    save(vlm, tmp_path / "model", "square")
    return tmp_path / "model"


def test_a_suite_is_asked_and_compared(
    command: Command, model: Path, make_vlm: Callable[..., VLM], tmp_path: Path
) -> None:
    vqav2(tmp_path / "data", [ten(red=3, blue=7)] * 4)
    save(make_vlm(seed=1), tmp_path / "other", "square")
    files = []
    for one in (model, tmp_path / "other"):
        files.append(tmp_path / f"{one.name}.jsonl")
        words = ["--suite", "vqav2", "--data", tmp_path / "data", "--limit", 3, "--out", files[-1], "--json"]
        code, out, _ = command(one, *words, "--max-new-tokens", 3)
        told = json.loads(out)
        assert code == 0 and told["n"] == 3 and told["pictures"] == 1 and told["suite"] == "vqav2"
        assert told["prompt"].startswith("{question}\n") and set(told["vqa_accuracy"]) == {"mean", "low", "high"}
    row = json.loads(files[0].read_text().splitlines()[0])
    assert row["question"].startswith("What is 0?") and row["pictures"] and "score" in row["details"]
    code, out, _ = command("--compare", *files, "--json")
    told = json.loads(out)
    assert (
        code == 0
        and told["against"] == "other"
        and set(told["differences"]["vqa_accuracy"]) == {*("mean", "low", "high")}
    )
    code, out, _ = command("--compare", *files)
    assert code == 0 and "VQA accuracy" in out and "other" in out


def test_a_text_suite_is_asked(command: Command, model: Path, tmp_path: Path) -> None:
    words = [model, "--suite", "mmlu", "--data", mmlu(tmp_path / "mmlu"), "--limit", 4, "--json"]
    code, out, _ = command(*words)
    assert code == 0 and json.loads(out)["n"] == 4 and "acc_norm" in json.loads(out)
    assert command(*words, "--prompt", "x")[0] == 1


def test_wrong_options_are_refused_by_name(command: Command, model: Path, tmp_path: Path) -> None:
    code, _, said = command(model, "--suite", "vqa2", "--data", tmp_path)
    assert code == 1 and "did you mean 'vqav2'?" in said
    assert command(model, "--suite", "vqav2")[0] == 2
    assert command(model, "--data", tmp_path, "--prompt", "x")[0] == 2
    assert command(model, "--suite", "mme", "--data", tmp_path, "--by-picture")[0] == 2
    code, _, said = command(model, "--suite", "mme", "--split", "x", "--data", tmp_path)
    assert code == 1 and "has no splits" in said


def test_a_suite_of_ones_own_of_rows(command: Command, model: Path, tmp_path: Path) -> None:
    put(tmp_path / "photos" / "a.png", picture())
    rows = [
        {
            "id": str(number),
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}],
            "meta": {"options": ["x", "y"]},
        }
        for number, answer in enumerate(["y", "A"])
    ]
    put(tmp_path / "shelf.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    file = put(
        tmp_path / "shelf.yaml",
        "name: shelf\nfiles: {questions: shelf.jsonl, pictures: photos}\nmetric: choice\n"
        'prompt: "{question}\\n{options}\\nLetter:"\nmax_new_tokens: 4\n',
    )
    suite, given = own_suite(file)
    opened = suite.opened(tmp_path, given=given)
    assert [one.answer for one in opened.asked.questions] == ["B", "A"]
    assert opened.asked.questions[0].text == "Which?\nA. x\nB. y\nLetter:"
    assert figures(opened, ["(B)", "the y"]) == {"accuracy": 0.5, "unreadable": 0}
    code, out, _ = command(model, "--suite", file, "--json")
    assert code == 0 and json.loads(out)["n"] == 2


@pytest.mark.parametrize(
    ("metric", "meta", "reason"),
    [
        ("choice", {"options": "x, y"}, r"shelf\.jsonl, row 0: meta\.options is no list of texts"),
        ("caption-metrics", {}, r"shelf\.jsonl, row 0: metric caption-metrics needs meta\.captions"),
        ("vqa", {}, r"shelf\.jsonl, row 0: no list of people's answers \(answers\) to compare with"),
    ],
)
def test_rows_of_ones_own_have_what_their_metric_needs(tmp_path: Path, metric: str, meta: dict, reason: str) -> None:
    talk = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "y"}]
    put(tmp_path / "shelf.jsonl", json.dumps({"conversations": talk, "meta": meta}) + "\n")
    text = f"name: shelf\nfiles: {{questions: shelf.jsonl}}\nmetric: {metric}\n"
    suite, given = own_suite(put(tmp_path / "shelf.yaml", text))
    with pytest.raises(DataError, match=reason):
        suite.opened(tmp_path, given=given)


def test_a_suite_of_ones_own_in_a_published_form(tmp_path: Path) -> None:
    row = {"index": 1, "question": "Which?", "A": "x", "B": "y", "answer": "A", "category": "c"}
    mmbench(tmp_path, [row]).rename(tmp_path / "mine.tsv")
    file = put(
        tmp_path / "mine.yaml", "name: mine\nreader: mmbench\nfiles: {questions: mine.tsv}\nprompt: '{question}'\n"
    )
    suite, given = own_suite(file)
    opened = suite.opened(tmp_path, given=given)
    assert (opened.name, opened.prompt, len(opened.asked.questions)) == ("mine", "{question}", 2)
    assert figures(opened, ["A", "B"])["circular"] == 1


def test_a_suites_file_is_strict(tmp_path: Path) -> None:
    for text, message in (
        ("name: x\nmetrc: vqa\n", "did you mean 'metric'"),
        ("name: x\nmetric: vqaa\n", "did you mean 'vqa'"),
        ("name: x\nreader: mmbenc\n", "did you mean 'mmbench'"),
    ):
        with pytest.raises(RecipeError, match=message):
            own_suite(put(tmp_path / "x.yaml", text))
    suite, given = own_suite(put(tmp_path / "x.yaml", "name: x\nfiles: {questions: gone.jsonl}\n"))
    with pytest.raises(DataError, match=r"questions: no file .*gone.jsonl"):
        suite.opened(tmp_path, given=given)
