"""The split: allowed, fitting, near to the peers' shares, and clear about what is missing."""

from __future__ import annotations

import math
import random
import time
import tracemalloc
from collections.abc import Sequence
from itertools import combinations, islice, permutations, product

import pytest
from msgspec.structs import replace

from peer.errors import NoPlan
from peer.planning.plan import Plan, PlanId, Split, check
from peer.planning.profile import EngineProfile, ModelShape, Profile
from peer.planning.split import CONTEXT_LEAST, compute_bytes, logits_bytes, solve

MIB = 1 << 20


def peer(
    letter: str,
    memory_mib: float,
    *,
    backend: str = "llama_cpp",
    gpu: tuple[str, float] | None = None,
) -> Profile:
    engines = [EngineProfile(backend, "CPU", "cpu", int(memory_mib * MIB))]
    if gpu:
        engines.append(EngineProfile(backend, "GPU", gpu[0], int(gpu[1] * MIB)))
    return Profile(
        peer_id=letter * 16,
        name=f"machine-{letter}",
        os="linux",
        cores=4,
        memory_total_bytes=64 << 30,
        memory_available_bytes=int(memory_mib * MIB),
        engines=tuple(engines),
    )


def shape(layers: int = 30, **changes: object) -> ModelShape:
    facts: dict[str, object] = {
        "model": "small",
        "digest": "0" * 64,
        "architecture": "llama",
        "layers": layers,
        "hidden": 64,
        "context": 2048,
        "layer_bytes": (4 * MIB,) * layers,
        "layer_kv_bytes": (768,) * layers,
        "head_bytes": MIB,
        "embed_bytes": MIB,
        "output_bytes": MIB,
        "tied": False,
        "cut_starts": tuple(range(layers)),
    }
    return ModelShape(**{**facts, **changes})  # type: ignore[arg-type]


def counts(split: Split) -> list[int]:
    return [window.last - window.first for window in split.windows]


def demand_good(split: Split, model: ModelShape, profiles: Sequence[Profile]) -> None:
    """The plan's own check, everybody's memory, and nobody forgotten."""
    assert check(Plan(PlanId(1, 1), "a" * 16, model, split)) == ""
    budgets = {profile.peer_id: profile.memory_available_bytes for profile in profiles}
    for window in split.windows:
        assert needed(model, window.first, window.last, split.kv_cells) <= budgets[window.peer_id]
    named = [w.peer_id for w in split.windows] + [left.peer_id for left in split.left_out]
    assert sorted(named) == sorted(budgets)
    assert all(left.why for left in split.left_out)


def needed(model: ModelShape, first: int, last: int, kv_cells: int) -> int:
    logits = logits_bytes(model) if last == model.layers else 0
    return (
        model.window_bytes(first, last)
        + kv_cells * sum(model.layer_kv_bytes[first:last])
        + compute_bytes(model, kv_cells)
        + logits
    )


def test_equal_peers_get_equal_windows() -> None:
    profiles = [peer(letter, 4000) for letter in "cab"]
    split = solve(profiles, shape())
    assert counts(split) == [10, 10, 10]
    assert [w.peer_id[0] for w in split.windows] == ["a", "b", "c"]
    demand_good(split, shape(), profiles)


def test_windows_follow_memory() -> None:
    profiles = [peer("a", 1000), peer("b", 3000), peer("c", 6000)]
    assert counts(solve(profiles, shape())) == [3, 9, 18]


def test_the_same_profiles_in_any_order_give_the_same_split() -> None:
    profiles = [peer(letter, 500 + 700 * i) for i, letter in enumerate("abcde")]
    splits = {repr(solve(list(some), shape(12))) for some in permutations(profiles)}
    assert len(splits) == 1


def test_an_earlier_ring_keeps_its_order_and_newcomers_follow() -> None:
    profiles = [peer(letter, 4000) for letter in "abcd"]
    split = solve(profiles, shape(), order=["c" * 16, "x" * 16, "a" * 16])
    assert [w.peer_id[0] for w in split.windows] == ["c", "a", "b", "d"]


def test_cuts_are_taken_where_the_architecture_allows_them_nearest_to_the_shares() -> None:
    profiles = [peer(letter, 4000) for letter in "abc"]
    model = shape(30, cut_starts=(0, 4, 8, 12, 16, 20, 24, 28))
    split = solve(profiles, model)
    assert [w.first for w in split.windows] == [0, 8, 20]
    demand_good(split, model, profiles)


def test_each_window_holds_a_layer_of_every_group() -> None:
    model = shape(12, cut_groups=((5, 11), tuple(range(5))))
    profiles = [peer(letter, 4000) for letter in "abc"]
    split = solve(profiles, model, spread_all=True)
    demand_good(split, model, profiles)
    assert len(split.windows) == 1  # layers 0-4 and one of 5, 11: only the whole has both twice
    assert len(split.left_out) == 2
    assert "cannot be cut" in split.left_out[0].why


def test_a_model_that_must_stay_whole_goes_to_the_peer_with_most_memory() -> None:
    model = shape(whole_why="its layers share a cache")
    profiles = [peer("a", 1000), peer("b", 3000), peer("c", 2000)]
    split = solve(profiles, model, spread_all=True)
    assert [w.peer_id[0] for w in split.windows] == ["b"]
    assert all("its layers share a cache" in left.why for left in split.left_out)
    with pytest.raises(NoPlan, match=r"its layers share a cache.*machine-b.*MiB are missing") as no:
        solve([peer("a", 20), peer("b", 30)], model)
    assert "pull a smaller model" in str(no.value)


def test_all_peers_get_a_layer_where_that_is_asked_for() -> None:
    profiles = [peer("a", 100), peer("b", 9000), peer("c", 9000)]
    automatic = solve(profiles, shape(12))
    assert [w.peer_id[0] for w in automatic.windows] == ["b", "c"]
    assert "machine-a" in automatic.left_out[0].why
    everyone = solve(profiles, shape(12), spread_all=True)
    assert counts(everyone)[0] == 1
    assert everyone.left_out == ()
    demand_good(everyone, shape(12), profiles)


def test_more_peers_than_layers_leaves_the_rest_out_with_a_reason() -> None:
    profiles = [peer(letter, 4000) for letter in "abcde"]
    split = solve(profiles, shape(3), spread_all=True)
    assert counts(split) == [1, 1, 1]
    assert len(split.left_out) == 2
    demand_good(split, shape(3), profiles)


def test_a_peer_without_an_engine_is_left_out_by_name() -> None:
    bare = Profile("z" * 16, "tablet", "linux", 4, 1 << 33, 1 << 33)
    split = solve([bare, peer("a", 4000)], shape())
    assert split.left_out[0].peer_id == "z" * 16
    assert "tablet has no engine" in split.left_out[0].why
    with pytest.raises(NoPlan, match="tablet has no engine"):
        solve([bare], shape())
    with pytest.raises(NoPlan, match="no profile"):
        solve([], shape())


def test_windows_carry_the_backend_of_their_peer_and_predict_its_memory() -> None:
    split = solve([peer("a", 4000, backend="fake"), peer("b", 4000)], shape())
    assert [w.backend for w in split.windows] == ["fake", "llama_cpp"]
    assert split.windows[0].memory_bytes == 61 * MIB + 15 * 768 * split.kv_cells


def test_memory_of_a_gpu_counts_where_the_layers_go() -> None:
    apart = solve([peer("a", 1000, gpu=("cuda", 3000)), peer("b", 1000)], shape(12))
    assert counts(apart) == [9, 3]
    together = solve([peer("a", 1000, gpu=("metal", 500)), peer("b", 1000)], shape(12))
    assert counts(together) == [4, 8]


@pytest.mark.parametrize(
    ("trained", "wanted", "context", "cells"),
    [
        (2048, 0, 2048, 16384),
        (8192, 0, 8192, 32768),
        (131072, 0, 32768, 32768),
        (131072, 65536, 65536, 65536),
        (4096, 100, 100, 800),
        (0, 0, 32768, 32768),
        (256, 0, 256, 2048),
    ],
)
def test_context_and_cells_where_memory_is_plenty(
    trained: int, wanted: int, context: int, cells: int
) -> None:
    split = solve([peer("a", 64_000)], shape(context=trained), context_wanted=wanted)
    assert (split.context, split.kv_cells, split.slots, split.batch_tokens) == (
        context,
        cells,
        8,
        512,
    )


def test_cells_are_given_up_before_context_and_context_before_the_plan() -> None:
    model = shape(context=8192)
    seen = []
    for memory in range(2000, 175, -5):
        split = solve([peer("a", memory)], model)
        seen.append((split.context, split.kv_cells))
        demand_good(split, model, [peer("a", memory)])
        assert ("for want of memory" in split.why) == (seen[-1] != (8192, 32768))
    with pytest.raises(NoPlan, match=r"MiB are missing.*machine-a"):
        solve([peer("a", 130)], model)
    assert seen == sorted(seen, reverse=True)
    assert (8192, 8192) in seen
    assert seen[-1] == (CONTEXT_LEAST, CONTEXT_LEAST)


def test_what_is_missing_is_enough_when_it_is_added() -> None:
    model, memory = shape(), 60
    with pytest.raises(NoPlan) as error:
        solve([peer("a", memory)], model)
    missing = int(str(error.value).split(" MiB are missing")[0].rsplit(" ", 1)[1])
    assert solve([peer("a", memory + missing)], model).context == CONTEXT_LEAST


def test_a_head_that_cannot_hold_the_embedding_changes_places() -> None:
    model = shape(6, embed_bytes=400 * MIB, hidden=4096)
    profiles = [peer("a", 100), peer("b", 900)]
    split = solve(profiles, model, spread_all=True)
    assert [w.peer_id[0] for w in split.windows] == ["b", "a"] or len(split.windows) == 1
    demand_good(split, model, profiles)


def test_a_split_is_found_whenever_one_exists() -> None:
    """Against brute force over all rings and cuts of small cases."""
    draw = random.Random(20)
    possible = 0
    for _ in range(300):
        layers = draw.randint(1, 8)
        model = shape(
            layers,
            context=512,
            layer_bytes=tuple(draw.randint(1, 40) * MIB for _ in range(layers)),
            embed_bytes=draw.randint(0, 30) * MIB,
            output_bytes=draw.randint(0, 30) * MIB,
            tied=draw.random() < 0.3,
            hidden=1 << 20,
            cut_starts=(0, *(i for i in range(1, layers) if draw.random() < 0.7)),
            cut_groups=(tuple(range(0, layers, 3)),) if draw.random() < 0.3 else (),
        )
        profiles = [
            peer(letter, 32_770 + draw.randint(0, 110))  # what compute takes, and a little
            for letter in "abcde"[: draw.randint(1, 5)]
        ]
        exists = brute_force(model, profiles)
        possible += exists
        try:
            split = solve(profiles, model, spread_all=draw.random() < 0.5)
        except NoPlan:
            assert not exists, (model, profiles)
            continue
        assert exists
        demand_good(split, model, profiles)
    assert 60 < possible < 240


def brute_force(model: ModelShape, profiles: Sequence[Profile]) -> bool:
    for size in range(1, min(len(profiles), model.layers) + 1):
        for inner in combinations(range(1, model.layers), size - 1):
            edges = [0, *inner, model.layers]
            windows = [(edges[i], edges[i + 1]) for i in range(size)]
            if any(model.refusal(a, b) for a, b in windows):
                continue
            wants = [needed(model, a, b, 512) for a, b in windows]
            for ring in permutations(profiles, size):
                if all(w <= p.memory_available_bytes for w, p in zip(wants, ring, strict=True)):
                    return True
    return False


def test_a_shape_that_contradicts_itself_is_refused() -> None:
    for changes in ({"layer_bytes": (1,)}, {"layer_kv_bytes": (1,)}, {"layers": 0}):
        with pytest.raises(NoPlan, match="contradicts itself"):
            solve([peer("a", 4000)], shape(**changes))


def many(count: int, memory_mib: float = 4000) -> list[Profile]:
    names = ("".join(letters) for letters in product("abcdefgh", repeat=2))
    return [
        replace(peer("a", memory_mib + i), peer_id="a" * 14 + name)
        for i, name in enumerate(islice(names, count))
    ]


@pytest.mark.parametrize(("layers", "limit_s"), [(128, 1.0), (512, 1.0), (4096, 3.0)])
def test_many_peers_and_layers_do_not_hold_up_the_coordinator(layers: int, limit_s: float) -> None:
    """It takes 0.02 and 0.06 s; a matrix over all windows of 4,096 layers took 9 s and 2.5 GiB."""
    profiles, model = many(64), shape(layers)
    started = time.perf_counter()
    split = solve(profiles, model, spread_all=True)
    assert time.perf_counter() - started < limit_s
    demand_good(split, model, profiles)
    assert len(split.windows) == 64
    started = time.perf_counter()
    with pytest.raises(NoPlan, match="not at the layers where"):  # after all orders were tried
        solve(many(64, layers * 4 / 3 + 20), shape(layers, cut_starts=(0, layers // 2)))
    assert time.perf_counter() - started < limit_s


def test_planning_for_thousands_of_layers_takes_little_memory() -> None:
    tracemalloc.start()
    try:
        solve(many(64), shape(4096, layer_bytes=(1000,) * 4096))
        assert tracemalloc.get_traced_memory()[1] < 50 * MIB
    finally:
        tracemalloc.stop()


def test_windows_are_as_near_to_the_shares_as_any_are() -> None:
    """Against a plain search of all windows, in the stable order of the ring."""
    draw = random.Random(9)
    for _ in range(150):
        layers = draw.randint(1, 14)
        model = shape(
            layers,
            context=512,
            layer_bytes=tuple(draw.randint(0, 40) * MIB for _ in range(layers)),
            tied=draw.random() < 0.3,
            cut_starts=(0, *(i for i in range(1, layers) if draw.random() < 0.8)),
            cut_groups=(tuple(i for i in range(layers) if draw.random() < 0.5),)
            * draw.choice([0, 1]),
        )
        profiles = [peer(letter, draw.randint(20, 500)) for letter in "abcd"[: draw.randint(1, 4)]]
        least = nearest_by_search(model, profiles)
        if least == math.inf:
            continue  # another order may be found
        split = solve(profiles, model)
        got = {window.peer_id: window.last - window.first for window in split.windows}
        assert [w.peer_id for w in split.windows] == sorted(got)
        costs = [(got.get(p.peer_id, 0) - share) ** 2 for p, share in shares(model, profiles)]
        assert sum(costs) == pytest.approx(least)


def shares(model: ModelShape, profiles: Sequence[Profile]) -> list[tuple[Profile, float]]:
    total = sum(p.memory_available_bytes for p in profiles)
    return [(p, model.layers * p.memory_available_bytes / total) for p in profiles]


def nearest_by_search(model: ModelShape, profiles: Sequence[Profile]) -> float:
    """The least sum of squared distances, with as many KV cells as fit."""
    for cells in (4096, 2048, 1024, 512):
        best = {0: 0.0}
        for profile, share in shares(model, profiles):
            after: dict[int, float] = {}
            for a, cost in best.items():
                for b in range(a, model.layers + 1):
                    fits = a == b or (
                        not model.refusal(a, b)
                        and needed(model, a, b, cells) <= profile.memory_available_bytes
                    )
                    if fits:
                        there = cost + (b - a - share) ** 2
                        after[b] = min(after.get(b, math.inf), there)
            best = after
        if model.layers in best:
            return best[model.layers]
    return math.inf
