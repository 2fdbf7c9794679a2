"""Micro-batch size, accumulation and the number of processes do not change what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distilvlm
from distilvlm.data import DataError
from distilvlm.runs.events import read_events

from .conftest import Server, weights
from .tiny import VISION, language, write_recipe

KD = {"text": 1.0, "response": 1.0, "visual": 1.0, "relation": 0.5}


def recipe(directory: Path, train: list[str], batch: int, updates: int = 10, **optim: Any) -> Path:
    tokenizer = str(directory / "tokenizer")
    without_dropout = {**language(16), "attention_dropout": 0.0}
    return write_recipe(
        directory,
        rows=7,
        student={"vision": {"config": VISION}, "language": {"config": without_dropout, "tokenizer": tokenizer}},
        stages=[
            {
                "name": "dft",
                "train": train,
                "data": ["questions"],
                "loss": KD,
                # Adam divides by the gradient's size: without a floor, rounding decides where a gradient is almost 0.
                "optim": {"lr": 0.003, "eps": 1e-3, "batch": batch, "updates": updates, **optim},
            }
        ],
    )


def losses(run: Path) -> torch.Tensor:
    events = [event for event in read_events(run / "events.jsonl") if event["event"] == "update"]
    return torch.tensor([[e["loss"], e["gradient_norm"], *e["terms"].values()] for e in events], dtype=torch.float64)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory, server: Server) -> tuple[Path, Path]:
    """A recipe of 7 samples an update, and its run as one micro-batch of 7."""
    directory = tmp_path_factory.mktemp("seven")
    path = recipe(directory, ["projector", "language"], batch=7)
    server.finish(path, directory / "whole", overrides={"machine.micro_batch": 7})
    return path, directory / "whole"


ARRANGEMENTS = {
    "2+2+2+1": ({"micro_batch": 2}, 1),
    "2+2 | 2+1": ({"micro_batch": 2}, 2),
    "4 | 3": ({"micro_batch": 7}, 2),
    "by length": ({"tokens": 128}, 1),
    "by length | by length": ({"tokens": 96}, 2),
    "a line of 3, of 3, of 1": ({"micro_batch": 3, "packing": True}, 1),
    "full lines | full lines": ({"tokens": 96, "packing": True, "workers": 1, "gradient_checkpointing": True}, 2),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_seven_samples_in_any_arrangement(
    seven: tuple[Path, Path], server: Server, tmp_path: Path, arrangement: str
) -> None:
    path, whole = seven
    machine, world = ARRANGEMENTS[arrangement]
    overrides = {f"machine.{name}": value for name, value in machine.items()}
    server.finish(path, tmp_path / "run", overrides=overrides, world=world)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(whole), atol=1e-5, rtol=1e-5)
    found, expected = weights(tmp_path / "run"), weights(whole)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_an_update_says_how_long_it_waited_for_its_data(seven: tuple[Path, Path]) -> None:
    updates = [event for event in read_events(seven[1] / "events.jsonl") if event["event"] == "update"]
    assert all(0 < event["wait"] < event["seconds"] for event in updates)


def test_a_budget_that_the_longest_row_does_not_fit_stops_before_the_first_step(
    seven: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"its longest row has (\d+) positions .* which has 40. Set machine.tokens to"):
        distilvlm.run(seven[0], ["machine.tokens=40"], directory=tmp_path / "run")
    assert not (tmp_path / "run" / "events.jsonl").exists()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("train", [["projector"], ["projector", "language"], ["vision", "projector", "language"]])
def test_micro_batches_without_pictures_train(server: Server, tmp_path: Path, train: list[str], world: int) -> None:
    path = recipe(tmp_path, train, batch=2, updates=4)
    server.finish(path, tmp_path / "run", overrides={"machine.micro_batch": 1}, world=world)
    assert torch.isfinite(losses(tmp_path / "run")).all()


def test_a_process_without_samples_keeps_step(server: Server, tmp_path: Path) -> None:
    path = recipe(tmp_path, ["projector", "language"], batch=1, updates=4)
    server.finish(path, tmp_path / "alone")
    server.finish(path, tmp_path / "two", world=2)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "alone"), atol=1e-5, rtol=1e-5)


def test_two_killed_processes_continue_bit_for_bit(server: Server, tmp_path: Path) -> None:
    path = recipe(tmp_path, ["projector", "language"], batch=3, updates=6)
    operations = server.finish(path, tmp_path / "whole", world=2)
    at = [i for i, label in enumerate(operations) if label == "step"][4] + 1
    statuses, _ = server.run(path, tmp_path / "killed", world=2, die_at=at)
    assert any(statuses)
    server.finish(path, tmp_path / "killed", world=2)
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
