"""`python -m backends.mlx.child`: a process that holds one backend and does what its parent says.

Frames come on stdin and are answered on stdout, one for one (see `messages`). It knows one thing
that a backend in its parent's process would not: with `Settings.island` the backend is one rank of
an island. It ends when told to, when stdin ends, or with a fault that no backend should raise,
whose trace on stderr its parent quotes.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from backends.base import Backend, BackendFault, Batch, Window
from backends.mlx import messages
from backends.mlx.messages import Close, Copy, Done, Failed, Load, Open, Run, Said, Trim

Arrays = list[NDArray[Any]]


class Child:
    """The backend and its windows, once opened."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._windows: dict[tuple[int, int], Window] = {}

    def answer(self, said: Said, arrays: Arrays) -> tuple[Said, Arrays]:
        """Do what was said; what went wrong is an answer, too."""
        try:
            return self._do(said, arrays)
        except BackendFault as fault:
            kind = fault.kind if fault.kind in ("refused", "memory") else "failed"
            return Failed(str(fault), kind), []  # type: ignore[arg-type]
        except MemoryError as error:
            return Failed(f"out of memory: {error}", "memory"), []
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            return Failed(f"{type(error).__name__}: {error}"), []

    def _do(self, said: Said, arrays: Arrays) -> tuple[Said, Arrays]:
        if isinstance(said, Open):
            self._backend = _open(said)
            return Done(), []
        if self._backend is None:
            raise BackendFault("nothing was opened in this process")
        match said:
            case Load(window):
                used = self._backend.load(window)
                self._windows[window.first, window.last] = window
                return Done(used), []
            case Run(first, last):
                if (first, last) not in self._windows or len(arrays) != 4:
                    raise BackendFault(f"window {first}-{last} is not loaded")
                slots, positions, outputs, x = arrays
                batch = Batch(slots, positions, outputs)
                return Done(), [self._backend.run(self._windows[first, last], batch, x)]
            case Trim(slot, position):
                self._backend.trim(slot, position)
            case Copy(source, target, length):
                self._backend.copy(source, target, length)
            case Close():
                self._backend.close()
            case _:
                raise BackendFault(f"{type(said).__name__} is no question")
        return Done(), []


def _open(order: Open) -> Backend:
    if order.settings.island is None:
        return backends.load(order.engine).open(order.settings)
    from backends.mlx.rank import Rank  # imports mlx

    return Rank(order.settings, order.meet_s)


def _fill(source: int, room: memoryview) -> bool:
    """Read all of it. False where the parent is gone."""
    filled = 0
    while filled < len(room):
        count = os.readv(source, [room[filled:]])
        if not count:
            return False
        filled += count
    return True


def _hear(source: int) -> tuple[Said, Arrays] | None:
    """The next thing said, or None where the parent is gone."""
    length = bytearray(messages.LENGTH.size)
    if not _fill(source, memoryview(length)):
        return None
    head = bytearray(messages.head_length(length))
    if not _fill(source, memoryview(head)):
        return None
    said, arrays = messages.unpack(head)
    if not all(_fill(source, messages.room(array)) for array in arrays):
        return None
    return said, arrays


def _say(target: int, said: Said, arrays: Arrays) -> None:
    for part in messages.pack(said, [np.asarray(array) for array in arrays]):
        sent = 0
        while sent < len(part):
            sent += os.write(target, part[sent:])


def main() -> None:
    """Answer until told to close, or until the parent is gone."""
    # Libraries print what they like, and read what they like; the pipes are for frames alone.
    source, target = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    child = Child()
    while (heard := _hear(source)) is not None:
        said, arrays = heard
        answer, given = child.answer(said, arrays)
        _say(target, answer, given)
        if isinstance(said, Close):
            break
    # Not by returning: MLX's destructors wait for threads that wait for ranks that are gone.
    os._exit(0)


if __name__ == "__main__":
    main()
