"""Finds golden cases: every case of every .npz file of a directory, whatever its name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

METHODS_NOT_BUILT = ("iaa", "llava_mod", "move_kd")
"""Files whose name starts so are listed in pytest's header and not collected. An entry goes when its method comes."""


@dataclass(frozen=True)
class GoldenCase:
    file: str
    name: str
    arrays: dict[str, Tensor]


@dataclass(frozen=True)
class Golden:
    directory: Path
    cases: list[GoldenCase]
    not_built: list[str]


@cache
def find(directory: Path) -> Golden:
    """Cases are named `<case>/<array>`; an array without a slash is a case of its own, whose array is named ''."""
    files = sorted(directory.glob("*.npz"))
    if not files:
        raise pytest.UsageError(f"--golden {directory}: no .npz file there")
    not_built = [file.name for file in files if file.name.startswith(METHODS_NOT_BUILT)]
    cases: list[GoldenCase] = []
    for file in files:
        if file.name in not_built:
            continue
        found: dict[str, dict[str, Tensor]] = {}
        with np.load(file) as content:
            for key in content.files:
                case, slash, array = key.rpartition("/")
                if not slash:
                    case, array = key, ""
                found.setdefault(case, {})[array] = torch.from_numpy(np.asarray(content[key]))
        cases += [GoldenCase(file.name, case, arrays) for case, arrays in found.items()]
    return Golden(directory, cases, not_built)
