"""How much KV cache a token takes, layer by layer, from the header alone. An estimate for planning.

libllama keeps K and V in float16, or in 8 bits where asked. What it keeps beyond them (the state
of recurrent layers, the keys of indexers) does not grow with tokens or is small; what a loaded
window really takes is in its Footprint.
"""

from __future__ import annotations

from backends.base import Header
from backends.llama_cpp.rules import number, per_layer, plain, recurrent_layers

_BLOCK = 32  # elements of a block of q8_0, which must not cross a head's row
_BYTES = {"f16": (1, 2), "q8_0": (_BLOCK, 34)}  # elements of a block, its bytes


def kv_types(header: Header) -> tuple[str, ...]:
    """The types that the KV cache can have: q8_0 where every head's row is whole blocks."""
    key, value = _head_sizes(header)
    whole = key % _BLOCK == 0 and value % _BLOCK == 0
    return ("f16", "q8_0") if whole and not number(header, "attention.key_length_mla") else ("f16",)


def recurrent(header: Header) -> bool:
    """Whether any layer keeps a state instead of keys and values of each token."""
    return header.architecture in ("mamba", "mamba2") or any(recurrent_layers(header) or ())


def _head_sizes(header: Header) -> tuple[int, int]:
    """Elements of a head's key, and of its value."""
    heads = per_layer(header, "attention.head_count")
    first = next((count for count in heads if count), 1)
    size = number(header, "embedding_length") // first
    key = number(header, "attention.key_length", size)
    return key, number(header, "attention.value_length", size)


def kv_bytes_per_cell(header: Header, kv_type: str = "f16") -> tuple[int, ...]:
    """Bytes of KV cache that one token takes, for each layer; 0 for recurrent layers."""
    heads = per_layer(header, "attention.head_count")
    kv_heads = per_layer(header, "attention.head_count_kv")
    if plain(header, "attention.head_count_kv") is None:
        kv_heads = heads
    states = [*(recurrent_layers(header) or ()), *([False] * header.layers)]
    if header.architecture in ("mamba", "mamba2"):
        return (0,) * header.layers
    key, value = _head_sizes(header)
    elements, size_bytes = _BYTES[kv_type]
    indexer = number(header, "attention.indexer.key_length")
    if number(header, "attention.key_length_mla"):
        # MLA caches one compressed row (key_length); libllama may keep V beside it: count both.
        kv_heads = [1] * header.layers
    return tuple(
        0 if states[layer] else (kv_heads[layer] * (key + value) + indexer) * size_bytes // elements
        for layer in range(header.layers)
    )
