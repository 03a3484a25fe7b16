"""Shapes of well-known models by name, for planning with models that nobody has here: `70B:q4_k_m`.

The dimensions are those of each model's published configuration; the types of its tensors are what
`llama-quantize` chooses for such a file, so that the sum of the bytes is that of the real file
within one per cent. Pure arithmetic.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from peer.planning.profile import ModelShape

KV_VALUE_BYTES = 2  # F16
_HEAD_BYTES_PER_TOKEN = 60  # of the vocabulary's pieces, scores and merges in a header
_BLOCKS = {  # type → (values in a block, bytes of a block); ggml.h
    "F32": (1, 4), "F16": (1, 2), "Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
_QUANTS = {  # by the file's name: (most matrices, V and the half of FFN-down that weighs more)
    "q4_0": ("Q4_0", "Q4_0"),
    "q4_k_m": ("Q4_K", "Q6_K"),
    "q5_k_m": ("Q5_K", "Q6_K"),
    "q6_k": ("Q6_K", "Q6_K"),
    "q8_0": ("Q8_0", "Q8_0"),
    "f16": ("F16", "F16"),
}
QUANTS = tuple(_QUANTS)
_DEFAULT = "q4_k_m"


@dataclass(frozen=True, slots=True)
class Family:
    """A model's dimensions. kv: columns of K and of V; feed: of the feed-forward's middle."""

    name: str
    layers: int
    hidden: int
    kv: int
    feed: int
    vocabulary: int
    context: int
    tied: bool = False
    biases: bool = False  # of Q, K and V, as Qwen2 has them
    shared_v: bool = False  # quantised as the 70B is: 8 heads share one V, so it gets more bits


FAMILIES = {
    "1B": Family("llama-3.2-1b", 16, 2048, 512, 8192, 128256, 131072, tied=True),
    "3B": Family("llama-3.2-3b", 28, 3072, 1024, 8192, 128256, 131072, tied=True),
    "7B": Family("llama-2-7b", 32, 4096, 4096, 11008, 32000, 4096),
    "8B": Family("llama-3.1-8b", 32, 4096, 1024, 14336, 128256, 131072),
    "13B": Family("llama-2-13b", 40, 5120, 5120, 13824, 32000, 4096),
    "14B": Family("qwen2.5-14b", 48, 5120, 1024, 13824, 152064, 32768, biases=True),
    "30B": Family("llama-1-30b", 60, 6656, 6656, 17920, 32000, 2048),
    "32B": Family("qwen2.5-32b", 64, 5120, 1024, 27648, 152064, 32768, biases=True),
    "34B": Family("codellama-34b", 48, 8192, 1024, 22016, 32000, 16384),
    # These two are layers of the 70B, fewer of them: no such model has one configuration.
    "45B": Family("llama-3-45b", 50, 8192, 1024, 28672, 128256, 8192, shared_v=True),
    "60B": Family("llama-3-60b", 68, 8192, 1024, 28672, 128256, 8192, shared_v=True),
    "65B": Family("llama-1-65b", 80, 8192, 8192, 22016, 32000, 2048),
    "70B": Family("llama-3.3-70b", 80, 8192, 1024, 28672, 128256, 131072, shared_v=True),
    "405B": Family("llama-3.1-405b", 126, 16384, 1024, 53248, 128256, 131072),
}


def is_shape(text: str) -> bool:
    """Whether `text` looks like SIZE or SIZE:QUANT, known or not, and not like a file."""
    return re.fullmatch(r"[0-9]+[bB](:[A-Za-z0-9_]*)?", text) is not None


def shape(text: str) -> ModelShape:
    """The shape of `SIZE:QUANT`, such as 8B:q4_k_m; without QUANT, q4_k_m.

    Raises: ValueError, naming what exists.
    """
    size, _, quant = text.partition(":")
    size, quant = size.strip().upper(), quant.strip().lower() or _DEFAULT
    if size not in FAMILIES or quant not in _QUANTS:
        raise ValueError(
            f"there is no shape {text!r}: it is SIZE:QUANT of {', '.join(FAMILIES)} and "
            f"{', '.join(QUANTS)}, such as 8B:q4_k_m"
        )
    return _shape(FAMILIES[size], quant)


def _shape(family: Family, quant: str) -> ModelShape:
    n = family.layers
    model = f"{family.name}-{quant}"
    most = _QUANTS[quant][0]
    # llama-quantize gives the output matrix, or what stands for it, more bits than the others.
    last = "Q6_K" if quant in ("q4_0", "q4_k_m", "q5_k_m") else most
    rows = (family.hidden, family.vocabulary)
    heavy = tuple(_heavy(quant, i, n) for i in range(n))
    return ModelShape(
        model=model,
        digest=hashlib.sha256(f"halka shape {model}".encode()).hexdigest(),
        architecture="qwen2" if family.biases else "llama",
        layers=n,
        hidden=family.hidden,
        context=family.context,
        layer_bytes=tuple(_layer_bytes(family, quant, more) for more in heavy),
        layer_kv_bytes=(2 * KV_VALUE_BYTES * family.kv,) * n,
        head_bytes=_HEAD_BYTES_PER_TOKEN * family.vocabulary,
        embed_bytes=_matrix_bytes(last if family.tied else most, *rows),
        output_bytes=0 if family.tied else _matrix_bytes(last, *rows),
        tied=family.tied,
        cut_starts=tuple(range(n)),
        layer_kinds=tuple(int(more != heavy[0]) for more in heavy),
        vocabulary=family.vocabulary,
    )


def _heavy(quant: str, layer: int, layers: int) -> bool:
    """Whether a layer's V and FFN-down get more bits: the first and last eighth, and every third
    between (`use_more_bits` of llama-quant.cpp)."""
    if _QUANTS[quant][0] == _QUANTS[quant][1]:
        return False
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _layer_bytes(family: Family, quant: str, heavy: bool) -> int:
    most, more = _QUANTS[quant]
    down = more if heavy else most
    value = "Q5_K" if down == "Q4_K" and family.shared_v else down
    hidden, feed = family.hidden, family.feed
    matrices = 2 * _matrix_bytes(most, hidden, hidden)  # Q and the attention's output
    matrices += _matrix_bytes(most, hidden, family.kv) + _matrix_bytes(value, hidden, family.kv)
    matrices += 2 * _matrix_bytes(most, hidden, feed) + _matrix_bytes(down, feed, hidden)
    norms = 2 * hidden + (hidden + 2 * family.kv) * family.biases
    return matrices + _matrix_bytes("F32", norms, 1)


def _matrix_bytes(type_name: str, columns: int, rows: int) -> int:
    values, size = _BLOCKS[type_name]
    return columns // values * size * rows
