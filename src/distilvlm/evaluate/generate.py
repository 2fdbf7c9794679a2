"""Answers of a VLM: greedy, in batches, the same text whatever the size of the batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distilvlm.data.batch import IGNORED, BadRow, SampleKey
from distilvlm.data.geometry import Geometry, PictureError, canvas, decode
from distilvlm.data.problems import RowError, raise_or_quarantine
from distilvlm.data.records import Record, Turn
from distilvlm.data.stage import background
from distilvlm.data.template import SAFE_ID, Encoded, Kind, Template
from distilvlm.models.decode import greedy
from distilvlm.models.features import FeatureError
from distilvlm.models.forward import embeddings, vision_features
from distilvlm.models.onednn import faster_linear
from distilvlm.models.vlm import VLM

Features = Callable[[str], Tensor]
"""Picture file → kept features [placeholders, d_vision]; the `reader()` of a feature store."""


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts of a batch, as `models.forward` wants its rows."""

    input_ids: Tensor  # [samples, length] int64
    attention_mask: Tensor  # [samples, length] int64
    placeholder_rows: Tensor  # [pictures * placeholders] int64, flat
    sizes: None = None  # each is a line of its own


def answer(
    vlm: VLM,
    records: Sequence[Record],
    template: Kind,
    geometry: Geometry,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    features: Features | None = None,
    bad: list[BadRow] | None = None,
    progress: Callable[[int, int], object] | None = None,
    workflows: Sequence[str] | None = None,
    said: Callable[[int, str], object] | None = None,
) -> list[str]:
    """The model's answer to each record, in the records' order, without space at its ends.

    The prompt is the record up to its last answer, which is left out before anything is tokenised. Decoding is greedy,
    never chooses `<image>`, and stops at the end of turn that the template teaches, at the end of text, and with the
    `plain` template at the end of the line.

    Args:
        template, geometry: as in the model's training.
        max_new_tokens: where an answer that does not end is cut.
        features: kept features of the vision tower; None decodes the pictures and runs the tower.
        bad: where given, records that can't be used are added here and answered with "" instead of raising.
        progress: called with the number of records answered and their total.
        workflows: of a model with adaptors, the one that answers each record; a batch may mix them. Default: all by the
            active one.
        said: called with the number of each record and its answer, as soon as that is known.

    Raises:
        DataError: names file and row of a record that the template refuses, whose prompt is longer than the model's
            context, or whose picture can't be read.
    """
    written = Template.of(template, vlm.tokenizer)
    ends = ends_of(written, vlm)
    forbidden = [] if vlm.image_id_is_virtual else [vlm.image_id]
    rejected: list[BadRow] = []
    prompts = _prompts(written, records, vlm, rejected)
    answers = [""] * len(records)
    # The longest first: a batch that does not fit into memory fails at once, and padding stays short.
    order = sorted(prompts, key=lambda index: (-len(prompts[index].input_ids), records[index].images, index))
    with evaluating(vlm), faster_linear(vlm), torch.no_grad(), _Pictures(vlm, geometry, features) as pictures:
        for start in range(0, len(order), batch_size):
            _raise_unless(bad is not None, rejected)
            batch = pictures.load(order[start : start + batch_size], records, rejected)
            if batch:
                rows = left_padded([prompts[index] for index in batch], pictures.device)
                shown = pictures.features([path for index in batch for path in records[index].images])
                with _answering(vlm, None if workflows is None else [workflows[index] for index in batch]):
                    embedded = embeddings(vlm.model, vlm.layout, rows, shown)
                    new = greedy(
                        vlm.model, embedded, rows.attention_mask, ends=ends, forbidden=forbidden, limit=max_new_tokens
                    )
                for index, ids in zip(batch, new, strict=True):
                    answers[index] = written.tokenizer.decode(ids, skip_special_tokens=True).strip()
                    if said is not None:
                        said(index, answers[index])
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    _raise_unless(bad is not None, rejected)
    if bad is not None:
        bad += rejected
    return answers


class _Pictures:
    """What a batch shows: pictures are loaded by threads, once for all records of the batch that show them."""

    def __init__(self, vlm: VLM, geometry: Geometry, kept: Features | None) -> None:
        self._vlm = vlm
        self._geometry: Geometry = geometry
        self._kept = kept
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._loaded: dict[str, Tensor] = {}  # canvases [3, size, size], or kept features [placeholders, d_vision]
        self.device = vlm.model.device

    def __enter__(self) -> _Pictures:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def load(self, batch: list[int], records: Sequence[Record], rejected: list[BadRow]) -> list[int]:
        """Load what the batch's records show; returns the records all of whose pictures can be read."""
        paths = sorted({path for index in batch for path in records[index].images})
        found = dict(zip(paths, self._threads.map(self._read, paths), strict=True))
        self._loaded = {path: value for path, value in found.items() if isinstance(value, Tensor)}
        readable: list[int] = []
        for index in batch:
            missing = [path for path in records[index].images if path not in self._loaded]
            if missing:
                rejected.append(BadRow(records[index].key, "image", str(found[missing[0]])))
            else:
                readable.append(index)
        return readable

    def features(self, shown: Sequence[str]) -> Tensor | None:
        """[shown, placeholders, d_vision] of the pictures in this order; None without pictures."""
        if not shown:
            return None
        paths = sorted(set(shown))
        each = torch.stack([self._loaded[path] for path in paths]).to(self.device)
        if self._kept is None:
            each = vision_features(self._vlm.model, self._vlm.layout, each)
        return each[torch.tensor([paths.index(path) for path in shown], device=self.device)]

    def _read(self, path: str) -> Tensor | Exception:
        try:
            if self._kept is not None:
                return self._kept(path)
            return canvas(decode(path), self._geometry, self._vlm.layout.size, background(self._vlm.layout))
        except (PictureError, FeatureError) as error:
            return error


def _prompts(written: Template, records: Sequence[Record], vlm: VLM, rejected: list[BadRow]) -> dict[int, Encoded]:
    """Record number → its prompt, for every record that has one."""
    context: int | None = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
    prompts: dict[int, Encoded] = {}
    for index, record in enumerate(records):
        # The true answer must not stand there when the prompt is tokenised: whether its first token takes the space
        # before it would show in the prompt.
        answered = bool(record.turns) and record.turns[-1].role == "assistant"
        asked = replace(record, turns=record.turns[:-1]) if answered else record
        try:
            prompt = written.prompt(asked, vlm.layout.placeholders)
            length = len(prompt.input_ids)
            if context is not None and length > context:
                raise RowError("conversation", f"{length} positions are more than the model's context of {context}")
        except RowError as error:
            rejected.append(BadRow(record.key, error.field, error.reason))
        else:
            prompts[index] = prompt
    return prompts


def _raise_unless(collected: bool, rejected: Sequence[BadRow]) -> None:
    if rejected and not collected:
        raise_or_quarantine(list(dict.fromkeys(rejected)), "fatal")


def ends_of_text(vlm: VLM) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and those that the model's settings name."""
    tokenizer: Any = vlm.tokenizer
    settings = vlm.model.generation_config
    configured: int | list[int] | None = settings.eos_token_id if settings else None  # pyright: ignore
    ends = {configured} if isinstance(configured, int) else set(configured or ())
    return frozenset(ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id})


def ends_of(written: Template, vlm: VLM) -> frozenset[int]:
    """Ids that end an answer: those of a text, the end of a turn, and with `plain` the end of a line."""
    tokenizer = written.tokenizer
    ends = set(ends_of_text(vlm))
    if written.ends_turns:
        probe = Record(SampleKey("", "", 0), "", (), (Turn("user", "question"), Turn("assistant", "answer")))
        taught = written.encode(probe, 1, sys.maxsize)
        ends.add(int(taught.input_ids[taught.labels != IGNORED][-1]))
    elif written.kind == "plain":
        tokens = tokenizer.batch_decode([[id] for id in range(len(tokenizer))])
        ends |= {id for id, text in enumerate(tokens) if "\n" in text}
    return frozenset(ends)


def left_padded(prompts: Sequence[Encoded], device: torch.device) -> Prompts:
    """Prompts as the rows of one batch, all ending at its last position."""
    length = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.full((len(prompts), length), SAFE_ID, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    places: list[Tensor] = []
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.input_ids)
        ids[row, start:] = prompt.input_ids
        mask[row, start:] = 1
        places.append(row * length + start + prompt.placeholder_positions)
    return Prompts(ids.to(device), mask.to(device), torch.cat(places).to(device))


def _answering(vlm: VLM, workflows: list[str] | None) -> AbstractContextManager[object]:
    """Inside, each row of a batch goes through its workflow."""
    if workflows is None:
        return nullcontext()
    if vlm.host is None:
        raise ValueError("workflows are of a model with adaptors, and this one has none")
    alike = len(set(workflows)) == 1
    return vlm.host.use(workflows[0] if alike else workflows)


@contextmanager
def evaluating(vlm: VLM) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards as it was."""
    modes = [(module, module.training) for tree in vlm.trees for module in tree.modules()]
    vlm.train(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
