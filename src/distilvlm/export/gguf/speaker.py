"""A GGUF student asked in llama.cpp itself, through llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ours import Ours
from ..parity import Case

_FP32 = 0  # ggml's number for the type
_NO_FLASH = 0
_POSITIONS = 4096  # of the context that is set up, at most


class LlamaCpp:
    """llama.cpp with a language model and its mmproj. A `Speaker`.

    Args:
        prepared: pictures are handed over as our canvases; otherwise as they are, and llama.cpp makes squares of them.

    Raises:
        ValueError: llama.cpp refuses a file, with what it said.
    """

    def __init__(self, model: Path, mmproj: Path, ours: Ours, prepared: bool = True) -> None:
        # By name: it compiles for minutes, so that not even this package's own checks may expect it to be there.
        self._llama: Any = importlib.import_module("llama_cpp")
        self._mtmd: Any = importlib.import_module("llama_cpp.mtmd_cpp")
        self._ours = ours
        self._prepared = prepared
        self.prompt: Sequence[int] = ()
        self.features: Tensor | None = None
        self._said: list[str] = []
        self._log = self._llama.llama_log_callback(lambda _, text, __: self._said.append(text.decode(errors="replace")))
        for quieten in (self._llama.llama_log_set, self._mtmd.mtmd_log_set, self._mtmd.mtmd_helper_log_set):
            quieten(self._log, None)
        self._llama.llama_backend_init()
        settings = self._llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = self._made(self._llama.llama_model_load_from_file(str(model).encode(), settings), model)
        settings = self._llama.llama_context_default_params()
        settings.n_ctx = min(_POSITIONS, self._llama.llama_model_n_ctx_train(self._model))
        settings.n_batch = settings.n_ubatch = settings.n_ctx
        settings.type_k = settings.type_v = _FP32
        settings.flash_attn_type = _NO_FLASH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = self._made(self._llama.llama_init_from_model(self._model, settings), model)
        settings = self._mtmd.mtmd_context_params_default()
        settings.use_gpu, settings.warmup, settings.print_timings = False, False, False
        settings.n_threads, settings.flash_attn_type = torch.get_num_threads(), _NO_FLASH
        self._eyes = self._made(self._mtmd.mtmd_init_from_file(str(mmproj).encode(), self._model, settings), mmproj)
        self._rows: int = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))

    def close(self) -> None:
        """Give back what llama.cpp holds."""
        self._mtmd.mtmd_free(self._eyes)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def begin(self, case: Case) -> Tensor:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        text = self._ours.text(case)
        begins = not self._ours.begins_by_itself(text)
        bitmaps = [] if case.picture is None else [self._bitmap(case)]
        marked = self._ours.marked(text, self._mtmd.mtmd_default_marker().decode()).encode()
        asked = self._mtmd.mtmd_input_text(text=marked, text_len=len(marked), add_special=begins, parse_special=True)
        chunks = self._mtmd.mtmd_input_chunks_init()
        given = (self._mtmd.mtmd_bitmap_p_ctypes * max(1, len(bitmaps)))(*bitmaps)
        try:
            self._accepted(self._mtmd.mtmd_tokenize(self._eyes, chunks, ctypes.byref(asked), given, len(bitmaps)))
            return self._read(chunks)
        finally:
            self._mtmd.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                self._mtmd.mtmd_bitmap_free(bitmap)

    def step(self, token: int) -> Tensor:
        ids = (self._llama.llama_token * 1)(token)
        self._accepted(self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(ids, 1)))
        return self._logits()

    def _read(self, chunks: Any) -> Tensor:
        prompt: list[int] = []
        self.features = None
        past = self._llama.llama_pos(0)
        number = self._mtmd.mtmd_input_chunks_size(chunks)
        for index in range(number):
            chunk = self._mtmd.mtmd_input_chunks_get(chunks, index)
            if self._mtmd.mtmd_input_chunk_get_type(chunk) == self._mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                length = ctypes.c_size_t()
                ids = self._mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(length))
                prompt += ids[: length.value]
            last = index + 1 == number
            done = self._mtmd.mtmd_helper_eval_chunk_single(
                self._eyes, self._context, chunk, past.value, 0, _POSITIONS, last, ctypes.byref(past)
            )
            self._accepted(done)
            if self._mtmd.mtmd_input_chunk_get_type(chunk) == self._mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                self.features = self._seen(self._mtmd.mtmd_input_chunk_get_n_tokens(chunk))
        self.prompt = prompt
        return self._logits()

    def _seen(self, tokens: int) -> Tensor:
        width = self._llama.llama_model_n_embd_inp(self._model)
        found = self._mtmd.mtmd_get_output_embd(self._eyes)
        return torch.from_numpy(np.ctypeslib.as_array(found, (tokens, width)).copy())

    def _bitmap(self, case: Case) -> Any:
        assert case.picture is not None
        if self._prepared:
            pixels = self._ours.seen(case.picture).permute(1, 2, 0).contiguous().numpy()
        else:
            pixels = np.ascontiguousarray(np.asarray(case.picture))
        height, width, _ = pixels.shape
        data = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
        return self._mtmd.mtmd_bitmap_init(width, height, data)

    def _logits(self) -> Tensor:
        found = self._llama.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(found, (self._rows,)).copy())

    def _made(self, handle: Any, file: Path) -> Any:
        if not handle:
            raise ValueError(f"llama.cpp does not load {file.name}: {self._last()}")
        return handle

    def _accepted(self, code: int) -> None:
        if code:
            raise ValueError(f"llama.cpp gave up with {code}: {self._last()}")

    def _last(self) -> str:
        return " ".join("".join(self._said).split("\n")[-4:]).strip() or "it said nothing"
