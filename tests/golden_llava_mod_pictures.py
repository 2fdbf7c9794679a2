"""LLaVA-MoD's golden cases of pictures in a sequence."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from distilvlm.data.batch import Batch, SampleKey
from distilvlm.data.collate import collate
from distilvlm.data.rendering import Rendering
from distilvlm.data.sample import Sample
from distilvlm.data.template import PICTURE, SAFE_ID, Encoded, Template
from distilvlm.models import forward
from distilvlm.models.vlm import VisionLayout
from tests.golden_cases import Reading, near

VALUES = 1e-5

DEPARTURES = {
    "padding": "the reference pads with embeddings of zero, ours is that of a safe id: attention never reaches it",
}


def check_expansion(reading: Reading) -> None:
    """Through the data room: words become ids, a picture its placeholders, samples a batch; then the embeddings."""
    ids, labels, mask = (reading.input(name) for name in ("input_ids", "labels", "attention_mask"))
    embed, features = reading.input("embed"), reading.input("image_feats")
    placeholders = features.shape[1]
    batch = batch_of(ids, labels, mask, features, len(embed), reading.case.file)
    embedded, rest = _embedded(embed, batch, placeholders)
    length = reading.shape("out_labels")[1]  # ours may be padded further
    assert not batch.attention_mask[:, length:].any()
    embedded, real = embedded[:, :length], batch.attention_mask[:, :length].bool()
    near(embedded[~real], embed[SAFE_ID].expand(int((~real).sum()), -1), 0, DEPARTURES["padding"])
    reading.near("out_embeds", embedded.masked_fill(~real.unsqueeze(2), 0), VALUES)
    reading.same("out_attention_mask", real)
    reading.same("out_labels", labels_of(batch)[:, :length])
    if "out_position_ids_is_none" in reading:
        given = reading.input("out_position_ids_is_none")
        reading.same("out_position_ids_is_none", torch.full_like(given, rest.get("position_ids") is None))


def batch_of(ids: Tensor, labels: Tensor, mask: Tensor, features: Tensor, words: int, file: str) -> Batch:
    """Rows in the reference's form, -200 for a picture, through the data room."""
    placeholders = features.shape[1]
    template, samples, shown = Template.of("plain", tokenizer(words)), [], 0
    for number in range(len(ids)):
        own, learned = ids[number][mask[number]], labels[number][mask[number]]
        pictures = int((own == -200).sum())
        encoded = _encoded(template, own, learned, placeholders)
        samples.append(
            Sample(
                key=SampleKey("golden", file, number),
                input_ids=encoded.input_ids,
                labels=encoded.labels,
                placeholder_positions=encoded.placeholder_positions,
                visual_positions=encoded.placeholder_positions,
                placeholders=placeholders,
                features=features[shown : shown + pictures] if pictures else None,
            )
        )
        shown += max(1, pictures)  # the reference shows a text a picture of zeros, of which nothing is left
    return collate(samples)


def labels_of(batch: Batch) -> Tensor:
    """The reference's form of what is learned: each position's own token, or -100."""
    found = torch.full_like(batch.input_ids, -100)
    found.view(-1)[batch.response_rows + 1] = batch.response_targets
    return found


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    """One whose words are w0, w1, ..., and `<image>` behind them."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)} | {"<image>": words}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=["<image>"])


def _encoded(template: Template, ids: Tensor, labels: Tensor, placeholders: int) -> Encoded:
    text, spans = "", []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        word = PICTURE if token == -200 else f"w{token}"
        if label != -100:
            assert label == token, "a label is the token itself"
            spans.append((len(text), len(text) + len(word)))
        text += word + " "
    return template._tokenise(Rendering(text, tuple(spans)), int((ids == -200).sum()), placeholders)[0]


def _embedded(embed: Tensor, batch: Batch, placeholders: int) -> tuple[Tensor, dict[str, Any]]:
    """What the language model of a stock Llava is given. The case's features are projected already: the projector is
    the identity."""
    words, width = embed.shape
    text = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1, image_size=4, patch_size=4
    )
    model: Any = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    projector = model.model.multi_modal_projector
    projector.act = nn.Identity()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embed)
        for linear in (projector.linear_1, projector.linear_2):
            linear.weight.copy_(torch.eye(width))
            linear.bias.zero_()
    grey = (0.5, 0.5, 0.5)
    layout = VisionLayout(4, 4, placeholders, (True,) * placeholders, grey, grey, "full", -2)
    given: dict[str, Any] = {}

    def record(**arguments: Any) -> Any:
        given.update(arguments)
        return type("Output", (), {"last_hidden_state": arguments["inputs_embeds"]})

    with patch.object(model.model.language_model, "forward", record):
        forward.hidden_states(model, layout, batch, batch.features)
    assert given["attention_mask"] is batch.attention_mask
    return given.pop("inputs_embeds"), given
