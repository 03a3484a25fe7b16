"""GGML's blocks of quantised weights, taken apart with numpy: integers, scales, float32 values.

A block's bytes are named by a structured dtype, field by field as in the C structs of
ggml/src/ggml-common.h. A weight is scale · (code - offset), or scale · code + bias, of its group;
the order of operations is that of `dequantize_row_*` in ggml/src/ggml-quants.c and of gguf-py's
gguf/quants.py, so that results are theirs to the last bit. Nothing here is believed of a file
before its length was compared with its type and shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

DIMENSIONS_MAX = 4  # GGML_MAX_DIMS
SLAB_VALUES = 1 << 18  # taken apart at once: what is made of them stays in a core's cache

_QK_K = 256  # values in a block of the K types


@dataclass(frozen=True, slots=True)
class Apart:
    """Blocks taken apart. codes: [blocks, values]; scale, bias: [blocks, groups].

    A weight is scale · (code - offset) where bias is None, else scale · code + bias; in MXFP4 code
    indexes the sixteen values of E2M1, twice as large, and scale is halved for that.
    """

    codes: Bytes
    scale: Floats
    bias: Floats | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """A type's block: how many values, its bytes, and how these are taken apart.

    take: None for types that are plain numbers.
    """

    values: int
    block: np.dtype[Any]
    group: int = 1
    take: Callable[[NDArray[Any]], Apart] | None = None


def halves(packed: Bytes, each: int) -> Bytes:
    """Nibbles as GGML orders them: of every `each` bytes the low ones first, then the high ones."""
    packed = packed.reshape(len(packed), -1, each)
    codes = np.empty((len(packed), packed.shape[1], 2, each), np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[:, :, 0])
    np.right_shift(packed, 4, out=codes[:, :, 1])
    return codes.reshape(len(packed), -1)


def _spread(packed: Bytes, each: int, shifts: Sequence[int], mask: int, up: int) -> Bytes:
    """Of every `each` bytes the bits at each shift in turn, moved up: [blocks, values]."""
    packed = packed.reshape(len(packed), -1, 1, each)
    codes = np.right_shift(packed, np.array(shifts, np.uint8)[:, None])
    codes &= np.uint8(mask)  # whole arrays in place: four times as fast as row by row
    codes <<= np.uint8(up)
    return codes.reshape(len(packed), -1)


def _single(field: NDArray[Any]) -> Floats:
    """A block's float16 as float32 [blocks, 1]."""
    return field.astype(np.float32)[:, None]


def _fifth_bits(field: NDArray[Any]) -> Bytes:
    """Q5_0's and Q5_1's 32 bits a block as 0 or 16: [blocks, 32]."""
    octets = np.ascontiguousarray(field).view(np.uint8).reshape(-1, 4)
    return np.left_shift(np.unpackbits(octets, axis=1, bitorder="little"), 4)


def _q4_0(block: NDArray[Any]) -> Apart:
    return Apart(halves(block["qs"], 16), _single(block["d"]), offset=8)


def _q4_1(block: NDArray[Any]) -> Apart:
    return Apart(halves(block["qs"], 16), _single(block["d"]), _single(block["m"]))


def _q5_0(block: NDArray[Any]) -> Apart:
    codes = halves(block["qs"], 16) | _fifth_bits(block["qh"])
    return Apart(codes, _single(block["d"]), offset=16)


def _q5_1(block: NDArray[Any]) -> Apart:
    codes = halves(block["qs"], 16) | _fifth_bits(block["qh"])
    return Apart(codes, _single(block["d"]), _single(block["m"]))


def _q8_0(block: NDArray[Any]) -> Apart:
    # A signed byte with its sign bit turned round is the byte plus 128.
    return Apart(np.bitwise_xor(block["qs"], 0x80), _single(block["d"]), offset=128)


def _mxfp4(block: NDArray[Any]) -> Apart:
    # ggml_e8m0_to_fp32_half: half the scale, because the codes' values are doubled.
    power = block["e"].astype(np.uint32)
    bits = np.where(power < 2, np.uint32(0x00200000) << (power & 1), (power - 1) << 23)
    return Apart(halves(block["qs"], 16), bits.view(np.float32)[:, None])


def _scales_and_minima(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 6-bit scales and minima of Q4_K and Q5_K, see get_scale_min_k4: [blocks, 8] each."""
    first, second, upper = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    high = np.uint8(0x30)
    scales = [first & 0x3F, (upper & 0x0F) | ((first >> 2) & high)]
    minima = [second & 0x3F, (upper >> 4) | ((second >> 2) & high)]
    return np.concatenate(scales, axis=1), np.concatenate(minima, axis=1)


def _k_groups(block: NDArray[Any]) -> tuple[Floats, Floats]:
    """Scale and bias of each group of 32 of Q4_K and Q5_K: [blocks, 8] each."""
    scales, minima = _scales_and_minima(block["scales"])
    return _single(block["d"]) * scales, -(_single(block["dmin"]) * minima)


def _q4_k(block: NDArray[Any]) -> Apart:
    return Apart(halves(block["qs"], 32), *_k_groups(block))


def _q5_k(block: NDArray[Any]) -> Apart:
    codes = halves(block["qs"], 32)
    codes |= _spread(block["qh"], 32, range(8), 1, 4)
    return Apart(codes, *_k_groups(block))


def _q6_k(block: NDArray[Any]) -> Apart:
    codes = halves(block["ql"], 64)
    codes |= _spread(block["qh"], 32, (0, 2, 4, 6), 3, 4)
    return Apart(codes, _single(block["d"]) * block["scales"].astype(np.float32), offset=32)


def _q2_k(block: NDArray[Any]) -> Apart:
    codes = _spread(block["qs"], 32, (0, 2, 4, 6), 3, 0)
    scale = _single(block["d"]) * (block["scales"] & 0x0F)
    return Apart(codes, scale, -(_single(block["dmin"]) * (block["scales"] >> 4)))


def _q3_k(block: NDArray[Any]) -> Apart:
    codes = _spread(block["qs"], 32, (0, 2, 4, 6), 3, 0)
    # A value whose bit is set is as it is, one whose bit is not set is less by 4: the offset.
    codes |= _spread(block["hmask"], 32, range(8), 1, 2)
    low = _spread(block["scales"][:, :8], 8, (0, 4), 15, 0)
    high = _spread(block["scales"][:, 8:], 4, (0, 2, 4, 6), 3, 4)
    scales = (low | high).astype(np.float32) - np.float32(32)
    return Apart(codes, _single(block["d"]) * scales, offset=4)


def _block(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype[Any]:
    return np.dtype(list(fields))


TYPES: dict[str, Layout] = {
    "F32": Layout(1, np.dtype("<f4")),
    "F16": Layout(1, np.dtype("<f2")),
    "BF16": Layout(1, np.dtype("<u2")),
    "Q4_0": Layout(32, _block(("d", "<f2"), ("qs", "u1", 16)), 32, _q4_0),
    "Q4_1": Layout(32, _block(("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)), 32, _q4_1),
    "Q5_0": Layout(32, _block(("d", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)), 32, _q5_0),
    "Q5_1": Layout(
        32, _block(("d", "<f2"), ("m", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)), 32, _q5_1
    ),
    "Q8_0": Layout(32, _block(("d", "<f2"), ("qs", "u1", 32)), 32, _q8_0),
    "MXFP4": Layout(32, _block(("e", "u1"), ("qs", "u1", 16)), 32, _mxfp4),
    "Q2_K": Layout(
        _QK_K,
        _block(("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")),
        16,
        _q2_k,
    ),
    "Q3_K": Layout(
        _QK_K,
        _block(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")),
        16,
        _q3_k,
    ),
    "Q4_K": Layout(
        _QK_K,
        _block(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)),
        32,
        _q4_k,
    ),
    "Q5_K": Layout(
        _QK_K,
        _block(
            ("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)
        ),
        32,
        _q5_k,
    ),
    "Q6_K": Layout(
        _QK_K,
        _block(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")),
        16,
        _q6_k,
    ),
}
"""By GGML's name. block.itemsize: bytes of a block."""

# The sixteen values of E2M1, doubled: kvalues_mxfp4 in ggml-common.h.
_E2M1 = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)


def size_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor has in a file. shape: ggml order. Raises BackendFault (refused)."""
    layout = TYPES.get(type_name)
    if layout is None:
        raise BackendFault(f"MLX has no tensors of type {type_name[:16]}", "refused")
    if not 1 <= len(shape) <= DIMENSIONS_MAX or any(not 1 <= n <= 1 << 48 for n in shape):
        raise BackendFault(f"{list(shape)[:8]} is not the shape of a tensor", "refused")
    if shape[0] % layout.values:
        why = f"rows of {shape[0]} values do not divide into blocks of {type_name}"
        raise BackendFault(why, "refused")
    return prod(shape) // layout.values * layout.block.itemsize


def blocks_of(type_name: str, shape: Sequence[int], data: Bytes) -> NDArray[Any]:
    """The tensor's bytes as an array of its type's blocks, not copied. Raises BackendFault."""
    size = size_bytes(type_name, shape)
    if data.dtype != np.uint8 or data.size != size:
        why = f"a tensor of {type_name} and shape {list(shape)} has {size} bytes, not {data.size}"
        raise BackendFault(why, "refused")
    return np.ascontiguousarray(data).reshape(-1).view(TYPES[type_name].block)


def slabs(type_name: str, count: int) -> Iterator[slice]:
    """Pieces of `count` blocks of a type, each of about SLAB_VALUES values."""
    step = max(1, SLAB_VALUES // TYPES[type_name].values)
    return (slice(at, min(count, at + step)) for at in range(0, count, step))


def values(type_name: str, blocks: NDArray[Any]) -> Floats:
    """What blocks of a quantised type hold: [blocks, values]."""
    take = TYPES[type_name].take
    assert take is not None, type_name
    with np.errstate(invalid="ignore", over="ignore"):  # scales may be infinite: so are weights
        apart = take(blocks)
        if type_name == "MXFP4":
            return _E2M1[apart.codes] * apart.scale
        numbers = apart.codes.astype(np.float32)
        if apart.offset:
            numbers -= np.float32(apart.offset)
        grouped = numbers.reshape(*apart.scale.shape, -1)
        grouped *= apart.scale[:, :, None]
        if apart.bias is not None:
            grouped += apart.bias[:, :, None]
    return numbers


def dequantize(type_name: str, shape: Sequence[int], data: Bytes) -> Floats:
    """The tensor's values as float32 [rows…, columns]. shape: ggml order. Raises BackendFault."""
    blocks = blocks_of(type_name, shape, data)
    out = np.empty(prod(shape), np.float32)
    if type_name == "BF16":
        np.left_shift(blocks, 16, out=out.view(np.uint32), dtype=np.uint32)
    elif TYPES[type_name].take is None:
        out[:] = blocks
    else:
        grid = out.reshape(len(blocks), -1)
        for slab in slabs(type_name, len(blocks)):
            grid[slab] = values(type_name, blocks[slab])
    return out.reshape(tuple(reversed(shape)))
