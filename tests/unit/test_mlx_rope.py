"""Rotary positions: frequencies as ggml works them out, and rows that follow nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.mlx.library import library
from backends.mlx.rope import Positions, Rope, Rotation, wavelengths

_FACTORS = np.array([1.0, 2.0, 4.0, 8.0], np.float32)


def ggml_angle(rotation: Rotation, position: int, pair: int, factor: float = 1.0) -> float:
    """rope_yarn of ggml-cpu/ops.cpp, for one pair."""
    slow = 1.0 if rotation.scaling == "none" else 1.0 / rotation.factor
    angle = position * rotation.base ** (-2.0 * pair / rotation.dims) / factor
    if rotation.scaling != "yarn":
        return slow * angle

    def corrected(turns: float) -> float:
        lengths = rotation.original / (turns * 2 * math.pi)
        return rotation.dims * math.log(lengths) / (2 * math.log(rotation.base))

    low = max(0.0, math.floor(corrected(rotation.beta_fast)))
    high = min(rotation.dims - 1.0, math.ceil(corrected(rotation.beta_slow)))
    mix = 1.0 - min(1.0, max(0.0, (pair - low) / max(0.001, high - low)))
    return slow * angle * (1.0 - mix) + angle * mix


@pytest.mark.parametrize(
    ("rotation", "factors"),
    [
        (Rotation(8, 10000.0), None),
        (Rotation(8, 500000.0, factors=True), _FACTORS),
        (Rotation(8, 10000.0, scaling="linear", factor=8.0), None),
        (Rotation(64, 10000.0, scaling="yarn", factor=4.0, original=4096), None),
        (Rotation(64, 150000.0, scaling="yarn", factor=32.0, original=4096), None),
        (Rotation(16, 10000.0, scaling="yarn", factor=4.0, original=64, beta_fast=8.0), None),
    ],
)
def test_pairs_turn_as_ggml_turns_them(
    rotation: Rotation, factors: NDArray[np.float32] | None
) -> None:
    found = wavelengths(rotation, factors)
    assert found.dtype == np.float32
    for pair, length in enumerate(found.tolist()):
        factor = 1.0 if factors is None else float(factors[pair])
        assert 100 / length == pytest.approx(ggml_angle(rotation, 100, pair, factor), rel=1e-6)


def test_only_yarn_makes_queries_and_keys_larger() -> None:
    assert Rotation(8, 1e4, scaling="yarn", factor=4.0, original=64).magnitude == pytest.approx(
        1 + 0.1 * math.log(4)
    )
    assert Rotation(8, 1e4, scaling="linear", factor=4.0).magnitude == 1.0
    assert Rotation(8, 1e4, scaling="yarn", factor=1.0, original=64).magnitude == 1.0


def turned(rotation: Rotation, x: NDArray[np.float32], positions: list[int]) -> NDArray[np.float32]:
    """What an attention gets. x: [heads, rows, size]."""
    mx = library().mx
    step = Positions(mx)
    step.set(np.array(positions, np.int32))
    return np.array(Rope(mx, rotation, step)(mx.array(x)[None], offset=77))[0]


@pytest.mark.parametrize("traditional", [True, False])
@pytest.mark.parametrize("positions", [[5], [5, 6, 7, 8], [5, 6, 0, 31], [8, 7, 6, 5], [3, 3, 3]])
@pytest.mark.parametrize("dims", [16, 12])
def test_each_row_is_turned_by_its_own_position(
    traditional: bool, positions: list[int], dims: int
) -> None:
    rotation = Rotation(dims, 10000.0, traditional, "yarn", 4.0, 64)
    x = np.random.default_rng(1).standard_normal((3, len(positions), 16)).astype(np.float32)
    given = turned(rotation, x, positions)
    first = x[..., 0:dims:2] if traditional else x[..., : dims // 2]
    second = x[..., 1:dims:2] if traditional else x[..., dims // 2 : dims]
    angles = np.array(
        [[ggml_angle(rotation, p, pair) for pair in range(dims // 2)] for p in positions]
    )
    pairs = (first + 1j * second) * np.exp(1j * angles) * rotation.magnitude
    expected = x.copy()
    if traditional:
        expected[..., 0:dims:2], expected[..., 1:dims:2] = pairs.real, pairs.imag
    else:
        expected[..., : dims // 2], expected[..., dims // 2 : dims] = pairs.real, pairs.imag
    np.testing.assert_allclose(given, expected, atol=2e-6)
