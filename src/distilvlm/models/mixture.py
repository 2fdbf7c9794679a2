"""A mixture of LoRA experts in the feed-forwards of a vision transformer (MoVE-KD's MoLE, specification §2).

Each linear layer of a feed-forward gets E experts; one router per feed-forward reads what enters it and chooses, for
all of its linear layers at once, who serves a token:

    p = softmax(W_r x + b_r),   e = argmax p,   s = alpha / rank
    h = fc1(x) + s (B1_e (A1_e drop(x) + a1_e) + b1_e)
    y = fc2(act(h)) + s (B2_e (A2_e drop(act(h)) + a2_e) + b2_e)

The tower stays the stock one: its modules, names and forwards. A `Mixture` hangs below a feed-forward and adds to its
linear layers' outputs by hooks. All experts are multiplied at once: A of all of them stacked, the result times the
choice, B of all of them stacked. That is two matrix products without gather or loop, about what one LoRA of rank E·r
costs; `benchmarks/mixture.py` measures it.

Unless routing is scaled or dense, the choice passes no gradient on: the balance loss alone moves the router.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot
from transformers import PreTrainedModel

from . import routing
from .mixed_classes import become_mixed, mixture_of
from .sources import drawn
from .towers import blocks_of

_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward")
_MIXTURE = "mixture"


@dataclass(frozen=True)
class MixConfig:
    """What a mixture is. Defaults are the method's, but for `start`: its own, 'kaiming', differs from the tower at
    once."""

    experts: int = 3  # 1: no router, and `merged` makes a stock tower of it
    rank: int = 32
    alpha: float = 1.0  # what an expert adds is scaled by alpha / rank
    dropout: float = 0.05  # of what enters the experts, in training
    start: Literal["zero", "kaiming"] = "zero"  # of B; A is always drawn
    routing: Literal["top1", "top1_scaled", "dense"] = "top1"  # scaled by its probability; all, by theirs
    bias: bool = True  # of A and B
    layers: Literal["read"] | Sequence[int] = "read"  # read: all that the features depend on

    def __post_init__(self) -> None:
        if self.experts < 1 or self.rank < 1:
            raise ValueError(f"a mixture has at least 1 expert of rank 1, not {self.experts} of rank {self.rank}")


@dataclass(frozen=True)
class Choice:
    """Whom the tokens of one feed-forward went to."""

    probabilities: Tensor  # [pictures, tokens, experts] float32, with gradient
    experts: Tensor  # [pictures, tokens] int64, the most probable one


def mix(tower: PreTrainedModel, config: MixConfig, layer: int, seed: int = 0) -> list[Mixture]:
    """Give a tower experts, in place. It becomes an instance of a class of ours, and its configuration says so: what
    is built or loaded from that configuration has them, too (mixed_classes.py).

    Args:
        layer: the hidden state that is read; no layer behind it gets experts, because none would ever learn.
        seed: of experts and routers; each layer draws on its own.

    Raises:
        ValueError: the tower has experts already, has no feed-forward of linear layers, or lacks a layer.
    """
    if mixture_of(tower.config) is not None:
        raise ValueError("this vision tower has a mixture of experts already")
    depth = len(blocks_of(tower)[1])
    read = layer % (depth + 1)  # hidden state 0 is the first block's input
    layers = list(range(read)) if config.layers == "read" else sorted(set(config.layers))
    if not layers or layers[0] < 0 or layers[-1] >= read:
        raise ValueError(
            f"layers {layers} of the vision tower cannot have experts: hidden state {layer} is read, which depends on "
            f"{f'layers 0 to {read - 1}' if read else 'no layer'}"
        )
    config = replace(config, layers=layers)
    found = install(tower, config)
    for number, one in zip(layers, found, strict=True):
        with drawn(seed, f"mixture {number}"):
            one.draw(config.start)
    become_mixed(tower, asdict(config))
    return found


def install(tower: PreTrainedModel, config: MixConfig) -> list[Mixture]:
    """Hang experts of zeros below the tower's feed-forwards, of those layers that it still has."""
    blocks = blocks_of(tower)[1]
    found: list[Mixture] = []
    for number in config.layers:
        if int(number) < len(blocks):
            feed_forward = _feed_forward(blocks[int(number)])
            found.append(Mixture(feed_forward, config).train(feed_forward.training))
            feed_forward.add_module(_MIXTURE, found[-1])
    return found


def mixtures(model: nn.Module) -> list[Mixture]:
    """The mixtures of a model, in the order of its layers; none in a stock one."""
    return [module for module in model.modules() if isinstance(module, Mixture)]


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Choice]]:
    """Inside, the first forward notes whom its tokens go to: the list fills in the order of the layers.

    Gradient checkpointing runs layers again, which is not noted. Where experts are alone, the list stays empty.
    """
    seen: list[Choice] = []
    found = mixtures(model)
    for one in found:
        one.seen = seen
    try:
        yield seen
    finally:
        for one in found:
            one.seen = None


def tallied(seen: Sequence[Choice], counts: Tensor) -> Tensor:
    """What `routing.used` needs of the pictures that count, [pictures] bool; adds up as `routing.tallied`."""
    flat = [
        routing.Routing(
            probabilities=choice.probabilities.flatten(0, 1),
            experts=choice.experts.flatten().unsqueeze(1),
            weights=torch.ones_like(choice.experts.flatten().unsqueeze(1)),
            dropped=None,
        )
        for choice in seen
    ]
    return routing.tallied(flat, counts.repeat_interleave(seen[0].experts.shape[1]))


class Experts(nn.Module):
    """The experts of one linear layer: E pairs of A, [rank, in], and B, which is held transposed, [rank, out]."""

    def __init__(self, base: nn.Linear, config: MixConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        count, rank = config.experts, config.rank

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(base.weight.new_zeros(count, *shape))

        self.down = parameter(rank, base.in_features)
        self.up = parameter(rank, base.out_features)
        self.down_bias = parameter(rank) if config.bias else None
        self.up_bias = parameter(base.out_features) if config.bias else None

    def draw(self, start: Literal["zero", "kaiming"]) -> None:
        """As the method draws A and, unless they start at zero, B: Kaiming-uniform with the gain of a ReLU."""
        with torch.no_grad():
            for weight, inputs in ((self.down, self.down.shape[2]), (self.up, self.up.shape[1])):
                if weight is self.down or start == "kaiming":
                    bound = math.sqrt(6 / inputs)
                    # On the CPU: the same bits whatever device the tower is on.
                    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound))

    def add(self, output: Tensor, entered: Tensor, weights: Tensor) -> Tensor:
        """A linear layer's output with what its experts add.

        Args:
            output: [..., out]. entered: [..., in]. weights: [..., experts], scale included.
        """
        count, rank, _ = self.down.shape
        biases = None if self.down_bias is None else self.down_bias.flatten()
        down = self.down.flatten(0, 1)
        if self.training and self.dropout:
            dropped = round(self.dropout * 2**16)
            entered, down = entered * _drawn(entered, dropped).to(entered.dtype), down / (1 - dropped / 2**16)
        hidden = linear(entered, down, biases)
        weights = weights.to(hidden.dtype)
        hidden = (hidden.unflatten(-1, (count, rank)) * weights.unsqueeze(-1)).flatten(-2)  # [..., experts * rank]
        up = self.up.flatten(0, 1)
        if self.up_bias is not None:  # in the same product, and not as another pass over the output
            hidden, up = torch.cat([hidden, weights], -1), torch.cat([up, self.up_bias])
        return torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), up).view_as(output)


class Mixture(nn.Module):
    """Router and experts of one feed-forward; no part of its forward, but called by hooks on its modules.

    Args:
        feed_forward: of any class; the linear layers that it has, gates included, get experts.
    """

    def __init__(self, feed_forward: nn.Module, config: MixConfig) -> None:
        super().__init__()
        found = _linears(feed_forward)
        self.bases, bases = list(found), list(found.values())  # names below the feed-forward
        self.routing = config.routing
        self.scale = config.alpha / config.rank
        self.count = config.experts
        self.router = nn.Linear(bases[0].in_features, config.experts).to(bases[0].weight) if self.count > 1 else None
        if self.router is not None:
            nn.init.zeros_(self.router.weight)
            nn.init.zeros_(self.router.bias)
        self.experts = nn.ModuleList(Experts(base, config) for base in bases)
        self.seen: list[Choice] | None = None
        self._weights: Tensor | None = None
        feed_forward.register_forward_pre_hook(self._choose)
        for place, base in enumerate(bases):
            base.register_forward_hook(partial(self._add, place))
        feed_forward.register_forward_hook(self._forget)

    def draw(self, start: Literal["zero", "kaiming"]) -> None:
        """Draw experts, and the router as `nn.Linear` does."""
        for experts in self.experts:
            experts.draw(start)  # pyright: ignore
        if self.router is not None:
            drawn_here = nn.Linear(self.router.in_features, self.router.out_features)
            with torch.no_grad():
                self.router.weight.copy_(drawn_here.weight)
                self.router.bias.copy_(drawn_here.bias)

    def _choose(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entered = inputs[0]  # [pictures, tokens, d]
        if self.router is None:
            self._weights = entered.new_full((*entered.shape[:-1], 1), self.scale)
            return
        device = entered.device.type  # autocast refuses the meta device
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            logits = linear(entered.float(), self.router.weight.float(), self.router.bias.float())
        probabilities = logits.softmax(-1)
        chosen = probabilities.argmax(-1)  # the first of equals
        if self.routing == "dense":
            weights = probabilities
        else:
            weights = one_hot(chosen, self.count).to(probabilities.dtype)
            weights = weights * probabilities if self.routing == "top1_scaled" else weights
        self._weights = weights * self.scale
        if self.seen is not None:
            self.seen.append(Choice(probabilities, chosen))
            self.seen = None  # once: what follows is a layer that is run again

    def _add(self, place: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self._weights is not None  # the feed-forward runs its own linear layers
        experts: Any = self.experts[place]
        return experts.add(output, inputs[0], self._weights)

    def _forget(self, *_: object) -> None:
        self._weights = None  # it may hold a graph


def _drawn(like: Tensor, dropped: int) -> Tensor:
    """What dropout keeps, a bool for each number; `dropped` of 2**16 go.

    As `torch.nn.functional.dropout`, from the same generator, but with 16 random bits a number: drawn one by one in
    floating point, they took a CPU as long as all products of the experts.
    """
    count = like.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:count] >= dropped - 2**15).view_as(like)


def _feed_forward(block: nn.Module) -> nn.Module:
    for name, module in block.named_children():
        if _FEED_FORWARD.search(name) and any(isinstance(inner, nn.Linear) for inner in module.modules()):
            return module
    raise ValueError(
        f"{type(block).__name__} has no feed-forward of linear layers that experts could be added to: its modules are "
        f"{', '.join(name for name, _ in block.named_children())}"
    )


def _linears(feed_forward: nn.Module) -> dict[str, nn.Linear]:
    """In the order of their definition, which is that of their use: those that read the input, then the one behind."""
    found = {name: module for name, module in feed_forward.named_modules() if isinstance(module, nn.Linear)}
    *first, last = found.values()
    if not first or any(one.in_features != last.out_features for one in first):
        raise ValueError(
            f"{type(feed_forward).__name__} is no feed-forward that experts can be added to: its linear layers are "
            + ", ".join(f"{name} {one.in_features}→{one.out_features}" for name, one in found.items())
        )
    return found
