"""A damaged file of a run is named, and made anew where that can be; a full or read-only disk says how to go on."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from distilvlm.recipe import load_recipe
from distilvlm.runs import lock
from distilvlm.runs.directory import RunDirectory, RunError
from distilvlm.runs.disk import DiskError, explained
from distilvlm.runs.events import Events, read_events
from distilvlm.runs.execute import run
from distilvlm.runs.lock import InUseError, locked

from .conftest import weights
from .test_failing_writes import write_small
from .test_kills import assert_same

FINAL = "stages/00-sft/final"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and its finished run."""
    directory = tmp_path_factory.mktemp("damage")
    recipe = write_small(directory)
    return recipe, run(recipe, directory=directory / "run").directory


@pytest.fixture
def copy(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return finished[0], Path(shutil.copytree(finished[1], tmp_path / "run"))


def spoil(file: Path) -> None:
    file.write_bytes(b"\x00\xff" + file.read_bytes()[2:])


def test_a_damaged_model_is_written_anew(
    copy: tuple[Path, Path], finished: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    recipe, directory = copy
    (directory / "model" / "manifest.json").write_text("{")
    run(recipe, directory=directory)
    assert f"{directory / 'model'} is damaged" in caplog.text and "unreadable" in caplog.text
    assert_same(directory, weights(finished[1]))


def test_a_damaged_finished_stage_says_what_to_remove(copy: tuple[Path, Path], finished: tuple[Path, Path]) -> None:
    recipe, directory = copy
    spoil(directory / FINAL / "weights.safetensors")
    (directory / "model" / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"finished stage 'sft' is damaged.*remove .*00-sft"):
        run(recipe, directory=directory)
    shutil.rmtree(directory / "stages" / "00-sft")
    run(recipe, directory=directory)
    assert_same(directory, weights(finished[1]))


def test_what_can_be_made_again_is(
    copy: tuple[Path, Path], finished: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    recipe, directory = copy
    shutil.rmtree(directory / "stages")
    (directory / "model" / "manifest.json").unlink()
    kept = [directory / "about.json", directory / "cost.json", *(directory / "data").iterdir()]
    for file in kept:
        spoil(file)
    run(recipe, directory=directory)
    assert all(f"{file} is damaged" in caplog.text for file in kept if file.suffix == ".json")
    assert_same(directory, weights(finished[1]))
    assert json.loads((directory / "about.json").read_text())["finished"]


def test_without_a_whole_checkpoint_a_stage_begins_anew_and_says_so(
    copy: tuple[Path, Path], finished: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    recipe, directory = copy
    (directory / "stages/00-sft/checkpoints").mkdir()
    (directory / FINAL).rename(directory / "stages/00-sft/checkpoints/00000001")
    spoil(directory / "stages/00-sft/checkpoints/00000001/weights.safetensors")
    shutil.rmtree(directory / "model")
    run(recipe, directory=directory)
    assert "no whole checkpoint is left: stage 'sft' begins anew" in caplog.text
    assert_same(directory, weights(finished[1]))


def test_a_damaged_recipe_says_how_to_put_it_back(copy: tuple[Path, Path]) -> None:
    recipe, directory = copy
    for content in (b"", b"\xff\xfe\x00", b"name: [", b"name: tiny\n"):
        (directory / "recipe.yaml").write_bytes(content)
        with pytest.raises(RunError, match=r"(?s)recipe\.yaml is damaged.*a new --dir writes it"):
            run(recipe, directory=directory)


def test_who_taught_a_run_must_be_readable(tmp_path: Path) -> None:
    place = RunDirectory(tmp_path)
    place.claim_teacher("model a")
    spoil(place.teacher)
    with pytest.raises(RunError, match="is damaged: remove it if this run began with model a, which answers now"):
        place.claim_teacher("model a")


def test_a_log_that_lost_its_end_is_cut_at_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events.jsonl"
    events = Events(path, keep=0)
    for number in range(300):
        events.write("update", number=number)
    kept = events.sync()
    events.close()
    path.write_bytes(path.read_bytes()[:-10])
    events = Events(path, keep=kept)
    events.write("update", number=300)
    events.close()
    assert [event["number"] for event in read_events(path)] == [*range(299), 300]
    assert "lacks the last" in caplog.text


Usage = namedtuple("Usage", "total used free")


def test_a_stage_without_room_for_its_checkpoint_does_not_begin(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distilvlm.runs.execute.consult", lambda *_: None)  # the doctor looks, too, when a run begins
    monkeypatch.setattr("distilvlm.runs.disk.shutil.disk_usage", lambda _: Usage(100_000, 90_000, 10_000))
    with pytest.raises(DiskError, match=r"checkpoints takes .* kB, 10 kB are free\. Kept: nothing but .* continues"):
        run(finished[0], directory=tmp_path / "run")
    monkeypatch.undo()
    run(finished[0], directory=tmp_path / "run")
    assert_same(tmp_path / "run", weights(finished[1]))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_a_disk_s_error_says_where_what_is_kept_and_how_to_go_on(number: int, finished: tuple[Path, Path]) -> None:
    recipe, directory = finished
    error = OSError(number, os.strerror(number), str(directory / "events.jsonl"))
    with pytest.raises(DiskError) as told, explained(load_recipe(recipe), RunDirectory(directory)):
        raise error
    for part in (os.strerror(number), str(directory), "Kept: stage 'sft'", "--dir", "the same command continues"):
        assert part in str(told.value)


def test_an_error_of_a_file_that_is_only_read_is_left_alone(finished: tuple[Path, Path]) -> None:
    recipe, directory = finished
    with pytest.raises(PermissionError), explained(load_recipe(recipe), RunDirectory(directory)):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/picture.png")


def test_who_holds_a_directory_is_told(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = os.fork()
        if child == 0:  # a lock is a process's own
            try:
                with locked(tmp_path):
                    os._exit(1)
            except InUseError as error:
                told = f"in use by process {os.getppid()} on {socket.gethostname()}, since 20"
                os._exit(0 if told in str(error) else 2)
        assert os.waitpid(child, 0)[1] == 0


def failing(number: int) -> Callable[..., None]:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return lockf


def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.fcntl, "lockf", failing(errno.ENOLCK))
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        assert "its file system has no locks (No locks available)" in caplog.text
