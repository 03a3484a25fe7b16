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
from collections.abc import Iterator

import numpy as np

from peer.planning import ring_order, subsets
from peer.planning.costs import Floats, Problem
from peer.planning.plan import WINDOWS_MAX
from peer.planning.rings import PLAIN, Lean, Prices, Ring, Wanted

__all__ = ["Ring", "Wanted", "solve"]

ROUNDS_MAX = 16  # that are tried unasked: hops grow with them, and what they hide does not
NEAR = 1e-4  # of a token's time: rings closer than that are not told apart
AS_FAST = 5e-4  # of the best TPOT: closer than that, TTFT decides
AS_FAST_MISSING = 1e-2  # closer than that, what has to be fetched decides
AS_BUSY = 1e-3  # of the best bottleneck: closer than that, TPOT decides
EXACT_WORK = 6e7  # additions of one search that is still exact: 25 ms here


def solve(of: Problem, wanted: Wanted | None = None, *, streams: bool = True) -> Ring | None:
    """The best ring, None where nothing fits. The same input gives the same ring.

    latency: the least TPOT; among rings within AS_FAST of it the least TTFT; where `missing` is
    told, within AS_FAST_MISSING the fewest missing bytes, then TTFT. throughput: the least time of
    the busiest stage, then TPOT. streams: whether windows may be read from the disk for each token.
    """
    return _solved(of, wanted or Wanted(), streams, EXACT_WORK)


def _solved(of: Problem, wanted: Wanted, streams: bool, work_max: float) -> Ring | None:
    best: tuple[Ring, Prices] | None = None
    for rounds in _rounds(of, wanted, streams):
        if rounds > 1 and best and not wanted.rounds and not _can_stream(of, streams):
            break  # several rounds only hide streaming
        prices = Prices(of, wanted, rounds, streams)
        search = _Search(prices, wanted, work_max)
        found = search.best(best[0] if best else None)
        if found is not None:
            best = found, prices
    if best is None:
        return None
    return _Search(best[1], wanted, work_max).settled(best[0])


def _rounds(of: Problem, wanted: Wanted, streams: bool) -> Iterator[int]:
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

    def best(self, known: Ring | None) -> Ring | None:
        """The best ring, None where none is better than the one of other rounds."""
        if self._wanted.objective == "latency":
            return self._fastest(PLAIN, known.forecast.tpot_s if known else math.inf)
        stage_s = subsets.narrowest(self._prices.stages(), self._prices.must, self._work_max)
        if stage_s == math.inf or (known and stage_s > known.forecast.stage_s * (1 - AS_BUSY)):
            return None
        return self._fastest(Lean(stage_s=stage_s * (1 + AS_BUSY)), math.inf)

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

    def _ring(self, token_s: float, lean: Lean, upper: float) -> tuple[float, Ring] | None:
        """(phi, its ring) at T = token_s, if phi is no more than `upper`."""
        prices = self._prices
        squares = prices.costs(token_s, lean), prices.hops(lean), prices.closing(lean)
        try:
            found = subsets.ring(*squares, prices.must, upper, self._work_max)
        except subsets.TooMany:
            found = ring_order.near(*squares, prices.must, self._orders(squares[0]), upper)
        if found is None:
            return None
        self._order = tuple(peer for peer, _, _ in found[1])
        return found[0], prices.ring(found[1], token_s, lean)

    def _orders(self, costs: Floats) -> list[tuple[int, ...]]:
        """Of all peers, to start from: those that were good so far first."""
        edges = costs.shape[1]
        lengths = np.maximum(1, np.arange(edges)[None, :] - np.arange(edges)[:, None])
        rates = (costs / lengths).min(axis=(1, 2))
        by_rate = [int(p) for p in np.argsort(rates, kind="stable")]
        begun = [self._order, self._wanted.order, ()]
        return [(*order, *(p for p in by_rate if p not in order)) for order in begun]

    # Among equals

    def settled(self, best: Ring) -> Ring:
        """Of the rings that are as good, the one that is best otherwise."""
        throughput = self._wanted.objective == "throughput"
        stage_s = best.forecast.stage_s * (1 + AS_BUSY) if throughput else math.inf
        missing = self._missing(best)
        slack = AS_FAST_MISSING if missing else AS_FAST
        limit_s = best.forecast.tpot_s * (1 + slack)
        spare_s, leans = slack * best.forecast.tpot_s, []
        for factor in (1.0, 4.0, 16.0):
            ttft = factor * spare_s / max(best.forecast.ttft_s, 1e-9)
            if missing:
                leans.append(Lean(1e-3 * ttft, factor * spare_s / missing, stage_s))
            else:
                leans.append(Lean(ttft, stage_s=stage_s))
        chosen, rank = best, (missing, best.forecast.ttft_s)
        for lean in leans:
            found = self._ring(limit_s, lean, math.inf)
            if found is None or found[1].forecast.tpot_s > limit_s:
                break  # leaning more only takes longer
            if (new := (self._missing(found[1]), found[1].forecast.ttft_s)) < rank:
                chosen, rank = found[1], new
        return chosen

    def _missing(self, ring: Ring) -> float:
        return 0.0 if self._wanted.missing is None else self._prices.missing_bytes(ring)
