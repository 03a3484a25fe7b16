"""The one door to libllama: imports llama-cpp-python's ctypes bindings, adds ggml's, tames its log.

Importing llama_cpp costs half a second and maps the shared libraries, so it happens at the first
call of `library()` and nowhere at import. The bindings follow exactly one release (pinned in
pyproject.toml): the layout of the structs passed by value is the library's, not ours to guess.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import re
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from typing import Any

_log = logging.getLogger("halka.llama")

_LEVEL_WARN, _LEVEL_ERROR = 3, 4  # ggml.h: GGML_LOG_LEVEL_*
_MIB = 1 << 20
_SIZE = re.compile(r"(\S+)\s+(KV|RS|compute|output)\s+buffer size\s*=\s*([\d.]+) MiB")

# Functions of ggml that llama_cpp.py does not declare: name → (result, arguments).
_POINTER, _TEXT, _SIZE_T = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
_GGML: dict[str, tuple[Any, list[Any]]] = {
    "ggml_get_name": (_TEXT, [_POINTER]),
    "ggml_nbytes": (_SIZE_T, [_POINTER]),
    "ggml_is_contiguous": (ctypes.c_bool, [_POINTER]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE_T, _SIZE_T]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, _SIZE_T, _SIZE_T]),
    "ggml_get_type_traits": (_POINTER, [ctypes.c_int]),
    "ggml_row_size": (_SIZE_T, [ctypes.c_int, ctypes.c_int64]),
    "ggml_backend_dev_count": (_SIZE_T, []),
    "ggml_backend_dev_get": (_POINTER, [_SIZE_T]),
    "ggml_backend_dev_name": (_TEXT, [_POINTER]),
    "ggml_backend_dev_description": (_TEXT, [_POINTER]),
    "ggml_backend_dev_type": (ctypes.c_int, [_POINTER]),
    "ggml_backend_dev_memory": (
        None,
        [_POINTER, ctypes.POINTER(_SIZE_T), ctypes.POINTER(_SIZE_T)],
    ),
    "ggml_backend_dev_backend_reg": (_POINTER, [_POINTER]),
    "ggml_backend_reg_name": (_TEXT, [_POINTER]),
    "gguf_free": (None, [_POINTER]),
    "gguf_get_data_offset": (_SIZE_T, [_POINTER]),
    "gguf_find_tensor": (ctypes.c_int64, [_POINTER, _TEXT]),
    "gguf_get_tensor_offset": (_SIZE_T, [_POINTER, ctypes.c_int64]),
    "gguf_get_tensor_type": (ctypes.c_int, [_POINTER, ctypes.c_int64]),
    "gguf_get_tensor_size": (_SIZE_T, [_POINTER, ctypes.c_int64]),
}


class GgufInitParams(ctypes.Structure):
    """gguf.h: struct gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


class TypeTraits(ctypes.Structure):
    """ggml.h: struct ggml_type_traits, as far as to_float."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_elements", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


@dataclass
class Journal:
    """What libllama said lately: its last complaints, and the sizes of the buffers it allocated."""

    complaints: deque[str] = field(default_factory=lambda: deque(maxlen=4))
    kv_bytes: int = 0
    compute_bytes: dict[tuple[str, str], int] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget what was said; called before each load or step that may fail."""
        self.complaints.clear()
        self.kv_bytes = 0
        self.compute_bytes.clear()

    def hear(self, level: int, text: str) -> None:
        """Keep what is worth keeping of one message."""
        line = text.rstrip()
        if not line:
            return
        if level in (_LEVEL_WARN, _LEVEL_ERROR):
            self.complaints.append(line)
        # The only C interface to these sizes is the log (the memory breakdown is a std::map).
        elif found := _SIZE.search(line):
            name, kind, mebibytes = found.groups()
            size = int(float(mebibytes) * _MIB)
            if kind in ("KV", "RS"):
                self.kv_bytes += size
            else:  # reserved more than once during one load: the last one counts
                self.compute_bytes[name, kind] = size
        _log.debug("%s", line)

    def cause(self) -> str:
        """The last complaints as one line, for error messages."""
        return "; ".join(self.complaints) or "libllama gave no reason"

    def taken(self) -> str:
        """As `cause`, and forgotten: so that no step has to clear what the one before left."""
        cause = self.cause()
        self.complaints.clear()
        return cause


@dataclass(frozen=True)
class Library:
    """llama: the bindings (llama_cpp.llama_cpp). ggml: its functions, typed. journal: the log."""

    llama: Any
    ggml: Any
    journal: Journal
    keep_alive: tuple[Any, ...]

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        """A function of libllama or ggml, with types of our choice beside the bindings' own."""
        return ctypes.CFUNCTYPE(result, *arguments)((name, self.llama._lib))

    def to_float(self, type_number: int) -> Any:
        """ggml's dequantiser of a type: f(source, float32 target, elements). None for F32."""
        traits = ctypes.cast(
            self.ggml.ggml_get_type_traits(type_number), ctypes.POINTER(TypeTraits)
        ).contents
        if not traits.to_float:
            return None
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        return kind(traits.to_float)


@cache
def library() -> Library:
    """Load libllama once. Raises ImportError where llama-cpp-python is not installed."""
    # An abort in ggml would start a debugger for a backtrace, and the stage would die in seconds
    # instead of at once.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    llama = importlib.import_module("llama_cpp.llama_cpp")
    ggml = llama._lib  # dlsym on its handle also finds the symbols of libggml, which it links
    for name, (result, arguments) in _GGML.items():
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, GgufInitParams]
    journal = Journal()

    def hear(level: int, text: bytes | None, _user_data: object) -> None:
        journal.hear(level, (text or b"").decode("utf-8", "replace"))

    callback = llama.llama_log_callback(hear)
    llama.llama_log_set(callback, None)
    llama.llama_backend_init()
    return Library(llama, ggml, journal, (callback,))
