"""A window's files, made of a model's parts.

The main file of a window is small and written anew: metadata, global tensors, stubs. The layers
are the parts themselves, used as GGUF splits; only their headers are rewritten, to number the
layers from 0. So a new plan copies no weights, and a mapping that is in use stays what it is: data
is never moved, truncated or replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from backends.base import Cuts, Header, Place, Recipe, TensorFact
from peer.errors import GGUFError, ModelError, PartError
from peer.models import disk, gguf, tokenizers
from peer.models.disk import hold
from peer.models.gguf import GGUF, Value
from peer.models.imports import import_gguf
from peer.models.kinds import active_bytes, layer_kinds, vocabulary
from peer.models.manifest import (
    Manifest,
    PartEntry,
    layer_part,
    load,
    part_header,
)
from peer.planning.profile import Fit, ModelShape

__all__ = [
    "Placed",
    "check_head",
    "hold",
    "import_gguf",
    "load_header",
    "place",
    "read_head",
    "shape_of",
]


@dataclass(frozen=True, slots=True)
class Placed:
    """A window's files as an engine takes them. files: main file, then the splits in order.

    embed: where the first window's token embedding is to be looked up by the engine itself. places:
    of all tensors of these parts, by their names in the whole model.
    """

    files: tuple[Path, ...]
    embed: Path | None
    places: Mapping[str, Place]


def load_header(folder: Path, manifest: Manifest | None = None) -> Header:
    """The whole model's header, from head.gguf and the manifest alone. Raises ModelError."""
    manifest = manifest or load(folder)
    head = read_head(folder, manifest)
    tensors = {
        t.name: TensorFact(t.shape, t.type, t.size) for part in manifest.parts for t in part.tensors
    }
    return Header({key: value.value for key, value in head.metadata.items()}, tensors)


def read_head(folder: Path, manifest: Manifest) -> GGUF:
    """head.gguf, checked against the manifest. Raises ModelError where they contradict."""
    part = manifest.part("head")
    _require(folder, [part])
    return check_head(folder / part.file, manifest)


def check_head(path: Path, manifest: Manifest) -> GGUF:
    """The file's header, if it can be the head.gguf of this manifest. Raises ModelError."""
    head = gguf.read(path)
    header = head.header()
    found = [(t.name, t.type, t.shape, t.offset, t.size) for t in head.tensors]
    tensors = manifest.part("head").tensors
    stated = [(t.name, t.type, t.shape, t.offset, t.size) for t in tensors]
    names = (manifest.architecture, manifest.layers)
    if (header.architecture, header.layers) != names or found != stated:
        raise PartError(
            f"{path} is not what the model's manifest says; remove {path.parent} and pull the "
            "model again"
        )
    return head


def place(
    folder: Path, manifest: Manifest, recipe: Recipe, first: int, last: int, into: Path
) -> Placed:
    """Make the files of the window [first, last) ready to load.

    Writes the main file into the folder `into` and the headers of the parts in place. Hold the
    folder (`hold`) until they are loaded. Raises ModelError, naming the part that is missing.
    """
    if not 0 <= first < last <= manifest.layers:
        raise PartError(f"{manifest.model} has no layers {first} to {last}")
    splits = [manifest.part(layer_part(layer)) for layer in range(first, last)]
    if recipe.embed:
        splits.append(manifest.part("embed"))
    if recipe.output:
        splits.append(manifest.part("output"))
    alone = manifest.part("embed") if first == 0 and not recipe.embed else None
    with hold(folder):
        _require(folder, [*splits, *([alone] if alone else [])])
        main = _Main(folder, manifest, recipe)
        total = main.tensor_count + sum(len(part.tensors) for part in splits)
        path = main.write(into / f"window-{first:03d}-{last:03d}.gguf", len(splits) + 1, total)
        for place_no, part in enumerate(splits, start=1):
            layer = first + place_no - 1
            renamed = [
                msgspec.structs.replace(t, name=recipe.rename.get(t.name, t.name))
                for t in part.tensors
            ]
            header = part_header(
                manifest.architecture,
                renamed,
                part.header_bytes,
                renumber=(layer, layer - first) if layer < last else None,
                split=(place_no, len(splits) + 1, total),
            )
            _rewrite(folder / part.file, header)
        if alone:
            _make_readable(folder, manifest, alone)
    files = (path, *(folder / part.file for part in splits))
    held = [manifest.part("head"), *splits, *([alone] if alone else [])]
    places = {
        t.name: Place(folder / part.file, part.header_bytes + t.offset)
        for part in held
        for t in part.tensors
    }
    return Placed(files, folder / alone.file if alone else None, places)


class _Main:
    """The main file of a window: what the recipe makes of head.gguf."""

    def __init__(self, folder: Path, manifest: Manifest, recipe: Recipe) -> None:
        self._source = folder / manifest.part("head").file
        head = read_head(folder, manifest)
        self._metadata = {
            key: value for key, value in head.metadata.items() if not key.startswith(recipe.drop)
        }
        for key, (kind, plain) in recipe.write.items():
            self._metadata[key] = Value(kind, plain)
        stubs = {stub.name for stub in recipe.stubs}  # a stub replaces what it is named after
        self._copied = [
            t for t in head.tensors if t.name not in recipe.without and t.name not in stubs
        ]
        self._stubs = recipe.stubs
        self.tensor_count = len(self._copied) + len(self._stubs)

    def write(self, path: Path, files: int, tensors: int) -> Path:
        """Write it, as the first of so many files with so many tensors in all."""
        metadata = dict(self._metadata)
        metadata["split.no"] = Value("uint16", 0)
        metadata["split.count"] = Value("uint16", files)
        metadata["split.tensors.count"] = Value("int32", tensors)
        infos = [(t.name, t.shape, t.type) for t in self._copied]
        infos += [(stub.name, stub.shape, stub.type) for stub in self._stubs]
        header = gguf.header_bytes(metadata, infos)
        sizes = [gguf.aligned(gguf.tensor_bytes(kind, shape)) for _, shape, kind in infos]
        temporary = path.with_name(f"{path.name}.new")
        with disk.clear_errors(path, len(header) + sum(sizes)):
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as out, disk.opened(self._source) as source:
                out.write(header)
                for tensor, size in zip(self._copied, sizes, strict=False):
                    _copy(source, tensor.offset, tensor.size, out, size)
                out.truncate(len(header) + sum(sizes))  # stubs: zeros that take no space
            temporary.replace(path)
        return path


def _copy(source: int, offset: int, length: int, out: BinaryIO, padded: int) -> None:
    for at in range(0, length, disk.BLOCK_BYTES):
        out.write(disk.read_at(source, offset + at, min(disk.BLOCK_BYTES, length - at)))
    out.write(bytes(padded - length))


def _require(folder: Path, parts: Iterable[PartEntry]) -> None:
    """Raise PartError where a part is not there in full."""
    for part in parts:
        size = disk.size_of(folder / part.file)
        if size < 0:
            raise PartError(f"{folder / part.file} is missing; it has to be fetched first")
        if size != part.file_bytes:
            raise PartError(
                f"{folder / part.file} has {size} bytes instead of {part.file_bytes}; "
                "remove it, and it is fetched again"
            )


def _rewrite(path: Path, header: bytes) -> None:
    """Put a header in its region, if it is not there already."""
    with disk.clear_errors(path), disk.opened(path, os.O_RDWR) as descriptor:
        if disk.read_at(descriptor, 0, len(header)) != header:
            disk.write_at(descriptor, 0, header)


def _make_readable(folder: Path, manifest: Manifest, part: PartEntry) -> None:
    """Give a part the header of a GGUF of its own, unless it has one that says the same.

    A header as a split does: rewriting it would take it from another window of this stage.
    """
    path = folder / part.file
    stated = [(t.name, t.shape, t.type, part.header_bytes + t.offset) for t in part.tensors]
    try:
        found = [(t.name, t.shape, t.type, t.offset) for t in gguf.read(path).tensors]
    except GGUFError:
        found = []
    if found != stated:
        _rewrite(path, part_header(manifest.architecture, part.tensors, part.header_bytes))


def contradiction(manifest: Manifest, shape: ModelShape) -> str:
    """In what a shape that somebody told of is not that of the model itself, or ""."""
    stated = _stated(manifest)
    if shape.layer_kinds:  # earlier releases tell none
        stated["layer_kinds"] = layer_kinds(manifest)
    return next((name for name, value in stated.items() if getattr(shape, name) != value), "")


def _stated(manifest: Manifest) -> dict[str, Any]:
    """What of a ModelShape the manifest says."""
    parts = manifest.by_name
    layers = range(manifest.layers)
    return {
        "model": manifest.model,
        "digest": manifest.digest,
        "architecture": manifest.architecture,
        "layers": manifest.layers,
        "tied": manifest.tied,
        "layer_bytes": tuple(parts[layer_part(i)].data_bytes for i in layers),
        "head_bytes": parts["head"].file_bytes,
        "embed_bytes": parts["embed"].data_bytes,
        "output_bytes": 0 if manifest.tied else parts["output"].data_bytes,
    }


def shape_of(
    folder: Path,
    cuts: Callable[[Header], Cuts],
    kv_bytes_per_cell: Callable[[Header], Sequence[int]],
    kv_types: Callable[[Header], Sequence[str]] = lambda _: ("f16",),
    fits: Callable[[Header], Sequence[Fit]] = lambda _: (),
) -> ModelShape:
    """What a planner must know of a stored model; cuts, KV sizes (of f16) and types as an engine
    answers them; fits as those do that do not run every model.

    Needs head.gguf and the manifest only. Raises ModelError.
    """
    manifest = load(folder)
    header = load_header(folder, manifest)

    def number(key: str) -> int:
        value = header.metadata.get(f"{manifest.architecture}.{key}", 0)
        return value if isinstance(value, int) and 0 <= value <= 1 << 31 else 0

    allowed = cuts(header)
    cells = tuple(kv_bytes_per_cell(header))
    if len(cells) != manifest.layers:
        raise ModelError(f"the engine gives KV sizes for {len(cells)} of {manifest.layers} layers")
    return ModelShape(
        **_stated(manifest),
        hidden=number("embedding_length"),
        context=number("context_length"),
        layer_kv_bytes=cells,
        cut_starts=allowed.starts,
        cut_groups=allowed.groups,
        whole_why=allowed.why[:1000],
        layer_active_bytes=active_bytes(manifest, header),
        layer_kinds=layer_kinds(manifest),
        vocabulary=vocabulary(manifest),
        tokenizer=tokenizers.mark(header.metadata),
        kv_types=tuple(kv_types(header)),
        fits=tuple(fits(header)),
    )
