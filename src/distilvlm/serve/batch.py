"""The rows that a model decodes together, each in its workflow: reading prompts, taking a step, letting rows go."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from distilvlm.evaluate.generate import left_padded
from distilvlm.models.adaptors.slots import Workflow
from distilvlm.models.decode import next_logits
from distilvlm.models.forward import embeddings, hidden_states, vision_features
from distilvlm.models.vlm import VLM

from .cache import BatchCache
from .served import Prompt

PICTURES = 32
"""Pictures whose features are kept: every turn of a conversation shows its pictures again."""

PLACES = 64
"""Of a repeated prompt, whose logits are made at a time."""


@dataclass(frozen=True)
class Read:
    """Prompts that were read, apart from the batch.

    Attributes:
        logits: of each one's first token, [prompts, V].
        names: of their workflows.
        workflows: what a cache remembers of these (`Host.workflows`).
    """

    logits: Tensor
    cache: DynamicCache
    lengths: list[int]
    names: list[str]
    workflows: tuple[Workflow, ...]


class Batch:
    """What runs on the model, and nothing of who asked. For one thread.

    Args:
        vlm: in evaluation mode.
    """

    def __init__(self, vlm: VLM) -> None:
        self._vlm = vlm
        self._cache = BatchCache(vlm.host)
        self._workflows: list[str] = []  # of each row
        self._seen: OrderedDict[bytes, Tensor] = OrderedDict()  # canvas → features [placeholders, d_vision]
        # Of a model whose `<image>` has a row, and so a logit.
        self._forbidden = [] if vlm.image_id_is_virtual else [vlm.image_id]

    def __len__(self) -> int:
        return len(self._workflows)

    @property
    def bytes(self) -> int:
        """What keys and values take."""
        return self._cache.bytes

    def read(self, prompts: Sequence[Prompt], names: Sequence[str]) -> Read:
        """Read prompts, each in the workflow of its name; the batch stays as it is."""
        features = self._features([canvas for prompt in prompts for canvas in prompt.canvases])
        rows = left_padded([prompt.encoded for prompt in prompts], self._vlm.model.device)
        read = DynamicCache(config=self._vlm.model.config.get_text_config())
        with self._active(names) as workflows:
            embedded = embeddings(self._vlm.model, self._vlm.layout, rows, features)
            positions = (rows.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = self._logits(embedded, rows.attention_mask, positions, read)
        return Read(logits, read, [prompt.length for prompt in prompts], list(names), workflows)

    def known(self, prompt: Prompt, name: str) -> Iterator[Tensor]:
        """What the model expected at each place of a prompt but its first: logits [V], one after the other."""
        rows = left_padded([prompt.encoded], self._vlm.model.device)
        with self._active([name]):
            features = self._features(prompt.canvases)
            hidden = hidden_states(self._vlm.model, self._vlm.layout, rows, features)[0, :-1]  # [length - 1, d]
        for some in hidden.split(PLACES):
            logits = self._vlm.model.lm_head(some)  # [PLACES, V]
            logits[:, self._forbidden] = -torch.inf
            yield from logits

    def join(self, read: Read) -> None:
        """Take in what was read, as the last rows."""
        self._cache.join(read.cache, read.lengths, read.workflows)
        self._workflows += read.names

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one token per row; gives logits of the next ones, [rows, V]."""
        mask, positions = (given.to(self._vlm.model.device) for given in self._cache.step())
        with self._active(self._workflows):
            read = torch.tensor(tokens, device=self._vlm.model.device)[:, None]  # [rows, 1]
            embedded = self._vlm.model.get_input_embeddings()(read)
            logits = self._logits(embedded, mask, positions, self._cache)
        self._cache.stepped()
        return logits

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Let rows go. Gives those that stay, in their new order: the last ones take the places that are free."""
        order = list(range(len(self)))
        for row in sorted(rows, reverse=True):
            last = order.pop()
            if row < len(order):
                order[row] = last
        self._cache.keep(order)
        self._workflows = [self._workflows[row] for row in order]
        return order

    def _logits(self, embedded: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | BatchCache) -> Tensor:
        return next_logits(self._vlm.model, embedded, mask, positions, cache, self._forbidden)

    def _features(self, canvases: Sequence[Tensor]) -> Tensor | None:
        """[canvases, placeholders, d_vision]; None without any. Those of a canvas that was seen lately are kept."""
        if not canvases:
            return None
        keys = [hashlib.sha256(canvas.numpy().tobytes()).digest() for canvas in canvases]
        new = {key: canvas for key, canvas in zip(keys, canvases, strict=True) if key not in self._seen}
        if new:
            shown = torch.stack(list(new.values())).to(self._vlm.model.device)
            self._seen |= zip(new, vision_features(self._vlm.model, self._vlm.layout, shown), strict=True)
        for key in keys:
            self._seen.move_to_end(key)
        features = torch.stack([self._seen[key] for key in keys])
        while len(self._seen) > PICTURES:
            self._seen.popitem(last=False)
        return features

    @contextmanager
    def _active(self, workflows: Sequence[str]) -> Iterator[tuple[Workflow, ...]]:
        """Inside, each row runs in its workflow; what a cache remembers of them, nothing without adaptors."""
        if self._vlm.host is None:
            yield ()
            return
        with self._vlm.host.use(workflows):
            yield self._vlm.host.workflows
