"""A llama computed in float64 from a GGUF's very weights: what every engine's answer is near to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

import peer.models.gguf

Matrix = NDArray[np.float64]


def logits_of_llama(path: Path, ids: Sequence[int]) -> Matrix:
    """All logits [tokens, vocabulary] of a file of architecture llama with a tied embedding."""
    file = peer.models.gguf.read(path)  # gguf-py's reader takes seconds for a vocabulary
    tensors = {tensor.name: tensor for tensor in file.tensors}
    data = np.memmap(path, np.uint8, "r")

    def weights(name: str) -> Matrix:
        info = tensors[name]
        rows = data[info.offset : info.offset + info.size].reshape(*info.shape[:0:-1], -1)
        kind = gguf.GGMLQuantizationType[info.type]
        return gguf.quants.dequantize(rows, kind).astype(np.float64)

    def said(key: str) -> Any:
        return file.metadata[f"llama.{key}"].value

    heads, kv_heads = said("attention.head_count"), said("attention.head_count_kv")
    epsilon = said("attention.layer_norm_rms_epsilon")
    embedding = weights("token_embd.weight")
    x = embedding[list(ids)]
    turns = _turns(len(ids), x.shape[1] // heads, said("rope.freq_base"))
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(said("block_count")):
        at = f"blk.{layer}"
        h = _normed(x, weights(f"{at}.attn_norm.weight"), epsilon)
        q, k, v = (
            (h @ weights(f"{at}.attn_{part}.weight").T).reshape(len(ids), count, -1)
            for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = _turned(q, turns), _turned(k, turns).repeat(heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]) + future
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        seen = np.einsum("hqk,khd->qhd", scores, v.repeat(heads // kv_heads, axis=1))
        x = x + seen.reshape(len(ids), -1) @ weights(f"{at}.attn_output.weight").T
        h = _normed(x, weights(f"{at}.ffn_norm.weight"), epsilon)
        gate, up = h @ weights(f"{at}.ffn_gate.weight").T, h @ weights(f"{at}.ffn_up.weight").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights(f"{at}.ffn_down.weight").T
    return _normed(x, weights("output_norm.weight"), epsilon) @ embedding.T


def _normed(x: Matrix, weight: Matrix, epsilon: float) -> Matrix:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight


def _turns(tokens: int, size: int, base: float) -> NDArray[np.complex128]:
    angles = np.arange(tokens)[:, None] / base ** (np.arange(0, size, 2) / size)
    return np.exp(1j * angles)


def _turned(x: Matrix, turns: NDArray[np.complex128]) -> Matrix:
    """Pairs lie side by side in files of this architecture."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turns[:, None, :]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)
