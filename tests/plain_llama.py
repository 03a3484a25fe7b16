"""One ordinary llama.cpp context, written with the plain ctypes bindings and nothing of halka.

The other side of every test of exactness: what a single llama.cpp process computes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

_KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # ggml.h: GGML_TYPE_*


class PlainLlama:
    """A whole model in one context. `cells`, `batch`, `slots` … as a stage would have them."""

    def __init__(
        self,
        path: Path,
        *,
        cells: int,
        batch: int,
        slots: int = 1,
        kv_type: str = "f16",
        flash: str = "auto",
    ) -> None:
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # the same kernels: weights are not repacked
        self._model = llama.llama_model_load_from_file(os.fsencode(path), params)
        assert self._model, f"llama.cpp cannot load {path}"
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = cells, batch, batch
        options.n_seq_max = slots
        options.kv_unified = slots > 1
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = _KV_TYPES[kv_type]
        options.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[flash]  # llama.h: LLAMA_FLASH_…
        self._context = llama.llama_init_from_model(self._model, options)
        assert self._context
        self.memory = llama.llama_get_memory(self._context)
        self.words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(batch, 0, 1)

    def __enter__(self) -> PlainLlama:
        return self

    def __exit__(
        self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)

    def step(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        *,
        slots: Sequence[int] | None = None,
        outputs: Sequence[bool] | None = None,
    ) -> NDArray[np.float32]:
        """One llama_decode: logits [rows with outputs, vocabulary]; all rows by default."""
        batch = self._batch
        batch.n_tokens = len(ids)
        wanted = [True] * len(ids) if outputs is None else list(outputs)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = int(token), int(positions[i])
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = int(slots[i]) if slots is not None else 0
            batch.logits[i] = wanted[i]
        assert llama.llama_decode(self._context, batch) == 0
        rows = [
            np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, i), (self.words,))
            for i, want in enumerate(wanted)
            if want
        ]
        return np.array(rows).reshape(len(rows), self.words)

    def greedy(self, prompt: Sequence[int], tokens: int, chunk: int) -> list[int]:
        """The answer to a prompt that is fed in chunks, always the likeliest token."""
        position, answer = 0, []
        for begin in range(0, len(prompt), chunk):
            ids = prompt[begin : begin + chunk]
            last = begin + len(ids) == len(prompt)
            outputs = [False] * (len(ids) - 1) + [last]
            logits = self.step(ids, range(position, position + len(ids)), outputs=outputs)
            position += len(ids)
        for _ in range(tokens):
            answer.append(int(logits[-1].argmax()))
            logits = self.step(answer[-1:], [position])
            position += 1
        return answer

    def trim(self, slot: int, position: int) -> None:
        """Forget what lies at and beyond the position."""
        assert llama.llama_memory_seq_rm(self.memory, slot, position, -1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give target the first positions of source, and nothing else."""
        self.trim(target, 0)
        llama.llama_memory_seq_cp(self.memory, source, target, 0, length)

    def clear(self) -> None:
        """Forget everything."""
        llama.llama_memory_clear(self.memory, True)

    def tokenise(self, text: str) -> list[int]:
        """Token ids, special spellings read as such, nothing added."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        vocab = llama.llama_model_get_vocab(self._model)
        count = llama.llama_tokenize(vocab, data, len(data), ids, len(ids), False, True)
        return list(ids[:count])
