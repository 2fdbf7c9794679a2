"""What a teacher's weights are, without loading it again: their hash, remembered for as long as its files stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache

from distilvlm.models.files import write_whole
from distilvlm.models.shards import read_json
from distilvlm.models.sources import host_facts
from distilvlm.recipe.models import ModelSpec, TeacherSpec


def remembered(file: Path, spec: TeacherSpec, seed: int, compute: Callable[[], str]) -> str:
    """The hash of a teacher's weights: what `file` has for its sources as they are now, or what `compute` gives."""
    facts: list[Any] = [spec.model_dump(mode="json", include=set(ModelSpec.model_fields)), seed, spec.precision]
    facts += [torch.__version__, transformers.__version__]  # random parts are drawn, and files read, by these
    sources = [part for part in _sources(facts[0]) if part is not None]
    states = [_state(source) for source in sources]
    key = hashlib.sha256(json.dumps([facts, states]).encode()).hexdigest()
    known: dict[str, str] = read_json(file, {})
    if key not in known or None in states:
        known |= {key: compute()}
        write_whole(file, json.dumps(known, indent=1).encode())
    return known[key]


def _sources(facts: Any) -> Iterator[str]:
    """Directories and hub ids that a model's description names, those of a directory of adaptors included."""
    if isinstance(facts, dict):
        for name, value in facts.items():
            if name in ("source", "from", "tokenizer") and isinstance(value, str):
                yield value
                yield from _sources(host_facts(value))
            else:
                yield from _sources(value)


def _state(source: str) -> list[Any] | None:
    """What a change of a directory's files shows in; None where it can't be told."""
    directory = Path(source).expanduser()
    if not directory.is_dir():
        found = try_to_load_from_cache(source, "config.json")  # its path names the revision
        return [str(found)] if isinstance(found, str) else None
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
