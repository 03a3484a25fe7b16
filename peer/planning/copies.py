"""A stored model's parts, copied in F32: what a trusted engine computes with them is the truth.

The copy is a folder as the store has them, with a manifest of its own; only the parts that were
asked for are there, so that only windows of these can be placed. Nothing of the store is changed.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from peer.models import blocks, disk, gguf
from peer.models.kinds import layer_kinds
from peer.models.manifest import (
    Manifest,
    PartEntry,
    TensorEntry,
    layer_part,
    part_header,
    region_bytes,
)

_AT_ONCE = 1 << 18  # blocks that are dequantised at once
_FREE_BYTES = 256 << 20  # that the disk keeps at least


def copied_bytes(part: PartEntry) -> int:
    """Bytes of a part's tensors in F32; 0 where one of them is of a type that cannot be copied."""
    if any(tensor.type not in blocks.known() for tensor in part.tensors):
        return 0
    return sum(_f32(tensor) for tensor in part.tensors)


def copy(folder: Path, manifest: Manifest, parts: Collection[str], into: Path) -> Path:
    """Write these parts in F32 into a new folder below `into`; returns it. Raises ModelError."""
    unhashed = hashlib.sha256().hexdigest()
    made: dict[str, PartEntry] = {}
    for name in parts:
        part = manifest.part(name)
        entries: list[TensorEntry] = []
        reached = 0
        for tensor in part.tensors:
            size = _f32(tensor)
            entries.append(TensorEntry(tensor.name, "F32", tensor.shape, reached, size))
            reached += gguf.aligned(size)
        region = region_bytes(manifest.architecture, entries)
        made[name] = PartEntry(name, reached, unhashed, region, tuple(entries))
    everything = tuple(made.get(part.name, part) for part in manifest.parts)
    copied = msgspec.structs.replace(manifest, parts=everything)
    target = into / copied.digest
    with disk.clear_errors(target):
        target.mkdir()
        disk.require(target, sum(part.file_bytes for part in made.values()) + _FREE_BYTES)
        (target / "manifest.json").write_bytes(copied.data)
        shutil.copyfile(folder / manifest.part("head").file, target / manifest.part("head").file)
    for name, part in made.items():
        source, path = manifest.part(name), target / part.file
        header = part_header(manifest.architecture, part.tensors, part.header_bytes)
        with disk.clear_errors(path, part.file_bytes), path.open("xb") as out:
            out.write(header)
            for tensor in source.tensors:
                _write(out, folder / source.file, source.header_bytes + tensor.offset, tensor)
    return target


def _f32(tensor: TensorEntry) -> int:
    return gguf.tensor_bytes("F32", tensor.shape)


def _write(out: BinaryIO, path: Path, offset: int, tensor: TensorEntry) -> None:
    """The tensor's values, padded as in a part."""
    step = _AT_ONCE * gguf.TYPES[tensor.type][2]
    written = 0
    with disk.opened(path) as descriptor:
        for at in range(0, tensor.size, step):
            data = disk.read_at(descriptor, offset + at, min(step, tensor.size - at))
            values = blocks.dequantize(tensor.type, np.frombuffer(data, np.uint8))
            written += out.write(values.tobytes())
    out.write(bytes(gguf.aligned(written) - written))


def sampled(manifest: Manifest, held: Collection[str], most: int, budget_bytes: int) -> list[int]:
    """Layers to look at, at most so many, of those that are here: of every kind the first, then
    ones evenly spread, while their copies in F32 fit into the budget.

    Neither the first nor the last layer: their windows hold the vocabulary's matrices, too.
    """
    here = [i for i in range(1, manifest.layers - 1) if layer_part(i) in held]
    kinds = layer_kinds(manifest)
    firsts = [
        here[[kinds[i] for i in here].index(kind)] for kind in dict.fromkeys(kinds[i] for i in here)
    ]
    spread = [here[round(at)] for at in np.linspace(0, len(here) - 1, most)] if here else []
    chosen: list[int] = []
    for layer in [*firsts, *spread]:
        size = copied_bytes(manifest.part(layer_part(layer)))
        if layer not in chosen and len(chosen) < most and size <= budget_bytes:
            chosen.append(layer)
            budget_bytes -= size
    return sorted(chosen)


def holds(part: PartEntry) -> str:
    """The types of a part's matrices, the largest first, for people."""
    sizes: dict[str, int] = {}
    for tensor in part.tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size
    return " and ".join(sorted(sizes, key=lambda kind: -sizes[kind])) or "F32"


def rounded(part: PartEntry, kinds: Collection[str]) -> bool:
    """Whether one of its tensors is of one of these types."""
    return any(tensor.type in kinds for tensor in part.tensors)


def has_experts(parts: Sequence[PartEntry]) -> bool:
    """Whether a router chooses what is computed."""
    return any("_exps." in tensor.name for part in parts for tensor in part.tensors)
