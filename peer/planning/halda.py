"""The solver: which peers, in which ring, with which windows, GPU layers and rounds. Pure.

The paper's letters (arXiv:2504.08791, section 3.2) and what they are called here:

    m -> peer (an index)      M -> peers of a problem    L -> shape.layers
    k -> rounds               W -> width of a round      w_m -> last - first of a window
    n_m -> gpu_layers         T -> token_s (TPOT)        T_m^disk -> Part.waits_s
    alpha_m, beta_m -> Pace.decode_s of processor, GPU   xi_m -> hop_s, window_s
    kappa -> output_s         the sets M1 ... M4 -> Part.streamed_bytes, 0 or not

The paper alternates between guessing who streams and solving for that guess. Here what a window
costs its peer is looked up in a table, streaming and GPU layers decided, so that nothing has to be
guessed but T itself: for k > 1 it says how much streaming is hidden, and where a control group
throttles a peer it says how long its turn may be. With phi(T) the least sum of costs at T, which
falls with T, the best token time is the least T with phi(T) <= T: bisected for, each step an exact
search (`subsets`) or, for many peers, one that comes near (`ring_order`, started from `counts`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from peer.planning import baselines, counts, ring_order, subsets
from peer.planning.costs import UNREACHED_S, Floats, Problem
from peer.planning.plan import WINDOWS_MAX
from peer.planning.rings import PLAIN, Before, Lean, Prices, Ring, Wanted

__all__ = ["Ring", "Wanted", "searched", "solve"]

ROUNDS_MAX = 16  # that are tried unasked: hops grow with them, and what they hide does not
NEAR = 1e-4  # of a token's time: rings closer than that are not told apart
AS_FAST = 5e-4  # of the best TPOT: closer than that, TTFT decides
AS_FAST_MISSING = 1e-2  # closer than that, what has to be fetched decides
AS_BUSY = 1e-3  # of the best bottleneck: closer than that, TPOT decides
LEANINGS = (8.0, 1.0)  # of what is certain to stay within the slack
# The same after a loss. With the most, one layer of a hundred that is fetched outweighs the slack.
LEANINGS_BEFORE = (1024.0, 128.0, 32.0, 8.0, 2.0)
LEANINGS_MANY = (1024.0, 8.0)  # where there are too many peers for an exact search
TAILS = 8  # peers that are tried as the last where there are too many for an exact search
EXACT_WORK = 2e8  # additions of one search that is still exact: 12 peers of 80 layers, 70 ms


def solve(of: Problem, wanted: Wanted | None = None, *, streams: bool = True) -> Ring | None:
    """The best ring, None where nothing fits. The same input gives the same ring.

    latency: the least TPOT; among rings within AS_FAST of it the least TTFT; where `missing` is
    told, within AS_FAST_MISSING the fewest missing bytes, then TTFT. throughput: the least load of
    the busiest stage or link, then TPOT, in one round wherever that can be: with more of them only
    one step is in flight. before: within its worth the fewest missing bytes, its peers in
    their order, then TPOT. streams: whether windows may be read from the disk for each token.
    No two that do not reach each other are neighbours, unless there is no other ring (`broken`).
    """
    return searched(of, wanted, streams=streams)[0]


def searched(
    of: Problem,
    wanted: Wanted | None = None,
    *,
    streams: bool = True,
    work_max: float = EXACT_WORK,
) -> tuple[Ring | None, bool]:
    """(as `solve`, whether every search was exact). work_max: additions of one that may be."""
    wanted = wanted or Wanted()
    best: tuple[Ring, _Search] | None = None
    inexact = False
    for rounds in _rounds(of, wanted) if of.peers else ():
        many = wanted.objective == "throughput"
        if rounds > 1 and best and not wanted.rounds and (many or not _can_stream(of, streams)):
            break  # several rounds only hide streaming
        search = _Search(Prices(of, wanted, rounds, streams), wanted, work_max)
        found = search.best(best[0] if best and not best[0].broken else None)
        inexact = inexact or search.inexact
        if found is not None:
            best = found, search
    if best is None:
        return None, not inexact
    ring, search = best
    if wanted.before is None:
        ring = search.settled(ring)
    if inexact:
        ring = _with_rules(of, wanted, streams, ring)
    if wanted.before is not None:
        searches = [search]
        if wanted.before.rounds != ring.rounds and wanted.before.rounds in _rounds(of, wanted):
            prices = Prices(of, wanted, wanted.before.rounds, streams)
            searches.append(_Search(prices, wanted, work_max))
        kept = [other for each in searches if (other := each.like(wanted.before, ring))]
        ring = min(kept, key=lambda r: wanted.missing_bytes(r, of.shape.layers), default=ring)
    return ring, not inexact


def _with_rules(of: Problem, wanted: Wanted, streams: bool, ring: Ring) -> Ring:
    """The ring, or what a simple rule gives, if that is better and is what is wanted."""
    free = not wanted.everyone and not wanted.pinned and wanted.rounds in (0, 1)
    if wanted.objective == "throughput" or not free or not streams:
        return ring
    others = [rule(of) for rule in baselines.RULES]
    return min([ring, *(r for r in others if r)], key=lambda each: each.forecast.tpot_s)


def _rounds(of: Problem, wanted: Wanted) -> Iterator[int]:
    """To try, in this order."""
    layers = of.shape.layers
    if wanted.pinned:
        yield from (1,) if wanted.rounds in (0, 1) else ()
        return
    for rounds in (wanted.rounds,) if wanted.rounds else range(1, ROUNDS_MAX + 1):
        if layers % rounds == 0 and min(rounds * len(of.peers), layers) <= WINDOWS_MAX:
            yield rounds


def _can_stream(of: Problem, streams: bool) -> bool:
    return streams and any(able.disk_bytes_per_s for able in of.peers)


class _Search:
    """For one number of rounds."""

    def __init__(self, prices: Prices, wanted: Wanted, work_max: float) -> None:
        self._prices, self._wanted, self._work_max = prices, wanted, work_max
        self._order: tuple[int, ...] = ()  # of the last ring that was found
        self.inexact = False  # whether there were too many peers

    def best(self, known: Ring | None) -> Ring | None:
        """The best ring, None where none is better than the one of other rounds."""
        if self._wanted.objective == "latency":
            return self._fastest(PLAIN, known.forecast.tpot_s if known else math.inf)
        load_s = self._busiest()
        if load_s == math.inf or (known and load_s > known.forecast.load_s * (1 - AS_BUSY)):
            return None
        lean = Lean(load_s=load_s * (1 + AS_BUSY))
        ring = self._fastest(lean, math.inf)
        return (self._whole(load_s) or ring) if ring and _beyond(ring, lean) else ring

    def _whole(self, load_s: float) -> Ring | None:
        """The ring with the least bottleneck above load_s in which all neighbours reach each other,
        None where there is none: what the busiest stage takes says nothing of links."""
        best = self._fastest(PLAIN, math.inf)
        if best is None or best.broken:
            return None
        while best.forecast.load_s > load_s * (1 + AS_BUSY):
            lean = Lean(load_s=math.sqrt(load_s * best.forecast.load_s))
            ring = self._fastest(lean, math.inf)
            if ring is None or _beyond(ring, lean):
                load_s = lean.load_s
            else:
                best = ring
        return best

    def _busiest(self) -> float:
        """The least that the busiest stage of a ring takes."""
        stages, must = self._prices.stages(), self._prices.must
        try:
            return subsets.narrowest(stages, must, self._work_max)
        except subsets.TooMany:
            return ring_order.narrowest(stages, must, self._orders(stages))

    def _fastest(self, lean: Lean, upper_s: float) -> Ring | None:
        """The ring with the least TPOT, if that is below upper_s by NEAR.

        low_s, high_s: the least T with phi(T) <= T lies between. phi(T) <= T gives a ring that
        takes no longer; phi(T) is no more than the least T in any case.
        """
        low_s, high_s, best = 0.0, upper_s, None
        for _ in range(64):
            if high_s < math.inf and high_s <= low_s * (1 + 2 * NEAR):
                break
            halve = best is not None and best.throttled
            token_s = math.sqrt(low_s * high_s) if halve else high_s * (1 - NEAR)
            ring = self._ring(token_s, lean, token_s)
            if ring is None:
                if token_s == math.inf:
                    break
                low_s = max(low_s, token_s)
                continue
            best, high_s = ring[1], min(high_s, ring[1].forecast.tpot_s)
            low_s = max(low_s, ring[0] * (1 - NEAR))
        return best

    def _ring(
        self, token_s: float, lean: Lean, upper: float, more: tuple[Floats, Floats] | None = None
    ) -> tuple[float, Ring] | None:
        """(phi, its ring) at T = token_s, if phi is no more than `upper`. more: seconds besides,
        [peers, 1, 1] of a window and [peers, peers] of a hop."""
        prices = self._prices
        squares = prices.costs(token_s, lean), prices.hops(lean), prices.closing(lean)
        if more is not None:
            squares = squares[0] + more[0], squares[1] + more[1], squares[2]
        try:
            found = subsets.ring(*squares, prices.must, upper, self._work_max)
        except subsets.TooMany:
            self.inexact = True
            orders = self._orders(squares[0])
            found = ring_order.near(*squares, prices.must, orders, lambda: self._counted, upper)
        if found is None:
            return None
        self._order = tuple(peer for peer, _, _ in found[1])
        return found[0], prices.ring(found[1], token_s, lean)

    def _orders(self, costs: Floats) -> list[tuple[int, ...]]:
        """Of all peers, to start from: those that were good so far and, the fastest first, one for
        each of the best last ones, whose window costs more than its layers."""
        edges = costs.shape[1]
        lengths = np.maximum(1, np.arange(edges)[None, :] - np.arange(edges)[:, None])
        each = costs / lengths
        by_rate = [int(p) for p in np.argsort(each[:, :, :-1].min(axis=(1, 2)), kind="stable")]
        by_end = np.argsort(each[:, :, -1].min(axis=1), kind="stable")[:TAILS]
        begun = [self._order, self._wanted.order, (), *((int(tail),) for tail in by_end)]
        return [_completed(order, by_rate) for order in begun]

    @cached_property
    def _counted(self) -> tuple[int, ...]:
        """The peers that HiGHS would take."""
        return counts.order(self._prices.of, self._prices.rounds, self._prices.must)

    # Among equals

    def settled(self, best: Ring) -> Ring:
        """Of the rings that are as good, one that is better otherwise.

        Leaning by 1 adds no more to the best ring's costs than the slack, so that what is cheapest
        then is within it. Leaning more finds more, where that is within it as well.
        """
        throughput = self._wanted.objective == "throughput"
        load_s = best.forecast.load_s * (1 + AS_BUSY) if throughput else math.inf
        missing, tpot_s, ttft_s = self._missing(best), best.forecast.tpot_s, best.forecast.ttft_s
        slack = max(AS_FAST_MISSING, self._wanted.within) if missing else AS_FAST
        rank, self._order = (missing, ttft_s), best.order
        for factor in LEANINGS:
            lean = Lean(factor * slack * tpot_s / max(ttft_s, 1e-9), load_s=load_s)
            if missing:
                lean = Lean(lean.ttft / 1000, factor * slack * tpot_s / missing, load_s)
            limit_s = tpot_s * (1 + slack)
            upper = limit_s + lean.ttft * ttft_s + lean.missing * missing
            found = self._ring(limit_s, lean, upper)
            if found and found[1].forecast.tpot_s <= limit_s:
                other = found[1]
                return other if (self._missing(other), other.forecast.ttft_s) < rank else best
        return best

    def like(self, before: Before, best: Ring) -> Ring | None:
        """Of the rings that cost hardly more than the best one, that with the fewest missing bytes:
        with its peers in the order of `before`, where that can be, else in any. None where none
        has fewer or as few."""
        missing, tpot_s, worth = self._missing(best), best.forecast.tpot_s, before.worth
        limit_s, busiest_s = tpot_s * (1 + worth), best.forecast.load_s * (1 + worth)
        load_s = busiest_s if before.objective == "throughput" else math.inf
        even = AS_FAST_MISSING * tpot_s / max(missing, 1.0) ** 2  # no more than that, of all rings
        self._order = best.order
        leanings = LEANINGS_MANY if self.inexact else LEANINGS_BEFORE
        for more in (*_ordered(len(self._prices.of.peers), before.order), None):
            for factor in leanings:
                lean = Lean(0.0, factor * worth * tpot_s / max(missing, 1.0), load_s, even)
                upper = limit_s * (1 + AS_FAST_MISSING) + lean.missing * missing
                found = self._ring(limit_s, lean, upper, more)
                if not found or found[1].forecast.tpot_s > limit_s:
                    continue
                if self._missing(found[1]) > missing:
                    break  # and with less leaning more of them
                if more is None or _is_ordered(found[1].order, before.order):
                    return found[1]
        return None

    def _missing(self, ring: Ring) -> float:
        return self._wanted.missing_bytes(ring, self._prices.of.shape.layers)


def _beyond(ring: Ring, lean: Lean) -> bool:
    """Whether a link in it takes longer than is allowed, or joins two that are apart."""
    return ring.broken or ring.forecast.load_s > lean.load_s * (1 + NEAR)


def _ordered(peers: int, order: Sequence[int]) -> Iterator[tuple[Floats, Floats]]:
    """Seconds on windows and hops for which no ring goes against this order: first with all peers,
    where others may stand between two and hide that they do, then only with those of the order."""
    back, others = np.zeros((peers, peers)), np.full((peers, 1, 1), math.inf)
    for at, peer in enumerate(order):
        back[peer, list(order[:at])] = UNREACHED_S
    others[list(order)] = 0.0
    yield np.zeros((peers, 1, 1)), back
    if len(order) < peers:
        yield others, back


def _is_ordered(ring: Sequence[int], order: Sequence[int]) -> bool:
    """Whether the peers of a ring that are in the order, too, are in it as there."""
    places = [order.index(peer) for peer in ring if peer in order]
    return places == sorted(places)


def _completed(order: Sequence[int], others: Sequence[int]) -> tuple[int, ...]:
    """With the others before its last peer."""
    rest = [peer for peer in others if peer not in order]
    return (*order[:-1], *rest, *order[-1:])
