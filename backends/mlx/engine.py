"""The engine: windows of layers on MLX, from the same parts as llama.cpp's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault, Batch, Footprint, Settings, Slot, Window
from backends.llama_cpp.rules import cuts
from backends.mlx import archs
from backends.mlx.library import library, wire
from backends.mlx.window import LoadedWindow, Shard, usual_cache_bytes

KV_TYPES = ("f16", "q8_0", "f32")  # q8_0: kept in float16; f32: what tests compare with


class MlxBackend:
    """See backends.base.Backend. All calls on one thread: MLX's arrays belong to theirs.

    shard: keeps one rank's share of the layers, where it is one of an island's.
    """

    def __init__(self, settings: Settings, shard: Shard | None = None) -> None:
        self._library = library()
        wire(self._library.mx)
        self._settings, self._shard = settings, shard
        self._windows: dict[tuple[int, int], LoadedWindow] = {}
        if settings.kv_type not in KV_TYPES:
            raise BackendFault(
                f"MLX's KV cache cannot be of type {settings.kv_type}: set kv_type to f16",
                "refused",
            )

    def load(self, window: Window) -> Footprint:
        """Make the window ready to run. Raises BackendFault."""
        if why := cuts(window.header).refusal(window.first, window.last):
            raise BackendFault(why, "refused")
        if window.layers != window.header.layers:
            raise BackendFault(
                f"the window is of another model ({window.layers} layers)", "refused"
            )
        if why := archs.refusal(window.header):
            raise BackendFault(f"MLX does not run this model: {why}", "refused")
        place = (window.first, window.last)
        if place in self._windows:
            raise BackendFault(f"layers {window.first} to {window.last} are loaded already")
        try:
            loaded = LoadedWindow(self._library, self._settings, window, self._shard)
        except (RuntimeError, MemoryError) as error:
            raise BackendFault(
                f"MLX has no memory for layers {window.first} to {window.last}: {error}", "memory"
            ) from error
        self._windows[place] = loaded
        compute = max(held.compute_bytes for held in self._windows.values())
        self._library.mx.set_cache_limit(usual_cache_bytes(compute))
        return loaded.footprint

    def run(self, window: Window, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        """See backends.base.Backend.run."""
        loaded = self._windows.get((window.first, window.last))
        if loaded is None:
            raise BackendFault(f"layers {window.first} to {window.last} are not loaded")
        return loaded.run(batch, x)

    def trim(self, slot: Slot, position: int) -> None:
        """Forget, in all windows, what lies at and beyond `position` of the slot."""
        self._check(slot)
        for loaded in self._windows.values():
            loaded.trim(slot, position)

    def copy(self, source: Slot, target: Slot, length: int) -> None:
        """Give `target` the first `length` positions of `source`, in all windows."""
        self._check(source)
        self._check(target)
        for loaded in self._windows.values():
            loaded.copy(source, target, length)

    def close(self) -> None:
        """Free everything. May be called again."""
        while self._windows:
            self._windows.popitem()[1].close()
        self._library.mx.clear_cache()

    def _check(self, slot: Slot) -> None:
        if not 0 <= slot < self._settings.slots:
            raise BackendFault(f"there is no slot {slot} of {self._settings.slots}", "refused")
