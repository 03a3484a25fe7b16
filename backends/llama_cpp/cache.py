"""How much KV cache a token takes, layer by layer, from the header alone. An estimate for planning.

libllama keeps K and V in float16, or in 8 bits where asked, and the keys of indexers with them. The
state of recurrent layers does not grow with tokens and is not counted; what a loaded window really
takes is in its Footprint.
"""

from __future__ import annotations

from backends.base import Header
from backends.llama_cpp.rules import (
    number,
    per_layer,
    plain,
    recurrent_layers,
    sliding_layers,
)

# Every layer keeps a state: instead of keys and values (mamba), or beside them.
_STATES = frozenset({"falcon-h1", "mamba", "mamba2"})
_BLOCK = 32  # elements of a block of q8_0, which must not cross a head's row
_BYTES = {"f16": (1, 2), "q8_0": (_BLOCK, 34)}  # elements of a block, its bytes


# Architectures that choose what to attend to by keys of their own, one head a layer.
_INDEXED = frozenset({"deepseek32", "dots3note", "glm-dsa", "minimax-m3"})
# libllama turns flash attention off for them, and 8 bits need it.
_NO_FLASH = frozenset({"grok"})


def kv_types(header: Header) -> tuple[str, ...]:
    """The types that the KV cache can have: q8_0 where every head's row is whole blocks."""
    rows = {size for sliding in (False, True) for size in _head_sizes(header, sliding)}
    rows.add(_indexer_size(header))
    whole = all(size % _BLOCK == 0 for size in rows)
    return ("f16", "q8_0") if whole and header.architecture not in _NO_FLASH else ("f16",)


def recurrent(header: Header) -> bool:
    """Whether any layer keeps a state instead of keys and values of each token."""
    return header.architecture in _STATES or any(recurrent_layers(header) or ())


def kv_bytes_per_cell(header: Header, kv_type: str = "f16") -> tuple[int, ...]:
    """Bytes of KV cache that one token takes, for each layer; 0 for recurrent layers."""
    if header.architecture in ("mamba", "mamba2"):
        return (0,) * header.layers
    kv_heads = per_layer(header, "attention.head_count_kv")
    if plain(header, "attention.head_count_kv") is None:
        kv_heads = per_layer(header, "attention.head_count")
    if _is_mla(header):  # one row for all heads
        kv_heads = [1] * header.layers
    sliding = _filled(sliding_layers(header), header.layers)
    states = _filled(recurrent_layers(header), header.layers)
    elements, size_bytes = _BYTES[kv_type]
    return tuple(
        0
        if states[layer]
        else (kv_heads[layer] * sum(_head_sizes(header, sliding[layer])) + _indexer(header, layer))
        * size_bytes
        // elements
        for layer in range(header.layers)
    )


def _filled(flags: list[bool] | None, layers: int) -> list[bool]:
    return [*(flags or ()), *([False] * layers)]


def _is_mla(header: Header) -> bool:
    """Whether K and V are worked out from one compressed row: only that is kept."""
    return bool(number(header, "attention.key_length_mla"))


def _head_sizes(header: Header, sliding: bool) -> tuple[int, int]:
    """Elements of a head's key, and of its value; 0 where it is not kept."""
    heads = per_layer(header, "attention.head_count")
    first = next((count for count in heads if count), 1)
    size = number(header, "embedding_length") // first
    key = number(header, "attention.key_length", size)
    value = number(header, "attention.value_length", size)
    if sliding:
        key = number(header, "attention.key_length_swa", key)
        value = number(header, "attention.value_length_swa", value)
    return key, 0 if _is_mla(header) else value


def _indexer_size(header: Header) -> int:
    indexed = header.architecture in _INDEXED
    return number(header, "attention.indexer.key_length") if indexed else 0


def _indexer(header: Header, layer: int) -> int:
    """Elements that the layer's indexer keeps; libllama gives it room for values that it lacks."""
    key = _indexer_size(header)
    if header.architecture == "minimax-m3":
        dense = layer < number(header, "leading_dense_block_count")
        return 0 if dense else key + _head_sizes(header, False)[1]
    if plain(header, "attention.indexer.types") is not None:
        return key * bool(per_layer(header, "attention.indexer.types")[layer])
    return key
