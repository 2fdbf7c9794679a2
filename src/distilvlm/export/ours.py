"""The student as this package runs it: what every exported form is compared with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import DynamicCache

from distilvlm.data.batch import SampleKey
from distilvlm.data.geometry import Geometry, canvas, decode
from distilvlm.data.records import PICTURE, Record, Turn
from distilvlm.data.template import Encoded, Kind, Template
from distilvlm.models.forward import embeddings, vision_features
from distilvlm.models.vlm import VLM

from .parity import Case

PROMPT = "Describe the picture."


@dataclass(frozen=True)
class _Line:
    """One prompt, as `models.forward` wants its rows."""

    input_ids: Tensor  # [1, length] int64
    attention_mask: Tensor
    placeholder_rows: Tensor
    sizes: None = None


class Ours:
    """A VLM, asked greedily, in fp32. A `Speaker`."""

    def __init__(self, vlm: VLM, geometry: Geometry) -> None:
        assert vlm.tokenizer is not None  # it has weights, so it has a tokenizer
        self.vlm = vlm
        self.geometry: Geometry = geometry
        self.template = Template.of(kind_of(vlm), vlm.tokenizer)
        self.prompt: Sequence[int] = ()
        self.features: Tensor | None = None
        self._cache: Any = None
        self._length = 0

    def seen(self, picture: Image.Image) -> Tensor:
        """The canvas of a picture, uint8 [3, size, size]."""
        red, green, blue = (int(255 * mean) for mean in self.vlm.layout.mean)
        return canvas(picture, self.geometry, self.vlm.layout.size, (red, green, blue))

    def encoded(self, case: Case) -> Encoded:
        """The prompt as ids, the picture in front of it as placeholders."""
        record = Record(SampleKey("", "", 0), case.name, () if case.picture is None else ("",), _turns(case))
        return self.template.prompt(record, self.vlm.layout.placeholders)

    def text(self, case: Case) -> str:
        """The prompt as the template writes it, a private character for the picture (`marked`)."""
        return self.template.renderer.opening(_turns(case))

    def marked(self, text: str, marker: str) -> str:
        """`text` with a program's own marker for the picture."""
        return text.replace(PICTURE, marker)

    def begins_by_itself(self, text: str) -> bool:
        """Whether BOS stands in the text, so that no tokenizer may put another before it."""
        bos: Any = self.template.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    @torch.no_grad()
    def begin(self, case: Case) -> Tensor:
        model, encoded = self.vlm.model, self.encoded(case)
        text = torch.ones_like(encoded.input_ids, dtype=torch.bool)
        text[encoded.placeholder_positions] = False
        self.prompt = encoded.input_ids[text].tolist()
        line = _Line(encoded.input_ids[None], torch.ones_like(encoded.input_ids)[None], encoded.placeholder_positions)
        shown = None
        if case.picture is not None:
            shown = vision_features(model, self.vlm.layout, self.seen(case.picture)[None])
        embedded = embeddings(model, self.vlm.layout, line, shown)
        self.features = embedded[0, encoded.placeholder_positions] if case.picture is not None else None
        self._cache, self._length = DynamicCache(config=model.config.get_text_config()), 0
        return self._read(embedded)

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        return self._read(self.vlm.model.get_input_embeddings()(torch.tensor([[token]])))

    def _read(self, embedded: Tensor) -> Tensor:
        positions = torch.arange(self._length, self._length + embedded.shape[1])[None]
        self._length += embedded.shape[1]
        hidden = self.vlm.model.get_decoder()(
            inputs_embeds=embedded,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state[:, -1]
        return self.vlm.model.lm_head(hidden)[0].float()


def _turns(case: Case) -> tuple[Turn, ...]:
    return (Turn("user", case.prompt if case.picture is None else f"{PICTURE}\n{case.prompt}"),)


def kind_of(vlm: VLM) -> Kind:
    """The template that a finished student is asked in: its own, or none at all."""
    return "chat" if vlm.tokenizer is not None and vlm.tokenizer.chat_template else "plain"


def comparable(vlm: VLM) -> Tensor:
    """Ids that an answer may hold, [embedding rows] bool."""
    allowed = torch.ones(vlm.embedding_rows, dtype=torch.bool)
    if not vlm.image_id_is_virtual:
        allowed[vlm.image_id] = False
    return allowed


def ends_of(vlm: VLM) -> Collection[int]:
    """Ids that end an answer, as the finished student's generation settings have them."""
    ends = vlm.model.generation_config.eos_token_id if vlm.model.generation_config else None
    return {ends} if isinstance(ends, int) else set(ends or ())


def questions(pictures: Sequence[str], prompt: str, plain: bool) -> list[Case]:
    """What is asked: every picture, and one question without any.

    Args:
        pictures: files; none is a drawing of coloured shapes, which is no square.
        plain: the student knows no conversation, and is shown nothing but pictures.
    """
    shown = [Case(path, "" if plain else prompt, decode(path)) for path in pictures]
    shown = shown or [Case("a drawing", "" if plain else prompt, drawing())]
    return shown if plain else [*shown, Case("text alone", "Name three colours and one animal.")]


def drawing() -> Image.Image:
    """Shapes over a gradient, 320 × 240: edges, flat areas and colours, the same on every machine."""
    image = Image.linear_gradient("L").resize((320, 240)).convert("RGB")
    pen = ImageDraw.Draw(image)
    pen.ellipse((30, 40, 130, 140), fill=(220, 40, 40))
    pen.rectangle((170, 30, 290, 110), fill=(40, 90, 220))
    pen.polygon([(200, 220), (250, 130), (300, 220)], fill=(250, 210, 40))
    pen.line((0, 230, 160, 160), fill=(20, 130, 60), width=9)
    return image
