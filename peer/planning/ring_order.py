"""A cheap chain of windows where there are too many peers for an exact answer. Pure.

Along one order of peers the best windows are found exactly, with any of them left out (`along`). A
ring is made better a stretch at a time: some peers that follow one another are taken out, and the
exact search of `subsets` says which of them and of those outside belong there, in which order and
with which windows, while all windows before and after are moved along. Bounds tell which outsiders
can help at all; when there are few, no better ring with the same rest exists. It ends when no
stretch can be made better, or after so many rounds of that: never by the clock.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import pairwise

import numpy as np

from peer.planning.costs import Floats
from peer.planning.rings import Step
from peer.planning.subsets import Chains, cost_of, end_prices, trimmed, work

STRETCH = 4  # peers taken out at once
PASSES = 3  # over all stretches of a ring
STRETCH_WORK = 1.7e7  # additions for one stretch: 8 peers in a round of 126 layers
BETTER = 1e-5  # of the cost: less is not worth another look

Found = tuple[float, list[Step]]


def along(
    costs: Floats, hops: Floats, closing: Floats, order: Sequence[int], must: Set[int]
) -> Found | None:
    """(cost, windows) of a good ring of some of these peers in this order; those of `must` are in
    it. Best but for what `closing` costs, which is known to be best for one head and tail only."""
    first, last = end_prices(closing)
    start = np.full(costs.shape[:2], np.inf)
    finish = start.copy()
    start[:, 0], finish[:, -1] = first, last
    if not must <= set(order):
        return None
    least, begins = _passed(costs, hops, start, order, must)
    needed = max((i for i, peer in enumerate(order) if peer in must), default=0)
    ends = least[:, -1] + last[list(order)]
    ends[:needed] = np.inf
    alone = [costs[p, 0, -1] if must <= {p} else np.inf for p in order]
    single, at = int(np.argmin(alone)), int(ends.argmin())
    cost, steps, edge = np.inf, [], costs.shape[1] - 1
    if ends[at] < np.inf:
        while at >= 0:
            before, begin = (int(x) for x in begins[at, edge])
            steps.append((order[at], begin, edge))
            at, edge = before, begin
        steps.reverse()
        cost = cost_of(costs, hops, closing, steps)
    if alone[single] <= cost:
        cost, steps = float(alone[single]), [(order[single], 0, costs.shape[1] - 1)]
    return (cost, steps) if cost < np.inf else None


def _passed(
    costs: Floats, hops: Floats, start: Floats, order: Sequence[int], must: Set[int]
) -> tuple[Floats, np.ndarray]:
    """([places, edges] the least cost up to an edge with the peer at that place as the last,
    [places, edges, 2] the place before, -1 for none, and where the window begins)."""
    edges, fence = costs.shape[1], 0
    least = np.full((len(order), edges), np.inf)
    begins = np.full((len(order), edges, 2), -1, np.int64)
    for place, peer in enumerate(order):
        arrived = start[peer].copy() if not fence else np.full(edges, np.inf)
        came = np.full(edges, -1)
        since = max(0, fence - 1)
        if place > since:
            ways = least[since:place] + hops[list(order[since:place]), peer][:, None]
            before = ways.argmin(axis=0)
            shortest = ways[before, np.arange(edges)]
            came = np.where(shortest < arrived, before + since, came)
            arrived = np.minimum(arrived, shortest)
        sums = arrived[:, None] + costs[peer]
        begins[place, :, 1] = sums.argmin(axis=0)
        least[place] = sums.min(axis=0)
        begins[place, :, 0] = came[begins[place, :, 1]]
        if peer in must:
            fence = place + 1
    return least, begins


def improved(costs: Floats, hops: Floats, closing: Floats, found: Found, must: Set[int]) -> Found:
    """The ring, made better a stretch at a time."""
    for _ in range(PASSES):
        before, at = found[0], 0
        while at < len(found[1]):
            better = _stretched(costs, hops, closing, found, must, at)
            if better and better[0] < found[0] * (1 - BETTER):
                found = better
            at += max(1, STRETCH // 2)
        if found[0] > before * (1 - BETTER):
            break
    return found


def _stretched(
    costs: Floats, hops: Floats, closing: Floats, found: Found, must: Set[int], at: int
) -> Found | None:
    """With another stretch from that place on."""
    peers, edges, _ = costs.shape
    used = [peer for peer, _, _ in found[1]]
    head, taken, tail = used[:at], used[at : at + STRETCH], used[at + STRETCH :]
    inside = [*taken, *(p for p in range(peers) if p not in used)]
    start, finish = np.full((peers, edges), np.inf), np.full((peers, edges), np.inf)
    first, last = end_prices(closing)
    if head:
        start[:] = _fixed(costs, hops, head)[None, :] + hops[head[-1]][:, None]
    else:
        start[:, 0] = closing[tail[-1]] if tail else first
    if tail:
        turned = costs.transpose(0, 2, 1)[:, ::-1, ::-1]
        rest = _fixed(turned, hops.T, tail[::-1])[::-1]
        finish[:] = rest[None, :] + hops[:, tail[0]][:, None]
        ends = closing[tail[-1], head[0]] if head else 0.0
    else:
        finish[:, -1] = closing[:, head[0]] if head else last
        ends = 0.0
    at_all = np.ix_(inside, inside)
    left, slack = trimmed(
        costs[inside], hops[at_all], start[inside], finish[inside], found[0] - ends
    )
    kept = _kept(slack, [inside.index(p) for p in taken], found[0] - ends, edges)
    chosen = [inside[i] for i in kept]
    if not chosen or not must & set(taken) <= set(chosen):
        return None
    chains = Chains(left[kept], hops[np.ix_(chosen, chosen)], start[chosen])
    totals = chains.least + finish[chosen][None]
    needed = sum(1 << i for i, peer in enumerate(chosen) if peer in must)
    totals[(np.arange(len(totals)) & needed) != needed] = np.inf
    sets, last_one, end = (int(x) for x in np.unravel_index(int(totals.argmin()), totals.shape))
    if not np.isfinite(totals[sets, last_one, end]):
        return None
    middle = [chosen[p] for p, _, _ in chains.path(sets, last_one, end)]
    return _exactly(costs, hops, closing, [*head, *middle, *tail])


def _kept(slack: Floats, taken: list[int], upper: float, edges: int) -> list[int]:
    """The peers that may be in the stretch: those taken out of it, and the most promising ones."""
    order = [int(i) for i in np.argsort(slack, kind="stable") if slack[i] <= upper]
    kept = [i for i in taken if slack[i] <= upper]
    for i in order:
        if i not in kept and work(len(kept) + 1, edges) <= STRETCH_WORK:
            kept.append(i)
    return sorted(kept)


def _fixed(costs: Floats, hops: Floats, order: Sequence[int]) -> Floats:
    """[edges] the least cost of these peers, all of them in this order, up to each edge."""
    least: Floats = costs[order[0], 0].copy()
    for before, peer in pairwise(order):
        least = ((least + hops[before, peer])[:, None] + costs[peer]).min(axis=0)
    return least


def _exactly(costs: Floats, hops: Floats, closing: Floats, order: Sequence[int]) -> Found | None:
    """The best windows of these peers, all of them in this order."""
    if len(order) == 1:
        return float(costs[order[0], 0, -1]), [(order[0], 0, costs.shape[1] - 1)]
    start = np.full(costs.shape[:2], np.inf)
    start[:, 0] = 0.0
    least, begins = _passed(costs, hops, start, order, set(order))
    if not np.isfinite(least[-1, -1]):
        return None
    steps: list[Step] = []
    edge = costs.shape[1] - 1
    for at in reversed(range(len(order))):
        begin = int(begins[at, edge, 1])
        steps.append((order[at], begin, edge))
        edge = begin
    steps.reverse()
    return cost_of(costs, hops, closing, steps), steps


def near(
    costs: Floats,
    hops: Floats,
    closing: Floats,
    must: Set[int],
    orders: Sequence[Sequence[int]],
    upper: float,
) -> tuple[float, tuple[Step, ...]] | None:
    """(cost, windows) of a ring that comes near the cheapest, if one costs no more than `upper`.

    orders: to start from; of each, the best ring is found, and the best of them is improved.
    """
    begun = [found for order in orders if (found := along(costs, hops, closing, order, must))]
    if not begun:
        return None
    cost, steps = improved(costs, hops, closing, min(begun, key=lambda found: found[0]), must)
    return (cost, tuple(steps)) if cost <= upper else None
