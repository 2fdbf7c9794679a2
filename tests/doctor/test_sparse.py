"""Faults of sparse students and of stages of preferences."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distilvlm.data import read
from distilvlm.data.stage import stage_data
from distilvlm.doctor import Finding, disk, doctor, examination, trial
from distilvlm.losses import objective
from distilvlm.models import build, routing
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.save import save
from distilvlm.models.stages import students
from distilvlm.models.upcycling import upcycle
from distilvlm.models.vlm import VLM
from distilvlm.recipe import load_recipe
from distilvlm.recipe.models import ModelSpec
from distilvlm.teachers import LocalTeacher, Targets
from tests.runs.tiny_mod import SPARSE, STUDENT, write_mod_recipe

from .conftest import Examine, examined, only, said, write_model, write_tower
from .test_models import ALONE

UPCYCLE = {"do": "upcycle", "experts": 4, "top_k": 2, "layers": "even"}
DENSE = ["projector", "language"]
FIRST = {"text": 0, "preference": 1, "balance": 0}
"""A stage of preferences that comes first, of a dense student."""


@pytest.fixture(scope="session")
def mod(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, tokenizer, data and `recipe.yaml`: dense, sparse, preferences."""
    directory = tmp_path_factory.mktemp("mod")
    path = write_mod_recipe(directory)
    recipe = yaml.safe_load(path.read_text())
    tower = write_tower(directory / "tower")
    write_model(directory / "teacher", tower, directory / "tokenizer", 24, 3)
    recipe["student"]["vision"] = {"from": str(tower)}
    recipe["teacher"] = {"from": str(directory / "teacher")}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return directory


@pytest.fixture
def look_at(mod: Path, tmp_path: Path) -> Examine:
    """look_at({"field": value, ...}, stages) -> the doctor's findings; `stages` replace the recipe's."""

    def findings(changes: dict[str, Any] | None = None, stages: list[dict[str, Any]] | None = None) -> list[Finding]:
        recipe = yaml.safe_load((mod / "recipe.yaml").read_text())
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe if stages is None else {**recipe, "stages": stages}, sort_keys=False))
        return doctor(path, changes or {}, tmp_path / "run")

    return findings


def at_hand(mod: Path, changes: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """What a run has at hand: recipe, student, teacher, data, reports."""
    recipe = load_recipe(mod / "recipe.yaml", changes or {})
    student = build(recipe.student, recipe.seed, dtype=dtype)
    assert recipe.teacher is not None
    cpu = torch.device("cpu")
    teacher = LocalTeacher(build(recipe.teacher, recipe.seed), student, cpu, cpu, share_vision=True)
    data = {
        stage.name: stage_data(
            recipe, stage, student.tokenizer, student.layout, [read(recipe.data[name], name) for name in stage.data]
        )
        for stage in recipe.stages
    }
    return recipe, student, teacher, data, {name: rows.check() for name, rows in data.items()}


def stage(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "train": SPARSE, "optim": {"lr": 0.01, "batch": 4, "epochs": 2}, **changes}


def test_a_dense_student_that_becomes_sparse_and_learns_preferences_has_nothing_to_mend(look_at: Examine) -> None:
    found = look_at()
    assert [finding for finding in found if finding.level != "ok"] == []
    (told,) = said(found, "experts.upcycle")
    # 2 of 3 layers, 3 more experts of 3 · 16 · 32 each, of which one is active, and 2 routers of 4 · 16
    assert told.startswith("upcycle even layers: 4 experts, 2 active; layers 0, 2. From here on 33,904 parameters")
    trains = said(found, "parts.trains")
    assert "language.feed_forward 13,824 float32, language.router 128 float32; frozen: vision" in trains[1]
    assert trains[1] == trains[2]
    terms = {stage: [f.check for f in found if f.stage == stage and f.family == "terms"] for stage in ("d2s", "pd")}
    assert terms["d2s"] == ["terms.text", "terms.response", "terms.balance"]
    assert terms["pd"] == ["terms.balance", "terms.preference"]
    d2s, pd = said(found, "terms.balance")
    assert "(2 where experts serve alike)" in d2s and "moves routers and what lies below them, and nothing else" in d2s
    assert "(4 where experts serve alike)" in pd  # of both answers
    (preference,) = said(found, "terms.preference")
    assert preference.startswith("preference (kto, β 0.1) × 1: 36 rows, ") and "0.5 for equals" in preference


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge", "kto_unpaired"])
def test_every_kind_of_preference_has_nothing_to_mend(look_at: Examine, kind: str) -> None:
    data = ["rated"] if kind == "kto_unpaired" else ["pairs"]
    found = look_at({"stages.pd.loss.preference_kind": kind, "stages.pd.data": data})
    assert [finding for finding in found if finding.level != "ok"] == []
    equal = {"dpo": "0.693", "ipo": "25", "hinge": "1", "kto_unpaired": "0.5"}[kind]
    assert f", {equal} for equals" in said(found, "terms.preference")[0]
    if kind == "kto_unpaired":
        assert "5 answers rated desirable, 5 undesirable" in said(found, "rows.count")[2]


def test_nothing_is_changed_and_nothing_drawn(mod: Path) -> None:
    recipe, student, teacher, data, reports = at_hand(mod)
    student.model.train()
    parameters = list(student.model.parameters())
    for index, parameter in enumerate(parameters):
        parameter.requires_grad_(index % 3 == 0)
    models = (student.model, teacher.vlm.model)
    before = [fingerprint(model) for model in models], torch.get_rng_state()
    names = dict(student.model.named_parameters())
    examined(recipe, student, teacher, data, reports)
    assert [fingerprint(model) for model in models] == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert [p.requires_grad for p in parameters] == [index % 3 == 0 for index in range(len(parameters))]
    assert all(p.grad is None for p in parameters) and all(m.training for m in student.model.modules())
    assert dict(student.model.named_parameters()).keys() == names.keys()
    assert not routing.routers(student.model)


def test_only_stages_whose_data_is_given_are_tried(mod: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, student, teacher, data, reports = at_hand(mod)
    made: list[int] = []
    right = examination.made_sparse

    def counted(vlm: VLM, *rest: Any) -> VLM:
        made.append(1)
        return right(vlm, *rest)

    monkeypatch.setattr(examination, "made_sparse", counted)
    examined(recipe, student, teacher, {"d2d": data["d2d"]}, {"d2d": reports["d2d"]})
    assert not made
    found = examined(recipe, student, teacher, {"pd": data["pd"]}, {"pd": reports["pd"]})
    assert len(made) == 1
    assert {finding.stage for finding in found if finding.family == "terms"} == {"pd"}


@pytest.mark.parametrize(
    ("changes", "check", "level", "words"),
    [
        (
            {"stages.pd.data": ["questions"]},
            "preferences.data",
            "error",
            ["'questions' is made of conversations", "distilvlm data convert"],
        ),
        (
            {"stages.d2s.data": ["pairs"]},
            "preferences.data",
            "error",
            ["no preference term", "stages.d2s.loss to {text: 0, preference: 1}"],
        ),
        (
            {"stages.pd.loss.preference_kind": "kto_unpaired"},
            "preferences.data",
            "error",
            ["pairs of answers", "preference_kind to kto (or"],
        ),
        (
            {"stages.pd.data": ["rated"]},
            "preferences.data",
            "error",
            ["kto compares two answers", "preference_kind to kto_unpaired"],
        ),
        (
            {"stages.pd.loss.label_smoothing": 0.1},
            "preferences.settings",
            "warning",
            ["kto does not know", "preference_kind to dpo"],
        ),
        (
            {"stages.pd.loss.preference_kind": "hinge", "stages.pd.loss.undesirable": 2},
            "preferences.settings",
            "warning",
            ["loss.undesirable is 2", "kto or kto_unpaired"],
        ),
        (
            {"stages.d2d.loss.balance": 0.01},
            "experts.balance",
            "error",
            ["it is dense", "becomes sparse in a later stage"],
        ),
        (
            {"stages.d2s.transform": [{**UPCYCLE, "top_k": 4}]},
            "experts.all",
            "warning",
            ["all of them serve every token", "top_k below experts"],
        ),
        (
            {"stages.d2s.loss.balance": 0},
            "experts.collapse",
            "warning",
            ["may collapse", "stages.d2s.loss.balance to 0.01"],
        ),
        (
            {"stages.d2s.train": SPARSE[:2], "stages.pd.train": SPARSE[:2]},
            "experts.routers",
            "warning",
            ["'language.router' trains neither", "add 'language.router' to stages.d2s.train"],
        ),
        (
            {"stages.d2s.train": SPARSE[::2], "stages.pd.train": SPARSE[::2]},
            "experts.frozen",
            "warning",
            ["equal copies", "add 'language.feed_forward' to stages.d2s.train"],
        ),
        (
            {"stages.d2s.transform": [{**UPCYCLE, "layers": [3]}]},
            "experts.upcycle",
            "error",
            ["layers 0 to 2", "layers that it has"],
        ),
        (
            {"stages.d2s.reference": ["token_mean", "undetached_z0"]},
            "settings.reference",
            "warning",
            ["names undetached_z0, which changes nothing", "take undetached_z0 out"],
        ),
        (
            {"stages.d2d.reference": ["capacity"]},
            "settings.reference",
            "warning",
            ["names capacity", "stages.d2d.reference"],
        ),
    ],
)
def test_faults(look_at: Examine, changes: dict[str, Any], check: str, level: str, words: list[str]) -> None:
    only(look_at(changes), check, level, *words)


def test_one_expert_per_token_teaches_its_router_nothing(look_at: Examine) -> None:
    found = look_at({"stages.d2s.transform": [{**UPCYCLE, "top_k": 1}]})
    told = [finding for finding in found if finding.level != "ok"]
    assert ("experts.single", "warning") in {(finding.check, finding.level) for finding in told}
    assert all(finding.check in ("experts.single", "terms.gradient") for finding in told)


def test_balance_of_a_dense_student_without_an_upcycle(look_at: Examine) -> None:
    dense = stage("d2d", train=DENSE, data=["questions"], loss={"response": 1, "balance": 1})
    found = look_at({}, [dense])
    only(found, "experts.balance", "error", "upcycle the student here or before")


def test_departures_from_the_reference_code_are_told(look_at: Examine) -> None:
    names = ["unshifted_mask", "token_mean", "doubled_balance", "padding", "gumbel", "capacity"]
    found = look_at({"stages.d2s.reference": names, "stages.pd.reference": ["undetached_z0"]})
    assert [finding for finding in found if finding.level != "ok"] == []
    assert [text.partition(": ")[2] for text in said(found, "settings.reference")] == [
        ", ".join(names),
        "undetached_z0",
    ]


def test_weights_in_bf16_that_train_are_refused_in_sparse_stages_too(mod: Path) -> None:
    found = examined(*at_hand(mod, dtype=torch.bfloat16))
    told = only(found, "parts.master", "error", "language.router in bfloat16", "float32")
    assert [finding.stage for finding in told] == ["d2d", "d2s", "pd"]


@pytest.fixture
def pairs(mod: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """pairs(row, ...) -> a section for `data.pairs` with the healthy rows and these."""

    def write(*rows: dict[str, Any], **section: Any) -> dict[str, Any]:
        whole = json.loads((mod / "pairs.json").read_text())
        (tmp_path / "pairs.json").write_text(json.dumps([*whole, *rows]))
        return {"path": str(tmp_path / "pairs.json"), "images": str(mod / "pictures"), **section}

    return write


def pair(chosen: str, rejected: str) -> dict[str, Any]:
    asked = [{"from": "human", "value": "what colour is this"}]
    return {"conversations": asked, "chosen": chosen, "rejected": rejected}


def test_the_same_answer_chosen_and_rejected(look_at: Examine, pairs: Callable[..., dict[str, Any]]) -> None:
    found = look_at({"data.pairs": pairs(pair("red", "red "))})
    only(found, "rows.same", "error", "1 of 11 rows have the same answer", "give them another one", "quarantine")


def test_answers_that_differ_behind_the_cut_only(look_at: Examine, pairs: Callable[..., dict[str, Any]]) -> None:
    long = "a red picture of the sky " * 4
    section = pairs(pair(f"{long} red", f"{long} blue"))
    found = look_at({"data.pairs": section, "stages.pd.max_length": 50, "machine.on_bad_row": "quarantine"})
    only(found, "rows.same", "warning", "the same in the first 50 positions", "raise stages.pd.max_length (now 50)")


def test_answers_of_one_label(look_at: Examine, mod: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": True} for row in json.loads((mod / "rated.json").read_text())]
    (tmp_path / "rated.json").write_text(json.dumps(rows))
    changes = {
        "data.rated.path": str(tmp_path / "rated.json"),
        "stages.pd.data": ["rated"],
        "stages.pd.loss.preference_kind": "kto_unpaired",
    }
    only(look_at(changes), "preferences.labels", "warning", "all 10 answers", "desirable", "other label")


def test_both_answers_of_a_pair_are_drawn(look_at: Examine) -> None:
    found = look_at({}, [stage("pd", train=DENSE, data=["pairs"], loss=FIRST)])
    assert [finding for finding in found if finding.level != "ok"] == []
    drawing = said(found, "template.picture")[0].partition("\n")[2]
    chosen, rejected = drawing.split("\nand rejected:\n")
    assert chosen.endswith("⟦a red picture<|im_end|>⟧↵") and rejected.endswith("⟦a blue picture<|im_end|>⟧↵")


@pytest.mark.parametrize("kind", ["kto", "hinge"])
def test_a_loss_that_is_flat_where_the_student_begins(look_at: Examine, kind: str, mod: Path, tmp_path: Path) -> None:
    """A student that is sure of its answers, far from what the teacher makes of them."""
    whole = build(ModelSpec.model_validate(load_recipe(mod / "recipe.yaml").student.model_dump(by_alias=True)), 3)
    with torch.no_grad():
        whole.model.lm_head.weight.mul_(40)
        for name, parameter in whole.model.named_parameters():
            if "projector" in name and name.endswith("bias"):
                parameter.fill_(0.01)
    save(whole, tmp_path / "sure", "square")
    student = {"student": {"from": str(tmp_path / "sure"), **ALONE}}
    loss = {**FIRST, "preference_kind": kind, "beta": 5.0}
    pd = stage("pd", train=DENSE, data=["pairs"], loss=loss)
    found = look_at(student, [pd])
    if kind == "kto":  # of hinge, what is far from the reference may be far from flat
        only(found, "terms.saturated", "warning", "hardly teaches", "stages.pd.loss.beta to 0.", "(now 5)")
    later = look_at(student, [stage("sft", train=DENSE, data=["questions"]), pd])
    assert [finding for finding in later if finding.level != "ok"] == []  # the first stage will change the student


def test_a_router_that_sees_nothing(look_at: Examine, mod: Path, tmp_path: Path) -> None:
    recipe = load_recipe(mod / "recipe.yaml")
    whole = build(recipe.student, 3)
    with torch.no_grad():
        for name, parameter in whole.model.named_parameters():
            if "projector" in name and name.endswith("bias"):
                parameter.fill_(0.01)
            if "layers.1.post_attention_layernorm" in name:
                parameter.zero_()
    save(whole, tmp_path / "blind", "square")
    changes = {
        "student": {"from": str(tmp_path / "blind"), **ALONE},
        "stages.d2s.transform": [{**UPCYCLE, "layers": [1]}],
    }
    told = [finding for finding in look_at(changes) if finding.level != "ok"]
    assert {(f.check, f.level, f.stage) for f in told} == {
        ("terms.gradient", "error", "d2s"),
        ("terms.gradient", "error", "pd"),
    }
    assert all("no loss term gives language.router a gradient" in finding.text for finding in told)


def test_a_balance_that_moves_nothing_that_trains(look_at: Examine) -> None:
    changes = {
        "student.language.config.tie_word_embeddings": False,
        "stages.d2s.train": ["language.head"],
        "stages.pd.train": SPARSE,
    }
    told = only(look_at(changes), "terms.gradient", "warning", "balance moves nothing", "add 'language.router'")
    assert [finding.stage for finding in told] == ["d2s"]


def test_a_preference_loss_of_equals_that_is_not_what_it_must_be_is_our_own_fault(
    look_at: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = trial._Trial._itself

    def wrong(self: trial._Trial) -> Targets:
        targets = right(self)
        return Targets(targets.hidden.roll(1, dims=0), targets.head) if self.objective.preference else targets

    monkeypatch.setattr(trial._Trial, "_itself", wrong)
    monkeypatch.setattr("distilvlm.doctor.terms.ZERO", {4: 1e-6})  # the tiny student's logits are nearly all alike
    only(look_at(), "terms.zero", "error", "which must give 0.5", "report it")


def test_a_balance_that_is_not_positive_is_our_own_fault(look_at: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = objective.balance_of_samples
    monkeypatch.setattr(objective, "balance_of_samples", lambda *given: -right(*given))
    told = only(look_at(), "terms.positive", "error", "never below 1", "report it")
    assert [finding.stage for finding in told] == ["d2s", "pd"]


def test_a_student_of_experts_that_are_not_finite(look_at: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = objective.balance_of_samples
    monkeypatch.setattr(objective, "balance_of_samples", lambda *given: right(*given) * float("nan"))
    told = only(look_at(), "terms.finite", "error", "balance: not a finite number")
    assert [finding.stage for finding in told] == ["d2s", "pd"]


def test_disk_is_of_the_sparse_student_and_of_what_the_teacher_thinks(mod: Path) -> None:
    recipe, student, _, data, _ = at_hand(mod)
    shapes = students(recipe, student)
    sparse, projector = 13_824 + 128, 544
    model = sum(p.numel() for p in shapes["pd"].model.parameters())
    dense = sum(p.numel() for name, p in student.model.named_parameters() if ".language_model." in name)
    trained = [projector + dense, projector + sparse, projector + sparse]
    # two checkpoints (behind updates 2 and 4 of 6) of weights and two moments
    needed = 4 * (sum(trained) + 2 * 3 * max(trained) + model) + 134 * 10
    assert disk.run_bytes(recipe, shapes, data) == needed


def test_a_recipe_without_its_student_is_planned_sparse(look_at: Examine, tmp_path: Path) -> None:
    found = look_at({"student.vision.from": str(tmp_path / "nowhere"), "stages.d2s.loss.balance": 0})
    assert {f.check for f in found if f.level != "ok"} >= {"student.weights"}


def test_a_preference_stage_without_its_teacher_is_tried_against_the_student(look_at: Examine, tmp_path: Path) -> None:
    found = look_at({"teacher.from": str(tmp_path / "runs" / "teacher" / "model")})
    only(found, "teacher.weights", "error", "train it first: distilvlm run RECIPE --dir")
    assert "β · |log-ratio| is 0 today" in said(found, "terms.preference")[0]


def test_a_student_that_is_sparse_already(look_at: Examine, mod: Path, tmp_path: Path) -> None:
    """A run that goes on from another one's sparse student: preferences only."""
    recipe = load_recipe(mod / "recipe.yaml")
    dense = build(recipe.student, 3)
    sparse = upcycle(dense, 4, 2)
    with torch.no_grad():
        for name, parameter in sparse.model.named_parameters():
            if "projector" in name and name.endswith("bias"):
                parameter.fill_(0.01)
    save(replace(sparse, random_parts=frozenset()), tmp_path / "sparse", "square")
    student = {"student": {"from": str(tmp_path / "sparse"), **ALONE}}
    loss = {"text": 0, "preference": 1, "balance": 0.01}
    found = look_at(student, [stage("pd", data=["pairs"], loss=loss)])
    assert [finding for finding in found if finding.level != "ok"] == []
    twice = look_at(student, [stage("pd", transform=[UPCYCLE], data=["pairs"], loss=loss)])
    only(twice, "experts.upcycle", "error", "sparse already")


def test_a_sparse_student_of_another_origin(look_at: Examine, mod: Path, tmp_path: Path) -> None:
    facts = {**STUDENT, "model_type": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 32}
    language = {"config": facts, "tokenizer": str(mod / "tokenizer")}
    found = look_at({"student.language": language}, [stage("sft", data=["questions"], loss={"response": 1})])
    only(found, "experts.upcycle", "error", "norm_topk_prob", "take a dense")
