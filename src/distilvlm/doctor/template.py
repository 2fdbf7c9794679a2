"""What a conversation looks like to the student: which tokens are learned, and does it learn to stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from distilvlm.data import IGNORED, Encoded, Record, StageData, Template
from distilvlm.data.problems import RowError

from .finding import Finding

SAMPLED = 24
"""Rows of a template that are encoded."""

LONGEST = 240
"""Characters of one stretch of a drawing; longer ones lose their middle."""

OPEN, CLOSE = "⟦", "⟧"
"""Around what is learned, as in `data.explain`."""


@dataclass(frozen=True)
class _Example:
    record: Record
    encoded: Encoded
    rejected: Encoded | None  # of a pair


def check(data: Mapping[str, StageData]) -> list[Finding]:
    """Each template of the recipe once, by the first stage that uses it."""
    found: list[Finding] = []
    seen: set[str] = set()
    for stage_data in data.values():
        for kind, template in stage_data.templates.items():
            examples = [] if kind in seen else list(_examples(stage_data, kind))
            if not examples:
                continue
            seen.add(kind)
            names = [source.name for source in stage_data.sources if source.spec.template == kind]
            found += [_mask(template, names, examples), _end(template, names, examples), _drawn(stage_data, examples)]
    return [finding for finding in found if finding is not None]


def _examples(data: StageData, kind: str) -> Iterator[_Example]:
    """Evenly spread rows of the sources that use the template; those that can't be encoded are the rows' own affair."""
    kinds = {source.name: source.spec.template for source in data.sources}
    for index in spread(np.arange(len(data)), 4 * SAMPLED):
        record = data.record(index)
        if kinds[record.key.source] != kind:
            continue
        try:
            sequences = data.sequences(index)
        except RowError:
            continue
        yield _Example(record, sequences[0], sequences[1] if record.preferences == "pairs" else None)


def spread(indices: np.ndarray | Sequence[int], count: int) -> list[int]:
    """At most `count` of `indices`, evenly spaced, first and last included."""
    if len(indices) <= count:
        return [int(index) for index in indices]
    return [int(indices[place]) for place in np.linspace(0, len(indices) - 1, count).astype(int)]


def _mask(template: Template, names: list[str], examples: list[_Example]) -> Finding | None:
    if template.kind == "plain":  # a picture and its caption: there is nothing but the caption to learn
        return None
    for example in examples:
        ignored = example.encoded.labels == IGNORED
        ignored[example.encoded.placeholder_positions] = False
        ignored[: len(template.prefix)] = False
        if bool(ignored.any()):
            return None
    return Finding(
        "template.mask",
        "error",
        f"{template.renderer.name} has every token learned, the questions too",
        "put {% generation %} and {% endgeneration %} around answers only in the tokenizer's chat template, or set "
        + " and ".join(f"data.{name}.template: vicuna" for name in names),
    )


def _end(template: Template, names: list[str], examples: list[_Example]) -> Finding | None:
    if template.kind == "plain":
        return None
    if template.ends_turns:
        labels = examples[0].encoded.labels
        last = labels[labels != IGNORED][-1:].tolist()
        token = template.tokenizer.decode(last)
        return Finding("template.end", "ok", f"{template.kind}: an answer ends in {token!r}, which is learned")
    return Finding(
        "template.end",
        "warning",
        f"{template.renderer.name} teaches no end of turn: the student will not know when to stop",
        "write the end-of-turn token behind answers in the tokenizer's chat template, or set "
        + " and ".join(f"data.{name}.template: vicuna" for name in names),
    )


def _drawn(data: StageData, examples: list[_Example]) -> Finding:
    """The shortest of the examples that show most: a picture, and more than one answer."""

    def shows(example: _Example) -> tuple[bool, bool, int]:
        return not example.record.images, len(example.record.answers) < 2, len(example.encoded.input_ids)

    chosen = min(examples, key=shows)
    key = chosen.record.key
    template = next(source.spec.template for source in data.sources if source.name == key.source)
    tokenizer = data.templates[template].tokenizer
    drawing = draw(chosen.encoded, data.visual, tokenizer)
    if chosen.rejected is not None:
        drawing += f"\nand rejected:\n{draw(chosen.rejected, data.visual, tokenizer)}"
    head = f"{template}, data '{key.source}', row {key.row}: {chosen.encoded.learned} of "
    return Finding("template.picture", "ok", f"{head}{len(chosen.encoded.input_ids)} positions learned\n{drawing}")


def draw(encoded: Encoded, visual: Tensor, tokenizer: Any) -> str:
    """A sample in text: what is learned stands in ⟦ ⟧, a picture as `<image>×36` (registers apart), ↵ ends a line.

    visual: [placeholders] False for a register.
    """
    length = len(encoded.input_ids)
    kinds = np.where((encoded.labels != IGNORED).numpy(), 1, 0)  # 3 register, 2 picture, 1 learned, 0 neither
    positions = encoded.placeholder_positions.numpy()
    kinds[positions] = np.where(visual.repeat(len(positions) // len(visual)).numpy(), 2, 3)
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), length]
    pieces: list[str] = []
    for start, end in pairwise(borders):
        if kinds[start] >= 2:
            pieces.append(f"<{'image' if kinds[start] == 2 else 'register'}>×{end - start}")
            continue
        text = _shown(tokenizer.decode(encoded.input_ids[start:end].tolist(), clean_up_tokenization_spaces=False))
        pieces.append(f"{OPEN}{text}{CLOSE}" if kinds[start] == 1 else text)
    drawing = "".join(pieces)
    return drawing.replace(f"\n{CLOSE}", f"{CLOSE}\n").rstrip("\n")


def _shown(text: str) -> str:
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} … {text[-half:]}"
    return text.replace("\n", "↵\n")
