"""Random layers that look like a model's: its tensors' shapes and types, other numbers.

A peer can so measure how fast it runs a model of which it has head.gguf and the manifest alone. The
parts are written into a temporary folder within the model's, and placed as a stage places them. The
numbers are safe: finite, no denormals, norms about 1, decays below 0, scales of blocks small; a NaN
in a router of experts would crash an engine's sort.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.base import Header, Recipe
from peer.errors import PartError
from peer.models import disk, gguf
from peer.models.manifest import (
    Manifest,
    PartEntry,
    TensorEntry,
    layer_part,
    part_header,
    region_bytes,
)
from peer.models.parts import Placed, place
from peer.planning.trials import Trial

PREFIX = ".measure-"
_TILE_BYTES = 1 << 20  # of random numbers, again and again: their places in memory differ
_FREE_BYTES = 256 << 20  # that the disk keeps at least
_LEAST, _MOST = 0.01, 0.03  # of plain numbers, beside their sign


class RandomLayers:
    """A folder of random parts, removed at the end. Raises ModelError."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._model, self._manifest = folder, manifest
        self._made: dict[str, PartEntry] = {}  # parts as their files are now
        self._descriptor = -1

    def __enter__(self) -> RandomLayers:
        with disk.clear_errors(self._model):
            sweep(self._model)
            self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self._model))
            self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            disk.try_lock(self._descriptor)
            head = self._manifest.part("head").file
            try:
                (self.folder / head).hardlink_to(self._model / head)
            except OSError:  # a filesystem without them
                shutil.copyfile(self._model / head, self.folder / head)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._descriptor)

    def place(self, trial: Trial, recipe: Recipe) -> Placed:
        """The files of the trial's window, as `models.parts.place` gives them."""
        parts = {layer_part(layer) for layer in range(trial.first, trial.last)}
        for name in self._made.keys() - parts:
            if name.startswith("layer-"):  # of the window before: it is closed by now
                self._remove(name)
        for layer, source in zip(range(trial.first, trial.last), trial.sources, strict=True):
            self._write(self._copied(layer, source))
        whole = {"embed": recipe.embed, "output": recipe.output}
        for name, loaded in whole.items():
            if loaded:
                self._write(self._manifest.part(name))
        if trial.first == 0 and not recipe.embed:  # rows are looked up in it, no more
            self._write(self._manifest.part("embed"), empty=True)
        made = tuple(self._made.get(part.name, part) for part in self._manifest.parts)
        manifest = msgspec.structs.replace(self._manifest, parts=made)
        return place(self.folder, manifest, recipe, trial.first, trial.last, self.folder)

    def _copied(self, layer: int, source: int) -> PartEntry:
        """The part of `layer` with the tensors of `source`."""
        part = self._manifest.part(layer_part(layer))
        if layer == source:
            return part
        tensors: list[TensorEntry] = []
        reached = 0
        for tensor in self._manifest.part(layer_part(source)).tensors:
            name = f"blk.{layer}.{tensor.name.removeprefix(f'blk.{source}.')}"
            tensors.append(TensorEntry(name, tensor.type, tensor.shape, reached, tensor.size))
            reached += gguf.aligned(tensor.size)
        header_bytes = region_bytes(self._manifest.architecture, tensors)
        return PartEntry(part.name, reached, part.sha256, header_bytes, tuple(tensors))

    def _write(self, part: PartEntry, *, empty: bool = False) -> None:
        """Make the part's file, if it is not there as it is wanted. empty: zeros, not on disk."""
        if self._made.get(part.name) == part:
            return
        self._remove(part.name)
        path = self.folder / part.file
        if not empty:
            disk.require(self.folder, part.file_bytes + _FREE_BYTES)
        header = part_header(self._manifest.architecture, part.tensors, part.header_bytes)
        with disk.clear_errors(path, part.file_bytes), path.open("xb") as out:
            out.write(header)
            for tensor in () if empty else part.tensors:
                _fill(out, tensor)
            out.truncate(part.file_bytes)
        self._made[part.name] = part

    def _remove(self, name: str) -> None:
        (self.folder / self._manifest.part(name).file).unlink(missing_ok=True)
        self._made.pop(name, None)


def as_filled(header: Header, trial: Trial) -> Header:
    """The header with each layer of a trial's window as that of which it has the tensors."""
    tensors = dict(header.tensors)
    for layer, source in zip(range(trial.first, trial.last), trial.sources, strict=True):
        here, there = f"blk.{layer}.", f"blk.{source}."
        if layer == source:
            continue
        for name in [name for name in tensors if name.startswith(here)]:
            del tensors[name]
        for name, fact in header.tensors.items():
            if name.startswith(there):
                tensors[here + name.removeprefix(there)] = fact
    return Header(header.metadata, tensors)


def sweep(folder: Path) -> None:
    """Remove what measurements left that were killed; those still running hold a lock."""
    for left in folder.glob(f"{PREFIX}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if disk.try_lock(descriptor):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)


def _fill(out: BinaryIO, tensor: TensorEntry) -> None:
    """A tensor's random data, padded as in a part."""
    if tensor.type == "F32" and (special := _special(tensor)) is not None:
        data = memoryview(special.tobytes())
    else:
        data = memoryview(tile(tensor.type))
    left = tensor.size
    while left:
        left -= out.write(data[: min(left, len(data))])
    out.write(bytes(gguf.aligned(tensor.size) - tensor.size))


def _special(tensor: TensorEntry) -> NDArray[np.float32] | None:
    """Numbers that must lie in a certain range."""
    name = tensor.name.rpartition("blk.")[2]
    if "norm" in name and name.endswith("weight"):
        return _plain(tensor.size // 4) + np.float32(1.0)
    if "ssm_a" in name:  # exp of it is a decay: above 0 it would grow without end
        return -np.abs(_plain(tensor.size // 4))
    return None


def _plain(count: int) -> NDArray[np.float32]:
    random = np.random.default_rng(count)
    sign = random.integers(0, 2, count).astype(np.float32) * 2 - 1
    values: NDArray[np.float32] = random.uniform(_LEAST, _MOST, count).astype(np.float32) * sign
    return values


@cache
def tile(kind: str) -> bytes:
    """Whole blocks of a GGML type, about 1 MiB of them. Raises PartError for one without a rule."""
    if kind not in gguf.TYPES:
        raise PartError(f"no random numbers are known for tensors of type {kind}")
    _, per_block, block = gguf.TYPES[kind]
    count = max(1, _TILE_BYTES // block)
    if per_block == 1:
        return _numbers(kind, count)
    random = np.random.default_rng(block)
    if kind in ("Q8_1", "Q8_K"):  # never of weights, and their scale is no float16
        return bytes(count * block)
    # A float16 whose upper byte is sign, 00001 and anything is between 6e-5 and 5e-4 in size,
    # wherever in the block it may stand; all other bytes are indices, and any index is valid.
    blocks = random.integers(0, 256, (count, block), dtype=np.uint8) & 0x8B | 0x04
    if kind == "MXFP4":  # begins with an exponent, of base 2, around 127
        blocks[:, 0] = random.integers(116, 120, count)
    elif kind == "NVFP4":  # begins with four small floats, whose sign bit means nothing
        blocks[:, :4] &= 0x0F
    return blocks.tobytes()


def _numbers(kind: str, count: int) -> bytes:
    values = _plain(count)
    match kind:
        case "F32":
            return values.tobytes()
        case "F16":
            return values.astype(np.float16).tobytes()
        case "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        case "F64":
            return values.astype(np.float64).tobytes()
    return bytes(count * gguf.TYPES[kind][2])  # integers: places in other tensors
