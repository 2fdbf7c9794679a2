"""A vision encoder alone on disk: configuration, weights and image processor, usable as `vision.from` of a recipe.

One without experts is a stock checkpoint; experts that are alone in their layers are merged into one. With several
experts it is read by this package only, and refused by plain transformers (mixed_classes.py). Beside the stock files
lies `distilvlm.json`: the layer that is read, and the geometry of pictures.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .alone import Alone, Encoder
from .files import MANIFEST, directory_whole, verify
from .merging import mergeable, merged
from .save import OURS, Geometry, facts_of, image_processor, layout_in
from .sources import config_of
from .towers import pretrained_tower, vision_half
from .vlm import VisionLayout

log = logging.getLogger(__name__)


def save_encoder(
    tower: PreTrainedModel, layout: VisionLayout, directory: str | Path, geometry: Geometry, replace: bool = False
) -> None:
    """Write an encoder; the one in memory stays as it is. Arguments as `save.save`."""
    if tower.device.type == "meta":
        raise ValueError("this encoder was built for a plan, without weights: there is nothing to save")
    if mergeable(tower):
        tower = merged(tower)
        log.info("experts are alone in their layers, and merged into stock weights")
    with directory_whole(directory, replace=replace) as partial:
        tower.save_pretrained(partial)
        image_processor(layout, geometry).save_pretrained(partial)
        (partial / OURS).write_text(json.dumps(facts_of(layout, geometry), indent=1) + "\n", encoding="utf-8")
    log.info("saved %s", directory)


def load_encoder(directory: str | Path, dtype: torch.dtype = torch.float32) -> Encoder:
    """An encoder that `save_encoder` wrote, with experts where it has some.

    Raises:
        NotHere: nothing is there.
        ValueError: a damaged directory, one that this package did not write, a tensor missing or left over.
    """
    source = str(directory)
    config = vision_half(config_of(source, offline_first=False))
    if (Path(source) / MANIFEST).exists() and (problems := verify(source, contents=False)):
        raise ValueError("the encoder is damaged:\n  " + "\n  ".join(problems))
    layout = layout_in(source)
    if layout is None:
        raise ValueError(f"{source} has no {OURS}, which says what layer is read: name it as vision.from of a recipe")
    return Encoder(Alone(pretrained_tower(source, config, dtype).eval(), layout.layer), layout)
