"""GGUF files written by hand, field by field, so that a test can lie in any one of them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

NUMBERS = {
    "uint8": (0, "<B"), "int8": (1, "<b"), "uint16": (2, "<H"), "int16": (3, "<h"),
    "uint32": (4, "<I"), "int32": (5, "<i"), "float32": (6, "<f"), "bool": (7, "<?"),
    "uint64": (10, "<Q"), "int64": (11, "<q"), "float64": (12, "<d"),
}  # fmt: skip
STRING, ARRAY = 8, 9
F32, F16, Q8_0 = 0, 1, 8
BLOCKS = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34)}

Plain = int | float | bool | str | bytes


@dataclass(frozen=True)
class Field:
    """A size, a count or a type in a header: where it stands and how it is written."""

    name: str
    offset: int
    form: str

    @property
    def bits(self) -> int:
        """Its width."""
        return struct.calcsize(self.form) * 8

    def read(self, data: bytes) -> int:
        """Its value."""
        value: int = struct.unpack_from(self.form, data, self.offset)[0]
        return value

    def lie(self, data: bytes, value: int) -> bytes:
        """The file with another value there."""
        changed = bytearray(data)
        struct.pack_into(self.form, changed, self.offset, value)
        return bytes(changed)


@dataclass
class Tensor:
    """What is said of a tensor. offset None: where it belongs."""

    name: str | bytes
    shape: Sequence[int]
    type: int = F32
    offset: int | None = None

    @property
    def size(self) -> int:
        """Bytes that shape and type come to."""
        block, size = BLOCKS.get(self.type, (1, 4))
        return int(np.prod([int(n) for n in self.shape], dtype=object)) // block * size


@dataclass
class File:
    """A GGUF in the making. metadata: (key, type, value) in order; type as in "array:int32"."""

    metadata: Sequence[tuple[str | bytes, str, Plain | Sequence[Plain]]] = ()
    tensors: Sequence[Tensor] = ()
    version: int = 3
    alignment: int = 32
    data: bytes | None = None  # None: as many random bytes as the tensors want
    fields: list[Field] = field(default_factory=list)

    def encoded(self) -> bytes:
        """The file. Fills in `fields`."""
        self.fields.clear()
        out = bytearray(b"GGUF")
        self._number(out, "version", "<I", self.version)
        self._number(out, "tensor count", "<Q", len(self.tensors))
        self._number(out, "key count", "<Q", len(self.metadata))
        for key, kind, value in self.metadata:
            self._string(out, f"key {key!r}", key)
            self._value(out, f"{key!r}", kind, value)
        reached = 0
        for tensor in self.tensors:
            self._string(out, f"name of {tensor.name!r}", tensor.name)
            self._number(out, f"dimensions of {tensor.name!r}", "<I", len(tensor.shape))
            for i, n in enumerate(tensor.shape):
                self._number(out, f"dimension {i} of {tensor.name!r}", "<Q", n)
            self._number(out, f"type of {tensor.name!r}", "<I", tensor.type)
            offset = reached if tensor.offset is None else tensor.offset
            self._number(out, f"offset of {tensor.name!r}", "<Q", offset)
            reached = -(-(offset + tensor.size) // self.alignment) * self.alignment
        if self.tensors:
            out += bytes(-len(out) % self.alignment)
        data = np.random.default_rng(len(out)).bytes(reached) if self.data is None else self.data
        return bytes(out) + data

    def write(self, path: Path) -> Path:
        """Write the file; returns its path."""
        path.write_bytes(self.encoded())
        return path

    def _number(self, out: bytearray, name: str, form: str, value: int) -> None:
        self.fields.append(Field(name, len(out), form))
        out += struct.pack(form, value)

    def _string(self, out: bytearray, name: str, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        self._number(out, f"length of {name}", "<Q", len(data))
        out += data

    def _value(self, out: bytearray, key: str, kind: str, value: object) -> None:
        name, _, item = kind.partition(":")
        if name == "array":
            assert isinstance(value, Sequence)
            self._number(out, f"type of {key}", "<I", ARRAY)
            number = {"string": STRING, "array": ARRAY}.get(item) or NUMBERS[item][0]
            self._number(out, f"item type of {key}", "<I", number)
            self._number(out, f"item count of {key}", "<Q", len(value))
            for one in value:
                self._payload(out, key, item, one)
        else:
            number = STRING if name == "string" else NUMBERS[name][0]
            self._number(out, f"type of {key}", "<I", number)
            self._payload(out, key, name, value)

    def _payload(self, out: bytearray, key: str, name: str, value: object) -> None:
        if name == "string":
            assert isinstance(value, str | bytes)
            self._string(out, f"string in {key}", value)
        else:
            out += struct.pack(NUMBERS[name][1], value)


EVERY_TYPE: Sequence[tuple[str, str, Plain | Sequence[Plain]]] = (
    ("general.architecture", "string", "tiny"),
    ("a.u8", "uint8", 200), ("a.i8", "int8", -3), ("a.u16", "uint16", 60000),
    ("a.i16", "int16", -300), ("a.u32", "uint32", 4_000_000_000), ("a.i32", "int32", -70000),
    ("a.f32", "float32", 0.1), ("a.yes", "bool", True), ("a.no", "bool", False),
    ("a.u64", "uint64", (1 << 64) - 1), ("a.i64", "int64", -(1 << 63)), ("a.f64", "float64", 0.1),
    ("a.empty", "string", ""), ("a.text", "string", "halka → ring, 環"),
    ("b.u8", "array:uint8", [0, 255]), ("b.i32", "array:int32", [-1, 0, 1]),
    ("b.f32", "array:float32", [0.1, -2.5]), ("b.bool", "array:bool", [True, False, True]),
    ("b.none", "array:int32", []), ("b.u64", "array:uint64", [1 << 63]),
    ("tokenizer.ggml.tokens", "array:string", ["<s>", "", "á", b"\xe1\x28", b"\xff"]),
)  # fmt: skip


def every_type() -> File:
    """A small file with a value of every type and three tensors."""
    tensors = (Tensor("one", (4, 3)), Tensor("two.weight", (32, 2), Q8_0), Tensor("three", (5,)))
    return File(EVERY_TYPE, tensors)


def model(
    layers: int = 3,
    hidden: int = 32,
    vocabulary: int = 40,
    *,
    tied: bool = True,
    extra: Sequence[Tensor] = (),
    metadata: Mapping[str, tuple[str, Plain | Sequence[Plain]]] | None = None,
) -> File:
    """A language model in miniature: every kind of tensor, random numbers, no meaning."""
    values: dict[str | bytes, tuple[str, Plain | Sequence[Plain]]] = {
        "general.architecture": ("string", "llama"),
        "general.name": ("string", "Tiny Model"),
        "llama.block_count": ("uint32", layers),
        "llama.embedding_length": ("uint32", hidden),
        "llama.context_length": ("uint32", 256),
        "general.file_type": ("uint32", 7),
        "tokenizer.ggml.tokens": ("array:string", [f"<{i}>" for i in range(vocabulary)]),
    }
    values.update(metadata or {})
    tensors = [Tensor("token_embd.weight", (hidden, vocabulary), Q8_0)]
    tensors.append(Tensor("rope_freqs.weight", (hidden // 2,)))
    for layer in range(layers):
        tensors.append(Tensor(f"blk.{layer}.attn_norm.weight", (hidden,)))
        tensors.append(Tensor(f"blk.{layer}.attn_q.weight", (hidden, hidden), Q8_0))
        tensors.append(Tensor(f"blk.{layer}.ffn_up.weight", (hidden, 3), F16))
    tensors.append(Tensor("output_norm.weight", (hidden,)))
    if not tied:
        tensors.append(Tensor("output.weight", (hidden, vocabulary), F16))
    tensors += extra
    return File([(key, kind, value) for key, (kind, value) in values.items()], tensors)
