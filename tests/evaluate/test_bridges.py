"""Files for other people's evaluators: they are what these read, and our model answers there as here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from distilvlm.data import Record, SampleKey, Turn
from distilvlm.data.records import PICTURE
from distilvlm.evaluate import answer
from distilvlm.models.save import geometry_of, load, save
from distilvlm.models.vlm import VLM

BRIDGES = Path(__file__).parents[2] / "bridges"


class _Loader(yaml.SafeLoader):
    """Reads `!function rows.question` as ("rows", "question")."""


_Loader.add_constructor("!function", lambda loader, node: tuple(loader.construct_scalar(node).split(".")))  # type: ignore[arg-type]


@pytest.mark.parametrize("file", sorted(BRIDGES.glob("*/*.yaml")), ids=lambda file: file.stem)
def test_every_task_reads_local_files_and_says_how_it_is_judged(file: Path) -> None:
    task = yaml.load(file.read_text(), _Loader)
    assert task["task"] == file.stem and task["dataset_path"] == "json"
    assert list(task["dataset_kwargs"]["data_files"]) == [task["test_split"]]
    assert task["metric_list"] and task["output_type"] in ("generate_until", "multiple_choice")
    if task["output_type"] == "generate_until":
        assert task["generation_kwargs"]["temperature"] == 0
    for value in task.values():
        if isinstance(value, tuple):
            assert callable(getattr(_functions(file.with_name(f"{value[0]}.py")), value[1]))


def test_a_row_is_asked_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _functions(BRIDGES / "lmms_eval" / "rows.py")
    Image.new("RGB", (8, 4), (9, 0, 0)).save(tmp_path / "a.png")
    monkeypatch.setenv("PICTURES", str(tmp_path))
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A hat."}]
    row = {"image": "a.png", "conversations": said}
    assert [one.size for one in rows.pictures(row)] == [(8, 4)] and rows.pictures({"conversations": said}) == []
    assert (rows.question(row), rows.answer(row)) == ("What is it?", "A hat.")
    assert rows.judged(row, ["a hat"]) == {"accuracy": 1.0} and rows.judged(row, ["shoe"]) == {"accuracy": 0.0}


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The bridge beside a stand-in for lmms-eval's base class; the real one was run by hand (docs/bridges.md)."""

    class Lmms:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    base, registry = ModuleType("lmms_eval.api.model"), ModuleType("lmms_eval.models.registry_v2")
    base.lmms = Lmms  # type: ignore[attr-defined]
    registry.ModelManifest = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", base)
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", registry)
    yield importlib.import_module("distilvlm.bridges.lmms_eval")
    sys.modules.pop("distilvlm.bridges.lmms_eval")


@pytest.fixture
def model(vlm: VLM, tmp_path: Path) -> Path:
    save(vlm, tmp_path / "model", "square")
    return tmp_path / "model"


def _request(number: int, settings: dict[str, Any], pictures: Any) -> SimpleNamespace:
    return SimpleNamespace(args=(f"what colour {'is ' * number}?", settings, pictures, number, "rows", "test"))


def test_our_model_answers_lmms_eval_as_it_answers_us(bridge: ModuleType, model: Path, tmp_path: Path) -> None:
    student = bridge.Student(str(model), batch_size="2")
    pictures = [Image.new("RGB", (16, 16), (80 * number, 0, 9)) for number in range(3)]
    student.task_dict = {"rows": {"test": list(range(4))}}
    shown = lambda number: [pictures[number]] if number < 3 else []  # noqa: E731
    requests = [_request(number, {"max_new_tokens": 20 + number % 2}, shown) for number in range(4)]
    records = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        if number < 3:
            pictures[number].save(path)
        text = (f"{PICTURE}\n" if number < 3 else "") + requests[number].args[0]
        images = (str(path),) if number < 3 else ()
        records.append(Record(SampleKey("rows", "rows", number), str(number), images, (Turn("user", text),)))
    vlm, expected = load(model), ["", "", "", ""]
    for limit in (20, 21):
        numbers = [number for number in range(4) if 20 + number % 2 == limit]
        texts = answer(vlm, [records[n] for n in numbers], "chat", geometry_of(model), max_new_tokens=limit)
        for number, text in zip(numbers, texts, strict=True):
            expected[number] = text
    assert student.generate_until(requests) == expected and any(expected)
    until = {"max_new_tokens": 20, "until": [expected[0][:1]]}
    assert student.generate_until([_request(0, until, shown)]) == [""]


def test_what_it_cannot_do_is_refused(bridge: ModuleType, model: Path) -> None:
    student = bridge.Student(str(model))
    with pytest.raises(ValueError, match="wants sampled answers"):
        student.generate_until([_request(0, {"temperature": 0.7}, lambda _: [])])
    with pytest.raises(NotImplementedError, match="take a task that generates"):
        student.loglikelihood([])
    assert json.dumps(vars(bridge.MANIFEST)) == json.dumps(
        {"model_id": "distilvlm", "simple_class_path": "distilvlm.bridges.lmms_eval.Student"}
    )


def _functions(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
