"""Which experts served, as the page shows it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from distilvlm.report import wording
from distilvlm.report.experts import COLUMNS, experts
from distilvlm.report.formats import Update
from distilvlm.report.read import Stage


def update(number: int, *layers: tuple[list[float], float, float]) -> Update:
    routing = [{"load": load, "entropy": entropy, "dropped": dropped} for load, entropy, dropped in layers]
    values = {"stage": "d2s", "number": number, "loss": 1.0, "rate": 0.1, "gradient_norm": 1.0, "seconds": 1.0}
    return Update.model_validate({**values, "routing": routing})


def stage(*updates: Update) -> Stage:
    return cast(Stage, SimpleNamespace(updates=list(updates)))


def test_figures_are_of_the_last_tenth() -> None:
    early = [update(n, ([1.0, 0.0], 0.1, 0.5), ([0.5, 0.5], 0.2, 0.0)) for n in range(1, 19)]
    late = [update(n, ([0.25, 0.75], 0.6931471805599453, 0.0), ([0.5, 0.5], 0.0, 0.0)) for n in (19, 20)]
    (found,) = experts("student", 1, stage(*early, *late))
    assert found.part == "language model" and [layer.number for layer in found.layers] == [1, 2]
    assert found.layers[0].load == pytest.approx([0.25, 0.75])
    assert found.layers[0].entropy == pytest.approx(1.0)  # of two alike experts, the largest possible
    assert found.even == 0.5 and not found.drops


def test_a_map_has_a_cell_per_expert_and_stretch_shaded_by_its_share() -> None:
    (one,) = experts("student", 0, stage(update(1, ([0.5, 0.3, 0.2, 0.0], 1.0, 0.25))))
    assert one.drops
    drawn = str(one.layers[0].map)
    assert drawn.count("<rect") == 4
    for shade in ("1.00", "0.60", "0.40", "0.00"):  # of twice an even share
        assert f'fill-opacity="{shade}"' in drawn
    (many,) = experts("student", 0, stage(*(update(n, ([0.5, 0.5], 0.5, 0.0)) for n in range(500))))
    assert str(many.layers[0].map).count("<rect") == 2 * COLUMNS


def test_a_dense_student_has_none() -> None:
    assert experts("student", 0, stage(update(1))) == []


def test_experts_of_the_vision_encoder_are_told_apart() -> None:
    use = {"load": [0.75, 0.25], "entropy": 0.5, "dropped": 0.0}
    values = {"stage": "d", "number": 1, "loss": 1.0, "rate": 0.1, "gradient_norm": 1.0, "seconds": 1.0}
    both = Update.model_validate({**values, "vision_routing": [use, use], "routing": [{**use, "load": [0.5, 0.5]}]})
    found = experts("student", 0, stage(both))
    assert [(use.part, len(use.layers), use.layers[0].load) for use in found] == [
        ("vision encoder", 2, [0.75, 0.25]),
        ("language model", 1, [0.5, 0.5]),
    ]


def test_transforms_are_told_in_words() -> None:
    steps: list[Any] = [
        {"do": "reset", "parts": ["language", "projector"]},
        {"do": "upcycle", "experts": 4, "top_k": 2, "layers": [0, 3], "second_expert": "argmax", "capacity": None},
    ]
    assert wording.transform(steps) == "reset language, projector; upcycle 0, 3 layers: 4 experts, 2 active"
