"""GGUF tensors as MLX computes with them: the same weights in another order of bits.

MLX's affine quantisation has a scale and a bias for each 32 weights, weight = scale · code + bias,
and its codes are one little-endian stream of bits a row, kept in uint32. Blocks of 32 of GGML are
that in another order, so their repacking changes no weight: exact in float32, with float16 scales
where the file has float16 scales, with float32 ones where it has products of a float16 and six
bits (Q4_K, Q5_K). Types with groups of 16 (Q6_K, Q3_K, Q2_K) have no such twin: see `how`.
Sources: mlx/ops.cpp, affine_quantize; mlx/backend/common/quantized.h; measured against mx.load.

With float16 scales mx.quantized_matmul of float32 rows is exact, but mx.dequantize computes in
float16, whatever dtype it is asked for: cast scales and biases to float32 before (embeddings).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault, Weights
from backends.mlx import blocks
from backends.mlx.blocks import Bytes, Floats

GROUP = 32  # weights that share a scale, in every packed tensor

_FLOAT16_MAX = 65504.0

_PLAIN = ("F32", "F16", "BF16")
_PACKED = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}  # bits
_FLOAT32_SCALES = ("Q4_K", "Q5_K")
_ROUNDED = ("Q6_K", "Q3_K", "Q2_K")

# What float16 must hold, at most, as a multiple of a block's d and dmin: biases (8 · d, …), whole
# weights (Q3_K: 32 · 4, Q2_K: 15 · 3 + 15), biases of Q6_K's steps, which are its weights' bound.
_LARGEST = {
    "Q4_0": 8, "Q4_1": 1, "Q5_0": 16, "Q5_1": 1, "Q8_0": 128,
    "Q6_K": 128 * 32, "Q3_K": 32 * 4, "Q2_K": 15 * 3 + 15,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dense:
    """A tensor of plain numbers. values: [rows…, columns], float32, float16, or with bf16 uint16:
    the bits of bfloat16, which numpy has not. They may be a view of the bytes that were given."""

    values: NDArray[Any]
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor in MLX's quantisation `mode`, as mx.quantized_matmul takes it.

    weight: uint32 [rows…, columns · bits / 32]. scales, biases: [rows…, columns / group], of
    float16 or float32; in mxfp4 the scales are uint8 (E8M0) and there are no biases.
    """

    weight: NDArray[np.uint32]
    scales: NDArray[Any]
    biases: NDArray[Any] | None
    bits: int
    group: int
    mode: Literal["affine", "mxfp4"]


def how(type_name: str, weights: Weights) -> Literal["exact", "approximate", "no"]:
    """Whether MLX computes with the very weights of a tensor of this type, near ones, or not at
    all. Near ones: Q6_K, Q3_K and Q2_K as float16, or with weights=small Q6_K in 8 bits."""
    if type_name in _PLAIN or type_name in _PACKED or type_name == "MXFP4":
        return "exact"
    return "approximate" if type_name in _ROUNDED and weights != "exact" else "no"


def requantises(type_name: str, weights: Weights) -> bool:
    """Whether a tensor is given new codes of 8 bits instead of float16 weights."""
    return type_name == "Q6_K" and weights == "small"


def memory_bytes(type_name: str, shape: Sequence[int], weights: Weights) -> int:
    """Bytes of the repacked tensor. shape: ggml order. Raises BackendFault (refused).

    A tensor with scales too large for float16 takes more (Q8_0: above 511); none is known.
    """
    size = blocks.size_bytes(type_name, shape)
    _require(type_name, weights)
    if type_name in _PLAIN or (type_name == "MXFP4" and len(shape) > 1):
        return size
    count = prod(shape)
    if len(shape) == 1:
        return 4 * count
    if type_name in _PACKED:
        scale_bytes = 4 if type_name in _FLOAT32_SCALES else 2
        return count * _PACKED[type_name] // 8 + 2 * scale_bytes * (count // GROUP)
    return count + 4 * (count // GROUP) if requantises(type_name, weights) else 2 * count


def repack(
    type_name: str, shape: Sequence[int], data: Bytes, weights: Weights = "auto"
) -> Dense | Packed:
    """A tensor of a file as MLX takes it. shape: ggml order; [in, out, experts] stays one tensor.

    data: its bytes, uint8 [bytes]. Takes the result's memory and a few MiB. Raises BackendFault
    (refused) for types that MLX has not and for bytes that are not such a tensor.
    """
    raw = blocks.blocks_of(type_name, shape, data)
    _require(type_name, weights)
    rows = tuple(reversed(shape[1:]))
    if type_name in _PLAIN:
        values = np.require(raw, requirements="A").reshape(*rows, shape[0])
        return Dense(values, bf16=type_name == "BF16")
    if len(shape) == 1:  # a vector is no matrix of a layer, and is added or multiplied as it is
        return Dense(blocks.dequantize(type_name, shape, data))
    if type_name == "MXFP4":
        return _microscaled(raw, rows)
    if type_name in _PACKED:
        return _affine(type_name, raw, rows, _PACKED[type_name], _codes_of)
    if requantises(type_name, weights):
        return _affine(type_name, raw, rows, 8, _anchored_codes_of)
    return _rounded(type_name, raw, rows)


def _require(type_name: str, weights: Weights) -> None:
    if how(type_name, weights) == "no":
        why = f"MLX has no {type_name}"
        if type_name in _ROUNDED:
            why += ', and the setting weights = "exact" forbids to round it'
        raise BackendFault(why, "refused")


def _fits_float16(type_name: str, raw: NDArray[Any]) -> bool:
    """Whether float16 holds all that is made of these blocks' scales; not where one is NaN."""
    limit = _FLOAT16_MAX / _LARGEST[type_name]
    fields = [name for name in ("d", "dmin") if name in (raw.dtype.names or ())]
    return all(
        bool(np.abs(raw[name][slab].astype(np.float32)).max() <= limit)
        for slab in blocks.slabs(type_name, len(raw))
        for name in fields
    )


# Codes, float32 scales and float32 biases of blocks, each flat.
_Taken = tuple[Bytes, Floats, Floats]


def _codes_of(type_name: str, raw: NDArray[Any]) -> _Taken:
    """What the blocks hold, as it is."""
    take = blocks.TYPES[type_name].take
    assert take is not None
    apart = take(raw)
    bias = apart.bias
    if bias is None:
        bias = apart.scale * np.float32(-apart.offset)
    return apart.codes.reshape(-1), apart.scale.reshape(-1), bias.reshape(-1)


def _anchored_codes_of(type_name: str, raw: NDArray[Any]) -> _Taken:
    """Q6_K's groups of 16, two at a time in 8 bits: steps of a quarter of the larger scale.

    That half keeps its weights but for the step's rounding to float16; the other is rounded to the
    nearest step, of which 128 are zero: 4 · (-32 … 31) is -128 … 124, and a -32 of a scale as large
    and of the other sign loses one step. Measured on normally distributed weights: 0.37 % off
    (rms), where Q6_K itself is 1.9 % off and float16 weights are 0.02 %.
    """
    take = blocks.TYPES[type_name].take
    assert take is not None
    apart = take(raw)
    pairs = apart.scale.reshape(-1, 2)
    first_larger = np.abs(pairs[:, 0]) >= np.abs(pairs[:, 1])
    step: Floats = np.where(first_larger, pairs[:, 0], pairs[:, 1]) * np.float32(0.25)
    if _fits_float16(type_name, raw):
        step = step.astype(np.float16).astype(np.float32)
    ratio = np.divide(pairs, step[:, None], out=np.zeros_like(pairs), where=step[:, None] != 0)
    number = apart.codes.reshape(-1, 2, 16).astype(np.float32)
    number -= np.float32(apart.offset)
    number *= ratio[:, :, None]
    np.rint(number, out=number)
    number += np.float32(128)
    np.clip(number, 0, 255, out=number)
    return number.astype(np.uint8).reshape(-1), step, step * np.float32(-128)


def _affine(
    type_name: str,
    raw: NDArray[Any],
    rows: tuple[int, ...],
    bits: int,
    codes_of: Callable[[str, NDArray[Any]], _Taken],
) -> Packed:
    """Blocks as codes of so many bits with scales and biases, a slab at a time."""
    per_block = blocks.TYPES[type_name].values
    groups = len(raw) * per_block // GROUP
    half = type_name not in _FLOAT32_SCALES and _fits_float16(type_name, raw)
    weight = np.empty(groups * bits, np.uint32)
    scales = np.empty(groups, np.float16 if half else np.float32)
    biases = np.empty_like(scales)
    with np.errstate(invalid="ignore", over="ignore"):  # scales may be infinite or no numbers
        for slab in blocks.slabs(type_name, len(raw)):
            codes, scale, bias = codes_of(type_name, raw[slab])
            at = slab.start * per_block // GROUP
            to = at + len(scale)
            weight[at * bits : to * bits] = _PACKERS[bits](codes)
            scales[at:to] = scale
            biases[at:to] = bias
    shaped = scales.reshape(*rows, -1), biases.reshape(*rows, -1)
    return Packed(weight.reshape(*rows, -1), *shaped, bits, GROUP, "affine")


def _microscaled(raw: NDArray[Any], rows: tuple[int, ...]) -> Packed:
    """MXFP4: the same four bits and the same scale bytes, in MLX's order."""
    weight = np.empty(len(raw) * 4, np.uint32)
    for slab in blocks.slabs("MXFP4", len(raw)):
        codes = blocks.halves(raw["qs"][slab], 16).reshape(-1)
        weight[slab.start * 4 : slab.stop * 4] = _pack_4(codes)
    scales = np.ascontiguousarray(raw["e"])
    return Packed(weight.reshape(*rows, -1), scales.reshape(*rows, -1), None, 4, GROUP, "mxfp4")


def _rounded(type_name: str, raw: NDArray[Any], rows: tuple[int, ...]) -> Dense:
    """Weights as float16, or as float32 where one of them would become infinite."""
    half = _fits_float16(type_name, raw)
    out = np.empty((len(raw), blocks.TYPES[type_name].values), np.float16 if half else np.float32)
    for slab in blocks.slabs(type_name, len(raw)):
        out[slab] = blocks.values(type_name, raw[slab])
    return Dense(out.reshape(*rows, -1))


def _pack_4(codes: Bytes) -> NDArray[np.uint32]:
    """Eight codes to a word."""
    pairs = codes.view(np.uint16)
    return (pairs | pairs >> 4).astype(np.uint8).view(np.uint32)


# How eight bytes of five bits become 40 bits: pairs, pairs of pairs, all: what stays, what moves.
_MERGES_5 = (
    (np.uint64(3), np.uint64(0x001F001F001F001F), np.uint64(0x03E003E003E003E0)),
    (np.uint64(6), np.uint64(0x000003FF000003FF), np.uint64(0x000FFC00000FFC00)),
    (np.uint64(12), np.uint64(0x00000000000FFFFF), np.uint64(0x000000FFFFF00000)),
)


def _pack_5(codes: Bytes) -> NDArray[np.uint32]:
    """Eight codes to 40 bits, four such to five words."""
    eight = codes.view(np.uint64)
    for shift, kept, moved in _MERGES_5:
        eight = (eight & kept) | (eight >> shift & moved)
    first, second, third, fourth = eight.reshape(-1, 4).T
    words = np.empty((len(first), 5), np.uint32)
    words[:, 0] = first & 0xFFFFFFFF
    words[:, 1] = (first >> 32 | second << 8) & 0xFFFFFFFF
    words[:, 2] = (second >> 24 | third << 16) & 0xFFFFFFFF
    words[:, 3] = (third >> 16 | fourth << 24) & 0xFFFFFFFF
    words[:, 4] = fourth >> 8
    return words.reshape(-1)


def _pack_8(codes: Bytes) -> NDArray[np.uint32]:
    """Four codes to a word."""
    return codes.view(np.uint32)


_PACKERS: dict[int, Callable[[Bytes], NDArray[np.uint32]]] = {4: _pack_4, 5: _pack_5, 8: _pack_8}
