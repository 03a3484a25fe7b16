"""How much KV cache a token takes, layer by layer, from the header alone. An estimate for planning.

libllama keeps K and V in float16. What it keeps beyond them (the state of recurrent layers, the
keys of indexers) does not grow with tokens or is small; what a loaded window really takes is in its
Footprint.
"""

from __future__ import annotations

from backends.base import Header
from backends.llama_cpp.rules import number, per_layer, plain, recurrent_layers

_F16 = 2  # bytes


def kv_bytes_per_cell(header: Header) -> tuple[int, ...]:
    """Bytes of KV cache that one token takes, for each layer; 0 for recurrent layers."""
    heads = per_layer(header, "attention.head_count")
    kv_heads = per_layer(header, "attention.head_count_kv")
    if plain(header, "attention.head_count_kv") is None:
        kv_heads = heads
    recurrent = [*(recurrent_layers(header) or ()), *([False] * header.layers)]
    if header.architecture in ("mamba", "mamba2"):
        return (0,) * header.layers
    first = next((count for count in heads if count), 1)
    size = number(header, "embedding_length") // first
    key = number(header, "attention.key_length", size)
    value = number(header, "attention.value_length", size)
    indexer = number(header, "attention.indexer.key_length")
    if number(header, "attention.key_length_mla"):
        # MLA caches one compressed row (key_length); libllama may keep V beside it: count both.
        kv_heads = [1] * header.layers
    return tuple(
        0 if recurrent[layer] else (kv_heads[layer] * (key + value) + indexer) * _F16
        for layer in range(header.layers)
    )
