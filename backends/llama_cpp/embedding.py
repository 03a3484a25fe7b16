"""Looks token ids up in embed.gguf, for the first window of several.

Fed with embeddings instead of token ids, that window needs no vocabulary, and libllama copies no
rows of logits that nobody asked for. The rows are the same bits that libllama's own lookup gives:
both are ggml's dequantiser of the tensor's type.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault
from backends.llama_cpp.library import GgufInitParams, Library

_TENSOR = b"token_embd.weight"


class Embedding:
    """The token embedding, mapped from its file. Rows are [hidden]."""

    def __init__(self, library: Library, path: Path, hidden: int) -> None:
        self._hidden = hidden
        offset, kind, size = _find(library, path)
        row_bytes = library.ggml.ggml_row_size(kind, hidden)
        if row_bytes == 0 or size % row_bytes or offset + size > path.stat().st_size:
            raise BackendFault(f"{path.name} does not hold rows of {hidden} values")
        self._to_float = library.to_float(kind)
        self._rows: Any = np.memmap(
            path, dtype=np.uint8, mode="r", offset=offset, shape=(size // row_bytes, row_bytes)
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of the table, mapped like any other weights."""
        return int(self._rows.nbytes)

    def rows(self, ids: NDArray[np.int32], out: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows of `ids`, written to the front of out [≥ tokens, hidden]."""
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self._rows)):
            raise BackendFault(f"a token id is not among the model's {len(self._rows)}")
        picked = np.ascontiguousarray(self._rows[ids])
        result = out[: len(ids)]
        if self._to_float is None:  # F32 already
            result[:] = picked.view(np.float32)
        else:  # a row is a whole number of blocks, so that all rows are one run of blocks
            self._to_float(picked.ctypes.data, result.ctypes.data, len(ids) * self._hidden)
        return result


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
