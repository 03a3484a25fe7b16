"""The solver against an oracle that tries everything, against simple rules, and what is asked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from peer.planning import costs
from peer.planning.baselines import compute_proportional, memory_proportional, smallest_set
from peer.planning.costs import Problem
from peer.planning.halda import Ring, Wanted, solve
from peer.planning.rings import made
from tests.clusters import everything, small

WITHIN = 1e-3  # of the optimum: what the issue asks


def stands(of: Problem, ring: Ring, wanted: Wanted | None = None) -> None:
    """The ring is one: allowed windows one after another, of different peers, that fit; and its
    forecast is what the cost model says of it."""
    wanted = wanted or Wanted()
    width = of.shape.layers // ring.rounds
    assert len(set(ring.order)) == len(ring.order) == len(ring.edges)
    assert [0, *(b for _, b in ring.edges)] == [*(a for a, _ in ring.edges), width]
    for first, last in ring.edges:
        for at in range(0, of.shape.layers, width):
            assert of.shape.refusal(at + first, at + last) == ""
    steps = [(peer, a, b) for peer, (a, b) in zip(ring.order, ring.edges, strict=True)]
    assert made(of, steps, ring.rounds, ring.gpu_layers) == ring
    if wanted.everyone:
        assert len(ring.order) == len(of.peers)
    for peer, window in wanted.pinned.items():
        assert ring.edges[ring.order.index(peer)] == window


# Optimal ---------------------------------------------------------------------------------------

KINDS = {
    # a family of instances: (how many, peers, layers, throttled)
    "small": (320, (1, 4), (4, 6, 8), True),
    "many peers": (10, (4, 5), (6,), True),
    "many layers": (50, (2, 2), (20, 24), True),
    "three peers": (20, (3, 3), (12,), True),
}


@pytest.mark.parametrize(
    ("kind", "block"), [(kind, block) for kind, of in KINDS.items() for block in range(of[0] // 10)]
)
def test_it_is_as_good_as_trying_everything(kind: str, block: int) -> None:
    _, peers, layers, throttled = KINDS[kind]
    for seed in range(10 * block, 10 * block + 10):
        of = small(seed, peers, layers, throttled)
        best, ring = everything(of), solve(of)
        assert (best is None) == (ring is None), seed
        if best and ring:
            stands(of, ring)
            assert ring.forecast.tpot_s <= best.forecast.tpot_s * (1 + WITHIN), seed
            assert ring.forecast.tpot_s >= best.forecast.tpot_s * (1 - 1e-9), seed


@pytest.mark.parametrize("block", range(10))
def test_it_is_as_good_as_the_best_windows_of_every_order_at_the_limit(block: int) -> None:
    """5 peers and 24 layers: one round, nobody throttled, so that costs only add up."""
    for seed in range(10 * block, 10 * block + 10):
        of = small(seed, (3, 5), (16, 20, 24), throttled=False)
        best_s, ring = best_of_all_orders(of), solve(of, Wanted(rounds=1))
        assert (best_s == np.inf) == (ring is None), seed
        if ring:
            stands(of, ring)
            assert ring.forecast.tpot_s == pytest.approx(best_s, rel=WITHIN), seed


def best_of_all_orders(of: Problem) -> float:
    """The least TPOT in one round where nobody is throttled: for every order of every subset, the
    best windows by a dynamic programme over the layers; each window's cost by `costs.part`."""
    layers, peers = of.shape.layers, range(len(of.peers))
    squares = np.full((len(of.peers), layers + 1, layers + 1), np.inf)
    for peer, able in enumerate(of.peers):
        for a, b in itertools.combinations(range(layers + 1), 2):
            if not of.shape.refusal(a, b):
                tried = (costs.part(of, able, [(a, b)], n)
                         for n in range(b - a + 1 if able.gpu else 1))  # fmt: skip
                each = [part.busy_s + part.read_s for part in tried if part]
                squares[peer, a, b] = min(each, default=np.inf)
    best = np.inf
    for size in range(1, len(of.peers) + 1):
        for order in itertools.permutations(peers, size):
            least = squares[order[0], 0]
            for before, peer in itertools.pairwise(order):
                least = (least[:, None] + squares[peer]).min(axis=0) + of.hop_s[before, peer]
            closing = of.close_s[order[-1], order[0]] if size > 1 else 0.0
            best = min(best, float(least[-1] + closing))
    return best


@pytest.mark.parametrize("block", range(4))
def test_the_busiest_stage_is_as_short_as_trying_everything_finds(block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        of = small(seed, (1, 4), (4, 6))
        best, ring = everything(of, throughput=True), solve(of, Wanted("throughput"))
        assert (best is None) == (ring is None), seed
        if best and ring:
            stands(of, ring)
            assert ring.forecast.stage_s <= best.forecast.stage_s * (1 + 2 * WITHIN), seed


# Never worse than rules ------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(50))
def test_it_is_never_worse_than_a_simple_rule(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        of = small(seed, (2, 12), (8, 12, 16))
        ring = solve(of)
        for rule in (memory_proportional, compute_proportional, smallest_set):
            if other := rule(of):
                stands(of, other)
                assert ring, (seed, rule)
                assert ring.forecast.tpot_s <= other.forecast.tpot_s * (1 + WITHIN), (seed, rule)
