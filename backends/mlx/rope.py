"""Rotary positions from what the GGUF says, in place of each mlx_lm attention's own `rope`.

A step has rows of several slots, so positions come from the step, not from a cache's offset; and
the frequencies are worked out as llama.cpp does (linear and yarn scaling, `rope_freqs.weight`),
for every architecture alike. `traditional` is ggml's ROPE_TYPE_NORM: pairs lie side by side, and
the rows of Q and K stay in the order that the file has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rotation:
    """How one kind of layer rotates. dims: of a head's values, the first so many.

    scaling: none | linear | yarn, by `factor`; original, beta_fast, beta_slow: yarn's. factors:
    whether rope_freqs.weight divides the frequencies.
    """

    dims: int
    base: float
    traditional: bool = False
    scaling: str = "none"
    factor: float = 1.0
    original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    factors: bool = False

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied by (yarn's mscale)."""
        yarn = self.scaling == "yarn" and self.factor > 1
        return 1.0 + 0.1 * math.log(self.factor) if yarn else 1.0


def wavelengths(
    rotation: Rotation, factors: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Positions a radian, for each pair: a pair at position p is turned by p / wavelength.

    As ggml_rope_ext computes them, in float64. factors: rope_freqs.weight, [dims / 2].
    """
    pairs = np.arange(0, rotation.dims, 2, dtype=np.float64)
    plain = rotation.base ** (pairs / rotation.dims)
    if factors is not None:
        plain = plain * factors.astype(np.float64)
    if rotation.scaling == "none":
        return plain.astype(np.float32)
    if rotation.scaling == "linear":
        return (plain * rotation.factor).astype(np.float32)
    low, high = _corrected(rotation)
    ramp = np.clip((pairs / 2 - low) / max(0.001, high - low), 0.0, 1.0)
    # ramp 0: fast pairs turn as in training; 1: slow ones are stretched.
    turns = (ramp / rotation.factor + (1.0 - ramp)) / plain
    return (1.0 / turns).astype(np.float32)


def _corrected(rotation: Rotation) -> tuple[float, float]:
    """ggml_rope_yarn_corr_dims: the pairs between which yarn goes from one to the other."""

    def pair(turns: float) -> float:
        length = rotation.original / (turns * 2 * math.pi)
        return rotation.dims * math.log(length) / (2 * math.log(rotation.base))

    low, high = math.floor(pair(rotation.beta_fast)), math.ceil(pair(rotation.beta_slow))
    return max(0.0, low), min(rotation.dims - 1.0, high)


class Positions:
    """The positions of the step that runs, shared by all layers of a window."""

    def __init__(self, mx: Any) -> None:
        self._mx = mx
        self.first: int | None = 0  # of rows that are consecutive, else None
        self.each: Any = None  # int32 [rows], where they are not

    def set(self, positions: NDArray[np.int32]) -> None:
        """Begin a step."""
        if len(positions) == 1 or bool((np.diff(positions) == 1).all()):
            self.first, self.each = int(positions[0]), None
        else:
            self.first, self.each = None, self._mx.array(positions)


def unturned(x: Any, offset: Any = 0) -> Any:
    """The rope of a layer that knows no positions."""
    return x


class Rope:
    """What an attention calls as `self.rope(x, offset=…)`; x: [1, heads, rows, size]."""

    def __init__(
        self, mx: Any, rotation: Rotation, positions: Positions, factors: Any = None
    ) -> None:
        self._mx = mx
        self._rotation, self._positions = rotation, positions
        self._wavelengths = mx.array(wavelengths(rotation, factors))
        self._magnitude = rotation.magnitude

    def __call__(self, x: Any, offset: Any = 0) -> Any:
        """The offset is the cache's and means nothing here: rows lie in any cells."""
        dims = self._rotation.dims
        if self._magnitude != 1.0:
            part = x[..., :dims] * self._magnitude
            rest = x[..., dims:]
            x = part if rest.shape[-1] == 0 else self._mx.concatenate([part, rest], axis=-1)
        if self._positions.first is not None:
            return self._turned(x, self._positions.first)
        # One row each of a batch of rows: MLX takes an offset for each row of a batch.
        rows = self._turned(x.transpose(2, 1, 0, 3), self._positions.each)
        return rows.transpose(2, 1, 0, 3)

    def _turned(self, x: Any, offset: Any) -> Any:
        return self._mx.fast.rope(
            x,
            self._rotation.dims,
            traditional=self._rotation.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._wavelengths,
        )
