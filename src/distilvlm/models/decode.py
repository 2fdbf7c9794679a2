"""Greedy decoding from embedded prompts: the stock models' `generate` would need an embedding row for `<image>`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlavaForConditionalGeneration

from .adaptors import Host


def next_logits(
    model: Any, embedded: Tensor, mask: Tensor, positions: Tensor, cache: Cache, forbidden: Collection[int]
) -> Tensor:
    """Logits of the token behind each row, [rows, V]: −inf where it is forbidden. The cache takes in what is read.

    Args:
        embedded: [rows, length, d]; mask: [rows, what the cache holds and length]; positions: [rows, length].
    """
    hidden = model.get_decoder()(
        inputs_embeds=embedded,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    ).last_hidden_state[:, -1]  # [rows, d]
    logits: Tensor = model.lm_head(hidden)
    logits[:, list(forbidden)] = -torch.inf
    return logits


@torch.no_grad()
def greedy(
    model: LlavaForConditionalGeneration,
    embedded: Tensor,
    attention_mask: Tensor,
    *,
    ends: Collection[int],
    forbidden: Sequence[int] = (),
    limit: int,
) -> list[list[int]]:
    """The likeliest next token, again and again; a row that has ended leaves the batch.

    A model with adaptors answers in its active workflow, or each row in its own (`Host.use`): to its end, the caller
    keeps that active.

    Args:
        embedded: [samples, length, d] prompts from `forward.embeddings`, left-padded.
        attention_mask: [samples, length] int64, 1 = real.
        ends: ids that end an answer.
        forbidden: ids that are never chosen.
        limit: tokens per answer at most.

    Returns:
        the new ids of each sample, without the one that ended it.
    """
    host = Host.of(model)
    with nullcontext() if host is None else host.use(host.active):  # rows that leave take their workflows along
        answers: list[list[int]] = [[] for _ in range(embedded.shape[0])]
        embed = model.get_input_embeddings()
        mask = attention_mask
        alive = list(range(embedded.shape[0]))  # sample of each row that is still in the batch
        cache = DynamicCache(config=model.config.get_text_config())
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # [rows, length]
        for step in range(limit):
            logits = next_logits(model, embedded, mask, positions, cache, forbidden)  # [rows, V]
            chosen = logits.argmax(dim=-1)  # [rows]
            staying: list[int] = []
            for row, token in enumerate(chosen.tolist()):
                if token not in ends:
                    answers[alive[row]].append(token)
                    staying.append(row)
            if not staying or step + 1 == limit:
                break
            if len(staying) < len(alive):
                rows = torch.tensor(staying, device=mask.device)
                cache.batch_select_indices(rows)
                if host is not None:
                    host.select(staying)
                chosen, mask = chosen[rows], mask[rows]
                alive = [alive[row] for row in staying]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = mask.sum(dim=1, keepdim=True) - 1  # [rows, 1]
            embedded = embed(chosen)[:, None]  # [rows, 1, d]
        return answers
