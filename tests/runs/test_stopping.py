"""Being asked to stop: the update is finished, a checkpoint is saved, the status says that the command continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import distilvlm
from distilvlm import cli
from distilvlm.runs import stopping
from distilvlm.runs.execute import run
from distilvlm.runs.stopping import CONTINUE, Stopped, stoppable

from .conftest import Server, weights
from .tiny import write_recipe

CHECKPOINTS = "stages/00-sft/checkpoints"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stopping")
    optim = {"lr": 0.01, "batch": 4, "updates": 3}
    stages = [{"name": "sft", "train": ["projector", "language"], "data": ["questions"], "optim": optim}]
    return write_recipe(directory, stages=stages, machine={"micro_batch": 2, "checkpoint_every": 100})


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> dict[str, torch.Tensor]:
    return weights(run(recipe, directory=recipe.parent / "undisturbed").directory)


def signalled_in_update(number: int, monkeypatch: pytest.MonkeyPatch, which: int = signal.SIGTERM) -> None:
    """Send a signal to this process while it makes its update `number`."""
    begun: list[int] = []
    zero_grad = torch.optim.AdamW.zero_grad  # what an update begins with

    def signalled(self: torch.optim.AdamW, **options: bool) -> None:
        begun.append(1)
        if len(begun) == number:
            os.kill(os.getpid(), which)
        zero_grad(self, **options)

    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", signalled)
    monkeypatch.setattr("distilvlm.runs.execute.consult", lambda *_: None)  # the doctor's own steps are not counted


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("which", stopping.SIGNALS)
def test_the_command_saves_and_says_continue_me(
    which: signal.Signals,
    recipe: Path,
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", ["distilvlm", "run", str(recipe), "--dir", str(tmp_path / "run")])
    handler = signal.getsignal(which)
    signalled_in_update(2, monkeypatch, which)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == CONTINUE == os.EX_TEMPFAIL
    assert f"{which.name}; stage 'sft' is saved behind update 2; the same command" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()] == ["00000002"]
    assert signal.getsignal(which) is handler
    monkeypatch.undo()
    assert_same(weights(run(recipe, directory=tmp_path / "run").directory), undisturbed)


def test_a_comparison_passes_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    monkeypatch.setattr("distilvlm.compare.compare", signalled)
    monkeypatch.setattr(sys, "argv", ["distilvlm", "compare", str(tmp_path / "comparison.yaml")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == CONTINUE


def test_asked_in_the_last_update_of_a_stage_the_stage_is_finished(
    recipe: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled_in_update(3, monkeypatch)
    with pytest.raises(Stopped, match="stage 'sft' is finished"), stoppable():
        run(recipe, directory=tmp_path / "run")
    assert (tmp_path / "run/stages/00-sft/final").is_dir()
    monkeypatch.undo()
    assert_same(weights(run(recipe, directory=tmp_path / "run").directory), undisturbed)


def test_asked_before_it_trains_it_ends_at_once(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Exception:
            pytest.fail("what takes any error for one of a row would go on")

    monkeypatch.setattr("distilvlm.runs.execute.consult", signalled)
    with pytest.raises(Stopped, match="SIGTERM"), stoppable():
        run(recipe, directory=tmp_path / "run")
    assert not (tmp_path / "run" / CHECKPOINTS).exists()


def test_without_a_command_around_it_a_run_leaves_signals_alone(recipe: Path) -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    distilvlm.run(recipe, directory=recipe.parent / "undisturbed")
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_all_processes_stop_behind_the_same_update(recipe: Path, server: Server, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    server.finish(recipe, whole, world=2)
    directory = tmp_path / "run"
    statuses, _ = server.run(recipe, directory, world=2, stop_at=2, stop_rank=1)
    assert [os.waitstatus_to_exitcode(status) for status in statuses] == [CONTINUE] * 2, server.errors()
    assert len(list((directory / CHECKPOINTS).iterdir())) == 1
    server.finish(recipe, directory, world=2)
    assert_same(weights(directory), weights(whole))


def test_loader_processes_outlive_the_signal_that_the_whole_job_gets(
    recipe: Path, undisturbed: dict[str, torch.Tensor], server: Server, tmp_path: Path
) -> None:
    overrides = {"machine.workers": 2}
    statuses, _ = server.run(recipe, tmp_path / "run", stop_at=2, stop_rank=0, group=True, overrides=overrides)
    assert [os.waitstatus_to_exitcode(status) for status in statuses] == [CONTINUE], server.errors()
    server.finish(recipe, tmp_path / "run", overrides=overrides)
    assert_same(weights(tmp_path / "run"), undisturbed)


STUCK = """
import ctypes, time
from distilvlm.runs import stopping
stopping.ECHO = 0.2
with stopping.stoppable(), stopping.deferred():
    print("ready", flush=True)
    while not stopping.asked():
        time.sleep(0.01)
    print("asked", flush=True)
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)  # waits for ever, as a collective whose peer hangs
"""


def test_a_second_signal_ends_at_once_what_never_returns_to_python() -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)  # a launcher's echo
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert "the same command continues" in process.stderr.read()
