"""A batch whose rows come and go gives every row what it would get alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from distilvlm.data.template import SAFE_ID, Encoded
from distilvlm.models.vlm import VLM
from distilvlm.serve import cache
from distilvlm.serve.batch import Batch
from distilvlm.serve.sampling import Draw
from distilvlm.serve.served import Prompt

from . import small_models as tiny

WORKFLOWS = ["text", "seeing", "grounding"]


def prompt(seed: int, length: int, pictures: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (length + 4 * pictures,), generator=generator)
    places = torch.arange(4 * pictures) + 1
    ids[places] = SAFE_ID
    canvases = [torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8, generator=generator) for _ in range(pictures)]
    return Prompt(Encoded(ids, ids, places), tuple(canvases), Draw(0, 1, random.Random(0)), 99)


def alone(vlm: VLM, asked: Prompt, workflow: str, tokens: list[int]) -> list[Tensor]:
    """Logits after the prompt and after each of the tokens."""
    batch = Batch(vlm)
    read = batch.read([asked], [workflow])
    batch.join(read)
    return [read.logits[0], *(batch.step([token])[0] for token in tokens)]


@pytest.mark.parametrize(
    ("language", "adaptors"),
    [("llama", False), ("llama", True), ("sliding", False), ("sliding", True), ("sparse", False)],
)
@torch.no_grad()
def test_rows_get_what_they_get_alone(monkeypatch, language: str, adaptors: bool) -> None:
    monkeypatch.setattr(cache, "SPARE", 3)  # so that columns are laid out anew again and again
    monkeypatch.setattr(cache, "PLACES", 1)
    vlm, chance = tiny.vlm(language, adaptors), random.Random(1)
    batch, rows = Batch(vlm), []
    for turn in range(14):
        if turn % 2 == 0 and len(rows) < 6:
            lengths = [chance.choice([3, 5, 9, 40]) for _ in range(chance.choice([1, 2, 3]))]
            new = [prompt(100 * turn + n, length, n % 2) for n, length in enumerate(lengths)]
            names = [chance.choice(WORKFLOWS) if adaptors else "text" for _ in new]
            read = batch.read(new, names)
            batch.join(read)
            tokens = [[] for _ in new]
            rows += zip(new, names, tokens, [[row] for row in read.logits], strict=True)
        steps = [chance.randrange(256) for _ in rows]
        for (_, _, tokens, seen), token, logits in zip(rows, steps, batch.step(steps), strict=True):
            tokens.append(token)
            seen.append(logits)
        if turn % 3 == 2:
            order = batch.leave(chance.sample(range(len(rows)), chance.choice([1, len(rows) // 2])))
            for row in set(range(len(rows))) - set(order):
                check(vlm, *rows[row])
            rows = [rows[row] for row in order]
    assert len(rows) > 1
    for row in rows:
        check(vlm, *row)


def check(vlm: VLM, asked: Prompt, workflow: str, tokens: list[int], seen: list[Tensor]) -> None:
    torch.testing.assert_close(torch.stack(seen), torch.stack(alone(vlm, asked, workflow, tokens)), atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_a_row_left_behind_does_not_reach_the_next() -> None:
    vlm = tiny.vlm()
    batch = Batch(vlm)
    batch.join(batch.read([prompt(0, 30), prompt(1, 4)], ["text", "text"]))
    for layer in batch._cache.layers:
        layer.keys[0], layer.values[0] = torch.nan, torch.nan
    assert batch.leave([0]) == [1]
    other = prompt(2, 5)
    batch.join(batch.read([other], ["text"]))
    here = batch.step([7, 8])
    assert not here.isnan().any()
    torch.testing.assert_close(here[1], alone(vlm, other, "text", [8])[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_empty_batch_holds_no_memory() -> None:
    batch = Batch(tiny.vlm())
    batch.join(batch.read([prompt(0, 30)], ["text"]))
    assert batch.bytes > 0
    assert batch.leave([0]) == []
    assert batch.bytes == 0 and len(batch) == 0


@torch.no_grad()
def test_a_picture_that_was_seen_is_not_seen_again(monkeypatch) -> None:
    from distilvlm.serve import batch as module

    looked: list[int] = []
    real = module.vision_features
    monkeypatch.setattr(module, "vision_features", lambda *given: looked.append(len(given[2])) or real(*given))
    batch = Batch(tiny.vlm())
    first = batch.read([prompt(0, 5, 2), prompt(0, 5, 2)], ["text", "text"])
    again = batch.read([prompt(0, 5, 2)], ["text"])
    assert looked == [2]
    torch.testing.assert_close(first.logits[1:], again.logits, atol=1e-5, rtol=0)
