"""Repacked tensors against MLX itself: mx.dequantize gives the values that gguf-py gives.

MLX's results are asked for in float32, with scales of float32: see backends/mlx/repack.py.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.base import BackendFault, Weights
from backends.mlx import blocks, repack
from backends.mlx.repack import Dense, Packed
from tests.random_blocks import ODD_SCALES, by_gguf, random_tensor, shape_bytes

mx = pytest.importorskip("mlx.core", reason="the engine is not installed: pip install halka[mlx]")

EXACT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "MXFP4"]
ROUNDED = ["Q6_K", "Q3_K", "Q2_K"]
ORDINARY = np.array([0.01, -0.02], np.float16)


def by_mlx(packed: Packed) -> NDArray[np.float32]:
    """The values that MLX sees."""
    scales, biases = mx.array(packed.scales), None
    if packed.biases is not None:
        scales = scales.astype(mx.float32)
        biases = mx.array(packed.biases).astype(mx.float32)
    weight = mx.array(packed.weight)
    found = mx.dequantize(
        weight, scales, biases, packed.group, packed.bits, packed.mode, dtype=mx.float32
    )
    return np.array(found)


def packed_of(name: str, shape: Sequence[int], data: Any, weights: Weights = "auto") -> Packed:
    found = repack.repack(name, shape, data, weights)
    assert isinstance(found, Packed)
    return found


def dense_of(name: str, shape: Sequence[int], data: Any, weights: Weights = "auto") -> Dense:
    found = repack.repack(name, shape, data, weights)
    assert isinstance(found, Dense)
    return found


def nbytes(found: Dense | Packed) -> int:
    if isinstance(found, Dense):
        return found.values.nbytes
    biases = 0 if found.biases is None else found.biases.nbytes
    return found.weight.nbytes + found.scales.nbytes + biases


def error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Root of the mean square of the difference, as a share of the expected values'."""
    off = found - expected.astype(np.float64)
    return float(np.sqrt(np.square(off).mean() / np.square(expected, dtype=np.float64).mean()))


# Exact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_mlx_sees_the_weights_of_the_file(name: str) -> None:
    shape = (1024, blocks.SLAB_VALUES // 1024 + 1, 2)  # two slabs and a piece, every code
    data = random_tensor(name, shape, seed=1)
    assert np.array_equal(by_mlx(packed_of(name, shape, data)), by_gguf(name, shape, data))


@settings(deadline=None)  # the machine has other things to do
@given(
    st.sampled_from(EXACT),
    st.integers(1, 3),
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.integers(0, 1 << 32),
)
def test_it_does_so_for_any_shape(name: str, across: int, rows: list[int], seed: int) -> None:
    shape = (blocks.TYPES[name].values * across, *rows)
    data = random_tensor(name, shape, seed)
    packed = packed_of(name, shape, data)
    assert packed.weight.shape == (*reversed(rows), shape[0] * packed.bits // 32)
    assert packed.scales.shape == (*reversed(rows), shape[0] // 32)
    assert np.array_equal(by_mlx(packed), by_gguf(name, shape, data))


@pytest.mark.parametrize("name", EXACT)
def test_mlx_computes_with_these_weights(name: str) -> None:
    """Rows of experts among them, in float32, with scales of whatever type they are kept in."""
    shape = (256, 8, 3)
    data = random_tensor(name, shape, 4, ORDINARY)
    if name == "MXFP4":
        data.view(blocks.TYPES[name].block)["e"] = 120 + np.arange(192) % 8
    packed = packed_of(name, shape, data)
    x = np.random.default_rng(5).standard_normal((3, 2, 256)).astype(np.float32)
    arrays = [mx.array(a) for a in (packed.weight, packed.scales, packed.biases) if a is not None]
    form = {"group_size": packed.group, "bits": packed.bits, "mode": packed.mode}
    found = np.array(mx.quantized_matmul(mx.array(x), *arrays, transpose=True, **form))
    expected = x.astype(np.float64) @ by_gguf(name, shape, data).astype(np.float64).swapaxes(1, 2)
    assert found.dtype == np.float32
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_its_own_reader_makes_the_same_bytes(name: str, tmp_path: Path) -> None:
    data = random_tensor(name, (128, 16), 6, ORDINARY)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kind = gguf.GGMLQuantizationType[name]
    writer.add_tensor("a.weight", data.reshape(16, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = mx.load(str(tmp_path / "x.gguf"))
    packed = packed_of(name, (128, 16), data)
    for suffix, ours in (
        ("weight", packed.weight), ("scales", packed.scales), ("biases", packed.biases),
    ):  # fmt: skip
        array = np.array(theirs[f"a.{suffix}"])
        assert ours is not None
        assert array.dtype == ours.dtype
        assert array.tobytes() == ours.tobytes()


@pytest.mark.parametrize(
    ("name", "largest"), [("Q4_0", 8188.0), ("Q5_0", 4094.0), ("Q8_0", 511.75)]
)
def test_scales_are_float16_as_long_as_their_biases_are(name: str, largest: float) -> None:
    for scale, kept in ((largest, np.float16), (-2 * largest, np.float32)):
        data = random_tensor(name, (256, 4), 7, ORDINARY)
        data.view(blocks.TYPES[name].block)["d"][3] = scale
        packed = packed_of(name, (256, 4), data)
        assert packed.biases is not None
        assert packed.scales.dtype == packed.biases.dtype == kept
        assert np.array_equal(by_mlx(packed), by_gguf(name, (256, 4), data))


def test_products_of_scales_are_kept_in_float32() -> None:
    packed = packed_of("Q4_K", (256, 1), random_tensor("Q4_K", (256, 1), 8, ORDINARY))
    assert packed.scales.dtype == np.float32


@pytest.mark.parametrize(("name", "kept"), [("F32", "f4"), ("F16", "f2"), ("BF16", "u2")])
def test_plain_numbers_are_kept_as_they_are(name: str, kept: str) -> None:
    shape = (33, 5, 2)
    data = np.random.default_rng(9).integers(0, 256, shape_bytes(name, shape), dtype=np.uint8)
    dense = dense_of(name, shape, data, "exact")
    assert (dense.values.shape, dense.bf16) == ((2, 5, 33), name == "BF16")
    assert dense.values.dtype == np.dtype(kept)
    assert dense.values.tobytes() == data.tobytes()


def test_plain_numbers_at_an_odd_address_are_moved() -> None:
    data = np.arange(65, dtype=np.uint8)[1:]
    assert dense_of("F32", (16,), data).values.flags.aligned


# Rounded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights"),
    [("Q6_K", "auto"), ("Q3_K", "auto"), ("Q2_K", "auto"), ("Q3_K", "small"), ("Q2_K", "small")],
)
def test_groups_of_sixteen_become_the_nearest_float16(name: str, weights: Weights) -> None:
    shape = (512, 9, 2)
    data = random_tensor(name, shape, 10, ORDINARY)
    dense = dense_of(name, shape, data, weights)
    assert dense.values.dtype == np.float16
    assert np.array_equal(dense.values, by_gguf(name, shape, data).astype(np.float16))


@pytest.mark.parametrize("name", ROUNDED)
def test_weights_that_float16_cannot_hold_stay_float32(name: str) -> None:
    data = random_tensor(name, (256, 4), 11, ORDINARY)
    data.view(blocks.TYPES[name].block)["d"][2] = 30000.0
    dense = dense_of(name, (256, 4), data)
    assert np.array_equal(dense.values, by_gguf(name, (256, 4), data))


def q6_k(shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Weights as they are in models, quantised by the rule of quantize_row_q6_K_ref: a group's
    largest weight is code -32, a block's largest scale -128."""
    weights = np.random.default_rng(12).standard_normal(shape[::-1]).astype(np.float32) * 0.02
    groups = weights.reshape(-1, 16, 16)
    at = np.abs(groups).argmax(axis=2)[:, :, None]
    scales = np.take_along_axis(groups, at, axis=2)[:, :, 0] / -32
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)[:, 0]
    data = np.zeros(shape_bytes("Q6_K", shape), np.uint8)
    block = data.view(blocks.TYPES["Q6_K"].block)
    block["d"] = largest / -128
    factor = block["d"].astype(np.float32)[:, None]
    block["scales"] = np.clip(np.rint(scales / factor), -128, 127)
    steps = (block["scales"] * factor)[:, :, None]
    codes = (np.clip(np.rint(groups / steps), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    block["ql"] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    moved = high << np.array([0, 2, 4, 6], np.uint8)[:, None]
    block["qh"] = np.bitwise_or.reduce(moved, axis=2).reshape(-1, 64)
    assert error(by_gguf("Q6_K", shape, data), weights) < 0.02  # Q6_K's own
    return data


def test_six_bits_in_eight_are_near_and_one_half_of_each_group_is_nearer() -> None:
    shape = (1024, 64)
    data = q6_k(shape)
    expected = by_gguf("Q6_K", shape, data)
    packed = packed_of("Q6_K", shape, data, "small")
    assert (packed.bits, packed.group, packed.mode) == (8, 32, "affine")
    assert packed.scales.dtype == np.float16
    found = by_mlx(packed)
    assert error(found, expected) < 0.005
    steps = np.abs(packed.scales.astype(np.float32))
    off = np.abs(found - expected).reshape(*steps.shape, 2, 16)
    # Half a step, or a whole one for a -32 that becomes 128, and the step's rounding.
    assert (off <= 1.07 * steps[:, :, None, None]).all()
    assert (off <= 0.57 * steps[:, :, None, None]).mean() > 0.999
    assert (off.max(axis=3).min(axis=2) <= 128 * steps * 2.0**-11).all()  # the step's rounding
    assert error(dense_of("Q6_K", shape, data).values, expected) < 3e-4


@pytest.mark.parametrize(("largest", "kept"), [(3.0, np.float16), (500.0, np.float32)])
def test_six_bits_in_eight_survive_odd_scales(largest: float, kept: Any) -> None:
    shape = (512, 64)
    data = random_tensor("Q6_K", shape, 13, ODD_SCALES[np.abs(ODD_SCALES) <= largest])
    block = data.view(blocks.TYPES["Q6_K"].block)
    block["d"][5:9], block["scales"][5:9] = 6e-8, 1  # steps of zero in float16
    packed = packed_of("Q6_K", shape, data, "small")
    assert packed.scales.dtype == kept
    expected = by_gguf("Q6_K", shape, data)
    off = np.abs(by_mlx(packed) - expected).reshape(-1, 32)
    bound = np.abs(expected).reshape(-1, 32).max(axis=1) * 0.02 + 128 * 3e-8  # half of float16's
    assert (off <= bound[:, None]).all()  # smallest number, and 128 steps


# Sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(blocks.TYPES))
@pytest.mark.parametrize("weights", ["auto", "small"])
@pytest.mark.parametrize("shape", [(512, 6, 2), (512,)])
def test_the_memory_is_what_was_said(name: str, weights: Weights, shape: tuple[int, ...]) -> None:
    data = random_tensor(name, shape, 14, ORDINARY)
    found = repack.repack(name, shape, data, weights)
    assert nbytes(found) == repack.memory_bytes(name, shape, weights)


def test_a_vector_is_never_packed() -> None:
    data = random_tensor("Q8_0", (64,), 15)
    assert np.array_equal(dense_of("Q8_0", (64,), data).values, by_gguf("Q8_0", (64,), data))


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "MXFP4", "Q4_K", "Q5_K", "Q6_K"])
def test_a_large_tensor_takes_little_more_than_itself(name: str) -> None:
    shape = (4096, 2048)
    data = random_tensor(name, shape, 16, ORDINARY)
    tracemalloc.start()
    try:
        found = repack.repack(name, shape, data, "small")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - nbytes(found) < 6 << 20


# Refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "answer"),
    [
        ("F32", "exact", "exact"),
        ("BF16", "auto", "exact"),
        ("MXFP4", "exact", "exact"),
        ("Q5_K", "exact", "exact"),
        ("Q6_K", "auto", "approximate"),
        ("Q6_K", "small", "approximate"),
        ("Q2_K", "auto", "approximate"),
        ("Q6_K", "exact", "no"),
        ("IQ4_XS", "auto", "no"),
        ("NVFP4", "small", "no"),
        ("TQ1_0", "auto", "no"),
        ("I32", "auto", "no"),
    ],
)
def test_types_are_exact_or_near_or_not_at_all(name: str, weights: Weights, answer: str) -> None:
    assert repack.how(name, weights) == answer


@pytest.mark.parametrize(
    ("name", "weights", "why"),
    [
        ("IQ4_XS", "auto", "MLX has no tensors of type IQ4_XS"),
        ("Q6_K", "exact", 'weights = "exact"'),
    ],
)
def test_what_mlx_has_not_is_refused(name: str, weights: Weights, why: str) -> None:
    data = np.zeros(210, np.uint8)
    for ask in (
        lambda: repack.repack(name, (256, 1), data, weights),
        lambda: repack.memory_bytes(name, (256, 1), weights),
    ):
        with pytest.raises(BackendFault, match=why) as found:
            ask()
        assert found.value.kind == "refused"
