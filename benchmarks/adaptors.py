"""What a host with two adaptors takes and saves: memory, and time for each token, of prompts and of answers.

    python benchmarks/adaptors.py

By default a Llama of SmolLM2-135M's form with random weights; `--model DIR` takes another. Rows of three kinds, as a
server would have them: text, multimodal, grounding. What is measured:

* "bytes": one base with two adaptors, against three models: the base and two of it that were fine-tuned as a whole (the
  paper's comparison, 30 against 50 GB), and against three copies of the base, two with an adaptor. Tensors, and what
  the process grew by.
* "text": the workflow without adaptors while two are loaded, against the model before a host was attached. Target: at
  most 1% more time.
* "adaptor": the workflow of one adaptor against text. N inserted layers beside L make (L + N) / L of the layers' work.
* "mixed": one batch of all rows, each in its workflow, against a batch for each workflow, one after the other. Target:
  at least 1.5 times the tokens per second, on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import measuring
import torch
from measuring import Peak
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distilvlm.cost.meter import give_back
from distilvlm.models.adaptors import TEXT, AdaptorConfig, Host, resolve

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "layers", "d", "vocabulary", "inserted", "dtype",
    "measure", "what", "rows", "prompt", "new", "seconds", "tokens_per_second", "ratio", "expected", "bytes",
    "grown_mib",
]  # fmt: skip
NAMES = ("multimodal", "grounding")
MEASURES = ("text", "adaptor", "mixed")


def base(options: argparse.Namespace) -> Any:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).to(options.device).eval()


def ids(model: Any, rows: int, length: int) -> Tensor:
    draw = torch.Generator().manual_seed(rows)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=draw).to(model.device)


def reading(model: Any, workflow: str | Sequence[str], given: Tensor) -> measuring.Step:
    """A prompt, of which the last position's logits are wanted."""

    def run() -> None:
        with _within(model, workflow), torch.no_grad():
            model(input_ids=given, use_cache=False, logits_to_keep=1)

    return run


def writing(model: Any, workflow: str | Sequence[str], given: Tensor, new: int) -> measuring.Step:
    """An answer of a fixed length."""
    mask = torch.ones_like(given)

    def run() -> None:
        with _within(model, workflow):
            model.generate(
                given, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False, pad_token_id=0
            )

    return run


def _within(model: Any, workflow: str | Sequence[str]) -> Any:
    host = Host.of(model)
    return torch.no_grad() if host is None else host.use(workflow)


def one_after_another(steps: Sequence[measuring.Step]) -> measuring.Step:
    def run() -> None:
        for step in steps:
            step()

    return run


def times(host: Host, plain: Any, options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of the measures 'text', 'adaptor' and 'mixed'."""
    rows, length = options.rows, options.prompt
    depth = host.base.depth
    deeper = round((depth + options.inserted) / depth, 3)
    found: list[dict[str, object]] = []

    def compared(measure: str, steps: dict[str, measuring.Step], tokens: int, shape: dict[str, object]) -> None:
        """The second against the first: seconds, or for 'mixed' tokens per second."""
        if measure.partition(",")[0] not in options.measures:
            return
        seconds = {what: took for what, (took, _) in measuring.measured(steps, options).items()}
        first = next(iter(seconds.values()))
        for what, took in seconds.items():
            ratio = first / took if measure.startswith("mixed") else took / first
            row = {"measure": measure, "what": what, "seconds": round(took, 5), "ratio": round(ratio, 4)}
            found.append(row | shape | {"tokens_per_second": round(tokens / took, 1)})
        if measure.startswith("adaptor"):
            found[-1]["expected"] = deeper

    for number, kind in ((1, "writing"), (rows, "reading"), (rows, "writing")):
        given = ids(plain, number, length)
        new = options.new if kind == "writing" else 0
        shape: dict[str, object] = {"rows": number, "prompt": length, "new": new}

        def step(model: Any, workflow: str, given: Tensor = given, kind: str = kind) -> measuring.Step:
            return (
                reading(model, workflow, given) if kind == "reading" else writing(model, workflow, given, options.new)
            )

        tokens = number * (new or length)
        pair = {"plain model": step(plain, TEXT), "text, two adaptors loaded": step(host.model, TEXT)}
        compared(f"text, {kind}", pair, tokens, shape)
        pair = {"text": step(host.model, TEXT), "multimodal": step(host.model, NAMES[0])}
        compared(f"adaptor, {kind}", pair, tokens, shape)

    workflows = [name for name in (TEXT, *NAMES) for _ in range(rows)]
    given = ids(plain, len(workflows), length)
    for kind in ("reading", "writing"):
        new = options.new if kind == "writing" else 0
        parts = list(zip((TEXT, *NAMES), given.split(rows), strict=True))
        if kind == "reading":
            alone = [reading(host.model, name, part) for name, part in parts]
            together = reading(host.model, workflows, given)
        else:
            alone = [writing(host.model, name, part, new) for name, part in parts]
            together = writing(host.model, workflows, given, new)
        pair = {"a batch for each workflow": one_after_another(alone), "one mixed batch": together}
        shape = {"rows": len(workflows), "prompt": length, "new": new}
        compared(f"mixed, {kind}", pair, len(workflows) * (new or length), shape)
    return found


def memory(options: argparse.Namespace) -> tuple[Host, list[dict[str, object]]]:
    """The host, and rows of the measure 'bytes'. Everything is made anew, so that the process grows by it."""
    give_back()
    with Peak() as shared:
        host = with_adaptors(base(options), options, NAMES)
        touch(host)
    one = sum(host.bytes(name) for name in (TEXT, *NAMES))
    give_back()
    with Peak() as tuned:
        others: list[Host] = [with_adaptors(base(options), options, ()) for _ in range(3)]
        for other in others:
            touch(other)
    separate = 3 * host.bytes(TEXT)
    del others
    give_back()
    with Peak() as hosts:
        others = [with_adaptors(base(options), options, names) for names in ((), NAMES[:1], NAMES[1:])]
        for other in others:
            touch(other)
    each = 3 * host.bytes(TEXT) + sum(host.bytes(name) for name in NAMES)
    found: list[dict[str, object]] = []
    for what, size, grown in (
        ("one base, two adaptors", one, shared.mib),
        ("base and two fine-tuned models", separate, tuned.mib),
        ("three bases, two with an adaptor", each, hosts.mib),
    ):
        row: dict[str, object] = {"measure": "bytes", "what": what, "bytes": size, "grown_mib": round(grown)}
        found.append(row | {"ratio": round(size / one, 3)})
    return host, found


def touch(host: Host) -> None:
    """Pages of mapped weights count when they are read."""
    for tree in (host.model, host.adaptors):
        for parameter in tree.parameters():
            parameter.sum()


def with_adaptors(model: Any, options: argparse.Namespace, names: Sequence[str]) -> Host:
    host = Host.attach(model)
    for name in names:
        host.add(name, AdaptorConfig(positions=resolve(options.inserted, host.base.depth)))
    return host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a causal language model; default: SmolLM2-135M's form, random")
    parser.add_argument("--inserted", type=int, default=8, help="layers of each adaptor, evenly spaced")
    parser.add_argument("--rows", type=int, default=2, help="of each workflow in a batch")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES, help="of time; default: all")
    measuring.arguments(parser, "adaptors.csv")
    options = parser.parse_args()
    common = measuring.prepare(options)
    host, rows = memory(options)
    common |= {"layers": host.base.depth, "d": host.base.width, "vocabulary": host.base.vocabulary}
    common |= {"inserted": options.inserted, "dtype": options.dtype}
    print(", ".join(f"{name} {value}" for name, value in common.items()))
    plain = base(options)
    # The same tensors: where weights lie in memory alone makes a difference of several percent.
    plain.load_state_dict(host.model.state_dict(), assign=True)
    plain.tie_weights()
    rows += times(host, plain, options)
    columns = "{:>17} {:>33} {:>5} {:>6} {:>4} {:>9} {:>9} {:>7} {:>8} {:>12} {:>9}"
    shown = FIELDS[FIELDS.index("measure") :]
    print(
        columns.format(
            "", "", "rows", "prompt", "new", "seconds", "tokens/s", "ratio", "expected", "bytes", "grown MiB"
        )
    )
    for row in rows:
        print(columns.format(*(str(row.get(name, "")) for name in shown)), flush=True)
    measuring.write(options, FIELDS, [{**common, **row} for row in rows])


if __name__ == "__main__":
    main()
