"""How cost grows with the work: rows of the loss head, ids of the vocabulary, samples of a data set.

    python benchmarks/growth.py

* "rows": time and extra memory of the loss head (text + forward KL) from 256 to 8,192 rows.
* "vocabulary": the same with 512 rows from 32,768 to 262,144 ids.
* "samples": what a run does with a data file before its first step: every row read, checked and turned into tokens, an
  order of two epochs, and the place of a sample in the middle of it; from 1,000 to 100,000 rows of text.

A straight line through 0 has the same cost per unit everywhere: `per_unit` is that cost, relative to the smallest size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import loss_head
import measuring
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from distilvlm.data.stage import source_of, stage_data, stage_order
from distilvlm.models.towers import CLIP, layout_of
from distilvlm.recipe import load_recipe

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "grows", "size", "dtype", "head", "seconds",
    "extra_mib", "per_unit",
]  # fmt: skip
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def head(options: argparse.Namespace, rows: int, vocabulary: int, dtype: str, kind: str) -> tuple[float, float]:
    sample = loss_head.Sample(options, "response", rows, vocabulary, dtype, kind)
    return measuring.measured({"ours": loss_head.step_of("ours", sample)}, options, sample.forget)["ours"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes for tokens."""
    names = ["<|im_end|>", "<|im_start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|im_end|>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>"]})
    fast.chat_template = CHATML
    return fast


def opened(directory: Path, samples: int) -> measuring.Step:
    """Reading, checking and ordering a file of so many rows."""
    rows = [
        {
            "id": number,
            "conversations": [
                {"from": "human", "value": f"What is number {number}? Answer in one sentence of a few words."},
                {"from": "gpt", "value": f"It is the one behind {number - 1}, and it stands before {number + 1}."},
            ],
        }
        for number in range(samples)
    ]
    file = directory / f"{samples}.json"
    file.write_text(json.dumps(rows))
    written = tokenizer()
    vision = CLIPVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=16)
    written.save_pretrained(directory / "tokenizer")
    recipe_file = directory / f"{samples}.yaml"
    language = {"config": {"model_type": "llama", "hidden_size": 16}, "tokenizer": str(directory / "tokenizer")}
    stage = {"name": "sft", "train": ["language"], "data": ["rows"], "optim": {"lr": 1e-3, "batch": 8, "epochs": 2}}
    content = {
        "name": "growth",
        "student": {"vision": {"config": {"model_type": "clip_vision_model"}}, "language": language},
        "data": {"rows": {"path": str(file)}},
        "stages": [stage],
    }
    recipe_file.write_text(json.dumps(content))
    layout = layout_of(vision, -1, "default", CLIP)

    def step() -> None:
        recipe = load_recipe(recipe_file)
        first = recipe.stages[0]
        data = stage_data(recipe, first, written, layout, [source_of(recipe, first, name) for name in first.data])
        if bad := data.check().bad:
            raise RuntimeError(f"the drawn rows are refused: {bad[0]}")
        order = stage_order(recipe, 0, data)
        order.update(samples // 8)  # of two epochs, in batches of 8

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--grows", nargs="+", choices=["rows", "vocabulary", "samples"], default=["rows", "vocabulary", "samples"]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768, 65536, 131072, 262144])
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="of the loss head")
    parser.add_argument("--student", type=int, default=896, help="width of the student's hidden states")
    parser.add_argument("--teacher", type=int, default=2048, help="width of the teacher's hidden states")
    measuring.arguments(parser, "growth.csv")
    options = parser.parse_args()
    base = measuring.prepare(options)
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    lines: list[dict[str, object]] = []

    def told(grows: str, size: int, found: tuple[float, float], **about: object) -> None:
        same = [line for line in lines if line["grows"] == grows and line["head"] == about.get("head", "")]
        line: dict[str, object] = {"grows": grows, "size": size, "dtype": "", "head": "", **about}
        line |= {"seconds": round(found[0], 5), "extra_mib": round(found[1])}
        unit = found[0] / size
        line["per_unit"] = round(unit / (float(str(same[0]["seconds"])) / int(str(same[0]["size"]))), 2) if same else 1
        print("  ".join(f"{name} {value}" for name, value in line.items() if value != ""), flush=True)
        lines.append({**base, **line})

    for kind in ("frozen", "trained"):
        about = {"dtype": options.dtype, "head": kind}
        if "rows" in options.grows:
            for rows in options.rows:
                told("rows", rows, head(options, rows, 49152, options.dtype, kind), **about)
        if "vocabulary" in options.grows:
            for vocabulary in options.vocabulary:
                told("vocabulary", vocabulary, head(options, 512, vocabulary, options.dtype, kind), **about)
    if "samples" in options.grows:
        with tempfile.TemporaryDirectory() as directory:
            for samples in options.samples:
                found = measuring.measured({"open": opened(Path(directory), samples)}, options)["open"]
                told("samples", samples, found)
    measuring.write(options, FIELDS, lines)


if __name__ == "__main__":
    main()
