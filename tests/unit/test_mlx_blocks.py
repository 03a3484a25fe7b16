"""Blocks taken apart: every type against gguf-py, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.base import BackendFault
from backends.mlx import blocks
from tests.random_blocks import QUANTISED, by_gguf, random_tensor


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


def test_the_blocks_are_as_large_as_gguf_py_says() -> None:
    for name, layout in blocks.TYPES.items():
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert (layout.values, layout.block.itemsize) == (values, size), name


def large() -> tuple[int, int, int]:
    """A shape of two whole slabs and a piece, with every code at every place of a block."""
    return (1024, blocks.SLAB_VALUES // 1024 + 1, 2)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_type_is_dequantised_to_the_last_bit(name: str) -> None:
    data = random_tensor(name, large(), seed=1)
    expected = by_gguf(name, large(), data)
    assert np.array_equal(bits(blocks.dequantize(name, large(), data)), bits(expected))


@pytest.mark.parametrize("name", QUANTISED)
def test_that_comparison_meets_every_code_at_every_place(name: str) -> None:
    layout = blocks.TYPES[name]
    assert layout.take is not None
    codes = layout.take(random_tensor(name, large(), seed=1).view(layout.block)).codes
    met = np.zeros((layout.values, int(codes.max()) + 1), np.bool_)
    met[np.arange(layout.values), codes] = True
    assert met.all()
    assert met.shape[1] in (4, 8, 16, 32, 64, 256)


@settings(deadline=None)  # the machine has other things to do
@given(st.sampled_from(QUANTISED), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1 << 32))
def test_any_shape_is_dequantised_to_the_last_bit(
    name: str, across: int, rows: int, seed: int
) -> None:
    shape = (blocks.TYPES[name].values * across, rows)
    data = random_tensor(name, shape, seed)
    assert np.array_equal(
        bits(blocks.dequantize(name, shape, data)), bits(by_gguf(name, shape, data))
    )


@pytest.mark.parametrize(("name", "width"), [("F32", 4), ("F16", 2), ("BF16", 2)])
def test_plain_numbers_keep_their_values_in_rows_of_any_length(name: str, width: int) -> None:
    shape = (33, 1986)  # of two bytes, nearly all that there are, in order; NaNs among them
    data = np.arange(33 * 1986 * width // 2, dtype=np.uint32).astype(np.uint16).view(np.uint8)
    expected = by_gguf(name, shape, data)
    found = blocks.dequantize(name, shape, data)
    assert found.shape == expected.shape == (1986, 33)
    assert np.array_equal(found, expected, equal_nan=True)


def test_scales_that_are_infinite_or_no_numbers_warn_nobody() -> None:
    data = random_tensor("Q4_K", (256, 4), 5, np.array([np.inf, -np.inf, np.nan], np.float16))
    with np.errstate(invalid="ignore"):
        expected = by_gguf("Q4_K", (256, 4), data)
    assert np.array_equal(blocks.dequantize("Q4_K", (256, 4), data), expected, equal_nan=True)
    assert not np.isfinite(expected).all()


@pytest.mark.parametrize(
    ("name", "shape", "size", "why"),
    [
        ("IQ4_XS", (256, 1), 136, "MLX has no tensors of type IQ4_XS"),
        ("Q4_0", (33, 1), 18, "rows of 33 values do not divide into blocks of Q4_0"),
        ("Q4_0", (32, 2), 18, r"a tensor of Q4_0 and shape \[32, 2\] has 36 bytes, not 18"),
        ("Q4_0", (32, 0), 0, "is not the shape of a tensor"),
        ("F32", (), 4, "is not the shape of a tensor"),
        ("F32", (1, 1, 1, 1, 1), 4, "is not the shape of a tensor"),
        ("F32", (1 << 60,), 4, "is not the shape of a tensor"),
    ],
)
def test_bytes_that_are_not_such_a_tensor_are_refused(
    name: str, shape: tuple[int, ...], size: int, why: str
) -> None:
    with pytest.raises(BackendFault, match=why) as found:
        blocks.dequantize(name, shape, np.zeros(size, np.uint8))
    assert found.value.kind == "refused"
