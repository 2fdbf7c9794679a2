"""The model card of an exported student: `README.md` with the metadata that hubs read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from distilvlm.data.geometry import Geometry
from distilvlm.models.parts import sizes
from distilvlm.models.vlm import VLM
from distilvlm.report.card import made, metadata
from distilvlm.report.read import Run, read_run

from .hugging_face import SERVED_TOWERS
from .parity import Parity

_GEOMETRY: dict[Geometry, str] = {
    "square": "stretched to {size} × {size} pixels",
    "pad": "padded to a square with the mean colour, then resized to {size} × {size} pixels",
    "crop": "resized so that the shorter side has {size} pixels, of which the middle is kept",
}


def card(vlm: VLM, source: str, geometry: Geometry, check: Parity) -> str:
    """The card's text. Of a run's student it has all that the run tells (data, licences, training, evaluation); what is
    not known of any other model is left for its author to say.

    Raises:
        ReportError: a file of the run is damaged.
    """
    config: Any = vlm.model.config
    text, vision = config.get_text_config(), config.vision_config
    name = name_of(source)
    total, active = sizes(vlm.model)
    run = _run_of(source)
    if run is None:
        bases = [base for part in (text, vision) if (base := _hub_id(part)) is not None]
        tags = ["llava", "vision-language", "distilvlm"]
        kind = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": tags}
        told, rest = ModelCardData(base_model=bases or None, **kind), ""
    else:
        told, rest = metadata(run), "\n" + "\n".join(made(run)) + "\n"
    per_token = "" if total == active else f", of which {active:,} serve one token"
    served = (
        "vLLM and SGLang: its class and the names of its tensors are those of published LLaVA checkpoints."
        if vision.model_type in SERVED_TOWERS
        else f"vLLM has no '{vision.model_type}' as the tower of a LLaVA: it is served by transformers or distilvlm."
    )
    return f"""---
{told.to_yaml()}
---

# {name}

A vision-language model, trained with distilvlm: a stock `LlavaForConditionalGeneration` that needs no code of its own.

| part | what | size |
|---|---|---|
| vision | {vision.model_type}, hidden state {vlm.layout.layer} | {vlm.layout.placeholders} tokens a picture |
| language | {text.model_type}, {text.num_hidden_layers} layers, {text.hidden_size} wide | {vlm.embedding_rows:,} ids |
| all | | {total:,} parameters{per_token} |

Pictures are {_GEOMETRY[geometry].format(size=vlm.layout.size)}: its processor does that.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
{_usage(vlm)}
answer = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Beside transformers: {served}

Checked against the student as distilvlm runs it: {check.lines()[0].partition(": ")[2]}. `parity.json` has it all.
{rest}"""


def _run_of(source: str) -> Run | None:
    """The run that has made a student, where it lies in one."""
    path = Path(source).expanduser().resolve()
    within = path.name == "model" and (path.parent / "recipe.yaml").is_file()
    return read_run(path.parent) if within else None


def name_of(source: str) -> str:
    """What a student is called: its run, or the last part of its directory or hub id."""
    path = Path(source).expanduser()
    if path.exists():
        path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _usage(vlm: VLM) -> str:
    if vlm.tokenizer is None or not vlm.tokenizer.chat_template:
        return (
            "from PIL import Image\n\n"
            'inputs = processor(text="<image>", images=Image.open("picture.jpg"), return_tensors="pt")'
        )
    return (
        'talk = [{"role": "user", "content": [{"type": "image", "path": "picture.jpg"},\n'
        '                                     {"type": "text", "text": "What is in the picture?"}]}]\n'
        "inputs = processor.apply_chat_template(\n"
        '    talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"\n'
        ")"
    )


def _hub_id(config: Any) -> str | None:
    """What a part came from, if that reads like a hub id and no place of this machine."""
    name = getattr(config, "_name_or_path", "") or ""
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists() else None
