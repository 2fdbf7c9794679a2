"""Which experts serve a token, and the router that says so in a stock sparse block.

A gate's logits z and probabilities p = softmax(z) are over all experts, in fp32 also under bf16 autocast. A token's
first choice is argmax p, further ones are the next best; their probabilities are renormalised to sum to 1. That is
Hugging Face's `norm_topk_prob`, and what LLaVA-MoD's gate does without its noise and without dropping (specification
§1.3). In training only, further choices may be drawn (Gumbel noise on z) and experts may have a capacity: what comes
too late is dropped, and the rest renormalised. Evaluation is deterministic and drops nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from .experts import IMPLEMENTATION

SecondExpert = Literal["argmax", "gumbel"]


@dataclass(frozen=True)
class Routing:
    """Where a layer's tokens go."""

    probabilities: Tensor  # [tokens, experts] fp32, with gradient
    experts: Tensor  # [tokens, k] int64, the first choice first
    weights: Tensor  # [tokens, k] fp32, with gradient; 0 where dropped
    dropped: Tensor | None  # [tokens, k] bool; None where experts have no capacity


def route(
    logits: Tensor,
    top_k: int,
    noise: Tensor | None = None,
    capacity: float | None = None,
    real: Tensor | None = None,
) -> Routing:
    """Choose `top_k` experts for every token.

    Args:
        logits: [tokens, experts].
        noise: [tokens, experts] added to the logits for all choices but the first.
        capacity: each expert takes `places` tokens: all first choices in the order of the tokens, then all second ones.
            None drops nothing.
        real: [tokens] bool; others neither fill a queue nor count as tokens. None: all are real.
    """
    logits = logits.float()
    probabilities = logits.softmax(-1)
    first = probabilities.argmax(-1, keepdim=True)  # [tokens, 1]
    ordered = logits.detach() if noise is None else logits.detach() + noise
    others = ordered.scatter(1, first, -math.inf).topk(top_k - 1, dim=-1).indices
    experts = torch.cat([first, others], dim=1)  # [tokens, k]
    weights = probabilities.gather(1, experts)
    dropped = None
    if capacity is not None:
        dropped = _late(experts, logits.shape[1], capacity, real)
        weights = weights.masked_fill(dropped, 0)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
    return Routing(probabilities, experts, weights, dropped)


def places(tokens: int, experts: int, top_k: int, capacity: float) -> int:
    """How many tokens an expert takes: ⌈tokens / experts · top_k · capacity⌉.

    In fp32, as in DeepSpeed: in float64, 5 · 2 · 1.1 is a little more than 11 and would be 12.
    """
    return math.ceil(np.float32(tokens / experts) * np.float32(top_k * capacity))


def _late(experts: Tensor, count: int, capacity: float, real: Tensor | None) -> Tensor:
    """Which choices find their expert full, [tokens, k]."""
    tokens, top_k = experts.shape
    queued = nn.functional.one_hot(experts.T.flatten(), count)  # [k * tokens, experts]
    if real is not None:
        tokens = int(real.sum())
        queued = queued * real.repeat(top_k).unsqueeze(1)
    queue = (queued.cumsum(0) - 1).gather(1, experts.T.reshape(-1, 1)).view(top_k, -1).T  # [tokens, k]
    late = queue >= places(tokens, count, top_k, capacity)
    return late if real is None else late & real.unsqueeze(1)


def gumbel(like: Tensor) -> Tensor:
    """Noise from Gumbel(0, 1): the largest of logits with it is a draw by their softmax.

    From the global generator, as dropout: a checkpoint of a run keeps its state.
    """
    return -torch.empty_like(like).exponential_().log()


class Router(nn.Module):
    """Stands in the place of a stock block's gate, and has its one weight.

    Args:
        weight: [experts, d], the stock gate's own parameter.
        top_k: experts per token.
    """

    def __init__(self, weight: nn.Parameter, top_k: int) -> None:
        super().__init__()
        self.weight = weight
        self.top_k = top_k
        self.second_expert: SecondExpert = "argmax"
        self.capacity: float | None = None
        self._seen: list[Routing] | None = None
        self._real: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[tokens, d] → logits [tokens, experts], weights and experts [tokens, k], as the stock gate gives them."""
        hidden_states = hidden_states.reshape(-1, self.weight.shape[1])
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        noise = None
        if self.training and self.second_expert == "gumbel":
            noise = gumbel(logits)
        routing = route(logits, self.top_k, noise, self.capacity if self.training else None, self._real)
        if self._seen is not None:
            self._seen.append(routing)
        return logits, routing.weights.to(hidden_states.dtype), routing.experts


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its layers; none in a dense one."""
    return [module for module in model.modules() if isinstance(module, Router)]


def install(model: nn.Module, second_expert: SecondExpert = "argmax", capacity: float | None = None) -> list[Router]:
    """Put a `Router` into every stock sparse block that has none yet, and set how it chooses in training; experts
    multiply by `experts.forward`."""
    for block in model.modules():
        if isinstance(block, Qwen2MoeSparseMoeBlock) and not isinstance(block.gate, Router):
            if not block.gate.norm_topk_prob:
                raise ValueError(
                    "this sparse model does not renormalise the weights of its experts (norm_topk_prob: false): "
                    "only upcycled models can be trained"
                )
            block.gate = Router(block.gate.weight, block.gate.top_k).train(block.training)  # pyright: ignore
    found = routers(model)
    for router in found:
        router.second_expert, router.capacity = second_expert, capacity
    if found and isinstance(model, PreTrainedModel):
        model.set_experts_implementation(IMPLEMENTATION)
    return found


@dataclass(frozen=True)
class LayerUse:
    """How a sparse layer was used by the tokens of an update."""

    load: list[float]  # share of all choices that each expert served
    entropy: float  # of the router's probabilities, in nats, mean over tokens; log(experts) at most
    dropped: float  # share of all choices that found their expert full


def tallied(seen: Sequence[Routing], real: Tensor) -> Tensor:
    """What `used` needs, as sums that add up over micro-batches and processes: [layers, experts + 3], detached.

    Args:
        real: [tokens] bool, which are no padding.
    """
    rows: list[Tensor] = []
    for routing in seen:
        probabilities = routing.probabilities.detach()
        chosen = nn.functional.one_hot(routing.experts, probabilities.shape[1])  # [tokens, k, experts]
        late = torch.zeros_like(routing.experts, dtype=torch.bool) if routing.dropped is None else routing.dropped
        served = chosen * (~late & real.unsqueeze(1)).unsqueeze(-1)
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(-1)
        sums = (entropy * real).sum(), (late & real.unsqueeze(1)).sum(), real.sum() * routing.experts.shape[1]
        rows.append(torch.cat([served.sum((0, 1)).double(), torch.stack([value.double() for value in sums])]))
    return torch.stack(rows)


def used(tallies: Tensor, top_k: int) -> list[LayerUse]:
    """The layers of an update from the sum of its `tallied`."""
    found: list[LayerUse] = []
    for *served, entropy, late, choices in tallies.tolist():
        total = max(1.0, sum(served))
        found.append(
            LayerUse([count / total for count in served], entropy * top_k / max(1.0, choices), late / max(1.0, choices))
        )
    return found


@contextmanager
def watched(model: nn.Module, real: Tensor | None) -> Iterator[list[Routing]]:
    """Inside, every router notes where its tokens go: the list fills in the order of the layers.

    Gradient checkpointing runs a layer again when going backward, which is outside: see `checkpointed`.

    Args:
        real: [tokens] bool, which of the positions are no padding; None: all are.
    """
    seen: list[Routing] = []
    with _Watch(routers(model), seen, real):
        yield seen


def checkpointed(model: nn.Module | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a layer under gradient checkpointing: for its forward, and for running it again when going backward.
    Its router then drops what it dropped before, and notes nothing twice."""
    found = [] if model is None else routers(model)
    return nullcontext(), _Watch(found, None, found[0]._real if found else None)


class _Watch(AbstractContextManager[None]):
    """Inside, routers know which tokens are real and note where they go."""

    def __init__(self, found: list[Router], seen: list[Routing] | None, real: Tensor | None) -> None:
        self._found, self._seen, self._real = found, seen, real
        self._before: list[tuple[list[Routing] | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self._before = [(router._seen, router._real) for router in self._found]
        for router in self._found:
            router._seen, router._real = self._seen, self._real

    def __exit__(self, *_: object) -> None:
        for router, (seen, real) in zip(self._found, self._before, strict=True):
            router._seen, router._real = seen, real
