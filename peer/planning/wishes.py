"""What people and circumstances want of a split, beyond that it is the best. Pure: values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peer.planning.plan import Flash, KvType, Speculation, Split

Objective = Literal["latency", "throughput"]


@dataclass(frozen=True, slots=True)
class Wishes:
    """All by peer id. context: tokens, 0: the model's, at most CONTEXT_DEFAULT.

    spread_all: no peer is left out that can be given a layer, at the cost of context where need
    be. objective: the least time of a token of one answer, or of many answers at once. order: an
    earlier ring. held: parts that peers have already. without, only: who may not take part.
    pinned: a peer's window [first, last), fixed. rounds: 0: as many as are best. before: a split
    that lost peers, of which as much as can be stays. unheard: of a peer, how many that could ask
    it something do not reach it: not to be the head, if others can be. kv_type: of the KV cache,
    where the model can have it. flash, speculation: for the stages, unchanged.
    """

    context: int = 0
    spread_all: bool = False
    objective: Objective = "latency"
    order: tuple[str, ...] = ()
    held: Mapping[str, frozenset[str]] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    pinned: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rounds: int = 0
    before: Split | None = None
    unheard: Mapping[str, int] = field(default_factory=dict)
    kv_type: KvType = "f16"
    flash: Flash = "auto"
    speculation: Speculation = "auto"
