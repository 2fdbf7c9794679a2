"""A teacher in 8 or 4 bits is one in bf16 but for what is measured and told, and is refused where it can't be had."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import distilvlm
from distilvlm.cost import estimate
from distilvlm.data.batch import Batch
from distilvlm.doctor import doctor
from distilvlm.losses.divergences import forward_kl
from distilvlm.models import forward
from distilvlm.models.compose import build
from distilvlm.models.quantised import bits_of, quantise, require_possible, saved_bytes
from distilvlm.models.upcycling import upcycle
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe
from distilvlm.runs.events import read_events
from distilvlm.teachers import loading, quantised
from distilvlm.teachers.loading import local_teacher, weights_of
from distilvlm.teachers.local import hidden_rows
from distilvlm.teachers.quantised import Apart, apart, looked_at, measure, told
from distilvlm.teachers.remote.description import Description
from tests.runs.test_aligned_run import write as write_aligned

from .cached_recipe import CPU, data_of, loaded, written

BITS = ["8bit", "4bit"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights ten times as large as they are drawn, so that answers depend on them."""
    path = written(tmp_path_factory.mktemp("quantised"))
    content = yaml.safe_load(path.read_text())
    content["teacher"]["language"]["config"] |= {"initializer_range": 0.2}
    content["student"]["language"]["config"] |= {"attention_dropout": 0.0}
    content["machine"] = {"micro_batch": 1}
    path.write_text(yaml.safe_dump(content))
    return path


def recipe_of(path: Path, bits: str, **changes: Any) -> Recipe:
    return loaded(path, **{"teacher.kind": "local", "teacher.precision": bits, **changes})


@pytest.fixture(scope="module")
def student(path: Path) -> VLM:
    recipe = recipe_of(path, "bf16")
    return build(recipe.student, recipe.seed)


def rows_of(vlm: VLM, batch: Batch) -> torch.Tensor:
    """Log-probabilities of the rows that terms compare, [rows, vocab]."""
    rows = torch.unique(torch.cat([batch.response_rows, batch.visual_rows]))
    hidden = hidden_rows(vlm, batch, batch.pictures, rows).to(forward.head_weight(vlm.model).dtype)
    return torch.log_softmax((hidden @ forward.head_weight(vlm.model).T).double(), -1)


@pytest.mark.parametrize("bits", BITS)
def test_divergences_change_by_no_more_than_is_told(path: Path, student: VLM, bits: str) -> None:
    recipe = recipe_of(path, bits)
    data = data_of(recipe, student)
    teacher = local_teacher(recipe, student, CPU)
    found = measure(recipe, teacher, data)
    exact = weights_of(recipe)
    exact.model.model.vision_tower = teacher.vlm.model.model.vision_tower
    batches = looked_at(recipe, data)
    ours, theirs = (torch.cat([rows_of(vlm, batch) for batch in batches]) for vlm in (teacher.vlm, exact))
    assert found.rows == len(ours) and 0 < found.distance < found.most_distance
    generator = torch.Generator().manual_seed(4)
    other = torch.log_softmax(torch.randn(ours.shape, generator=generator).double() * 3, -1)
    values = [forward_kl(other.clone(), p.clone())[0] for p in (ours, theirs)]
    spread = float((other.amax(-1) - other.amin(-1)).max())
    difference = (values[0] - values[1]).abs()
    assert 0 < float(difference.detach().mean()) <= found.bound(spread) + 1e-3
    assert float(difference.detach().max()) <= found.most_entropy + found.most_distance * spread + 1e-3
    assert bits in told(bits, found) and f"{found.rows:,} rows" in told(bits, found)


def test_fewer_bits_are_further_away(path: Path, student: VLM) -> None:
    distances = []
    for bits in BITS:
        recipe = recipe_of(path, bits)
        teacher = local_teacher(recipe, student, CPU)
        distances.append(measure(recipe, teacher, data_of(recipe, student)).distance)
    assert distances[0] < distances[1]


def test_the_bound_holds_for_any_two_teachers_and_any_student() -> None:
    draw = torch.Generator().manual_seed(3)
    p, q, s = (torch.log_softmax(torch.randn(200, 12, generator=draw).double() * scale, -1) for scale in (2, 2, 5))
    spread = s.amax(-1) - s.amin(-1)
    for row in range(200):
        one = slice(row, row + 1)
        values = [float((t[one].exp() * (t[one] - s[one])).sum()) for t in (p, q)]
        assert abs(values[0] - values[1]) <= apart(p[one], q[one]).bound(float(spread[row])) + 1e-12
    assert apart(p, p) == Apart(200, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("bits", BITS)
def test_only_the_language_model_s_layers_are_quantised(path: Path, student: VLM, bits: str) -> None:
    recipe = recipe_of(path, bits)
    exact = weights_of(recipe)
    before = {name: value.clone() for name, value in exact.model.state_dict().items()}
    planned = saved_bytes(exact.without_weights(), bits)  # pyright: ignore
    teacher = local_teacher(recipe, student, CPU, exact)
    assert not any(parameter.requires_grad for parameter in teacher.vlm.model.parameters())
    assert bits_of(teacher.vlm) == bits and bits_of(student) is None
    assert teacher.shares_vision and teacher.head.dtype == torch.bfloat16
    assert torch.equal(teacher.head, before["lm_head.weight"])
    state = teacher.vlm.model.state_dict()
    inside = "language_model.layers."
    same = [name for name in before if inside not in name or "layernorm" in name]
    for name in same:
        assert torch.equal(state[name].to(torch.bfloat16), before[name]), name
    held = sum(t.numel() * t.element_size() for name, t in state.items() if inside in name and "format" not in name)
    if bits == "4bit":  # how it is to be read, as JSON
        held -= sum(t.numel() for name, t in state.items() if "quant_state" in name)
    once = sum(2 * t.numel() for name, t in before.items() if inside in name)
    assert held == once - planned


def test_its_hash_stays_when_it_runs(path: Path, student: VLM) -> None:
    recipe = recipe_of(path, "4bit")
    teacher = local_teacher(recipe, student, CPU)
    before = teacher.identity
    measure(recipe, teacher, data_of(recipe, student))
    assert teacher.identity == before


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "update"]


def test_a_run_tells_how_near_it_is_and_a_cache_keeps_what_it_thinks(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load(path.read_text())
    (stage,) = [one for one in content["stages"] if one["name"] == "dft"]
    stage["optim"] |= {"epochs": None, "updates": 2}
    recipe = path.with_name("short.yaml")
    recipe.write_text(yaml.safe_dump(content | {"stages": [stage]}))
    caplog.set_level("INFO", "distilvlm")
    changes = {"teacher.precision": "4bit", "teacher.keep.path": str(tmp_path / "kept")}
    distilvlm.run(recipe, changes | {"teacher.kind": "local"}, tmp_path / "local")
    line = "the teacher in 4bit, over "
    assert sum(line in record.message for record in caplog.records) == 1
    known = Apart(**json.loads((tmp_path / "local" / "quantised.json").read_text()))
    distilvlm.run(recipe, changes, tmp_path / "cached")
    assert losses(tmp_path / "local") == losses(tmp_path / "cached") != []
    assert asdict(known) == json.loads((tmp_path / "kept" / "quantised.json").read_text())
    monkeypatch.setattr(quantised, "measure", lambda *_: pytest.fail("measured again"))
    caplog.clear()
    distilvlm.run(recipe, changes, tmp_path / "again")
    assert sum(line in record.message for record in caplog.records) == 1


def test_without_the_library_it_is_refused_before_anything_is_loaded(
    path: Path, student: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(path, "8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(loading, "weights_of", lambda recipe: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"teacher\.precision: 8bit needs bitsandbytes .*distilvlm\[quantised\]"):
        local_teacher(recipe, student, CPU)
    found = {one.check: one for one in doctor(path, {"teacher.kind": "local", "teacher.precision": "8bit"})}
    assert found["teacher.weights"].level == "error" and "needs bitsandbytes" in found["teacher.weights"].text


def test_a_plan_counts_its_bytes(path: Path, student: VLM) -> None:
    held = []
    for bits in ("bf16", "4bit"):
        recipe = recipe_of(path, bits)
        assert recipe.teacher is not None
        teacher = build(recipe.teacher, recipe.seed, meta=True)
        (cost,) = estimate(recipe, student.without_weights(), teacher, device="cpu", measure=False, stages=["dft"])
        held.append(cost.memory["teacher"])
    assert held[0] - held[1] == saved_bytes(teacher, "4bit") > 0


def test_one_of_another_tokenizer_is_measured_on_rows_of_its_own(tmp_path: Path) -> None:
    recipe = write_aligned(tmp_path, tokens="aligned", visual="interpolate")
    distilvlm.run(recipe, {"teacher.precision": "8bit"}, tmp_path / "run")
    known = Apart(**json.loads((tmp_path / "run" / "quantised.json").read_text()))
    assert known.rows > 0 and known.distance > 0


@pytest.mark.parametrize("bits", BITS)
def test_a_device_that_can_not_is_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"bitsandbytes can't multiply in .bit on meta .*teacher\.device"):
        require_possible(bits, torch.device("meta"))


def test_experts_are_refused(path: Path) -> None:
    recipe = loaded(path, **{"teacher.language.config.model_type": "qwen2", "teacher.kind": "local"})
    sparse = upcycle(weights_of(recipe), layers="all", seed=1)
    with pytest.raises(ValueError, match=r"only \d+% of the weights in the layers of this 'qwen2_moe'"):
        quantise(sparse, "4bit", CPU)


@pytest.mark.parametrize("bits", BITS)
def test_a_server_says_in_how_many_bits_its_model_is(path: Path, bits: Any) -> None:
    vlm = weights_of(recipe_of(path, bits))
    quantise(vlm, bits, CPU)
    assert Description.of(vlm, 1).precision == bits


def test_a_teacher_of_few_bits_teaches_packed_lines(path: Path, tmp_path: Path) -> None:
    changes = {"teacher.kind": "local", "teacher.precision": "4bit", "machine.packing": True, "machine.tokens": 200}
    short = {"stages.0.optim.epochs": None, "stages.0.optim.updates": 1}
    content = yaml.safe_load(path.read_text())
    recipe = path.with_name("packed.yaml")
    recipe.write_text(yaml.safe_dump(content | {"stages": content["stages"][2:]}))
    distilvlm.run(recipe, changes | short, tmp_path / "packed")
    distilvlm.run(recipe, {**changes, **short, "machine.packing": False, "machine.tokens": None}, tmp_path / "padded")
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu_it_is_as_near_to_bf16_as_on_a_cpu(path: Path, student: VLM, bits: str) -> None:
    recipe = recipe_of(path, bits)
    data = data_of(recipe, student)
    found = {
        device: measure(recipe, local_teacher(recipe, build(recipe.student, recipe.seed), torch.device(device)), data)
        for device in ("cpu", "cuda")
    }
    assert 0 < found["cuda"].distance < 1.5 * found["cpu"].distance + 0.01
