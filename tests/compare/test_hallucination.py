"""A comparison that polls and lets describe: tables, file and report show every figure with its interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distilvlm.compare import Results, compare, load_comparison
from distilvlm.data import DataError
from distilvlm.evaluate import difference
from distilvlm.recipe import RecipeError
from distilvlm.report import write_report
from distilvlm.report.read import ReportError, read
from tests.runs.tiny import COLOURS, write_recipe


def row(number: int, question: str, answer: str, **meta: Any) -> dict[str, Any]:
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": f"{number}.png", "conversations": talk, "meta": meta}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """One run of one update; polls about colours, and descriptions of them, on its training pictures."""
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    stage = {"name": "sft", "train": ["projector", "language"], "data": ["questions"]}
    stage["optim"] = {"lr": 0.01, "batch": 4, "updates": 1}
    plain = {key: value for key, value in recipe.items() if key not in ("teacher", "stages")} | {"stages": [stage]}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain))
    polls, told = [], []
    for number in range(10):
        colour, other = COLOURS[number % 5], COLOURS[(number + 1) % 5]
        how = ("random", "adversarial")[number % 2]
        polls.append(row(number, f"Is there {colour} in the picture?", "yes", thing=colour, how=how))
        polls.append(row(number, f"Is there {other} in the picture?", "no", thing=other, how=how))
        told.append(row(number, "Describe the picture.", f"a {colour} picture", things={colour: 1}))
    write_rows(tmp_path / "polls.jsonl", polls)
    write_rows(tmp_path / "told.jsonl", told)
    shared = {"images": "./pictures", "max_new_tokens": 3, "batch": 8}
    content = {
        "name": "tiny",
        "title": "Tiny",
        "runs": [{"name": "control", "recipe": "plain.yaml"}],
        "questions": {
            "polls": {
                **shared,
                "title": "Polls",
                "path": "./polls.jsonl",
                "training": "./polls.jsonl",
                "measure": "polling",
            },
            "told": {
                **shared,
                "title": "Told",
                "path": "./told.jsonl",
                "training": "./told.jsonl",
                "measure": "captions",
            },
            "words": {**shared, "title": "Words", "path": "./told.jsonl", "training": "./told.jsonl"},
        },
        "differences": [["control", "always-yes"], ["control", "majority"]],
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def changed(file: Path, questions: str, **changes: Any) -> Path:
    content = yaml.safe_load(file.read_text())
    content["questions"][questions].update(changes)
    file.write_text(yaml.safe_dump(content))
    return file


def test_every_figure_stands_in_tables_file_and_report(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    results = compare(comparison, out)
    polls, told = results.seeds[0].rows["polls"], results.seeds[0].rows["told"]
    assert list(polls) == ["majority", "question-only", "always-yes", "control"]
    assert list(told) == ["majority", "question-only", "control"]
    assert polls["always-yes"].figures["f1"].mean == pytest.approx(2 / 3)
    # one fixed training caption names its colour, which a fifth of the pictures have
    assert told["majority"].figures["chair_i"].mean == 0.8 and told["majority"].figures["coverage"].mean == 0.2

    table = (out / "table.md").read_text()
    for head in (
        "| polls, 20 questions on 10 pictures, F1 in % |",
        "| polls, 20 questions on 10 pictures, accuracy in % |",
        "| polls, 20 questions on 10 pictures, yes-ratio in % |",
        "| told, 10 questions on 10 pictures, CHAIR_i in % (lower is better) |",
        "| told, 10 questions on 10 pictures, CHAIR_s in % (lower is better) |",
        "| told, 10 questions on 10 pictures, coverage in % |",
        "| words, 10 questions on 10 pictures, accuracy in % |",
    ):
        assert head in table
    assert "| always-yes |  | 66.7 [66.7, 66.7] |" in table
    assert table.count("| control − always-yes |") == 1  # of F1, and only where it was asked
    assert table.count("| control − majority |") == 3

    content = json.loads((out / "comparison.json").read_text())
    assert content["baselines"] == ["majority", "question-only", "always-yes"]
    assert [figure["name"] for figure in content["measures"]["polling"]][:3] == ["f1", "accuracy", "yes_ratio"]
    seed = content["seeds"][0]
    gap = difference(polls["control"], polls["always-yes"])
    assert seed["differences"]["polls"]["control - always-yes"] == vars(gap)
    assert list(seed["differences"]["told"]) == ["control - majority"]
    assert set(seed["rows"]["polls"]["control"]["categories"]) == {"random", "adversarial"}
    assert seed["rows"]["told"]["control"]["chair_s"]["mean"] == told["control"].figures["chair_s"].mean

    page = (out / "report.html").read_text()
    for text in (
        "F1 in %, higher is better",
        "yes-ratio in %<",
        "CHAIR_i in %, lower is better",
        "The same by F1, adversarial",
        "The same by precision",
        "paired differences of CHAIR_i in percentage points, below 0 is better",
        "Of all mentions of objects, the share whose object is not in the picture.",
        "not there: ",  # under an answer, beside right and wrong
    ):
        assert text in page
    line = json.loads((out / "seed-0/answers/told/majority.jsonl").read_text().splitlines()[1])
    assert line["details"]["hallucinated"] == [COLOURS[0]] and line["details"]["missed"] == [COLOURS[1]]


def test_answers_that_are_kept_are_judged_anew(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = compare(comparison, out)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("distilvlm.compare.questions.evaluate", never)
    (tmp_path / "words.txt").write_text("\n".join([*COLOURS[1:], f"{COLOURS[0]}, picture"]))
    again = compare(changed(comparison, "told", synonyms="./words.txt"), out)
    assert _predictions(again) == _predictions(first)
    # "a red picture" names red twice now, and every other picture is red, too
    assert again.seeds[0].rows["told"]["majority"].figures["chair_i"].mean == 0.8
    assert again.seeds[0].rows["told"]["question-only"].samples[1].details["mentioned"] == {"red": ["red", "picture"]}
    assert again.seeds[0].rows["polls"] == first.seeds[0].rows["polls"]


def _predictions(results: Results) -> list[str]:
    return [sample.prediction for sample in results.seeds[0].rows["told"]["control"].samples]


def test_an_undefined_figure_is_said(comparison: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(comparison.read_text())
    # Nobody says yes, so precision is undefined; nobody is asked about anything that is there, so F1 is, too.
    rows = [json.loads(line) for line in (tmp_path / "polls.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "polls.jsonl", [one for one in rows if one["conversations"][1]["value"] == "no"])
    content["differences"] = [["question-only", "majority"]]
    comparison.write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    results = compare(comparison, out)
    assert results.gap(results.seeds[0], "polls", ("question-only", "majority")) is None
    assert "| question-only − majority |  | undefined |" in (out / "table.md").read_text()
    assert json.loads((out / "comparison.json").read_text())["seeds"][0]["rows"]["polls"]["majority"]["f1"] is None
    assert write_report(out).read_text().count(">undefined<") >= 3


def test_always_yes_is_known_only_where_there_are_polls(comparison: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(comparison.read_text())
    del content["questions"]["polls"]
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(
        RecipeError, match="nothing named 'always-yes' is asked: there are majority, question-only, con"
    ):
        load_comparison(comparison, tmp_path)


def test_synonyms_belong_to_captions(comparison: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="synonyms: only questions with 'measure: captions' have any"):
        load_comparison(changed(comparison, "polls", synonyms="words.txt"), tmp_path)


def test_a_run_can_not_be_called_as_a_baseline(comparison: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(comparison.read_text())
    content["runs"][0]["name"] = "always-yes"
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="'always-yes' is the name of a baseline"):
        load_comparison(comparison, tmp_path)


def test_questions_that_can_not_be_judged_are_told_before_the_first_run(comparison: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "told.jsonl", [row(0, "Describe the picture.", "a red picture")])
    with pytest.raises(DataError, match=r"told\.jsonl, row 0: nothing says what is in its picture"):
        compare(comparison, tmp_path / "out")
    assert not (tmp_path / "out" / "seed-0").exists()


def test_a_file_that_lacks_a_figure_is_damaged(comparison: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(comparison, out)
    content = json.loads((out / "comparison.json").read_text())
    del content["seeds"][0]["rows"]["polls"]["control"]["f1"]
    (out / "comparison.json").write_text(json.dumps(content))
    with pytest.raises(ReportError, match=r"seed 0, polls: 'control' has no 'f1'"):
        read(out)
