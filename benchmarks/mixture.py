"""Time and extra memory of a vision tower with experts, forward and backward, against the tower alone and against the
method's own way to run experts.

    python benchmarks/mixture.py

By default three experts of rank 32 in each block of CLIP ViT-L/14-336's width, of which a few blocks are enough. All of
a tower trains ("all": the method's second stage), or experts and routers alone ("experts": its first). Contenders:

* "plain": the stock tower. Target: ours takes at most 1.15 times its time.
* "ours": `models.mixture`, two products for all experts.
* "loop": every expert in turn is given the tokens that chose it, as the method's code does it. Target: what ours adds
  to the plain tower's time is at most half of what this adds.
* "ours, one expert": what the merged tower saves.

"bf16" is autocast over fp32 weights, as training has it. Extra memory includes the gradients.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import measuring
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from transformers import CLIPVisionConfig, CLIPVisionModel

from distilvlm.models.mixture import Experts, MixConfig, Mixture, mix, mixtures

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "experts", "rank", "d", "layers", "tokens",
    "pictures", "dtype", "trains", "what", "seconds", "extra_mib", "to_plain", "added_to_loop",
]  # fmt: skip


class Loop(nn.Module):
    """Experts of a linear layer one after the other, each on the tokens that chose it; the same weights as ours."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def add(self, output: Tensor, entered: Tensor, weights: Tensor) -> Tensor:
        one: Any = self.experts
        added = torch.zeros_like(output)
        for expert in range(weights.shape[-1]):
            chosen = weights[..., expert] > 0  # [pictures, tokens]
            inside = dropout(entered[chosen], one.dropout, self.training)
            hidden = linear(inside, one.down[expert], one.down_bias[expert])
            out = linear(hidden, one.up[expert].T, one.up_bias[expert])
            added[chosen] = (out * weights[chosen][:, expert, None]).to(added.dtype)
        return output + added


def contenders(config: CLIPVisionConfig, rank: int, count: int, device: str) -> dict[str, CLIPVisionModel]:
    torch.manual_seed(0)
    plain = CLIPVisionModel(config)
    found = {"plain": plain}
    for what, experts in (("ours", count), ("loop", count), ("ours, one expert", 1)):
        tower = found[what] = copy.deepcopy(plain)
        mix(tower, MixConfig(experts=experts, rank=rank, start="kaiming"), layer=-1)
    for mixture in mixtures(found["loop"]):
        mixture.experts = nn.ModuleList(Loop(experts) for experts in mixture.experts)  # pyright: ignore
    for tower in found.values():
        tower.to(device).train()  # pyright: ignore
    _check(found)
    return found


def _check(found: dict[str, CLIPVisionModel]) -> None:
    """Ours and the loop compute the same."""
    config: Any = found["ours"].config
    pixels = torch.randn(1, 3, config.image_size, config.image_size, device=found["ours"].device)
    with torch.no_grad():
        one, other = (copy.deepcopy(found[what]).eval()(pixels).last_hidden_state for what in ("ours", "loop"))
    torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)


def step(tower: CLIPVisionModel, pixels: Tensor, dtype: str) -> measuring.Step:
    def run() -> None:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            out = tower(pixels).last_hidden_state
        out.float().square().mean().backward()

    return run


def trains(tower: nn.Module, what: str) -> None:
    tower.requires_grad_(what == "all")
    for mixture in mixtures(tower):
        mixture.requires_grad_(True)
    if not any(isinstance(module, Mixture) for module in tower.modules()) and what == "experts":
        # Nothing of a plain tower trains then: its share of the time is a forward and the way back through activations.
        embeddings: Any = tower
        embeddings.embeddings.class_embedding.requires_grad_(True)


def cases(options: argparse.Namespace, config: CLIPVisionConfig) -> Iterator[list[dict[str, object]]]:
    """The rows of each dtype and of what trains."""
    towers = contenders(config, options.rank, options.experts, options.device)
    side: Any = config.image_size
    pixels = torch.randn(options.pictures, 3, side, side, device=options.device)

    def forget() -> None:
        for tower in towers.values():
            tower.zero_grad(set_to_none=True)

    for dtype in options.dtype:
        for what_trains in options.trains:
            for tower in towers.values():
                trains(tower, what_trains)
            runs = {what: step(tower, pixels, dtype) for what, tower in towers.items()}
            found = measuring.measured(runs, options, forget)
            plain, loop = found["plain"][0], found["loop"][0]
            rows: list[dict[str, object]] = []
            for what, (seconds, mib) in found.items():
                row: dict[str, object] = {"dtype": dtype, "trains": what_trains, "what": what}
                row |= {"seconds": round(seconds, 4), "extra_mib": round(mib), "to_plain": round(seconds / plain, 3)}
                if what == "ours" and loop > plain:
                    row["added_to_loop"] = round((seconds - plain) / (loop - plain), 3)
                rows.append(row)
            yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--trains", nargs="+", choices=["all", "experts"], default=["all", "experts"])
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--width", type=int, default=1024, help="of the hidden states")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", type=int, default=336, help="of the pictures, in pixels; patches have 14")
    parser.add_argument("--pictures", type=int, default=2)
    measuring.arguments(parser, "mixture.csv")
    options = parser.parse_args()
    base = measuring.prepare(options)
    config = CLIPVisionConfig(
        hidden_size=options.width, intermediate_size=4 * options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64, image_size=options.size, patch_size=14,
    )  # fmt: skip
    sizes = {"experts": options.experts, "rank": options.rank, "d": options.width, "layers": options.layers}
    sizes |= {"tokens": (options.size // 14) ** 2 + 1, "pictures": options.pictures}
    rows: list[dict[str, object]] = []
    for found in cases(options, config):
        for row in found:
            rows.append({**base, **sizes, **row})
            print({name: value for name, value in row.items() if value != ""})
    measuring.write(options, FIELDS, rows)


if __name__ == "__main__":
    main()
