"""Questions and answers of `distilvlm teach` as bytes: safetensors, which hold tensors and nothing that runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distilvlm.data.batch import Batch
from distilvlm.models.vlm import VLM
from distilvlm.teachers.interface import TeacherError

KIND = "application/x-safetensors"
"""Of a body."""


class MessageError(TeacherError):
    """A question or an answer that is none; says which tensor is wrong."""


@dataclass(frozen=True)
class Question:
    """What a model must know of a batch to give hidden states."""

    input_ids: Tensor  # [lines, length] int64
    attention_mask: Tensor  # [lines, length] int64
    placeholder_rows: Tensor  # [pictures * placeholders] int64
    rows: Tensor  # [rows] int64, the flat positions that are wanted
    pictures: Tensor | None  # [pictures, 3, size, size] uint8
    sizes: tuple[int, ...] | None = None  # of the samples in the one line of a packed batch

    @classmethod
    def of(cls, batch: Batch, rows: Tensor) -> Question:
        """Raises `TeacherError` where a batch has features in place of its pictures."""
        if batch.has_pictures and batch.pictures is None:
            raise TeacherError("a batch with kept features has no pictures for a teacher elsewhere")
        return cls(batch.input_ids, batch.attention_mask, batch.placeholder_rows, rows, batch.pictures, batch.sizes)

    def to(self, device: torch.device) -> Question:
        """The same on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors.items()})

    def pack(self) -> bytes:
        """As a body."""
        tensors = {name: value.cpu().contiguous() for name, value in self._tensors.items()}
        return save(tensors if self.sizes is None else {**tensors, "sizes": torch.tensor(self.sizes)})

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @classmethod
    def unpack(cls, body: bytes) -> Question:
        """Raises `MessageError` for what is no question; `require_fits` says whether a model can answer it."""
        found = unpack(body)
        wanted = {"input_ids", "attention_mask", "placeholder_rows", "rows"}
        if not wanted <= found.keys() <= wanted | {"pictures", "sizes"}:
            raise MessageError(f"the tensors are {sorted(found)}, not {sorted(wanted)}, maybe pictures and sizes")
        for name in found.keys() - {"pictures"}:
            if found[name].dtype != torch.int64:
                raise MessageError(f"{name} is {found[name].dtype}, not torch.int64")
        sizes = found.pop("sizes", None)
        given: dict[str, Any] = {"pictures": None, **found}
        return cls(**given, sizes=None if sizes is None else tuple(sizes.flatten().tolist()))

    def require_fits(self, vlm: VLM) -> None:
        """Raises `MessageError` unless `vlm` can answer: an index out of bounds would end a process on a GPU."""
        ids, mask, size = self.input_ids, self.attention_mask, vlm.layout.size
        shown = 0 if self.pictures is None else self.pictures.shape[0]
        if ids.ndim != 2 or ids.numel() == 0 or mask.shape != ids.shape:
            raise MessageError(f"input_ids are {list(ids.shape)} and attention_mask {list(mask.shape)}")
        if self.sizes is not None and not (
            len(ids) == 1 and min(self.sizes, default=0) > 0 and sum(self.sizes) <= ids.numel()
        ):
            raise MessageError(f"samples of {list(self.sizes)} positions are not in one line of {list(ids.shape)}")
        if not _within(ids, vlm.embedding_rows):
            raise MessageError(f"input_ids reach up to {int(ids.max())}, the model embeds {vlm.embedding_rows} ids")
        if not _within(mask, 2):
            raise MessageError("attention_mask has other values than 0 and 1")
        for name in ("placeholder_rows", "rows"):
            value: Tensor = getattr(self, name)
            if value.ndim != 1 or not _within(value, ids.numel()) or value.unique().numel() != value.numel():
                raise MessageError(f"{name} are not different positions of {list(ids.shape)}")
        if self.pictures is not None and (
            self.pictures.dtype != torch.uint8 or list(self.pictures.shape[1:]) != [3, size, size]
        ):
            raise MessageError(
                f"pictures are {list(self.pictures.shape)} {self.pictures.dtype}, the model sees uint8 "
                f"[pictures, 3, {size}, {size}]"
            )
        if self.placeholder_rows.numel() != shown * vlm.layout.placeholders:
            raise MessageError(
                f"{self.placeholder_rows.numel()} placeholders for {shown} pictures of {vlm.layout.placeholders} each"
            )


def unpack(body: bytes) -> dict[str, Tensor]:
    """The tensors of a body. Raises `MessageError`."""
    try:
        return load(body)
    except SafetensorError as error:
        raise MessageError(f"the body is no safetensors file: {error}") from None


def _within(values: Tensor, end: int) -> bool:
    return values.numel() == 0 or bool(((values >= 0) & (values < end)).all())
