"""Stages that may use so much memory and no more, and a model that is larger: control groups.

`python -m tests.e2e.limited GROUP,GROUP… [WORD…]` joins the groups and becomes a stage. Words
change it, for comparison: each of WITHOUT leaves out a half of what `peer.ring.residence` does, and
`slow=S:I` lets the stage of place I in the ring rest for S seconds in each layer.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from backends.base import Batch
from peer import children
from peer.models.imports import import_gguf
from peer.models.manifest import Manifest
from peer.models.store import Store
from tests.random_models import Model, write

MOUNTED = Path("/sys/fs/cgroup")
ENDED_S = 10.0  # for a group to be empty
WITHOUT = {"keep": 21, "no-ahead": mmap.MADV_WILLNEED}  # 21: MADV_PAGEOUT

# A layer of it has 25.7 MB: long to read, short to compute.
SIZES = {
    "embedding_length": 1024, "attention.head_count": 8, "attention.head_count_kv": 8,
    "feed_forward_length": 2816, "context_length": 512,
}  # fmt: skip
LARGE = Model("qwen2", quantised="F16", layers=8, extra=SIZES)


@dataclass(frozen=True)
class Large:
    """A stored model of some hundred MB, and its file."""

    file: Path
    store: Store
    manifest: Manifest

    @property
    def folder(self) -> Path:
        """Of its parts."""
        return self.store.folder(self.manifest.digest)

    def forget(self) -> None:
        """Let the kernel forget all of it: what a group is charged for is what it reads itself."""
        for path in (self.file, *self.folder.glob("*.gguf")):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def large(home: Path, model: Model = LARGE) -> Large:
    """Make it and store it."""
    file = write(model, home / "large.gguf")
    store = Store(home)
    return Large(file, store, import_gguf(file, store))


def why_not() -> str:
    """Why there can be no control groups of memory here, or ""."""
    if sys.platform != "linux":
        return "control groups are Linux's"
    try:
        with group("try", 1 << 30):
            return ""
    except OSError as error:
        return f"no control group of memory can be made here: {error}"


def _second() -> bool:
    return (MOUNTED / "cgroup.controllers").exists()


@contextlib.contextmanager
def group(name: str, memory_bytes: int) -> Iterator[Path]:
    """A control group of memory, version 1 or 2, gone afterwards. Raises OSError."""
    parent = MOUNTED if _second() else MOUNTED / "memory"
    for left in parent.glob("halka-*"):  # by a killed process
        found = re.match(r"halka-(\d+)-", left.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            with contextlib.suppress(OSError):
                left.rmdir()
    folder = parent / f"halka-{os.getpid()}-{name}"
    folder.mkdir()
    try:
        limit = "memory.max" if _second() else "memory.limit_in_bytes"
        (folder / limit).write_text(str(memory_bytes))
        yield folder
    finally:
        _remove(folder)


@contextlib.contextmanager
def slow_disk(name: str, folder: Path, bytes_per_s: int) -> Iterator[Path]:
    """A control group (version 1) that reads the disk of a folder no faster. Raises OSError."""
    device = folder.stat().st_dev
    made = MOUNTED / "blkio" / f"halka-{os.getpid()}-{name}"
    made.mkdir()
    try:
        line = f"{os.major(device)}:{os.minor(device)} {bytes_per_s}"
        (made / "blkio.throttle.read_bps_device").write_text(line)
        yield made
    finally:
        _remove(made)


def _remove(folder: Path) -> None:
    """Once its processes are gone."""
    deadline = time.monotonic() + ENDED_S
    while True:
        try:
            return folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def most_bytes(folder: Path) -> int:
    """The most that a group ever used."""
    name = "memory.peak" if _second() else "memory.max_usage_in_bytes"
    return int((folder / name).read_text())


def read_bytes(pid: int) -> int:
    """What a process has had read from disk."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


@contextlib.contextmanager
def stages_in(groups: Mapping[int, str], *words: str) -> Iterator[None]:
    """Stages that are started meanwhile join groups: by their place in the ring, paths with commas
    between."""
    places = itertools.count()

    def command(module: str) -> tuple[str, ...]:
        place = next(places) % len(groups)
        own = [word for word in words if ":" not in word or word.endswith(f":{place}")]
        return sys.executable, "-P", "-m", "tests.e2e.limited", groups[place], *own

    with mock.patch.object(children, "command", command):
        yield


def main() -> int:
    """Join, change what is to be changed, be a stage."""
    groups, words = sys.argv[1].split(","), sys.argv[2:]
    for path in filter(None, groups):
        (Path(path) / "cgroup.procs").write_text(str(os.getpid()))
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    from peer.ring import residence, stage

    advise = residence._madvise
    asleep = {advice for word, advice in WITHOUT.items() if word in words}

    def some(address: int, size: int, advice: int) -> int:
        return 0 if advice in asleep else int(advise(address, size, advice))

    residence.__dict__["_madvise"] = some
    for word in words:
        if found := re.fullmatch(r"slow=([0-9.]+):\d+", word):
            _slow(float(found[1]))
    return stage.main()


def _slow(layer_s: float) -> None:
    """Let this stage compute as if on a slower processor, which it does not keep busy."""
    from peer.ring.windows import Windows

    run, never = Windows.run, threading.Event()

    def slowly(self: Windows, index: int, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        window = self.plan.split.windows[index]
        never.wait(layer_s * (window.last - window.first))
        return run(self, index, batch, x)

    setattr(Windows, "run", slowly)  # noqa: B010


if __name__ == "__main__":
    sys.exit(main())
