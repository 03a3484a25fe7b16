"""planning.pipeline: prompts in chunks, added up by hand; and which chunks the planner takes."""

from __future__ import annotations

import itertools

import pytest
from msgspec.structs import replace

from peer.planning import costs, halda
from peer.planning.pipeline import (
    CHUNKS,
    GROUP_TOKENS,
    LONG_TOKENS,
    Curve,
    Reading,
    Ways,
    best_chunk,
    curve,
    in_flight,
    ttft_s,
)
from peer.planning.plan import Forecast, Split
from peer.planning.profile import EngineProfile, Link, Profile, Speed
from peer.planning.split import BATCH_TOKENS, Wishes, solve
from tests.clusters import peer_id
from tests.plans import shape

EVEN = Curve(((1.0, 1.0), (512.0, 512.0)))  # a row takes as long in any chunk
NO_WAY = Ways()


def stage(row_s: float, by: Curve = EVEN, **changes: float) -> Reading:
    return Reading(each=((row_s, by),), **changes)


# How long a prompt takes -----------------------------------------------------------------------


def test_one_stage_reads_one_chunk_after_the_other() -> None:
    alone = stage(0.01, fixed_s=0.5, end_s=0.25)
    assert ttft_s(200, 100, [alone], NO_WAY, 1) == pytest.approx(2 * 1.5 + 0.25)
    assert ttft_s(250, 100, [alone], NO_WAY, 1) == pytest.approx(2 * 1.5 + 1.0 + 0.25)


def test_the_first_chunk_visits_all_stages_and_the_others_follow_the_slowest() -> None:
    stages = [stage(0.01), stage(0.02)]
    assert ttft_s(500, 100, stages, NO_WAY, 1) == pytest.approx(3.0 + 4 * 2.0)
    assert ttft_s(100, 100, stages, NO_WAY, 1) == pytest.approx(3.0)
    assert ttft_s(40, 100, stages, NO_WAY, 1) == pytest.approx(0.4 + 0.8), "it has no more rows"


def test_a_link_that_is_busy_with_a_chunk_is_a_stage_of_the_pipeline() -> None:
    """Each of 100 rows takes it up for 0.05 s: longer than either stage computes."""
    stages, ways = [stage(0.01), stage(0.02)], Ways(row_s=0.05, busiest_s=0.05)
    assert ttft_s(500, 100, stages, ways, 1) == pytest.approx(3.0 + 5.0 + 4 * 5.0)


def test_no_more_chunks_are_on_their_way_than_there_are_stages() -> None:
    """A way of 6 s around two stages of 1 s: a chunk comes around every (1 + 1 + 6) / 2 s."""
    stages, ways = [stage(0.01), stage(0.01)], Ways(along_s=5.0, closing_s=1.0)
    assert in_flight(2, 1) == 2
    assert ttft_s(300, 100, stages, ways, 1) == pytest.approx(8.0 + 2 * 4.0)


def test_in_several_rounds_a_chunk_has_the_ring_to_itself() -> None:
    stages = [stage(0.01), stage(0.01)]
    assert in_flight(2, 3) == 1
    assert ttft_s(300, 100, stages, NO_WAY, 3) == pytest.approx(3 * 2.0)


def test_a_disk_and_a_throttled_processor_hold_every_chunk_up() -> None:
    slow = stage(0.01, fixed_s=1.0, read_s=3.0, slower=2.0)
    assert slow.computing_s(100) == pytest.approx(2.0)
    assert ttft_s(200, 100, [slow], NO_WAY, 1) == pytest.approx(2 * (2 * 2.0 + 3.0))


# Short chunks ----------------------------------------------------------------------------------


def test_between_what_was_measured_a_chunk_lies_on_a_line() -> None:
    by = curve("cpu", 512, 1.5, ((16, 1.5), (64, 1.25)))
    assert by.took(1) == 1.5
    assert by.took(16) == 16 * 1.5
    assert by.took(40) == pytest.approx((16 * 1.5 + 64 * 1.25) / 2)
    assert by.took(512) == 512
    assert by.took(2000) == 2000


def test_a_longer_chunk_never_takes_less_however_noisy_what_was_measured_is() -> None:
    by = curve("cpu", 128, 40.0, ((16, 0.5), (64, 9.0), (300, 2.0)))
    took = [by.took(rows) for rows in range(1, 200)]
    assert took == sorted(took)
    assert by.took(128) == 128


def test_where_nothing_was_measured_short_chunks_take_more_for_each_row() -> None:
    for kind in ("cpu", "cuda", "metal"):
        by = curve(kind, 512, 1.0)
        rows = [by.took(at) / at for at in (16, 64, 256, 512)]
        assert rows == sorted(rows, reverse=True)
        assert rows[0] > 1.4
        assert rows[-1] == 1.0


def test_a_token_of_a_group_takes_no_more_than_one_that_is_alone() -> None:
    gpu = curve("cuda", 512, 12.0)
    assert gpu.group == pytest.approx(gpu.took(GROUP_TOKENS) / 12 / GROUP_TOKENS)
    assert gpu.group < 0.5
    assert curve("cpu", 512, 1.0).group == 1.0
    assert curve("cpu", 1, 1.0).group == 1.0


# The chunk that is taken -----------------------------------------------------------------------


def test_a_ring_of_one_reads_whole_batches() -> None:
    assert best_chunk([stage(0.01, curve("cpu", 512, 1.5))], NO_WAY, 1, 512) == 512


def test_no_chunk_that_is_tried_suits_short_and_long_prompts_better() -> None:
    stages, ways = [stage(2e-3, curve("cpu", 512, 1.5))] * 3, Ways(along_s=2e-3)
    chunk = best_chunk(stages, ways, 1, 512)

    def cost(rows: int) -> float:
        return sum(ttft_s(n, rows, stages, ways, 1) / n for n in (512, LONG_TOKENS))

    assert cost(chunk) <= 1.01 * min(map(cost, CHUNKS))
    assert chunk < 512


def test_chunks_are_longer_the_longer_the_way_is_and_never_more_than_a_batch() -> None:
    stages = [stage(2e-3, curve("cpu", 512, 1.5))] * 2
    chunks = [best_chunk(stages, Ways(along_s=s), 1, 512) for s in (0.0, 0.05, 0.5, 5.0)]
    assert chunks == sorted(chunks)
    assert chunks[0] < chunks[-1]
    assert best_chunk(stages, Ways(along_s=5.0), 1, 100) == 100


def test_in_several_rounds_there_is_nothing_to_fill() -> None:
    assert best_chunk([stage(2e-3, curve("cpu", 512, 1.5))] * 2, NO_WAY, 2, 512) == 512


# By the planner --------------------------------------------------------------------------------

MODEL = shape(
    30, hidden=576, layer_bytes=(2 << 20,) * 30, layer_kv_bytes=(768,) * 30, context=2048,
    embed_bytes=28 << 20, output_bytes=0, tied=True, vocabulary=49152,
)  # fmt: skip
FAST_ETHERNET, GIGABIT = 1.17e7, 1.17e8  # bytes a second
# SmolLM2 on one core here.
CPU = Speed(
    MODEL.digest, "llama_cpp", "cpu", 1, (1.79e-4,), (0.0751,), 512, 6.5e-5, 1.15e-3,
    short_chunks=((16, 1.5), (64, 1.03)),
)  # fmt: skip


def peers(count: int, link: tuple[float, float], speed: Speed = CPU) -> list[Profile]:
    """Alike, and all with the same link: (round trip, bytes a second)."""
    gpu = (EngineProfile("llama_cpp", "GPU", "cuda", 8 << 30),) if speed.kind == "cuda" else ()
    return [
        Profile(
            peer_id(i), f"peer{i}", "linux", 1, 4 << 30, 4 << 30,
            engines=(EngineProfile("llama_cpp", "CPU", "cpu"), *gpu), speeds=(speed,), threads=1,
            links=tuple(Link(peer_id(j), *link) for j in range(count) if j != i),
        )
        for i in range(count)
    ]  # fmt: skip


def planned(profiles: list[Profile]) -> tuple[Split, Forecast]:
    split = solve(profiles, MODEL, Wishes(spread_all=True))
    told = costs.forecast(profiles, MODEL, split)
    assert told
    return split, told


def prompt_s(profiles: list[Profile], split: Split, tokens: int) -> float:
    """The TTFT of a prompt of so many tokens."""
    size = costs.Size(split.context, split.kv_cells, split.batch_tokens)
    of = costs.problem(profiles, MODEL, size)
    index = {able.peer_id: i for i, able in enumerate(of.peers)}
    order = [index[w.peer_id] for w in split.windows]
    parts = [costs.part(of, of.peers[i], [(w.first, w.last)], w.last - w.first)
             for i, w in zip(order, split.windows, strict=True)]  # fmt: skip
    reading = [part.reading for part in parts if part]
    wires = [float(of.wire_s[a, b]) for a, b in itertools.pairwise(order)]
    hops = [float(of.hop_s[a, b]) for a, b in itertools.pairwise(order)]
    closing = float(of.close_s[order[-1], order[0]]) if wires else 0.0
    ways = Ways(sum(hops) - sum(wires), sum(wires), max(wires, default=0.0), closing)
    return ttft_s(tokens, split.chunk_tokens, reading, ways, 1)


@pytest.mark.parametrize(
    ("output_s", "rate", "layers", "times"),
    [(1e-4, GIGABIT, 15, 1.8), (1e-4, FAST_ETHERNET, 15, 1.75), (1.15e-3, GIGABIT, 16, 1.7)],
)
def test_two_equal_peers_read_a_long_prompt_nearly_twice_as_fast_as_one(
    output_s: float, rate: float, layers: int, times: float
) -> None:
    """On a slower link two steps in flight are too few to hide it. Where the output head takes as
    long as six layers, many answers at once want a head with more than half of the layers."""
    speed = replace(CPU, output_s=output_s)
    two, one = peers(2, (3e-4, rate), speed), peers(1, (3e-4, rate), speed)
    (split, told), (alone, told_alone) = planned(two), planned(one)
    assert [w.last for w in split.windows] == [layers, 30]
    assert 64 <= split.chunk_tokens <= 128
    assert told.chunk_tokens == split.chunk_tokens
    assert (alone.chunk_tokens, alone.slots) == (BATCH_TOKENS, 32)
    assert told.ttft_s == pytest.approx(prompt_s(two, split, 512))
    assert told_alone.ttft_s == pytest.approx(prompt_s(one, alone, 512))
    assert prompt_s(one, alone, 1500) / prompt_s(two, split, 1500) >= times


def test_a_forecast_is_for_the_chunks_of_its_split() -> None:
    profiles = peers(2, (3e-4, FAST_ETHERNET))
    split, told = planned(profiles)
    slower = costs.forecast(profiles, MODEL, replace(split, chunk_tokens=512))
    assert slower
    assert slower.chunk_tokens == 512
    assert slower.ttft_s > 1.2 * told.ttft_s
    assert slower.tpot_s == told.tpot_s


def test_links_of_long_latency_and_gpus_get_longer_chunks() -> None:
    near = planned(peers(2, (3e-4, FAST_ETHERNET)))[0].chunk_tokens
    far = planned(peers(2, (0.2, FAST_ETHERNET)))[0].chunk_tokens
    gpu = Speed(MODEL.digest, "llama_cpp", "cuda", 1, (1e-5,), (5e-4,), 512, 6e-5, 1e-4)
    fast = planned(peers(2, (3e-4, GIGABIT), gpu))[0].chunk_tokens
    assert near < far
    assert 256 <= fast <= 512


# Many answers ----------------------------------------------------------------------------------


def test_two_equal_peers_give_many_answers_nearly_twice_as_many_tokens() -> None:
    two, one = planned(peers(2, (3e-4, GIGABIT))), planned(peers(1, (3e-4, GIGABIT)))
    assert one[1].stage_s / two[1].stage_s >= 1.8
    assert abs(two[0].windows[0].last - 15) <= 1, "the head of a prompt waits for no output head"


def test_a_link_may_be_what_all_answers_wait_for() -> None:
    bytes_per_s = 1e5
    _, told = planned(peers(2, (3e-4, bytes_per_s)))
    assert told.stage_s == pytest.approx(4 * MODEL.hidden / bytes_per_s)
    assert told.load_s == pytest.approx(told.stage_s * (1 + costs.PROMPT_SHARE))


def test_where_hops_are_long_the_groups_on_their_way_are_too_few() -> None:
    """Two groups of four rows: eight tokens each time around."""
    _, told = planned(peers(2, (1.0, GIGABIT)))
    assert told.stage_s == pytest.approx((told.hops_s / GROUP_TOKENS + 8e-3) / 2, rel=0.01)


def test_a_link_too_slow_for_many_answers_is_gone_without() -> None:
    """At 300 kB a second a row, and two of prompts, take it up for 23 ms; one peer takes 17."""
    for rate, windows in ((GIGABIT, 2), (3e5, 1)):
        size = costs.Size(2048, 2048, BATCH_TOKENS)
        of = costs.problem(peers(2, (3e-4, rate)), MODEL, size)
        ring = halda.solve(of, halda.Wanted("throughput"))
        assert ring
        assert len(ring.order) == windows
