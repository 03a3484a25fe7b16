"""One rank of an island, in its child process: its share of each layer, computed with the others.

All ranks are given the same calls. That they were is checked at every step, with one number over
everything that was said since the load: without it a lost call would be a collective that never
ends or, worse, a fluent answer made of two different questions.
"""

from __future__ import annotations

import json
import os
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault, Batch, Footprint, Settings, Slot, Window
from backends.mlx import meeting
from backends.mlx.engine import MlxBackend
from backends.mlx.library import library


class Rank:
    """See `backends.base.Backend`."""

    def __init__(self, settings: Settings, meet_s: float) -> None:
        self._settings, self._meet_s = settings, meet_s
        self._backend: MlxBackend | None = None
        self._group: Any = None
        self._said = 0  # a checksum over all calls, the same in all ranks

    def load(self, window: Window) -> Footprint:
        """Meet, where it is the first window, and load this rank's share of it."""
        if self._backend is None:
            self._group = _join(self._settings, self._meet_s)
            self._backend = MlxBackend(self._settings, shard=self._shard)
        self._hear(b"load", _shapes(window))
        self._agree("load other windows or models")
        return self._backend.load(window)

    def run(self, window: Window, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        """One step through one window, with the others."""
        self._hear(b"run", repr((window.first, window.last, x.dtype.str, x.shape)).encode())
        for array in (batch.slots, batch.positions, batch.outputs, x):
            self._hear(np.ascontiguousarray(array).data)
        self._agree("were given other steps")
        return self._opened.run(window, batch, x)

    def trim(self, slot: Slot, position: int) -> None:
        """Each rank forgets its own share."""
        self._hear(b"trim", repr((slot, position)).encode())
        self._opened.trim(slot, position)

    def copy(self, source: Slot, target: Slot, length: int) -> None:
        """Each rank copies its own share."""
        self._hear(b"copy", repr((source, target, length)).encode())
        self._opened.copy(source, target, length)

    def close(self) -> None:
        """Free everything; the others notice by their next step's deadline at the latest."""
        if self._backend is not None:
            self._backend.close()

    @property
    def _opened(self) -> MlxBackend:
        if self._backend is None:
            raise BackendFault("this rank of an island has loaded nothing")
        return self._backend

    def _shard(self, model: Any, layers: list[Any]) -> None:
        """Keep this rank's share of these layers: mlx_lm's own way, which wants a whole model."""
        type(model).shard(SimpleNamespace(model=SimpleNamespace(layers=layers)), self._group)

    def _hear(self, *words: Any) -> None:
        for word in words:
            self._said = zlib.crc32(word, self._said)

    def _agree(self, what: str) -> None:
        """Raises BackendFault where other ranks heard something else."""
        mx = library().mx
        heard = mx.distributed.all_gather(mx.array([self._said], mx.uint32), group=self._group)
        all_said = np.array(heard).tolist()
        if len(set(all_said)) > 1:
            others = [rank for rank, said in enumerate(all_said) if said != self._said]
            raise BackendFault(
                f"the ranks of the island {what}: rank {', '.join(map(str, others))} heard other "
                f"calls than rank {self._settings.island.rank if self._settings.island else 0}"
            )


def _join(settings: Settings, meet_s: float) -> Any:
    """The group of all ranks. Raises BackendFault; the parent's deadline ends what hangs."""
    island = settings.island
    assert island
    meeting.meet(settings, meet_s)
    with meeting.variables(island) as variables:
        os.environ.update(variables)
        try:
            return library().mx.distributed.init(
                strict=True, backend="jaccl" if island.devices else "ring"
            )
        except (RuntimeError, ValueError) as error:
            raise BackendFault(f"MLX does not connect the island's ranks: {error}") from error
        finally:
            for name in variables:
                os.environ.pop(name, None)


def _shapes(window: Window) -> bytes:
    """What is computed, without where its files are."""
    tensors = sorted((name, fact.type, fact.shape) for name, fact in window.header.tensors.items())
    return json.dumps([window.first, window.last, window.layers, tensors]).encode()
