"""Further files of LLaVA-MoD's golden cases are compared, too: other names, shapes and settings, and arrays that the
shipped file lacks. They are made here, in float64, by loops that share nothing with the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import golden_llava_mod as ours
from tests import golden_llava_mod_rules as rules
from tests.golden_cases import Arrays, GoldenCase, find

SIDES = ("chosen", "rejected")


def labels_of(draw: torch.Generator, samples: int, length: int, vocabulary: int) -> Tensor:
    """Answers here and there, from the third position on; every sample has one, the last sample at its very end."""
    labels = torch.randint(0, vocabulary, (samples, length), generator=draw)
    asked = torch.rand(samples, length, generator=draw) < 0.6
    asked[:, :2], asked[:, 3], asked[-1, -1] = False, True, True
    return labels.masked_fill(~asked, -100)


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, retain_graph=True))


def mimic(draw: torch.Generator) -> Arrays:
    labels = labels_of(draw, 3, 7, 11)
    teacher = torch.randn(3, 7, 11, generator=draw)
    student = torch.randn(3, 7, 11, generator=draw).requires_grad_()
    made = {"labels": labels, "teacher_logits": teacher, "student_logits": student}
    for mode, counts in (("resp", labels != -100), ("all", torch.ones_like(labels, dtype=torch.bool))):
        loss = rules.cross_entropy(student, teacher, counts)
        made |= {f"{mode}.loss": loss, f"{mode}.grad_student_logits": gradients(loss, student)[0]}
    return made


def totals(draw: torch.Generator, kd: Arrays) -> Arrays:
    hidden, head = torch.randn(3, 7, 5, generator=draw), torch.randn(11, 5, generator=draw).requires_grad_()
    labels, layers = kd["labels"], torch.tensor([1.02, 0.97, 1.9])
    logits = hidden.double() @ head.double().T
    text = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    align = rules.cross_entropy(logits, kd["teacher_logits"], labels != -100)
    moe, none = 0.02 * layers.double().sum(), torch.tensor(-1.0)
    made: dict[str, Tensor] = {
        "student_hidden": hidden,
        "lm_head": head,
        "l_aux_per_layer": layers,
        "router_aux_loss_coef": torch.tensor(0.02, dtype=torch.float64),
        "plain_ce": text,
    }
    for name, sparse, flag, learns_text in (
        ("d2d_only_kd", False, False, False),
        ("d2d_kd_lm", False, False, True),
        ("d2s_only_kd", True, True, False),
        ("d2s_only_kd_moeflag_off", True, False, False),
        ("d2s_kd_lm", True, True, True),
        ("d2s_kd_lm_moeflag_off", True, False, True),
    ):
        own = text + moe if sparse else text
        total = align + (own if learns_text else 0) + (moe if flag else 0)
        values = {
            "total": total,
            "align": align,
            "lm_logged": own,
            "student_forward_loss": own,
            "moe_logged": moe if flag else none,
            "student_forward_moe_loss": moe if sparse else none,
        }
        made |= {f"{name}.{key}": value for key, value in values.items()}
        made[f"{name}.grad_lm_head"] = gradients(total, head)[0]
    return made


def pairs(draw: torch.Generator) -> Arrays:
    labels = {"chosen": labels_of(draw, 4, 9, 10), "rejected": labels_of(draw, 4, 6, 10)}
    made: Arrays = {f"{side}_labels": labels[side] for side in SIDES}
    logps: dict[str, dict[str, Tensor]] = {}
    for who in ("policy", "ref"):
        for side in SIDES:
            logits = torch.randn(*labels[side].shape, 10, generator=draw).requires_grad_(who == "policy")
            made[f"{who}_{side}_logits"] = logits
            found = logps.setdefault(who, {})[side] = rules.log_probability(logits, labels[side])
            made[f"{who}_{side}_logps"] = found
            made[f"{who}_{side}_logps_avg"] = found / (labels[side] != -100).sum(1)
    policy, ref = logps["policy"], logps["ref"]
    for name, kind, beta, smoothing, only in (
        ("kto_pair_b0.3", "kto_pair", 0.3, 0.0, slice(None)),
        ("kto_pair_single3_b0.3", "kto_pair", 0.3, 0.0, slice(3, 4)),
        ("sigmoid_ls0.2_b0.3", "sigmoid", 0.3, 0.2, slice(None)),
        ("hinge_b1", "hinge", 1.0, 0.0, slice(None)),
        ("ipo_b0.2", "ipo", 0.2, 0.0, slice(None)),
        ("ipo_single1_b0.2", "ipo", 0.2, 0.0, slice(1, 2)),
    ):
        c, r = (policy[side][only] - ref[side][only] for side in SIDES)
        losses = rules.preference_losses(kind, c, r, beta, smoothing)
        made |= {f"{name}.losses": losses, f"{name}.mean": losses.mean()}
        for side, ratio in zip(SIDES, (c, r), strict=True):
            made[f"{name}.{side}_rewards"] = beta * ratio
            made[f"{name}.grad_policy_{side}_logps"] = gradients(losses.mean(), policy[side])[0][only]
    for kind in ("kto_pair", "sigmoid"):
        for model, moe in (("nomoe", 0.0), ("moe", 0.08)):
            made |= full(f"full.{model}.{kind}", kind, moe, made, policy, ref)
    return made | by_hand(torch.tensor([3.0, -2, 4, -1]), torch.tensor([1.0, -3, -2.5, 2]))


def full(name: str, kind: str, moe: float, made: Arrays, policy: dict[str, Tensor], ref: dict[str, Tensor]) -> Arrays:
    """The trainer's loss and what it logs, under the names of its dictionary."""
    c, r = (policy[side] - ref[side] for side in SIDES)
    losses = rules.preference_losses(kind, c, r, 0.1)
    answers, logits = made["chosen_labels"], made["policy_chosen_logits"].double()
    text = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), answers[:, 1:].flatten())
    out = {
        "loss": losses.mean() + moe,
        "loss/policy_chosen": text + moe * 0.0375 / 0.08,
        "loss/reward": losses.mean(),
        "loss/moe_balance": torch.tensor(moe or -1.0),
        "rewards/chosen": 0.1 * c.mean(),
        "rewards/rejected": 0.1 * r.mean(),
        "rewards/margins": 0.1 * (c - r).mean(),
        "rewards/accuracies": (c > r).float().mean(),
        "logps/chosen": policy["chosen"].mean(),
        "logps/rejected": policy["rejected"].mean(),
        "chosen_rewards": 0.1 * c,
        "policy_rejected_logps": policy["rejected"],
    }
    leaves = [made[f"policy_{side}_logits"] for side in SIDES]
    slopes = gradients(losses.mean(), *leaves)
    out |= {f"grad_policy_{side}_logits": slope for side, slope in zip(SIDES, slopes, strict=True)}
    return {f"{name}.{key}": value for key, value in out.items()}


def by_hand(chosen: Tensor, rejected: Tensor) -> Arrays:
    made = {"hand.chosen_logratio": chosen, "hand.rejected_logratio": rejected}
    for name, detach, only in (
        ("batch4", False, slice(None)),
        ("batch4_detached", True, slice(None)),
        ("single2", False, slice(2, 3)),
    ):
        c, r = (ratio[only].double().requires_grad_() for ratio in (chosen, rejected))
        losses = rules.preference_losses("kto_pair", c, r, 0.1, detach=detach)
        slopes = gradients(losses.mean(), c, r)
        made |= {f"hand.{name}.losses": losses, f"hand.{name}.mean": losses.mean()}
        made |= {f"hand.{name}.grad_{side}": slope for side, slope in zip(SIDES, slopes, strict=True)}
    return made


def gates(draw: torch.Generator) -> Arrays:
    tokens, experts = 20, 5
    made: Arrays = {
        "logits": torch.randn(tokens, experts, generator=draw) * 2,
        "gumbel_noise": torch.randn(tokens, experts, generator=draw),
        "loud_noise": torch.randn(tokens, experts, generator=draw) * 9,
    }
    for noise in ("zero", "gumbel", "loud"):
        # 4 · 2 · 1.375 is 11 exactly; 4 · 2 · 0.55 is 4.4.
        for factor, places in ((0.25, 2), (0.55, 5), (1.375, 11), (1.5, 12), (100, 800)):
            logits = made["logits"].double().requires_grad_()
            gated = rules.top2(logits, None if noise == "zero" else made[f"{noise}_noise"], places)
            combine = gated.combine(places)
            probe = torch.arange(combine.numel()).view_as(combine) / combine.numel()
            arrays = {
                "l_aux": gated.balance,
                "grad_l_aux": gradients(gated.balance, logits)[0],
                "exp_counts": gated.counts,
                "capacity": torch.tensor(places),
                "token_expert_weight": gated.weights,
                "grad_combine_probe": gradients((combine * probe).sum(), logits)[0],
                "combine_weights": combine,
                "dispatch_mask": combine > 0,
            }
            made |= {f"{noise}_cf{factor}.{name}": array for name, array in arrays.items()}
    return made


def block(draw: torch.Generator) -> Arrays:
    """Arrays of a layer, and of the same where all tokens want one expert."""
    width, inner, experts = 6, 10, 4
    shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    ffn = {part: torch.randn(shape, generator=draw) for part, shape in shapes.items()}
    mixed = {part: torch.randn(experts, *shape, generator=draw) for part, shape in shapes.items()}
    router = (torch.rand(experts, width, generator=draw) * 2 - 1) / math.sqrt(width)
    x = torch.randn(4, 5, width, generator=draw)
    skewed = x * 0.05 + 9 * router[2]  # expert 2 is everybody's first
    noise = torch.randn(20, experts, generator=draw)
    made = {f"ffn_{part}": weight for part, weight in ffn.items()}
    made |= {f"experts_{part}": weight for part, weight in mixed.items()}
    made |= {"router_weight": router, "x": x, "x_skewed": skewed, "gumbel_noise": noise}
    made["dense_out"] = rules.feed_forward(x, *ffn.values())
    copies = tuple(weight.expand(experts, *weight.shape) for weight in ffn.values())
    trained = tuple(mixed.values())
    for which, experts_of in (("upcycled", copies), ("mixed", trained), ("skewed", trained)):
        for mode, factor in (("train", 1.5), ("eval", 2.0)):
            for drawn in ("zero",) if which == "skewed" else ("zero", "gumbel"):
                shown = skewed if which == "skewed" else x
                out, gated = rules.moe(shown, router, experts_of, noise if drawn == "gumbel" else None, factor)
                key = f"{which}.{mode}.{drawn}"
                made |= {f"{key}.out": out, f"{key}.l_aux": gated.balance, f"{key}.exp_counts": gated.counts}
                if which == "skewed":
                    made[f"{key}.token_expert_weight"] = gated.weights
    return made


def branch(draw: torch.Generator, like: Arrays) -> Arrays:
    """A residual layer that was trained: its experts are no copies any more."""
    made = {n: like[n] for n in like if n.startswith(("ffn_", "experts_")) or n == "router_weight"}
    coefficient = torch.randn(2, 6, generator=draw)
    experts = tuple(like[f"experts_{part}"] for part in ("gate", "up", "down"))
    out, gated = rules.moe(like["x"], like["router_weight"], experts, None, 2.0)
    share = (like["x"].double() @ coefficient.double().T).softmax(-1)
    both = out * share[..., :1] + like["dense_out"].double() * share[..., 1:]
    made |= {"coef_weight": coefficient, "coef_bias": torch.zeros(2)}
    return made | {"eval.zero.out": both, "eval.zero.l_aux": gated.balance}


def pictures(draw: torch.Generator) -> Arrays:
    """A picture at the very start, a text alone (which is shown a picture of which nothing is left), two at the end."""
    embed, features = torch.randn(15, 4, generator=draw), torch.randn(4, 3, 4, generator=draw)
    rows = [[-200, 3, 9, 2], [5, 1, 7], [4, 8, -200, 6, -200]]
    learned = [[9, 2], [1, 7], [6]]
    ids, labels = torch.zeros(3, 6, dtype=torch.int64), torch.full((3, 6), -100)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    longest = max(len(row) + 2 * row.count(-200) for row in rows)
    embeds, targets = torch.zeros(3, longest, 4), torch.full((3, longest), -100)
    given = torch.zeros(3, longest, dtype=torch.bool)
    shown = 0
    for number, (row, answers) in enumerate(zip(rows, learned, strict=True)):
        place = 0
        for position, token in enumerate(row):
            ids[number, position], mask[number, position] = token, True
            if token in answers:
                labels[number, position] = targets[number, place] = token
            wide = 3 if token == -200 else 1
            embeds[number, place : place + wide] = features[shown] if token == -200 else embed[token]
            given[number, place : place + wide] = True
            shown, place = shown + (token == -200), place + wide
        shown += -200 not in row
    out = {"out_embeds": embeds, "out_labels": targets, "out_attention_mask": given}
    made = {"input_ids": ids, "labels": labels, "attention_mask": mask, "embed": embed, "image_feats": features}
    return made | out | {"out_position_ids_is_none": torch.tensor(True)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = torch.Generator().manual_seed(3)
    cases: dict[str, Arrays] = {"mimicry": mimic(draw), "answers": pairs(draw), "gates": gates(draw)}
    cases["whole"] = totals(draw, cases["mimicry"])
    cases["block"] = block(draw)
    cases["branch"] = branch(draw, cases["block"])
    cases["album"] = pictures(draw)
    directory = tmp_path_factory.mktemp("golden")
    arrays = {f"{case}.{name}": array.detach() for case, made in cases.items() for name, array in made.items()}
    kept = {name: (a.float() if a.dtype == torch.float64 else a).numpy() for name, a in arrays.items()}
    np.savez(directory / "llava_mod_further.npz", **kept)  # type: ignore[arg-type]
    return directory


CASES = {
    "mimicry": set(),
    "answers": set(),
    "gates": set(),
    "whole": set(),
    "block": {"mixed.eval.gumbel.out"},
    "branch": {"eval.zero.out"},
    "album": set(),
}


def case_of(file: Path, name: str) -> GoldenCase:
    return next(case for case in find(file).cases if case.name == name)


@pytest.mark.parametrize("name", CASES)
def test_further_cases_agree_whatever_their_names(file: Path, name: str):
    reading = ours.read(case_of(file, name))
    assert reading is not None
    assert reading.departed == CASES[name]


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("answers", "full."), ("answers", "hand.batch4"), ("block", "skewed."), ("gates", "loud_cf0.55")],
)
def test_altered_arrays_of_further_cases_are_noticed(file: Path, name: str, prefix: str):
    case = case_of(file, name)
    altered = {key: array for key, array in case.arrays.items() if key.startswith(prefix)}
    assert altered
    for key, array in altered.items():
        other = array + 1e-3 * max(1.0, float(array.abs().max())) if array.is_floating_point() else array.logical_not()
        with pytest.raises(AssertionError):
            ours.read(replace(case, arrays={**case.arrays, key: other.to(array.dtype)}))
            pytest.fail(f"{key} may change unnoticed")


def test_an_array_that_nothing_compares_fails_its_case_by_name(file: Path):
    case = case_of(file, "gates")
    with pytest.raises(pytest.fail.Exception, match=r"llava_mod_further\.npz: nothing here compares cold_cf2\.heat"):
        ours.read(replace(case, arrays={**case.arrays, "cold_cf2.heat": torch.zeros(())}))


def test_dotted_and_slashed_names_are_told_apart(tmp_path: Path):
    one = np.zeros(1)
    np.savez(tmp_path / "a.npz", **{"b2_t0.5/loss": one, "raises": one, "b2_t0.5/x.y": one})  # type: ignore[arg-type]
    np.savez(tmp_path / "b.npz", **{"po.full.loss": one, "po.full.loss/reward": one})  # type: ignore[arg-type]
    found = {(case.file, case.name): set(case.arrays) for case in find(tmp_path).cases}
    assert found == {
        ("a.npz", "b2_t0.5"): {"loss", "x.y"},
        ("a.npz", "raises"): {""},
        ("b.npz", "po"): {"full.loss", "full.loss/reward"},
    }


def test_a_case_finds_what_it_is_made_with_by_shape():
    near, far, other = ({"x": torch.zeros(size)} for size in (2, 2, 3))
    siblings: dict[str, Arrays] = {"far": far, "near": near, "own": {}, "other": other}
    case = GoldenCase("f.npz", "own", {}, siblings)
    two: Callable[[Arrays], bool] = lambda arrays: "x" in arrays and arrays["x"].shape == (2,)  # noqa: E731
    assert case.sibling(two) is near
    assert case.sibling(lambda arrays: "x" in arrays and arrays["x"].shape == (3,)) is other
    with pytest.raises(pytest.fail.Exception, match="no other case has the arrays that 'own' is made with"):
        case.sibling(lambda _: False)
