"""Takes the hidden state out of a window's graph after its last layer, and stops the graph there.

libllama has no C interface for that, but it lets its user look at every tensor that a graph
computes (`cb_eval`). The tensor `l_out-{n-1}` is the output of the last layer in every architecture
of the table; refusing to go on after it leaves the final norm and the output head uncomputed.
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
    """rows: [batch_tokens, hidden], filled from the front by every micro-batch of one step."""

    def __init__(self, library: Library, layers: int, hidden: int, batch_tokens: int) -> None:
        self._ggml = library.ggml
        self._name = b"l_out-%d" % (layers - 1)
        self._row_bytes = hidden * _F32
        self._rows = np.empty((batch_tokens, hidden), dtype=np.float32)
        self._taken = 0
        self._calls = 0
        self._fault = ""
        # The context keeps only the pointer: this object must live as long as the context.
        self.callback: Any = library.llama.ggml_backend_sched_eval_callback(self._see)

    def begin(self) -> None:
        """Before each call of llama_decode."""
        self._taken = self._calls = 0
        self._fault = ""

    def take(self, tokens: int, slots: int) -> NDArray[np.float32]:
        """What the step gave: [tokens, hidden]. Raises BackendFault where rows lack or are mixed.

        libllama hands rows out in the order of the batch as long as one micro-batch, or one
        sequence, is all there is; it may regroup several sequences in several micro-batches, and
        nothing tells us how. Wrong rows would be wrong tokens, so that is an error.
        """
        if not self._fault and self._taken != tokens:
            self._fault = f"{self._taken} hidden states came for {tokens} tokens"
        if not self._fault and self._calls > 1 and slots > 1:
            self._fault = "libllama cut a batch of several sequences into pieces"
        if self._fault:
            raise BackendFault(f"the output of the window's last layer is unusable: {self._fault}")
        return self._rows[:tokens]

    def _see(self, tensor: int, ask: bool, _user_data: object) -> bool:
        """Asked (ask): is this the tensor? Else: it is computed, take it. False stops the graph."""
        if ask:
            return bool(self._ggml.ggml_get_name(tensor) == self._name)
        size = self._ggml.ggml_nbytes(tensor)
        count, rest = divmod(size, self._row_bytes)
        if rest or self._taken + count > len(self._rows):
            self._fault = f"{size} bytes came, which are not rows of {self._row_bytes}"
        elif not self._ggml.ggml_is_contiguous(tensor):
            self._fault = "its memory is not contiguous"
        else:
            target = self._rows.ctypes.data + self._taken * self._row_bytes
            self._ggml.ggml_backend_tensor_get(tensor, target, 0, size)
            self._taken += count
            self._calls += 1
        return False
