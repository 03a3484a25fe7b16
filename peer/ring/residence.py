"""Which weights leave memory after a turn, and which are read ahead of the next: plans that stream.

Weights are mapped files, and the kernel drops the pages that were not used for the longest time. A
ring uses them in a circle: with that rule each is dropped just before its turn, and all of them are
read again for every token. So a stage gives up the last layers of a window itself as soon as its
turn is over, always the same ones; then the others need not be dropped, and there is room for the
last layers of the next window, which are read while the other peers compute.

Nothing is locked (mlock was measured, and added nothing once the kernel had nothing to choose):
memory that somebody else needs can still be taken, and no privilege is wanted. Nothing here can end
a stage: what cannot be done is said once, and left to the kernel.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import queue
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

log = logging.getLogger("halka.stage")

# Asked for at once. The kernel cuts a longer wish off, without a word, at the device's read-ahead:
# 128 KiB as a rule.
STEP_BYTES = 128 << 10
_PAGEOUT = 21  # MADV_PAGEOUT: Linux 5.4; Python does not name it

Range = tuple[int, int]  # address, bytes


@dataclass(frozen=True, slots=True)
class Files:
    """A window's layers on the processor, in order, as files; the others: as in PlanWindow."""

    layers: tuple[Path, ...]
    streamed_bytes: int
    ahead_bytes: int = -1


def given_up(
    weights: Sequence[int], streamed: Sequence[int], wanted: int = -1
) -> tuple[list[int], int]:
    """(bytes that each window gives up after its turn, bytes of them to read ahead of a turn).

    Where X bytes are too many, one window gives up X, and has no room to read ahead. Of k windows
    each gives up (X + F) / k: that makes X, and room to read F ahead (wanted; -1: the most that any
    can use, X / (k - 1), where each reads ahead all that it gave up).
    """
    excess, rounds = sum(streamed), len(weights)
    most = -(-excess // max(1, rounds - 1)) if rounds > 1 else 0
    ahead = most if wanted < 0 else min(wanted, most)
    share = -(-(excess + ahead) // rounds)
    given = [min(share, own) for own in weights]
    return given, min(ahead, max(0, sum(given) - excess))


class Residence:
    """Gives up and reads ahead, in a thread of its own. Loaded windows, in the order of turns."""

    def __init__(self, windows: Sequence[Files]) -> None:
        self._maps: list[_Map] = []
        self._used: list[list[Range]] = []  # of each window: what it gives up after its turn
        self._ahead: list[list[Range]] = []  # and what is read before it
        # A thread that is late catches up; what is a whole token late is left to the kernel.
        self._turns: queue.Queue[int | None] = queue.Queue(max(1, len(windows)))
        self._thread = threading.Thread(target=self._follow, name="residence", daemon=True)
        try:
            self._choose(windows)
        except OSError as error:
            log.warning("streaming=unaided because=%s", error)
            self._used = []
        if self._used:
            self._thread.start()

    def after(self, place: int) -> None:
        """The turn of this window (its place among the stage's own) is over. Never waits."""
        if self._used and not self._turns.full():
            self._turns.put_nowait(place)

    def close(self) -> None:
        """End the thread, unmap. May be called again."""
        if self._thread.is_alive():
            self._turns.put(None)
            self._thread.join()
        while self._maps:
            self._maps.pop().close()

    def _choose(self, windows: Sequence[Files]) -> None:
        """Note the ranges. Raises OSError."""
        layers = [[_Map(path, self._maps) for path in window.layers] for window in windows]
        weights = [sum(each.size for each in maps) for maps in layers]
        streamed = [window.streamed_bytes for window in windows]
        given, ahead = given_up(weights, streamed, windows[0].ahead_bytes)
        engine = _Engine(self._maps)
        for maps, own, loose in zip(layers, weights, given, strict=True):
            ranges = list(_last(maps, own, loose))
            self._ahead.append(_first(ranges, ahead))
            self._used.append(engine.ranges(ranges))
        log.info("streaming=%s ahead=%s", ",".join(map(str, given)), ahead)

    def _follow(self) -> None:
        """The thread: advice may take milliseconds, or wait for the disk's queue."""
        advice = _PAGEOUT if sys.platform == "linux" else mmap.MADV_DONTNEED
        refused = False
        while (place := self._turns.get()) is not None:
            for address, size in self._used[place]:
                if _madvise(address, size, advice) and not refused:
                    refused = True
                    log.warning("streaming=unaided because=%s", os.strerror(ctypes.get_errno()))
            for address, size in self._ahead[(place + 1) % len(self._ahead)]:
                for at in range(0, size, STEP_BYTES):
                    _madvise(address + at, min(STEP_BYTES, size - at), mmap.MADV_WILLNEED)


class _Map:
    """A file of our own, mapped to be read. Adds itself to `all_maps`. Raises OSError."""

    def __init__(self, path: Path, all_maps: list[_Map]) -> None:
        self.path = path.resolve()
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._map)
        self.address = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        all_maps.append(self)

    def close(self) -> None:
        """Unmap."""
        self._map.close()


class _Engine:
    """Where the engine mapped the same files. Linux drops a page only on the word of a mapping that
    has touched it and is the only one; elsewhere a file's pages are the same through any mapping.
    """

    def __init__(self, ours: Sequence[_Map]) -> None:
        self._ours = ours
        self._found: dict[str, list[tuple[int, int, int]]] = {}  # first, last address, offset
        if sys.platform == "linux":
            for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
                fields = line.split(None, 5)
                first, last = (int(number, 16) for number in fields[0].split("-"))
                mine = any(each.address <= first < each.address + each.size for each in ours)
                if len(fields) == 6 and not mine:
                    place = (first, last, int(fields[2], 16))
                    self._found.setdefault(fields[5], []).append(place)

    def ranges(self, ours: Iterable[Range]) -> list[Range]:
        """The engine's addresses of ranges of our maps."""
        if sys.platform != "linux":
            return list(ours)
        found = []
        for address, size in ours:
            each = next(m for m in self._ours if m.address <= address < m.address + m.size)
            begin = address - each.address
            for first, last, offset in self._found.get(str(each.path), ()):
                low, high = max(begin, offset), min(begin + size, offset + last - first)
                if low < high:
                    found.append((first + low - offset, high - low))
        return found


def _last(maps: Sequence[_Map], weights: int, loose: int) -> Iterable[Range]:
    """The last `loose` bytes of a window, from the page on in which they begin."""
    stays = weights - loose
    for each in maps:
        here = min(stays, each.size)
        stays -= here
        if here < each.size:
            here -= here % mmap.PAGESIZE
            yield each.address + here, each.size - here


def _first(ranges: Sequence[Range], most: int) -> list[Range]:
    """The first `most` bytes of them."""
    found = []
    for address, size in ranges:
        if most > 0:
            found.append((address, min(size, most)))
        most -= size
    return found


# Not Python's own, which stops all other threads until the kernel is done.
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
