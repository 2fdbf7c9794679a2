"""A preference stage trains the same whatever the micro-batches and the number of processes: its z0 is one number of
the whole update, and chosen and rejected are never told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from .conftest import Server, weights
from .test_objective_is_per_sample import losses
from .tiny_mod import SPARSE, write_mod_recipe

KINDS = {"kto": "pairs", "kto_unpaired": "rated", "dpo": "pairs"}


def recipe(directory: Path, kind: str, batch: int = 5, updates: int = 4) -> Path:
    """One stage: a student that has just become sparse, without dropout, learns from seven records."""
    path = write_mod_recipe(directory, rows=7)
    content = yaml.safe_load(path.read_text())
    content["student"]["language"]["config"]["attention_dropout"] = 0.0
    content["stages"] = [
        {
            "name": "pd",
            "transform": [{"do": "upcycle"}],
            "train": SPARSE,
            "data": [KINDS[kind]],
            "loss": {"text": 0.0, "preference": 1.0, "preference_kind": kind, "balance": 0.01, "beta": 0.5},
            # Adam divides by the gradient's size: without a floor, rounding decides where a gradient is almost 0.
            "optim": {"lr": 0.003, "eps": 1e-3, "batch": batch, "updates": updates},
        }
    ]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_five_records_in_any_arrangement(server: Server, tmp_path: Path, kind: str) -> None:
    path = recipe(tmp_path, kind)
    server.finish(path, tmp_path / "whole", overrides={"machine.micro_batch": 5})
    expected = losses(tmp_path / "whole")
    assert (expected[1:] != expected[:1]).any()
    for micro_batch, world in ((2, 1), (1, 2), (5, 2)) if kind != "dpo" else ((1, 2),):
        run = tmp_path / f"{micro_batch} of {world}"
        server.finish(path, run, overrides={"machine.micro_batch": micro_batch}, world=world)
        torch.testing.assert_close(losses(run), expected, atol=1e-5, rtol=1e-5)
        for (name, found), (_, wanted) in zip(weights(run).items(), weights(tmp_path / "whole").items(), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_process_without_records_keeps_step_and_counts_in_nothing(server: Server, tmp_path: Path) -> None:
    path = recipe(tmp_path, "kto", batch=1, updates=3)
    server.finish(path, tmp_path / "alone")
    server.finish(path, tmp_path / "two", world=2)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "alone"), atol=1e-5, rtol=1e-5)
    alone, two = (routing(tmp_path / run) for run in ("alone", "two"))
    assert alone and len(alone) == len(two)
    for found, expected in zip(two, alone, strict=True):
        assert found == pytest.approx(expected)


def routing(run: Path) -> list[float]:
    events = [yaml.safe_load(line) for line in (run / "events.jsonl").read_text().splitlines()]
    layers = [layer for event in events if event["event"] == "update" for layer in event["routing"]]
    return [number for layer in layers for number in (*layer["load"], layer["entropy"], layer["dropped"])]
