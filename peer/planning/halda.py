"""The solver (being written): for now the best split of one order of peers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from peer.planning import costs
from peer.planning.costs import Part, Problem
from peer.planning.plan import Forecast
from peer.planning.tables import Tables


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    objective: Literal["latency", "throughput"] = "latency"
    everyone: bool = False
    rounds: int = 0
    pinned: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    missing: NDArray[np.float64] | None = None
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ring:
    order: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    rounds: int
    gpu_layers: tuple[int, ...]
    parts: tuple[Part, ...]
    forecast: Forecast


def solve(of: Problem, wanted: Wanted | None = None, *, streams: bool = True) -> Ring | None:
    wanted = wanted or Wanted()
    tables, n = Tables(of, 1), of.shape.layers
    best = np.full(n + 1, np.inf)
    best[0] = 0
    steps = []
    most = wanted.objective == "throughput"
    for table in tables.peers:
        each = table.stage_s if most else table.token_s(1e9) + 1e-4
        total = np.maximum(best[:, None], each) if most else best[:, None] + each
        if not wanted.everyone:
            np.fill_diagonal(total, best)
        steps.append(total.argmin(axis=0))
        best = total.min(axis=0)
    if not np.isfinite(best[n]):
        return None
    rows, b = [], n
    for at in reversed(range(len(of.peers))):
        a = int(steps[at][b])
        if a < b:
            rows.append((at, (a, b)))
        b = a
    rows.reverse()
    order = tuple(at for at, _ in rows)
    edges = tuple(edge for _, edge in rows)
    layers = tuple(int(tables.peers[at].gpu_layers[e]) for at, e in rows)
    parts = [costs.part(of, of.peers[at], [e], g) for (at, e), g in zip(rows, layers, strict=True)]
    assert all(parts)
    known = tuple(p for p in parts if p)
    return Ring(order, edges, 1, layers, known, costs.evaluate(of, order, 1, known))
