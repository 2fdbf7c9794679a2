"""What made a run: the command, the machine, the versions. Written when it starts and when it ends."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilvlm.data import DataReport
from distilvlm.models.alone import Encoder
from distilvlm.models.files import write_whole
from distilvlm.models.parts import by_leaf, sizes
from distilvlm.models.upcycling import upcycled_layers
from distilvlm.models.vlm import VLM
from distilvlm.recipe import StageSpec

from .directory import recalled

PACKAGES = ("distilvlm", "torch", "transformers", "accelerate")


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, and the device that trains."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def in_words(facts: dict[str, Any]) -> str:
    """'Intel(R) Xeon(R) Processor, 2 CPU cores, 24 GB, no GPU'."""
    device = "no GPU" if facts["device"] == "cpu" else facts["device"]
    return f"{facts['processor']}, {facts['cores']} CPU cores, {facts['memory_bytes'] / 2**30:.0f} GB, {device}"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def command() -> list[str]:
    """As it was typed, with the program's name instead of its path."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def typed(words: list[str]) -> str:
    return shlex.join(words)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def begin(file: Path, processes: int) -> None:
    """Record the start; a continued run keeps the first start and adds its command."""
    earlier = recalled(file) or {"started": now(), "commands": []}
    entry = {"at": now(), "command": command()}
    content = {
        "command": command(),
        "started": earlier["started"],
        "finished": None,
        "commands": [*earlier["commands"], entry],
        "machine": machine(),
        "versions": versions(),
        "processes": processes,
    }
    _write(file, content)


def end(file: Path) -> None:
    """Record that the run is finished, the first time that it is seen to be."""
    content = recalled(file) or {}  # a run of a version that kept no record
    if content and content["finished"] is None:
        _write(file, content | {"finished": now()})


def stage(
    file: Path,
    spec: StageSpec,
    student: VLM | Encoder,
    trains: Mapping[str, Mapping[str, nn.Parameter]],
    report: DataReport,
    updates: int,
) -> None:
    """Record what a stage trains (part -> its parameters) of which student, on what, for how many updates, against
    what."""
    parameters, active = sizes(student.model)
    content = {
        "stage": spec.name,
        "transform": [transform.model_dump() for transform in spec.transform],
        "student": {
            "parameters": parameters,
            "active_parameters": active,
            "sparse_layers": upcycled_layers(student.model.config),
        },
        "trains": {
            part: {
                "parameters": sum(parameter.numel() for parameter in members.values()),
                "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in members.values()})),
            }
            for part, members in trains.items()
        },
        "data": report.as_json()["sources"],
        "updates": updates,
        "terms": spec.loss.weights,
    }
    _write(file, content | adaptors(student))


def adaptors(student: VLM | Encoder) -> dict[str, Any]:
    """What a student's adaptors are, and the base that they leave as it is; nothing of one without any."""
    host = student.host
    if not isinstance(student, VLM) or host is None or not student.adaptors:
        return {}
    parts = {leaf: members for leaf, members in by_leaf(student.model).items() if leaf.startswith("adaptor.")}
    return {
        "adaptors": {
            "active": student.workflow,
            "structure": host[student.workflow].config.structure,
            "positions": list(host[student.workflow].config.positions),
            "parts": {
                leaf.removeprefix("adaptor."): sum(parameter.numel() for parameter in members.values())
                for leaf, members in parts.items()
                if leaf != "adaptor.idle"
            },
            "bytes": {name: host.bytes(name) for name in (*student.adaptors, "text")},
        }
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())


def _processor() -> str:
    """Its name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
