"""What is said over the pipes between a backend and the child process that computes for it.

A frame is four bytes of length, a head in MessagePack, and the bytes of the arrays that the head
describes, one after the other. Both ends are this program, but every size is bounded all the same
before it is allocated, and nothing is unpickled: a child that dies in mid-sentence must be an
error of its parent and nothing worse.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.base import Footprint, Header, Settings, Window

HEAD_BYTES_MAX = 64 << 20  # a window's header: some 10 000 tensors of 200 bytes, and metadata
ARRAYS_BYTES_MAX = 4 << 30  # logits of 2048 rows of half a million words
LENGTH = struct.Struct("<I")
_DTYPES = {"int32": np.int32, "float32": np.float32, "bool": np.bool_}


class Message(msgspec.Struct, frozen=True, tag_field="is"):
    """The base of all of them."""


class Open(Message, frozen=True, tag="open"):
    """First of all: which engine, and how. meet_s: how long to wait for an island's others."""

    engine: str
    settings: Settings
    meet_s: float = 0.0


class Load(Message, frozen=True, tag="load"):
    """`Backend.load`."""

    window: Window


class Run(Message, frozen=True, tag="run"):
    """`Backend.run` of a loaded window. Arrays: the batch's slots, positions, outputs, and x."""

    first: int
    last: int


class Trim(Message, frozen=True, tag="trim"):
    """`Backend.trim`."""

    slot: int
    position: int


class Copy(Message, frozen=True, tag="copy"):
    """`Backend.copy`."""

    source: int
    target: int
    length: int


class Close(Message, frozen=True, tag="close"):
    """Free everything and end."""


class Done(Message, frozen=True, tag="done"):
    """It was done. Arrays: of `Run`, what it returned."""

    used: Footprint | None = None  # of `Load`


class Failed(Message, frozen=True, tag="failed"):
    """A BackendFault."""

    why: str
    kind: Literal["refused", "memory", "failed"] = "failed"


class Fact(msgspec.Struct, frozen=True, array_like=True):
    """An array that follows the head."""

    dtype: Literal["int32", "float32", "bool"]
    shape: tuple[int, ...]

    def empty(self) -> NDArray[Any]:
        """Room for it. Raises ValueError where it is too large or no array."""
        size = np.dtype(_DTYPES[self.dtype]).itemsize
        for extent in self.shape:
            size *= extent
        if (
            not 0 <= size <= ARRAYS_BYTES_MAX
            or len(self.shape) > 2
            or min(self.shape, default=0) < 0
        ):
            raise ValueError(f"an array of {self.shape} between a backend and its process")
        return np.empty(self.shape, _DTYPES[self.dtype])


Said = Open | Load | Run | Trim | Copy | Close | Done | Failed


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """The head of a frame."""

    said: Said
    arrays: tuple[Fact, ...] = ()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not go over a pipe")


def _made(wanted: type, value: Any) -> Any:
    if wanted is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"no {wanted.__name__} comes over a pipe")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_decoder = msgspec.msgpack.Decoder(Frame, dec_hook=_made)


def pack(said: Said, arrays: Sequence[NDArray[Any]] = ()) -> list[memoryview]:
    """The buffers of a frame, to be written one after the other; the arrays' are not copied."""
    whole = [np.ascontiguousarray(array) for array in arrays]
    facts = tuple(Fact(str(array.dtype), array.shape) for array in whole)  # type: ignore[arg-type]
    head = _encoder.encode(Frame(said, facts))
    if len(head) > HEAD_BYTES_MAX:
        raise ValueError(f"a head of {len(head)} bytes for a pipe")
    bodies = [room(array) for array in whole if array.size]
    return [memoryview(LENGTH.pack(len(head)) + head), *bodies]


def head_length(data: bytes | bytearray) -> int:
    """Bytes of the head that follows. Raises ValueError."""
    length: int = LENGTH.unpack(data)[0]
    if not 0 < length <= HEAD_BYTES_MAX:
        raise ValueError(f"a head of {length} bytes from a pipe")
    return length


def unpack(head: bytes | bytearray) -> tuple[Said, list[NDArray[Any]]]:
    """What is said, and room for the arrays whose bytes follow. Raises ValueError."""
    frame = _decoder.decode(head)  # msgspec.ValidationError is a ValueError
    rooms = [fact.empty() for fact in frame.arrays]
    if len(rooms) > 4 or sum(room.nbytes for room in rooms) > ARRAYS_BYTES_MAX:
        raise ValueError("more arrays than a pipe carries")
    return frame.said, rooms


def room(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, to be read or to be read into."""
    return memoryview(array.reshape(-1).view(np.uint8).data)


def travelling(window: Window) -> Window:
    """The window without what only tokenizers need: arrays as long as the vocabulary."""
    metadata = {
        key: value
        for key, value in window.header.metadata.items()
        if not key.startswith("tokenizer.")
    }
    header = Header(metadata, window.header.tensors)
    return Window(
        window.first, window.last, window.layers, header, window.files, window.embed, window.places
    )
