"""A dense checkpoint on disk becomes a sparse one on disk, and a proof that both are the same function.

A Llava is saved as any student of ours (save.py). A language model alone gets what its directory had: weights,
tokenizer with its chat template, generation settings. Weights keep the dtype that the dense checkpoint states.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from .files import directory_whole, remove, require_free
from .fingerprint import fingerprint
from .save import geometry_of, load, processor_template, save, stated_dtype
from .sources import config_of, pretrained, tokenizer_of
from .upcycling import TOLERANCE, upcycle

log = logging.getLogger(__name__)


def upcycle_checkpoint(
    source: str,
    out: str | Path,
    experts: int = 4,
    top_k: int = 2,
    layers: str | Sequence[int] = "even",
    seed: int = 0,
) -> None:
    """Write the sparse twin of a checkpoint; the other arguments are those of `upcycle`.

    Args:
        source: a directory or hub id of a Llava, or of a causal language model alone.
        out: a directory that is not there yet; it is whole or not there.

    Raises:
        ValueError: a model that cannot become sparse, with the reason.
        FileExistsError: `out` is there.
    """
    require_free(out)
    config = config_of(source, offline_first=False)
    if isinstance(config, LlavaConfig):
        vlm = upcycle(load(source, stated_dtype(config)), experts, top_k, layers, seed)
        save(vlm, out, geometry_of(source), processor_template(source))
        return
    tokenizer = tokenizer_of(source, plan=False)
    assert tokenizer is not None  # only a plan may lack it
    sparse = upcycle(_language_model(source, config), experts, top_k, layers, seed)
    with directory_whole(out) as partial:
        sparse.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    log.info("saved %s", out)


def stock(source: str) -> PreTrainedModel:
    """A checkpoint as the stock class of transformers loads it, strictly, in the dtype that it states."""
    config = config_of(source, offline_first=False)
    if not isinstance(config, LlavaConfig):
        return _language_model(source, config)
    return pretrained(LlavaForConditionalGeneration.from_pretrained, source, stated_dtype(config)).eval()


def random_text(model: PreTrainedModel, samples: int, length: int) -> Tensor:
    """Ids that are no picture, [samples, length], always the same ones."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    ids = torch.randint(rows, (samples, length), generator=torch.Generator().manual_seed(0))
    if isinstance(model, LlavaForConditionalGeneration):
        ids[ids == model.config.image_token_index] = 0
    return ids.to(model.device)


@dataclass(frozen=True)
class Probe:
    """What a model computes, for comparing it with another that need not be in memory at the same time."""

    logits: Tensor  # [samples, length, V] fp32, of random texts
    seeing: str | None  # hash of a Llava's tower and projector

    @staticmethod
    def of(model: PreTrainedModel) -> Probe:
        """Computed in fp32, which the model's weights are brought to, in place."""
        model.float().eval()
        with torch.no_grad():
            logits = model(input_ids=random_text(model, 2, 48), use_cache=False).logits.cpu()
        if not isinstance(model, LlavaForConditionalGeneration):
            return Probe(logits, None)
        towers = fingerprint(model.model.vision_tower), fingerprint(model.model.multi_modal_projector)
        return Probe(logits, " ".join(towers))

    @property
    def largest(self) -> float:
        """The largest logit's size."""
        return float(self.logits.abs().max())

    def difference(self, other: Probe) -> float:
        """max |Δlogit|.

        Raises ValueError where the two see pictures with different weights, or logits differ by more than rounding.
        """
        if self.seeing != other.seeing:
            raise ValueError("vision tower or projector of the sparse checkpoint are not the dense one's")
        found = float((self.logits - other.logits).abs().max())
        if not found <= TOLERANCE * self.largest:
            raise ValueError(
                f"the sparse checkpoint differs from the dense one: max |Δlogit| is {found:.1e}, of logits up to "
                f"{self.largest:.1f}"
            )
        return found


def require_same(dense: Probe, sparse: Probe, out: str | Path) -> float:
    """max |Δlogit| of a checkpoint that was just written to `out`, which is removed if it is another function."""
    try:
        return dense.difference(sparse)
    except ValueError:
        remove(Path(out))
        raise


def _language_model(source: str, config: PretrainedConfig) -> PreTrainedModel:
    return pretrained(AutoModelForCausalLM.from_pretrained, source, stated_dtype(config)).eval()
