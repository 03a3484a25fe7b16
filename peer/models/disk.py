"""Files of the model store: opened without following links, made durable, with clear errors.

What halka keeps on disk is only ever replaced by a rename after an fsync, so that a crash, a power
cut or a full disk leaves the old state or the new one and nothing between.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peer.errors import ModelError, PartError

BLOCK_BYTES = 4 << 20  # copied and hashed at once


def human(size: int) -> str:
    """Bytes for people, with the exact number."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= scale:
            return f"{size} bytes ({size / scale:.1f} {unit})"
    return f"{size} bytes"


def no_space(path: Path, needed: int) -> PartError:
    """The error for a disk that cannot take `needed` more bytes."""
    try:
        free = human(shutil.disk_usage(path if path.is_dir() else path.parent).free)
    except OSError:
        free = "an unknown number"
    return PartError(
        f"{path}: no space left on the disk; {human(needed)} more are needed and {free} are free. "
        "Free some space, or set HALKA_HOME to a folder on a larger disk"
    )


def require(folder: Path, needed: int) -> None:
    """Raise PartError now where `needed` bytes cannot fit, before anything is written."""
    with clear_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise no_space(folder, needed)


@contextmanager
def clear_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn what the operating system says about `path` into a sentence. needed: bytes missing."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(path, needed) from None
        hint = ""
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = ". Run halka as the user who owns this folder, or set HALKA_HOME to another one"
        elif error.errno == errno.ELOOP:
            hint = ". Links are not followed here; put the real file in its place"
        raise ModelError(f"{path}: {error.strerror}{hint}") from None


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of a regular file that is not a link. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, offset: int, length: int) -> bytes:
    """Exactly `length` bytes. Raises OSError where the file is shorter."""
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, "the file is shorter than it should be")
        data += more
    return data


def write_at(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    """All of `data`. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def size_of(path: Path) -> int:
    """Size of a regular file that is not a link; -1 where there is none."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(temporary: Path, target: Path) -> None:
    """Rename a file that was already fsynced over `target`."""
    temporary.replace(target)
    sync_folder(target.parent)


def try_lock(descriptor: int) -> bool:
    """Take the file's lock if nobody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


class _Held:
    """A folder's lock file, held by this process `depth` times, always by one thread."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.descriptor = -1
        self.depth = 0


_held: dict[Path, _Held] = {}
_held_guard = threading.Lock()


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a model folder's lock against other threads and processes; may be nested.

    Whoever loads a window should hold the folder from placing to loading, so that nobody rewrites
    the headers between the two.
    """
    with _held_guard:
        held = _held.setdefault(folder.resolve(), _Held())
    with held.turn:
        if held.depth == 0:
            path = folder / ".lock"
            with clear_errors(path):
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                held.descriptor = os.open(path, flags, 0o644)
                fcntl.flock(held.descriptor, fcntl.LOCK_EX)
        held.depth += 1
        try:
            yield
        finally:
            held.depth -= 1
            if held.depth == 0:
                os.close(held.descriptor)
