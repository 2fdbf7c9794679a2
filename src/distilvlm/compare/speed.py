"""How fast a model answers and in how much memory, measured now; what was measured of the same weights is read back."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from distilvlm.cost.meter import Meter, give_back, resident_bytes
from distilvlm.data.batch import SampleKey
from distilvlm.data.records import PICTURE, Record, Turn
from distilvlm.data.template import Template
from distilvlm.evaluate.generate import evaluating, left_padded
from distilvlm.models.decode import greedy
from distilvlm.models.files import MANIFEST, write_whole
from distilvlm.models.forward import embeddings, vision_features
from distilvlm.models.save import load
from distilvlm.models.vlm import VLM
from distilvlm.runs import about

from .prepare import content

TOKENS = 32
"""New tokens of each answer: none ends before."""

TOGETHER = 16
"""Answers of the second measurement."""

ROUNDS = 3
"""Timed, behind one that warms up."""


@dataclass(frozen=True)
class Answering:
    """What answering takes: a picture and a short question each, read and answered with `tokens` new tokens.

    Attributes:
        tokens_per_second: new tokens of one answer at a time, its picture and prompt within the time.
        together_per_second: of `together` answers at a time, all of them.
        peak_memory_bytes: at most while one is answered, above what the process held without the model; on a GPU what
            torch allocated there.
    """

    tokens_per_second: float
    together_per_second: float
    together: int
    tokens: int
    peak_memory_bytes: int | None
    precision: str
    machine: str
    date: str


def answering_of(model: Path, kept: Path, measure: bool, precision: str = "fp32") -> Answering | None:
    """What was measured of these very weights in this precision and lies in `kept`; else measured now, and kept there,
    if that is wanted; else None."""
    stamp = {"model": content(_identity(model)), "precision": precision}
    if kept.is_file() and (told := json.loads(kept.read_text()))["of"] == stamp:
        return Answering(**told["answering"])
    if not measure:
        return None
    found = measured(model, precision)
    write_whole(kept, (json.dumps({"of": stamp, "answering": asdict(found)}, indent=1) + "\n").encode())
    return found


def measured(model: Path, precision: str = "fp32") -> Answering:
    """Load a model and let it answer: medians of a few rounds behind one that warms up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    give_back()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident_bytes()
    with Meter(device) as meter:
        vlm = load(model, torch.bfloat16 if precision == "bf16" else torch.float32).use(None).to(device)
        alone = _rate(vlm, 1)
    peak = meter.measured().peak_memory_bytes
    together = _rate(vlm, TOGETHER)
    return Answering(
        tokens_per_second=round(alone, 2),
        together_per_second=round(together, 2),
        together=TOGETHER,
        tokens=TOKENS,
        peak_memory_bytes=None if peak is None else max(0, peak - before),
        precision=precision,
        machine=about.in_words(about.machine()),
        date=datetime.now(UTC).date().isoformat(),
    )


def _rate(vlm: VLM, rows: int) -> float:
    """New tokens a second of so many answers at a time."""
    tokenizer: Any = vlm.tokenizer
    written = Template.of("chat" if tokenizer.chat_template else "plain", tokenizer)
    turns = (Turn("user", f"{PICTURE}\nDescribe this picture."),)
    prompt = written.prompt(Record(SampleKey("", "", 0), "", ("",), turns), vlm.layout.placeholders)
    size, device = vlm.layout.size, vlm.model.device
    canvases = torch.zeros(rows, 3, size, size, dtype=torch.uint8, device=device)

    def answer() -> None:
        batch = left_padded([prompt] * rows, device)
        shown = vision_features(vlm.model, vlm.layout, canvases)
        embedded = embeddings(vlm.model, vlm.layout, batch, shown)
        greedy(vlm.model, embedded, batch.attention_mask, ends=(), limit=TOKENS)
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds: list[float] = []
    with evaluating(vlm), torch.no_grad():
        for _ in range(1 + ROUNDS):
            start = time.perf_counter()
            answer()
            seconds.append(time.perf_counter() - start)
    return rows * TOKENS / statistics.median(seconds[1:])


def _identity(model: Path) -> Path:
    """The file that changes with the weights, or the directory whose files' sizes do."""
    manifest = model / MANIFEST
    return manifest if manifest.is_file() else model
