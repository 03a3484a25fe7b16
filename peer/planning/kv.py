"""Of which type the KV cache is, and how much it takes then. Pure.

A block of q8_0 is 32 values in 34 bytes, where f16 takes 64. All arithmetic of the planner is about
a shape whose `layer_kv_bytes` are of the type that is used: `sized` gives it.
"""

from __future__ import annotations

from msgspec.structs import replace

from peer.planning.plan import Flash, KvType
from peer.planning.profile import ModelShape

_BYTES = {"f16": 64, "q8_0": 34}  # of 32 values


def sized(shape: ModelShape, kv_type: str) -> ModelShape:
    """The shape with a KV cache of this type."""
    if kv_type == "f16":
        return shape
    cells = tuple(size * _BYTES[kv_type] // _BYTES["f16"] for size in shape.layer_kv_bytes)
    return replace(shape, layer_kv_bytes=cells)


def plain(layer_kv_bytes: tuple[int, ...], kv_type: str) -> tuple[int, ...]:
    """What a cache of this type would take as one of f16."""
    if kv_type == "f16":
        return layer_kv_bytes
    return tuple(-(-size * _BYTES["f16"] // _BYTES[kv_type]) for size in layer_kv_bytes)


def possible(shape: ModelShape, wanted: KvType, flash: Flash) -> tuple[KvType, str]:
    """(the type that the cache gets, why it is not the one that is wanted)."""
    if wanted == "f16":
        return wanted, ""
    if wanted not in shape.kv_types:
        return "f16", f"the KV cache is f16, as {shape.model} cannot have one of {wanted}"
    if flash == "off":
        why = f"the KV cache is f16: {wanted} needs flash attention, which the setting `flash` "
        return "f16", why + "turns off"
    return wanted, ""
