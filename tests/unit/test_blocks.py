"""Blocks dequantised for proofs: bit for bit what gguf-py gives, and random ones of sane size."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from peer.models import blocks

KINDS = sorted(blocks.known())


@pytest.mark.parametrize("kind", KINDS)
def test_random_blocks_dequantise_as_gguf_py_does(kind: str) -> None:
    data = blocks.random_data(kind, 256 * 64, 0.06, np.random.default_rng(7))
    found = blocks.dequantize(kind, data)
    wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(-1)
    if kind in ("F32", "F16"):
        wanted = data.view("<f4" if kind == "F32" else "<f2").astype(np.float32)
    assert found.dtype == np.float32
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_as_large_as_asked_for(kind: str) -> None:
    data = blocks.random_data(kind, 256 * 256, 0.06, np.random.default_rng(3))
    values = blocks.dequantize(kind, data)
    assert 0.03 < values.std() < 0.12
    assert abs(values.mean()) < 0.02
    assert np.isfinite(values).all()


def test_scales_of_both_signs_and_offsets_of_their_own_are_among_them() -> None:
    data = blocks.random_data("Q4_1", 256 * 64, 0.06, np.random.default_rng(3)).reshape(-1, 20)
    scales = data[:, :2].copy().view("<f2").astype(np.float32)
    offsets = data[:, 2:4].copy().view("<f2").astype(np.float32)
    assert (scales < 0).any()
    assert (scales > 0).any()
    assert np.unique(np.round(offsets / scales, 2)).size > 50
