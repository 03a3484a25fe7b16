"""The models on this peer's disk: HALKA_HOME/models/<digest>/, one file a part.

A part is present when its file was renamed into place, which happens after its hash was checked
and its bytes were made durable. Nothing that came from outside is joined to a path before it was
found to be a digest or a part's name, and no link inside of the store is followed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peer.errors import ModelError, PartError
from peer.models import disk
from peer.models.manifest import Manifest, PartEntry, checked_digest, checked_part, decode, load
from peer.protocol import CHUNK_BYTES_MAX, MANIFEST_BYTES_MAX

log = logging.getLogger("halka.models.store")

_INCOMING = ".incoming-"  # an import or a manifest that is not finished
PARTIAL = ".partial"  # a part that is being fetched; kept, so that it can go on


@dataclass(frozen=True, slots=True)
class Stored:
    """A model in the store. pulled_s: since 1970, 0 where it was only fetched for a plan.

    parts: names of those present.
    """

    digest: str
    manifest: Manifest
    pulled_s: float
    parts: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """All parts are here."""
        return len(self.parts) == len(self.manifest.parts)


class Store:
    """All models on this disk. Blocking: call it from a thread where a loop must not wait."""

    def __init__(self, home: Path) -> None:
        """Open or make the store and remove what a crash left. Raises ModelError."""
        self.root = home / "models"
        self._manifests: dict[str, Manifest] = {}
        with disk.clear_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def folder(self, digest: str) -> Path:
        """Where a model is, or would be. Raises PartError where `digest` is none."""
        return self.root / checked_digest(digest)

    def models(self) -> list[Stored]:
        """Every model here, the one pulled last first. Damaged folders are left out, and logged."""
        found: list[Stored] = []
        with disk.clear_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
            entries = sorted(self.root.iterdir())
        for entry in entries:
            if entry.name.startswith(".") or entry.is_symlink() or not entry.is_dir():
                continue
            try:
                found.append(self.stored(entry.name))
            except ModelError as error:
                log.warning("skipped=%s because=%s", entry.name[:80], error)
        return sorted(found, key=lambda stored: (-stored.pulled_s, stored.manifest.model))

    def stored(self, digest: str) -> Stored:
        """One model. Raises PartError where it is not here."""
        manifest = self.manifest(digest)
        parts = tuple(part.name for part in manifest.parts if self._is_present(digest, part))
        path = self.folder(digest) / "manifest.json"
        with disk.clear_errors(path):
            return Stored(digest, manifest, path.stat().st_mtime, parts)

    def manifest(self, digest: str) -> Manifest:
        """A model's manifest. Raises PartError where it is not here."""
        folder = self.folder(digest)
        if folder.is_symlink() or not folder.is_dir():
            self._manifests.pop(digest, None)
            raise PartError(f"there is no model {digest[:12]}… here")
        if digest not in self._manifests:
            self._manifests[digest] = load(folder)
        return self._manifests[digest]

    def has(self, digest: str, part: str) -> bool:
        """The part is here and may be used."""
        try:
            return self._is_present(digest, self.manifest(digest).part(checked_part(part)))
        except ModelError:  # which says that its manifest cannot be read, where it is needed
            return False

    def missing(self, digest: str, parts: Iterable[str]) -> tuple[str, ...]:
        """Those of `parts` that are not here, in the same order."""
        return tuple(part for part in parts if not self.has(digest, part))

    def read_chunk(self, digest: str, part: str, offset: int, length: int) -> bytes:
        """Bytes of a part's data region (head: of the file). Raises PartError."""
        entry = self.manifest(digest).part(checked_part(part))
        if not 0 < length <= CHUNK_BYTES_MAX or not 0 <= offset <= entry.data_bytes - length:
            raise PartError(f"{part} has no {length} bytes at {offset}; it has {entry.data_bytes}")
        if not self._is_present(digest, entry):
            raise PartError(f"{part} is not here")
        path = self.folder(digest) / entry.file
        with disk.clear_errors(path), disk.opened(path) as descriptor:
            return disk.read_at(descriptor, entry.header_bytes + offset, length)

    def verify(self, digest: str, part: str) -> None:
        """Read a part and compare its hash. Raises PartError where it is damaged."""
        entry = self.manifest(digest).part(checked_part(part))
        path = self.folder(digest) / entry.file
        found = hashlib.sha256()
        with disk.clear_errors(path), disk.opened(path) as descriptor:
            if os.fstat(descriptor).st_size != entry.file_bytes:
                raise PartError(f"{path} has not the size that it should have")
            for at in range(0, entry.data_bytes, disk.BLOCK_BYTES):
                length = min(disk.BLOCK_BYTES, entry.data_bytes - at)
                found.update(disk.read_at(descriptor, entry.header_bytes + at, length))
        if found.hexdigest() != entry.sha256:
            raise PartError(f"{path} is damaged; remove it, and it is fetched again")

    def adopt_manifest(self, digest: str, data: bytes, pulled_s: float = 0.0) -> Manifest:
        """Begin a model of which another peer has sent the manifest. Raises PartError."""
        folder = self.folder(digest)
        if len(data) > MANIFEST_BYTES_MAX or hashlib.sha256(data).hexdigest() != digest:
            raise PartError(f"a manifest that is not the one of {digest[:12]}…")
        manifest = decode(data)
        if not folder.exists():
            with self.incoming() as temporary:
                self.take_in(temporary, manifest, pulled_s)
        return self.manifest(digest)

    def renew(self, digest: str) -> bool:
        """Say that a complete model was pulled now. False where it is not here in full."""
        try:
            if not self.stored(digest).complete:
                return False
        except PartError:
            return False
        path = self.folder(digest) / "manifest.json"
        with disk.clear_errors(path):
            os.utime(path)
        return True

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """A temporary folder in the store, removed at the end unless it was taken in."""
        folder, descriptor = self._new_folder()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)

    def _new_folder(self) -> tuple[Path, int]:
        """A new folder and its lock, which says that it is in use: see _sweep."""
        with disk.clear_errors(self.root):
            while True:
                folder = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self.root))
                folder.chmod(0o755)
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                if disk.try_lock(descriptor) and folder.exists():
                    return folder, descriptor
                os.close(descriptor)  # another halka started just now and swept it away

    def take_in(self, folder: Path, manifest: Manifest, pulled_s: float | None = None) -> None:
        """Give a folder of checked, durable parts its digest as its name; adds to one that exists.

        pulled_s: None for now. Raises ModelError.
        """
        pulled_s = time.time() if pulled_s is None else pulled_s
        path, target = folder / "manifest.json", self.folder(manifest.digest)
        with disk.clear_errors(target, len(manifest.data)):
            with path.open("xb") as out:
                out.write(manifest.data)
                out.flush()
                os.fsync(out.fileno())
            os.utime(path, (pulled_s, pulled_s))
            disk.sync_folder(folder)
            try:
                folder.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self._merge(folder, target, manifest)
            disk.sync_folder(self.root)
        self._manifests[manifest.digest] = manifest

    def _merge(self, folder: Path, target: Path, manifest: Manifest) -> None:
        """Add the parts that the stored model lacks or has damaged; renew its manifest."""
        with disk.hold(target):
            for part in manifest.parts:
                if not (folder / part.file).exists():
                    continue
                try:
                    self.verify(manifest.digest, part.name)
                except ModelError:
                    (folder / part.file).replace(target / part.file)
            (folder / "manifest.json").replace(target / "manifest.json")
            disk.sync_folder(target)

    def _is_present(self, digest: str, part: PartEntry) -> bool:
        return disk.size_of(self.folder(digest) / part.file) == part.file_bytes

    def _sweep(self) -> None:
        """Remove what imports left that were killed; those still running hold a lock."""
        for entry in self.root.iterdir():
            if not entry.name.startswith(_INCOMING) or entry.is_symlink() or not entry.is_dir():
                continue
            descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if disk.try_lock(descriptor):
                    shutil.rmtree(entry, ignore_errors=True)
                    log.info("removed=%s because=unfinished_import", entry.name)
            finally:
                os.close(descriptor)
