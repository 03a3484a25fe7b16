"""Whom to measure when, and what is told: over links that are computed, in time that is."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.cluster import probing as p
from peer.planning.profile import Link
from peer.protocol import CHUNK_BYTES_MAX
from tests.wires import TIMING, Wire, World, padded

A, B, C = "a" * 16, "b" * 16, "c" * 16

# When ---------------------------------------------------------------------------------------------


def test_a_link_is_measured_three_times_soon_and_then_about_every_minute() -> None:
    world = World()
    world.add(A, Wire())
    world.run(900)
    pauses = [b - a for a, b in itertools.pairwise(world.starts())]
    assert all(8 <= pause <= 13 for pause in pauses[:2])
    assert all(48 <= pause <= 73 for pause in pauses[2:])
    assert len({round(pause, 2) for pause in pauses}) == len(pauses)  # they do not march in step
    other = World(seed="another peer")
    other.add(A, Wire())
    other.run(900)
    assert world.starts() != other.starts()
    assert World().starts() == []
    assert p.Probing(TIMING, Random(1)).deadline == math.inf


def test_one_link_is_measured_at_a_time_and_many_links_share_the_minute() -> None:
    world = World()
    peers = [f"{number:02d}".translate(str.maketrans("01", "yz")) * 8 for number in range(60)]
    for peer_id in peers:
        world.add(peer_id, Wire(125e6))
    world.run(1800)
    runs = [(who, len(list(s))) for who, s in itertools.groupby(s.peer_id for _, s in world.sent)]
    assert {who for who, _ in runs} == set(peers)
    assert {probes for _, probes in runs} == {8 + 3 + 10}  # never mixed: small, ramp, train
    later = [s for at, s in world.sent if at > 1600]
    assert sum(s.padding_bytes for s in later) / 1200 < 13 * 1.5 * 2**20 / 60


def test_another_peers_probe_makes_this_one_wait_but_not_for_ever() -> None:
    world = World()
    world.add(A, Wire())
    while not world.sent:
        world.feed(p.Asked())
        world.run(0.05)
        assert world.now < 1010
    assert world.sent[0][0] > 1005
    world = World()
    world.add(A, Wire())
    world.run(0.2)
    world.feed(p.Asked())
    world.run(0.8)
    assert world.told


def test_a_peer_with_a_new_address_is_measured_anew() -> None:
    world = World()
    world.add(A, Wire(125e6, 0.0002))
    world.run(500)
    assert len(world.told) == 1
    world.wires[A] = Wire(2.5e6, 0.005)
    world.feed(p.Here(A, "10.0.0.2"))
    world.run(1)
    assert len(world.told) == 1  # nothing new about where it is
    world.feed(p.Here(A, "192.168.1.7"))
    world.run(1.5)
    assert len(world.told) == 2
    assert world.link.rtt_s == pytest.approx(0.005, rel=0.05)
    assert world.link.bytes_per_s == pytest.approx(2.5e6, rel=0.1)


# Not in anybody's way -----------------------------------------------------------------------------


def test_while_this_peer_is_busy_nothing_is_sent_and_afterwards_it_is_measured_soon() -> None:
    world = World(busy=lambda now: now < 1100)
    world.add(A, Wire())
    world.run(99.9)
    assert not world.sent
    world.run(6)
    assert world.link.bytes_per_s > 0


def test_while_the_other_is_busy_it_is_asked_by_one_small_probe_now_and_then() -> None:
    world = World()
    world.add(A, Wire(busy=lambda now: now < 1100))
    world.run(99.9)
    assert 15 <= len(world.sent) <= 25
    assert padded(world) == 0
    assert not world.told
    world.run(6)
    assert world.link.bytes_per_s > 0


@pytest.mark.parametrize("here", [True, False], ids=["this peer", "the other"])
def test_who_is_busy_for_ten_minutes_has_its_round_trip_measured_only(here: bool) -> None:
    world = World(busy=lambda now: here and now < 1900)
    world.add(A, Wire(rtt_s=0.003, busy=lambda now: not here and now < 1900))
    world.run(595)
    assert not world.told
    world.run(300)
    assert [link.bytes_per_s for _, link in world.told] == [0.0]
    assert world.link.rtt_s == pytest.approx(0.003, rel=0.01)
    assert padded(world) == 0
    world.run(900)
    assert world.link.bytes_per_s == pytest.approx(125e6, rel=0.1)


def test_a_measurement_ends_at_once_where_somebody_becomes_busy() -> None:
    world = World()
    world.add(A, Wire(12.5e6))
    while padded(world) < 300 << 10:
        world.run(0.001)
    before, cut = padded(world), world.now
    world.busy = lambda now: now < 1010
    world.run(1)
    assert padded(world) == before
    assert all(at <= cut for at, _ in world.sent)
    world.run(15)
    assert world.link.bytes_per_s == pytest.approx(12.5e6, rel=0.1)


# What is told -------------------------------------------------------------------------------------


def test_only_news_is_told() -> None:
    world = World()
    wire = world.add(A, Wire(12.5e6, 0.002))
    world.run(1200)
    assert len(world.told) == 1
    wire.bytes_per_s, wire.rtt_s = 1.1 * 12.5e6, 0.0022
    world.run(1200)
    assert len(world.told) == 1
    wire.bytes_per_s = 0.5 * 12.5e6
    world.run(1200)
    assert len(world.told) == 2
    assert world.link.bytes_per_s == pytest.approx(6.25e6, rel=0.1)
    wire.rtt_s = 0.01
    world.run(1200)
    assert len(world.told) == 3
    assert world.link.rtt_s == pytest.approx(0.01, rel=0.05)


def test_a_short_round_trip_that_changes_by_little_is_no_news() -> None:
    world = World()
    wire = world.add(A, Wire(125e6, 0.0001))
    world.run(600)
    wire.rtt_s = 0.00018
    world.run(600)
    assert len(world.told) == 1


def test_one_measurement_among_other_traffic_changes_nothing() -> None:
    world = World()
    wire = world.add(A, Wire(12.5e6, 0.002))
    world.run(300)
    wire.bytes_per_s, wire.rtt_s = 2e6, 0.02
    starts = len(world.starts())
    while len(world.starts()) == starts:
        world.run(1)
    wire.bytes_per_s, wire.rtt_s = 12.5e6, 0.002
    world.run(600)
    assert len(world.told) == 1


# Peers that do as they like -----------------------------------------------------------------------


def test_a_peer_that_never_answers_is_asked_ever_more_rarely_and_others_are_measured() -> None:
    world = World()
    world.add(A, Wire(loses=lambda send: True))
    world.add(B, Wire())
    world.run(60)
    assert {link.peer_id for _, link in world.told} == {B}
    world.run(1140)
    tries = [send for _, send in world.sent if send.peer_id == A]
    assert 15 < len(tries) < 30
    assert all(send.padding_bytes == 0 for send in tries)
    world.wires[A].loses = lambda send: False
    world.run(120)
    assert {link.peer_id for _, link in world.told} == {A, B}


def test_a_peer_that_answers_ever_so_slowly_takes_no_longer_than_a_request_may() -> None:
    world = World()
    world.add(A, Wire(rtt_s=5.0))
    world.run(0.6)
    assert world.machine.deadline <= world.sent[0][0] + TIMING.request_s
    world.add(B, Wire())
    world.run(TIMING.request_s + 1)
    assert [link.peer_id for _, link in world.told] == [B]


def test_answers_that_nobody_asked_for_count_for_nothing() -> None:
    world = World()
    world.add(A, Wire(12.5e6, 0.01))
    world.add(B, Wire(12.5e6, 0.01))
    twin = World()
    twin.add(A, Wire(12.5e6, 0.01))
    twin.add(B, Wire(12.5e6, 0.01))
    for _ in range(300):
        for world_ in (world, twin):
            world_.run(0.005)
        for _, send in world.sent[-3:-1]:  # again, and from others
            other = B if send.peer_id == A else A
            world.feed(p.Answered(other, send.request, busy=True))
        world.feed(p.Answered(A, 1 << 30, busy=True))
        world.feed(p.Answered(C, 1, busy=True))
        for at, send in world.sent:
            if at < world.now - 0.4:  # answered long ago, on either link
                world.feed(p.Answered(send.peer_id, send.request, busy=True))
    assert world.told == twin.told
    assert len(world.told) == 2


def test_a_peer_that_vanishes_is_forgotten_with_all_that_was_measured() -> None:
    for after_s in (0.1, 0.45, 0.5, 0.55, 30):
        world = World()
        world.add(A, Wire(2.5e6))
        world.run(after_s)
        world.feed(p.Gone(A))
        assert world.machine.deadline == math.inf
        sent = len(world.sent)
        world.run(10)
        assert len(world.sent) == sent
        told = len(world.told)
        world.add(A, Wire(2.5e6))
        world.run(2)
        assert len(world.told) == told + 1


def test_a_probe_that_cannot_be_sent_ends_the_measurement() -> None:
    world = World()
    world.add(A, Wire(2.5e6))
    while not padded(world):
        world.run(0.001)
    world.feed(p.Unsent(A, world.sent[-1][1].request))
    sent = len(world.sent)
    world.run(4)
    assert len(world.sent) == sent
    world.run(8)
    assert world.link.bytes_per_s == pytest.approx(2.5e6, rel=0.1)


EVENTS = st.one_of(
    st.builds(p.Here, st.sampled_from([A, B]), st.sampled_from(["10.0.0.2", "10.0.0.3"])),
    st.builds(p.Gone, st.sampled_from([A, B, C])),
    st.just(p.Asked()),
    st.builds(p.Answered, st.sampled_from([A, B, C]), st.integers(0, 60), st.booleans()),
    st.builds(p.Unsent, st.sampled_from([A, B, C]), st.integers(0, 60)),
    st.builds(p.Tick, st.booleans()),
)


@given(
    st.lists(
        st.tuples(EVENTS, st.sampled_from([0.0, 0.0, 1e-9, 0.001, 0.1, 1.0, 100.0])), max_size=120
    ),
    st.booleans(),
)
def test_whatever_happens_in_any_order_every_figure_is_one_that_a_profile_takes(
    events: list[tuple[p.Event, float]], answering: bool
) -> None:
    machine, now = p.Probing(replace(TIMING, probe_s=3.0), Random(7)), 0.0
    flying: list[p.Send] = []
    for event, wait_s in events:
        if answering and flying and isinstance(event, p.Answered):
            send = flying.pop()  # a real one, out of order
            event = p.Answered(send.peer_id, send.request, event.busy)
        for action in machine.step(event, now):
            if isinstance(action, p.Send):
                flying.append(action)
                assert 0 <= action.padding_bytes <= CHUNK_BYTES_MAX
            else:
                assert msgspec.convert(msgspec.to_builtins(action.link), Link) == action.link
                assert math.isfinite(action.link.bytes_per_s)
        now += wait_s
        if isinstance(event, p.Tick):
            assert machine.deadline > now - wait_s - 1e-9 or wait_s == 0.0
