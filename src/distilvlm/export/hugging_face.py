"""A stock checkpoint that other programs load: transformers, older and newer, vLLM and SGLang.

A finished student is a stock checkpoint already. What is changed is what readers other than ours stumble over:

* names of a CLIP or SigLIP tower's tensors: transformers 5 drops a `vision_model.` that published LLaVA checkpoints
  have, and that vLLM's and SGLang's towers go by; transformers reads either;
* `rope_theta`, which transformers 4 looks for in `text_config`, and else takes to be 10,000 without a word;
* `tokenizer_class`, which transformers 4 does not know by its new name, and `torch_dtype`;
* `architectures` of the language model, by which vLLM finds its class;
* paths of the machine that the student was made on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForImageTextToText, AutoProcessor

from distilvlm.data.geometry import Geometry
from distilvlm.models.save import write
from distilvlm.models.sources import pretrained
from distilvlm.models.vlm import VLM

from .ours import Ours
from .parity import Case

SERVED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers of a Llava that vLLM has."""

_TOWER = "vision_tower."
_PUBLISHED = "vision_tower.vision_model."


def write_stock(vlm: VLM, directory: Path, geometry: Geometry, chat_template: str | None) -> None:
    """The checkpoint's files, into a directory that is there."""
    write(vlm, directory, geometry, chat_template)
    config: Any = vlm.model.config
    if config.vision_config.model_type in SERVED_TOWERS:
        _rename(directory)
    edit(directory / "config.json", lambda config: _complete(config, vlm))
    edit(directory / "tokenizer_config.json", _known_class)


class Stock:
    """The exported directory as a stranger loads it: stock classes, its own processor. A `Speaker`."""

    def __init__(self, directory: Path, ours: Ours) -> None:
        source = str(directory)
        model: Any = pretrained(AutoModelForImageTextToText.from_pretrained, source, torch.float32)
        self._model = model.eval()
        self._processor: Any = AutoProcessor.from_pretrained(source)
        self._ours = ours
        self.prompt: Sequence[int] = ()
        self.features: Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def begin(self, case: Case) -> Tensor:
        text = self._ours.text(case)
        read = self._processor(
            text=self._ours.marked(text, self._processor.image_token),
            images=None if case.picture is None else [case.picture],
            return_tensors="pt",
            add_special_tokens=not self._ours.begins_by_itself(text),
        )
        ids = read["input_ids"][0]
        self.prompt = ids[ids != self._model.config.image_token_index].tolist()
        if case.picture is not None:
            self.features = torch.cat(list(self._model.get_image_features(read["pixel_values"]).pooler_output))
        else:
            self.features = None
        self._cache = None
        return self._read(**read)

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        return self._read(input_ids=torch.tensor([[token]]))

    def _read(self, **inputs: Any) -> Tensor:
        inputs.pop("attention_mask", None)
        output = self._model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        return output.logits[0, -1].float()


def _rename(directory: Path) -> None:
    for file in sorted(directory.glob("*.safetensors")):
        tensors = {_published(name): value for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.exists():
        edit(index, lambda held: held["weight_map"].update(_renamed(held["weight_map"])))


def _renamed(places: dict[str, str]) -> dict[str, str]:
    return {_published(name): places.pop(name) for name in list(places)}


def _published(name: str) -> str:
    known = name.startswith(_PUBLISHED) or not name.startswith(_TOWER)
    return name if known else _PUBLISHED + name.removeprefix(_TOWER)


def _complete(config: dict[str, Any], vlm: VLM) -> None:
    text = config["text_config"]
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(vlm.model.config.get_text_config())]
    text["architectures"] = [kind.__name__]
    rope = text.get("rope_parameters") or {}
    text["rope_theta"] = rope.get("rope_theta")
    text["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    for section in (config, text, config["vision_config"]):
        if "dtype" in section:
            section["torch_dtype"] = section["dtype"]
        if "/" in section.get("_name_or_path", "") and Path(section["_name_or_path"]).is_absolute():
            del section["_name_or_path"]


def _known_class(config: dict[str, Any]) -> None:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
