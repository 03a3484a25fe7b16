"""How fast the disk that holds the models reads: blocks in a row, past the system's cache.

Parts of the store are read where there are enough; else a file is written, read and gone again: it
loses its name as soon as it is open, so that whatever ends this process leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path

from peer.models import disk

BLOCK_BYTES = 8 << 20
READ_BYTES = 512 << 20  # at most
READ_S = 0.5
FILE_BYTES = 128 << 20  # of the file that is written where there are no parts
WRITE_S = 3.0  # a slow disk gets a shorter one
FREE_BYTES = 1 << 30  # that the disk keeps at least
_ENOUGH_BYTES = 64 << 20  # of parts
_LEAST_BYTES = 1 << 20  # tell nothing


def read_bytes_per_s(home: Path) -> float:
    """Bytes a second, read in a row; 0.0 where that cannot be told (no parts and a full disk)."""
    parts = _parts(home)
    if sum(disk.size_of(part) for part in parts) >= _ENOUGH_BYTES:
        return _rate(parts)
    try:
        return _rate_of_a_new_file(home)
    except OSError:
        return 0.0


def _parts(home: Path) -> list[Path]:
    """Parts of the store, the largest first, as many as are read."""
    sizes = {path: disk.size_of(path) for path in (home / "models").glob("*/*.gguf")}
    found: list[Path] = []
    total = 0
    for path in sorted(sizes, key=lambda path: -sizes[path]):
        if total >= READ_BYTES or sizes[path] <= 0:
            break
        found.append(path)
        total += sizes[path]
    return found


def _rate(parts: list[Path]) -> float:
    size, seconds = 0, 0.0
    for path in parts:
        if size >= READ_BYTES or seconds >= READ_S:
            break
        with contextlib.suppress(OSError), disk.opened(path) as descriptor:
            more, took_s = _read(descriptor, READ_BYTES - size, READ_S - seconds)
            size, seconds = size + more, seconds + took_s
    return _per_s(size, seconds)


def _rate_of_a_new_file(home: Path) -> float:
    """Raises OSError."""
    home.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(home).free < FREE_BYTES + FILE_BYTES:
        return 0.0
    descriptor, name = tempfile.mkstemp(prefix=".disk-speed-", dir=home)
    try:
        Path(name).unlink()
        _write(descriptor)
        size, seconds = _read(descriptor, FILE_BYTES, READ_S)
    finally:
        os.close(descriptor)
    return _per_s(size, seconds)


def _write(descriptor: int) -> None:
    """Random bytes, each block on the disk before the next: so it ends in time on a slow one."""
    block = os.urandom(BLOCK_BYTES)
    began_s = time.monotonic()
    for offset in range(0, FILE_BYTES, BLOCK_BYTES):
        disk.write_at(descriptor, offset, block)
        os.fsync(descriptor)
        if time.monotonic() - began_s > WRITE_S:
            break


def _read(descriptor: int, most_bytes: int, most_s: float) -> tuple[int, float]:
    """(bytes, seconds) of reading an open file from its beginning. Raises OSError."""
    size = 0
    with mmap.mmap(-1, BLOCK_BYTES) as block:  # page aligned, as O_DIRECT demands
        direct = _past_cache(descriptor, block)
        if not direct:
            _forget(descriptor)
        began_s = time.perf_counter()
        while size < most_bytes and time.perf_counter() - began_s < most_s:
            count = os.preadv(descriptor, [block], size)
            size += count
            if count < BLOCK_BYTES:  # the end, which need not be a whole block
                break
        return size, time.perf_counter() - began_s


def _past_cache(descriptor: int, block: mmap.mmap) -> bool:
    """Make reads go to the disk itself. False where the filesystem refuses, such as tmpfs."""
    if no_cache := getattr(fcntl, "F_NOCACHE", None):  # macOS
        fcntl.fcntl(descriptor, no_cache, 1)
        return True
    if not hasattr(os, "O_DIRECT"):
        return False
    before = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, before | os.O_DIRECT)
        os.preadv(descriptor, [block], 0)
    except OSError:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, before)
        return False
    return True


def _forget(descriptor: int) -> None:
    """Ask the system to drop what it has of the file."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _per_s(size: int, seconds: float) -> float:
    return size / seconds if size >= _LEAST_BYTES and seconds > 0 else 0.0
