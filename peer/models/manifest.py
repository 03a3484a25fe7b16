"""What a stored model consists of: its parts, their sizes and hashes, their tensors.

The manifest's canonical JSON is hashed, and that hash is the model's digest: it names the model's
folder and everything about it that peers say to each other. A part's hash covers its data region
only (head.gguf: the whole file); the header before it is derived from the manifest, never trusted.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

import msgspec

from peer.errors import GGUFError, PartError
from peer.models import disk, gguf
from peer.models.gguf import Value
from peer.planning.profile import LAYERS_MAX, Bytes, Digest
from peer.protocol import MANIFEST_BYTES_MAX, Part

FORMAT = 1
REGION_BYTES = 4096  # headers come in multiples of this: a page, so that data stays page aligned
MODEL_CHARACTERS_MAX = 64  # the setting `model` takes no more

ModelId = Annotated[
    str, msgspec.Meta(max_length=MODEL_CHARACTERS_MAX, pattern="^[a-z0-9][a-z0-9._-]*$")
]
Architecture = Annotated[str, msgspec.Meta(max_length=64, pattern="^[a-z0-9][a-z0-9._-]*$")]
TensorName = Annotated[str, msgspec.Meta(min_length=1, max_length=gguf.NAME_BYTES_MAX)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]

_DIGEST = re.compile("[0-9a-f]{64}")
_PART = re.compile("head|embed|output|layer-[0-9]{3,4}")


class TensorEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor of a part. offset: from the start of the part's data region."""

    name: TensorName
    type: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=4)]
    offset: Bytes
    size: Bytes


class PartEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a model. header_bytes: where its data region begins (0 for head.gguf)."""

    name: Part
    data_bytes: Bytes
    sha256: Digest
    header_bytes: Annotated[int, msgspec.Meta(ge=0, le=gguf.HEADER_BYTES_MAX)]
    tensors: tuple[TensorEntry, ...]

    @property
    def file_bytes(self) -> int:
        """Size of the part's file."""
        return self.header_bytes + self.data_bytes

    @property
    def file(self) -> str:
        """The file's name in the model's folder."""
        return f"{self.name}.gguf"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """A model as it is stored. parts: head, embed, every layer in order, output where not tied."""

    format: int
    model: ModelId
    architecture: Architecture
    layers: Annotated[int, msgspec.Meta(ge=1, le=LAYERS_MAX)]
    parts: tuple[PartEntry, ...]

    @cached_property
    def by_name(self) -> dict[str, PartEntry]:
        """Parts by name."""
        return {part.name: part for part in self.parts}

    @cached_property
    def data(self) -> bytes:
        """The canonical JSON: what is stored, sent and hashed."""
        return msgspec.json.encode(self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `data`, the model's name among peers."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def tied(self) -> bool:
        """The output matrix is the embedding: the last window needs embed.gguf."""
        return "output" not in self.by_name

    @property
    def total_bytes(self) -> int:
        """Bytes on disk with all parts there."""
        return sum(part.file_bytes for part in self.parts)

    def part(self, name: str) -> PartEntry:
        """One part. Raises PartError where the model has none of this name."""
        if name not in self.by_name:
            raise PartError(f"{self.model} has no part {name[:32]!r}")
        return self.by_name[name]


def layer_part(layer: int) -> str:
    """The name of a layer's part."""
    return f"layer-{layer:03d}"


def checked_digest(digest: str) -> str:
    """The digest itself. Raises PartError where it is not one: it becomes a folder's name."""
    if not _DIGEST.fullmatch(digest):
        raise PartError(f"{digest[:80]!r} is not a model's digest")
    return digest


def checked_part(part: str) -> str:
    """The part's name itself. Raises PartError where it is not one: it becomes a file's name."""
    if not _PART.fullmatch(part):
        raise PartError(f"{part[:32]!r} is not a part's name")
    return part


def region_bytes(architecture: str, tensors: Sequence[TensorEntry]) -> int:
    """Size of a part's header region: enough for every place that it can take in a window."""
    widest = part_header(architecture, tensors, 0, split=(0, 0, 0))
    return gguf.aligned(len(widest) + 64, REGION_BYTES)


def part_header(
    architecture: str,
    tensors: Iterable[TensorEntry],
    pad_to: int,
    *,
    renumber: tuple[int, int] | None = None,
    split: tuple[int, int, int] | None = None,
) -> bytes:
    """A part's header: derived from the manifest, for one place in one window.

    renumber: (layer in the model, layer in the window). split: (place, files, tensors of all
    files); without it the part is a GGUF of its own.
    """
    metadata = {"general.architecture": Value("string", architecture)}
    if split is not None:
        metadata["split.no"] = Value("uint16", split[0])
        metadata["split.count"] = Value("uint16", split[1])
        metadata["split.tensors.count"] = Value("int32", split[2])
    named = [(t.name, t.shape, t.type) for t in tensors]
    if renumber is not None:
        before, after = f"blk.{renumber[0]}.", f"blk.{renumber[1]}."
        named = [(after + n.removeprefix(before), shape, kind) for n, shape, kind in named]
    return gguf.header_bytes(metadata, named, pad_to=pad_to)


_decoder = msgspec.json.Decoder(Manifest)


def decode(data: bytes) -> Manifest:
    """A manifest from whoever sent or stored it. Raises PartError, naming what does not fit."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise PartError(f"a manifest of {len(data)} bytes, more than {MANIFEST_BYTES_MAX}")
    try:
        manifest = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise PartError(f"not a manifest: {error}") from None
    if manifest.format != FORMAT:
        raise PartError(f"a manifest of format {manifest.format}; this halka reads {FORMAT}")
    try:
        why = _wrong(manifest)
    except GGUFError as error:
        why = str(error)
    if why or manifest.data != data:
        raise PartError(f"the manifest contradicts itself: {why or 'it is not canonical JSON'}")
    return manifest


def _wrong(manifest: Manifest) -> str:
    """What is wrong with a manifest, or ""."""
    layers = [layer_part(i) for i in range(manifest.layers)]
    names = [part.name for part in manifest.parts]
    if names not in (["head", "embed", *layers], ["head", "embed", *layers, "output"]):
        return "its parts are not head, embed, every layer and output, in this order"
    seen: set[str] = set()
    for part in manifest.parts:
        for tensor in part.tensors:
            if tensor.name in seen or not tensor.name.isprintable():
                return f"the tensor {tensor.name!r} comes twice or has no proper name"
            if part_of(tensor.name, manifest.layers) != part.name:
                return f"the tensor {tensor.name} does not belong to {part.name}"
            seen.add(tensor.name)
        if why := _wrong_layout(manifest, part):
            return f"{part.name}: {why}"
    return ""


def _wrong_layout(manifest: Manifest, part: PartEntry) -> str:
    is_head = part.name == "head"
    if not part.tensors and not is_head:
        return "it has no tensors"
    reached = part.tensors[0].offset if is_head and part.tensors else 0
    for tensor in part.tensors:
        if tensor.size != gguf.tensor_bytes(tensor.type, tensor.shape):
            return f"{tensor.name} cannot have {tensor.size} bytes"
        if tensor.offset != reached or reached % gguf.ALIGNMENT:
            return f"{tensor.name} is not where it must be"
        reached += gguf.aligned(tensor.size)
    if part.data_bytes != reached and (part.tensors or not is_head):
        return f"its data should have {reached} bytes, not {part.data_bytes}"
    if is_head and not part.tensors and part.data_bytes > gguf.HEADER_BYTES_MAX:
        return f"a header of {part.data_bytes} bytes"
    # Last, because making the header needs types, shapes and offsets that are possible.
    if part.header_bytes != (0 if is_head else region_bytes(manifest.architecture, part.tensors)):
        return f"its header cannot have {part.header_bytes} bytes"
    return ""


_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.")


def part_of(tensor: str, layers: int) -> str:
    """Which part a tensor belongs to.

    The matrices of the vocabulary have parts of their own, because only the ends of the ring need
    them; every other tensor outside of the layers is small and wanted by every window: head.
    Raises GGUFError for a layer that the model does not have.
    """
    if found := _LAYER.match(tensor):
        if int(found[1]) >= layers:
            raise GGUFError(f"the tensor {tensor} belongs to a layer beyond the model's {layers}")
        return layer_part(int(found[1]))
    if tensor.startswith(("token_embd.", "per_layer_token_embd.")):
        return "embed"
    return "output" if tensor.startswith("output.") else "head"


def load(folder: Path) -> Manifest:
    """The manifest of a model's folder. Raises PartError, ModelError."""
    path = folder / "manifest.json"
    with disk.clear_errors(path), disk.opened(path) as descriptor:
        data = os.pread(descriptor, MANIFEST_BYTES_MAX + 1, 0)
    if hashlib.sha256(data).hexdigest() != folder.name:
        raise PartError(f"{path} is damaged: remove {folder} and pull the model again")
    return decode(data)
