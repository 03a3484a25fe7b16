"""After a loss as little moves as can be, and no answer is left with too little context."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Iterator, Sequence

import pytest
from msgspec.structs import replace

from peer.errors import NoPlan
from peer.planning import after_loss, costs, halda
from peer.planning.after_loss import AFTER_LOSS_WORTH
from peer.planning.costs import Part, Problem
from peer.planning.plan import PlanWindow, Split
from peer.planning.profile import EngineProfile, Link, ModelShape, Profile, Speed
from peer.planning.rings import Wanted
from peer.planning.split import Wishes, solve
from tests.bench.solve import cluster
from tests.clusters import small
from tests.plans import shape

MIB = 1 << 20
MODEL = shape(
    30, hidden=64, layer_bytes=(10 * MIB,) * 30, layer_kv_bytes=(64,) * 30, vocabulary=100
)
NAMES = ("desk", "mini", "tower", "laptop", "attic", "closet", "garage")
ALL_PARTS = frozenset(MODEL.window_parts(0, MODEL.layers))


def machine(index: int, memory_mib: float, decode_s: float = 1e-2, **changes: object) -> Profile:
    """On a cable, with so much time for each layer."""
    peer_id = "abcdefg"[index] * 16
    speed = Speed(MODEL.digest, "llama_cpp", "cpu", 4, (decode_s,), (decode_s * 20,), 512)
    links = tuple(Link(letter * 16, 4e-4, 1e8) for letter in "abcdefg" if letter != peer_id[0])
    facts: dict[str, object] = {
        "engines": (EngineProfile("llama_cpp", "CPU", "cpu"),), "speeds": (speed,), "links": links,
    }  # fmt: skip
    memory = int(memory_mib * MIB)
    facts |= changes
    return Profile(peer_id, NAMES[index], "linux", 4, 1 << 36, memory, **facts)  # type: ignore[arg-type]


def split_of(*windows: tuple[int, int, int], context: int = 4096, gpu_layers: int = -1) -> Split:
    """Windows (index of a machine, first, last), as they served."""
    rows = (PlanWindow("abcdefg"[i] * 16, a, b, gpu_layers=gpu_layers) for i, a, b in windows)
    return Split(tuple(rows), context, context, 8, 512)


def everywhere(profiles: Sequence[Profile]) -> dict[str, frozenset[str]]:
    return {profile.peer_id: ALL_PARTS for profile in profiles}


def windows(split: Split) -> list[tuple[str, int, int]]:
    return [(window.peer_id[0], window.first, window.last) for window in split.windows]


# Stories ---------------------------------------------------------------------------------------


def test_the_survivors_windows_grow_into_the_hole() -> None:
    before = split_of((0, 0, 10), (1, 10, 20), (2, 20, 30))
    for lost, edge in ((1, 15), (0, 20), (2, 10)):
        left = [machine(i, 270) for i in range(3) if i != lost]
        split = solve(left, MODEL, Wishes(before=before, held=everywhere(left)))
        first, second = ("abc"[i] for i in range(3) if i != lost)
        assert windows(split) == [(first, 0, edge), (second, edge, 30)]
        assert "10 layers (100 MiB) are loaded anew" in split.why


def test_the_hole_is_shared_by_those_beside_it_for_peers_load_at_the_same_time() -> None:
    before = split_of((0, 0, 8), (1, 8, 16), (2, 16, 24), (3, 24, 30))
    left = [machine(i, 270) for i in (0, 2, 3)]
    split = solve(left, MODEL, Wishes(before=before, held=everywhere(left), spread_all=True))
    assert windows(split) == [("a", 0, 12), ("c", 12, 24), ("d", 24, 30)]


def test_a_faster_survivor_takes_more_of_the_hole() -> None:
    before = split_of((0, 0, 10), (1, 10, 20), (2, 20, 30))
    left = [machine(0, 300, 9e-3), machine(2, 300, 1.15e-2)]
    split = solve(left, MODEL, Wishes(before=before, held=everywhere(left)))
    assert windows(split)[0] == ("a", 0, 20)


def test_what_a_peer_would_have_to_fetch_goes_to_one_that_has_it_on_disk() -> None:
    before = split_of((0, 0, 10), (1, 10, 20), (2, 20, 30))
    left = [machine(0, 350), machine(2, 350)]
    for holder, edge in ((0, 20), (2, 10)):
        held = {"abc"[holder] * 16: ALL_PARTS}
        split = solve(left, MODEL, Wishes(before=before, held=held))
        assert windows(split) == [("a", 0, edge), ("c", edge, 30)]


def test_the_output_head_goes_to_one_that_has_it_on_disk_too() -> None:
    """The tail was lost; a newcomer has all parts, the survivors have only the layers."""
    model = replace(MODEL, output_bytes=300 * MIB)
    before = split_of((0, 0, 10), (1, 10, 20), (2, 20, 30))
    left = [machine(0, 700), machine(1, 700), machine(3, 700)]
    layers = ALL_PARTS - {"output"}
    held = {"a" * 16: layers, "b" * 16: layers, "d" * 16: ALL_PARTS}
    split = solve(left, model, Wishes(before=before, held=held))
    assert [name for name, _, _ in windows(split)] == ["a", "b", "d"]
    held["b" * 16] = ALL_PARTS
    split = solve(left, model, Wishes(before=before, held=held))
    assert [name for name, _, _ in windows(split)] == ["a", "b"]


def test_a_newcomer_is_not_taken_in_for_what_survivors_can_do() -> None:
    before = split_of((0, 0, 10), (1, 10, 20), (2, 20, 30))
    left = [machine(0, 270), machine(2, 270), machine(3, 270)]
    split = solve(left, MODEL, Wishes(before=before, held=everywhere(left)))
    assert windows(split) == [("a", 0, 15), ("c", 15, 30)]


def test_a_newcomer_helps_where_the_survivors_are_too_small() -> None:
    before = split_of((0, 0, 10), (1, 10, 20), (2, 20, 30))
    left = [machine(0, 150), machine(2, 150), machine(3, 270)]
    split = solve(left, MODEL, Wishes(before=before, held=everywhere(left)))
    order = [name for name, _, _ in windows(split)]
    assert [name for name in order if name != "d"] == ["a", "c"]
    had = {("a", at) for at in range(10)} | {("c", at) for at in range(20, 30)}
    assert had <= {(name, at) for name, a, b in windows(split) for at in range(a, b)}


def test_a_ring_that_moves_less_is_not_taken_where_it_is_much_slower() -> None:
    """The tail is so slow that a plan without it is more than the tolerance faster."""
    before = split_of((0, 0, 10), (1, 10, 20), (2, 20, 30))
    left = [machine(0, 900, 1e-3), machine(2, 900, 0.1)]
    split = solve(left, MODEL, Wishes(before=before, held=everywhere(left)))
    assert windows(split) == [("a", 0, 30)]


def test_nothing_moves_where_everybody_is_back() -> None:
    before = split_of((2, 0, 7), (0, 7, 18), (1, 18, 30))
    everyone = [machine(i, 200) for i in range(3)]
    split = solve(everyone, MODEL, Wishes(before=before, held=everywhere(everyone)))
    assert windows(split) == windows(before)
    assert "every layer stays where it was" in split.why


def test_the_context_of_running_answers_is_kept_though_a_shorter_one_would_be_faster() -> None:
    """With 8,192 tokens for each of them everything stays in memory; with 16,384 some is read."""
    model = replace(MODEL, layer_kv_bytes=(1024,) * 30, context=16384)
    left = [machine(0, 600, disk_read_bytes_per_s=1e9), machine(2, 100)]
    before = split_of((0, 0, 20), (1, 20, 30), context=16384)
    free = solve(left, model, Wishes())
    assert free.context < 16384
    kept = solve(left, model, Wishes(before=before))
    assert kept.context == 16384
    assert any(window.streamed_bytes for window in kept.windows)


def test_a_shorter_context_is_better_than_no_plan() -> None:
    model = replace(MODEL, layer_kv_bytes=(1024,) * 30, context=16384)
    left = [machine(0, 600)]
    before = split_of((0, 0, 20), (1, 20, 30), context=16384)
    split = solve(left, model, Wishes(before=before))
    assert split.context < 16384
    assert f"the context is {split.context} tokens, not 16384" in split.why


def test_an_unchanged_window_keeps_its_layers_on_the_gpu() -> None:
    """The GPU was measured to be a little slower meanwhile: no reason to place them anew."""
    gpu = EngineProfile("llama_cpp", "GPU", "cuda", 1 << 34)
    cpu = EngineProfile("llama_cpp", "CPU", "cpu")
    alike = [
        Speed(MODEL.digest, "llama_cpp", kind, 4, (decode_s,), (0.1,), 512)
        for kind, decode_s in (("cpu", 1e-2), ("cuda", 1.005e-2))
    ]
    left = [
        machine(0, 150, engines=(cpu, gpu), speeds=tuple(alike)),
        machine(2, 400, 1e-2),
    ]
    before = split_of((0, 0, 10), (1, 10, 20), (2, 20, 30))
    held = {"c" * 16: ALL_PARTS}
    split = solve(left, MODEL, Wishes(before=before, held=held))
    assert windows(split) == [("a", 0, 10), ("c", 10, 30)]
    assert split.windows[0].gpu_layers == -1
    anew = solve(left, MODEL, Wishes(pinned={"a" * 16: (0, 10)}))
    assert anew.windows[0].gpu_layers == 0


# Of any home -----------------------------------------------------------------------------------


def after(seed: int) -> tuple[Problem, Wanted, Split] | None:
    """A random home whose ring lost a peer: what is left, what is asked, and what served."""
    of = small(seed, (3, 4), (6, 8))
    draw = random.Random(seed)
    first = halda.solve(of)
    if first is None or len(first.order) < 2:
        return None
    rows = [
        PlanWindow(of.peers[i].peer_id, *costs.windows(of.shape.layers, first.rounds, edge)[k])
        for k in range(first.rounds)
        for i, edge in zip(first.order, first.edges, strict=True)
    ]
    split = Split(tuple(rows), of.size.context, of.size.kv_cells, 1, of.size.batch_tokens)
    lost = draw.choice(first.order)
    parts = frozenset(of.shape.window_parts(0, of.shape.layers))
    held = {able.peer_id: parts for able in of.peers if draw.random() < 0.5}
    left = costs.problem(
        [able.profile for i, able in enumerate(of.peers) if i != lost], of.shape, of.size
    )
    return left, after_loss.wanted(left, Wanted(), Wishes(before=split, held=held)), split


Way = tuple[tuple[int, ...], tuple[tuple[int, int], ...], int]  # order, edges, rounds


def ways(of: Problem) -> Iterator[tuple[Way, list[list[Part]]]]:
    """All rings there are, with each peer's part for any number of GPU layers."""
    layers = of.shape.layers
    for rounds in (k for k in range(1, layers + 1) if layers % k == 0):
        width, parts = layers // rounds, {}
        for i, able in enumerate(of.peers):
            for a, b in itertools.combinations(range(width + 1), 2):
                each = costs.windows(layers, rounds, (a, b))
                if not any(of.shape.refusal(*window) for window in each):
                    choices = range(b - a + 1 if able.gpu else 1)
                    found = (costs.part(of, able, each, n) for n in choices)
                    parts[i, a, b] = [part for part in found if part]
        for size in range(1, len(of.peers) + 1):
            for order in itertools.permutations(range(len(of.peers)), size):
                for inner in itertools.combinations(range(1, width), size - 1):
                    edges = tuple(itertools.pairwise((0, *inner, width)))
                    kept = [parts.get((i, *e), []) for i, e in zip(order, edges, strict=True)]
                    if all(kept):
                        yield (order, edges, rounds), kept


def moved(of: Problem, wanted: Wanted, way: Way) -> float:
    """Bytes that are to be loaded, layer for layer, and for the ends."""
    assert wanted.missing is not None
    assert wanted.ends is not None
    order, edges, rounds = way
    windows = [costs.windows(of.shape.layers, rounds, edge) for edge in edges]
    layers = [(i, at) for i, w in zip(order, windows, strict=True) for ab in w for at in range(*ab)]
    total = sum(float(wanted.missing[peer, at]) for peer, at in layers)
    return total + float(wanted.ends[order[0], 0] + wanted.ends[order[-1], 1])


def least_moved(of: Problem, wanted: Wanted, limit_s: float) -> tuple[float, float]:
    """Of all rings whose token takes no longer, the fewest bytes to be loaded, and the fewest of
    those whose peers are in the old order."""
    assert wanted.before
    least = in_order = float("inf")
    for way, parts in ways(of):
        order, _, rounds = way
        bytes_, ordered = moved(of, wanted, way), as_before(order, wanted.before.order)
        if bytes_ < least or (ordered and bytes_ < in_order):
            choices = itertools.product(*parts)
            if min(costs.evaluate(of, order, rounds, c).tpot_s for c in choices) <= limit_s:
                least = min(least, bytes_)
                in_order = min(in_order, bytes_) if ordered else in_order
    return least, in_order


def as_before(order: Sequence[int], before: Sequence[int]) -> bool:
    left = [peer for peer in before if peer in order]
    return left == [peer for peer in order if peer in before]


def test_in_any_home_the_cost_is_near_the_best_and_what_moves_is_nearly_always_the_least() -> None:
    """Against all rings there are. Where memory is scarce there are a few that no weighing of
    seconds against bytes finds."""
    seen = missed = unordered = 0
    for seed in range(480):
        if (home := after(seed)) is None:
            continue
        of, wanted, _ = home
        best, ring = halda.solve(of), halda.solve(of, wanted)
        assert (best is None) == (ring is None), seed
        if best is None or ring is None or wanted.before is None:
            continue
        seen += 1
        assert ring.forecast.tpot_s <= best.forecast.tpot_s * (1 + AFTER_LOSS_WORTH) + 1e-12, seed
        now, at_best = (moved(of, wanted, (r.order, r.edges, r.rounds)) for r in (ring, best))
        assert now <= at_best, seed
        limit_s = best.forecast.tpot_s * (1 + AFTER_LOSS_WORTH) * (1 - 1e-6)
        least, in_order = least_moved(of, wanted, limit_s)
        missed += now > least + 1
        kept = as_before(ring.order, wanted.before.order)
        unordered += not kept and in_order <= at_best
    assert seen >= 300
    assert missed <= seen * 0.05
    assert unordered <= seen * 0.02


@pytest.mark.parametrize("block", range(6))
def test_of_equal_peers_every_survivor_keeps_all_that_it_had(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        draw = random.Random(seed)
        count = draw.randint(3, 7)
        each = MODEL.layers / count * 10 + 100
        profiles = [machine(i, each * draw.uniform(1.0, 1.3)) for i in range(count)]
        wishes = Wishes(spread_all=draw.random() < 0.5)
        before = solve(profiles, MODEL, wishes)
        ring = [name for name, _, _ in windows(before)]
        if len(ring) < 3:
            continue
        lost = draw.choice(ring)
        roomy = [replace(p, memory_available_bytes=2 * p.memory_available_bytes) for p in profiles]
        left = [profile for profile in roomy if profile.peer_id[0] != lost]
        again = Wishes(spread_all=wishes.spread_all, before=before, held=everywhere(left))
        split = solve(left, MODEL, again)
        had = {(n, at) for n, a, b in windows(before) if n != lost for at in range(a, b)}
        assert had <= {(n, at) for n, a, b in windows(split) for at in range(a, b)}, seed
        survivors = [name for name, _, _ in windows(split) if name in ring]
        assert survivors == [name for name in ring if name != lost], seed
        assert split.context >= before.context, seed


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_in_any_house_a_loss_costs_no_more_than_the_tolerance(objective: str) -> None:
    """Whole plans, with all that a house has."""
    seen = 0
    for seed in range(170):
        of = small(seed, (3, 5), (8,))
        model = replace(of.shape, context=of.size.context)
        profiles = [able.profile for able in of.peers]
        try:
            before = solve(profiles, model, Wishes(objective=objective))  # type: ignore[arg-type]
        except NoPlan:
            continue
        lost = random.Random(seed).choice([window.peer_id for window in before.windows])
        left = [profile for profile in profiles if profile.peer_id != lost]
        wishes = Wishes(objective=objective, before=before)  # type: ignore[arg-type]
        try:
            split = solve(left, model, wishes)
        except NoPlan:
            with pytest.raises(NoPlan):
                solve(left, model, dataclasses.replace(wishes, before=None))
            continue
        seen += 1
        size = costs.Size(split.context, split.context, split.batch_tokens)
        whole = costs.problem(left, model, size)
        best = halda.solve(whole, Wanted(objective=objective))  # type: ignore[arg-type]
        told = costs.forecast(left, model, replace(split, kv_cells=split.context))
        assert best, seed
        assert told, seed
        limit = (1 + AFTER_LOSS_WORTH) * (1 + after_loss.NEAR)
        assert told.cost_s(objective) <= best.forecast.cost_s(objective) * limit, seed
    assert seen >= 50


def test_a_small_home_has_its_next_plan_in_a_moment() -> None:
    """8 peers and 80 layers in less than 150 ms, as measured in processor time."""
    took = []
    for seed in range(9):
        of = cluster(random.Random(seed), 8, 80)
        profiles = [able.profile for able in of.peers]
        before = solve(profiles, of.shape)
        ring = list(dict.fromkeys(window.peer_id for window in before.windows))
        left = [p for p in profiles if p.peer_id != ring[seed % len(ring)]]
        began = time.process_time()
        try:
            solve(left, of.shape, Wishes(before=before))
        except NoPlan:
            continue
        took.append(time.process_time() - began)
    assert len(took) >= 5
    assert sorted(took)[len(took) // 2] < 0.15


def test_a_cluster_too_large_for_an_exact_search_keeps_what_it_had_as_well() -> None:
    model: ModelShape = replace(MODEL, digest=MODEL.digest)
    draw = random.Random(5)
    profiles = []
    for i in range(16):
        peer_id = "abcdefghijklmnop"[i] * 16
        speed = Speed(
            model.digest, "llama_cpp", "cpu", 4, (draw.uniform(0.01, 0.0101),), (0.1,), 512
        )
        profiles.append(
            Profile(
                peer_id, f"peer{i}", "linux", 4, 1 << 36, 60 * MIB,
                engines=(EngineProfile("llama_cpp", "CPU", "cpu"),), speeds=(speed,),
            )
        )  # fmt: skip
    before = solve(profiles, model)
    ring = [window.peer_id for window in before.windows]
    assert len(ring) >= 8
    left = [replace(p, memory_available_bytes=90 * MIB) for p in profiles if p.peer_id != ring[3]]
    split = solve(left, model, Wishes(before=before))
    had = {(w.peer_id, at) for w in before.windows for at in range(w.first, w.last)}
    new = {(w.peer_id, at) for w in split.windows for at in range(w.first, w.last)}
    hole = before.windows[3].last - before.windows[3].first
    assert len(new - had) <= 2 * hole
