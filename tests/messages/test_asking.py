"""Messages of evaluations, servers and commands that no other test meets."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from distilvlm.cli import chat, checkpoints, commands, data, evaluate, export, grounding, text
from distilvlm.data import DataError
from distilvlm.evaluate.suites.catalogue import suite_named
from distilvlm.evaluate.suites.own import SuiteFile
from distilvlm.evaluate.text.exams import read_ceval
from distilvlm.evaluate.text.perplexity import read_texts
from distilvlm.serve.errors import ApiError
from distilvlm.serve.interface import Message, Refused, Request
from distilvlm.serve.served import _check
from distilvlm.serve.uploads import Uploads


def test_a_suite_that_is_not_known() -> None:
    with pytest.raises(DataError, match=r"no suite 'gqq'; did you mean 'gqa'\? Or give a file"):
        suite_named("gqq")


@pytest.mark.parametrize(("field", "told"), [("reader", "no reader of that name; "), ("metric", "no metric of that ")])
def test_a_suite_file_with_a_misspelt_name(field: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SuiteFile.model_validate({"name": "x", "reader": "rows", field: "xyz"})


def test_exams_and_texts_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name the one that holds dev, val and test"):
        read_ceval(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="shots: -1 is no number of examples"):
        read_ceval(tmp_path, shots=-1)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt holds no text"):
        read_texts(tmp_path / "empty.txt")


def test_a_request_of_nothing() -> None:
    for changes, told in (
        ({"max_tokens": 0}, "is 0: ask for 1 at least"),
        ({"stop": ("",)}, "holds an empty text, which stands everywhere"),
    ):
        with pytest.raises(Refused, match=told):
            _check(Request(model="m", messages=(Message("user", "hi"),), **changes))


def test_uploads_that_are_full() -> None:
    kept = Uploads(largest=3, seconds=60)
    kept.add(b"ab", "a.png", "vision")
    with pytest.raises(ApiError) as caught:
        kept.add(b"cd", "b.png", "vision")
    assert str(caught.value) == "there is no room for uploads"


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    (tmp_path / "tokenizer.json").write_text("{}")
    for call, told in (
        (lambda: evaluate.evaluate(model="m", compare=(file, file)), "compares two files: leave MODEL, --data and"),
        (lambda: evaluate.evaluate(model="m"), "say where its questions are"),
        (lambda: export.export(model="m", out=tmp_path, to="onnx", types=["f16"]), "is of --to gguf"),
        (lambda: text.text(model="m", task=["perplexity"]), "say where the held-out text is"),
        (
            lambda: grounding.grounding(model="m", data=file, draw=tmp_path / "a.jpg"),
            "must end in .png, which it becomes",
        ),
        (lambda: checkpoints.iaa(file, file, positions="a"), "'a' is no list of layers such as 3,7,11"),
        (lambda: data.check(file, stage="dpt"), "is no recipe .*: --stage and --set are for recipes"),
        (lambda: data.stats(str(file), max_length=9), "--max-length is for tokens: name a --tokenizer"),
        (lambda: data.stats(str(file), tokenizer=str(tmp_path)), "--tokenizer .* can't be loaded: KeyError: 'added_to"),
        (lambda: data.mix([file], images=["a"]), "'a': write NAME=VALUE"),
        (lambda: data.mix([file], weight=["a=much"]), "'a=much': write NAME=NUMBER"),
        (lambda: evaluate.evaluate(data=file), "say which model is asked, or --compare two files of answers"),
        (
            lambda: evaluate.evaluate(model="m", suite="mmlu", data=file, prompt="x"),
            "mmlu is asked by the likelihood of",
        ),
        (lambda: text.text(model="m", task=["hellaswag", "perplexity"]), "perplexity and dialogues are asked alone"),
        (lambda: chat.chat("m", adaptor=["=a"]), "'=a' is not NAME=PATH"),
        (lambda: chat.chat("m", adaptor=["one=a", "one=b"]), "two adaptors are called 'one': rename one"),
        (lambda: commands.compare(["all.yaml"], teacher="big"), "a comparison file says it: 'teacher:', 'control:'"),
    ):
        with pytest.raises((typer.BadParameter, DataError), match=told):
            call()
