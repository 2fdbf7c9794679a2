"""Finds golden cases: every case of every .npz file of a directory, whatever its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

METHODS_NOT_BUILT: tuple[str, ...] = ()
"""Files whose name starts so are listed in pytest's header and not collected. An entry goes when its method comes."""

Arrays = dict[str, Tensor]


@dataclass(frozen=True)
class GoldenCase:
    file: str
    name: str
    arrays: Arrays = field(repr=False)
    siblings: dict[str, Arrays] = field(default_factory=dict, repr=False)  # all cases of the file, in order

    def sibling(self, fits: Callable[[Arrays], bool]) -> Arrays:
        """Arrays of the fitting case that stands closest before this one in the file, or else behind it."""
        names = list(self.siblings)
        place = names.index(self.name)
        for name in (*reversed(names[: place + 1]), *names[place + 1 :]):
            if fits(self.siblings[name]):
                return self.siblings[name]
        pytest.fail(f"{self.file}: no other case has the arrays that {self.name!r} is made with")


@dataclass(frozen=True)
class Golden:
    directory: Path
    cases: list[GoldenCase]
    not_built: list[str]


class Reading:
    """The arrays of a case, and what a comparison does with each: what is left over is compared with nothing."""

    def __init__(self, case: GoldenCase, departures: dict[str, str]) -> None:
        self.case = case
        self._arrays, self._departures = case.arrays, departures
        self.given: set[str] = set()  # what ours is computed from
        self.compared: set[str] = set()
        self.departed: set[str] = set()  # compared with our rule instead

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    @property
    def names(self) -> list[str]:
        return list(self._arrays)

    def shape(self, name: str) -> torch.Size:
        return self._arrays[name].shape

    def input(self, name: str) -> Tensor:
        self.given.add(name)
        return self._arrays[name]

    def near(self, name: str, actual: Tensor, tolerance: float) -> None:
        self.compared.add(name)
        expected = self._arrays[name]
        near(actual, expected, scaled(tolerance, expected), name)

    def same(self, name: str, actual: Tensor) -> None:
        self.compared.add(name)
        expected = self._arrays[name]
        assert actual.to(expected.dtype).equal(expected), f"{name} is {actual.tolist()}, not {expected.tolist()}"

    def departs(self, name: str, departure: str, actual: Tensor, rule: Tensor, tolerance: float) -> None:
        """Our rule's value instead of the array, which the table of departures says why."""
        self.departed.add(name)
        near(actual, rule, scaled(tolerance, rule), f"{name} ({self._departures[departure]})")

    def finish(self) -> None:
        left = [name for name in self._arrays if name not in self.given | self.compared | self.departed]
        if left:
            pytest.fail(f"{self.case.file}: nothing here compares {', '.join(left)} of case {self.case.name!r}")


@cache
def find(directory: Path) -> Golden:
    """Cases are named `<case>/<array>`; an array without a slash is a case of its own, whose array is named ''. A case
    with inputs of its own may lie in a group, `<group>/<case>/in/<array>`.

    In a file of dotted names the case is what stands before the first dot.
    """
    files = sorted(directory.glob("*.npz"))
    if not files:
        raise pytest.UsageError(f"--golden {directory}: no .npz file there")
    not_built = [file.name for file in files if file.name.startswith(METHODS_NOT_BUILT)]
    cases: list[GoldenCase] = []
    for file in files:
        if file.name in not_built:
            continue
        found: dict[str, Arrays] = {}
        with np.load(file) as content:
            dotted = any("." in key and "/" not in key for key in content.files)
            grouped = {inside[1] for key in content.files if (inside := re.match(r"([^/]+/[^/]+)/in/", key))}
            for key in content.files:
                case, mark, array = key.partition("." if dotted else "/")
                if (longer := f"{case}/{array.partition('/')[0]}") in grouped:
                    case, array = longer, array.partition("/")[2]
                if not mark:
                    case, array = key, ""
                found.setdefault(case, {})[array] = _tensor(np.asarray(content[key]))
        cases += [GoldenCase(file.name, case, arrays, found) for case, arrays in found.items()]
    return Golden(directory, cases, not_built)


def _tensor(array: np.ndarray) -> Tensor:
    """Texts become bytes in UTF-8, a line each: `bytes(tensor.tolist()).decode()`."""
    if array.dtype.kind == "U":
        array = np.frombuffer("\n".join(map(str, array.ravel())).encode(), dtype=np.uint8).copy()
    return torch.from_numpy(array)


def scaled(tolerance: float, expected: Tensor) -> float:
    """Absolute, and relative to the largest entry where that is more than 1."""
    return tolerance * max(1.0, float(expected.double().abs().max()))


def near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    worst = float((actual - expected).abs().max()) if actual.numel() else 0.0
    assert worst <= tolerance, f"{what} differs by {worst:.2e}, more than {tolerance:.0e}"
