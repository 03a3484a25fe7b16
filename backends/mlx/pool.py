"""Which cell of the KV cache holds which position of which slots. Numpy only, no engine.

One pool of cells for all slots, as llama.cpp's with `kv_unified`, so that the head's count of cells
(peer/ring/slots.py) holds for both engines: a row of a step takes one cell, a copy shares cells and
moves no data, a cell is free again when its last slot lets go of it. All slots' rows run in one
batch; the mask tells each row which cells are its own past.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault

Cells = NDArray[np.int64]


class Pool:
    """The table of one window: cell → position, slot → cells."""

    def __init__(self, cells: int, slots: int) -> None:
        self.cells, self.slots = cells, slots
        self._positions = np.full(cells, -1, dtype=np.int32)  # -1: free
        self._held = np.zeros((slots, cells), dtype=np.bool_)
        self._ends = [0] * slots

    @property
    def used(self) -> int:
        """Cells up to the last one in use."""
        taken = np.flatnonzero(self._positions >= 0)
        return int(taken[-1]) + 1 if len(taken) else 0

    def end(self, slot: int) -> int:
        """The position that the slot's next row has."""
        return self._ends[slot]

    def take(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> Cells:
        """Cells for a step's rows, the lowest free ones. Raises BackendFault, changing nothing.

        Refused where a slot does not exist or its rows do not follow what it holds (as llama.cpp
        does); of kind memory where no cells are left.
        """
        ends = self._checked(slots, positions)
        free = np.flatnonzero(self._positions < 0)[: len(slots)]
        if len(free) < len(slots):
            raise BackendFault(
                f"the KV cache has no room for this batch: {len(slots)} tokens, and {len(free)} of "
                f"{self.cells} cells are free",
                "memory",
            )
        self._positions[free] = positions
        self._held[slots, free] = True
        for slot, end in ends.items():
            self._ends[slot] = end
        return free

    def _checked(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> dict[int, int]:
        """Where each slot of the batch ends after it."""
        ends: dict[int, int] = {}
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            if not 0 <= slot < self.slots:
                raise BackendFault(f"there is no slot {slot} of {self.slots}", "refused")
            due = ends.get(slot, self._ends[slot])
            if position < 0 or (due and position != due):
                raise BackendFault(
                    f"a row of slot {slot} is at position {position}, and the slot's next one is "
                    f"{due}",
                    "refused",
                )
            ends[slot] = position + 1
        return ends

    def give_back(self, slots: NDArray[np.int32], cells: Cells) -> None:
        """Undo the last take of these rows."""
        self._held[slots, cells] = False
        self._positions[cells] = -1
        for slot in set(slots.tolist()):
            self._ends[slot] = self._end_of(slot)

    def trim(self, slot: int, position: int) -> Cells:
        """Let the slot forget from `position` on. Returns the cells that are free now."""
        dropped = self._held[slot] & (self._positions >= position)
        self._held[slot, dropped] = False
        self._ends[slot] = self._end_of(slot)
        freed = np.flatnonzero(dropped)
        freed = freed[~self._held[:, freed].any(axis=0)]
        self._positions[freed] = -1
        return freed

    def copy(self, source: int, target: int, length: int) -> None:
        """Let an empty `target` hold the first `length` positions of `source` too."""
        if self._ends[source] < length:
            raise BackendFault(
                f"{length} positions of a slot cannot be copied: it holds {self._ends[source]}",
                "refused",
            )
        self._held[target] = self._held[source] & (self._positions < length)
        self._ends[target] = self._end_of(target)

    def _end_of(self, slot: int) -> int:
        held = self._positions[self._held[slot]]
        return int(held.max()) + 1 if len(held) else 0

    def mask(
        self, slots: NDArray[np.int32], positions: NDArray[np.int32], width: int, window: int = 0
    ) -> NDArray[np.bool_]:
        """[rows, width]: which of the first cells a row sees: its slot's, not later than itself.

        window > 0: and fewer than so many positions back (llama.cpp's LLAMA_SWA_TYPE_STANDARD).
        """
        place = self._positions[:width]
        seen: NDArray[np.bool_] = place <= positions[:, None]
        seen &= self._held[slots, :width]
        if window:
            seen &= place > positions[:, None] - window
        return seen
