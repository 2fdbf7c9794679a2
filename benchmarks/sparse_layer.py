"""Time and extra memory of one sparse layer, forward and backward, against everything it could be instead.

    python benchmarks/sparse_layer.py

By default four experts of Qwen2-0.5B's feed-forward, two of which serve a token. Contenders:

* "dense": a feed-forward of the same active width (two experts'). Target: ours takes at most 1.3 times its time.
* "einsum": the one-hot dispatch of the reference (GShard's, as in DeepSpeed; specification §4.4), whose masks grow with
  the square of the tokens. Target: ours takes at most half its time at 16,384 tokens.
* "ours": the stock block as `models.routing.install` leaves it; "stock gate": with our experts, but the stock gate.
* the stock block with each of transformers' own ways to multiply experts.
* "router alone" and "stock gate alone": what choosing the experts takes.

"bf16" is autocast over fp32 weights, as training has it. Extra memory includes the gradients of the weights, 200 MiB of
all experts by default. What cannot run here, or would not fit into memory, has a row that says so.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator

import measuring
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP, Qwen2MoeSparseMoeBlock

from distilvlm.cost.meter import available_bytes
from distilvlm.models import experts, routing

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "experts", "top_k", "d", "inner", "tokens", "dtype",
    "what", "seconds", "extra_mib", "to_dense", "to_einsum", "note",
]  # fmt: skip
ON_A_GPU = {"deepgemm", "deepgemm_megamoe", "sonicmoe"}
CAPACITY = 1.5  # of the reference in training


class Einsum(nn.Module):
    """GShard's dispatch: [tokens, experts, places] masks carry tokens to their experts' queues and results back."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        inner = config.moe_intermediate_size
        self.experts = nn.ModuleList(Qwen2MoeMLP(config, inner) for _ in range(config.num_experts))
        self.top_k = config.num_experts_per_tok

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.flatten(0, 1)  # [tokens, d]
        with torch.autocast(hidden.device.type, enabled=False):
            chosen = routing.route(self.gate(hidden), self.top_k, capacity=CAPACITY)
        tokens, count = chosen.probabilities.shape
        places = math.ceil(tokens / count * self.top_k * CAPACITY)
        queued = nn.functional.one_hot(chosen.experts.T.flatten(), count)  # [k * tokens, experts]
        place = ((queued.cumsum(0) - 1) * queued).sum(1).clamp_max(places - 1)
        combine: Tensor | None = None  # [tokens, experts, places]
        for choice, (expert, where) in enumerate(zip(queued.split(tokens), place.split(tokens), strict=True)):
            weights = expert * chosen.weights[:, choice, None]  # [tokens, experts]
            part = torch.einsum("se,sc->sec", weights, nn.functional.one_hot(where, places).to(weights.dtype))
            combine = part if combine is None else combine + part
        assert combine is not None
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        queues = torch.einsum("sec,sd->ecd", combine.bool().to(dtype), hidden.to(dtype))
        served = torch.stack([expert(queue) for expert, queue in zip(self.experts, queues, strict=True)])
        return torch.einsum("sec,ecd->sd", combine.to(dtype), served)

    def bytes(self, tokens: int, inner: int, dtype: str) -> int:
        """About what a pass takes: five masks in fp32 at a time, and six activations of every place of a queue."""
        filled = round(self.top_k * CAPACITY * tokens)
        return 5 * 4 * filled * tokens + 6 * (4 if dtype == "fp32" else 2) * filled * inner


def blocks(config: Qwen2MoeConfig, device: str) -> dict[str, nn.Module]:
    """Contender -> module; the sparse blocks share their weights."""
    torch.manual_seed(0)
    dense = Qwen2MoeMLP(config, config.num_experts_per_tok * config.moe_intermediate_size)
    ours, einsum = Qwen2MoeSparseMoeBlock(config), Einsum(config)
    for parameter in [*dense.parameters(), *ours.parameters(), *einsum.parameters()]:
        nn.init.normal_(parameter, std=0.02)
    for parameter in [*ours.shared_expert.parameters(), *ours.shared_expert_gate.parameters()]:
        parameter.requires_grad_(False).zero_()  # as an upcycled model has it
    stock_gate = ours.gate
    routing.install(ours)
    found: dict[str, nn.Module] = {"dense": dense, "einsum": einsum, "ours": ours}
    found["stock gate"] = _block(ours, stock_gate, config, experts.IMPLEMENTATION)
    ways = ["eager", *sorted(set(ALL_EXPERTS_FUNCTIONS.keys()) - {experts.IMPLEMENTATION})]
    found |= {way: _block(ours, stock_gate, config, way) for way in ways}
    found |= {"router alone": ours.gate, "stock gate alone": stock_gate}
    for module in found.values():
        module.to(device).train()
    return found


def _block(like: Qwen2MoeSparseMoeBlock, gate: nn.Module, config: Qwen2MoeConfig, way: str) -> nn.Module:
    block = copy.copy(like)
    block._modules = {**like._modules, "gate": gate, "experts": copy.copy(like.experts)}
    block.experts.config = copy.deepcopy(config)
    block.experts.config._experts_implementation = way
    return block


def refusal(what: str, module: nn.Module, config: Qwen2MoeConfig, tokens: int, dtype: str, device: str) -> str | None:
    """Why a contender is not run."""
    if what in ON_A_GPU and device != "cuda":
        return "kernels for a GPU"
    needed = 0
    if isinstance(module, Einsum):
        needed = module.bytes(tokens, config.moe_intermediate_size, dtype)
    elif what == "batched_mm":  # every token gets a copy of its experts' weights, and of their gradients
        needed = 2 * 4 * tokens * config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()
    if free is not None and needed > 0.9 * free:
        return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"
    return None


def step(module: nn.Module, hidden: Tensor, dtype: str) -> measuring.Step:
    def run() -> None:
        leaf = hidden.clone().requires_grad_()  # what precedes the layer wants a gradient, too
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            out = module(leaf)
        out = out[1] if isinstance(out, tuple) else out  # a gate's weights of the experts
        out.float().sum().backward()

    return run


def cases(options: argparse.Namespace, config: Qwen2MoeConfig) -> Iterator[list[dict[str, object]]]:
    """The rows of each number of tokens and dtype."""
    modules = blocks(config, options.device)

    def forget() -> None:
        for module in modules.values():
            module.zero_grad(set_to_none=True)

    for tokens in options.tokens:
        hidden = torch.randn(1, tokens, config.hidden_size, device=options.device)
        for dtype in options.dtype:
            asked = [what for what in modules if not options.what or what in options.what]
            notes = {what: refusal(what, modules[what], config, tokens, dtype, options.device) for what in asked}
            runs = {what: step(modules[what], hidden, dtype) for what in asked if notes[what] is None}
            found = measuring.measured(runs, options, forget)
            rows: list[dict[str, object]] = []
            for what in asked:
                row: dict[str, object] = {"tokens": tokens, "dtype": dtype, "what": what, "note": notes[what] or ""}
                if what in found:
                    seconds, mib = found[what]
                    row |= {"seconds": round(seconds, 5), "extra_mib": round(mib)}
                    for other in ("dense", "einsum"):
                        if other in found and "alone" not in what:
                            row[f"to_{other}"] = round(seconds / found[other][0], 3)
                rows.append(row)
            yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 2048, 16384])
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--what", nargs="+", help="only these contenders")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--width", type=int, default=896, help="of the hidden states")
    parser.add_argument("--inner", type=int, default=4864, help="width of an expert")
    measuring.arguments(parser, "sparse_layer.csv")
    options = parser.parse_args()
    base = measuring.prepare(options)
    config = Qwen2MoeConfig(
        hidden_size=options.width, moe_intermediate_size=options.inner, num_experts=options.experts,
        num_experts_per_tok=options.top_k, norm_topk_prob=True, shared_expert_intermediate_size=64,
    )  # fmt: skip
    config._experts_implementation = experts.IMPLEMENTATION
    base |= {"experts": options.experts, "top_k": options.top_k, "d": options.width, "inner": options.inner}
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    columns = "{:>7} {:>5} {:>20} {:>9} {:>9} {:>8} {:>8}  {}"
    print(columns.format("tokens", "dtype", "what", "seconds", "extra MiB", "× dense", "× einsum", ""))
    records: list[dict[str, object]] = []
    for rows in cases(options, config):
        for row in rows:
            shown = (row.get(name, "") for name in FIELDS[FIELDS.index("tokens") :])
            print(columns.format(*shown), flush=True)
        records += [{**base, **row} for row in rows]
    measuring.write(options, FIELDS, records)


if __name__ == "__main__":
    main()
