"""A run whose teacher is elsewhere: the same losses and weights as beside it, whatever happens to the server."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from distilvlm.doctor import doctor
from distilvlm.models.compose import build
from distilvlm.models.vlm import VLM
from distilvlm.recipe import RecipeError, load_recipe
from distilvlm.runs.directory import RunError
from distilvlm.runs.events import read_events
from distilvlm.runs.execute import run
from distilvlm.runs.plan import plan
from distilvlm.runs.plan_table import print_plan
from distilvlm.teachers import TeacherError
from distilvlm.teachers.remote import connection
from tests.teachers.remote_servers import Completions, Teaching, serving

from .conftest import weights
from .tiny import write_recipe
from .tiny_mod import write_mod_recipe

TERMS = {"text": 1.0, "response": 1.0, "visual": 1.0, "relation": 0.5}


def stage(loss: dict[str, float], updates: int = 4) -> list[dict[str, Any]]:
    optim = {"lr": 0.01, "batch": 4, "updates": updates}
    return [
        {"name": "dft", "train": ["projector", "language"], "data": ["questions"], "loss": loss, "optim": optim},
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("remote"), stages=stage(TERMS))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distilvlm.runs.expense.estimate", lambda *_, **__: [])  # as `no_estimate_before_a_run`
        run(recipe, directory=recipe.parent / "local")
    return recipe.parent / "local"


@pytest.fixture
def running(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Teaching]:
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.01)
    server = Teaching(teaching_model(recipe))
    yield server
    server.kill()


def teaching_model(recipe: Path, seed: int | None = None) -> VLM:
    loaded = load_recipe(recipe)
    assert loaded.teacher is not None
    return build(loaded.teacher, loaded.seed if seed is None else seed)


def elsewhere(url: str, **changes: Any) -> dict[str, Any]:
    there = {"url": url, "patience": 5.0, **changes}
    return {"teacher.kind": "remote", **{f"teacher.remote.{name}": value for name, value in there.items()}}


def losses(directory: Path) -> list[dict[str, float]]:
    return [event["terms"] for event in read_events(directory / "events.jsonl") if event["event"] == "update"]


def assert_same(found: Path, expected: Path) -> None:
    assert losses(found) == losses(expected) and len(losses(found)) == 4
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def at_question(server: Teaching, number: int, act: Callable[[], None]) -> None:
    """Do something when the server is asked for hidden rows the `number`th time, in its stead."""
    answer, asked = server.server.hidden, 0

    def hidden(body: bytes, products: str) -> bytes:
        nonlocal asked
        asked += 1
        if asked == number:
            act()
        return answer(body, products)

    server.server.hidden = hidden  # pyright: ignore


def test_losses_weights_and_bytes_are_as_they_should_be(
    recipe: Path, undisturbed: Path, running: Teaching, tmp_path: Path
) -> None:
    """Losses and weights are a local teacher's; bytes are as planned without the server."""
    answer, sizes = running.server.hidden, list[tuple[int, int]]()

    def hidden(body: bytes, products: str) -> bytes:
        reply = answer(body, products)
        sizes.append((len(body), len(reply)))
        return reply

    running.server.hidden = hidden  # pyright: ignore
    run(recipe, elsewhere(running.url), tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)
    planned = plan(recipe, elsewhere("http://127.0.0.1:1")).stages[0].network
    assert planned is not None and planned.received is not None
    sizes = sizes[
        -7:
    ]  # of four updates of two micro-batches, or of one at the end of the epoch; before, the doctor asked
    sent, received = (sum(size) / 4 for size in zip(*sizes, strict=True))
    assert (planned.sent, planned.received) == (round(sent), round(received))
    assert planned.once == len(running.server.head())


def test_a_plan_needs_neither_server_nor_model(recipe: Path) -> None:
    unknown = {"teacher.vision": None, "teacher.language": None, "teacher.from": "/nowhere/model"}
    planned = plan(recipe, elsewhere("http://127.0.0.1:1") | unknown).stages[0].network
    assert planned is not None and planned.sent > 0 and planned.received is None
    prompted = {"stages.0.loss": {"visual": 0.0, "relation": 0.0}}
    resolved = plan(recipe, elsewhere("http://127.0.0.1:1", protocol="openai", top_k=5) | prompted)
    few = resolved.stages[0].network
    many = plan(recipe, elsewhere("http://127.0.0.1:1", protocol="openai", top_k=11) | prompted).stages[0].network
    assert few is not None and many is not None and many.received == pytest.approx(2 * (few.received or 0), abs=1)
    console = Console(width=200, file=io.StringIO(), record=True)
    print_plan(resolved, console)
    assert "dft: over the network per update " in console.export_text()


def test_a_server_that_dies_in_the_middle_costs_only_time(
    recipe: Path, undisturbed: Path, running: Teaching, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def die() -> None:
        def rise() -> None:
            running.kill()
            running.start()

        threading.Thread(target=rise).start()
        raise SystemError("dying")

    at_question(running, 4, die)
    caplog.set_level("INFO", "distilvlm")
    run(recipe, elsewhere(running.url), tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)
    assert any("answers again after" in record.message for record in caplog.records)


def test_a_run_that_lost_its_patience_goes_on_elsewhere(
    recipe: Path, undisturbed: Path, running: Teaching, tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("no answer")

    for number in range(6, 200):
        at_question(running, number, fail)
    with pytest.raises(TeacherError, match="Nothing is lost"):
        run(recipe, elsewhere(running.url, patience=0.2), tmp_path / "run")
    assert 1 <= len(losses(tmp_path / "run")) < 4
    other = Teaching(running.vlm)
    try:
        run(recipe, elsewhere(other.url), tmp_path / "run")
    finally:
        other.kill()
    assert_same(tmp_path / "run", undisturbed)


def test_a_run_goes_on_with_no_other_teacher(recipe: Path, running: Teaching, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no answer")

    for number in range(3, 200):
        at_question(running, number, fail)
    with pytest.raises(TeacherError):
        run(recipe, elsewhere(running.url, patience=0.1), tmp_path / "run")
    other = Teaching(teaching_model(recipe, seed=99))
    try:
        with pytest.raises(RunError, match=r"began with another teacher: \w+, and now \w+ answers"):
            run(recipe, elsewhere(other.url), tmp_path / "run")
    finally:
        other.kill()


def test_preferences_are_those_of_a_local_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_mod_recipe(tmp_path / "data", rows=6)
    content = yaml.safe_load(path.read_text())
    del content["stages"][:2]
    content["stages"][0] |= {"train": ["language"], "loss": {"text": 0.0, "preference": 1.0}}
    content["stages"][0]["optim"] |= {"epochs": None, "updates": 2}
    path.write_text(yaml.safe_dump(content))
    server = Teaching(teaching_model(path))
    try:
        run(path, elsewhere(server.url), tmp_path / "remote")
    finally:
        server.kill()
    run(path, directory=tmp_path / "local")
    assert losses(tmp_path / "remote") == losses(tmp_path / "local") != []


def test_prompts_teach_responses(recipe: Path, tmp_path: Path) -> None:
    """With all ids known, a server of log-probabilities gives what the model gives."""
    content = yaml.safe_load(recipe.read_text())
    content["stages"] = stage({"text": 1.0, "response": 1.0})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    vlm = teaching_model(recipe)
    with serving(Completions(vlm)) as server:
        every = elsewhere(server.url, protocol="openai", top_k=vlm.embedding_rows)
        run(path, every, tmp_path / "remote")
    run(path, directory=tmp_path / "local")
    for here, there in zip(losses(tmp_path / "local"), losses(tmp_path / "remote"), strict=True):
        assert there == pytest.approx(here, rel=2e-4)
    kept = json.loads((tmp_path / "remote" / "teacher.json").read_text())
    assert kept == {"identity": "tiny (somewhere/tiny)"}


def test_the_doctor_asks_the_server(recipe: Path, running: Teaching) -> None:
    found = {finding.check: finding for finding in doctor(recipe, elsewhere(running.url))}
    assert found["teacher.server"].level == "ok" and "terms.response" in found, [*found]
    assert (
        found["teacher.server"].text == f"{running.url} answers, and gives targets of response, visual, relation terms"
    )
    away = {finding.check: finding for finding in doctor(recipe, elsewhere("http://127.0.0.1:9"))}
    assert away["teacher.server"].level == "error" and "did not answer" in away["teacher.server"].text
    assert "distilvlm teach MODEL" in away["teacher.server"].fix


def test_a_server_that_fails_or_lies_is_a_finding_beside_all_others(
    recipe: Path, running: Teaching, tmp_path: Path
) -> None:
    def die() -> None:
        raise RuntimeError("out of memory")

    for number in range(1, 20):
        at_question(running, number, die)
    found = {finding.check: finding for finding in doctor(recipe, elsewhere(running.url))}
    assert found["teacher.server"].level == "ok" and found["teacher.targets"].level == "error"
    assert "out of memory" in found["teacher.targets"].text and "disk.space" in found
    content = yaml.safe_load(recipe.read_text())
    content["stages"] = stage({"text": 1.0, "response": 1.0})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    prompts = {"protocol": "openai", "top_k": 5}
    with serving(Completions(teaching_model(recipe))) as server:
        said = {finding.check: finding for finding in doctor(path, elsewhere(server.url, **prompts))}
        assert "teacher.targets" not in said and said["terms.response"].level == "ok"
        assert said["teacher.server"].text == f"{server.url} answers, and gives targets of response terms"
        server.variant = "shifted"
        said = {finding.check: finding for finding in doctor(path, elsewhere(server.url, **prompts))}
        assert said["teacher.targets"].level == "error" and "vllm serve" in said["teacher.targets"].fix
    away = {finding.check: finding for finding in doctor(path, elsewhere("http://127.0.0.1:9", **prompts))}
    assert away["teacher.server"].level == "error" and "vllm serve MODEL" in away["teacher.server"].fix


def test_what_prompts_cannot_teach_is_refused_when_the_recipe_is_read(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"stage 'dft' has loss\.visual, which needs hidden rows.*`distilvlm teach`"):
        load_recipe(recipe, elsewhere("http://127.0.0.1:1", protocol="openai"))
