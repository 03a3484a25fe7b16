"""The sizes that a header states, bounded before anything is made of them. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from backends.base import Header
from backends.llama_cpp.rules import LAYERS_MAX, plain

_HIDDEN_MAX = 1 << 17
_FFN_MAX = 1 << 19
_HEADS_MAX = 1 << 10
_HEAD_MAX = 1 << 10
_WORDS_MAX = 1 << 20
_EXPERTS_MAX = 1 << 10
_CONTEXT_MAX = 1 << 31


@dataclass(frozen=True, slots=True)
class Sizes:
    """hidden: of a token's activation. head, value: of a head's key and value. ffn: of the whole
    feed-forward part, expert: of one expert's. words: of the vocabulary."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    value: int
    words: int
    context: int
    experts: int
    experts_used: int
    expert: int


def sizes(header: Header) -> Sizes:
    """Of a header without odd ones; 0 for what is not a natural number."""
    hidden, heads = _natural(header, "embedding_length"), _natural(header, "attention.head_count")
    whole = hidden // heads if heads else 0
    shape = header.tensors["token_embd.weight"].shape if _embeds(header) else ()
    ffn = _natural(header, "feed_forward_length")
    used = _natural(header, "expert_used_count")
    return Sizes(
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=_natural(header, "attention.head_count_kv", heads),
        head=_natural(header, "attention.key_length", whole),
        value=_natural(header, "attention.value_length", whole),
        words=shape[1] if len(shape) == 2 else 0,
        context=_natural(header, "context_length"),
        experts=_natural(header, "expert_count"),
        experts_used=used,
        expert=_natural(header, "expert_feed_forward_length", ffn // used if used else ffn),
    )


def odd_sizes(header: Header, *, experts: bool) -> str:
    """What no model of these architectures has, in words, or ""."""
    of = sizes(header)
    bounds: dict[str, tuple[int, int]] = {
        "block_count": (header.layers, LAYERS_MAX),
        "embedding_length": (of.hidden, _HIDDEN_MAX),
        "attention.head_count": (of.heads, _HEADS_MAX),
        "attention.head_count_kv": (of.kv_heads, _HEADS_MAX),
        "attention.key_length": (of.head, _HEAD_MAX),
        "attention.value_length": (of.value, _HEAD_MAX),
        "context_length": (of.context, _CONTEXT_MAX),
    }
    bounds |= (
        {
            "expert_count": (of.experts, _EXPERTS_MAX),
            "expert_used_count": (of.experts_used, of.experts),
            "expert_feed_forward_length": (of.expert, _FFN_MAX),
        }
        if experts
        else {"feed_forward_length": (of.ffn, _FFN_MAX)}
    )
    for key, (value, most) in bounds.items():
        if not 1 <= value <= most:
            said = str(plain(header, key))[:40]
            whole = f"{header.architecture}.{key}"
            return f"its header says {whole} = {said}: that is not one number from 1 to {most}"
    if not 1 <= of.words <= _WORDS_MAX:
        return "its token embedding is not a matrix of one row for each word"
    if of.heads % of.kv_heads:
        return f"its {of.heads} heads cannot share {of.kv_heads} heads of keys and values"
    epsilon = decimal(header, "attention.layer_norm_rms_epsilon", -1.0)
    if not 0.0 < epsilon < 1.0:
        return "its header has no attention.layer_norm_rms_epsilon that makes sense"
    return ""


def decimal(header: Header, key: str, default: float) -> float:
    """`<arch>.<key>`; the default where it is missing, NaN where it is not one finite number."""
    value: Any = plain(header, key)
    if value is None:
        return default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and abs(value) < 1e30 else math.nan


def scaling_of(header: Header) -> str:
    """none | linear | yarn | longrope | …, as llama.cpp reads it: a bare factor is linear."""
    scaling = plain(header, "rope.scaling.type")
    if scaling is None:
        scaling = "linear"
    factor = decimal(header, "rope.scaling.factor", 1.0)
    return "none" if scaling == "linear" and factor in (0.0, 1.0) else str(scaling)


def _natural(header: Header, key: str, default: int = 0) -> int:
    """`<arch>.<key>`; the default where it is missing, 0 where it is not one natural number."""
    value = plain(header, key)
    if value is None:
        return default
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _embeds(header: Header) -> bool:
    return "token_embd.weight" in header.tensors
