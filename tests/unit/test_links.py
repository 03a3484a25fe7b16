"""A stage's links: messages whole and in place, and frames that are looked out for."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from peer.ring import links as module
from peer.ring.links import (
    AFTER_S,
    BEFORE_S,
    CROWDED_S,
    CROWDED_STEPS,
    CROWDED_TIMES,
    WORTH_S,
    Links,
)


class Clock:
    """Time that passes with each yield, and what comes then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tick_s = 1e-5

    def tick(self) -> None:
        self.now += self.tick_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(module, "_yield", clock.tick)
    return clock


@pytest.fixture
def links() -> Iterator[Links]:
    with zmq.Context() as context:
        public, secret = zmq.curve_keypair()
        found = Links(context, public, secret, 1 << 20)
        yield found
        found.close()


def nothing() -> None:
    pass


def comes(links: Links, monkeypatch: pytest.MonkeyPatch, *parts: bytes) -> None:
    """One message is there."""
    left = [SimpleNamespace(buffer=memoryview(part), more=True) for part in parts]
    left[-1].more = False

    def recv(flags: int, *, copy: bool) -> Any:
        assert (flags, copy) == (zmq.NOBLOCK, False)
        if not left:
            raise zmq.Again
        return left.pop(0)

    monkeypatch.setattr(links, "pull", SimpleNamespace(recv=recv, close=links.pull.close))


def test_a_message_is_read_whole_and_one_of_too_many_parts_is_not_two(
    links: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    comes(links, monkeypatch, b"a", b"b")
    assert links.receive() == [b"a", b"b"]
    assert links.receive() is None
    comes(links, monkeypatch, *[b"x"] * 50)
    assert len(links.receive() or []) == 3, "so that it is refused"
    assert links.receive() is None


def test_a_frame_is_looked_out_for_from_shortly_before_the_shortest_wait(links: Links) -> None:
    links.rested_s = 100.0
    assert links.soon() is None, "nobody knows"
    for wait_s in (0.005, 0.004, 0.006):
        links.waited(wait_s)
    assert links.soon() == pytest.approx((100.004 - BEFORE_S, 100.004 + AFTER_S))


def test_after_long_waits_one_may_as_well_sleep(links: Links) -> None:
    for _ in range(20):
        links.waited(WORTH_S * 2)
    assert links.soon() is None


def test_what_came_while_it_was_looked_out_for_is_received_once(
    links: Links, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = []
    comes(links, monkeypatch, b"a")
    assert links.spin(1.0, lambda: played.append(1))
    assert played == [1]
    assert links.receive() == [b"a"]
    assert links.receive() is None


def test_nobody_looks_for_longer_than_was_said(links: Links, clock: Clock) -> None:
    links.waited(0.004)
    for _ in range(CROWDED_TIMES * 2):
        assert not links.spin(clock.now + AFTER_S, nothing)
        assert links.soon() is not None, "a frame that comes late says nothing of the core"
    assert clock.now <= CROWDED_TIMES * 2 * (AFTER_S + clock.tick_s * 1.01)


def test_a_stage_whose_core_others_use_sleeps_and_looks_again_later(
    links: Links, clock: Clock
) -> None:
    links.waited(0.004)
    clock.tick_s = CROWDED_S * 2
    for _ in range(CROWDED_TIMES):
        assert links.soon() is not None
        assert not links.spin(clock.now + 1.0, nothing)
    assert [links.soon() for _ in range(CROWDED_STEPS)] == [None] * CROWDED_STEPS
    assert links.soon() is not None
