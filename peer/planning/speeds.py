"""What was measured before: one JSON file in HALKA_HOME, so that a restart measures nothing again.

An entry is found again for the same tensors (of whatever model), engine, threads and hardware. A
new card, driver, kernel or release of the engine is another key: then it is measured again. The
file is a convenience: what cannot be read is empty, what cannot be written is said in the log.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from peer.config import Config
from peer.errors import ModelError
from peer.models.manifest import load
from peer.planning import trust
from peer.planning.hardware import machine
from peer.planning.profile import EngineProfile, ModelShape, Speed
from peer.planning.survey import threads

log = logging.getLogger("halka.planning")

ENTRIES_MAX = 64  # the ones used last are kept
FILE_BYTES_MAX = 1 << 20
_FORMAT = 1


class _Entry(msgspec.Struct, frozen=True):
    key: str
    speeds: tuple[Speed, ...]


class _File(msgspec.Struct, frozen=True):
    format: int
    entries: tuple[_Entry, ...] = ()


class Speeds:
    """The file and what is in it. Blocking, for milliseconds; one thread at a time."""

    def __init__(self, home: Path) -> None:
        self._path = home / "speeds.json"
        self._entries: dict[str, tuple[Speed, ...]] | None = None  # the one used last comes last
        self._keys: dict[str, str] = {}  # of models asked for: digest and backend → key

    def find(
        self, config: Config, shape: ModelShape, engines: Sequence[EngineProfile]
    ) -> tuple[Speed, ...] | None:
        """What was measured of this model, or of one with the same tensors; None: nothing was.

        engines: this machine's. The model's manifest is looked for in the store.
        """
        key = self._key(config, shape, engines)
        entries = self._read()
        if key not in entries or not _sound(entries[key], engines[0].backend):
            return None
        entries[key] = entries.pop(key)
        return tuple(msgspec.structs.replace(s, digest=shape.digest) for s in entries[key])

    def keep(
        self,
        config: Config,
        shape: ModelShape,
        engines: Sequence[EngineProfile],
        speeds: Sequence[Speed],
    ) -> None:
        """Remember what was measured."""
        key = self._key(config, shape, engines)
        entries = self._read()
        entries.pop(key, None)
        entries[key] = tuple(speeds)
        self._write()

    def correct(self, digest: str, backend: str, kind: str, correction: float) -> None:
        """Remember what stages of a model that was found or kept here really took."""
        entries = self._read()
        key = self._keys.get(f"{digest} {backend}", "")
        if key not in entries:
            return
        entries[key] = tuple(
            msgspec.structs.replace(s, correction=correction) if s.kind == kind else s
            for s in entries[key]
        )
        self._write()

    def _key(self, config: Config, shape: ModelShape, engines: Sequence[EngineProfile]) -> str:
        here = machine(engines, threads(config))
        parts: list[object] = [signature(shape, config.home / "models" / shape.digest), here]
        if fit := shape.fit(here.backend, config.weights):  # the setting decides what is computed
            parts.append(fit)
        key = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
        self._keys[f"{shape.digest} {here.backend}"] = key
        return key

    def _read(self) -> dict[str, tuple[Speed, ...]]:
        if self._entries is not None:
            return self._entries
        self._entries = {}
        try:
            with self._path.open("rb") as file:
                found = msgspec.json.decode(file.read(FILE_BYTES_MAX + 1), type=_File)
        except FileNotFoundError:
            return self._entries
        except (OSError, msgspec.MsgspecError, RecursionError, ValueError) as error:
            log.warning("speeds=forgotten file=%s because=%s", self._path, error)
            return self._entries
        if found.format == _FORMAT:
            self._entries = {entry.key: entry.speeds for entry in found.entries[-ENTRIES_MAX:]}
        return self._entries

    def _write(self) -> None:
        entries = self._read()
        for oldest in list(entries)[:-ENTRIES_MAX]:
            del entries[oldest]
        file = _File(_FORMAT, tuple(_Entry(key, speeds) for key, speeds in entries.items()))
        temporary = self._path.with_name(f".speeds-{os.getpid()}.json")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.json.encode(file))
            temporary.replace(self._path)
        except OSError as error:
            log.warning("speeds=unsaved file=%s because=%s", self._path, error.strerror)
            temporary.unlink(missing_ok=True)


def _sound(speeds: Sequence[Speed], backend: str) -> bool:
    """Whether others would believe them: what they refuse would keep this peer out for good."""
    faults = itertools.chain.from_iterable(map(trust.of_speed, speeds))
    return bool(speeds) and {s.backend for s in speeds} == {backend} and not any(faults)


def signature(shape: ModelShape, folder: Path) -> str:
    """What determines a model's speed and not its words: architecture, tensors, active experts.

    Its digest alone where the manifest cannot be read.
    """
    try:
        manifest = load(folder)
    except ModelError:
        return shape.digest
    tensors = [[(t.name, t.type, t.shape) for t in part.tensors] for part in manifest.parts]
    what = (manifest.architecture, manifest.layers, shape.layer_active_bytes, tensors)
    return hashlib.sha256(msgspec.json.encode(what)).hexdigest()
