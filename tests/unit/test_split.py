"""The split: allowed, fitting, with a context that is worth its time, and clear about reasons."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Sequence
from itertools import combinations, islice, permutations, product

import pytest
from msgspec.structs import replace

from peer.errors import NoPlan
from peer.planning.costs import Size, compute_bytes, logits_bytes
from peer.planning.plan import Plan, PlanId, Split, check
from peer.planning.profile import EngineProfile, ModelShape, Profile
from peer.planning.split import CONTEXT_LEAST, Wishes, solve

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
    size = Size(kv_cells, kv_cells, 512)
    logits = logits_bytes(model, size) if last == model.layers else 0
    ends = model.output_bytes + model.embed_bytes * model.tied + logits if logits else 0
    cache = kv_cells * sum(model.layer_kv_bytes[first:last])
    return sum(model.layer_bytes[first:last]) + cache + compute_bytes(model, size) + ends


def test_the_same_profiles_in_any_order_give_the_same_split() -> None:
    profiles = [peer(letter, 500 + 700 * i) for i, letter in enumerate("abcde")]
    splits = {repr(solve(list(some), shape(12))) for some in permutations(profiles)}
    assert len(splits) == 1


def test_each_window_holds_a_layer_of_every_group() -> None:
    model = shape(12, cut_groups=((5, 11), tuple(range(5))))
    profiles = [peer(letter, 4000) for letter in "abc"]
    split = solve(profiles, model, Wishes(spread_all=True))
    demand_good(split, model, profiles)
    assert len(split.windows) == 1  # layers 0-4 and one of 5, 11: only the whole has both twice
    assert len(split.left_out) == 2
    assert "cannot be cut" in split.left_out[0].why


def test_a_model_that_must_stay_whole_goes_to_one_peer_that_can_hold_it() -> None:
    model = shape(whole_why="its layers share a cache")
    profiles = [peer("a", 100), peer("b", 3000), peer("c", 120)]
    split = solve(profiles, model, Wishes(spread_all=True))
    assert [w.peer_id[0] for w in split.windows] == ["b"]
    assert all("its layers share a cache" in left.why for left in split.left_out)
    with pytest.raises(NoPlan, match=r"its layers share a cache.*machine-b.*MiB are missing") as no:
        solve([peer("a", 20), peer("b", 30)], model)
    assert "pull a smaller model" in str(no.value)


def test_more_peers_than_layers_leaves_the_rest_out_with_a_reason() -> None:
    profiles = [peer(letter, 4000) for letter in "abcde"]
    split = solve(profiles, shape(3), Wishes(spread_all=True))
    assert len(split.left_out) >= 2
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
    profiles = [peer("a", 4000, backend="fake"), peer("b", 4000)]
    split = solve(profiles, shape(), Wishes(spread_all=True))
    assert {w.peer_id[0]: w.backend for w in split.windows} == {"a": "fake", "b": "llama_cpp"}
    ends = [MIB * (w.first == 0) + MIB * (w.last == 30) for w in split.windows]
    for window, end in zip(split.windows, ends, strict=True):
        layers = window.last - window.first
        assert window.memory_bytes == layers * (4 * MIB + 768 * split.kv_cells) + end


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
    split = solve([peer("a", 64_000)], shape(context=trained), Wishes(context=wanted))
    assert (split.context, split.kv_cells, split.slots, split.batch_tokens) == (
        context,
        cells,
        32,
        512,
    )


def test_cells_are_given_up_before_context_and_context_before_the_plan() -> None:
    model = shape(context=8192)
    seen = []
    for memory in range(2000, 171, -5):
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
    split = solve(profiles, model, Wishes(spread_all=True))
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
            split = solve(profiles, model, Wishes(spread_all=draw.random() < 0.5))
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


@pytest.mark.parametrize(("peers", "layers"), [(16, 64), (64, 512), (64, 4096)])
def test_many_peers_and_layers_are_planned_like_few(peers: int, layers: int) -> None:
    """The last two are beyond what is searched: there, shares follow memory."""
    profiles, model = many(peers), shape(layers)
    split = solve(profiles, model, Wishes(spread_all=True))
    demand_good(split, model, profiles)
    assert len(split.windows) == peers
    with pytest.raises(NoPlan, match="not at the layers where"):
        solve(many(peers, layers * 8 / peers + 80), shape(layers, cut_starts=(0, layers // 2)))


def test_planning_for_thousands_of_layers_takes_little_memory() -> None:
    tracemalloc.start()
    try:
        solve(many(64), shape(4096, layer_bytes=(1000,) * 4096))
        assert tracemalloc.get_traced_memory()[1] < 50 * MIB
    finally:
        tracemalloc.stop()


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
