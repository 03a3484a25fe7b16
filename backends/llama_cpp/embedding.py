"""Looks token ids up in embed.gguf, for the first window of several.

Fed with embeddings instead of token ids, that window needs no vocabulary, and libllama copies no
rows of logits that nobody asked for. The rows are the same bits that libllama's own lookup gives:
both are ggml's dequantiser of the tensor's type.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backends.base import BackendFault
from backends.llama_cpp.library import GgufInitParams, Library

_TENSOR = b"token_embd.weight"
_F32 = 4  # bytes


class Embedding:
    """The token embedding, mapped from its file. Rows are [hidden]."""

    def __init__(self, library: Library, path: Path, hidden: int) -> None:
        self._hidden = hidden
        offset, kind, size = _find(library, path)
        row_bytes = library.ggml.ggml_row_size(kind, hidden)
        if row_bytes == 0 or size % row_bytes or offset + size > path.stat().st_size:
            raise BackendFault(f"{path.name} does not hold rows of {hidden} values")
        self._to_float = library.to_float(kind)
        self._row_bytes: int = row_bytes
        self._words: int = size // row_bytes
        self._table = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(size,))
        self._address = self._table.ctypes.data

    @property
    def size_bytes(self) -> int:
        """Bytes of the table, mapped like any other weights."""
        return self._words * self._row_bytes

    def rows(self, ids: Sequence[int], target: int) -> None:
        """Write the rows of `ids` to the address `target`, [len(ids), hidden], one after another.

        Row by row: no copy of the quantised rows is made, and a call costs less than 1 µs.
        """
        if ids and (min(ids) < 0 or max(ids) >= self._words):
            raise BackendFault(f"a token id is not among the model's {self._words}")
        step = self._hidden * _F32
        for place, token in enumerate(ids):
            source = self._address + token * self._row_bytes
            if self._to_float is None:  # F32 already
                ctypes.memmove(target + place * step, source, step)
            else:
                self._to_float(source, target + place * step, self._hidden)


def _find(library: Library, path: Path) -> tuple[int, int, int]:
    """Where the tensor lies in the file: byte offset, GGML type number, bytes."""
    ggml = library.ggml
    library.journal.complaints.clear()
    file = ggml.gguf_init_from_file(os.fsencode(path), GgufInitParams(True, None))
    if not file:
        raise BackendFault(f"{path.name} cannot be read: {library.journal.cause()}")
    try:
        index = ggml.gguf_find_tensor(ctypes.c_void_p(file), _TENSOR)
        if index < 0:
            raise BackendFault(f"{path.name} holds no token embedding")
        offset = ggml.gguf_get_data_offset(file) + ggml.gguf_get_tensor_offset(file, index)
        kind = ggml.gguf_get_tensor_type(file, index)
        return offset, kind, ggml.gguf_get_tensor_size(file, index)
    finally:
        ggml.gguf_free(file)
