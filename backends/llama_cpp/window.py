"""One window of layers in libllama: its model, its context, and the steps that it runs.

One context a window, with `kv_unified`: with one KV cache for all sequences libllama runs a batch
of several sequences as it was given, which is what makes split and whole agree. Flash attention
and the type of the KV cache are the same in every window; the cache holds all positions of sliding
layers too (`swa_full`), because a trimmed slot must find again what it had before.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault, Batch, Footprint, Header, Settings, Window
from backends.llama_cpp.cache import kv_types
from backends.llama_cpp.embedding import Embedding
from backends.llama_cpp.library import Library
from backends.llama_cpp.rules import overwritten, token_scale
from backends.llama_cpp.tap import Tap, best

_ROPE_WITH_SECTIONS = (8, 40)  # llama.h: LLAMA_ROPE_TYPE_MROPE, _IMROPE: four positions a token
_FAILURES = {
    1: ("memory", "the KV cache has no room for this batch"),
    2: ("failed", "the computation was aborted"),
    -1: ("refused", "libllama refused the batch"),
}
_FLASH = {  # llama.h: enum llama_flash_attn_type
    "auto": "LLAMA_FLASH_ATTN_TYPE_AUTO",
    "on": "LLAMA_FLASH_ATTN_TYPE_ENABLED",
    "off": "LLAMA_FLASH_ATTN_TYPE_DISABLED",
}
_NEEDS_FLASH = re.compile(r"requires? (flash_attn|Flash Attention)")
# Below it, a copy of the input costs less than asking numpy for its address (measured: 0.5 µs).
_WORTH_POINTING_BYTES = 1 << 16


def offloaded(gpu_layers: int) -> int:
    """libllama's n_gpu_layers for so many of a window's last layers on the GPU.

    It counts the output as one more, and first (llama-model.cpp: i_gpu_start = n_layer + 1 -
    n_gpu_layers): without the one, a window's first GPU layer would stay on the processor.
    """
    return gpu_layers + 1 if gpu_layers > 0 else gpu_layers


def check_cache(settings: Settings, header: Header) -> None:
    """Refuse a KV cache that this model cannot have. Raises BackendFault, naming the setting."""
    possible = kv_types(header)
    if settings.kv_type == "f32":  # no model needs it: engines are compared with it
        return
    if settings.kv_type not in possible:
        raise BackendFault(
            f"this model's KV cache cannot be of type {settings.kv_type}: "
            f"set kv_type to {' or '.join(possible)}",
            "refused",
        )
    if settings.flash not in _FLASH:
        raise BackendFault(f"flash is {' or '.join(_FLASH)}, not {settings.flash}", "refused")
    if settings.kv_type != "f16" and settings.flash == "off":
        raise BackendFault(
            f"a KV cache of type {settings.kv_type} needs flash attention: "
            f"set kv_type to f16, or flash to auto",
            "refused",
        )


class Rows(ctypes.Structure):
    """llama.h: struct llama_batch, its pointers as plain addresses: no object a step for each."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


class LoadedWindow:
    """Owns one model and one context; `close` frees both."""

    def __init__(self, library: Library, settings: Settings, window: Window) -> None:
        self._library, self._llama = library, library.llama
        self._settings = settings
        # Addresses in, an address out: the bindings' own would make an object of each pointer.
        self._decode = library.function("llama_decode", ctypes.c_int32, ctypes.c_void_p, Rows)
        self._logits_of = library.function("llama_get_logits", ctypes.c_void_p, ctypes.c_void_p)
        self._token_scale = np.float32(token_scale(window.header))
        self._first, self._last = window.is_first, window.is_last
        self._model: Any = None
        self._context: Any = None
        self._tap: Tap | None = None
        self._embedding: Embedding | None = None
        self._tainted = False  # a recurrent state may hold numbers that are not finite
        library.journal.begin()
        check_cache(settings, window.header)
        try:
            self._load(window)
            self._open(window)
        except BaseException:
            self.close()
            raise
        library.journal.taken()  # nothing that was said so far is the cause of a later failure

    def _load(self, window: Window) -> None:
        params = self._llama.llama_model_default_params()
        params.load_mode = self._llama.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = False  # repacked weights are private memory, mapped ones are not
        offload = self._llama.llama_supports_gpu_offload()
        params.n_gpu_layers = offloaded(self._settings.gpu_layers) if offload else 0
        paths = (ctypes.c_char_p * len(window.files))(*map(os.fsencode, window.files))
        self._model = self._llama.llama_model_load_from_splits(paths, len(window.files), params)
        if not self._model:
            raise BackendFault(
                f"layers {window.first} to {window.last} cannot be loaded: "
                f"{self._library.journal.cause()}"
            )
        layers = self._llama.llama_model_n_layer(self._model)
        if layers != window.last - window.first:
            raise BackendFault(
                f"the window's files hold {layers} layers instead of "
                f"{window.last - window.first}: place the model's parts again"
            )
        self.hidden: int = self._llama.llama_model_n_embd(self._model)
        if self._llama.llama_model_n_embd_inp(self._model) != self.hidden and not self._native:
            raise BackendFault("this model wants more than hidden states between layers", "refused")

    def _open(self, window: Window) -> None:
        llama, settings = self._llama, self._settings
        params = llama.llama_context_default_params()
        params.n_ctx = settings.kv_cells
        params.n_batch = params.n_ubatch = settings.batch_tokens
        params.n_seq_max = settings.slots
        params.n_threads = params.n_threads_batch = settings.threads
        params.kv_unified = True
        params.swa_full = True
        params.no_perf = True
        params.flash_attn_type = getattr(llama, _FLASH[settings.flash])
        params.type_k = getattr(llama, f"GGML_TYPE_{settings.kv_type.upper()}")
        params.type_v = params.type_k
        layers = 0 if self._last else window.last - window.first
        name = overwritten(window.header, window.first)
        if layers or name:
            self._tap = best()(self._library, layers, self.hidden, settings.batch_tokens, name)
            params.cb_eval, params.cb_eval_user_data = self._tap.callback, self._tap.user_data
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            cause = self._library.journal.cause()
            if settings.kv_type != "f16" and _NEEDS_FLASH.search(cause):
                raise BackendFault(
                    f"a KV cache of type {settings.kv_type} needs flash attention, which is not "
                    f"to be had for this model on this machine: set kv_type to f16 ({cause})",
                    "refused",
                )
            raise BackendFault(
                f"no room for a KV cache of {settings.kv_cells} tokens and batches of "
                f"{settings.batch_tokens}: {cause}",
                "memory",
            )
        self._memory = llama.llama_get_memory(self._context)
        if not self._memory:
            raise BackendFault(
                "this model has no memory of earlier tokens (it is no model that writes text "
                "token by token)",
                "refused",
            )
        if llama.llama_n_ubatch(self._context) < min(settings.batch_tokens, settings.kv_cells):
            raise BackendFault(f"libllama allows no batch of {settings.batch_tokens} tokens")
        self._one_sequence = llama.llama_model_is_recurrent(
            self._model
        ) or llama.llama_model_is_hybrid(self._model)
        self._planes = 4 if llama.llama_model_rope_type(self._model) in _ROPE_WITH_SECTIONS else 1
        self._vocabulary: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        if window.embed is not None and not self._native:
            self._embedding = Embedding(self._library, window.embed, self.hidden)
        elif self._first and not self._native:
            raise BackendFault("the first window came without the file of its token embedding")
        self._allocate(settings.batch_tokens)

    @property
    def _native(self) -> bool:
        """The whole model in one window: libllama takes token ids."""
        return self._first and self._last

    def _allocate(self, rows: int) -> None:
        """The arrays of a batch, once: a step only fills them."""
        self._positions = np.zeros(4 * rows, dtype=np.int32)
        self._sequences = np.zeros(rows, dtype=np.int32)
        self._counts = np.ones(rows, dtype=np.int32)
        # A window that is not the last owes every row; its last layer drops those not wanted.
        self._wanted = np.ones(rows, dtype=np.bool_)  # a byte each, as libllama's int8_t
        self._input = np.zeros((rows, self.hidden), dtype=np.float32)
        self._input_address = self._input.ctypes.data
        self._ids = np.zeros(rows, dtype=np.int32)
        address = self._sequences.ctypes.data
        self._pointers = np.arange(address, address + 4 * rows, 4, dtype=np.uint64)
        batch = Rows()
        batch.pos = self._positions.ctypes.data
        batch.n_seq_id = self._counts.ctypes.data
        batch.seq_id = self._pointers.ctypes.data
        batch.logits = self._wanted.ctypes.data
        if self._native:
            batch.token = self._ids.ctypes.data
        else:
            batch.embd = self._input_address
        self._batch = batch
        self._nothing = np.empty((0, self._vocabulary if self._last else self.hidden), np.float32)
        self._logits_at, self._logits_seen = 0, self._nothing

    @property
    def footprint(self) -> Footprint:
        """Bytes really used, as libllama reported them while this window was loaded."""
        journal = self._library.journal
        return Footprint(
            weights_bytes=self._llama.llama_model_size(self._model)
            + (self._embedding.size_bytes if self._embedding else 0),
            kv_bytes=journal.kv_bytes,
            compute_bytes=sum(journal.compute_bytes.values()),
        )

    def run(self, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        """See Backend.run."""
        tokens = len(batch.slots)
        if tokens > self._settings.batch_tokens:
            raise BackendFault(
                f"{tokens} tokens in a batch of at most {self._settings.batch_tokens}", "refused"
            )
        shape = (tokens,) if self._first else (tokens, self.hidden)
        if x.shape != shape or len(batch.positions) != tokens or len(batch.outputs) != tokens:
            raise BackendFault(f"the window's input has shape {x.shape}, not {shape}", "refused")
        if tokens == 0:
            return self._nothing
        if not self._one_sequence:
            return self._step(batch.slots, batch.positions, batch.outputs, x)
        result = self._by_sequence(batch, x)
        # libllama clears a recurrent state by multiplying it by 0, which leaves NaN what it is: it
        # has to be wiped before another answer begins with it.
        self._tainted |= not np.isfinite(result.sum())
        return result

    def _by_sequence(self, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        # Recurrent layers are always computed sequence by sequence, in an order of libllama's own.
        edges = [0, *(np.flatnonzero(np.diff(batch.slots)) + 1).tolist(), len(batch.slots)]
        runs = [slice(a, b) for a, b in itertools.pairwise(edges)]
        if len(runs) == 1:
            return self._step(batch.slots, batch.positions, batch.outputs, x)
        steps = [
            self._step(batch.slots[r], batch.positions[r], batch.outputs[r], x[r]).copy()
            for r in runs
        ]
        return np.concatenate(steps)

    def _step(
        self,
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        outputs: NDArray[np.bool_],
        x: NDArray[Any],
    ) -> NDArray[np.float32]:
        """One llama_decode."""
        tokens = len(slots)
        address = self._place_input(tokens, x)
        self._sequences[:tokens] = slots
        self._positions[:tokens] = positions
        if self._planes == 4 and not self._native:  # p, p, p, 0: what libllama gives token ids
            planes = self._positions[: 4 * tokens].reshape(4, tokens)
            planes[1:3] = positions
            planes[3] = 0
        if self._last:
            self._wanted[:tokens] = outputs
        self._batch.n_tokens = tokens
        if self._tap is not None:
            self._tap.begin(tokens, address)
        code = self._decode(self._context, self._batch)
        if code != 0:
            kind, why = _FAILURES.get(code, ("failed", f"the computation failed (code {code})"))
            raise BackendFault(f"{why}: {self._library.journal.taken()}", kind)
        if self._tap is not None:
            rows = self._tap.end(tokens, slots)
            if not self._last:
                return rows
        return self._logits(int(outputs[0]) if tokens == 1 else int(np.count_nonzero(outputs)))

    def _place_input(self, tokens: int, x: NDArray[Any]) -> int:
        """Put a step's input where libllama finds it. Returns its address."""
        if self._native:
            self._ids[:tokens] = x
            return 0
        address = self._input_address
        if self._embedding is not None:
            self._embedding.rows(x.tolist(), address)
            if self._token_scale != 1:
                self._input[:tokens] *= self._token_scale
        elif x.nbytes >= _WORTH_POINTING_BYTES and x.dtype == np.float32 and x.flags.c_contiguous:
            address = x.ctypes.data  # libllama copies what it points at, and only reads it
        else:
            self._input[:tokens] = x
        self._batch.embd = address
        return address

    def _logits(self, rows: int) -> NDArray[np.float32]:
        """[rows, vocabulary], in the order of the batch's rows with outputs; libllama's memory."""
        if rows == 0:
            return self._nothing
        address = self._logits_of(self._context)
        if address != self._logits_at or rows != len(self._logits_seen):
            seen: Any = (ctypes.c_float * (rows * self._vocabulary)).from_address(address)
            self._logits_seen = np.frombuffer(seen, np.float32).reshape(rows, self._vocabulary)
            self._logits_at = address
        return self._logits_seen

    def trim(self, slot: int, position: int) -> None:
        """See Backend.trim."""
        if not self._llama.llama_memory_seq_rm(self._memory, slot, position, -1):
            raise BackendFault(
                f"recurrent layers cannot go back to position {position}: "
                f"trim the slot to 0 and run its tokens again",
                "refused",
            )
        if self._tainted and all(
            self._llama.llama_memory_seq_pos_max(self._memory, other) < 0
            for other in range(self._settings.slots)
        ):
            self._llama.llama_memory_clear(self._memory, True)
            self._tainted = False

    def copy(self, source: int, target: int, length: int) -> None:
        """See Backend.copy."""
        self.trim(target, 0)
        if length == 0:
            return
        held = self._llama.llama_memory_seq_pos_max(self._memory, source) + 1
        if held < length or (self._one_sequence and held != length):
            raise BackendFault(
                f"{length} positions of a slot cannot be copied: it holds {held}"
                f"{' and recurrent layers know only all of them' if held >= length else ''}",
                "refused",
            )
        self._llama.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def close(self) -> None:
        """Free the context, then the model. May be called again."""
        if self._context:
            self._llama.llama_free(self._context)
            self._context = None
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None
