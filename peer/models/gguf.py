"""GGUF headers, read with suspicion and written exactly.

A file is hostile until proven otherwise: every count and length is checked against what is left of
the file and against a sane maximum before anything of that size is allocated. What comes out of
`read` is safe to hand to an engine's own, more trusting reader. Writing keeps every value's GGUF
type, so that metadata copied from one file to another stays the same bytes.
Source: github.com/ggml-org/ggml, docs/gguf.md; rules of gguf.cpp where the two differ.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Header, TensorFact
from peer.errors import GGUFError

HEADER_BYTES_MAX = 128 << 20  # the largest known vocabularies (262,144 tokens) take below 20 MiB
KEYS_MAX = 1 << 16
TENSORS_MAX = 1 << 17
ITEMS_MAX = 1 << 22  # of one array; the longest known list of merges has 0.6 million
KEY_BYTES_MAX = 65535  # docs/gguf.md
NAME_BYTES_MAX = 63  # GGML_MAX_NAME less its NUL
DIMENSIONS_MAX = 4  # GGML_MAX_DIMS
ALIGNMENT = 32  # where general.alignment is missing
ALIGNMENT_MAX = 1 << 16

_MAGIC = b"GGUF"
_BLOCK = 1 << 20  # bytes read at once

# name → (number in the file, values in a block, bytes of a block), as ggml_type_size() of the
# pinned llama.cpp says. Numbers that ggml removed (4, 5, 31 to 33, 36 to 38) are refused.
TYPES: Mapping[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q8_1": (9, 32, 36),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136), "I8": (24, 1, 1), "I16": (25, 1, 2),
    "I32": (26, 1, 4), "I64": (27, 1, 8), "F64": (28, 1, 8), "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18), "Q2_0": (42, 64, 18),
}  # fmt: skip
_TYPE_NAMES = {number: name for name, (number, _, _) in TYPES.items()}

_VALUE_TYPES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array",
    "uint64", "int64", "float64",
)  # fmt: skip
_VALUE_NUMBERS = {name: number for number, name in enumerate(_VALUE_TYPES)}
_FORMATS = {
    "uint8": "<B", "int8": "<b", "uint16": "<H", "int16": "<h", "uint32": "<I", "int32": "<i",
    "float32": "<f", "uint64": "<Q", "int64": "<q", "float64": "<d",
}  # fmt: skip
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value. type: uint8 … float64, bool, string, or array:<one of them>.

    Strings in arrays may be token pieces that are not UTF-8: odd bytes are kept as surrogates.
    """

    type: str
    value: Any


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file. shape: ggml order (fastest first). offset: from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class GGUF:
    """A header that was read and found consistent with its file. data_offset: where data begins."""

    version: int
    alignment: int
    data_offset: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]

    def header(self) -> Header:
        """The header as engines take it: plain values, arrays as lists."""
        return Header(
            {key: value.value for key, value in self.metadata.items()},
            {t.name: TensorFact(t.shape, t.type, t.size) for t in self.tensors},
        )


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    """`size`, rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def tensor_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. Raises GGUFError where type and shape do not fit each other."""
    if type_name not in TYPES:
        raise GGUFError(f"there is no tensor type {type_name!r}")
    _, block, size = TYPES[type_name]
    if not 1 <= len(shape) <= DIMENSIONS_MAX or any(not 1 <= n <= 1 << 48 for n in shape):
        raise GGUFError(f"{list(shape)[:8]} is not the shape of a tensor")
    if shape[0] % block:
        raise GGUFError(f"rows of {shape[0]} values do not divide into blocks of {type_name}")
    total = shape[0] // block * size
    for n in shape[1:]:
        total *= n
    if total > 1 << 60:
        raise GGUFError(f"a tensor of {total} bytes cannot be")
    return total


def read(path: Path) -> GGUF:
    """Read a file's header and check it against the file. Raises GGUFError, naming the offset."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from None
    try:
        return read_descriptor(descriptor)
    except GGUFError as error:
        wrapped = GGUFError(f"{path}: {error}")
        wrapped.offset = error.offset
        raise wrapped from None
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def read_descriptor(descriptor: int) -> GGUF:
    """The same for an open file, whose position is neither used nor moved."""
    source = _Source(descriptor)
    version = _version(source)
    tensor_count, key_count = source.u64(), source.u64()
    # 32 and 13: bytes of the smallest tensor description and the smallest key with its value.
    source.fits(tensor_count, 32, TENSORS_MAX, "tensors", at=8)
    source.fits(key_count, 13, KEYS_MAX, "keys", at=16)
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        at = source.position
        key = source.string(KEY_BYTES_MAX, "a key")
        if not key or key in metadata:
            raise GGUFError(f"the key {key[:64]!r} is empty or comes twice", at)
        metadata[key] = _value(source)
    alignment = _alignment(metadata)
    found = [_tensor(source) for _ in range(tensor_count)]
    data_offset = aligned(source.position, alignment)
    tensors = _placed(found, data_offset, alignment, source.size)
    return GGUF(version, alignment, data_offset, metadata, tensors)


class _Source:
    """A file's beginning, read on demand. No read goes beyond the file or the sane maximum."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.position = 0
        self._buffer = bytearray()

    def left(self) -> int:
        """Bytes that the header can still have."""
        return min(self.size, HEADER_BYTES_MAX) - self.position

    def take(self, length: int, what: str) -> int:
        """Have `length` more bytes in the buffer and step over them; returns where they begin."""
        at = self.position
        if length > self.left():
            if at + length > self.size:
                raise GGUFError(f"{what} of {length} bytes goes beyond the end of the file", at)
            raise GGUFError(f"the header is longer than {HEADER_BYTES_MAX} bytes", at)
        while len(self._buffer) < at + length:
            wanted = max(_BLOCK, at + length - len(self._buffer))
            block = os.pread(self._descriptor, wanted, len(self._buffer))
            if not block:
                raise GGUFError("the file became shorter while it was read", at)
            self._buffer += block
        self.position = at + length
        return at

    def bytes(self, length: int, what: str) -> bytes:
        at = self.take(length, what)
        return bytes(memoryview(self._buffer)[at : at + length])

    def u32(self) -> int:
        at = self.take(4, "a number")
        number: int = _U32.unpack_from(self._buffer, at)[0]
        return number

    def u64(self) -> int:
        at = self.take(8, "a number")
        number: int = _U64.unpack_from(self._buffer, at)[0]
        return number

    def fits(self, count: int, each: int, most: int, what: str, at: int) -> None:
        """Refuse a count of things of at least `each` bytes that the file cannot hold."""
        if count > most or count * each > self.left():
            raise GGUFError(f"{count} {what} do not fit into the file", at)

    def string(self, most: int, what: str) -> str:
        at = self.position
        length = self.u64()
        if length > most:
            raise GGUFError(f"{what} of {length} bytes is longer than {most}", at)
        try:
            return self.bytes(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise GGUFError(f"{what} is not UTF-8", at) from None

    def strings(self, count: int) -> list[str]:
        """Like `string`, `count` times; written out, because vocabularies have 10^5 of them."""
        result: list[str] = []
        for _ in range(count):
            length = self.u64()
            at = self.take(length, "a string")
            text = self._buffer[at : at + length]
            result.append(text.decode("utf-8", "surrogateescape"))
        return result


def _version(source: _Source) -> int:
    if source.size < 24:
        raise GGUFError(f"a file of {source.size} bytes is too short to be a GGUF", 0)
    magic = source.bytes(4, "the magic number")
    if magic != _MAGIC:
        raise GGUFError(f"not a GGUF file: it begins with {magic!r}", 0)
    version = source.u32()
    if version in (2, 3):
        return version
    if version and not version & 0xFFFF:
        raise GGUFError("a big-endian GGUF; convert the model for little-endian machines", 4)
    raise GGUFError(f"GGUF version {version} is neither 2 nor 3; convert the model again", 4)


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return ALIGNMENT
    number = value.value
    if value.type != "uint32" or not 8 <= number <= ALIGNMENT_MAX or number & (number - 1):
        raise GGUFError(f"general.alignment {str(number)[:32]} is not a power of two from 8 on")
    return int(number)


def _value(source: _Source) -> Value:
    at = source.position
    number = source.u32()
    if number >= len(_VALUE_TYPES):
        raise GGUFError(f"there is no metadata type {number}", at)
    name = _VALUE_TYPES[number]
    if name != "array":
        return Value(name, _scalar(source, name))
    item = source.u32()
    if item >= len(_VALUE_TYPES) or _VALUE_TYPES[item] == "array":
        raise GGUFError(f"an array of metadata type {item}, which no engine reads", at)
    return Value(f"array:{_VALUE_TYPES[item]}", _items(source, _VALUE_TYPES[item]))


def _scalar(source: _Source, name: str) -> Any:
    at = source.position
    if name == "string":
        return source.string(HEADER_BYTES_MAX, "a string")
    if name == "bool":
        byte = source.bytes(1, "a bool")[0]
        if byte > 1:
            raise GGUFError(f"a bool of {byte}", at)
        return bool(byte)
    form = _FORMATS[name]
    return struct.unpack(form, source.bytes(struct.calcsize(form), "a number"))[0]


def _items(source: _Source, name: str) -> list[Any]:
    at = source.position
    count = source.u64()
    if name == "string":
        source.fits(count, 8, ITEMS_MAX, "strings of an array", at)
        return source.strings(count)
    form = np.dtype("<u1" if name == "bool" else _FORMATS[name])
    source.fits(count, form.itemsize, ITEMS_MAX, "items of an array", at)
    array = np.frombuffer(source.bytes(count * form.itemsize, "an array"), form)
    if name == "bool":
        if count and int(array.max()) > 1:
            raise GGUFError("a list of bools that are neither 0 nor 1", at)
        array = array.astype(np.bool_)
    items: list[Any] = array.tolist()
    return items


def _tensor(source: _Source) -> tuple[int, TensorInfo]:
    """A tensor's description and where it stands; its offset is still relative to the data."""
    at = source.position
    name = source.string(NAME_BYTES_MAX, "a tensor's name")
    if not name or not name.isprintable():
        raise GGUFError(f"{name!r} is not a tensor's name", at)
    dimensions = source.u32()
    if not 1 <= dimensions <= DIMENSIONS_MAX:
        raise GGUFError(f"{name} has {dimensions} dimensions", at)
    shape = tuple(source.u64() for _ in range(dimensions))
    number, offset = source.u32(), source.u64()
    if number not in _TYPE_NAMES:
        raise GGUFError(f"{name} is of the unknown type {number}", at)
    try:
        size = tensor_bytes(_TYPE_NAMES[number], shape)
    except GGUFError as error:
        raise GGUFError(f"{name}: {error}", at) from None
    return at, TensorInfo(name, shape, _TYPE_NAMES[number], offset, size)


def _placed(
    found: Iterable[tuple[int, TensorInfo]], data_offset: int, alignment: int, file_size: int
) -> tuple[TensorInfo, ...]:
    """Tensors with absolute offsets, in the header's order; inside the file and apart."""
    names: set[str] = set()
    tensors: list[TensorInfo] = []
    for at, tensor in found:
        if tensor.name in names:
            raise GGUFError(f"the tensor {tensor.name} comes twice", at)
        names.add(tensor.name)
        if tensor.offset % alignment:
            raise GGUFError(f"{tensor.name} is not aligned to {alignment} bytes", at)
        offset = data_offset + tensor.offset
        end = offset + tensor.size
        if end > file_size:
            why = f"{tensor.name} should end at byte {end} of a file of {file_size}"
            raise GGUFError(f"{why}; it is cut short or damaged, fetch it again", at)
        tensors.append(TensorInfo(tensor.name, tensor.shape, tensor.type, offset, tensor.size))
    reached = 0
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.offset < reached:
            raise GGUFError(f"{tensor.name} overlaps another tensor", tensor.offset)
        reached = tensor.offset + tensor.size
    return tuple(tensors)


def header_bytes(
    metadata: Mapping[str, Value],
    tensors: Iterable[tuple[str, Sequence[int], str]],
    *,
    pad_to: int = 0,
) -> bytes:
    """A whole header, up to where the data begins.

    tensors: (name, shape, type) in file order; each one's data begins at the next multiple of
    ALIGNMENT, as gguf.cpp demands. pad_to: the header's length in bytes, reached with a padding
    string (a multiple of ALIGNMENT; GGUFError where it is too small); 0: as short as can be.
    """
    metadata = {k: v for k, v in metadata.items() if k != "general.alignment"}
    keys = [_string(key) + _encoded(key, value) for key, value in metadata.items()]
    infos: list[bytes] = []
    offset = 0
    for name, shape, type_name in tensors:
        size = tensor_bytes(type_name, shape)
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        infos.append(_string(name) + sizes + struct.pack("<IQ", TYPES[type_name][0], offset))
        offset += aligned(size)
    if pad_to:
        bare = 24 + sum(map(len, keys)) + sum(map(len, infos))
        empty = _string("halka.padding") + _encoded("", Value("string", ""))
        if (missing := pad_to - bare - len(empty)) < 0 or pad_to % ALIGNMENT:
            raise GGUFError(f"a header of {bare + len(empty)} bytes does not fit into {pad_to}")
        keys.append(_string("halka.padding") + _encoded("", Value("string", " " * missing)))
    head = _MAGIC + struct.pack("<IQQ", 3, len(infos), len(keys))
    header = b"".join((head, *keys, *infos))
    return header.ljust(aligned(len(header)), b"\0")


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return _U64.pack(len(data)) + data


def _encoded(key: str, value: Value) -> bytes:
    """A value's type number and bytes. Raises GGUFError where the value is not of its type."""
    name, _, item = value.type.partition(":")
    if name not in _VALUE_NUMBERS or (item if name != "array" else item not in _VALUE_NUMBERS):
        raise GGUFError(f"{key}: there is no metadata type {value.type!r}")
    head = _U32.pack(_VALUE_NUMBERS[name])
    try:
        if name != "array":
            return head + _payload(name, value.value)
        head += struct.pack("<IQ", _VALUE_NUMBERS[item], len(value.value))
        if item in _FORMATS:  # one call for all: struct checks every item's range
            form = f"<{len(value.value)}{_FORMATS[item][1]}"
            return head + struct.pack(form, *value.value)
        return head + b"".join(_payload(item, one) for one in value.value)
    except (struct.error, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise GGUFError(f"{key}: not a value of type {value.type}: {error}") from None


def _payload(name: str, value: Any) -> bytes:
    if name == "string":
        return _string(value)
    if name == "bool":
        return b"\1" if value else b"\0"
    return struct.pack(_FORMATS[name], value)
