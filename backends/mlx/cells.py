"""The KV cache's arrays of one window: keys and values by cell, for each of its layers.

A layer's attention of mlx_lm's calls `update_and_fetch` with the step's keys and values and gets
those of all cells in use; which of them a row sees is the mask's business (pool.py). The arrays
grow in steps, because MLX makes no promise to leave zeros unallocated: a cache of which little is
used takes little. float16 cells are widened before attention, which is computed in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from backends.mlx import pool
from backends.mlx.library import Library

STEP = 256  # cells; a multiple of what Metal's attention kernels like


class Place:
    """Where the step that runs puts its rows, shared by all layers of a window."""

    def __init__(self) -> None:
        self.first: int | None = 0  # of cells that are consecutive, else None
        self.cells: Any = None  # [rows], where they are not
        self.width = 0  # cells that attention looks at

    def set(self, mx: Any, cells: pool.Cells, width: int) -> None:
        """Begin a step."""
        self.width = width
        if bool((np.diff(cells) == 1).all()):
            self.first, self.cells = int(cells[0]), None
        else:
            self.first, self.cells = None, mx.array(cells.astype(np.int32))


class LayerCells:
    """One layer's cells: what mlx_lm calls its cache. keys, values: [1, heads, cells, size]."""

    offset = 0  # a cache's position, which rope.Rope does not ask for

    def __init__(self, library: Library, place: Place, cells: int, kv_type: str) -> None:
        self._mx, self._place, self._most = library.mx, place, cells
        self._type = self._mx.float32 if kv_type == "f32" else self._mx.float16
        self.keys: Any = None
        self.values: Any = None

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Put the step's rows [1, heads, rows, size] in their cells; all cells in use, float32."""
        self.keys = self._put(self.keys, keys)
        self.values = self._put(self.values, values)
        return self._seen(self.keys), self._seen(self.values)

    def _put(self, held: Any, rows: Any) -> Any:
        width = self._place.width
        have = 0 if held is None else held.shape[2]
        if have < width:
            # By an eighth at least, or a long answer would copy the cache at every 256 tokens.
            grown = min(self._most, max(width, have + have // 8 // STEP * STEP))
            heads, size = rows.shape[1], rows.shape[3]
            empty = self._mx.zeros((1, heads, grown - have, size), dtype=self._type)
            held = empty if held is None else self._mx.concatenate([held, empty], axis=2)
        rows = rows.astype(self._type)
        if self._place.first is not None:
            first = self._place.first
            held[:, :, first : first + rows.shape[2], :] = rows
        else:
            held[:, :, self._place.cells, :] = rows
        return held

    def _seen(self, held: Any) -> Any:
        return held[:, :, : self._place.width, :].astype(self._mx.float32)

    def wipe(self, cells: pool.Cells) -> None:
        """Zeros in these cells. A mask's 0 · NaN is NaN: what is not finite must not stay."""
        if self.keys is None:
            return
        there = self._mx.array(cells[cells < self.keys.shape[2]].astype(np.int32))
        self.keys[:, :, there, :] = 0
        self.values[:, :, there, :] = 0
        self._mx.eval(self.keys, self.values)


def width_of(used: int, cells: int) -> int:
    """How many cells attention looks at where the first `used` are in use: few different numbers,
    so that few different shapes are ever computed with."""
    return min(cells, -(-used // STEP) * STEP)
