"""Takes the hidden state out of a window's graph, and where a rule says so, puts one in.

libllama has no C interface for that, but it lets its user look at every tensor that a graph
computes (`cb_eval`). The tensor `l_out-{n-1}` is the output of the last layer in every architecture
of the table; refusing to go on after it leaves the final norm and the output head uncomputed. And
where a graph scales its input by a hard-coded factor, the scaled tensor is overwritten with what
the window before handed over: exact, where dividing beforehand would be wrong in the last bits.

libllama asks about each of some 21 tensors a layer, every step. So what looks at them is in C
(tap.c), or where that could not be built in Python, which costs about 1 µs for each.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault
from backends.llama_cpp.library import Library
from backends.llama_cpp.tap_library import NoTap, load

_log = logging.getLogger("halka.llama")

_F32 = 4  # bytes
_NO_ROWS, _SCATTERED = 1, 2  # tap.c: FAULT_*


class State(ctypes.Structure):
    """tap.c: struct tap. One step's counts, and where its rows come from and go to."""

    _fields_ = (
        ("get_name", ctypes.c_void_p),
        ("nbytes", ctypes.c_void_p),
        ("is_contiguous", ctypes.c_void_p),
        ("tensor_get", ctypes.c_void_p),
        ("tensor_set", ctypes.c_void_p),
        ("out", ctypes.c_char_p),
        ("in_", ctypes.c_char_p),
        ("rows", ctypes.c_void_p),
        ("input", ctypes.c_void_p),
        ("row_bytes", ctypes.c_uint64),
        ("tokens", ctypes.c_uint64),
        ("taken", ctypes.c_uint64),
        ("given", ctypes.c_uint64),
        ("calls", ctypes.c_uint64),
        ("fault", ctypes.c_uint64),
        ("fault_bytes", ctypes.c_uint64),
    )


class Tap:
    """One for each context that needs it. `callback` and `user_data` go into its parameters.

    layers: take the output of the last of so many layers, then stop (0: run to the end).
    overwritten: the tensor that gets the step's input ("": none).
    This one sees in Python; TapInC is the same with another eye.
    """

    def __init__(
        self, library: Library, layers: int, hidden: int, batch_tokens: int, overwritten: str = ""
    ) -> None:
        self._ggml = library.ggml
        self._out = b"l_out-%d" % (layers - 1) if layers else b""
        self._in = overwritten.encode()
        self._wanted = frozenset({self._out, self._in} - {b""})
        self._rows = np.empty((batch_tokens if layers else 0, hidden), dtype=np.float32)
        self._state = State(
            out=self._out, in_=self._in, rows=self._rows.ctypes.data, row_bytes=hidden * _F32
        )
        # The context keeps only pointers: this object must live as long as the context.
        self.callback: Any = library.llama.ggml_backend_sched_eval_callback(self._see)
        self.user_data: Any = None

    def begin(self, tokens: int, address: int) -> None:
        """Before each call of llama_decode. address: of its input, [tokens, hidden], contiguous."""
        state = self._state
        state.tokens, state.input = tokens, address
        state.taken = state.given = state.calls = state.fault = 0

    def end(self, tokens: int, slots: NDArray[np.int32]) -> NDArray[np.float32]:
        """What the step gave: [tokens, hidden]. Raises BackendFault where rows lack or are mixed.

        libllama hands rows out in the order of the batch as long as one micro-batch, or one
        sequence, is all there is; it may regroup several sequences in several micro-batches, and
        nothing tells us how. Wrong rows would be wrong tokens, so that is an error.
        """
        state = self._state
        for name, rows in ((self._out, state.taken), (self._in, state.given)):
            if name and (rows != tokens or state.fault):
                raise BackendFault(f"the window's hidden states are unusable: {self._fault(name)}")
        if state.calls > 1 and (slots != slots[0]).any():
            raise BackendFault(
                "the window's hidden states are unusable: "
                "libllama cut a batch of several sequences into pieces"
            )
        return self._rows[:tokens]

    def _fault(self, name: bytes) -> str:
        state = self._state
        if state.fault == _NO_ROWS:
            return f"{state.fault_bytes} bytes came, which are not rows of {state.row_bytes}"
        if state.fault == _SCATTERED:
            return "their memory is not contiguous"
        rows = state.taken if name == self._out else state.given
        return f"{name.decode()} came with {rows} rows for {state.tokens} tokens"

    def _see(self, tensor: int, ask: bool, _user_data: object) -> bool:
        """Asked (ask): is it a tensor of ours? Else it is computed. False stops the graph."""
        name = self._ggml.ggml_get_name(tensor)
        if ask:
            return name in self._wanted
        state = self._state
        size = self._ggml.ggml_nbytes(tensor)
        count, rest = divmod(size, state.row_bytes)
        done = state.given if name == self._in else state.taken
        if rest or done + count > state.tokens:
            state.fault, state.fault_bytes = _NO_ROWS, size
        elif not self._ggml.ggml_is_contiguous(tensor):
            state.fault = _SCATTERED
        elif name == self._in:
            source = state.input + done * state.row_bytes
            self._ggml.ggml_backend_tensor_set(tensor, source, 0, size)
            state.given += count
            state.calls += not self._out
            return True
        else:
            target = state.rows + done * state.row_bytes
            self._ggml.ggml_backend_tensor_get(tensor, target, 0, size)
            state.taken += count
            state.calls += 1
        return False


class TapInC(Tap):
    """The same with tap.c's eye. Raises NoTap where its library cannot be used."""

    def __init__(
        self, library: Library, layers: int, hidden: int, batch_tokens: int, overwritten: str = ""
    ) -> None:
        seen = compiled()  # first: what fails here leaves nothing behind
        super().__init__(library, layers, hidden, batch_tokens, overwritten)
        for field, name in (
            ("get_name", "ggml_get_name"),
            ("nbytes", "ggml_nbytes"),
            ("is_contiguous", "ggml_is_contiguous"),
            ("tensor_get", "ggml_backend_tensor_get"),
            ("tensor_set", "ggml_backend_tensor_set"),
        ):
            function = getattr(library.ggml, name)
            setattr(self._state, field, ctypes.cast(function, ctypes.c_void_p).value)
        kind = library.llama.ggml_backend_sched_eval_callback
        self.callback = ctypes.cast(seen.halka_tap_see, kind)
        self.user_data = ctypes.addressof(self._state)


@cache
def compiled() -> ctypes.CDLL:
    """tap.c's library, its struct the same as ours. Raises NoTap."""
    found = load()
    if found.halka_tap_bytes() != ctypes.sizeof(State):
        raise NoTap(f"its struct has {found.halka_tap_bytes()} bytes, not {ctypes.sizeof(State)}")
    return found


@cache
def best() -> type[Tap]:
    """TapInC where it can be used, else Tap; said once in the log."""
    try:
        compiled()
    except NoTap as why:
        _log.info("tap=python because=%r", str(why))
        return Tap
    _log.debug("tap=c")
    return TapInC
