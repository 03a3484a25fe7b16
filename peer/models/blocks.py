"""What the blocks of GGUF's quantised types mean, in numpy alone: dequantised, and random ones.

It proves engines, so it shares no line with any of them: a mistake in an engine's own reading of a
type must not be repeated here. Everything is computed in float32, in the order of ggml's own
dequantisers, and is bit for bit what they give.
Source: ggml-quants.c (dequantize_row_*), ggml-common.h (the layout of the blocks).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from peer.models.gguf import TYPES

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_HALF = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_LEAST, _MOST = 0.5, 1.5  # of a random scale, as a multiple of the middle one


def dequantize(kind: str, data: Bytes) -> Floats:
    """The values of whole blocks, in order: float32 [values]. Raises KeyError for another type."""
    if kind in _PLAIN:
        return _PLAIN[kind](data)
    values: Floats = _BLOCKS[kind](data.reshape(-1, TYPES[kind][2])).reshape(-1)
    return values


def known() -> frozenset[str]:
    """The types that can be dequantised."""
    return frozenset(_PLAIN) | frozenset(_BLOCKS)


def random_data(kind: str, count: int, spread: float, random: np.random.Generator) -> Bytes:
    """`count` random values of a type, as a file holds them, of about this standard deviation.

    Scales differ from block to block, in size and sign, and offsets are no multiple of scales:
    whoever mixes them up gives other numbers.
    """
    if kind in _PLAIN:
        values = random.standard_normal(count, dtype=np.float32) * np.float32(spread)
        return _stored(kind, values)
    _, per_block, size = TYPES[kind]
    blocks = random.integers(0, 256, (count // per_block, size), dtype=np.uint8)
    if kind == "MXFP4":  # an exponent of base 2; the values themselves spread about 5.8 steps
        around = 128 + round(float(np.log2(spread / 5.8)))
        blocks[:, 0] = random.integers(around - 1, around + 2, len(blocks))
        return blocks.reshape(-1)
    at, middle, offset_at, offset = _SCALES[kind]
    scales = random.uniform(_LEAST, _MOST, len(blocks)) * spread / middle
    scales *= random.choice([-1.0, 1.0], len(blocks))
    _put(blocks, at, scales)
    if offset_at is not None:
        _put(blocks, offset_at, scales * offset * random.uniform(0.8, 1.2, len(blocks)))
    return blocks.reshape(-1)


# Where a block's scale is, how far its values spread for a scale of 1, where its offset is, and
# what offset, as a multiple of the scale, brings their middle to about 0.
_SCALES: dict[str, tuple[int, float, int | None, float]] = {
    "Q4_0": (0, 4.6, None, 0.0), "Q4_1": (0, 4.6, 2, -7.5),
    "Q5_0": (0, 9.2, None, 0.0), "Q5_1": (0, 9.2, 2, -15.5), "Q8_0": (0, 74.0, None, 0.0),
    "Q4_K": (0, 240.0, 2, 7.5), "Q5_K": (0, 480.0, 2, 15.5), "Q6_K": (208, 1360.0, None, 0.0),
}  # fmt: skip


def _put(blocks: Bytes, at: int, values: NDArray[np.float64]) -> None:
    blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _stored(kind: str, values: Floats) -> Bytes:
    match kind:
        case "F16":
            return values.astype("<f2").view(np.uint8)
        case "BF16":
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return values.view(np.uint8)


def _bf16(data: Bytes) -> Floats:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


_PLAIN: dict[str, Callable[[Bytes], Floats]] = {
    "F32": lambda data: data.view("<f4").astype(np.float32),
    "F16": lambda data: data.view("<f2").astype(np.float32),
    "BF16": _bf16,
}


def _f16(blocks: Bytes, at: int) -> Floats:
    """A float16 of every block: [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(data: Bytes) -> NDArray[np.uint8]:
    """The low halves of a row's bytes, then the high ones: [..., 2 · bytes]."""
    return np.concatenate([data & 0x0F, data >> 4], axis=-1)


def _fifth(data: Bytes) -> NDArray[np.uint8]:
    """The 32 high bits of blocks of 5 bits, as 0 or 16: [blocks, 32]."""
    return np.unpackbits(data, axis=-1, bitorder="little") * np.uint8(16)


def _q4_0(blocks: Bytes) -> Floats:
    return _f16(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _f16(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _f16(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    digits = _nibbles(blocks[:, 6:]) | _fifth(blocks[:, 2:6])
    return _f16(blocks, 0) * (digits.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    digits = _nibbles(blocks[:, 8:]) | _fifth(blocks[:, 4:8])
    return _f16(blocks, 0) * digits.astype(np.float32) + _f16(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _f16(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _scales_and_offsets(packed: Bytes) -> tuple[Floats, Floats]:
    """Twelve bytes hold eight scales and eight offsets of 6 bits: [blocks, 8] each."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, (c & 0x0F) | (a >> 6 << 4)], axis=1)
    offsets = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=1)
    return scales.astype(np.float32), offsets.astype(np.float32)


def _k(blocks: Bytes, digits: NDArray[np.uint8]) -> Floats:
    """Eight groups of 32 with a scale and an offset each. digits: [blocks, 8, 32]."""
    scales, offsets = _scales_and_offsets(blocks[:, 4:16])
    scale = (_f16(blocks, 0) * scales)[..., None]
    offset = (_f16(blocks, 2) * offsets)[..., None]
    return scale * digits.astype(np.float32) - offset


def _q4_k(blocks: Bytes) -> Floats:
    return _k(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    bits = np.arange(8, dtype=np.uint8)[:, None]
    high: NDArray[np.uint8] = (blocks[:, None, 16:48] >> bits & np.uint8(1)) * np.uint8(16)
    return _k(blocks, low | high)


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    pairs = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> pairs & 3) << 4
    digits = (low | high).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (_f16(blocks, 208) * scales)[..., None] * digits


def _mxfp4(blocks: Bytes) -> Floats:
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128).astype(np.float32)
    return scale * _HALF[_nibbles(blocks[:, 1:])]


_BLOCKS: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "MXFP4": _mxfp4,
}  # fmt: skip
