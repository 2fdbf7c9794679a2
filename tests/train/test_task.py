"""The task of a sparse student: what its forward tells of routing, and what it tells ahead of a preference's update."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distilvlm.data.batch import CHOSEN, REJECTED, Batch
from distilvlm.losses import Objective
from distilvlm.models import routing
from distilvlm.models.compose import build
from distilvlm.models.mixture import MixConfig, mix
from distilvlm.models.upcycling import upcycle
from distilvlm.models.vlm import VLM
from distilvlm.recipe.models import ModelSpec
from distilvlm.recipe.schema import LossSpec, OptimSpec, StageSpec
from distilvlm.train import Task, objective_of
from distilvlm.train.loop import idle_batch
from tests.runs.tiny import VISION, language, write_tokenizer

ANSWER = 3  # tokens at the end of each sequence


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    facts = {**language(16), "model_type": "qwen2", "attention_dropout": 0.0}
    spec = {"vision": {"config": VISION}, "language": {"config": facts, "tokenizer": str(directory)}}
    return build(ModelSpec.model_validate(spec), seed=1)


@pytest.fixture
def sparse(dense: VLM) -> VLM:
    vlm = upcycle(dense, layers="all", seed=2)
    with torch.no_grad():  # experts that differ, so that it matters who serves a token
        for name, parameter in vlm.model.named_parameters():
            if ".mlp.experts." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return vlm


def batch_of(lengths: list[int], preferences: bool = False, weights: list[float] | None = None) -> Batch:
    """Texts of random tokens, right-padded."""
    length, samples = max(lengths), len(lengths)
    draw = torch.Generator().manual_seed(4)
    mask = (torch.arange(length) < torch.tensor(lengths).unsqueeze(1)).long()
    ids = torch.randint(3, 60, (samples, length), generator=draw) * mask
    rows = torch.cat([torch.arange(own - 1 - ANSWER, own - 1) + i * length for i, own in enumerate(lengths)])
    none = torch.zeros(0, dtype=torch.int64)
    roles = torch.tensor([CHOSEN, REJECTED] * (samples // 2)) if preferences else None
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        placeholder_rows=none,
        visual_rows=none,
        response_rows=rows,
        response_targets=ids.flatten()[rows + 1],
        weights=torch.tensor(weights or [1.0] * samples),
        pictures=None,
        features=None,
        keys=(),
        roles=roles,
        reference=torch.full((samples,), -11.0, dtype=torch.float64) if preferences else None,
    )


def run(task: Task, batch: Batch, **more: object) -> dict[str, object]:
    rows = task.objective.rows(batch.response_rows, batch.visual_rows)
    return task(batch, None, None, rows, batch.samples, **more)


def test_an_update_is_looked_ahead_as_it_is_trained(sparse: VLM) -> None:
    """z0 is of the same experts: padding takes no place in them either time."""
    routing.install(sparse.model, capacity=0.6)
    task = Task(sparse, Objective(text=0, preference=1), None).train()
    batch = batch_of([14, 5, 6, 9], preferences=True)
    told: list[Tensor] = []
    tallies = run(task, batch, agree=lambda local: told.append(local) or local)["routing"]
    assert isinstance(tallies, Tensor) and all(use.dropped > 0 for use in routing.used(tallies, 2))
    rows = task.objective.rows(batch.response_rows, batch.visual_rows)
    assert torch.equal(task.moves(batch, None, rows), told[0])
    with routing.watched(sparse.model, None):  # as if padding did
        other = task.student.model.language_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert not torch.equal(other.last_hidden_state, run_hidden(task, batch))


def run_hidden(task: Task, batch: Batch) -> Tensor:
    return task._hidden_states(batch, None)[0]


def test_stand_ins_and_idle_batches_count_in_nothing(sparse: VLM) -> None:
    task = Task(sparse, Objective(balance=0.01), None).train()
    whole = run(task, batch_of([9, 7]))
    with_stand_in = run(task, batch_of([9, 7, 8], weights=[1.0, 1.0, 0.0]))
    assert torch.equal(routing_of(whole)[:, -1], routing_of(with_stand_in)[:, -1])  # choices
    for objective in (task.objective, Objective(text=0, preference=1, balance=0.01)):
        idle = idle_batch(objective)
        task.objective = objective
        result = run(task, idle)
        loss = result["loss"]
        assert isinstance(loss, Tensor) and loss == 0 and not routing_of(result).any()
        loss.backward()
        gradients = [p.grad for p in sparse.model.model.language_model.parameters() if p.grad is not None]
        assert gradients and not any(gradient.any() for gradient in gradients)
        sparse.model.zero_grad()


def routing_of(result: dict[str, object]) -> Tensor:
    found = result["routing"]
    assert isinstance(found, Tensor)
    return found


def test_a_dense_student_tells_nothing_of_routing_and_has_no_balance(dense: VLM) -> None:
    assert run(Task(dense, Objective(), None).train(), batch_of([9, 7]))["routing"] is None
    with pytest.raises(ValueError, match=r"the student is dense: upcycle it \(transform: \[\{do: upcycle\}\]\)"):
        Task(dense, Objective(balance=0.01), None)


def test_the_balance_of_a_tower_needs_experts_that_train(dense: VLM) -> None:
    vlm, balanced = replace(dense, model=copy.deepcopy(dense.model)), Objective(expert_balance=0.01)
    with pytest.raises(ValueError, match=r"it has no two in a layer: mix some in \(transform: \[\{do: mix, experts: 3"):
        Task(vlm, balanced, None)
    mix(vlm.model.model.vision_tower, MixConfig(rank=2), vlm.layout.layer)
    vlm.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"moves routers of the vision tower, of which nothing trains: add vision\.ro"):
        Task(vlm, balanced, None)


def test_the_reference_lets_padding_count_and_take_places(sparse: VLM) -> None:
    routing.install(sparse.model, capacity=0.6)
    batch = batch_of([14, 5])
    ours, theirs = (
        run(Task(sparse, Objective(balance=1.0, reference=frozenset(switches)), None).train(), batch)
        for switches in ((), ("padding",))
    )
    assert not torch.equal(routing_of(ours), routing_of(theirs))
    assert routing_of(ours)[0, -1] == routing_of(theirs)[0, -1] == 2 * 19  # told of real tokens in any case
    assert ours["terms"]["balance"] != theirs["terms"]["balance"]  # type: ignore[index]


def test_preferences_without_references_are_refused_by_row(sparse: VLM) -> None:
    task = Task(sparse, Objective(text=0, preference=1), None).train()
    with pytest.raises(ValueError, match="needs pairs or rated answers with reference log-probabilities"):
        run(task, replace(batch_of([9, 7], preferences=True), reference=None))


def test_a_stage_s_loss_and_parity_make_its_objective() -> None:
    loss = LossSpec(text=0, preference=2.0, preference_kind="kto_unpaired", beta=0.3, desirable=1.5, balance=0.01)
    optim = OptimSpec(lr=1e-3, batch=2, updates=1)
    stage = StageSpec(name="pd", train=["language"], data=["pairs"], loss=loss, optim=optim, reference=["padding"])
    expected = Objective(text=0, preference=2.0, preference_kind="kto_unpaired", beta=0.3, desirable=1.5, balance=0.01)
    assert objective_of(stage) == replace(expected, reference=frozenset({"padding"}))
