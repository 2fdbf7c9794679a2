"""Answers a second of a model that is asked in batches, against one question at a time.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --layers 30 --batch 1 8 32 --tokens 16 64

A student of SmolLM2-135M's shapes with some of its layers and random weights is asked `--questions` questions of drawn
lengths about pictures of 64 tokens whose features are kept, as `distilvlm evaluate --suite` asks: the longest first,
left padding, one cache for a batch. A random model hardly ever ends its answers, so each has `--tokens` tokens. The
tower is left out: it sees every picture once, whatever the batch.

"identical" is the share of answers that are the same text as one at a time. Target: at least 3 times the tokens a
second on two cores, and all identical.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Callable

import measuring
import numpy as np
import torch
from preference_step import SIDE, model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distilvlm.data.batch import SampleKey
from distilvlm.data.records import PICTURE, Record, Turn
from distilvlm.evaluate import answer
from distilvlm.models import VLM

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "layers", "dtype", "questions", "tokens", "batch",
    "seconds", "tokens_per_second", "ratio", "identical", "extra_mib",
]  # fmt: skip
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def worded(vlm: VLM) -> VLM:
    """With a tokenizer whose tokens are words, one for each row of the embedding, and `<image>` behind them."""
    words = ["user", "assistant", "system", "<eos>"]
    vocabulary = {word: place for place, word in enumerate(words)}
    vocabulary |= {f"w{place}": place for place in range(len(words), vlm.embedding_rows)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="system"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    made.chat_template = CHAT
    return dataclasses.replace(vlm, tokenizer=made)


def drawn(count: int, rows: int) -> list[Record]:
    """Questions of 10 to 60 words, each about a picture of its own."""
    rng = np.random.default_rng(0)
    found: list[Record] = []
    for number in range(count):
        words = " ".join(f"w{word}" for word in rng.integers(4, rows, size=rng.integers(10, 61)))
        turns = (Turn("user", f"{PICTURE}\n{words}"), Turn("assistant", ""))
        found.append(Record(SampleKey("drawn", "drawn", number), str(number), (f"{number}.jpg",), turns))
    return found


def seen(path: str) -> torch.Tensor:
    """A picture's kept features, by its name."""
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4])
    return torch.randn(SIDE**2, 1024, generator=torch.Generator().manual_seed(seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2], help="of the model; 30 are SmolLM2-135M's own")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16], help="of an answer")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 16], help="the first is what others are compared with"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    measuring.arguments(parser, "evaluation.csv")
    options = parser.parse_args()
    base = measuring.prepare(options)
    torch.manual_seed(0)
    print(", ".join(f"{name} {value}" for name, value in base.items()))
    columns = "{:>6} {:>5} {:>9} {:>6} {:>5} {:>8} {:>8} {:>6} {:>9} {:>6}"
    print(
        columns.format(
            "layers", "dtype", "questions", "tokens", "batch", "seconds", "tokens/s", "ratio", "identical", "MiB"
        )
    )
    written: list[dict[str, object]] = []
    for layers in options.layers:
        vlm = worded(model(layers, options.device))
        if options.dtype == "bf16":
            vlm.model.to(torch.bfloat16)
        records = drawn(options.questions, vlm.embedding_rows)
        for tokens in options.tokens:
            answers: dict[str, list[str]] = {}

            def asked(batch: int, vlm: VLM = vlm, tokens: int = tokens, kept: dict[str, list[str]] = answers,
                      records: list[Record] = records) -> Callable[[], None]:  # fmt: skip
                def step() -> None:
                    kept[str(batch)] = answer(
                        vlm, records, "chat", "square", batch_size=batch, max_new_tokens=tokens, features=seen
                    )

                return step

            found = measuring.measured({str(batch): asked(batch) for batch in options.batch}, options)
            first = str(options.batch[0])
            for batch, (seconds, mib) in found.items():
                alike = sum(a == b for a, b in zip(answers[batch], answers[first], strict=True))
                said = sum(len(one.split()) for one in answers[batch])
                row: dict[str, object] = {"layers": layers, "dtype": options.dtype, "questions": len(records)}
                row |= {"tokens": tokens, "batch": batch, "seconds": round(seconds, 3)}
                row |= {"tokens_per_second": round(said / seconds, 1), "ratio": round(found[first][0] / seconds, 2)}
                row |= {"identical": round(alike / len(records), 3), "extra_mib": round(mib)}
                print(columns.format(*(row[name] for name in FIELDS[FIELDS.index("layers") :])), flush=True)
                written.append({**base, **row})
    measuring.write(options, FIELDS, written)


if __name__ == "__main__":
    main()
