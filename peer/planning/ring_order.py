"""A cheap chain of windows where there are too many peers for an exact answer. Pure.

Along one order of peers the best windows are found exactly, with any of them left out (`along`). A
ring is made better a stretch at a time: some peers that follow one another are taken out, and the
exact search of `subsets` says which of them and of those outside belong there, in which order and
with which windows, while all windows before and after are moved along. Bounds tell which outsiders
can help at all; when there are few, no better ring with the same rest exists. It ends when no
stretch can be made better, or after so many rounds of that: never by the clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import combinations, pairwise, product

import numpy as np

from peer.planning.costs import Floats
from peer.planning.rings import Step
from peer.planning.subsets import Chains, cost_of, end_prices, ring, trimmed, work

STRETCH = 4  # peers taken out at once, at least
OUTSIDERS = 3  # that can take their places
PASSES = 3  # over all stretches of a ring
STRETCH_WORK = 8e6  # additions for one stretch: 7 peers in a round of 126 layers
WHOLE_WORK = 2e7  # additions for all of a small ring: 8 peers in a round of 126 layers
FAR = 0.2  # of the cost: further away, a ring is not improved enough
TURNS = 2  # of an improved ring, so that another peer is the last one
SHUFFLES = 200  # orders that are tried where none of those given fits
STARTS = 2  # that are put in order before the best of them is improved
REORDERINGS = 20  # of a ring, one after another
BETTER = 1e-5  # of the cost: less is not worth another look

Found = tuple[float, list[Step]]


class _Along:
    """The least costs along one order of peers. must: peers that may not be left out."""

    def __init__(
        self, costs: Floats, hops: Floats, start: Floats, order: Sequence[int], must: Set[int]
    ) -> None:
        self._costs, self._hops, self._start = costs, hops, start
        self._order = list(order)
        # [places, edges]: up to an edge, with the peer at that place as the last. arrived: before
        # its own window. since: the places from which one may come to it, -1 for the start.
        self.least = np.full((len(order), costs.shape[1]), np.inf)
        self._arrived = self.least.copy()
        self._since: list[int] = []
        fence = -1
        for place, peer in enumerate(self._order):
            self._since.append(fence)
            self._arrived[place] = self._ways(place, slice(None)).min(axis=0)
            self.least[place] = (self._arrived[place][:, None] + costs[peer]).min(axis=0)
            if peer in must:
                fence = place
        self.fence = max(0, fence)

    def _ways(self, place: int, edges: int | slice) -> Floats:
        """[ways, ...] to arrive there: from the start, where nobody is passed who must be in it,
        and from the places before."""
        peer, since = self._order[place], self._since[place]
        first = max(0, since)
        come = self.least[first:place, edges]
        onward = self._hops[self._order[first:place], peer]
        come = come + (onward[:, None] if come.ndim > 1 else onward)
        begun = (
            self._start[peer, edges]
            if since < 0
            else np.full_like(self._start[peer, edges], np.inf)
        )
        ways: Floats = np.concatenate([np.asarray(begun)[None], come])
        return ways

    def path(self, place: int, edge: int) -> list[Step]:
        """The windows of the cheapest chain that ends there."""
        steps: list[Step] = []
        while place >= 0:
            peer = self._order[place]
            begin = int((self._arrived[place] + self._costs[peer][:, edge]).argmin())
            steps.append((peer, begin, edge))
            way = int(self._ways(place, begin).argmin())
            place, edge = (way - 1 + max(0, self._since[place]) if way else -1), begin
        return steps[::-1]


def along(
    costs: Floats, hops: Floats, closing: Floats, order: Sequence[int], must: Set[int]
) -> Found | None:
    """(cost, windows) of a good ring of some of these peers in this order; those of `must` are in
    it. Best but for what `closing` costs, which is known to be best for one head and tail only."""
    if not must <= set(order):
        return None
    first, last = end_prices(closing)
    start = np.full(costs.shape[:2], np.inf)
    start[:, 0] = first
    passed = _Along(costs, hops, start, order, must)
    ends = passed.least[:, -1] + last[list(order)]
    ends[: passed.fence] = np.inf
    alone = [costs[p, 0, -1] if must <= {p} else np.inf for p in order]
    single, at = int(np.argmin(alone)), int(ends.argmin())
    cost, steps = np.inf, []
    if ends[at] < np.inf:
        steps = passed.path(at, costs.shape[1] - 1)
        cost = cost_of(costs, hops, closing, steps)
    if alone[single] <= cost:
        cost, steps = float(alone[single]), [(order[single], 0, costs.shape[1] - 1)]
    return (cost, steps) if cost < np.inf else None


def narrowest(stages: Floats, must: Set[int], orders: Sequence[Sequence[int]]) -> float:
    """The least of what the busiest stage of a ring along one of these orders takes."""
    best = np.inf
    for order in orders:
        least = np.full(stages.shape[1], np.inf)
        least[0] = 0.0
        for peer in order:
            with_it = np.maximum(least[:, None], stages[peer]).min(axis=0)
            least = with_it if peer in must else np.minimum(least, with_it)
        best = min(best, float(least[-1]))
    return best


def improved(costs: Floats, hops: Floats, closing: Floats, found: Found, must: Set[int]) -> Found:
    """The ring, made better a stretch at a time."""
    for _ in range(PASSES):
        before, at = found[0], 0
        while at < len(found[1]):
            length = _length(len(costs) - len(found[1]), costs.shape[1])
            better = _stretched(costs, hops, closing, found, must, slice(at, at + length))
            if better and better[0] < found[0] * (1 - BETTER):
                found = better
            at += length // 2
        if found[0] > before * (1 - BETTER):
            break
    return found


def _length(outside: int, edges: int) -> int:
    """Of a stretch: as many peers as leave room for some from outside."""
    most = STRETCH
    while work(most + 1, edges) <= STRETCH_WORK and most < 9:
        most += 1
    return max(STRETCH, most - min(OUTSIDERS, outside))


def _stretched(
    costs: Floats, hops: Floats, closing: Floats, found: Found, must: Set[int], here: slice
) -> Found | None:
    """With another stretch in these places."""
    peers, edges, _ = costs.shape
    used = [peer for peer, _, _ in found[1]]
    head, taken, tail = used[: here.start], used[here], used[here.stop :]
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
    kept = _kept(slack, [inside.index(p) for p in taken], found[0] - ends, edges, STRETCH_WORK)
    chosen = [inside[i] for i in kept]
    if not chosen or not must & set(taken) <= set(chosen):
        return None
    near = np.flatnonzero(np.isfinite(left[kept]).any(axis=0).any(axis=0))
    span = slice(np.flatnonzero(np.isfinite(left[kept]).any(axis=(0, 2)))[0], near[-1] + 1)
    chains = Chains(left[kept][:, span, span], hops[np.ix_(chosen, chosen)], start[chosen, span])
    totals = chains.least + finish[chosen, span][None]
    needed = sum(1 << i for i, peer in enumerate(chosen) if peer in must)
    totals[(np.arange(len(totals)) & needed) != needed] = np.inf
    sets, last_one, end = (int(x) for x in np.unravel_index(int(totals.argmin()), totals.shape))
    if not np.isfinite(totals[sets, last_one, end]):
        return None
    middle = [chosen[p] for p, _, _ in chains.path(sets, last_one, end)]
    return _exactly(costs, hops, closing, [*head, *middle, *tail])


def _kept(slack: Floats, taken: list[int], upper: float, edges: int, work_max: float) -> list[int]:
    """The peers that may be in the stretch: those taken out of it, and the most promising ones."""
    order = [int(i) for i in np.argsort(slack, kind="stable") if slack[i] <= upper]
    kept = [i for i in taken if slack[i] <= upper]
    for i in order:
        if i not in kept and work(len(kept) + 1, edges) <= work_max:
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
    start = np.full(costs.shape[:2], np.inf)
    start[:, 0] = 0.0
    passed = _Along(costs, hops, start, order, set(order))
    if not np.isfinite(passed.least[-1, -1]):
        return None
    steps = passed.path(len(order) - 1, costs.shape[1] - 1)
    return cost_of(costs, hops, closing, steps), steps


def _reordered(costs: Floats, hops: Floats, closing: Floats, found: Found) -> Found:
    """With the same peers along shorter ways: a part of the order is turned round or put elsewhere,
    as long as that makes the hops cheaper. The last peer stays, which has more than layers."""
    order = [peer for peer, _, _ in found[1]]
    best = _hops_s(hops, closing, order)
    for _ in range(REORDERINGS):
        tried = min(_moved(order), key=lambda each: _hops_s(hops, closing, each), default=order)
        if not (cost := _hops_s(hops, closing, tried)) < best - BETTER * found[0]:
            break
        order, best = tried, cost
        better = _exactly(costs, hops, closing, order)
        if better and better[0] < found[0]:
            found = better
    return found


def _turned(costs: Floats, hops: Floats, closing: Floats, found: Found) -> Found:
    """With another of its peers as the last one: the ring turned, or that peer put there."""
    order = [peer for peer, _, _ in found[1]]
    tries = [found]
    for at in range(len(order) - 1):
        for tried in (
            [*order[at + 1 :], *order[: at + 1]],
            [*order[:at], *order[at + 1 :], order[at]],
            [*order[:at], order[-1], *order[at + 1 : -1], order[at]],
        ):
            if other := _exactly(costs, hops, closing, tried):
                tries.append(other)
    return min(tries, key=lambda each: each[0])


def _moved(order: list[int]) -> Iterator[list[int]]:
    """All orders but one part turned round, or one peer put elsewhere; the last stays."""
    *rest, tail = order
    for first, end in combinations(range(len(rest) + 1), 2):
        if end - first > 1:
            yield [*rest[:first], *rest[first:end][::-1], *rest[end:], tail]
    for at, to in product(range(len(rest)), repeat=2):
        if abs(at - to) > 1:
            others = [*rest[:at], *rest[at + 1 :]]
            yield [*others[:to], rest[at], *others[to:], tail]


def _hops_s(hops: Floats, closing: Floats, order: Sequence[int]) -> float:
    return float(hops[order[:-1], order[1:]].sum() + closing[order[-1], order[0]])


def near(
    costs: Floats,
    hops: Floats,
    closing: Floats,
    must: Set[int],
    orders: Sequence[Sequence[int]],
    counted: Callable[[], Sequence[int]],
    upper: float,
) -> tuple[float, tuple[Step, ...]] | None:
    """(cost, windows) of a ring that comes near the cheapest, if one costs no more than `upper`.

    orders: to start from; of each, the best ring is found, and the best of them is improved.
    counted: gives one more, asked only where `upper` is not far away.
    """
    begun = [found for order in orders if (found := along(costs, hops, closing, order, must))]
    if min((found[0] for found in begun), default=0.0) > upper * (1 + FAR):
        return None
    if (order := counted()) and (found := along(costs, hops, closing, order, must)):
        begun.append(found)
    if not begun:  # what must be in it fits in few orders only
        draw, shuffled = random.Random(0), list(range(len(costs)))
        for _ in range(SHUFFLES):
            draw.shuffle(shuffled)
            if found := along(costs, hops, closing, shuffled, must):
                begun.append(found)
                break
    if not begun:
        return None
    tails: dict[int, Found] = {}
    for found in sorted(begun, key=lambda found: found[0]):
        tails.setdefault(found[1][-1][0], found)
    starts = [_reordered(costs, hops, closing, found) for found in [*tails.values()][:STARTS]]
    tries = [improved(costs, hops, closing, begun, must) for begun in starts]
    found = min(tries, key=lambda found: found[0])
    for _ in range(TURNS):
        turned = _reordered(costs, hops, closing, _turned(costs, hops, closing, found))
        if not turned[0] < found[0] * (1 - BETTER):
            break
        found = improved(costs, hops, closing, turned, must)
    cost, steps = _whole(costs, hops, closing, found, must)
    return (cost, tuple(steps)) if cost <= upper else None


def _whole(costs: Floats, hops: Floats, closing: Floats, found: Found, must: Set[int]) -> Found:
    """A small ring made best, of its own peers and the most promising others."""
    peers, edges, _ = costs.shape
    first, last = end_prices(closing)
    start = np.full((peers, edges), np.inf)
    finish = start.copy()
    start[:, 0], finish[:, -1] = first, last
    _, slack = trimmed(costs, hops, start, finish, found[0])
    own = [peer for peer, _, _ in found[1]]
    chosen = _kept(slack, own, found[0], edges, WHOLE_WORK)
    if not set(own) <= set(chosen) or work(len(chosen), edges) > WHOLE_WORK:
        return found
    at = np.ix_(chosen, chosen)
    needed = {i for i, peer in enumerate(chosen) if peer in must}
    better = ring(costs[chosen], hops[at], closing[at], needed, found[0])
    if better is None or len(needed) < len(must) or better[0] >= found[0]:
        return found
    return better[0], [(chosen[i], a, b) for i, a, b in better[1]]
