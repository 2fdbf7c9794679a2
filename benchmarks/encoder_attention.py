"""Peak memory and time of an encoder that also says where it looks: one row by hand, or eager attention of all layers.

    python benchmarks/encoder_attention.py

By default CLIP ViT-L/14-336's architecture with random weights, 577 tokens. Contenders:

* "sdpa": tokens of hidden state -2 only, no attention weights: what the others are compared with.
* "ours": tokens and CLS rows as `EncoderTeacher.see(pixels, importance=True)` gives them.
* "eager": the stock way, `output_attentions` and `output_hidden_states` of all layers with eager attention, as the
  method's reference. Target: ours takes at most 0.6 times its extra memory.
"""

from __future__ import annotations

import argparse
from typing import Any

import measuring
import torch
from torch import Tensor
from transformers import AutoModel, CLIPVisionConfig

from distilvlm.models.encoders.interface import View
from distilvlm.models.encoders.vit import ViTEncoder

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "layers", "d", "size", "tokens", "pictures",
    "dtype", "what", "seconds", "extra_mib", "memory_to_eager", "time_to_sdpa",
]  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def contenders(config: CLIPVisionConfig, dtype: torch.dtype, pixels: Tensor) -> dict[str, measuring.Step]:
    torch.manual_seed(0)
    stock: Any = AutoModel.from_config(config, attn_implementation="eager").to(pixels.device, dtype).eval()
    tower: Any = AutoModel.from_config(config).to(pixels.device, dtype)
    size: Any = config.image_size
    encoder = ViTEncoder("clip", tower, View(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), -2)
    held = pixels.to(dtype)

    @torch.no_grad()
    def eager() -> object:
        output = stock(held, output_attentions=True, output_hidden_states=True)
        return output.hidden_states[-2][:, 1:], output.attentions[-2][:, :, 0, 1:]

    return {
        "sdpa": lambda: encoder.see(held),
        "ours": lambda: encoder.see(held, importance=True),
        "eager": eager,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[4])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--size", type=int, default=336, help="of a picture, in pixels")
    measuring.arguments(parser, "encoder_attention.csv")
    options = parser.parse_args()
    base = measuring.prepare(options)
    config = CLIPVisionConfig(
        hidden_size=options.width, intermediate_size=4 * options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64, image_size=options.size, patch_size=14,
    )  # fmt: skip
    tokens = (options.size // 14) ** 2 + 1
    base |= {"layers": options.layers, "d": options.width, "size": options.size, "tokens": tokens}
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    columns = "{:>8} {:>5} {:>6} {:>9} {:>9} {:>15} {:>12}"
    print(columns.format("pictures", "dtype", "what", "seconds", "extra MiB", "memory × eager", "time × sdpa"))
    records: list[dict[str, object]] = []
    for pictures in options.pictures:
        for dtype in options.dtype:
            pixels = torch.randn(pictures, 3, options.size, options.size, device=options.device)
            found = measuring.measured(contenders(config, DTYPES[dtype], pixels), options)
            for what, (seconds, mib) in found.items():
                row: dict[str, object] = {"pictures": pictures, "dtype": dtype, "what": what}
                row |= {"seconds": round(seconds, 4), "extra_mib": round(mib)}
                row["memory_to_eager"] = round(mib / found["eager"][1], 3)
                row["time_to_sdpa"] = round(seconds / found["sdpa"][0], 3)
                print(columns.format(*list(row.values())), flush=True)
                records.append({**base, **row})
    measuring.write(options, FIELDS, records)


if __name__ == "__main__":
    main()
