"""A part on its way in: a temporary file that only grows, hashed in order, resumable.

The file is as long as what arrived of it, so that a transfer goes on after a restart from there;
it gets its final name after its hash was found right and its bytes were made durable.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from peer.errors import ModelError
from peer.models import disk, parts
from peer.models.manifest import Manifest, part_header
from peer.models.store import PARTIAL, Store


class Busy(Exception):
    """Another transfer of this process, or of another one, is at this part."""


class Partial:
    """One part that is being fetched. Blocking: for threads, one at a time."""

    def __init__(self, store: Store, manifest: Manifest, name: str) -> None:
        self._manifest = manifest
        self.part = manifest.part(name)
        self.done = 0  # bytes of the data region that are here
        folder = store.folder(manifest.digest)
        self._target = folder / self.part.file
        self._path = folder / f".{name}{PARTIAL}"
        self._descriptor = -1
        self._hash = hashlib.sha256()

    def open(self) -> bool:
        """Take what is there of the part already. False where the part is present by now.

        Raises Busy, ModelError.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with disk.clear_errors(self._path, self.part.file_bytes):
            self._descriptor = os.open(self._path, flags, 0o644)
            if not disk.try_lock(self._descriptor) or not self._is_mine():
                raise Busy
            if disk.size_of(self._target) == self.part.file_bytes:
                self.discard()
                return False
            done = os.fstat(self._descriptor).st_size - self.part.header_bytes
            if not 0 < done <= self.part.data_bytes:
                self.restart()
                return True
            for at in range(0, done, disk.BLOCK_BYTES):
                length = min(disk.BLOCK_BYTES, done - at)
                data = disk.read_at(self._descriptor, self.part.header_bytes + at, length)
                self._hash.update(data)
            self.done = done
            return True

    def _is_mine(self) -> bool:
        """The file still has this name: whoever had the lock before may have finished it."""
        try:
            return self._path.lstat().st_ino == os.fstat(self._descriptor).st_ino
        except FileNotFoundError:
            return False

    def restart(self) -> None:
        """Forget what arrived. Raises ModelError."""
        with disk.clear_errors(self._path):
            os.ftruncate(self._descriptor, 0)
        self.done = 0
        self._hash = hashlib.sha256()

    def append(self, data: bytes) -> None:
        """The next bytes of the data region. A full disk frees what was written; ModelError."""
        try:
            with disk.clear_errors(self._path, self.part.data_bytes - self.done):
                offset = self.part.header_bytes + self.done
                disk.write_at(self._descriptor, offset, data)
        except ModelError:
            self.discard()
            raise
        self._hash.update(data)
        self.done += len(data)

    def finish(self) -> bool:
        """Make the complete part present. False, and nothing is left, where its hash is wrong.

        Raises ModelError where the disk fails, or where a head.gguf is not its manifest's.
        """
        if self.done != self.part.data_bytes or self._hash.hexdigest() != self.part.sha256:
            self.discard()
            return False
        try:
            if self.part.name == "head":
                parts.check_head(self._path, self._manifest)
            with disk.clear_errors(self._target, self.part.header_bytes):
                if self.part.header_bytes:
                    header = part_header(
                        self._manifest.architecture, self.part.tensors, self.part.header_bytes
                    )
                    disk.write_at(self._descriptor, 0, header)
                os.fsync(self._descriptor)
                disk.replace_durably(self._path, self._target)
        except ModelError:
            self.discard()
            raise
        return True

    def discard(self) -> None:
        """Give the space back as far as the disk lets us; what led here tells of the rest."""
        with contextlib.suppress(ModelError):
            self.restart()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Keep what arrived for the next time."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def arrived_bytes(store: Store, manifest: Manifest, name: str) -> int:
    """Bytes of a missing part's data that an earlier transfer left here."""
    part = manifest.part(name)
    path: Path = store.folder(manifest.digest) / f".{name}{PARTIAL}"
    arrived = disk.size_of(path) - part.header_bytes
    return arrived if 0 < arrived <= part.data_bytes else 0
