"""Tiny random language models to insert adaptors into, with weights that differ from what classes start with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distilvlm.models.adaptors import AdaptorConfig, Host

SIZE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}  # the last two of four slide

HOSTS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE)),
    "qwen2-sliding": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE, **WINDOW)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=6, tie_word_embeddings=True)),
}

PLACES = (0, 2, 3)


def model(kind: str = "llama", seed: int = 0) -> Any:
    """A model in evaluation mode; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = HOSTS[kind]()
    disturb(made.parameters(), seed)
    return made.eval()


def disturb(parameters: Iterable[nn.Parameter], seed: int = 0, by: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_((torch.randn(parameter.shape, generator=generator) * by).to(parameter.dtype))


def host(kind: str = "llama", **adaptors: AdaptorConfig) -> Host:
    """A host with adaptors that look trained; default: 'seeing' of structure (c) and 'pointing' of (a)."""
    made = Host.attach(model(kind))
    wanted = adaptors or {
        "seeing": AdaptorConfig(positions=PLACES),
        "pointing": AdaptorConfig(positions=(1, 3), structure="a"),
    }
    for seed, (name, config) in enumerate(wanted.items(), 5):
        disturb(made.add(name, config).parameters(), seed)
    return made


def ids(rows: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, SIZE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(host: Host, workflow: str | list[str], given: Tensor, **options: Any) -> Tensor:
    with torch.no_grad(), host.use(workflow):
        return host.model(input_ids=given, **options).logits


def greedy(host: Host, workflow: str | list[str], given: Tensor, new: int = 6, **options: Any) -> Tensor:
    """The new tokens, [rows, new]."""
    mask = options.pop("attention_mask", torch.ones_like(given))
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    with host.use(workflow):
        out: Any = host.model.generate(given, attention_mask=mask, generation_config=settings)
    return out[:, given.shape[1] :]
