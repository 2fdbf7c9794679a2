"""`distilvlm hallucination`, from files to figures, with a model and without."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distilvlm import cli
from distilvlm.data.convert import convert
from distilvlm.data.records import Record
from distilvlm.evaluate import asked_of, score
from distilvlm.evaluate.hallucination import POLLING, annotated, captions
from distilvlm.models.save import save
from distilvlm.models.vlm import VLM
from tests.data.real_files import real

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(cli, "_configure_logging", lambda: None)
        monkeypatch.setenv("COLUMNS", "200")  # typer's frame breaks no line
        monkeypatch.setattr(sys, "argv", ["distilvlm", "hallucination", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def model(vlm: VLM, tmp_path: Path) -> Path:
    save(vlm, tmp_path / "model", "square")
    return tmp_path / "model"


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def pope(records: list[Record], tmp_path: Path) -> list[Path]:
    """Two files of POPE's, on the pictures of `records`."""
    files = []
    for how in ("random", "adversarial"):
        rows = [
            {
                "question_id": 2 * n + (label == "no"),
                "image": f"{n}.png",
                "text": f"Is there a {thing}?",
                "label": label,
            }
            for n in range(3)
            for thing, label in (("dog", "yes"), ("cat", "no"))
        ]
        files.append(lines(tmp_path / f"coco_pope_{how}.json", rows))
    return files


def test_a_model_is_polled_and_its_answers_score_the_same_without_it(
    command: Command, model: Path, pope: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "polled.jsonl"
    data = ["--data", pope[0], "--data", pope[1]]
    code, said, _ = command("polling", model, *data, "--max-new-tokens", 4, "--out", out, "--json")
    asked = json.loads(said)
    assert code == 0 and asked["n"] == 12 and asked["pictures"] == 3
    assert list(asked["categories"]) == ["random", "adversarial"]
    assert set(asked["others"]) == {"always-yes", "always-no"} and asked["against"] == "always-yes"
    assert asked["others"]["always-no"]["precision"] is None
    rows = read(out)
    assert [row["details"]["how"] for row in rows] == ["random"] * 6 + ["adversarial"] * 6
    assert asked["accuracy"]["mean"] == pytest.approx(sum(row["details"]["right"] for row in rows) / 12)

    halves = [lines(tmp_path / f"{n}.jsonl", rows[6 * n : 6 * n + 6]) for n in range(2)]
    again = command("polling", *data, "--answers", halves[0], "--answers", halves[1], "--json")
    scored = json.loads(again[1])
    assert {key: scored[key] for key in ("f1", "accuracy", "categories")} == {
        key: asked[key] for key in ("f1", "accuracy", "categories")
    }


def test_polled_answers_are_compared_with_anothers_and_with_the_question_alone(
    command: Command, pope: list[Path], tmp_path: Path
) -> None:
    good = lines(tmp_path / "good.jsonl", [{"answer": text} for text in ("Yes", "No") * 3])
    poor = lines(tmp_path / "poor.jsonl", [{"answer": text} for text in ("No", "No") * 3])
    words = ["--data", pope[0], "--answers", good, "--against", poor, "--training", pope[1]]
    code, said, _ = command("polling", *words, "--json")
    found = json.loads(said)
    assert code == 0 and found["f1"]["mean"] == 1 and found["others"]["question-only"]["f1"]["mean"] == 1
    assert found["differences"]["f1"] == {"mean": 1, "low": 1, "high": 1} and found["differences"]["precision"] is None
    table = command("polling", *words)[1]
    assert "minus poor" in table and "F1, random" in table and "undefined" in table
    assert "100.0 [100.0, 100.0]" in table and "+100.0 [+100.0, +100.0]" in table


def test_captions_are_asked_for_and_scored(
    command: Command, model: Path, records: list[Record], tmp_path: Path
) -> None:
    talk = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "A dog."}]
    rows = [{"image": f"{n}.png", "conversations": talk, "meta": {"things": {"dog": 1}}} for n in range(3)]
    data = lines(tmp_path / "told.jsonl", rows)
    out = tmp_path / "captions.jsonl"
    code, _, _ = command("captions", model, "--data", data, "--max-new-tokens", 4, "--out", out, "--json")
    assert code == 0 and {row["details"]["there"][0] for row in read(out)} == {"dog"}

    synonyms = tmp_path / "words.txt"
    synonyms.write_text("dog, puppy\ncat\n")
    told = lines(tmp_path / "mine.jsonl", [{"caption": text} for text in ("a puppy", "a cat", "a dog")])
    worse = lines(tmp_path / "worse.jsonl", [{"caption": "a cat"}] * 3)
    words = ["--data", data, "--answers", told, "--against", worse, "--synonyms", synonyms, "--json"]
    found = json.loads(command("captions", *words)[1])
    assert (found["chair_i"]["mean"], found["coverage"]["mean"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found["differences"]["chair_i"]["mean"] == pytest.approx(-2 / 3)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    pictures = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in (42, 43)]
    things = [{"image_id": 42, "category_id": 1}]
    classes = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps({"images": pictures, "annotations": things, "categories": classes}))
    return path


def test_captions_that_name_their_pictures_need_no_questions(command: Command, coco: Path, tmp_path: Path) -> None:
    told = [{"image_id": 42, "caption": "a dog and a cat"}, {"image_id": 43, "caption": "grass"}]
    file = tmp_path / "told.json"
    file.write_text(json.dumps(told))
    found = json.loads(command("captions", "--answers", file, "--annotations", coco, "--json")[1])
    assert (found["chair_i"]["mean"], found["chair_s"]["mean"], found["coverage"]["mean"]) == (0.5, 0.5, 1)


def test_object_halbench_from_its_file_to_its_figures(
    command: Command, model: Path, coco: Path, records: list[Record], tmp_path: Path
) -> None:
    picture = base64.b64encode(Path(records[0].images[0]).read_bytes()).decode()
    rows = [{"image_id": n, "question": "Describe it.", "image": picture} for n in (42, 43)]
    data = lines(tmp_path / "obj_halbench.jsonl", rows)
    responses = tmp_path / "obj_answers.jsonl"
    words = ["--annotations", coco, "--max-new-tokens", 4, "--responses", responses, "--json"]
    code, said, _ = command("objhal", model, "--data", data, *words)
    assert code == 0 and json.loads(said)["judge"] == "objects named by words of objects"
    assert [row["image_id"] for row in read(responses)] == [42, 43]
    assert len(list((tmp_path / "pictures").iterdir())) == 1  # the same picture twice

    lines(responses, [row | {"text": text} for row, text in zip(read(responses), ["a dog, a cat", "sky"], strict=True)])
    found = json.loads(command("objhal", "--answers", responses, "--annotations", coco, "--json")[1])
    assert (found["response_rate"]["mean"], found["mention_rate"]["mean"]) == (1, 0.5)
    judged = lines(tmp_path / "named.jsonl", [{"objects": ["dogs"]}, {"objects": ["cat"]}])
    found = json.loads(command("objhal", "--answers", responses, "--annotations", coco, "--judge", judged, "--json")[1])
    assert (found["response_rate"]["mean"], found["mention_rate"]["mean"]) == (0.5, 0.5)


@pytest.fixture
def template(records: list[Record], tmp_path: Path) -> Path:
    rows = [
        {
            "question_type": kind,
            "question_topic": "outdoor",
            "image_id": str(n),
            "image_src": f"https://example.org/{n}.png",
            "image_content": ["Dog", "Tree"],
            "question": "What is it?",
            "gt_answer": "It is a dog.",
            "model_answer": "",
        }
        for n, kind in enumerate(("attribute", "counting"))
    ]
    path = tmp_path / "response_template.json"
    path.write_text(json.dumps(rows))
    return path


def test_mmhal_from_its_file_to_a_rate_without_a_paid_judge(
    command: Command, model: Path, template: Path, tmp_path: Path
) -> None:
    responses, out = tmp_path / "responses.json", tmp_path / "judged.jsonl"
    code, _, error = command("mmhal", model, "--data", template, "--max-new-tokens", 4, "--responses", responses)
    assert code == 0, error
    rows = json.loads(responses.read_text())
    assert [row["question_type"] for row in rows] == ["attribute", "counting"]
    for row, text in zip(rows, ("A dog under a tree.", "Two dogs and a bird."), strict=True):
        row["model_answer"] = text
    responses.write_text(json.dumps(rows))
    synonyms = tmp_path / "words.txt"
    synonyms.write_text("dog\ntree\nbird\n")
    words = ["--answers", responses, "--synonyms", synonyms, "--out", out, "--json"]
    found = json.loads(command("mmhal", *words)[1])
    assert found["hallucination_rate"]["mean"] == 0.5 and found["score"] is None and found["undecided"]["mean"] == 0
    assert [row["details"]["why"] for row in read(out)] == ["names nothing false", "not there: bird"]

    rated = lines(tmp_path / "rated.jsonl", [{"rating": 6}, {"rating": 3}])
    found = json.loads(command("mmhal", "--answers", responses, "--judge", rated, "--json")[1])
    assert (found["hallucination_rate"]["mean"], found["score"]["mean"]) == (0, 4.5)
    assert found["categories"]["counting"]["score"]["mean"] == 3
    assert found["judge"] == "judged by rated.jsonl"


def test_what_is_missing_is_said(
    command: Command, pope: list[Path], template: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "give a MODEL or its --answers" in command("polling", "--data", pope[0])[2]
    assert "say what is asked, or give --answers" in command("captions")[2]
    answers = lines(tmp_path / "answers.jsonl", [{"text": "a dog"}] * 2)
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    words = ["mmhal", "--data", template, "--answers", answers, "--judge", "http"]
    assert "say where the judge's words are kept, or give --out" in command(*words)[2]
    # Told before the model is asked, which is not even here.
    assert "say where the judge's words are kept" in command("mmhal", "gone", *words[1:3], *words[5:])[2]
    code, _, error = command(*words, "--out", tmp_path / "out.jsonl")
    assert code == 1 and "JudgeError: " in error and "OPENAI_BASE_URL" in error and "Traceback" not in error
    code, _, error = command("polling", "--data", pope[0], "--answers", answers)
    assert code == 1 and "has 2 answers for 6 questions" in error
    words = ["--data", pope[0], "--data", pope[1], "--answers", answers]
    assert "1 files of answers for 2 of questions" in command("polling", *words)[2]


def test_true_captions_and_true_answers_of_real_photographs_hallucinate_nothing(tmp_path: Path) -> None:
    config = real("coco128") / "config.yaml"
    told = convert("yolo", config, tmp_path / "told.jsonl", split="val", task="caption")
    asked = asked_of(_source(told.train, told.images))
    asked, table = annotated(asked)
    truth = score(asked.questions, [one.answer for one in asked.questions], measure=captions(table))
    assert (truth.figures["chair_i"].mean, truth.figures["coverage"].mean) == (0, 1)
    polls = convert("yolo", config, tmp_path / "polls.jsonl", split="val", task="presence", negatives="adversarial")
    asked = asked_of(_source(polls.train, polls.images))
    truth = score(asked.questions, [one.answer for one in asked.questions], measure=POLLING)
    assert truth.figures["f1"].mean == 1 and list(truth.categories) == ["adversarial"]


def _source(path: Path, images: Path):
    from distilvlm.data import read as read_source
    from distilvlm.recipe import SourceSpec

    return read_source(SourceSpec(path=str(path), images=str(images)), "test")
