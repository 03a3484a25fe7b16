"""Splits that a simple rule gives, to compare the solver's with: what planners do that measure
nothing, or do not search. Pure. One round; each peer's GPU has as many of its layers as it holds,
where it is the faster one; costs are those of `costs`, as for any other split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peer.planning.costs import Able, Floats, Problem
from peer.planning.rings import Ring, made
from peer.planning.tables import Table, Tables

_LEFT_OUT = 1e6  # squared layers: a peer that could have some is not left without


def memory_proportional(of: Problem) -> Ring | None:
    """Layers in proportion to memory (exo's rule, and prima.cpp's without its scheduler)."""
    return _nearest(of, range(len(of.peers)), [float(able.memory_bytes) for able in of.peers])


def compute_proportional(of: Problem) -> Ring | None:
    """Layers in proportion to speed, as far as memory goes."""
    return _nearest(of, range(len(of.peers)), [1 / max(1e-9, _layer_s(able)) for able in of.peers])


def smallest_set(of: Problem) -> Ring | None:
    """The fewest peers that hold all of the model, those with most memory first; where even all of
    them do not, all of them."""
    memories = [float(able.memory_bytes) for able in of.peers]
    largest = sorted(range(len(of.peers)), key=lambda peer: -memories[peer])
    for streams in (False, True):
        for count in range(1, len(largest) + 1):
            chosen = largest[:count]
            found = _nearest(of, chosen, [memories[peer] for peer in chosen], streams)
            if found:
                return found
    return None


def _layer_s(able: Able) -> float:
    paces = [able.cpu, *([able.gpu] if able.gpu else [])]
    return min(float(pace.decode_s.mean()) for pace in paces)


def _nearest(
    of: Problem, order: Sequence[int], weights: Sequence[float], streams: bool = True
) -> Ring | None:
    """The windows that lie nearest to shares in proportion to the weights, peers in this order:
    without streaming where that is possible."""
    tables = Tables(of, 1)
    shares = of.shape.layers * np.array(weights) / max(1e-9, sum(weights))
    for resident in (True, False) if streams else (True,):
        steps = _chosen([tables.peers[peer] for peer in order], shares, resident)
        if steps:
            real = [(order[at], a, b) for at, a, b in steps]
            return made(of, real, 1, [int(tables.peers[p].gpu_layers[a, b]) for p, a, b in real])
    return None


def _chosen(tables: Sequence[Table], shares: Floats, resident: bool) -> list[tuple[int, int, int]]:
    """Least squares, peers that fit nowhere left out; [] where nothing fits."""
    edges = tables[0].fits.shape[0]
    lengths = np.arange(edges)[None, :] - np.arange(edges)[:, None]
    least = np.full(edges, np.inf)
    least[0] = 0.0
    begins = []
    for table, share in zip(tables, shares, strict=True):
        fits = table.fits & (table.read_s == 0) if resident else table.fits
        sums = least[:, None] + np.where(fits, (lengths - share) ** 2, np.inf)
        sums[np.arange(edges), np.arange(edges)] = least + share**2 + _LEFT_OUT * (share >= 1)
        begins.append(sums.argmin(axis=0))
        least = sums.min(axis=0)
    if not np.isfinite(least[-1]):
        return []
    steps, end = [], edges - 1
    for at in reversed(range(len(tables))):
        begin = int(begins[at][end])
        if begin < end:
            steps.append((at, begin, end))
        end = begin
    return steps[::-1]


RULES = (memory_proportional, compute_proportional, smallest_set)
