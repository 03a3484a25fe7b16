"""What mlx_lm's classes are told of a model, and what they cannot be told. Pure, from the header.

For headers that archs.refusal does not refuse.
"""

from __future__ import annotations

import math
from typing import Any

from backends.base import Header
from backends.llama_cpp.rules import plain, sliding_layers
from backends.mlx import names
from backends.mlx.archs import present, row
from backends.mlx.rope import Rotation
from backends.mlx.sizes import decimal, scaling_of, sizes


def arguments(header: Header) -> dict[str, Any]:
    """mlx_lm's ModelArgs for a header that is not refused. Rotation is ours: see rotations."""
    found, of = row(header), sizes(header)
    assert found is not None
    return {
        "model_type": found.model,
        "hidden_size": of.hidden,
        "num_hidden_layers": header.layers,
        "intermediate_size": of.ffn,
        "num_attention_heads": of.heads,
        "num_key_value_heads": of.kv_heads,
        "head_dim": of.head,
        "rms_norm_eps": decimal(header, "attention.layer_norm_rms_epsilon", 0.0),
        "vocab_size": of.words,
        "max_position_embeddings": of.context,
        "rope_theta": decimal(header, "rope.freq_base", 10000.0),
        "tie_word_embeddings": names.OUTPUT not in header.tensors,
        **dict.fromkeys(present(header, found), True),
        **found.more(header, of),
    }


def windows(header: Header) -> tuple[int, ...]:
    """How far back each layer sees; 0 for all the way."""
    slides = sliding_layers(header) or [False] * header.layers
    default = getattr(row(header), "sliding_default", 0)
    size = plain(header, "attention.sliding_window") or default
    return tuple(int(size) if slid else 0 for slid in slides[: header.layers])


def rotations(header: Header) -> tuple[Rotation | None, ...]:
    """How each layer rotates; None where it does not."""
    found, of = row(header), sizes(header)
    assert found is not None
    scaling = scaling_of(header)
    original = decimal(header, "rope.scaling.original_context_length", 0.0)  # for yarn alone
    everywhere = Rotation(
        dims=int(plain(header, "rope.dimension_count") or of.head),
        base=decimal(header, "rope.freq_base", 10000.0),
        traditional=found.traditional,
        scaling=scaling,
        factor=decimal(header, "rope.scaling.factor", 1.0),
        original=int(original) if original >= 1 else of.context,
        beta_fast=decimal(header, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=decimal(header, "rope.scaling.yarn_beta_slow", 1.0),
        factors=names.ROPE_FREQS in header.tensors,
    )
    if found.unrotated:
        layers = range(1, header.layers + 1)
        return tuple(everywhere if layer % found.unrotated else None for layer in layers)
    if not found.sliding_base:
        return (everywhere,) * header.layers
    base = decimal(header, "rope.freq_base_swa", found.sliding_base)
    local = Rotation(everywhere.dims, base, found.traditional)
    return tuple(local if window else everywhere for window in windows(header))


def embedding_scale(header: Header) -> float:
    """What token embeddings are multiplied by."""
    found = row(header)
    if found and found.scales_embedding:
        return math.sqrt(sizes(header).hidden)
    return decimal(header, "embedding_scale", 0.0) or 1.0  # 0: as if it were not there


def logits_divisor(header: Header) -> float:
    """What the logits are divided by."""
    return decimal(header, "logit_scale", 0.0) or 1.0


def softcap(header: Header) -> float:
    """The bound of the logits, 0 where there is none."""
    found = row(header)
    if not found or not found.softcap:
        return 0.0
    return decimal(header, "final_logit_softcapping", found.softcap)
