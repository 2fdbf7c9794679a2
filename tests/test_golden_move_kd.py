"""Further files of MoVE-KD's golden cases are compared, too: the other switches, saturated scores, other numbers of
teachers and experts. They are made here, in float64, by loops that share nothing with the package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import golden_move_kd as ours
from tests.golden_cases import Arrays, GoldenCase, find

BATCH, PATCHES, WIDTH, LAYERS, EXPERTS = 2, 4, 6, 2, 4
RAW = {"SAM": (3, 3, 3), "EVA": (5, 2, 4), "ConvNeXt": (7, 4)}  # channels, rows, columns; or tokens, channels
SWITCHES = {
    "v11_saturated": (("SAM", "EVA", "ConvNeXt"), 40.0, 1, 1),
    "v11_token_only": (("SAM", "EVA", "ConvNeXt"), 1.0, 1, 0),
    "v10_teacher_only": (("EVA", "ConvNeXt"), 1.0, 0, 1),
    "one": (("EVA",), 1.0, 1, 1),
}


def texts(*lines: str) -> np.ndarray:
    return np.array(lines)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def loss_case(draw: torch.Generator, teachers: tuple[str, ...], loud: float, by_token: int, by_teacher: int) -> dict:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).double()

    weight, anchor, balance = 0.25, 0.7, 0.02
    made: dict[str, Tensor | np.ndarray] = {
        "in/teachers": texts("CLIP", *teachers),
        "in/hparams": torch.tensor([weight, anchor, balance, by_token, by_teacher]),
    }
    student, clip = normal(BATCH, PATCHES + 1, WIDTH).requires_grad_(), normal(BATCH, PATCHES + 1, WIDTH)
    clip[:, 0] *= loud
    if loud > 1:  # all pictures agree on one teacher
        clip[:] = clip[:1]
    attention = normal(BATCH, 3, PATCHES + 1, PATCHES + 1).softmax(-1)
    routed = normal(LAYERS, BATCH, PATCHES + 1, EXPERTS).softmax(-1).requires_grad_()
    choice = torch.zeros_like(routed).scatter(-1, routed.argmax(-1, keepdim=True), 1.0)
    made |= {"in/student_hidden_m2": student, "in/clip_hidden_m2": clip, "in/clip_attn_m2": attention}
    made |= {"in/routing_probs": routed, "in/expert_choice": choice}
    leaves, targets = {"student_hidden_m2": student}, {"CLIP": clip[:, 1:]}
    for teacher in teachers:
        raw = normal(BATCH, *RAW[teacher])
        made[f"in/raw_{teacher}"] = raw = raw[:1].repeat(BATCH, *[1] * (raw.dim() - 1)) if loud > 1 else raw
        tokens = raw if raw.dim() == 3 else torch.stack(
            [raw[:, :, row, column] for row in range(raw.shape[2]) for column in range(raw.shape[3])], dim=1
        )  # fmt: skip
        for key, shape in (
            ("1_weight", (WIDTH, tokens.shape[2])),
            ("1_bias", (WIDTH,)),
            ("2_weight", (PATCHES, tokens.shape[1])),
            ("2_bias", (PATCHES,)),
        ):
            leaves[f"{teacher}_adapter_{key}"] = normal(*shape).requires_grad_()
        w1, b1, w2, b2 = (leaves[f"{teacher}_adapter_{key}"] for key in ("1_weight", "1_bias", "2_weight", "2_bias"))
        mapped = gelu(torch.einsum("bnc,wc->bnw", tokens, w1) + b1)
        targets[teacher] = torch.einsum("bnw,pn->bpw", mapped, w2) + b2[:, None]
        made[f"out/adapted_{teacher}"] = targets[teacher]
    made |= {f"in/{name}": leaf for name, leaf in leaves.items()}

    raw_scores, rows = torch.zeros(BATCH, len(targets)).double(), []
    for b in range(BATCH):
        rows.append(attention[b].mean(0)[0, 1:].softmax(0))
        for i, target in enumerate(targets.values()):
            raw_scores[b, i] = sum(clip[b, 0] @ token for token in target[b]) / PATCHES
    token = torch.stack(rows)
    others = raw_scores[:, 1:].softmax(1)
    made["out/else_weight_batchmean_before_flatten"] = others.mean(0)
    if others.mean(0).max() > 0.8:
        others = (others + 0.2).softmax(1)
    made["out/else_weight_after_flatten"] = others
    if not by_teacher:
        others = torch.full_like(others, 1 / others.shape[1])
    weights = torch.cat([torch.full((BATCH, 1), anchor).double(), (1 - anchor) * others], 1)
    losses = torch.zeros(BATCH, len(targets)).double()
    for b in range(BATCH):
        for i, target in enumerate(targets.values()):
            each = ((student[b, 1:] - target[b]) ** 2).mean(-1)
            losses[b, i] = each.mean() + (by_token * token[b] * each).sum()
    kd = weight * (weights * losses).sum() / BATCH
    balancing = sum(
        (routed[:, b, :, e].mean() * choice[:, b, :, e].mean() for b in range(BATCH) for e in range(EXPERTS)),
        torch.zeros(()),
    ) / BATCH  # fmt: skip
    made |= {"out/token_weight": token, "out/raw_scores": raw_scores, "out/teacher_weight": weights}
    made |= {"out/teacher_loss_x_kdw": weight * losses, "out/kd_loss_x_kdw": kd.view(1)}
    made |= {"out/balancing_loss": balancing.view(1), "out/text_loss": torch.tensor([3.5])}
    made["out/total_loss"] = (3.5 + balance * balancing + kd).view(1)
    for name, gradient in zip(leaves, torch.autograd.grad(kd, list(leaves.values())), strict=True):
        made[f"grad_kd/{name}"] = gradient
    made["grad_balance/routing_probs"] = torch.autograd.grad(balancing, routed)[0]
    return made


def layer_case(draw: torch.Generator) -> dict:
    width, inner, rank, experts = 5, 7, 3, 2

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).double().requires_grad_()

    weights = {
        "original_module.fc1.weight": leaf(inner, width),
        "original_module.fc1.bias": leaf(inner),
        "original_module.fc2.weight": leaf(width, inner),
        "original_module.fc2.bias": leaf(width),
        "router.weight": leaf(experts, width),
        "router.bias": leaf(experts),
    }
    for e in range(experts):
        for part, wide, out in (("moe_down", width, inner), ("moe_up", inner, width)):
            weights |= {f"{part}.{e}.lora_A.weight": leaf(rank, wide), f"{part}.{e}.lora_A.bias": leaf(rank)}
            weights |= {f"{part}.{e}.lora_B.weight": leaf(out, rank), f"{part}.{e}.lora_B.bias": leaf(out)}
    x, gy = leaf(2, 4, width), torch.randn(2, 4, width, generator=draw).double()
    made: dict[str, Tensor | np.ndarray] = {f"w/{name}": value for name, value in weights.items()}
    made["x"] = x

    def lora(name: str, token: Tensor) -> Tensor:
        inside = weights[f"{name}.lora_A.weight"] @ token + weights[f"{name}.lora_A.bias"]
        return (weights[f"{name}.lora_B.weight"] @ inside + weights[f"{name}.lora_B.bias"]) / rank

    for mode in ("sparse", "dense"):
        routing = (x @ weights["router.weight"].T + weights["router.bias"]).softmax(-1)
        index, y = routing.argmax(-1), []
        for token, p, best in zip(x.flatten(0, 1), routing.flatten(0, 1), index.flatten(), strict=True):
            serving = {int(best): torch.ones(())} if mode == "sparse" else dict(enumerate(p))
            hidden = weights["original_module.fc1.weight"] @ token + weights["original_module.fc1.bias"]
            hidden = hidden + sum(share * lora(f"moe_down.{e}", token) for e, share in serving.items())
            hidden = hidden * torch.sigmoid(1.702 * hidden)
            out = weights["original_module.fc2.weight"] @ hidden + weights["original_module.fc2.bias"]
            y.append(out + sum(share * lora(f"moe_up.{e}", hidden) for e, share in serving.items()))
        made |= {f"{mode}/y": torch.stack(y).view_as(x), f"{mode}/gy": gy, f"{mode}/routing": routing}
        made |= {f"{mode}/index": index, f"{mode}/expert_choice": torch.nn.functional.one_hot(index, experts)}
        found = torch.autograd.grad(torch.stack(y).view_as(x), [x, *weights.values()], gy, allow_unused=True)
        made[f"{mode}/grad_x"] = found[0]
        made |= {f"{mode}/grad/{n}": g for n, g in zip(weights, found[1:], strict=True) if g is not None}
        without = [name for name, gradient in zip(weights, found[1:], strict=True) if gradient is None]
        if without:
            made[f"{mode}/params_without_grad"] = texts(*without)
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = torch.Generator().manual_seed(3)
    cases = {f"kd/{name}": loss_case(draw, *switches) for name, switches in SWITCHES.items()}
    cases["another"] = layer_case(draw)
    directory = tmp_path_factory.mktemp("golden")
    arrays = {}
    for case, made in cases.items():
        for name, array in made.items():
            if isinstance(array, Tensor):
                array = array.detach()
                array = (array.float() if array.is_floating_point() else array).numpy()
            arrays[f"{case}/{name}"] = array
    np.savez(directory / "move_kd_further.npz", **arrays)  # type: ignore[arg-type]
    return directory


def case_of(file: Path, name: str) -> GoldenCase:
    return next(case for case in find(file).cases if case.name == name)


@pytest.mark.parametrize("name", [*(f"kd/{name}" for name in SWITCHES), "another"])
def test_further_cases_agree_whatever_their_names(file: Path, name: str):
    assert ours.check(case_of(file, name))


def test_saturated_scores_take_the_branch_that_flattens(file: Path):
    arrays = case_of(file, "kd/v11_saturated").arrays
    assert (
        arrays["out/else_weight_batchmean_before_flatten"].max() > 0.8 > arrays["out/else_weight_after_flatten"].max()
    )


TEXTS = ("in/teachers", "config", "sparse/params_without_grad")


def altered(array: Tensor) -> Iterator[Tensor]:
    """An output in its first and in its last entry."""
    for place in (0, -1):
        other = array.clone().view(-1)
        other[place] = other[place] + (1e-3 * max(1.0, float(array.abs().max())) if array.is_floating_point() else 1)
        yield other.view_as(array)


def changed(array: Tensor) -> Tensor:
    """An input as a whole."""
    if not array.is_floating_point():
        return array.flip(0)
    return array.flatten().roll(1).view_as(array) * 1.01 + torch.linspace(0.01, 0.02, array.numel()).view_as(array)


def test_every_altered_array_is_noticed(shipped_case: GoldenCase):
    if (reading := ours.read(shipped_case)) is None:
        return
    for name, array in shipped_case.arrays.items():
        if name in (*ours.CLOSING, *TEXTS) or name.endswith("k_proj.bias"):
            continue  # what is added to all keys alike changes no attention
        for other in altered(array) if name in reading.compared else [changed(array)]:
            with pytest.raises((AssertionError, IndexError)):
                ours.read(replace(shipped_case, arrays={**shipped_case.arrays, name: other}))
                pytest.fail(f"{shipped_case.name}: {name} may change unnoticed")


def test_an_array_that_nothing_compares_fails_its_case_by_name(file: Path):
    case = case_of(file, "another")
    with pytest.raises(pytest.fail.Exception, match=r"move_kd_further\.npz: nothing here compares sparse/heat"):
        ours.read(replace(case, arrays={**case.arrays, "sparse/heat": torch.zeros(())}))


def test_a_router_with_a_gradient_where_the_reference_has_none_is_noticed(file: Path):
    case = case_of(file, "another")
    names = torch.tensor(list(b"router.weight"), dtype=torch.uint8)
    arrays: Arrays = {**case.arrays, "sparse/params_without_grad": names}
    with pytest.raises(AssertionError):
        ours.read(replace(case, arrays=arrays))


def test_cases_in_groups_are_told_by_their_inputs(tmp_path: Path):
    one = np.zeros(1)
    names = ("kd/a/in/x", "kd/a/grad/w.b", "kd/b/in/x", "mole/w/fc.bias", "mole/x", "config")
    np.savez(tmp_path / "a.npz", **dict.fromkeys(names, one))  # type: ignore[arg-type]
    found = {case.name: set(case.arrays) for case in find(tmp_path).cases}
    assert found == {
        "kd/a": {"in/x", "grad/w.b"},
        "kd/b": {"in/x"},
        "mole": {"w/fc.bias", "x"},
        "config": {""},
    }
