"""IAA's golden cases: golden/iaa.md says what each array is.

The file is one model and what it computes, in several cases (`w`, `in`, `mid`, `out`, ...): each is held against our
model of the file's weights, read by the converter of the method's checkpoints and run through the data room.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, GenerationConfig

from distilvlm.data.batch import Batch
from distilvlm.data.geometry import canvas
from distilvlm.data.stage import background
from distilvlm.evaluate.grounding import iou, unpadded
from distilvlm.models import forward
from distilvlm.models.adaptors import AdaptorConfig, Host
from distilvlm.models.adaptors.positions import PUBLISHED
from distilvlm.models.adaptors.published import read as read_checkpoint
from distilvlm.models.adaptors.published import sorted_out
from distilvlm.models.towers import family_statistics
from distilvlm.models.vlm import VLM, VisionLayout
from tests.golden_cases import Arrays, GoldenCase, Reading, near
from tests.golden_llava_mod_pictures import batch_of, labels_of, tokenizer

VALUES = 1e-4
WORKFLOWS = {"Text": "text", "MM": "multimodal", "G": "grounding"}


@dataclass
class Model:
    """Our model of the file's weights, and what was computed with it already."""

    vlm: VLM
    host: Host
    given: Arrays  # all of the file's inputs
    named: dict[str, str]  # the reference's name of a weight of the multimodal adaptor -> ours
    found: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self.found:
            self.found[name] = compute()
        return self.found[name]

    @property
    def features(self) -> Tensor:
        """[pictures, patches, d_vision], of pictures that are normalised already."""
        model, layout = self.vlm.model, self.vlm.layout

        def see() -> Tensor:
            with torch.no_grad():
                seen = model.model.vision_tower(self.given["pixel_values"], output_hidden_states=True)
            return seen.hidden_states[layout.layer][:, 1:]

        return self.once("features", see)

    def batch(self, which: str) -> Batch:
        ids, labels = self.given[f"{which}_ids"], self.given[f"{which}_labels"]
        every, words = torch.ones_like(ids, dtype=torch.bool), self.vlm.embedding_rows
        return self.once(f"batch {which}", lambda: batch_of(ids, labels, every, self.features, words, "iaa"))

    def prompt(self, which: str, workflow: str) -> tuple[Tensor, Tensor]:
        """Embedded rows and their mask, as long as the reference has them."""
        batch = self.batch(which)
        length = int(batch.attention_mask.sum(1).max())
        with self.host.use(workflow):
            embedded = forward.embeddings(self.vlm.model, self.vlm.layout, batch, batch.features)
        return embedded[:, :length], batch.attention_mask[:, :length]

    def run(self, workflow: str, **inputs: Any) -> Any:
        with self.host.use(workflow), torch.no_grad():
            return self.vlm.model(**inputs, output_hidden_states=True, use_cache=True)

    def seen(self, which: str, workflow: str) -> Any:
        """The stock class's output on rows with pictures."""

        def run() -> Any:
            embedded, mask = self.prompt(which, workflow)
            return self.run(workflow, inputs_embeds=embedded, attention_mask=mask)

        return self.once(f"{which} {workflow}", run)

    def read_text(self, workflow: str) -> Any:
        return self.once(f"text {workflow}", lambda: self.run(workflow, input_ids=self.given["text_ids"]))

    def greedy(self, workflow: str, length: int) -> tuple[Tensor, Tensor]:
        """(tokens [rows, length], logits [rows, length, V]) of `generate`."""
        settings = GenerationConfig(
            max_new_tokens=length, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )

        def answer() -> tuple[Tensor, Tensor]:
            if workflow == "text":
                given = {"input_ids": self.given["text_ids"]}
            else:
                embedded, mask = self.prompt("mm", workflow)
                given = {"inputs_embeds": embedded, "attention_mask": mask}
            with self.host.use(workflow):
                out: Any = self.vlm.model.generate(**given, generation_config=settings)
            return out.sequences[:, -length:], torch.stack(out.logits, dim=1)

        return self.once(f"greedy {workflow}", answer)

    def gradients(self) -> dict[str, Tensor]:
        """Of the loss of rows with pictures, by the reference's names."""

        def differentiate() -> dict[str, Tensor]:
            adaptor = self.host["multimodal"]
            parameters = dict(adaptor.named_parameters())
            loss = self.loss("mm")
            slopes = torch.autograd.grad(loss, list(parameters.values()))
            assert not any(p.requires_grad for p in self.vlm.model.parameters()), "the base is to stay frozen"
            return dict(zip(parameters, slopes, strict=True))

        return self.once("gradients", differentiate)

    def loss(self, which: str) -> Tensor:
        embedded, mask = self.prompt(which, "multimodal")
        labels = labels_of(self.batch(which))[:, : embedded.shape[1]]
        with self.host.use("multimodal"):
            logits = self.vlm.model(inputs_embeds=embedded, attention_mask=mask).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def unpadded(self, which: str) -> Tensor:
        return self.prompt(which, "multimodal")[1].bool()

    def copied(self) -> Tensor:
        """Logits of texts with a fresh adaptor, a copy of the base."""
        positions = self.host["multimodal"].config.positions
        self.host.add("copied", AdaptorConfig(positions=positions))
        logits = self.run("copied", input_ids=self.given["text_ids"]).logits
        self.host.remove("copied")
        return logits


def check_weights(reading: Reading) -> None:
    """What the converter read is what the file holds, each weight under the name that our model has for it."""
    arrays = {name: reading.input(name) for name in reading.names}
    model = model_of(reading.case)
    adaptors, stock = sorted_out(arrays)
    for name, state in adaptors.items():
        held = model.host[name].state_dict()
        assert held.keys() == state.keys()
        for key, value in state.items():
            near(held[key], value, 0, f"{name}.{key}")
    held = model.vlm.model.state_dict()
    for name, value in stock.items():
        ours = name.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
        if ours == name and name != "lm_head.weight":
            ours = name.replace("model.", "model.language_model.", 1)
        if ".mm_projector." not in name:  # the base's is a copy of the multimodal one
            near(held[ours], value, 0, name)


def check_meta(reading: Reading) -> None:
    full = torch.tensor(PUBLISHED["iaa-14"])
    if "ehce_layers_full" in reading:
        reading.same("ehce_layers_full", full)
    facts = json.loads(bytes(reading.input("config_json").tolist()))
    if "ehce_layers_used" in reading:
        model = model_of(reading.case)
        used = torch.tensor(model.host["multimodal"].config.positions)
        reading.same("ehce_layers_used", used)
        assert model.host["grounding"].config.positions == model.host["multimodal"].config.positions
        assert model.host.base.depth == facts["num_hidden_layers"]


def check_inputs(reading: Reading) -> None:
    """Nothing is computed of them alone; every one is used by another case."""
    known = r"text_ids|text_padmask|mm_ids|mm_labels|pixel_values|ragged_ids|ragged_labels"
    for name in reading.names:
        if re.fullmatch(known, name):
            reading.input(name)


def check_intermediates(reading: Reading) -> None:
    model = model_of(reading.case)
    for name in reading.names:
        if name == "vision_features":
            reading.near(name, model.features, VALUES)
        elif match := re.fullmatch(r"image_embeds_(MM|G)", name):
            projector: Any = model.host[WORKFLOWS[match[1]]].projector
            reading.near(name, projector(model.features), VALUES)
        elif match := re.fullmatch(r"(?:(MM|G)|(ragged))(?:_(MM|G))?_(inputs_embeds|attention_mask|labels.*)", name):
            which = "ragged" if match[2] else "mm"
            embedded, mask = model.prompt(which, WORKFLOWS[match[1] or match[3] or "MM"])
            if match[4] == "inputs_embeds":  # theirs pads with embeddings of zero, which attention never reaches
                reading.near(name, embedded.masked_fill(~mask.bool().unsqueeze(2), 0), VALUES)
            elif match[4] == "attention_mask":
                reading.same(name, mask)
            else:
                reading.same(name, labels_of(model.batch(which))[:, : mask.shape[1]])


def check_outputs(reading: Reading) -> None:
    model = model_of(reading.case)
    for name in reading.names:
        if name == "init_copy_MM_noimage_logits":
            reading.near(name, model.once("copied", model.copied), VALUES)
        elif name == "text_rightpad_logits":
            mask = model.given["text_padmask"]
            out = model.run("text", input_ids=model.given["text_ids"], attention_mask=mask)
            near_where(reading, name, out.logits, mask.bool())
        elif match := re.fullmatch(r"(text|Text|(?:MM|G)_noimage)_(logits|hidden_states)", name):
            workflow = WORKFLOWS[match[1].removesuffix("_noimage").replace("text", "Text")]
            reading.near(name, _part(model.read_text(workflow), match[2]), VALUES)
        elif match := re.fullmatch(r"(MM|G)_(logits|hidden_states)", name):
            reading.near(name, _part(model.seen("mm", WORKFLOWS[match[1]]), match[2]), VALUES)
        elif match := re.fullmatch(r"(Text|MM|G)_greedy_(tokens|step_logits)", name):
            tokens, logits = model.greedy(WORKFLOWS[match[1]], reading.shape(name)[1])
            if match[2] == "tokens":
                reading.same(name, tokens)
            else:
                reading.near(name, logits, VALUES)
        elif match := re.fullmatch(r"(MM|G)_prefill_(base|iaa)_(key|value)_cache", name):
            adaptor = model.host[WORKFLOWS[match[1]]]
            layers = model.seen("mm", WORKFLOWS[match[1]]).past_key_values.layers
            first, end = (0, model.host.base.depth) if match[2] == "base" else (adaptor.slot, None)
            count = reading.shape(name)[0]
            slots = [getattr(layer, f"{match[3]}s") for layer in layers[first:end][:count]]
            reading.near(name, torch.stack(slots), VALUES)
        elif match := re.fullmatch(r"(MM|ragged)_loss", name):
            reading.near(name, model.loss("mm" if match[1] == "MM" else "ragged"), VALUES)
        elif re.fullmatch(r"ragged(_MM)?_logits", name):
            near_where(reading, name, model.seen("ragged", "multimodal").logits, model.unpadded("ragged"))


def check_gradients(reading: Reading) -> None:
    """Whole gradients, or their norms where the array is one number."""
    model = model_of(reading.case)
    slopes = model.gradients()
    for theirs in reading.names:
        slope = slopes[model.named[theirs]]
        found = slope if reading.shape(theirs) else slope.norm()
        reading.near(theirs, found, VALUES)
    norms = [name for name in reading.names if not reading.shape(name)]
    if norms:
        assert len(norms) == len(slopes), "every weight of the adaptor has a norm"


def check_boxes(reading: Reading) -> None:
    sizes, shares, truths = (reading.input(n).tolist() for n in ("image_wh", "pred_box_norm", "gt_box_abs"))
    boxes = [unpadded(box, *size) for box, size in zip(shares, sizes, strict=True)]
    reading.near("pred_box_abs", torch.tensor(boxes), VALUES)
    reading.near("iou", torch.tensor([iou(a, b) for a, b in zip(boxes, truths, strict=True)]), VALUES)


def check_padding(reading: Reading) -> None:
    mean, std = family_statistics("clip_vision_model")
    colour = background(VisionLayout(28, 14, 4, (True,) * 4, mean, std, "default", -2))
    for name in reading.names:
        if name.endswith("_in"):
            picture = Image.fromarray(reading.input(name).numpy())
            padded = canvas(picture, "pad", max(picture.size), colour)  # [3, side, side]
            reading.same(name.removesuffix("_in") + "_out", padded.permute(1, 2, 0))


KINDS: tuple[tuple[Callable[[Reading], None], Callable[[set[str]], bool]], ...] = (
    (check_weights, lambda names: {"model.embed_tokens.weight", "lm_head.weight"} <= names),
    (check_meta, lambda names: "config_json" in names),
    (check_inputs, lambda names: bool({"mm_ids", "text_ids"} & names)),
    (check_intermediates, lambda names: any(re.search(r"_embeds|^vision_features$|_spliced$", n) for n in names)),
    (check_outputs, lambda names: any(re.match(r"(text|MM|G|ragged|init_copy)_.*logits$", n) for n in names)),
    (check_gradients, lambda names: all(re.match(r"model\.|lm_head_", n) for n in names)),
    (check_boxes, lambda names: {"pred_box_norm", "gt_box_abs"} <= names),
    (check_padding, lambda names: all(n.endswith(("_in", "_out")) for n in names)),
)
"""How each kind is compared, and what its arrays' names are like."""


def read(case: GoldenCase) -> Reading | None:
    """What was compared with what; None for a case of another method's file."""
    names = set(case.arrays)
    if not any("config_json" in arrays for arrays in case.siblings.values()):
        return None
    compare = next((compare for compare, fits in KINDS if fits(names)), None)
    if compare is None:
        return None
    reading = Reading(case, {})
    compare(reading)
    reading.finish()
    return reading


def check(case: GoldenCase) -> bool:
    """Compares the case if it is one of ours; False if its arrays are of another kind."""
    return read(case) is not None


def near_where(reading: Reading, name: str, actual: Tensor, counts: Tensor) -> None:
    """Where `counts`; elsewhere is padding, of which the description says that it means nothing."""
    expected = reading.input(name)
    reading.near(name, torch.where(counts.unsqueeze(-1), actual, expected), VALUES)


_last: list[tuple[list[Tensor], Model]] = []


def model_of(case: GoldenCase) -> Model:
    """The file's model; kept, because all its cases are computed of it."""
    cases = {**case.siblings, case.name: case.arrays}
    weights = next(a for a in cases.values() if KINDS[0][1](set(a)))
    facts = next(a for a in cases.values() if KINDS[1][1](set(a)))
    given: Arrays = {}
    for arrays in cases.values():
        if KINDS[2][1](set(arrays)):
            given |= arrays
    made_of = [*weights.values(), facts["config_json"], *given.values()]
    if (
        not _last
        or len(_last[0][0]) != len(made_of)
        or any(a is not b for a, b in zip(_last[0][0], made_of, strict=True))
    ):
        _last[:] = [(made_of, _model(weights, bytes(facts["config_json"].tolist()).decode(), given))]
    return _last[0][1]


def _model(weights: Mapping[str, Tensor], facts: str, given: Arrays) -> Model:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        config = json.loads(facts)
        CLIPVisionConfig(**config["clip"]).save_pretrained(place / "clip")
        (place / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(place / "clip")}))
        save_file({key: value.contiguous() for key, value in weights.items()}, place / "model.safetensors")
        words = tokenizer(config["vocab_size"])
        words.pad_token = "w0"
        words.save_pretrained(place)
        vlm, geometry = read_checkpoint(place)
    assert geometry == config["image_aspect_ratio"]
    host = vlm.host
    assert host is not None
    integers = {key: value.long() if not value.is_floating_point() else value for key, value in given.items()}
    theirs = {id(value): name for name, value in weights.items()}
    named = {theirs[id(value)]: ours for ours, value in sorted_out(weights)[0]["multimodal"].items()}
    return Model(vlm, host, integers, named)


def _part(output: Any, which: str) -> Tensor:
    return torch.stack(output.hidden_states) if which == "hidden_states" else output.logits
