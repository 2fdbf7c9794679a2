"""What one of several processes holds of a student, and of a teacher that they split.

Counted as `train/parallel.py` has it. Under `machine.parallel: fsdp` every language layer is split for itself, all else
together, a tower that does not train not at all; by rows, so the first process holds most, and all figures are its.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from distilvlm.models import forward
from distilvlm.models.alone import Encoder
from distilvlm.models.vlm import VLM
from distilvlm.recipe.schema import MachineSpec
from distilvlm.train.rows import most

from .memory import count, parameter_bytes
from .numbers import as_bytes


@dataclass(frozen=True)
class Sharing:
    """A student in one of so many processes while it trains `members`; all sizes are bytes.

    Args:
        student: may be without weights.
        members: part -> name -> parameter of what trains.
        device: where it trains.
    """

    student: VLM | Encoder
    members: Mapping[str, Mapping[str, nn.Parameter]]
    machine: MachineSpec
    processes: int
    device: torch.device

    @property
    def split(self) -> bool:
        """Whether a process holds rows of the student, and not all of it."""
        return self.machine.parallel == "fsdp" and self.processes > 1

    @property
    def trees(self) -> list[int]:
        """Weights and buffers on the device between micro-batches: of the stock model, and of adaptors beside it."""
        if not self.split:
            return [parameter_bytes(tree, torch.float32) for tree in self.student.trees]
        rows = [0] * len(self.student.trees) if self._away else [self._rows(tree) for tree in self.student.trees]
        return [own + self._whole(tree) for own, tree in zip(rows, self.student.trees, strict=True)]

    @property
    def gradients(self) -> int:
        """On the device, when an update is made."""
        return 0 if self._away else self._gradients

    @property
    def waiting(self) -> int:
        """Weights, gradients and moments in the CPU's memory, where training is elsewhere."""
        return sum(map(self._rows, self.student.trees)) + 3 * self._gradients if self._away else 0

    @property
    def notes(self) -> list[str]:
        return [f"each process has {as_bytes(self.waiting)} more in the CPU's memory"] if self.waiting else []

    def beside(self, working: int, runs: bool = True) -> dict[str, int]:
        """What several processes need beside all that when a micro-batch takes most: buckets, in which DDP adds
        gradients up, or what FSDP2 has gathered.

        Args:
            working: what the micro-batch takes; where the student is split, with the gradients outside of its layers.
            runs: whether the language model's layers do; else none of them is gathered.
        """
        if self.processes == 1:
            return {}
        if not self.split:
            return {"buckets": self._gradients}
        inside = {id(p) for layer in self._layers for p in layer.parameters()}
        tensors = {id(p): p for tree in self.student.trees for p in tree.parameters()}
        apart = {key: 4 * p.numel() for key, p in tensors.items() if key not in inside | self._frozen}
        size = 2 if self.machine.precision == "bf16" else 4
        layers = [0]
        for layer in self._layers if runs else ():
            # Its weights and the next one's, or the buffer that they come in; gradients, and the one that adds them up.
            trained = sum(p.numel() for p in layer.parameters() if id(p) in self._trained)
            layers.append(2 * size * sum(p.numel() for p in layer.parameters()) + (size + 4) * trained)
        # Behind all layers the other gradients are in such a buffer, too, and little else is there.
        last = 2 * sum(each for key, each in apart.items() if key in self._trained) - working
        return {"gathered": sum(apart.values()) + max(*layers, last)}

    @property
    def _away(self) -> bool:
        return self.split and self.machine.offload and self.device.type != "cpu"

    @property
    def _gradients(self) -> int:
        if not self.split:
            return 4 * count(self.members)
        return sum(4 * most(p.shape, self.processes) for part in self.members.values() for p in part.values())

    def _rows(self, tree: nn.Module) -> int:
        return sum(4 * most(p.shape, self.processes) for p in tree.parameters() if id(p) not in self._frozen)

    def _whole(self, tree: nn.Module) -> int:
        frozen = sum(4 * p.numel() for p in tree.parameters() if id(p) in self._frozen)
        return frozen + sum(buffer.nbytes for buffer in tree.buffers())

    @property
    def _layers(self) -> list[nn.Module]:
        return [] if isinstance(self.student, Encoder) else forward.layers(self.student.model)

    @property
    def _trained(self) -> set[int]:
        return {id(p) for part in self.members.values() for p in part.values()}

    @property
    def _frozen(self) -> set[int]:
        """A tower of which nothing trains."""
        tower = {id(p) for p in self.student.model.model.vision_tower.parameters()}  # pyright: ignore
        return set() if tower & self._trained else tower


@dataclass(frozen=True)
class SplitTeacher:
    """A teacher whose layers are split over processes (`machine.shard_teacher`), in bytes."""

    saved: int  # that each process holds less
    gathered: int  # of layers that are whole at once: the one that runs and the next

    @staticmethod
    def of(teacher: VLM, dtype: torch.dtype, processes: int) -> SplitTeacher:
        layers = [list(layer.parameters()) for layer in forward.layers(teacher.model)]
        saved = sum(p.numel() - most(p.shape, processes) for layer in layers for p in layer)
        most_of_one = max(sum(p.numel() for p in layer) for layer in layers)
        return SplitTeacher(dtype.itemsize * saved, dtype.itemsize * 2 * most_of_one)
