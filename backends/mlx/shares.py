"""Whether a model can be computed by an island, and what one rank of it then holds. Pure.

mlx_lm's own `Model.shard` splits each layer: the attention's and the feed-forward part's first
matrices by rows, their last ones by columns, whose results are then summed over the ranks. Norms,
routers, the embedding and the output head stay whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from backends.base import Header, Weights
from backends.mlx import archs, repack
from backends.mlx.sizes import sizes

RANKS_MAX = 8  # Macs that can have a cable to each other one: their Thunderbolt ports are 3 to 6
GROUP = 32  # values that share a scale: quantised rows are cut between groups only

# mlx_lm's modules of the table of architectures whose Model has shard(); a test looks.
SHARDED = frozenset({"llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss"})

_PLAIN = ("F32", "F16", "BF16")
_BY_ROWS = (
    "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps",
)  # fmt: skip
_BY_COLUMNS = ("attn_output", "ffn_down", "ffn_down_exps")
ROWS = {f"{name}.{kind}" for name in _BY_ROWS for kind in ("weight", "bias")}
COLUMNS = {f"{name}.weight" for name in _BY_COLUMNS}
SINKS = "attn_sinks.weight"  # one number a head


def shardable(header: Header, ranks: int) -> str:
    """Why an island of so many ranks cannot compute this model's layers, or "" where it can.

    From the header alone; whether MLX runs the model at all is `archs.refusal`'s to say.
    """
    row, of = archs.row(header), sizes(header)
    if not 2 <= ranks <= RANKS_MAX:
        return f"an island has 2 to {RANKS_MAX} peers, not {ranks}"
    if row is None or row.model not in SHARDED:
        return f"mlx_lm cannot share the layers of {header.architecture or 'this model'} out"
    for count, what in ((of.heads, "attention heads"), (of.kv_heads, "heads of keys and values")):
        if count < ranks or count % ranks:
            return f"its {count} {what} cannot be divided among {ranks} peers"
    for name, fact in header.tensors.items():
        tail = _tail(name)
        if not fact.shape:
            return f"its tensor {name[:64]} has no shape"
        if tail in COLUMNS:
            unit = ranks if fact.type in _PLAIN else ranks * GROUP
            if fact.shape[0] % unit:
                groups = "" if fact.type in _PLAIN else f" in groups of {GROUP}"
                return (
                    f"the {fact.shape[0]} columns of {name} ({fact.type}) cannot be divided among "
                    f"{ranks} peers{groups}"
                )
        elif tail in ROWS:
            rows = (
                fact.shape[1] if tail.endswith("weight") and len(fact.shape) > 1 else fact.shape[0]
            )
            if rows % ranks:
                return f"the {rows} rows of {name} cannot be divided among {ranks} peers"
    return ""


def ranks_of(header: Header) -> tuple[int, ...]:
    """How many peers an island for this model may have: `Ability.ranks`."""
    return tuple(ranks for ranks in range(2, RANKS_MAX + 1) if not shardable(header, ranks))


def share_bytes(header: Header, ranks: int, weights: Weights = "auto") -> tuple[int, ...]:
    """Bytes of each layer's weights in the memory of one of these ranks; 1: of the whole layer.

    The embedding and the head are whole on every rank: those are `Ability`'s.
    """
    layers = [0] * header.layers
    for name, fact in header.tensors.items():
        start, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if start == "blk" and number.isdecimal() and int(number) < len(layers):
            size = repack.memory_bytes(fact.type, fact.shape, weights)
            split = _tail(name) in ROWS | COLUMNS | {SINKS}
            layers[int(number)] += -(-size // ranks) if split else size
    return tuple(layers)


def share_kv_bytes(per_cell: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Of each layer's KV cache for one token, as `Engine.kv_bytes_per_cell`, on one rank."""
    return tuple(-(-size // ranks) for size in per_cell)


def _tail(name: str) -> str:
    """attn_q.weight of blk.7.attn_q.weight."""
    return name.split(".", 2)[2] if name.count(".") >= 2 else name
