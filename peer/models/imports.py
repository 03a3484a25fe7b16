"""Import of a GGUF, in one or several files, into parts.

Everything is written to a temporary folder of the store, hashed on the way, made durable, and
appears under its digest by one rename: an import that fails or is killed leaves nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from peer.errors import GGUFError, ModelError
from peer.models import disk, gguf
from peer.models.gguf import GGUF, TensorInfo, Value
from peer.models.manifest import (
    FORMAT,
    REGION_BYTES,
    Architecture,
    Manifest,
    PartEntry,
    TensorEntry,
    layer_part,
    part_header,
    part_of,
    region_bytes,
)
from peer.models.manifest import decode as decode_manifest
from peer.models.naming import model_id
from peer.models.store import Store
from peer.planning.profile import LAYERS_MAX

Progress = Callable[[int, int], None]
"""done_bytes, total_bytes"""

FILES_MAX = 1024

_SPLIT_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})")


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor and the file that it comes from."""

    path: Path
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class _Source:
    """A model as its files hold it. metadata: without what describes the files themselves."""

    stem: str
    architecture: str
    layers: int
    header_bytes: int
    metadata: dict[str, Value]
    tensors: tuple[_Tensor, ...]


def import_gguf(path: Path, store: Store, progress: Progress | None = None) -> Manifest:
    """Put a model into the store as parts; a model that is there already is only renewed.

    path: the file, or any one of a model's split files. Raises ModelError: GGUFError for a file
    that is not a model, PartError where the disk cannot take it. Blocking, minutes for large ones.
    """
    source = _read(path)
    groups = _grouped(source)
    total = sum(t.info.size for t in source.tensors)
    with store.incoming() as folder:
        disk.require(store.root, total + source.header_bytes + 2 * REGION_BYTES * len(groups))
        copied = _Copied(total, progress or (lambda done, of: None))
        parts = [_write_head(folder, source, groups.pop("head", ()), copied)]
        for name in sorted(groups, key=_rank):
            parts.append(_write_part(folder, source.architecture, name, groups[name], copied))
        infos = tuple(t.info for t in source.tensors)
        name = model_id(source.metadata, infos, source.stem)
        manifest = Manifest(FORMAT, name, source.architecture, source.layers, tuple(parts))
        decode_manifest(manifest.data)  # what other peers will refuse is refused here, and now
        store.take_in(folder, manifest)
    return manifest


def import_head(path: Path, root: Path) -> Path:
    """Put a model's head.gguf and a manifest into a new folder of `root`, and no weights: enough
    for its shape. Hashes, and so the digest, are not those that an import of the weights gives.

    Raises: ModelError. Reads the header only, however large the file is.
    """
    source = _read(path)
    groups = _grouped(source)
    unhashed = hashlib.sha256().hexdigest()
    copied = _Copied(source.header_bytes, lambda done, of: None)
    with disk.clear_errors(root):
        incoming = root / "incoming"
        incoming.mkdir()
        parts = [_write_head(incoming, source, groups.pop("head", ()), copied)]
        for name in sorted(groups, key=_rank):
            entries = _entries(groups[name], 0)
            weight = sum(gguf.aligned(entry.size) for entry in entries)
            region = region_bytes(source.architecture, entries)
            parts.append(PartEntry(name, weight, unhashed, region, entries))
        infos = tuple(t.info for t in source.tensors)
        name = model_id(source.metadata, infos, source.stem)
        manifest = Manifest(FORMAT, name, source.architecture, source.layers, tuple(parts))
        decode_manifest(manifest.data)
        (incoming / "manifest.json").write_bytes(manifest.data)
        return incoming.rename(root / manifest.digest)


def _read(path: Path) -> _Source:
    if not path.exists():
        raise ModelError(f"there is no file {path}")
    paths = _all_files(path)
    files = [gguf.read(one) for one in paths]
    first = files[0]
    _check_splits(paths, files)
    metadata = {
        key: value
        for key, value in first.metadata.items()
        if not key.startswith("split.") and key not in ("general.alignment", "halka.padding")
    }
    tensors = tuple(
        _Tensor(one, info) for one, file in zip(paths, files, strict=True) for info in file.tensors
    )
    names = {t.info.name for t in tensors}
    if len(names) != len(tensors):
        raise GGUFError(f"{path}: a tensor is in two of the model's files")
    header = first.header()
    architecture, layers = _architecture(path, header.architecture), header.layers
    if not 1 <= layers <= LAYERS_MAX or isinstance(layers, bool):
        raise GGUFError(
            f"{path}: not a language model that halka can run: {architecture}.block_count is "
            f"{layers}"
        )
    _check_tensors(path, names, layers)
    stem = path.name.removesuffix(".gguf")
    if split := _SPLIT_NAME.fullmatch(stem):
        stem = split[1]
    return _Source(stem, architecture, layers, first.data_offset, metadata, tensors)


def _architecture(path: Path, text: str) -> str:
    try:
        return msgspec.convert(text, Architecture)
    except msgspec.ValidationError:
        raise GGUFError(
            f"{path}: general.architecture is {text[:64]!r}, which names no architecture"
        ) from None


def _check_tensors(path: Path, names: set[str], layers: int) -> None:
    """Every layer has tensors, and the vocabulary's matrices are there."""
    parts = {part_of(name, layers) for name in names}
    for layer in range(layers):
        if layer_part(layer) not in parts:
            raise GGUFError(f"{path}: layer {layer} of {layers} has no tensors")
    if "token_embd.weight" not in names:
        raise GGUFError(f"{path}: token_embd.weight is missing; this is no whole language model")
    if "output" in parts and "output.weight" not in names:
        raise GGUFError(f"{path}: it has other output tensors but no output.weight")


def _all_files(path: Path) -> list[Path]:
    """All files of a model, from any one of them, as `gguf-split` names them."""
    split = _SPLIT_NAME.fullmatch(path.name.removesuffix(".gguf"))
    if not split:
        return [path]
    count = int(split[3])
    if not 1 <= count <= FILES_MAX or not 1 <= int(split[2]) <= count:
        raise GGUFError(f"{path}: {path.name} is not the name of one of {count} files")
    paths = [
        path.with_name(f"{split[1]}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [one.name for one in paths if not one.is_file()]
    if missing:
        raise GGUFError(
            f"{path.parent}: {', '.join(missing[:8])} of the model's {count} files "
            f"{'is' if len(missing) == 1 else 'are'} missing; put all of them into one folder"
        )
    return paths


def _check_splits(paths: Sequence[Path], files: Sequence[GGUF]) -> None:
    """The files say of themselves what their names say."""

    def stated(file: GGUF, key: str, default: int) -> object:
        return file.metadata[key].value if key in file.metadata else default

    for number, (path, file) in enumerate(zip(paths, files, strict=True)):
        count = stated(file, "split.count", 1)
        if count in (0, 1) and len(files) == 1:
            return
        if count != len(files) or stated(file, "split.no", -1) != number:
            raise GGUFError(
                f"{path}: by its header this is file {stated(file, 'split.no', 0)} (from 0) of "
                f"{count}, by its name file {number} of {len(files)}; fetch the model again, with "
                "its own file names"
            )
    total = sum(len(file.tensors) for file in files)
    if stated(files[0], "split.tensors.count", total) != total:
        raise GGUFError(f"{paths[0]}: the files hold {total} tensors, the first one states others")


def _grouped(source: _Source) -> dict[str, tuple[_Tensor, ...]]:
    groups: dict[str, list[_Tensor]] = {}
    for tensor in source.tensors:
        groups.setdefault(part_of(tensor.info.name, source.layers), []).append(tensor)
    return {name: tuple(tensors) for name, tensors in groups.items()}


def _rank(part: str) -> tuple[int, int]:
    """Parts in the manifest's order: embed, layers by number, output."""
    if part.startswith("layer-"):
        return (1, int(part.removeprefix("layer-")))
    return (0 if part == "embed" else 2, 0)


class _Copied:
    """Tensors' bytes on their way into a part: hashed, counted, shown."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def blocks(self, tensors: Sequence[_Tensor]) -> Iterator[bytes]:
        """The tensors' data in order, each padded to gguf.ALIGNMENT."""
        with ExitStack() as stack:
            descriptors: dict[Path, int] = {}
            for tensor in tensors:
                if tensor.path not in descriptors:
                    descriptor = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
                    stack.callback(os.close, descriptor)
                    descriptors[tensor.path] = descriptor
                yield from self._tensor(descriptors[tensor.path], tensor.info)

    def _tensor(self, descriptor: int, info: TensorInfo) -> Iterator[bytes]:
        for at in range(0, info.size, disk.BLOCK_BYTES):
            length = min(disk.BLOCK_BYTES, info.size - at)
            yield disk.read_at(descriptor, info.offset + at, length)
            self._done += length
            self._progress(self._done, self._total)
        yield bytes(gguf.aligned(info.size) - info.size)

    @property
    def left(self) -> int:
        """Bytes still to come."""
        return self._total - self._done


def _entries(tensors: Sequence[_Tensor], start: int) -> tuple[TensorEntry, ...]:
    entries: list[TensorEntry] = []
    for tensor in tensors:
        info = tensor.info
        entries.append(TensorEntry(info.name, info.type, info.shape, start, info.size))
        start += gguf.aligned(info.size)
    return tuple(entries)


def _write_part(
    folder: Path, architecture: str, name: str, tensors: Sequence[_Tensor], copied: _Copied
) -> PartEntry:
    entries = _entries(tensors, 0)
    region = region_bytes(architecture, entries)
    header = part_header(architecture, entries, region)
    data_bytes, digest = _write(folder / f"{name}.gguf", header, tensors, copied, hashlib.sha256())
    return PartEntry(name, data_bytes, digest, region, entries)


def _write_head(
    folder: Path, source: _Source, tensors: Sequence[_Tensor], copied: _Copied
) -> PartEntry:
    """head.gguf: its header is content, so the hash covers the whole file."""
    infos = [(t.info.name, t.info.shape, t.info.type) for t in tensors]
    header = gguf.header_bytes(source.metadata, infos)
    digest = hashlib.sha256(header)
    data_bytes, sha256 = _write(folder / "head.gguf", header, tensors, copied, digest)
    return PartEntry("head", len(header) + data_bytes, sha256, 0, _entries(tensors, len(header)))


def _write(
    path: Path,
    header: bytes,
    tensors: Sequence[_Tensor],
    copied: _Copied,
    digest: hashlib._Hash,
) -> tuple[int, str]:
    """Write one durable part file; returns the bytes after the header, and the finished hash."""
    size = 0
    with disk.clear_errors(path, copied.left), path.open("xb") as out:
        out.write(header)
        for block in copied.blocks(tensors):
            out.write(block)
            digest.update(block)
            size += len(block)
        out.flush()
        os.fsync(out.fileno())
    return size, digest.hexdigest()
