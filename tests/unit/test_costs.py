"""The cost model: cases that can be added up by hand, and the tables against `costs.part`."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from peer.planning import costs
from peer.planning.abilities import CACHE_BYTES_PER_S, KV_FACTOR, USUAL_BYTES_PER_S
from peer.planning.costs import Part, Problem
from peer.planning.pipeline import GROUP_TOKENS
from peer.planning.profile import EngineProfile, Link, Profile, Speed
from peer.planning.tables import ALL_CHOICES_WIDTH, Tables
from tests.clusters import peer_id, small
from tests.plans import shape

MODEL = shape(
    4, hidden=16, layer_bytes=(1000,) * 4, layer_kv_bytes=(10,) * 4,
    embed_bytes=700, output_bytes=900, vocabulary=5,
)  # fmt: skip
SIZE = costs.Size(context=64, kv_cells=64, batch_tokens=8)
COMPUTE = 4 * 8 * (16 * 16 + 64)  # rows, activations, mask: 10,240 bytes
LOGITS = 4 * 8 * 5
DECODE_S, GPU_S, WINDOW_S, OUTPUT_S = 1e-3, 1e-4, 5e-4, 2e-3
GROWN = 1 + 10 * costs.FILL_TOKENS * KV_FACTOR / CACHE_BYTES_PER_S / DECODE_S
"""The KV cache that is read beside a layer; so small a layer is all overhead."""


def profile(index: int = 0, ram: int = 1 << 30, **changes: object) -> Profile:
    """A measured peer without a GPU."""
    values: dict[str, object] = {
        "engines": (EngineProfile("llama_cpp", "CPU", "cpu"),),
        "speeds": (speed("cpu", DECODE_S),),
    }
    return Profile(peer_id(index), f"peer{index}", "linux", 4, ram, ram, **(values | changes))  # type: ignore[arg-type]


def speed(kind: str, decode_s: float) -> Speed:
    """The prefill takes twice as long for 16 tokens as the decode for one."""
    return Speed(MODEL.digest, "llama_cpp", kind, 4, (decode_s,), (2 * decode_s,), 16,
                 WINDOW_S, OUTPUT_S)  # fmt: skip


def gpu(kind: str, free: int, **changes: object) -> Profile:
    """With a GPU ten times as fast."""
    free += costs.GPU_HEADROOM_BYTES if kind == "cuda" else 0
    engines = (
        EngineProfile("llama_cpp", "CPU", "cpu"),
        EngineProfile("llama_cpp", "GPU", kind, free),
    )
    speeds = (speed("cpu", DECODE_S), speed(kind, GPU_S))
    return profile(engines=engines, speeds=speeds, **changes)  # type: ignore[arg-type]


def part(of: Problem, first: int, last: int, gpu_layers: int = 0, peer: int = 0) -> Part | None:
    """One window's."""
    return costs.part(of, of.peers[peer], [(first, last)], gpu_layers)


def test_a_resident_window_takes_its_layers_and_what_is_around_them() -> None:
    found = part(costs.problem([profile()], MODEL, SIZE), 1, 3)
    assert found is not None
    assert found.busy_s == pytest.approx(2 * DECODE_S * GROWN + WINDOW_S)
    assert found.cpu_s == pytest.approx(found.busy_s + costs.HOP_CPU_S)
    # A chunk of 8 lies between one row and the 16 that were measured.
    assert found.prefill_s == pytest.approx(2 * (DECODE_S + (2 * DECODE_S - DECODE_S) * 7 / 15))
    assert found.reading.seconds(8) == pytest.approx(
        found.prefill_s + WINDOW_S + costs.HOP_CPU_S
    ), "and in a ring, a hop besides"
    assert found.memory_bytes == 2 * (1000 + 64 * 10) + COMPUTE
    assert (found.read_s, found.streamed_bytes, found.gpu_bytes) == (0, 0, 0)


def test_the_tail_carries_output_and_logits_and_the_head_only_rows_of_the_embedding() -> None:
    of = costs.problem([profile()], MODEL, SIZE)
    found = [part(of, *window) for window in [(1, 2), (0, 1), (3, 4), (0, 4)]]
    middle, head, tail, whole = [each for each in found if each]
    assert head.memory_bytes == middle.memory_bytes, "mapped: a step touches few rows of it"
    assert tail.memory_bytes - middle.memory_bytes == 900 + LOGITS
    assert tail.busy_s - middle.busy_s == pytest.approx(OUTPUT_S)
    assert whole.memory_bytes == 4 * 1640 + COMPUTE + 900 + LOGITS


def test_a_tied_tail_needs_the_embedding() -> None:
    model = shape(
        4, hidden=16, layer_bytes=(1000,) * 4, layer_kv_bytes=(10,) * 4,
        embed_bytes=700, output_bytes=0, vocabulary=5, tied=True,
    )  # fmt: skip
    of = costs.problem([profile()], model, SIZE)
    tail, whole = part(of, 3, 4), part(of, 0, 4)
    assert tail
    assert whole
    assert tail.memory_bytes == 1640 + COMPUTE + 700 + LOGITS
    assert whole.memory_bytes == 4 * 1640 + COMPUTE + 700 + LOGITS


def test_what_does_not_fit_is_read_for_each_token() -> None:
    ram = COMPUTE + 2 * 1640 - 500
    of = costs.problem([profile(ram=ram, disk_read_bytes_per_s=1e6)], MODEL, SIZE)
    found = part(of, 1, 3)
    assert found is not None
    assert found.streamed_bytes == 500
    assert found.read_s == pytest.approx(500 / 1e6)
    assert found.room_s == pytest.approx(1500 / 1e6)


def test_nothing_streams_without_a_disk_nor_more_than_the_weights() -> None:
    ram = COMPUTE + 2 * 1640 - 500
    assert part(costs.problem([profile(ram=ram)], MODEL, SIZE), 1, 3) is None
    least = COMPUTE + 2 * 640  # the KV cache and the scratch memory stay
    for spare, fits in ((0, True), (-1, False)):
        of = costs.problem([profile(ram=least + spare, disk_read_bytes_per_s=1e6)], MODEL, SIZE)
        assert (part(of, 1, 3) is not None) == fits


def test_layers_on_a_gpu_with_memory_of_its_own_leave_the_machine_s() -> None:
    of = costs.problem([gpu("cuda", COMPUTE + 2 * 1640)], MODEL, SIZE)
    found = part(of, 0, 3, 2)
    assert found is not None
    assert found.gpu_bytes == COMPUTE + 2 * 1640
    assert found.memory_bytes == COMPUTE + 1640
    on_gpu_s = 2 * (GPU_S + 10 * costs.FILL_TOKENS / CACHE_BYTES_PER_S)
    assert found.busy_s == pytest.approx(DECODE_S * GROWN + on_gpu_s + WINDOW_S + costs.HEAD_S)
    around_s = costs.HEAD_S + costs.HOP_CPU_S
    assert found.cpu_s == pytest.approx(DECODE_S * GROWN + WINDOW_S + around_s)
    assert part(of, 0, 3, 3) is None


def test_a_unified_gpu_takes_the_machine_s_memory() -> None:
    whole = COMPUTE + 3 * 1640
    of = costs.problem([gpu("metal", 1 << 20, ram=whole, unified_memory=True)], MODEL, SIZE)
    found = part(of, 0, 3, 2)
    assert found is not None
    assert found.memory_bytes == whole
    less = gpu("metal", 1 << 20, ram=whole - 1, unified_memory=True)
    assert part(costs.problem([less], MODEL, SIZE), 0, 3, 2) is None


def test_experts_cost_the_active_ones_in_time_and_all_in_memory() -> None:
    dense = profile(speeds=())
    experts = shape(
        4, hidden=16, layer_bytes=(8000,) * 4, layer_kv_bytes=(0,) * 4,
        layer_active_bytes=(1000,) * 4, embed_bytes=0, output_bytes=0, vocabulary=5,
    )  # fmt: skip
    found = part(costs.problem([dense], experts, SIZE), 1, 2)
    assert found is not None
    assert found.memory_bytes == 8000 + COMPUTE
    assert found.busy_s == pytest.approx(1000 / USUAL_BYTES_PER_S["cpu"] + 1e-4)


def test_links_take_the_hop_half_the_round_trip_and_the_wire() -> None:
    near = profile(0, links=(Link(peer_id(1), 4e-3, 1e6),))
    of = costs.problem([near, profile(1), profile(2)], MODEL, SIZE)
    assert of.hop_s[0, 1] == pytest.approx(costs.HOP_S + 2e-3 + 64 / 1e6)
    assert of.hop_s[1, 0] == of.hop_s[0, 1], "what one of them measured holds both ways"
    assert of.chunk_s[0, 1] == pytest.approx(costs.HOP_S + 2e-3 + 8 * 64 / 1e6)
    assert of.close_s[1, 0] == pytest.approx(costs.HOP_S + 2e-3)
    assert of.hop_s[0, 2] == pytest.approx(costs.HOP_S + costs.RTT_S / 2 + 64 / costs.BYTES_PER_S)


def test_a_token_is_the_sum_of_windows_hops_and_waits() -> None:
    of = costs.problem([profile(0), profile(1)], MODEL, SIZE)
    parts = [part(of, 0, 2), part(of, 2, 4, peer=1)]
    told = costs.evaluate(of, [0, 1], 1, [p for p in parts if p])
    windows = 4 * DECODE_S * GROWN + 2 * WINDOW_S + OUTPUT_S + costs.HEAD_S
    assert told.tpot_s == pytest.approx(windows + float(of.hop_s[0, 1] + of.close_s[1, 0]))
    # In steps of four, a row takes what (1 + 3 / 15) / 4 of a step alone would.
    together = (1 + 3 / 15) / GROUP_TOKENS
    busiest = (2 * DECODE_S * GROWN + OUTPUT_S) * together
    busiest += (WINDOW_S + costs.HOP_CPU_S) / GROUP_TOKENS
    assert told.stage_s == pytest.approx(busiest)
    assert told.load_s == pytest.approx(busiest + costs.PROMPT_SHARE / 8 * parts[1].prefill_s)


def test_a_throttled_peer_makes_a_token_longer_only_where_it_has_no_rest() -> None:
    free, half = (part(costs.problem([profile(cpu_share=s)], MODEL, SIZE), 0, 4) for s in (1, 0.5))
    assert free == half, "a turn is not slowed down"
    one = costs.problem([profile(cpu_share=0.5)], MODEL, SIZE)
    assert half
    alone = costs.evaluate(one, [0], 1, [half])
    assert alone.tpot_s == pytest.approx(2 * half.busy_s)
    two = costs.problem([profile(0, cpu_share=0.5), profile(1)], MODEL, SIZE)
    first, last = part(two, 0, 1), part(two, 1, 4, peer=1)
    assert first
    assert last
    shared = costs.evaluate(two, [0, 1], 1, [first, last])
    assert shared.tpot_s < 2 * (first.busy_s + last.busy_s)


@pytest.mark.parametrize("seed", range(20))
def test_the_time_of_a_token_is_the_least_that_all_waits_allow(seed: int) -> None:
    draw = random.Random(seed)
    count, rounds = draw.randint(1, 6), draw.randint(1, 8)
    busy, read, room = ([draw.choice([0, 1, 1]) * draw.random() for _ in range(count)]
                        for _ in range(3))  # fmt: skip
    hops, least = draw.random(), [draw.random() * 3 for _ in range(count)]

    def wanted(token: float) -> float:
        waits = (costs.exposed(d, r, b, rounds, token)
                 for b, d, r in zip(busy, read, room, strict=True))  # fmt: skip
        return max(hops + sum(busy) + sum(waits), *least)

    low, high = 0.0, wanted(0.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if wanted(middle) <= middle else (middle, high)
    assert costs.token_s(rounds, hops, busy, least, read, room) == pytest.approx(high, rel=1e-9)


def test_rounds_hide_reading_as_far_as_time_and_room_go() -> None:
    assert costs.exposed(1.0, 9.0, 0.5, 1, 5.0) == 1.0
    assert costs.exposed(1.0, 9.0, 0.5, 2, 2.0) == pytest.approx(2 * 1.0 - 1.5)
    assert costs.exposed(1.0, 9.0, 0.5, 2, 9.0) == 0.0
    assert costs.exposed(1.0, 0.25, 0.5, 2, 9.0) == pytest.approx(0.75)


def test_what_is_read_ahead_leaves_as_much_to_be_waited_for_as_is_told() -> None:
    """X = 100 bytes at 100 a second: what reading F ahead does not hide is waited for."""
    streams = Part(0.5, 0.5, 0.0, 1.0, 9.0, 1000, 0, 100, 0)
    assert streams.ahead_bytes(1, 5.0) == 0
    assert streams.ahead_bytes(2, 9.0) == 100
    assert streams.ahead_bytes(3, 9.0) == 50
    waits_s = streams.waits_s(2, 2.0)
    assert 0 < waits_s < 1
    assert 100 - streams.ahead_bytes(2, 2.0) == pytest.approx(100 * waits_s)
    resident = Part(0.5, 0.5, 0.0, 0.0, 9.0, 1000, 0, 0, 0)
    assert resident.ahead_bytes(2, 9.0) == -1


@pytest.mark.parametrize("block", range(10))
def test_the_tables_say_what_part_says_of_every_window(block: int) -> None:
    compared = sum(_compared(small(seed, (3, 3), (6, 8, 12)))
                   for seed in range(6 * block, 6 * block + 6))  # fmt: skip
    assert compared > 500


def _compared(of: Problem) -> int:
    """How many windows."""
    compared = 0
    for rounds in (1, 2):
        tables = Tables(of, rounds)
        assert tables.peers[0].fits.shape == (tables.width + 1,) * 2
        for peer, each in itertools.product(range(3), ("peers", "choices")):
            table = getattr(tables, each)[peer]
            for at in np.ndindex(*table.fits.shape):
                if at[-2] < at[-1]:
                    compared += _agrees(of, tables, peer, table, at)
                else:
                    assert not table.fits[at]
    return compared


def _agrees(of: Problem, tables: Tables, peer: int, table: object, at: tuple[int, ...]) -> bool:
    windows = costs.windows(of.shape.layers, tables.rounds, (at[-2], at[-1]))
    layers = int(table.gpu_layers[at])  # type: ignore[attr-defined]
    found = costs.part(of, of.peers[peer], windows, layers)
    allowed = not any(of.shape.refusal(*window) for window in windows)
    assert bool(table.fits[at]) == (allowed and found is not None)  # type: ignore[attr-defined]
    if not allowed or found is None:
        return False
    for name in ("busy_s", "cpu_s", "group_s", "group_cpu_s", "prefill_s", "read_s", "room_s"):
        assert math.isclose(getattr(table, name)[at], getattr(found, name), abs_tol=1e-12), name
    share = of.peers[peer].profile.cpu_share
    load_s = found.load_s(share, of.size.batch_tokens)
    assert math.isclose(table.load_s[at], load_s)  # type: ignore[attr-defined]
    token_s = 3.1 * found.busy_s  # no throttling is just allowed by it
    wanted = found.busy_s + found.waits_s(tables.rounds, token_s)
    if found.cpu_s > of.peers[peer].profile.cpu_share * token_s:
        wanted = np.inf
    assert math.isclose(table.token_s(token_s)[at], wanted)  # type: ignore[attr-defined]
    return True


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("rounds", [1, 2])
def test_in_wide_rounds_few_numbers_of_gpu_layers_are_as_good_as_all(
    seed: int, rounds: int
) -> None:
    width = ALL_CHOICES_WIDTH + 4
    kind, disk = ("cuda", "metal")[seed % 2], (1e6, 1e5)[seed // 6]
    draw = random.Random(seed)
    model = shape(
        width * rounds, hidden=16, layer_bytes=(1000,) * (width * rounds),
        layer_kv_bytes=(10,) * (width * rounds), embed_bytes=700, output_bytes=900, vocabulary=5,
    )  # fmt: skip
    able = gpu(kind, draw.randint(20_000, 50_000), ram=draw.randint(15_000, 90_000),
               unified_memory=kind == "metal", disk_read_bytes_per_s=disk)  # fmt: skip
    of = costs.problem([able], model, SIZE)
    tables = Tables(of, rounds)
    token_s = 100.0 if rounds > 1 else 1.0  # enough to hide all reading
    few = tables.choices[0].token_s(token_s).min(axis=0)
    for first, last in itertools.combinations(range(0, width + 1, 2), 2):
        windows = costs.windows(of.shape.layers, rounds, (first, last))
        every = [costs.part(of, of.peers[0], windows, n) for n in range(last - first + 1)]
        each = [p.busy_s + p.waits_s(rounds, token_s) for p in every if p]
        best = min(each, default=np.inf)
        assert few[first, last] == pytest.approx(best), (first, last)
