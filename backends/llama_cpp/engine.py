"""The engine: windows of layers on stock libllama, through llama-cpp-python's ctypes bindings."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault, Batch, Device, Footprint, Settings, Slot, Window
from backends.llama_cpp.library import library
from backends.llama_cpp.rules import LAYERS_MAX, cuts
from backends.llama_cpp.window import LoadedWindow

_KINDS = {"CUDA": "cuda", "ROCm": "rocm", "MTL": "metal", "Metal": "metal", "Vulkan": "vulkan"}
_CPU, _GPU, _IGPU = 0, 1, 2  # ggml-backend.h: GGML_BACKEND_DEVICE_TYPE_*


class LlamaBackend:
    """See backends.base.Backend."""

    def __init__(self, settings: Settings) -> None:
        self._library = library()
        self._settings = settings
        self._windows: dict[tuple[int, int], LoadedWindow] = {}

    def load(self, window: Window) -> Footprint:
        """Make the window ready to run. Raises BackendFault; a refused one never meets libllama."""
        # libllama aborts the whole process on some windows: ask the table first, always.
        if why := cuts(window.header).refusal(window.first, window.last):
            raise BackendFault(why, "refused")
        if window.layers != window.header.layers or window.layers > LAYERS_MAX:
            raise BackendFault(
                f"the window is of another model ({window.layers} layers)", "refused"
            )
        place = (window.first, window.last)
        if place in self._windows:
            raise BackendFault(f"layers {window.first} to {window.last} are loaded already")
        loaded = LoadedWindow(self._library, self._settings, window)
        self._windows[place] = loaded
        return loaded.footprint

    def run(self, window: Window, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        """See backends.base.Backend.run."""
        loaded = self._windows.get((window.first, window.last))
        if loaded is None:
            raise BackendFault(f"layers {window.first} to {window.last} are not loaded")
        return loaded.run(batch, x)

    def trim(self, slot: Slot, position: int) -> None:
        """Forget, in all windows, what lies at and beyond `position` of the slot.

        Raises BackendFault (refused) for a model with recurrent layers, unless position is 0 or the
        slot's end: their state cannot be taken back.
        """
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

    def _check(self, slot: Slot) -> None:
        if not 0 <= slot < self._settings.slots:
            raise BackendFault(f"there is no slot {slot} of {self._settings.slots}", "refused")


def devices() -> list[Device]:
    """The processors that this build of libllama can use, the CPU always among them."""
    ggml = library().ggml
    found: list[Device] = []
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        type_number = ggml.ggml_backend_dev_type(device)
        if type_number not in (_CPU, _GPU, _IGPU):
            continue  # accelerators of the CPU (BLAS, AMX) have no memory of their own
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        registry = _text(ggml.ggml_backend_reg_name(ggml.ggml_backend_dev_backend_reg(device)))
        kind = "cpu" if type_number == _CPU else _KINDS.get(registry, registry.lower())
        name = _text(ggml.ggml_backend_dev_description(device)) or registry
        found.append(Device(name, kind, free.value, total.value, type_number == _IGPU))
    return found


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace").strip()
