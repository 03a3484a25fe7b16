"""Macs on each other's cables are planned as one peer, where that is clearly faster."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from peer.errors import NoPlan
from peer.planning import costs, drafts, making, together
from peer.planning.islands import ROWS, Found, as_peers, merged, possible, seen
from peer.planning.plan import Plan, PlanId, PlanState, Split, check
from peer.planning.problems import Size, logits_bytes
from peer.planning.profile import (
    EngineProfile,
    Fit,
    Link,
    ModelOffer,
    ModelShape,
    Port,
    Profile,
    Speed,
)
from peer.planning.running import Running
from peer.planning.situation import news
from peer.planning.split import BATCH_TOKENS
from peer.planning.split import solve as plain
from peer.planning.wishes import Wishes

MACS = ("maca" * 4, "macb" * 4, "macc" * 4)
PC = "deskdeskdeskdesk"
MIB = 1 << 20
SHAPE = ModelShape(
    model="big", digest="d" * 64, architecture="llama", layers=32, hidden=4096, context=8192,
    layer_bytes=(220 * MIB,) * 32, layer_kv_bytes=(4096,) * 32, head_bytes=MIB,
    embed_bytes=300 * MIB, output_bytes=400 * MIB, tied=False, cut_starts=tuple(range(32)),
    vocabulary=128256, fits=(Fit("mlx", ranks=(2, 4)),),
)  # fmt: skip


SPEED = Speed(SHAPE.digest, "mlx", "metal", 8, (1.2e-3,), (0.16,), 512, 1e-4, 2e-3)


def port(own: str, other: str, number: int, rdma: bool = True) -> Port:
    return Port(
        f"{own[3]}{other[3]}".upper() * 4, f"{other[3]}{own[3]}".upper() * 4, str(number),
        f"en{number}", 8e10, (), f"rdma_en{number}" if rdma else "",
    )  # fmt: skip


def mac(peer_id: str, others: tuple[str, ...], rdma: bool = True, **changes: Any) -> Profile:
    """A Mac with a cable to each of the others, and a measured speed: 40 ms a token alone."""
    values: dict[str, Any] = {
        "memory_total_bytes": 24 << 30, "memory_available_bytes": 16 << 30,
        "engines": (EngineProfile("mlx", "M4 Max", "metal", 16 << 30, 24 << 30),),
        "unified_memory": True, "threads": 8, "speeds": (SPEED,), "islands": "auto",
        "ports": tuple(port(peer_id, other, n, rdma) for n, other in enumerate(others, 1)),
        "links": tuple(Link(other, 4e-4, 1e8) for other in others),
    } | changes  # fmt: skip
    return Profile(peer_id, f"mac-{peer_id[3]}", "macos", 10, **values)


def pair(**changes: Any) -> list[Profile]:
    a, b, _ = MACS
    return [mac(a, (b,), **changes), mac(b, (a,), **changes)]


def with_room(size_bytes: int) -> list[Profile]:
    engine = EngineProfile("mlx", "M4 Max", "metal", size_bytes, 24 << 30)
    return pair(memory_available_bytes=size_bytes, engines=(engine,))


def solved(profiles: list[Profile], wishes: Wishes | None = None) -> Split:
    return together.solve(profiles, SHAPE, wishes)


def test_two_macs_with_rdma_compute_each_layer_together() -> None:
    split = solved(pair())
    (window,) = split.windows
    assert {window.peer_id, *window.island} == set(MACS[:2])
    assert (window.first, window.last, window.backend) == (0, 32, "mlx")
    assert window.devices == (("", "rdma_en1"), ("rdma_en1", ""))
    assert not check(Plan(PlanId(1, 1), window.peer_id, SHAPE, split))
    forecast = costs.forecast(pair(), SHAPE, split)
    alone = costs.forecast(pair()[:1], SHAPE, plain(pair()[:1], SHAPE))
    assert forecast is not None
    assert alone is not None
    assert 0.5 * alone.tpot_s < forecast.tpot_s < 0.75 * alone.tpot_s


def test_an_island_is_not_worth_it_where_its_sums_take_longer_than_they_save() -> None:
    split = solved(pair(rdma=False))  # over TCP, 64 sums of 0.3 ms for a token of 40 ms
    assert not any(window.island for window in split.windows)


def test_an_island_holds_what_none_of_its_peers_could() -> None:
    split = solved(with_room(5 << 30))
    assert sum(window.last - window.first for window in split.windows) == 32
    assert all(window.memory_bytes <= 5 << 30 for window in split.windows)


def test_who_does_not_want_to_or_has_no_cable_is_in_no_island() -> None:
    a, b, c = MACS
    assert possible(pair(islands="off"), SHAPE) == ()
    assert possible([mac(a, (b,)), mac(b, ())], SHAPE) == ()  # one end's word is no cable
    assert possible(pair(speeds=()), SHAPE) == ()
    assert possible(pair(leaving=True), SHAPE) == ()
    llama = (EngineProfile("llama_cpp", "CPU", "cpu", 0, 0),)
    assert possible(pair(engines=llama), SHAPE) == ()
    unlike = [mac(a, (b,), weights="small"), mac(b, (a,))]
    assert possible(unlike, SHAPE) == ()
    (found,) = possible([mac(a, (b, c)), mac(b, (a, c)), mac(c, (a, b))], SHAPE)
    assert len(found.ranks) == 2, "three heads' shares of two and four ranks there are not"


def test_an_island_and_another_peer_make_a_ring() -> None:
    a, b, _ = MACS
    desk = Profile(
        PC, "desk", "linux", 16, 64 << 30, 6 << 30, threads=16,
        engines=(EngineProfile("llama_cpp", "RTX", "cuda", 5 << 30, 24 << 30),),
        speeds=(Speed(SHAPE.digest, "llama_cpp", "cuda", 16, (3e-4,), (0.02,), 512),),
        links=(Link(a, 3e-4, 1e9), Link(b, 3e-4, 1e9)),
    )  # fmt: skip
    macs = with_room(4 << 30)
    split = solved([*macs, desk])
    plan = Plan(PlanId(1, 1), PC, SHAPE, split)
    assert not check(plan)
    assert set(plan.peers) == {a, b, PC}
    assert len(plan.ring) == 2
    assert costs.forecast([*macs, desk], SHAPE, split) is not None


def test_after_a_loss_and_with_fixed_windows_there_are_no_islands() -> None:
    a, b, _ = MACS
    before = plain(pair(), SHAPE)
    for wishes in (Wishes(before=before), Wishes(spread_all=True), Wishes(pinned={a: (0, 16)})):
        assert not any(window.island for window in solved(pair(), wishes).windows)
    assert solved(pair(), Wishes(without=frozenset((b,)))).windows[0].island == ()


def test_the_slowest_rules_and_each_holds_the_ends_whole() -> None:
    fast, slow = pair()
    slow = replace(slow, speeds=(replace(slow.speeds[0], correction=2.0),))
    one = merged([fast, slow], SHAPE, rdma=True)
    assert one.peer_id == fast.peer_id
    assert one.speeds[0].decode_s[0] > slow.speeds[0].decode_s[0]  # twice as slow, shared by two
    assert ROWS == BATCH_TOKENS
    size = Size(8192, 8192, BATCH_TOKENS)
    besides = logits_bytes(SHAPE, size) + SHAPE.embed_bytes + SHAPE.output_bytes
    assert 0 < (32 << 30) - besides - one.memory_available_bytes < 1 << 29  # a step's arrays


def test_a_split_with_an_island_that_is_gone_cannot_be_forecast() -> None:
    split = solved(pair())
    first = split.windows[0].peer_id
    there = [p for p in pair() if p.peer_id == first]
    assert seen(there, SHAPE, split) == []
    assert costs.forecast(there, SHAPE, split) is None
    assert Found(MACS[:2]).devices == ()


def test_macs_that_do_not_reach_each_other_are_no_island_whatever_cable_there_is() -> None:
    one, other = pair()
    apart = [replace(one, unreachable=(other.peer_id,)), other]
    assert possible(apart, SHAPE) == ()
    plan = Plan(PlanId(1, 1), one.peer_id, SHAPE, solved(pair()))
    assert making._broken(pair(), plan) == ""
    assert "do not reach each other any more" in making._broken(apart, plan)


def test_a_draft_model_needs_room_in_the_first_of_an_island_alone() -> None:
    small = replace(
        SHAPE, model="small", digest="e" * 64, layers=4, layer_bytes=(10 * MIB,) * 4,
        layer_kv_bytes=(1024,) * 4, cut_starts=(0, 1, 2, 3), embed_bytes=MIB, output_bytes=MIB,
        vocabulary=1000,
    )  # fmt: skip
    split = solved(pair())
    head, (other,) = split.windows[0].peer_id, split.windows[0].island
    offers = {
        head: [
            ModelOffer(SHAPE, 2.0, SHAPE.window_parts(0, 32)),
            ModelOffer(small, 1.0, small.window_parts(0, 4)),
        ]
    }
    wishing = pair(draft_wanted="small")
    assert drafts.with_draft(split, SHAPE, wishing, offers, False).draft == small.digest
    used = costs.forecast(pair(), SHAPE, split)
    assert used is not None
    (both,) = seen(pair(), SHAPE, split)
    (part,) = used.peers
    together_bytes = both.memory_available_bytes - part.memory_bytes
    alone = next(p for p in wishing if p.peer_id == head)
    assert drafts._free_bytes(split, SHAPE, wishing, alone) <= together_bytes // 2
    assert other != head


def test_an_island_goes_around_once_also_where_other_rings_go_around_more_often() -> None:
    for wishes in (Wishes(rounds=2), Wishes()):
        split = together._merged(
            as_peers(pair(), SHAPE, possible(pair(), SHAPE)), SHAPE, wishes, possible(pair(), SHAPE)
        )
        assert not check(Plan(PlanId(1, 1), split.windows[0].peer_id, SHAPE, split))
        assert any(window.island for window in split.windows)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize(
    "odd",
    [
        {"speeds": ()},
        {"speeds": (replace(SPEED, prefill_s=()),)},
        {"speeds": (replace(SPEED, decode_s=()),)},
        {"speeds": (replace(SPEED, decode_s=(0.0,), prefill_s=(0.0,)),)},
        {"speeds": (replace(SPEED, correction=0.0),)},
        {"memory_available_bytes": 0},
        {"memory_available_bytes": 1 << 60, "memory_total_bytes": 1 << 60},
    ],
    ids=lambda odd: str(odd)[:40],
)
def test_peers_that_say_nonsense_are_in_no_island(
    odd: dict[str, Any], which: tuple[int, ...]
) -> None:
    """What another machine says of itself must not end the coordinator."""
    planned = solved(pair())
    told = [replace(p, **odd) if i in which else p for i, p in enumerate(pair())]
    assert possible(told, SHAPE) == ()
    assert not any(window.island for window in solved([*told, mac(PC, ())]).windows)
    if "speeds" in odd:  # of a plan that runs already
        (island,) = seen(told, SHAPE, planned)
        assert island.speeds == ()
        assert costs.forecast(told, SHAPE, planned) is not None


def test_a_cable_of_no_speed_at_all_is_a_slow_one() -> None:
    slow = [replace(p, ports=(replace(p.ports[0], bits_per_s=5e-324),)) for p in pair()]
    assert possible(slow, SHAPE)
    assert not any(window.island for window in solved(slow).windows)


def test_a_model_whose_shape_contradicts_itself_has_no_islands() -> None:
    odd = replace(SHAPE, fits=(Fit("mlx", layer_bytes=(1, 2, 3), ranks=(2,)),))
    assert possible(pair(), odd) == ()
    with pytest.raises(NoPlan):
        together.solve(pair(), odd)


def test_what_no_ring_can_hold_is_said_of_peers_and_who_joins_an_island_is_named() -> None:
    with pytest.raises(NoPlan, match="2 peers here can give"):
        solved(with_room(3 << 30))
    first, second = pair()
    alone = Plan(PlanId(1, 1), first.peer_id, SHAPE, plain([first], SHAPE))
    current = [Running(PlanState(alone, "serving"), 0.0)]
    told = news(current, solved(pair()), "", lambda peer_id: peer_id)
    assert told == f"{second.peer_id} joined"
    island = Plan(PlanId(1, 2), first.peer_id, SHAPE, solved(pair()))
    now = [Running(PlanState(island, "serving"), 0.0)]
    left = plain([p for p in pair() if p.peer_id in island.split.windows[0].island], SHAPE)
    assert news(now, left, "", lambda peer_id: peer_id) == "a new split"


def test_why_an_island_is_left_out_is_told_of_each_of_its_peers() -> None:
    a, b, c, d = *MACS, "macd" * 4
    split = solved([mac(a, (b,)), mac(b, (a,)), mac(c, (d,)), mac(d, (c,))])
    used = {peer_id for w in split.windows for peer_id in (w.peer_id, *w.island)}
    assert len(used) == 2
    assert {out.peer_id for out in split.left_out} == {a, b, c, d} - used
    assert len({out.why for out in split.left_out}) == 1
