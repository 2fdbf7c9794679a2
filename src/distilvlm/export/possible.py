"""What can't go to a format is refused before anything is loaded or written: the reason, and what is possible."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, cast, get_args

from transformers import PretrainedConfig

from distilvlm.models.mixed_classes import mixture_of
from distilvlm.models.save import load
from distilvlm.models.sources import host_facts, is_local, tokenizer_of
from distilvlm.models.upcycling import upcycled_layers
from distilvlm.models.vlm import VLM

from .gguf.language import require_language
from .gguf.tower import require_tower
from .gguf.vocabulary import vocabulary

Format = Literal["hf", "gguf", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)

_PACKAGES: dict[Format, tuple[str, ...]] = {"hf": (), "gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


def require_possible(source: str, to: Format) -> None:
    """Raises ValueError where the model can't go to the format, with the reason and the nearest export that it can."""
    if to not in FORMATS:
        raise ValueError(f"there is no format '{to}': there is {', '.join(FORMATS)}")
    if is_local(source) and (facts := host_facts(source)) is not None:
        base = facts["student"].get("from") or facts["student"].get("language", {}).get("from")
        raise ValueError(
            f"{source} holds adaptors ({', '.join(facts['adaptors'])}), layers that no other program puts between a "
            f"model's own: no format has a place for them. Possible: export the base they stand on ({base}), which "
            "answers as the workflow 'text' does; or serve base and adaptors with distilvlm serve"
        )
    vlm = load(source, meta=True)
    config: Any = vlm.model.config
    mixture = mixture_of(cast(PretrainedConfig, config.vision_config))
    if mixture is not None and mixture["experts"] > 1:
        raise ValueError(
            f"{source} has {mixture['experts']} experts in its vision tower, each token its own: no other program has "
            "such layers. Possible: a student trained with mix: {experts: 1}, whose expert is merged into the tower"
        )
    if to == "hf":
        return
    text = config.get_text_config()
    try:
        if upcycled_layers(config) or text.model_type.endswith("moe"):
            raise ValueError("its language model has experts, and only dense ones are written")
        if to == "gguf":
            _require_gguf(source, vlm)
        elif "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise ValueError("its attention slides in some layers, and the graph's mask is one for all")
    except ValueError as reason:
        raise ValueError(f"{source} can't go to {to}: {reason}. Possible: --to {_nearest(to, text)}") from None
    missing = [name for name in _PACKAGES[to] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--to {to} needs {', '.join(missing)}: pip install 'distilvlm[{to}]'")


def _require_gguf(source: str, vlm: VLM) -> None:
    config = vlm.model.config
    require_language(config.get_text_config())
    require_tower(config, vlm.layout)
    tokenizer = tokenizer_of(source, plan=False)
    assert tokenizer is not None
    vocabulary(tokenizer, vlm.embedding_rows)


def _nearest(to: Format, text: PretrainedConfig) -> str:
    return "hf" if to == "onnx" or text.model_type.endswith("moe") else "onnx, or --to hf"
