"""Reading checkpoints in the layout of the method's own repository: one base, and two adaptors in the same files.

Their directories hold a configuration of a custom class and, in safetensors, beside a Llama's own weights

    model.condition_layers.K.…                inserted layers          model.condition_layers_grounding.K.…
    model.embed_tokens_condition.weight       own embedding            model.embed_tokens_condition_grounding.weight
    model.norm_condition.weight               own final norm           model.norm_condition_grounding.weight
    lm_head_condtion.weight (sic)             own head                 lm_head_condtion_grounding.weight
    model.mm_projector.{0,2}.{weight,bias}    own projector            model.mm_projector_G.…
    model.vision_tower.vision_tower.…         CLIP, where it was saved, too

The left become the adaptor "multimodal", the right "grounding". Positions stand in no file: their class has one list
for 32 layers written into it, of which a host with fewer layers uses what it reaches, and the rest of the inserted
layers lies dead (specification §1.4, §1.5). Their workflow for text has no projector; the base's is a copy of the
multimodal one's.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from distilvlm.recipe.models import ModelSpec

from .. import hosted
from ..files import require_free
from ..llava_mod import composed, dense_config, output_head, parted
from ..save import Geometry, save
from ..sources import NotHere, refuse_pickled
from ..vlm import VLM
from . import adaptor as making
from .config import AdaptorConfig
from .host import Host
from .positions import PUBLISHED

log = logging.getLogger(__name__)

_NAMES = (
    (re.compile(r"model\.condition_layers(_grounding)?\.(\d+\..+)"), "layers.{}"),
    (re.compile(r"model\.embed_tokens_condition(_grounding)?\.(weight)"), "embed_tokens.{}"),
    (re.compile(r"model\.norm_condition(_grounding)?\.(weight)"), "norm.{}"),
    (re.compile(r"lm_head_condi?tion(_grounding)?\.(weight)"), "lm_head.{}"),
    (re.compile(r"model\.mm_projector(_G)?\.0\.(weight|bias)"), "projector.linear_1.{}"),
    (re.compile(r"model\.mm_projector(_G)?\.2\.(weight|bias)"), "projector.linear_2.{}"),
)
_COMPUTED = ".rotary_emb.inv_freq"


def read(
    checkpoint: str | Path, vision: str | None = None, positions: Sequence[int] | None = None
) -> tuple[VLM, Geometry]:
    """The base as a stock Llava with the checkpoint's adaptors, none of which is active, and the geometry of pictures.

    Args:
        checkpoint: with config.json, tokenizer and safetensors. Weights keep their dtypes.
        vision: directory or hub id of the encoder; default: what the checkpoint names.
        positions: behind which layers theirs are inserted, for a checkpoint of another variant than the published one.

    Raises:
        NotHere: a directory that is not there.
        ValueError: pickled weights; a checkpoint without inserted layers, or with another number of them than
            positions; a tensor that is missing, left over or of another shape.
    """
    vlm, geometry, adaptors = _parts(Path(checkpoint), vision, positions)
    _insert(vlm, adaptors, checkpoint)
    return vlm, geometry


def convert(
    checkpoint: str | Path, out: str | Path, vision: str | None = None, positions: Sequence[int] | None = None
) -> VLM:
    """Write OUT/base, a stock Llava, and OUT/adaptors, which names that as its base; returns the model.

    Arguments and errors as `read`; an `out` at which something is, is refused.
    """
    require_free(out)
    vlm, geometry, adaptors = _parts(Path(checkpoint), vision, positions)
    save(vlm, Path(out) / "base", geometry)
    _insert(vlm, adaptors, checkpoint)
    base = ModelSpec.model_validate({"from": str(Path(out) / "base")})
    hosted.save(vlm, base, 0, Path(out) / "adaptors", geometry)
    return vlm


_Adaptors = dict[str, tuple[AdaptorConfig, dict[str, Tensor]]]


def _parts(place: Path, vision: str | None, positions: Sequence[int] | None) -> tuple[VLM, Geometry, _Adaptors]:
    if not (place / "config.json").is_file():
        raise NotHere(place / "config.json")
    refuse_pickled(place)
    facts: dict[str, Any] = json.loads((place / "config.json").read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for file in sorted(place.glob("*.safetensors")):
        tensors |= load_file(file)
    adaptors, stock = sorted_out(tensors)
    if not adaptors:
        raise ValueError(f"{place} has no inserted layers (model.condition_layers.0.…): it is none of this method's")
    body, tower, projector, head = parted(stock, place)
    text = dense_config(facts | {"model_type": "llama"}, body, place)
    vlm, geometry = composed(
        place,
        facts,
        text,
        language=lambda _: body,
        head=output_head(head, body, text, place),
        projector=projector,
        tower=tower,
        vision=vision,
    )
    depth = text.num_hidden_layers
    return vlm, geometry, {name: _form(state, depth, positions, place, name) for name, state in adaptors.items()}


def _insert(vlm: VLM, adaptors: _Adaptors, place: str | Path) -> None:
    host = Host.attach(vlm.model)
    for name, (config, state) in adaptors.items():
        try:
            host.put(name, making.from_state(host.base, config, state))
        except ValueError as error:
            raise ValueError(f"{place}, {name}: {error}") from error


def sorted_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(adaptor -> its weights by our names, the stock model's by theirs). The multimodal projector is in both."""
    adaptors: dict[str, dict[str, Tensor]] = {}
    stock: dict[str, Tensor] = {}
    for name, value in tensors.items():
        found = next(((match, ours) for pattern, ours in _NAMES if (match := pattern.fullmatch(name))), None)
        if found is None:
            stock[name] = value
            continue
        if name.endswith(_COMPUTED):
            continue
        match, ours = found
        adaptors.setdefault("grounding" if match[1] else "multimodal", {})[ours.format(match[2])] = value
        if ".mm_projector." in name:
            stock[name] = value
    return {name: state for name, state in adaptors.items() if any(key.startswith("layers.") for key in state)}, stock


def _form(
    state: dict[str, Tensor], depth: int, positions: Sequence[int] | None, place: Path, name: str
) -> tuple[AdaptorConfig, dict[str, Tensor]]:
    """What the adaptor is, and its weights without those of layers that their class never runs."""
    count = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
    if positions is None:
        reached = [position for position in PUBLISHED["iaa-14"] if position < depth]
        if count not in (len(reached), len(PUBLISHED["iaa-14"])):
            raise ValueError(
                f"{place}: '{name}' has {count} inserted layers, the published list has {len(reached)} positions below "
                f"{depth}: say behind which layers they stand (positions)"
            )
    else:
        reached = list(positions)
        if count != len(reached):
            raise ValueError(f"{place}: '{name}' has {count} inserted layers, {len(reached)} positions are given")
    dead = {key for key in state if key.startswith("layers.") and int(key.split(".")[1]) >= len(reached)}
    if dead:
        log.info("%s: '%s' has %d layers that its class never runs: left out", place, name, count - len(reached))
    config = AdaptorConfig(positions=tuple(reached), tied=False, projector=True)
    return config, {key: value for key, value in state.items() if key not in dead}
