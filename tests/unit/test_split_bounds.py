"""Splits of absurd shapes and peers: whatever is planned can be told, and the rest is refused."""

from __future__ import annotations

import tracemalloc

import pytest
from msgspec.structs import replace

from peer.errors import NoPlan
from peer.planning.plan import Plan, PlanId, PlanState
from peer.planning.profile import EngineProfile, ModelShape, Profile
from peer.planning.split import Wishes, solve, unusable
from peer.protocol import Plans, decode_control, encode
from tests.coordinator import A, B, profile, shape

HUGE = 1 << 60
MOST = 1 << 50  # that a peer is believed to have


def with_gpus(peer_id: str, count: int) -> Profile:
    gpus = (EngineProfile("fake", f"GPU {i}", "cuda", MOST, MOST) for i in range(count))
    return profile(peer_id, engines=tuple(gpus))


def demand_tellable(profiles: list[Profile], model: ModelShape, context: int = 0) -> None:
    split = solve(profiles, model, Wishes(context=context))
    plans = Plans(1, (PlanState(Plan(PlanId(1, 1), A, model, split), "loading"),))
    assert decode_control(encode(plans)) == plans


def test_memory_of_many_huge_gpus_is_no_more_than_a_message_can_tell() -> None:
    profiles = [with_gpus(A, 64), with_gpus(B, 64)]
    demand_tellable(profiles, shape())
    demand_tellable(
        profiles, replace(shape(layers=2), layer_bytes=(MOST * 8,) * 2, layer_active_bytes=(1, 1))
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_bytes": (HUGE,) * 12},
        {"layer_kv_bytes": (HUGE // 512,) * 12},
        {"embed_bytes": HUGE, "output_bytes": HUGE},
        {"embed_bytes": HUGE // 2, "hidden": 0},  # a row of logits for each byte of it
    ],
)
def test_a_shape_whose_sums_no_message_can_tell_is_refused(changes: dict[str, object]) -> None:
    model = replace(shape(), **changes)
    assert "the header of small" in unusable(model)
    with pytest.raises(NoPlan, match="PiB"):
        solve([with_gpus(A, 64)], model)
    assert unusable(shape()) == ""


def test_a_context_whose_cache_no_number_holds_is_given_up_for_less() -> None:
    model = replace(shape(layers=2), layer_kv_bytes=(1 << 32,) * 2, context=1 << 31)
    demand_tellable([with_gpus(A, 2)], model, context=1 << 31)
    window = solve([with_gpus(A, 2)], model, Wishes(context=1 << 31)).windows[0]
    assert window.memory_bytes <= HUGE


def test_a_header_of_absurdly_many_layers_takes_no_more_memory_than_any_other() -> None:
    able = [profile(p, memory_mib=1 << 16, spread_all=False) for p in (A, B)]
    tracemalloc.start()
    try:
        split = solve(able, shape(layers=4096))
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {window.peer_id for window in split.windows} | {
        left.peer_id for left in split.left_out
    } == {A, B}
    assert len(split.left_out) == 1, "a reason for it is what took gigabytes"
    assert most_bytes < 100 << 20


def test_a_reason_that_is_as_long_as_may_be_is_still_a_message() -> None:
    model = replace(shape("m" * 128), whole_why="w" * 1000)
    demand_tellable([profile(A), profile(B)], model)
