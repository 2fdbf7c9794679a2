"""Samples are put together by their positions only where no loss is of the micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilvlm.recipe import load_recipe

from .test_refusals import message, write

SECOND = "stages: [{{name: second, {change}}}]\nmachine: {machine}\n"
SPARSE = "transform: [{do: upcycle, capacity: 1.5}]"


@pytest.mark.parametrize(
    ("change", "machine", "expected"),
    [
        ("reference: [token_mean]", "{tokens: 512}", "reference: [token_mean] makes its loss one of the micro-batch"),
        ("reference: [gumbel, capacity]", "{tokens: 512}", "reference: [capacity] makes its loss one of the micro-"),
        ("reference: [padding]", "{packing: true}", "packed rows have none between samples: set machine.packing to"),
        (SPARSE, "{tokens: 512, packing: true}", "its experts have a capacity (upcycled in 'second')"),
        ("max_length: 64", "{tokens: 0}", "machine.tokens: input should be greater than 0"),
    ],
)
def test_what_depends_on_a_micro_batch_is_refused(base: Path, change: str, machine: str, expected: str) -> None:
    content = SECOND.format(change=change, machine=machine)
    told = message(write(base.with_name("child.yaml"), f"extends: base.yaml\n{content}"))
    assert expected in told
    if "machine.tokens chooses" in told:
        assert told.endswith("set machine.tokens to null and machine.micro_batch to the samples that the loss is of")


@pytest.mark.parametrize(
    ("change", "machine"),
    [
        ("reference: [unshifted_mask, gumbel]", "{tokens: 512, packing: true}"),
        ("reference: [token_mean]", "{micro_batch: 4, packing: true}"),
        (SPARSE, "{micro_batch: 4, packing: true}"),
    ],
)
def test_what_does_not_is_packed(base: Path, change: str, machine: str) -> None:
    content = SECOND.format(change=change, machine=machine)
    recipe = load_recipe(write(base.with_name("child.yaml"), f"extends: base.yaml\n{content}"))
    assert recipe.machine.packing
