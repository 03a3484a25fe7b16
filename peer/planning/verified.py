"""What was proven: `verified.json` in HALKA_HOME, so that a restart proves nothing again.

An entry is found again for the same engine, device, settings, system and releases of every library
that has a part in the answer, halka's own among them; anything newer is proven anew. Verdicts by
figures are kept and believed, wrong ones too; a process that crashed or took too long is kept to be
shown, and tried again. The file is a convenience: what cannot be read is empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import time
from importlib import metadata
from pathlib import Path

import msgspec

from peer import VERSION
from peer.planning.hardware import version
from peer.planning.proof import Subject, Verdict

log = logging.getLogger("halka.planning")

ENTRIES_MAX = 64  # the newest are kept
FILE_BYTES_MAX = 1 << 20
PROOF = 1  # counted up where proofs become stricter: then all engines are proven again
_FORMAT = 1
_LIBRARIES = ("llama-cpp-python",)  # beside the backend's own


class Entry(msgspec.Struct, frozen=True):
    """One proof. proven_s: since 1970. versions: what had a part in it, for people. model: the
    digest of the one in use, "" of the built-in one."""

    key: str
    subject: Subject
    verdict: Verdict
    proven_s: float
    versions: tuple[str, ...] = ()
    model: str = ""


class _File(msgspec.Struct, frozen=True):
    format: int
    entries: tuple[Entry, ...] = ()


class Verified:
    """The file. Blocking, for milliseconds; one thread at a time."""

    def __init__(self, home: Path) -> None:
        self._path = home / "verified.json"

    def find(self, subject: Subject) -> Verdict | None:
        """What was found of this engine and exactly these versions: that it is wrong, with whatever
        model; else how it did with the built-in one. None: nothing, or it could not be proven."""
        known = [e for e in self.entries() if e.key == _key(subject, e.model)]
        wrong = next((e.verdict for e in known if e.verdict.how == "wrong"), None)
        passed = (e.verdict for e in known if not e.model and e.verdict.how == "passed")
        return wrong or next(passed, None)

    def keep(
        self,
        subject: Subject,
        verdict: Verdict,
        model: str = "",
        now_s: float | None = None,
    ) -> None:
        """Remember it. now_s: since 1970."""
        key = _key(subject, model)
        entry = Entry(
            key, subject, verdict, time.time() if now_s is None else now_s, versions(subject), model
        )
        others = [other for other in self.entries() if other.key != key]
        self._write((*others, entry)[-ENTRIES_MAX:])

    def entries(self) -> tuple[Entry, ...]:
        """All that is known, the newest last."""
        try:
            with self._path.open("rb") as file:
                found = msgspec.json.decode(file.read(FILE_BYTES_MAX + 1), type=_File)
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.MsgspecError, RecursionError, ValueError) as error:
            log.warning("verified=forgotten file=%s because=%s", self._path, error)
            return ()
        return found.entries[-ENTRIES_MAX:] if found.format == _FORMAT else ()

    def _write(self, entries: tuple[Entry, ...]) -> None:
        temporary = self._path.with_name(f".verified-{os.getpid()}.json")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.json.encode(_File(_FORMAT, entries)))
            temporary.replace(self._path)
        except OSError as error:
            log.warning("verified=unsaved file=%s because=%s", self._path, error.strerror)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def versions(subject: Subject) -> tuple[str, ...]:
    """Everything that has a part in what the engine computes here, as name and release."""
    found = [f"halka {VERSION}", f"{subject.backend} {subject.version or version(subject.backend)}"]
    for library in _LIBRARIES:
        try:
            found.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            continue
    system = platform.mac_ver()[0] or platform.release()
    return (*found, f"{platform.system()} {system} {platform.machine()}")


def _key(subject: Subject, model: str) -> str:
    parts = (PROOF, msgspec.to_builtins(subject), model, versions(subject))
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
