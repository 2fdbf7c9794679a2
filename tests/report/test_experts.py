"""Which experts served, and what a stage of preferences is watched by, as the page shows it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from distilvlm.recipe import load_recipe
from distilvlm.report import wording
from distilvlm.report.curves import stage_charts
from distilvlm.report.experts import COLUMNS, STEPS, experts, mean_dropped, mean_entropy, shade
from distilvlm.report.formats import AboutStage, Update
from distilvlm.report.read import Run, Stage, read
from tests.report.test_page import Reader


def update(number: int, *layers: tuple[list[float], float, float]) -> Update:
    routing = [{"load": load, "entropy": entropy, "dropped": dropped} for load, entropy, dropped in layers]
    values = {"stage": "d2s", "number": number, "loss": 1.0, "rate": 0.1, "gradient_norm": 1.0, "seconds": 1.0}
    return Update.model_validate({**values, "routing": routing})


def stage(sparse_run: Path, *updates: Update, layers: list[int] | None = None) -> Stage:
    spec = load_recipe(sparse_run.parent / "recipe.yaml").stages[1]
    student = {"parameters": 10, "active_parameters": 5, "sparse_layers": layers or []}
    about = AboutStage.model_validate({"stage": "d2s", "student": student})
    return Stage(1, spec, about, list(updates), True)


def test_figures_are_of_the_last_tenth_and_entropy_also_of_the_first(sparse_run: Path) -> None:
    even = math.log(2)  # nats: the largest entropy of two experts
    first = [update(n, ([1.0, 0.0], even / 2, 0.5), ([0.5, 0.5], even, 0.0)) for n in (1, 2)]
    early = [update(n, ([1.0, 0.0], 0.1, 0.0), ([0.5, 0.5], 0.2, 0.0)) for n in range(3, 19)]
    late = [update(n, ([0.25, 0.75], even, 0.0), ([0.5, 0.5], 0.0, 0.0)) for n in (19, 20)]
    (found,) = experts("student", 1, stage(sparse_run, *first, *early, *late, layers=[0, 3]))
    assert found.part == "language model" and [layer.name for layer in found.layers] == ["layer 0", "layer 3"]
    assert found.layers[0].load == pytest.approx([0.25, 0.75])
    assert found.layers[0].entropy == pytest.approx((0.5, 1.0)) and found.layers[1].entropy == pytest.approx((1.0, 0.0))
    assert (found.layers[0].dropped, found.layers[0].most_dropped) == pytest.approx((0.05, 0.5))  # of the whole stage
    assert found.even == 0.5 and found.drops
    assert mean_entropy(first[0].routing) == pytest.approx(0.75) and mean_dropped(first[0].routing) == 0.25


def test_layers_are_counted_where_their_numbers_are_not_recorded(sparse_run: Path) -> None:
    (found,) = experts("student", 0, stage(sparse_run, update(1, ([0.5, 0.5], 0.5, 0.0), ([0.5, 0.5], 0.5, 0.0))))
    assert [layer.name for layer in found.layers] == ["sparse layer 1", "sparse layer 2"]


def test_shades_are_of_an_even_share() -> None:
    assert [shade(share, 0.25) for share in (0.0, 0.1, 0.125, 0.25, 0.5, 1.0)] == [-4, -4, -4, 0, STEPS, STEPS]
    assert -STEPS < shade(0.2, 0.25) < 0 < shade(0.3, 0.25) < STEPS


def rectangles(drawn: str) -> dict[str, list[tuple[int, int, int]]]:
    """Class -> (column, top, columns) of its rectangles."""
    return {
        name: [(int(x), int(y), int(w)) for x, y, w in re.findall(r"M(\d+),(\d+)h(\d+)", d)]
        for name, d in re.findall(r'<path class="([^"]+)" d="([^"]+)"', drawn)
    }


def test_a_map_has_a_row_per_expert_and_neighbours_of_one_shade_are_one(sparse_run: Path) -> None:
    loads = [[0.25, 0.25, 0.5, 0.0], [0.25, 0.25, 0.5, 0.0], [0.5, 0.25, 0.25, 0.0]]
    (one,) = experts("student", 0, stage(sparse_run, *(update(n, (load, 1.0, 0.0)) for n, load in enumerate(loads))))
    assert not one.drops
    drawn = str(one.layers[0].map)
    assert rectangles(drawn) == {
        "less m4": [(0, 39, 3)],
        "even": [(0, 0, 2), (0, 13, 3), (2, 26, 1)],
        "more m4": [(2, 0, 1), (0, 26, 2)],
    }
    assert 'aria-label="sparse layer 1, at the end: expert 1 50%, expert 2 25%, expert 3 25%, expert 4 0%"' in drawn
    (many,) = experts(
        "student", 0, stage(sparse_run, *(update(n, ([n / 500, 1 - n / 500], 0.5, 0.0)) for n in range(500)))
    )
    assert f'viewBox="0 0 {COLUMNS} 25"' in str(many.layers[0].map)


def test_a_dense_student_has_none(sparse_run: Path) -> None:
    assert experts("student", 0, stage(sparse_run, update(1))) == []
    assert mean_entropy([]) is None


def test_experts_of_the_vision_encoder_are_told_apart(sparse_run: Path) -> None:
    use = {"load": [0.75, 0.25], "entropy": 0.5, "dropped": 0.0}
    values = {"stage": "d", "number": 1, "loss": 1.0, "rate": 0.1, "gradient_norm": 1.0, "seconds": 1.0}
    both = Update.model_validate({**values, "vision_routing": [use, use], "routing": [{**use, "load": [0.5, 0.5]}]})
    found = experts("student", 0, stage(sparse_run, both))
    assert [(use.part, len(use.layers), use.layers[0].load) for use in found] == [
        ("vision encoder", 2, [0.75, 0.25]),
        ("language model", 1, [0.5, 0.5]),
    ]


def test_the_page_of_a_sparse_run_shows_every_layer_with_its_figures(sparse_page: str, sparse_run: Path) -> None:
    words = Reader(sparse_page).words
    assert words.count("Which experts of the language model served") == 2  # in both sparse stages
    tables = sparse_page.count('<table class="use">')
    assert tables == 2
    subject = read(sparse_run)
    assert isinstance(subject, Run)
    last = subject.stages[2].updates[-1]
    for number, use in zip((0, 2), last.routing, strict=True):
        shares = " ".join(f"{100 * share:.0f}%" for share in use.load)
        assert f"layer {number} {shares}" in words
    assert "choices that found their expert full" in words  # capacity, in the second stage


def test_the_page_tells_of_terms_and_sizes(sparse_page: str) -> None:
    words = Reader(sparse_page).words
    titles = re.findall(r"<figcaption><b>(.*?)</b>", sparse_page)
    for title in (
        "term: response (the whole loss)",
        "term: balance (2 at best)",
        "term: balance (4 at best)",  # of both answers
        "term: preference (kto, β 0.1, λ desirable 1.5)",
        "reward of chosen (β · log-ratio)",
        "reward of rejected (β · log-ratio)",
        "records on the right side (share)",
        "router entropy (of the largest)",
    ):
        assert title in titles
    assert "text + response + 0.01 balance; as LLaVA-MoD's code: capacity" in words
    assert "0.01 balance + preference (kto, β 0.1, λ desirable 1.5)" in words
    assert words.count("33,904 parameters, 27,760 serve a token") == 1  # where the student becomes sparse
    assert "once before it: teacher, 10 records" in words
    assert words.count("log-probability under the student less that under its reference") == 1


def test_values_of_runs_that_differ_in_their_kind_have_no_kind_in_their_title(sparse_run: Path) -> None:
    runs: dict[str, Run] = {}
    for kind in ("kto", "dpo"):
        subject = read(sparse_run)
        assert isinstance(subject, Run)
        loss = subject.stages[2].spec.loss.model_copy(update={"preference_kind": kind})
        object.__setattr__(subject.stages[2], "spec", subject.stages[2].spec.model_copy(update={"loss": loss}))
        runs[kind] = subject
    (charts,) = [group for group in stage_charts(runs, {"kto": 0, "dpo": 1}) if group.title == "Stage 3"]
    assert "term: preference" in [chart.title for chart in charts.charts]
    assert [use.run for use in charts.experts] == ["kto", "dpo"]


def test_transforms_are_told_in_words() -> None:
    steps: list[Any] = [
        {"do": "reset", "parts": ["language", "projector"]},
        {"do": "upcycle", "experts": 4, "top_k": 2, "layers": [0, 3], "second_expert": "argmax", "capacity": None},
    ]
    assert wording.transform(steps) == "reset language, projector; upcycle 0, 3 layers: 4 experts, 2 active"
