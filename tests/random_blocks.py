"""Random tensors of GGML's quantised types, byte by byte, and what gguf-py makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from backends.mlx import blocks

QUANTISED = [name for name in blocks.TYPES if name not in ("F32", "F16", "BF16")]

# Zeros of both signs, the smallest and the largest denormal, the smallest normal number, others.
ODD_SCALES = np.array(
    [0.0, -0.0, 6e-8, -6e-8, 6.097e-5, -6.104e-5, 3.1e-5, 1.0, -1.0, 500.0, -3.0], np.float16
)


def shape_bytes(type_name: str, shape: Sequence[int]) -> int:
    """By gguf-py's own table."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return int(np.prod(shape)) // values * size


def random_tensor(
    type_name: str, shape: Sequence[int], seed: int, scales: NDArray[Any] = ODD_SCALES
) -> NDArray[np.uint8]:
    """Random bits, and scales that are finite: odd ones among ordinary ones. shape: ggml order."""
    chance = np.random.default_rng(seed)
    data = chance.integers(0, 256, shape_bytes(type_name, shape), dtype=np.uint8)
    block = data.view(blocks.TYPES[type_name].block)
    for name in ("d", "m", "dmin"):
        if name in (block.dtype.names or ()):
            drawn = chance.standard_normal(len(block)) * chance.choice([1e-5, 1e-2, 1.0])
            odd = chance.random(len(block)) < 0.5
            block[name] = np.where(odd, chance.choice(scales, len(block)), drawn)
    if type_name == "MXFP4":
        block["e"] %= 253  # 253 and 254 reach infinity with some codes, 255 is NaN in E8M0
    return data


def by_gguf(type_name: str, shape: Sequence[int], data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The tensor's values, [rows…, columns], as gguf-py says."""
    rows = data.reshape(*reversed(shape[1:]), -1)
    kind = gguf.GGMLQuantizationType[type_name]
    values: NDArray[np.float32] = gguf.quants.dequantize(rows, kind)
    return values
