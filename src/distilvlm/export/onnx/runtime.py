"""The exported graphs asked in onnxruntime: nothing of torch's or of the student's computes here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor

from ..ours import Ours
from ..parity import Case
from .graphs import DECODER, EMBEDDING, VISION


class Graphs:
    """An exported directory, with its own processor. A `Speaker`."""

    def __init__(self, directory: Path, ours: Ours) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3

        def opened(name: str) -> Any:
            file = directory / "onnx" / name
            return onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])

        self._vision, self._embedding, self._decoder = opened(VISION), opened(EMBEDDING), opened(DECODER)
        self._processor: Any = AutoProcessor.from_pretrained(directory)
        self._ours = ours
        self.prompt: Sequence[int] = ()
        self.features: Tensor | None = None
        self._past: dict[str, np.ndarray] = {}
        self._length = 0

    def begin(self, case: Case) -> Tensor:
        text = self._ours.text(case)
        read = self._processor(
            text=self._ours.marked(text, self._processor.image_token),
            images=None if case.picture is None else [case.picture],
            return_tensors="np",
            add_special_tokens=not self._ours.begins_by_itself(text),
        )
        ids = read["input_ids"]  # [1, length]
        shown = ids == self._processor.image_token_id
        self.prompt = ids[~shown].tolist()
        embedded = self._embedding.run(None, {"input_ids": np.where(shown, 0, ids)})[0]
        self.features = None
        if case.picture is not None:
            (features,) = self._vision.run(None, {"pixel_values": np.asarray(read["pixel_values"], np.float32)})
            embedded[shown] = features.reshape(-1, features.shape[-1])
            self.features = torch.from_numpy(features[0])
        empty = [put for put in self._decoder.get_inputs() if put.name.startswith("past_key_values")]
        self._past = {put.name: np.zeros((1, put.shape[1], 0, put.shape[3]), np.float32) for put in empty}
        self._length = 0
        return self._read(embedded)

    def step(self, token: int) -> Tensor:
        return self._read(self._embedding.run(None, {"input_ids": np.array([[token]], np.int64)})[0])

    def _read(self, embedded: np.ndarray) -> Tensor:
        first, self._length = self._length, self._length + embedded.shape[1]
        given = {
            "inputs_embeds": embedded,
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(first, self._length, dtype=np.int64)[None],
        }
        logits, *present = self._decoder.run(None, {**given, **self._past})
        self._past = dict(zip(self._past, present, strict=True))
        return torch.from_numpy(logits[0, -1])
