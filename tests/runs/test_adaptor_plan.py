"""A plan of stages with adaptors counts what the paper counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilvlm.runs.plan import plan

from .test_plan import RECIPES, shown, trained
from .tiny_iaa import write_iaa_recipe

VISION, LAYER, TABLE, PROJECTOR = 303_507_456, 218_112_000, 525_336_576, 20_979_712
"""Published sizes: CLIP-L's tower, one of Llama-3-8B's layers, its embedding or head, the projector."""
NORM = 4_096


@pytest.mark.parametrize(("preset", "layers"), [([], 14), (["preset=iaa-8"], 8)])
def test_the_published_adaptors_have_their_published_sizes(preset: list[str], layers: int) -> None:
    first, align, instruct, ground = plan(RECIPES / "iaa.yaml", preset).stages
    adaptor = layers * LAYER + 2 * TABLE + NORM + PROJECTOR
    base = 8_030_261_248 + VISION + PROJECTOR
    assert trained(first) == {"projector": PROJECTOR}
    assert trained(align) == trained(instruct) == trained(ground) == {"adaptor": adaptor}
    assert (first.parameters, align.parameters, ground.parameters) == (base, base + adaptor, base + 2 * adaptor)
    # Own tables, norm and projector stand in for the base's.
    assert align.active == ground.active == base + layers * LAYER


def test_positions_of_another_depth_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="host of 32 layers, this one has 4"):
        plan(write_iaa_recipe(tmp_path), ["stages.multimodal.transform.0.layers=iaa-14"])


def test_the_table_says_what_is_inserted(tmp_path: Path) -> None:
    text = shown(plan(write_iaa_recipe(tmp_path)))
    assert "insert adaptor 'multimodal': 2 layers, structure (c)" in text
    assert "39,216 parameters" in text and "32,480 serve a token" in text
    assert "adaptor.projector 544" in text
