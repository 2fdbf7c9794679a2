"""A checkpoint goes back into the parameters that it is of, and into no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from distilvlm.runs import checkpoint
from distilvlm.runs.checkpoint import Position
from distilvlm.runs.directory import RunError

Parameters = dict[str, nn.Parameter]


def stepped(*names: str) -> tuple[Parameters, torch.optim.AdamW]:
    """Parameters of one step, and their optimiser."""
    parameters = {name: nn.Parameter(torch.full((2, 3), number + 1.0)) for number, name in enumerate(names)}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    torch.stack([parameter.square().sum() for parameter in parameters.values()]).sum().backward()
    optimizer.step()
    return parameters, optimizer


def saved(directory: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> Path:
    states = {"process 0": torch.zeros(1)}
    checkpoint.save(directory, Position("sft", 1, 0, "base"), parameters, optimizer, states, Accelerator(cpu=True))
    return directory


def test_what_was_saved_goes_on(tmp_path: Path) -> None:
    parameters, optimizer = stepped("a", "b")
    place = saved(tmp_path / "checkpoint", parameters, optimizer)
    fresh = {name: nn.Parameter(torch.zeros(2, 3)) for name in parameters}
    again = torch.optim.AdamW(fresh.values(), lr=0.1)
    assert set(checkpoint.load(place, fresh, again)) == {"process 0"}
    for name, parameter in parameters.items():
        assert torch.equal(fresh[name], parameter)
        state, expected = again.state[fresh[name]], optimizer.state[parameter]
        assert expected["exp_avg"].any() and all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: {"a": held["a"]}, r"holds other weights than this stage trains: \['b'\] \(1 names differ\)"),
        (
            lambda held: {**held, "b": nn.Parameter(torch.zeros(3, 2))},
            r"checkpoint: b has shape \(2, 3\), not \(3, 2\)",
        ),
    ],
)
def test_weights_of_another_stage_are_refused(
    tmp_path: Path, change: Callable[[Parameters], Parameters], told: str
) -> None:
    parameters, optimizer = stepped("a", "b")
    place = saved(tmp_path / "checkpoint", parameters, optimizer)
    with pytest.raises(RunError, match=told):
        checkpoint.load(place, change(parameters), optimizer)


@pytest.mark.parametrize(("names", "odd"), [(("a",), r"\['b'\] \(1 names"), (("a", "c"), r"\['b', 'c'\] \(2 names")])
def test_an_optimiser_of_other_parameters_is_refused(tmp_path: Path, names: tuple[str, ...], odd: str) -> None:
    parameters, optimizer = stepped("a", "b")
    place = saved(tmp_path / "checkpoint", parameters, optimizer)
    other = saved(tmp_path / "other", *stepped(*names))
    (other / "optimizer.safetensors").replace(place / "optimizer.safetensors")
    told = f"checkpoint holds the optimiser's state of other parameters: {odd} differ"
    with pytest.raises(RunError, match=told):
        checkpoint.load(place, parameters, optimizer)
