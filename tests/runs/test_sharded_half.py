"""Processes that share a student in bf16: each holds what was planned, and an update that can't be made is not made."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distilvlm import cost
from distilvlm.runs.plan import plan

from .conftest import Server, weights
from .test_objective_is_per_sample import losses, recipe
from .test_plan import shown

MACHINE = {
    "machine.parallel": "fsdp",
    "machine.precision": "bf16",
    "machine.micro_batch": 2,
    "machine.offload": True,
    "machine.shard_teacher": True,
    "machine.checkpoint_every": 2,
}
UPDATES = 4

PLAIN = """
import distilvlm.runs.execute
distilvlm.runs.execute.consult = lambda *_: None  # the doctor's steps are not meant, and take their time
"""

WATCHED = (
    PLAIN
    + """
import json
from distilvlm.models import forward
from distilvlm.train import Loop
from distilvlm.train.rows import local
from torch.distributed.tensor import DTensor

def size(tensors):
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

run, head = Loop.run, forward.head_weight
whole = 0

def watched(self, updates):
    def noted(model):
        global whole
        if model is self.task.student:
            whole = size(p for p in self.task.parameters() if not isinstance(p, DTensor))
        return head(model)

    forward.head_weight = noted
    for update in run(self, updates):
        if update.number == 1:
            moments = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
            tower = self.teacher.vlm.model.model.vision_tower
            theirs = set(self.teacher.vlm.tensors) - {*tower.parameters(), *tower.buffers()}
            held = {
                "student": size([*self.task.student.parameters(), *self.task.student.buffers()]),
                "teacher": size(theirs),
                "gradients": size(p.grad for p in self.task.parameters() if p.grad is not None),
                "optimiser": size(moments),
                "apart": whole - size(self.task.student.model.vision_tower.parameters()),
            }
            open(f"FILE.{rank}", "w").write(json.dumps(held))
        yield update

Loop.run = watched
"""
)

SPOILED = (
    PLAIN
    + """
from distilvlm.models import forward
from distilvlm.train.now import Now

begin, hidden_states, began = Now.begin, forward.hidden_states, [0]

def noted(self, update):
    began[0] = update
    begin(self, update)

def spoiled(model, *arguments):
    found = hidden_states(model, *arguments)
    return found * float("nan") if rank == 1 and began[0] == 4 else found

Now.begin, forward.hidden_states = noted, spoiled
"""
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe(tmp_path_factory.mktemp("half"), ["projector", "language"], batch=7, updates=UPDATES)


@pytest.fixture(scope="module")
def two(path: Path, server: Server) -> Path:
    """Its run in two processes; what each held lies beside it."""
    run = path.parent / "two"
    held = WATCHED.replace("FILE", str(run))
    server.finish(path, run, overrides=MACHINE, world=2, prelude=held)
    return run


def test_losses_are_near_those_of_one_process_in_fp32(path: Path, two: Path, server: Server, tmp_path: Path) -> None:
    server.finish(path, tmp_path / "one", overrides={"machine.micro_batch": 7}, prelude=PLAIN)
    found, expected = losses(two), losses(tmp_path / "one")
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.003)
    assert not torch.allclose(found, expected, rtol=1e-5)


def test_each_process_holds_what_was_planned(path: Path, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "estimate", partial(cost.estimate, measure=False))  # no time
    held = [json.loads(Path(f"{two}.{rank}").read_text()) for rank in range(2)]
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert plan(path).processes == 8
    resolved = plan(path, MACHINE, measure=True, processes=2)
    assert "of each of 2 processes" in shown(resolved)
    assert resolved.stages[0].cost is not None
    planned = resolved.stages[0].cost.memory
    for name in ("student", "teacher", "gradients", "optimiser"):
        assert planned[name] == max(one[name] for one in held), name
    # What is around the layers is whole, and some of these.
    assert held[0]["apart"] < planned["gathered"] < held[0]["apart"] + planned["student"]


def test_an_update_that_one_process_cannot_make_is_made_by_none(path: Path, two: Path, server: Server) -> None:
    run = path.parent / "spoiled"
    statuses, _ = server.run(path, run, overrides=MACHINE, world=2, prelude=SPOILED)
    assert all(statuses)
    told = server.errors()
    assert told.count("NonFiniteError: stage 'dft': loss term") == 2 and "is not finite at update 4" in told
    (kept,) = (run / "trouble").iterdir()
    assert kept.name == "dft-00000004-1"
    report = json.loads((kept / "report.json").read_text())
    assert report["update"] == 4 and set(report["terms"].values()) == {"nan"}
    assert len(load_file(kept / "batch.safetensors")["input_ids"]) == len(report["samples"]) <= 2
    shutil.rmtree(kept)
    # Both go on behind update 2, to the bits of a run that nothing has happened to.
    server.finish(path, run, overrides=MACHINE, world=2, prelude=PLAIN)
    found, undisturbed = weights(run), weights(two)
    assert all(torch.equal(found[name], undisturbed[name]) for name in undisturbed)
