"""`distilvlm teach`: a checkpoint as a server, from its first line to the signal that ends it."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from distilvlm.cli import app
from distilvlm.models.compose import build
from distilvlm.models.save import load, save
from distilvlm.recipe import load_recipe
from distilvlm.recipe.models import TeacherSpec
from distilvlm.teachers import TeacherError
from distilvlm.teachers.remote import RemoteTeacher
from tests.runs.tiny import write_recipe


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teach")
    recipe = load_recipe(write_recipe(directory))
    assert recipe.teacher is not None
    save(build(recipe.teacher, 0), directory / "model", "square", None)
    return directory / "model"


def test_it_serves_a_checkpoint_until_a_signal(model: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "right")
    remote = {"url": f"http://127.0.0.1:{port}", "key_variable": "TEACHER_KEY", "patience": 20}
    spec = TeacherSpec.model_validate({"from": str(model), "precision": "bf16", "kind": "remote", "remote": remote})
    found: list[RemoteTeacher] = []
    student = load(model)
    before = signal.getsignal(signal.SIGTERM)

    def ask() -> None:
        try:
            found.append(RemoteTeacher(spec, student, torch.device("cpu")))
        finally:
            if signal.getsignal(signal.SIGTERM) is not before:  # else it would be the end of the tests
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    told = CliRunner().invoke(
        app, ["teach", str(model), "--port", str(port), "--precision", "bf16", "--key-variable", "TEACHER_KEY"]
    )
    thread.join()
    assert told.exit_code == 0, told.output
    assert f"teaching at http://127.0.0.1:{port}; a recipe says teacher: {{kind: remote" in told.output
    assert told.output.endswith("stopped: every request was answered\n")
    assert signal.getsignal(signal.SIGTERM) is before
    (teacher,) = found
    assert torch.equal(teacher.head, load(model, torch.bfloat16).model.lm_head.weight)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_port_that_is_taken_and_a_key_that_is_not_set_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asked = CliRunner().invoke(app, ["teach", str(model), "--port", str(taken.getsockname()[1])])
    assert isinstance(asked.exception, TeacherError) and "choose another --port" in str(asked.exception)
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    asked = CliRunner().invoke(app, ["teach", str(model), "--key-variable", "TEACHER_KEY"])
    assert isinstance(asked.exception, TeacherError) and "TEACHER_KEY, which is not set" in str(asked.exception)
