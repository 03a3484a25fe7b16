"""Takes the hidden state out of a window's graph, and where a rule says so, puts one in.

libllama has no C interface for that, but it lets its user look at every tensor that a graph
computes (`cb_eval`). The tensor `l_out-{n-1}` is the output of the last layer in every architecture
of the table; refusing to go on after it leaves the final norm and the output head uncomputed. And
where a graph scales its input by a hard-coded factor, the scaled tensor is overwritten with what
the window before handed over: exact, where dividing beforehand would be wrong in the last bits.
One small class, so that a tap written in C can take its place (it would save about 1 µs a node).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault
from backends.llama_cpp.library import Library

_F32 = 4  # bytes


class Tap:
    """One for each context that needs it.

    layers: take the output of the last of so many layers, then stop (0: run to the end).
    overwritten: the tensor that gets the step's input ("": none).
    """

    def __init__(
        self, library: Library, layers: int, hidden: int, batch_tokens: int, overwritten: str = ""
    ) -> None:
        self._ggml = library.ggml
        self._out = b"l_out-%d" % (layers - 1) if layers else b""
        self._in = overwritten.encode()
        self._wanted = frozenset({self._out, self._in} - {b""})
        self._row_bytes = hidden * _F32
        self._rows = np.empty((batch_tokens if layers else 0, hidden), dtype=np.float32)
        self._input: NDArray[np.float32] = self._rows
        self._taken = self._given = self._calls = 0
        self._fault = ""
        # The context keeps only the pointer: this object must live as long as the context.
        self.callback: Any = library.llama.ggml_backend_sched_eval_callback(self._see)

    def begin(self, x: NDArray[np.float32]) -> None:
        """Before each call of llama_decode. x: its input, [tokens, hidden], contiguous."""
        self._input = x
        self._taken = self._given = self._calls = 0
        self._fault = ""

    def end(self, slots: NDArray[np.int32]) -> NDArray[np.float32]:
        """What the step gave: [tokens, hidden]. Raises BackendFault where rows lack or are mixed.

        libllama hands rows out in the order of the batch as long as one micro-batch, or one
        sequence, is all there is; it may regroup several sequences in several micro-batches, and
        nothing tells us how. Wrong rows would be wrong tokens, so that is an error.
        """
        tokens = len(self._input)
        for name, rows in ((self._out, self._taken), (self._in, self._given)):
            if name and not self._fault and rows != tokens:
                self._fault = f"{name.decode()} came with {rows} rows for {tokens} tokens"
        if not self._fault and self._calls > 1 and (slots != slots[0]).any():
            self._fault = "libllama cut a batch of several sequences into pieces"
        if self._fault:
            raise BackendFault(f"the window's hidden states are unusable: {self._fault}")
        return self._rows[:tokens]

    def _see(self, tensor: int, ask: bool, _user_data: object) -> bool:
        """Asked (ask): is it a tensor of ours? Else it is computed. False stops the graph."""
        name = self._ggml.ggml_get_name(tensor)
        if ask:
            return name in self._wanted
        size = self._ggml.ggml_nbytes(tensor)
        count, rest = divmod(size, self._row_bytes)
        done = self._given if name == self._in else self._taken
        if rest or done + count > len(self._input):
            self._fault = f"{size} bytes came, which are not rows of {self._row_bytes}"
        elif not self._ggml.ggml_is_contiguous(tensor):
            self._fault = "their memory is not contiguous"
        elif name == self._in:
            source = self._input.ctypes.data + done * self._row_bytes
            self._ggml.ggml_backend_tensor_set(tensor, source, 0, size)
            self._given += count
            self._calls += not self._out
            return True
        else:
            target = self._rows.ctypes.data + done * self._row_bytes
            self._ggml.ggml_backend_tensor_get(tensor, target, 0, size)
            self._taken += count
            self._calls += 1
        return False
