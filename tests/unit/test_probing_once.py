"""One measurement of one link: right, soon over, cheap, and in nobody's way."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from peer.cluster import probing as p
from peer.protocol import CHUNK_BYTES_MAX, Probe
from tests.wires import HEADER_BYTES, TIMING, Wire, World, padded

A = "a" * 16


@pytest.mark.parametrize("rtt_s", [0.0002, 0.002, 0.01])
@pytest.mark.parametrize("mbit", [1, 10, 54, 100, 300, 1000, 10_000])
@pytest.mark.parametrize("burst_bytes", [0, 32 << 10, 96 << 10])
def test_a_link_is_measured_as_it_is_soon_and_with_few_bytes(
    mbit: int, rtt_s: float, burst_bytes: int
) -> None:
    world = World()
    rate = mbit * 1e6 / 8
    world.add(A, Wire(rate, rtt_s, burst_bytes))
    world.run(0.5)
    began = world.sent[0][0]
    assert 1000.0 < began <= 1000.5
    world.run(1.5)
    assert len(world.told) == 1
    at, link = world.told[0]
    assert link.peer_id == A
    assert link.rtt_s == pytest.approx(rtt_s, rel=0.01, abs=1.01 * HEADER_BYTES / rate)
    # Where the wire holds more than is under way, the answers' pace is the round trip's.
    pace = min(rate, 4 * (128 << 10) / rtt_s)
    assert link.bytes_per_s == pytest.approx(pace, rel=0.15)
    assert padded(world) <= 1.5 * 2**20
    assert at - began < 12 * rtt_s + (1.2 if mbit == 1 else 0.4)
    assert world.flying_most <= 4


def test_what_is_under_way_keeps_a_heartbeat_waiting_for_a_moment_only() -> None:
    for mbit in (1, 2, 5, 10, 54, 100, 1000):
        world = World()
        wire = world.add(A, Wire(mbit * 1e6 / 8, burst_bytes=64 << 10))
        waited: list[float] = []
        while not world.told:
            world.run(0.001)
            waited.append(wire.free_at - world.now)
        assert max(waited) < (0.6 if mbit == 1 else 0.3 if mbit < 10 else 0.12), mbit


def test_answers_that_were_read_late_and_together_do_not_make_a_fast_link() -> None:
    """This process was kept from reading: all answers of the train seem to come at once."""
    machine = p.Probing(TIMING, Random(1))
    machine.step(p.Here(A, "10.0.0.2"), 0.0)
    wire, now = Wire(12.5e6, burst_bytes=0), 1.0
    actions = machine.step(p.Tick(busy=False), now)
    while not isinstance(actions[-1], p.Measured):
        sends = [action for action in actions if isinstance(action, p.Send)]
        now = max(wire.answered_at(send, now) for send in sends)
        actions = []
        for number, send in enumerate(sends):
            late = now + number * 1e-5
            actions += machine.step(p.Answered(A, send.request, busy=False), late)
    assert 0.7 * 12.5e6 < actions[-1].link.bytes_per_s < 1.3 * 12.5e6


def test_the_probes_fit_what_the_protocol_allows() -> None:
    world = World()
    world.add(A, Wire(1e12, 1e-6))
    world.run(600)
    for _, send in world.sent:
        assert 0 < send.request < 1 << 31
        assert send.padding_bytes <= CHUNK_BYTES_MAX
    numbers = [send.request for _, send in world.sent]
    assert len(set(numbers)) == len(numbers)
    probe = msgspec.convert({"m": "probe", "request": numbers[-1]}, Probe)
    assert probe.request == numbers[-1]
