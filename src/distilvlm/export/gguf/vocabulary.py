"""A tokenizer as llama.cpp has it: tokens with their kinds, merges or scores, and a name for how text is split.

Its splitting rules are compiled in under names (`tokenizer.ggml.pre`). Which of them is a tokenizer's own is read from
its `tokenizer.json`; of others nothing would say that they split differently, so they are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens: `gguf.TokenType`."""

_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+": "llama-bpe",
}
_KNOWN = "those of GPT-2, SmolLM, Qwen2 and Llama 3, and SentencePiece's as Llama 2 and Vicuna have it"


@dataclass(frozen=True)
class Vocabulary:
    model: str  # gpt2: byte-level BPE; llama: SentencePiece
    split: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]  # of gpt2
    scores: tuple[float, ...]  # of llama
    begins: bool  # text begins with BOS


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The first `rows` ids of a fast tokenizer: those that have an embedding. `<image>` may be none of them, which
    llama.cpp does not miss: it puts pictures in by itself.

    Raises:
        ValueError: a tokenizer that llama.cpp has no rules for.
    """
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore
    facts = json.loads(backend.to_str())
    model = facts["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its tokenizer is a {model['type']}, and llama.cpp is given byte-pair encodings: {_KNOWN}")
    pieces = model.get("byte_fallback", False)
    split = _sentencepiece(facts) if pieces else _byte_level(facts)
    names = {number: token for token, number in tokenizer.get_vocab().items() if number < rows}
    added = tokenizer.added_tokens_decoder
    tokens = tuple(names.get(number, f"[PAD{number}]") for number in range(rows))
    kinds = [NORMAL if number in names else UNUSED for number in range(rows)]
    for number, token in added.items():
        if number < rows:
            kinds[number] = CONTROL if token.special else USER_DEFINED
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    scores: tuple[float, ...] = ()
    if pieces:
        for number, token in names.items():
            kinds[number] = BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else kinds[number]
        unknown: Any = tokenizer.unk_token_id
        if unknown is not None and unknown < rows:
            kinds[unknown] = UNKNOWN
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        scores = tuple(-float(ranks.get(token, len(ranks))) for token in tokens)
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        split=split,
        tokens=tokens,
        kinds=tuple(kinds),
        merges=() if pieces else merges,
        scores=scores,
        begins=_begins(tokenizer),
    )


def _byte_level(facts: dict[str, Any]) -> str:
    steps = _steps(facts["pre_tokenizer"])
    kinds = [step["type"] for step in steps]
    normalizer = facts["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ValueError(
            f"its tokenizer changes text first ({normalizer['type']}), which llama.cpp would not: {_KNOWN}"
        )
    plain = kinds and kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]
    if plain and kinds == ["ByteLevel"] and steps[-1]["use_regex"]:
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[-1]["use_regex"]:
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not steps[-1]["use_regex"]:
        known = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if known is not None and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            return known
    raise ValueError(
        f"its tokenizer splits text by {', '.join(kinds) or 'nothing'} in a way that llama.cpp has no rules for: it "
        f"knows {_KNOWN}"
    )


def _sentencepiece(facts: dict[str, Any]) -> str:
    kinds = [step["type"] for part in ("normalizer", "pre_tokenizer") for step in _steps(facts[part])]
    if kinds not in (["Prepend", "Replace"], ["Metaspace"]):
        raise ValueError(
            f"its tokenizer is SentencePiece with other steps ({', '.join(kinds)}): llama.cpp knows {_KNOWN}"
        )
    return "default"


def _steps(section: dict[str, Any] | None) -> Sequence[dict[str, Any]]:
    if section is None:
        return []
    inner = section.get("pretokenizers") or section.get("normalizers")
    return [section] if inner is None else inner


def _begins(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]  # pyright: ignore
