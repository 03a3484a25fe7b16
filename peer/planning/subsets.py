"""The cheapest chain of windows through all layers, each peer used at most once. Pure and exact.

A dynamic programme over (peers used, the last of them, layers done), as Held and Karp's for the
travelling salesman ("A dynamic programming approach to sequencing problems", 1962) with the layers
besides: 2^P P (edges)² / 2 additions, done as min-plus products for all sets of one size at once.
Before it, bounds that let peers be used again tell which windows cannot be part of anything better
than what is known already; peers without a window left are left out.

What it adds up are squares of costs, [edges, edges] for each peer: row where a window begins,
column where it ends. A closed chain costs besides what it takes from the last peer to the first.
That depends on both ends, and is split into a price of each end as far as it goes; what does not
go into it makes a bound, and only ends that the bound allows are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from peer.planning.costs import UNREACHED_S, Floats
from peer.planning.rings import Step

Singles = NDArray[np.float32]
Ints = NDArray[np.int64]

NEAR = 1e-4  # of a cost: closer than that is as good
_NARROW_PEERS = 10  # 5,120 steps, 80 ms
_AT_ONCE = 64  # sets: their sums stay in a core's cache


class Chains:
    """All chains of different peers. costs: [peers, edges, edges]; hops: [peers, peers], from row
    to column; start: [peers, edges] cost of all before a peer that begins there as the first."""

    def __init__(self, costs: Floats, hops: Floats, start: Floats) -> None:
        self._costs, self._hops, self._start = (x.astype(np.float32) for x in (costs, hops, start))
        peers, edges, _ = costs.shape
        # [sets, peers, edges]: the least cost of layers up to that edge, by that last peer
        self.least: Singles = np.full((1 << peers, peers, edges), np.inf, np.float32)
        for last in range(peers):
            begun = self._start[last][:, None] + self._costs[last]
            self.least[1 << last, last] = begun.min(axis=0)
        for sets in _by_size(peers):
            for last, before in enumerate(sets):
                self._extend(before, last)

    def _extend(self, before: Ints, last: int) -> None:
        """By one more peer. before: sets of one size without it."""
        arrived = (self.least[before] + self._hops[:, last][None, :, None]).min(axis=1)
        rows = np.flatnonzero(np.isfinite(arrived.min(axis=0)))
        if not len(rows):
            return
        here = slice(rows[0], rows[-1] + 1)
        square = self._costs[last][here]
        for at in range(0, len(before), _AT_ONCE):
            some = slice(at, at + _AT_ONCE)
            sums = arrived[some].T[here, :, None] + square[:, None, :]
            self.least[before[some] | 1 << last, last] = sums.min(axis=0)

    def path(self, used: int, last: int, end: int) -> list[Step]:
        """The windows of the cheapest chain of these peers that ends there."""
        steps = []
        while True:
            into = self._costs[last][:, end]
            before = used ^ 1 << last
            if not before:
                steps.append((last, int((self._start[last] + into).argmin()), end))
                return steps[::-1]
            sums = self.least[before] + self._hops[:, last][:, None] + into[None, :]
            previous, begin = np.unravel_index(int(sums.argmin()), sums.shape)
            steps.append((last, int(begin), end))
            used, last, end = before, int(previous), int(begin)


@lru_cache(maxsize=32)
def _by_size(peers: int) -> tuple[tuple[Ints, ...], ...]:
    """For each size from 1 on: for each peer, the sets of that size without it."""
    sets = np.arange(1, 1 << peers)
    sizes = sum(sets >> p & 1 for p in range(peers))
    return tuple(
        tuple(sets[(sizes == size) & (sets >> last & 1 == 0)] for last in range(peers))
        for size in range(1, peers)
    )


def work(peers: int, edges: int) -> float:
    """Additions that so many peers take."""
    return 0.5 * peers * 2.0**peers * edges**2


# Bounds ----------------------------------------------------------------------------------------


def trimmed(
    costs: Floats, hops: Floats, start: Floats, finish: Floats, upper: float
) -> tuple[Floats, Floats]:
    """(costs without the windows that no chain cheaper than `upper` has, [peers] a lower bound of
    all chains with that peer).

    start: as for Chains; finish: [peers, edges] of all after a peer that ends there as the last.
    The bounds let peers be used again and take every hop for the cheapest.
    """
    peers, edges, _ = costs.shape
    apart = hops + np.diag(np.full(peers, np.inf)) if peers > 1 else np.full((1, 1), np.inf)
    into, out = apart.min(axis=0), apart.min(axis=1)
    before, after = start.copy(), finish.copy()  # [peers, edges] of what lies there, with the hop
    by_end = np.ascontiguousarray(costs.transpose(2, 0, 1))
    for end in range(1, edges):
        least = (before[:, :end] + by_end[end, :, :end]).min()
        np.minimum(before[:, end], least + into, out=before[:, end])
    by_start = np.ascontiguousarray(costs.transpose(1, 0, 2))
    for begin in range(edges - 2, -1, -1):
        least = (after[:, begin + 1 :] + by_start[begin, :, begin + 1 :]).min()
        np.minimum(after[:, begin], least + out, out=after[:, begin])
    totals = before[:, :, None] + costs + after[:, None, :]
    return np.where(totals <= upper, costs, np.inf), totals.min(axis=(1, 2))


def end_prices(closing: Floats) -> tuple[Floats, Floats]:
    """(price of each peer as the first, as the last), of which no sum of two exceeds `closing`
    [from the last, to the first]. Where each peer has its own way to a switch, all are equal."""
    peers = len(closing)
    if peers < 2:
        return np.zeros(peers), np.zeros(peers)
    # Of links that are broken no more than of the others: in sums of single precision so high a
    # price would drown all else, and a lower one is still none that exceeds `closing`.
    closing = np.minimum(closing, closing[closing < UNREACHED_S].max())
    both = (closing + closing.T) / 2
    own = np.diag(np.full(peers, np.inf))
    first = np.zeros(peers)
    if peers > 2:
        apart = both + own  # of three peers, (a b) + (a c) - (b c) is twice a's own way
        ways = apart[:, :, None] + apart[:, None, :] - (both - own)[None]
        first = np.maximum(0.0, np.where(np.isfinite(ways), ways, np.inf).min(axis=(1, 2)) / 2)
    last = (closing - first[None, :] + own).min(axis=1)
    return (closing - last[:, None] + own).min(axis=0), last


# Rings -----------------------------------------------------------------------------------------


class TooMany(Exception):
    """There are more peers left than an exact answer may take."""


def ring(
    costs: Floats,
    hops: Floats,
    closing: Floats,
    must: Set[int] = frozenset(),
    upper: float = np.inf,
    work_max: float = np.inf,
) -> tuple[float, tuple[Step, ...]] | None:
    """(cost, windows) of the cheapest ring, if one costs no more than `upper`.

    closing: [peers, peers] from the last to the first. must: peers that it has. Within NEAR.
    Raises: TooMany, where it would take more than `work_max` additions.
    """
    edges = costs.shape[1]
    first, last = end_prices(closing)
    start = np.full(costs.shape[:2], np.inf)
    finish = start.copy()
    start[:, 0], finish[:, -1] = first, last
    best = _alone(costs, must, upper)
    if best:
        upper = min(upper, best[0])
    left, bounds = trimmed(costs, hops, start, finish, upper * (1 + NEAR))
    kept = np.flatnonzero(bounds <= upper * (1 + NEAR) if upper < np.inf else bounds < np.inf)
    if not must <= set(kept.tolist()) or len(kept) < 2:
        return best
    if work(len(kept), edges) > work_max:
        raise TooMany
    at = np.ix_(kept, kept)
    needed = sum(1 << i for i, peer in enumerate(kept) if peer in must)
    found = _closed(left[kept], hops[at], closing[at], start[kept], last[kept], needed, upper)
    if found is None:
        return best
    return found[0], tuple((int(kept[i]), a, b) for i, a, b in found[1])


def _alone(costs: Floats, must: Set[int], upper: float) -> tuple[float, tuple[Step, ...]] | None:
    """One peer with all layers."""
    end = costs.shape[1] - 1
    peers = [p for p in range(len(costs)) if must <= {p} and costs[p, 0, end] <= upper]
    if not peers:
        return None
    peer = min(peers, key=lambda p: float(costs[p, 0, end]))
    return (float(costs[peer, 0, end]), ((peer, 0, end),)) if costs[peer, 0, end] < np.inf else None


def _closed(
    costs: Floats, hops: Floats, closing: Floats, start: Floats, last: Floats,
    needed: int, upper: float,
) -> tuple[float, list[Step]] | None:  # fmt: skip
    """The cheapest ring of two peers or more, if it costs less than `upper`."""
    chains = Chains(costs, hops, start)
    edges = costs.shape[1]
    over = closing - start[:, 0][None, :] - last[:, None]  # [last, first], never negative
    ends = chains.least[:, :, -1] + (last + _least_over(over))
    ends[(np.arange(len(ends)) & needed) != needed] = np.inf
    best: tuple[float, list[Step]] | None = None
    bounds = ends.min(axis=0)
    for tail in np.argsort(bounds, kind="stable"):
        if not bounds[tail] < upper * (1 - NEAR / 2):
            break
        used = int(ends[:, tail].argmin())
        steps = chains.path(used, int(tail), edges - 1)
        cost = cost_of(costs, hops, closing, steps)
        if cost > bounds[tail] * (1 + NEAR):
            cost, steps = _of_tail(costs, hops, closing, int(tail), needed)
        if cost < upper:
            best, upper = (cost, steps), cost
    return best


def _least_over(over: Floats) -> Floats:
    """[sets, peers]: the least of over[last, first] over the other peers of the set."""
    peers = len(over)
    sets = np.arange(1 << peers)
    least = np.full((len(sets), peers), np.inf)
    for first in range(peers):
        inside = (sets >> first & 1 == 1)[:, None]
        others = np.where(np.arange(peers) == first, np.inf, over[:, first])[None, :]
        least = np.where(inside, np.minimum(least, others), least)
    return least


def _of_tail(
    costs: Floats, hops: Floats, closing: Floats, tail: int, needed: int
) -> tuple[float, list[Step]]:
    """The cheapest ring whose last window is this peer's."""
    peers, edges, _ = costs.shape
    others = [p for p in range(peers) if p != tail]
    at = np.ix_(others, others)
    start = np.full((len(others), edges), np.inf)
    start[:, 0] = closing[tail, others]
    chains = Chains(costs[others], hops[at], start)
    into = hops[others, tail][:, None] + costs[tail][:, -1][None, :]
    sums = chains.least + into[None]  # [sets, peers, edges]
    before = sum(1 << i for i, peer in enumerate(others) if needed >> peer & 1)
    sums[(np.arange(len(sums)) & before) != before] = np.inf
    used, last, begin = (int(x) for x in np.unravel_index(int(sums.argmin()), sums.shape))
    if not np.isfinite(sums[used, last, begin]):
        return np.inf, []
    steps = [(others[p], a, b) for p, a, b in chains.path(used, last, begin)]
    steps.append((tail, begin, edges - 1))
    return cost_of(costs, hops, closing, steps), steps


def cost_of(costs: Floats, hops: Floats, closing: Floats, steps: Sequence[Step]) -> float:
    """Of a ring of two or more."""
    peers = [peer for peer, _, _ in steps]
    windows = sum(float(costs[p, a, b]) for p, a, b in steps)
    along = sum(float(hops[a, b]) for a, b in pairwise(peers))
    return windows + along + float(closing[peers[-1], peers[0]])


# Bottlenecks -----------------------------------------------------------------------------------


def narrowest(stages: Floats, must: Set[int], work_max: float) -> float:
    """The least of what the busiest stage of a ring takes; inf where there is none. stages:
    [peers, edges, edges]. Raises: TooMany."""
    peers, edges, _ = stages.shape
    if work(peers, edges) > work_max or peers > _NARROW_PEERS:
        raise TooMany
    least = np.full((1 << peers, edges), np.inf)
    least[0, 0] = 0.0
    for used in range(1, 1 << peers):
        for last in range(peers):
            if used >> last & 1:
                before = least[used ^ 1 << last]
                most = np.maximum(before[:, None], stages[last]).min(axis=0)
                np.minimum(least[used], most, out=least[used])
    needed = sum(1 << p for p in must)
    ends = least[(np.arange(len(least)) & needed) == needed, -1]
    return float(ends.min())
